//! What can be said of a model without opening it: its task and its state.

/// What a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelTask {
    /// Text generation.
    Generate,
    /// Embeddings.
    Embed,
    /// One score for a query and a document.
    Rerank,
    /// A score for each of its labels.
    Classify,
}

impl ModelTask {
    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            ModelTask::Generate => "generate",
            ModelTask::Embed => "embed",
            ModelTask::Rerank => "rerank",
            ModelTask::Classify => "classify",
        }
    }
}

/// How an encoder's answers are to be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncoderCard {
    /// Tokens that it knows.
    pub vocab: u32,
    /// Values of a vector, or scores.
    pub width: u32,
    /// How the states of a text's tokens become one vector: `mean`, `cls` or `last_token`.
    pub pooling: &'static str,
    /// Whether vectors are scaled to unit length unless the caller wishes otherwise.
    pub normalize: bool,
    /// Names of the scores, in order; empty for vectors.
    pub labels: Vec<String>,
    /// Each score is a probability of its own (sigmoid); otherwise they share one (softmax).
    pub independent: bool,
    /// The second of two texts has a token type of its own.
    pub segments: bool,
    /// The first values of a vector are a vector too (Matryoshka representation learning).
    pub matryoshka: bool,
}

/// How float weights are kept and multiplied. Weights that their file quantises stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bf16 for safetensors files where the processor multiplies it faster, else f32.
    #[default]
    Auto,
    /// As exact as the files allow.
    F32,
    /// Half the memory; vectors keep a cosine of 0.9999 to those of f32.
    Bf16,
    /// A quarter of the memory: 8-bit integers in groups of 32 with a scale each; activations too.
    /// Vectors keep a cosine of 0.995 to those of f32.
    Int8,
}

/// Where a model is on its way to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ModelState {
    /// Known, nothing on disk.
    Absent,
    /// Its files are on their way.
    Fetching,
    /// On its way to the device.
    Loading,
    /// Answers.
    Ready,
    /// Out of device memory, comes back on demand.
    Evicted,
    /// Cannot be loaded.
    Failed,
}

impl ModelState {
    /// Every state, in order.
    pub const ALL: [ModelState; 6] = [
        ModelState::Absent,
        ModelState::Fetching,
        ModelState::Loading,
        ModelState::Ready,
        ModelState::Evicted,
        ModelState::Failed,
    ];

    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            ModelState::Absent => "absent",
            ModelState::Fetching => "fetching",
            ModelState::Loading => "loading",
            ModelState::Ready => "ready",
            ModelState::Evicted => "evicted",
            ModelState::Failed => "failed",
        }
    }
}
