//! The vocabulary that the front and the engine share: what is asked for and what comes back.
//! Knows no HTTP, no device and no clock; times are given in by the caller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::error::Error;

/// A token of a model's vocabulary.
pub type TokenId = u32;

/// Names one admitted request for as long as the process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Names one model's lane in the device queue: its index in the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct LaneId(pub u16);

/// Names a tenant; 0 is the anonymous one. Prefix blocks are never shared between tenants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct TenantId(pub u32);

/// Microseconds, as a duration or since the process started (`telemetry::Clock`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Micros(pub u64);

impl Micros {
    /// This many microseconds later.
    #[must_use]
    pub fn plus(self, other: Micros) -> Micros {
        Micros(self.0.saturating_add(other.0))
    }

    /// The time since `earlier`; zero if that is later.
    #[must_use]
    pub fn since(self, earlier: Micros) -> Micros {
        Micros(self.0.saturating_sub(earlier.0))
    }

    /// In seconds.
    pub fn as_seconds(self) -> f64 {
        self.0 as f64 / 1e6
    }
}

impl From<Duration> for Micros {
    /// Rounded down.
    fn from(time: Duration) -> Self {
        Self(u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
    }
}

/// One validated request, as the scheduler sees it.
#[derive(Debug, Clone)]
pub struct Request {
    /// Unique in the process.
    pub id: RequestId,
    /// The model.
    pub lane: LaneId,
    /// Who asks.
    pub tenant: TenantId,
    /// When it was admitted.
    pub arrived: Micros,
    /// When it is no longer worth starting.
    pub deadline: Option<Micros>,
    /// What is asked for.
    pub task: Task,
}

/// What a request asks for. Prompts are token ids: tokenising is the front's work.
#[derive(Debug, Clone)]
pub enum Task {
    /// Text generation from one prompt.
    Generate(Generate),
    /// Vectors or scores for each input.
    Encode(Encode),
}

impl Task {
    /// Tokens that are given, not made. Choices of one prompt share it: it counts with the first.
    pub fn prompt_tokens(&self) -> usize {
        match self {
            Task::Generate(generate) if generate.sampling.choice > 0 => 0,
            Task::Generate(generate) => generate.prompt.len(),
            Task::Encode(encode) => encode.tokens() as usize,
        }
    }
}

/// Text generation: `prompt` is never empty, `prompt.len() + max_tokens` fits the context.
#[derive(Debug, Clone)]
pub struct Generate {
    /// Prompt token ids.
    pub prompt: Arc<[TokenId]>,
    /// At most this many new tokens, at least 1.
    pub max_tokens: u32,
    /// Ends the answer; the token itself is not part of it. Empty under `ignore_eos`.
    pub stop_tokens: Arc<[TokenId]>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// What few requests ask for besides.
    pub detail: Detail,
}

/// What an encoder does: every input is non-empty and within the model's limit.
#[derive(Debug, Clone)]
pub struct Encode {
    /// Each is answered by one [`Event::Vector`].
    pub inputs: Vec<Text>,
    /// What that holds.
    pub yields: Yield,
}

/// One text, or two that are read together, wrapped as the model wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// Token ids.
    pub tokens: Arc<[TokenId]>,
    /// Of two texts, where the second one starts for models that tell them apart (BERT's token
    /// type 1).
    pub second: Option<u32>,
}

/// What an encoder says about one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Yield {
    /// What the model is for: its pooled state, or the score of each label as its last layer
    /// gives it. Neither is normalised.
    #[default]
    Answer,
    /// The last hidden state of each token, one after the other.
    Tokens,
}

impl Text {
    /// One text.
    pub fn single(tokens: impl Into<Arc<[TokenId]>>) -> Self {
        Self { tokens: tokens.into(), second: None }
    }
}

impl Encode {
    /// Tokens of all inputs.
    pub fn tokens(&self) -> u64 {
        self.inputs.iter().map(|input| input.tokens.len() as u64).sum()
    }
}

/// How the next token is chosen. The draw is a function of (seed, choice, position) alone, so
/// the same request gives the same text whatever shares its batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: u32,
    /// Drop tokens below this share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// First counter word of the draw.
    pub seed: u64,
    /// Which of the request's parallel answers this is.
    pub choice: u32,
}

