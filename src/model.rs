//! What can be said of a model without opening it: its task and its state.

/// What a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelTask {
    /// Text generation.
    Generate,
    /// Embeddings.
    Embed,
}

impl ModelTask {
    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            ModelTask::Generate => "generate",
            ModelTask::Embed => "embed",
        }
    }
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
