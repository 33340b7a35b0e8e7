//! Architectures: one file each, which turns a model's tensors into a program of shared ops.
//! A line in the registry adds one. Knows tensors and ops, not how either is stored or run.

mod bert;
mod llama;
mod rope;

use serde_json::Value as Json;

use crate::kernels::builder::Capacity;
use crate::kernels::ops::{KvShape, Program};
use crate::model::ModelTask;
use crate::store::gguf::Header;
use crate::weights::{LoadError, Weights};

/// What a model's own description says, before a tensor is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outline {
    /// What it is for.
    pub task: ModelTask,
    /// Longest sequence it was made for.
    pub context: usize,
    /// Its KV cache, for generators.
    pub kv: Option<KvShape>,
    /// Values of a vector, or tokens of the vocabulary.
    pub output_width: usize,
}

/// A model's own description of itself.
#[derive(Debug)]
pub enum Description<'a> {
    /// GGUF metadata.
    Gguf(&'a Header),
    /// Hugging Face's `config.json`, and what `pooling.json` and `modules.json` say.
    Json {
        /// `config.json`.
        config: &'a Json,
        /// sentence-transformers' pooling configuration.
        pooling: Option<&'a Json>,
        /// sentence-transformers' list of modules.
        modules: Option<&'a Json>,
    },
}

/// One architecture.
struct Architecture {
    /// As `general.architecture` or `model_type` names it.
    name: &'static str,
    outline: fn(&Description<'_>) -> Result<Outline, LoadError>,
    build: fn(&Description<'_>, &Weights, Capacity) -> Result<Program, LoadError>,
}

/// Every architecture; a line adds one.
const REGISTRY: &[Architecture] = &[
    Architecture { name: "llama", outline: llama::outline, build: llama::build },
    Architecture { name: "bert", outline: bert::outline, build: bert::build },
];

/// What the model says about itself.
///
/// # Errors
/// An unknown architecture, or a description that lacks what it needs.
pub fn outline(description: &Description<'_>) -> Result<Outline, LoadError> {
    (architecture(description)?.outline)(description)
}

/// The model's program, weights and all.
///
/// # Errors
/// As [`outline`], and tensors that are missing, misshapen or unreadable.
pub fn build(
    description: &Description<'_>,
    weights: &Weights,
    capacity: Capacity,
) -> Result<Program, LoadError> {
    (architecture(description)?.build)(description, weights, capacity)
}

fn architecture(description: &Description<'_>) -> Result<&'static Architecture, LoadError> {
    let name = match description {
        Description::Gguf(header) => header.str("general.architecture").map_err(shape)?,
        Description::Json { config, .. } => {
            config.get("model_type").and_then(Json::as_str).unwrap_or("(none)")
        }
    };
    REGISTRY.iter().find(|architecture| architecture.name == name).ok_or_else(|| {
        let known: Vec<&str> = REGISTRY.iter().map(|architecture| architecture.name).collect();
        let known = known.join(", ");
        LoadError::Shape(format!("architecture '{name}' is not known; known are {known}"))
    })
}

/// A header's complaint as a load error.
fn shape(error: impl std::fmt::Display) -> LoadError {
    LoadError::Shape(error.to_string())
}
