//! The vocabulary that the front and the engine share: what is asked for and what comes back.
//! Knows no HTTP, no device and no clock; times are given in by the caller.

use std::sync::Arc;

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

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0, choice: 0 }
    }
}

/// What the engine says about a request. Every admitted request ends in exactly one terminal
/// event: `Done` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    /// One generated token (never a stop token).
    Token(TokenId),
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
pub struct Sink(tokio::sync::mpsc::Sender<Event>);

/// The receiving half of a [`Sink`].
pub type Events = tokio::sync::mpsc::Receiver<Event>;

impl Sink {
    /// A channel that holds every event `task` can cause.
    pub fn for_task(task: &Task) -> (Sink, Events) {
        let events = match task {
            Task::Generate(generate) => generate.max_tokens as usize,
            Task::Encode(encode) => encode.inputs.len(),
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(events + 2);
        (Sink(sender), receiver)
    }

    /// Hands over one event. A gone receiver is a cancelled request: nothing is lost that
    /// anybody waits for.
    ///
    /// # Panics
    /// If more events are sent than the task can cause: a defect of the engine.
    pub fn send(&self, event: Event) {
        use tokio::sync::mpsc::error::TrySendError;
        if let Err(TrySendError::Full(_)) = self.0.try_send(event) {
            panic!("an event channel is sized for the whole answer");
        }
    }

    /// Whether the receiver is gone.
    pub fn is_cancelled(&self) -> bool {
        self.0.is_closed()
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