impl Sampling {
    /// Whether the most likely token is taken, whatever the others are.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 || self.temperature.is_nan()
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0, choice: 0 }
    }
}

/// What few requests ask of the sampler besides a draw; nothing by default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Detail {
    /// What is done to the logits first.
    pub adjustment: Option<Arc<Adjustment>>,
    /// Also say each token's log-probability, and those of this many most likely tokens.
    pub logprobs: Option<u8>,
}

impl Detail {
    /// Whether there is anything to do.
    pub fn is_empty(&self) -> bool {
        self.adjustment.is_none() && self.logprobs.is_none()
    }

    /// Whether the next token depends on which tokens were generated before, other than through
    /// the model.
    pub fn looks_back(&self) -> bool {
        self.adjustment.as_ref().is_some_and(|adjustment| adjustment.looks_back())
    }
}

/// What is done to logits before anything else, in this order: the bias is added; the logits of
/// tokens in prompt or answer are divided by the repetition penalty where positive, else
/// multiplied; those of tokens in the answer lose the frequency penalty times their count, and
/// the presence penalty once.
#[derive(Debug, Clone, PartialEq)]
pub struct Adjustment {
    /// Added to a token's logit; each token once.
    pub bias: Vec<(TokenId, f32)>,
    /// 1 changes nothing.
    pub repetition: f32,
    /// 0 changes nothing.
    pub frequency: f32,
    /// 0 changes nothing.
    pub presence: f32,
}

impl Adjustment {
    /// Whether it changes nothing.
    pub fn is_neutral(&self) -> bool {
        self.bias.is_empty() && !self.looks_back()
    }

    /// Whether it depends on the text so far.
    pub fn looks_back(&self) -> bool {
        self.repetition != 1.0 || self.frequency != 0.0 || self.presence != 0.0
    }
}

impl Default for Adjustment {
    fn default() -> Self {
        Self { bias: Vec::new(), repetition: 1.0, frequency: 0.0, presence: 0.0 }
    }
}

/// Log-probabilities at one position, by the softmax of the logits as the model gives them:
/// before adjustment, temperature and filters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The most likely tokens, the likeliest first; of equals the lower id first.
    pub top: Vec<(TokenId, f32)>,
}

/// What the engine says about a request. Every admitted request ends in exactly one terminal
/// event: `Done` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    /// A generation came to the device for the first time; said once, before its tokens.
    Started {
        /// Prompt tokens that came from the prefix cache.
        cached_tokens: u32,
    },
    /// One generated token (never a stop token).
    Token(TokenId),
    /// As `Token`, for a generation that asks for log-probabilities.
    Scored {
        /// The token.
        token: TokenId,
        /// Its log-probability and others'.
        logprobs: Box<Logprobs>,
    },
    /// What the encoder says of input `index`.
    Vector {
        /// Which input.
        index: u32,
        /// As [`Yield`] says.
        values: Vec<f32>,
    },
    /// Terminal: all is said.
    Done {
        /// Why it ended.
        finish: Finish,
        /// What it took.
        usage: Usage,
    },
    /// Terminal: it failed.
    Failed(Error),
}

impl Event {
    /// Whether nothing follows.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Event::Done { .. } | Event::Failed(_))
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// Not a generation: every vector is out.
    Complete,
}

/// What a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Prompt tokens, cached ones included.
    pub prompt_tokens: u32,
    /// Prompt tokens that came from the prefix cache at first admission to the device.
    pub cached_tokens: u32,
    /// Generated tokens, a stop token not counted.
    pub generated_tokens: u32,
}

/// Where a request's events go: the sending half of a channel that holds the whole answer, so
/// the engine never waits on a client. Dropping the receiver cancels the request.
#[derive(Debug, Clone)]
pub struct Sink {
    events: tokio::sync::mpsc::Sender<Event>,
    meter: Arc<Meter>,
}

