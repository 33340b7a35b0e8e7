//! A front over an engine that the test drives by hand: three tiny models whose tokens are bytes.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Front;
use super::callers::Callers;
use crate::catalog::{Catalog, ModelCard};
use crate::config::Config;
use crate::lifecycle::{Lifecycle, Phase};
use crate::model::{EncoderCard, ModelState, ModelTask};
use crate::request::{Event, Finish, Sink, Submission, Task, TokenId, Usage};
use crate::telemetry::{Setup, Telemetry};
use crate::text::{ChatTemplate, ModelText, Tokenizer};

/// The generator's context in tokens.
pub(crate) const CONTEXT: u32 = 64;

/// The encoder's limit in tokens.
pub(crate) const INPUT: u32 = 16;

/// The token that ends an answer.
pub(crate) const END: TokenId = 256;

/// The models: `tiny` (alias `gpt-x`) generates, `org/vec` embeds, `late` is still loading.
pub(crate) fn front(config: Config) -> (Arc<Front>, mpsc::Receiver<Submission>) {
    front_with(config, vec![])
}

/// As [`front`], with more encoders.
pub(crate) fn front_with(
    config: Config,
    more: Vec<(&'static str, ModelTask, EncoderCard)>,
) -> (Arc<Front>, mpsc::Receiver<Submission>) {
    let card = |name: &str, task| ModelCard {
        name: name.into(),
        aliases: if name == "tiny" { vec!["gpt-x".into()] } else { vec![] },
        task,
        created: 1_700_000_000,
        owned_by: "tests".into(),
    };
    let mut cards = vec![
        card("tiny", ModelTask::Generate),
        card("org/vec", ModelTask::Embed),
        card("late", ModelTask::Generate),
    ];
    cards.extend(more.iter().map(|(name, task, _)| card(name, *task)));
    let models = cards.iter().map(|card| (card.name.clone(), card.task)).collect();
    let telemetry = Telemetry::new(Setup { models, ..Setup::default() });
    let catalog = Catalog::new(cards);
    let vectors = EncoderCard { width: 3, pooling: "mean", ..EncoderCard::default() };
    catalog.find("org/vec").unwrap().set_encoder(vectors);
    for (name, _, encoder) in &more {
        catalog.find(name).unwrap().set_encoder(encoder.clone());
    }
    let encoders = more.iter().map(|(name, ..)| (*name, INPUT));
    for (name, context) in encoders.chain([("tiny", CONTEXT), ("org/vec", INPUT)]) {
        let model = catalog.find(name).unwrap();
        model.set_text(text(), context);
        model.set_state(ModelState::Ready);
    }
    let late = catalog.find("late").unwrap();
    late.set_state(ModelState::Loading);
    late.set_eta(Duration::from_secs(7));
    let lifecycle = Lifecycle::new(Duration::from_secs(30), Arc::clone(&telemetry));
    advance(&lifecycle, Phase::Ready);
    let (inbox, submissions) = mpsc::channel(config.limits.queue_requests);
    let callers = Callers::open(&config.auth, Arc::clone(&telemetry)).expect("keys");
    let front =
        Front::new(Arc::new(config), Arc::new(catalog), telemetry, lifecycle, callers, inbox);
    (front, submissions)
}

/// Moves the phase.
pub(crate) fn advance(lifecycle: &Lifecycle, phase: Phase) {
    if phase == Phase::Ready {
        lifecycle.models_ready();
    }
    if lifecycle.phase() != phase {
        lifecycle.jump(phase);
    }
}

/// A message a line, as `role:content`, and the role of the answer.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}\
     assistant:{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}";

fn text() -> ModelText {
    ModelText {
        tokenizer: Arc::new(Tokenizer::from_hf_json(tokenizer_json().as_bytes()).unwrap()),
        template: Some(Arc::new(ChatTemplate::new(TEMPLATE, "", "").unwrap())),
        stop_tokens: Arc::new([END]),
    }
}

/// A byte-level tokenizer without merges: a byte's token id is the byte.
fn tokenizer_json() -> String {
    let mut vocab = String::new();
    let mut moved = 0;
    for byte in 0..=255_u32 {
        let shown = match byte {
            33..=126 | 161..=172 | 174..=255 => byte,
            _ => {
                moved += 1;
                255 + moved
            }
        };
        let shown = char::from_u32(shown).unwrap().to_string();
        let shown = serde_json::to_string(&shown).unwrap();
        write!(vocab, "{shown}:{byte},").unwrap();
    }
    let level =
        r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#;
    format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"normalizer":null,
        "added_tokens":[{{"id":256,"content":"<|end|>","single_word":false,"lstrip":false,
        "rstrip":false,"normalized":false,"special":true}}],
        "pre_tokenizer":{level},"post_processor":null,"decoder":{level},
        "model":{{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,
        "end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,
        "vocab":{{{vocab}"<|end|>":256}},"merges":[]}}}}"#
    )
}

/// Sends `text` a byte a token.
pub(crate) fn say(sink: &Sink, text: &str) {
    text.bytes().for_each(|byte| sink.send(Event::Token(byte.into())));
}

/// Ends an answer of `generated` tokens.
pub(crate) fn done(sink: &Sink, finish: Finish, prompt: u32, generated: u32) {
    let usage = Usage { prompt_tokens: prompt, cached_tokens: 2, generated_tokens: generated };
    sink.send(Event::Done { finish, usage });
}

/// The prompt as text.
pub(crate) fn prompt(submission: &Submission) -> String {
    match &submission.request.task {
        Task::Generate(generate) => {
            generate.prompt.iter().map(|&token| char::from(token as u8)).collect()
        }
        Task::Encode(_) => panic!("an embedding has no prompt"),
    }
}

/// The value of the one series of `family` with all these labels; zero if there is none.
pub(crate) fn metric(front: &Front, family: &str, labels: &[(&str, &str)]) -> f64 {
    let rendered = front.telemetry.render();
    let wanted = |line: &&str| {
        line.starts_with(&format!("{family}{{"))
            && labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")))
    };
    let series: Vec<&str> = rendered.lines().filter(wanted).collect();
    assert!(series.len() <= 1, "more than one series: {series:?}");
    series.first().map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// How often requests ended like this.
pub(crate) fn outcomes(front: &Front, model: &str, task: &str, outcome: &str) -> f64 {
    let labels = [("model", model), ("task", task), ("outcome", outcome)];
    metric(front, "sconce_requests_total", &labels)
}

/// How many API requests have ended at all.
pub(crate) fn ended(front: &Front) -> f64 {
    let rendered = front.telemetry.render();
    let lines = rendered.lines().filter(|line| line.starts_with("sconce_requests_total{"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}
