//! A front with a small model of each kind, whose tokens are bytes. Its engine is the caller.

use std::fmt::Write as _;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use sconce::admission::Front;
use sconce::admission::callers::Callers;
use sconce::catalog::{Catalog, ModelCard};
use sconce::config::Config;
use sconce::lifecycle::Lifecycle;
use sconce::model::{EncoderCard, ModelState, ModelTask};
use sconce::request::{Submission, TokenId};
use sconce::telemetry::{Setup, Telemetry};
use sconce::text::{ChatTemplate, ModelText, Tokenizer};
use tokio::sync::mpsc;

/// Tokens that a model takes.
const CONTEXT: u32 = 64;

/// The token that ends an answer.
pub const END: TokenId = 256;

/// Width of a model's answers.
pub const WIDTH: u32 = 3;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}";

/// `tiny` generates, `vec` embeds, `rank` ranks, `mood` classifies.
pub fn front() -> (Arc<Front>, mpsc::Receiver<Submission>) {
    let models = [
        ("tiny", ModelTask::Generate),
        ("vec", ModelTask::Embed),
        ("rank", ModelTask::Rerank),
        ("mood", ModelTask::Classify),
    ];
    let card = |(name, task): (&str, ModelTask)| ModelCard {
        name: name.to_owned(),
        aliases: vec![],
        task,
        created: 1_700_000_000,
        owned_by: "fuzz".to_owned(),
    };
    let named = models.iter().map(|(name, task)| ((*name).to_owned(), *task)).collect();
    let telemetry = Telemetry::new(Setup { models: named, ..Setup::default() });
    let catalog = Catalog::new(models.into_iter().map(card).collect());
    for model in catalog.models() {
        let labels = ["calm", "glad", "sad"].map(str::to_owned).to_vec();
        let encoder = EncoderCard { width: WIDTH, pooling: "mean", labels, ..Default::default() };
        if model.task != ModelTask::Generate {
            model.set_encoder(encoder);
        }
        let template = ChatTemplate::new(TEMPLATE, "", "").expect("it compiles");
        let (template, stop_tokens) = (Some(Arc::new(template)), Arc::from([END]));
        model.set_text(ModelText { tokenizer: tokenizer(), template, stop_tokens }, CONTEXT);
        model.set_state(ModelState::Ready);
    }
    let config = Config::default();
    let lifecycle = Lifecycle::new(Duration::from_secs(30), Arc::clone(&telemetry));
    lifecycle.models_ready();
    let (inbox, submissions) = mpsc::channel(config.limits.queue_requests);
    let callers = Callers::open(&config.auth, Arc::clone(&telemetry)).expect("no file of keys");
    let config = Arc::new(config);
    let front = Front::new(config, Arc::new(catalog), telemetry, lifecycle, callers, inbox);
    (front, submissions)
}

/// A byte-level tokenizer without merges: a byte's token id is the byte; 256 ends an answer.
pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        Arc::new(Tokenizer::from_hf_json(json().as_bytes()).expect("a sound tokenizer"))
    });
    Arc::clone(&TOKENIZER)
}

fn json() -> String {
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
        let shown = char::from_u32(shown).expect("a character").to_string();
        let shown = serde_json::to_string(&shown).expect("a string");
        write!(vocab, "{shown}:{byte},").expect("a string takes everything");
    }
    let level =
        r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#;
    format!(
        r#"{{"version":"1.0","added_tokens":[{{"id":256,"content":"<|end|>","single_word":false,
        "lstrip":false,"rstrip":false,"normalized":false,"special":true}}],
        "normalizer":null,"pre_tokenizer":{level},"post_processor":null,"decoder":{level},
        "model":{{"type":"BPE","vocab":{{{vocab}"<|end|>":256}},"merges":[]}}}}"#
    )
}
