//! One model as data: `models/*.toml`.

use crate::model::ModelTask;

/// A model manifest: sources, pinned content, task and limits.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Metric label and API id: lower case letters, digits, `.`, `_`, `-`, `/`.
    pub name: String,
    /// Other names that requests may use.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// What it is for.
    pub task: ModelTask,
    /// SPDX expression of the weights.
    pub license: String,
    /// Named in `/v1/models`.
    #[serde(default)]
    pub owned_by: Option<String>,
    /// Its files.
    pub files: Vec<ManifestFile>,
    /// Limits, each at most what the model's own header allows.
    #[serde(default)]
    pub limits: ManifestLimits,
    /// Share of the device relative to others with work.
    #[serde(default = "one")]
    pub weight: f64,
    /// Load before the server says it is ready.
    #[serde(default = "yes")]
    pub preload: bool,
}

/// One file of a model.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// What it is called here: `model.gguf`, `model.safetensors`, `config.json`, `tokenizer.json`.
    pub file: String,
    /// Lower-case hexadecimal.
    pub sha256: String,
    /// Exact size.
    pub bytes: u64,
    /// Tried in order: `package:NAME==VERSION/MEMBER` or `file:PATH`.
    pub sources: Vec<String>,
}

/// Limits of a model.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestLimits {
    /// Longest sequence in tokens.
    pub context: Option<u32>,
    /// Most sequences running at once.
    pub seats: Option<u32>,
}

fn one() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}
