//! Architectures: one file each, which turns a model's tensors into a program of shared ops.
//! A line in the registry adds one. Knows tensors and ops, not how either is stored or run.

mod bert;
mod decoder;
mod facts;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod rope;
mod smollm3;

use serde_json::Value as Json;

use crate::arch::decoder::Shape;
use crate::kernels::builder::Capacity;
use crate::kernels::ops::{KvShape, Program};
use crate::kernels::packed::PackedFormat;
use crate::model::{EncoderCard, ModelTask};
use crate::store::gguf::Header;
use crate::weights::{LoadError, Weights};

/// Labels that a classifier may have.
const LABELS_MAX: usize = 65_536;

/// What a model's own description says, before a tensor is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outline {
    /// What it is for.
    pub task: ModelTask,
    /// Longest sequence it was made for.
    pub context: usize,
    /// Its KV cache, for generators.
    pub kv: Option<KvShape>,
    /// Values of a vector, scores, or tokens of the vocabulary.
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
    /// How an encoder's answers are to be read; none for generators.
    card: fn(&Description<'_>) -> Result<Option<EncoderCard>, LoadError>,
    build: fn(&Description<'_>, &Weights, Capacity) -> Result<Program, LoadError>,
}

/// Decoders of one family, which differ in what makes up their shape; a line adds one.
const DECODERS: &[(&str, ReadShape)] = &[
    ("llama", llama::shape),
    ("mistral", mistral::shape),
    ("qwen2", qwen2::shape),
    ("qwen3", qwen3::shape),
    ("smollm3", smollm3::shape),
];

type ReadShape = fn(&Description<'_>) -> Result<Shape, LoadError>;

/// Every other architecture; a line adds one.
const REGISTRY: &[Architecture] =
    &[bert("bert"), bert("roberta"), bert("xlm-roberta"), bert("camembert"), bert("distilbert")];

/// A member of BERT's family.
const fn bert(name: &'static str) -> Architecture {
    Architecture { name, outline: bert::outline, card: bert::card, build: bert::build }
}

/// What the model says about itself.
///
/// # Errors
/// An unknown architecture, or a description that lacks what it needs.
pub fn outline(description: &Description<'_>) -> Result<Outline, LoadError> {
    if let Some(shape) = decoder(description)? {
        return Ok(shape(description)?.outline());
    }
    (architecture(description)?.outline)(description)
}

/// The matrix that a generator ends with, as it is packed: format, outputs and inputs.
pub fn head(weights: &Weights) -> Option<(PackedFormat, usize, usize)> {
    decoder::heads().find_map(|name| weights.packed(&name))
}

/// How the model's answers are to be read, if it is an encoder.
///
/// # Errors
/// As [`outline`].
pub fn encoder_card(description: &Description<'_>) -> Result<Option<EncoderCard>, LoadError> {
    if decoder(description)?.is_some() {
        return Ok(None);
    }
    (architecture(description)?.card)(description)
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
    if let Some(shape) = decoder(description)? {
        return shape(description)?.build(weights, capacity);
    }
    (architecture(description)?.build)(description, weights, capacity)
}

fn decoder(description: &Description<'_>) -> Result<Option<ReadShape>, LoadError> {
    let name = name(description)?;
    Ok(DECODERS.iter().find(|(known, _)| *known == name).map(|(_, shape)| *shape))
}

fn architecture(description: &Description<'_>) -> Result<&'static Architecture, LoadError> {
    let name = name(description)?;
    REGISTRY.iter().find(|architecture| architecture.name == name).ok_or_else(|| {
        let others = REGISTRY.iter().map(|architecture| architecture.name);
        let known: Vec<&str> = DECODERS.iter().map(|(name, _)| *name).chain(others).collect();
        let known = known.join(", ");
        LoadError::Shape(format!("architecture '{name}' is not known; known are {known}"))
    })
}

/// The labels of a sequence classifier by `config.json`, in order; none if it is no classifier.
fn labels(config: &Json) -> Result<Option<Vec<String>>, LoadError> {
    let names = config.get("architectures").and_then(Json::as_array);
    let mut names = names.into_iter().flatten().filter_map(Json::as_str);
    if !names.any(|name| name.ends_with("ForSequenceClassification")) {
        return Ok(None);
    }
    // The library that writes these files leaves its default of two labels out.
    let Some(named) = config.get("id2label").and_then(Json::as_object) else {
        return Ok(Some(vec!["LABEL_0".into(), "LABEL_1".into()]));
    };
    let label = |index: usize| named.get(&index.to_string()).and_then(Json::as_str);
    let labels: Option<Vec<String>> =
        (0..named.len()).map(|index| label(index).map(str::to_owned)).collect();
    match labels {
        Some(labels) if (1..=LABELS_MAX).contains(&labels.len()) => Ok(Some(labels)),
        _ => {
            let message = format!(
                "config.json: id2label has to name labels 0, 1, … as text, at most {LABELS_MAX}"
            );
            Err(LoadError::Shape(message))
        }
    }
}

/// What the description calls its architecture.
fn name<'a>(description: &Description<'a>) -> Result<&'a str, LoadError> {
    match description {
        Description::Gguf(header) => header.str("general.architecture").map_err(shape),
        Description::Json { config, .. } => {
            Ok(config.get("model_type").and_then(Json::as_str).unwrap_or("(none)"))
        }
    }
}

/// A header's complaint as a load error.
fn shape(error: impl std::fmt::Display) -> LoadError {
    LoadError::Shape(error.to_string())
}