/// What a request has taken until now, for the account of a client that leaves before the end.
#[derive(Debug)]
pub struct Meter {
    prompt_tokens: u32,
    begun: AtomicBool,
    cached_tokens: AtomicU32,
    generated_tokens: AtomicU32,
    /// Microseconds from arrival to the first rows on the device, and to the first token; `NEVER`
    /// until then.
    waited: AtomicU64,
    spoke: AtomicU64,
}

const NEVER: u64 = u64::MAX;

impl Meter {
    fn of(task: &Task) -> Self {
        Self {
            prompt_tokens: task.prompt_tokens() as u32,
            begun: AtomicBool::new(false),
            cached_tokens: AtomicU32::new(0),
            generated_tokens: AtomicU32::new(0),
            waited: AtomicU64::new(NEVER),
            spoke: AtomicU64::new(NEVER),
        }
    }

    fn count(&self, event: &Event) {
        match event {
            Event::Failed(_) => return,
            Event::Started { cached_tokens } if self.prompt_tokens > 0 => {
                self.cached_tokens.store(*cached_tokens, Relaxed);
            }
            Event::Token(_) | Event::Scored { .. } => {
                self.generated_tokens.fetch_add(1, Relaxed);
            }
            _ => {}
        }
        self.begun.store(true, Relaxed);
    }

    /// Time from arrival to the first rows on the device, once there were any.
    pub fn waited(&self) -> Option<Micros> {
        Some(Micros(self.waited.load(Relaxed))).filter(|time| time.0 != NEVER)
    }

    /// Time from arrival to the first token, once there was one.
    pub fn first_token(&self) -> Option<Micros> {
        Some(Micros(self.spoke.load(Relaxed))).filter(|time| time.0 != NEVER)
    }

    /// The prompt counts from the first event on.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: if self.begun.load(Relaxed) { self.prompt_tokens } else { 0 },
            cached_tokens: self.cached_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
        }
    }
}

/// The receiving half of a [`Sink`].
pub type Events = tokio::sync::mpsc::Receiver<Event>;

impl Sink {
    /// A channel that holds every event `task` can cause.
    pub fn for_task(task: &Task) -> (Sink, Events) {
        let events = match task {
            Task::Generate(generate) => 1 + generate.max_tokens as usize,
            Task::Encode(encode) => encode.inputs.len(),
        };
        // One more for the end, and one for who ends it in the engine's stead.
        let (sender, receiver) = tokio::sync::mpsc::channel(events + 2);
        (Sink { events: sender, meter: Arc::new(Meter::of(task)) }, receiver)
    }

    /// A way to the request for when the engine says nothing any more.
    pub fn weak(&self) -> WeakSink {
        WeakSink(self.events.downgrade())
    }

    /// What is being sent, counted.
    pub fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    /// Notes that it got its first rows, so long after it arrived.
    pub fn scheduled(&self, waited: Micros) {
        self.meter.waited.store(waited.0, Relaxed);
    }

    /// Notes that its first token came, so long after it arrived.
    pub fn first_token(&self, after: Micros) {
        self.meter.spoke.store(after.0, Relaxed);
    }

    /// Hands over one event. A gone receiver is a cancelled request: nothing is lost that
    /// anybody waits for.
    ///
    /// # Panics
    /// If more events are sent than the task can cause: a defect of the engine.
    pub fn send(&self, event: Event) {
        use tokio::sync::mpsc::error::TrySendError;
        self.meter.count(&event);
        if let Err(TrySendError::Full(_)) = self.events.try_send(event) {
            panic!("an event channel is sized for the whole answer");
        }
    }

    /// Whether the receiver is gone.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }
}

/// A way to a request that does not keep it open.
#[derive(Debug)]
pub struct WeakSink(tokio::sync::mpsc::WeakSender<Event>);

impl WeakSink {
    /// Whether more can be said to it.
    pub fn is_open(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// Ends it, if it is open: once for a request.
    pub fn fail(&self, error: &Error) {
        if let Some(events) = self.0.upgrade() {
            // A receiver that is gone needs no answer.
            let _ = events.try_send(Event::Failed(error.clone()));
        }
    }
}

/// A request on its way to the engine.
#[derive(Debug)]
pub struct Submission {
    /// What is asked for.
    pub request: Request,
    /// Where the answer goes.
    pub sink: Sink,
}
