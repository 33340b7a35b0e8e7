//! BERT and its family: learned positions, layer norms after attention and MLP, biases everywhere.
//! One pooled vector an input, or a classifier's scores. From safetensors.

mod family;

use serde_json::Value as Json;

use crate::arch::{Description, Outline, labels};
use crate::head;
use crate::kernels::builder::{Builder, Capacity, Dense, Scale};
use crate::kernels::ops::{
    Activation, Buf, Embed, Epilogue, Op, PackedAttention, PoolKind, Program, Rows, Vector,
};
use crate::model::{EncoderCard, ModelTask};
use crate::weights::{LoadError, Part, Weights, in_parallel};
use family::{BERT, DISTILBERT, Family, ROBERTA};

/// Hyper-parameters, checked.
struct Shape {
    family: &'static Family,
    hidden: usize,
    layers: usize,
    heads: usize,
    ff: usize,
    activation: Epilogue,
    vocab: usize,
    /// Rows of the table of positions, and the first one in use.
    positions: usize,
    first_position: usize,
    eps: f32,
    /// Labels of a classifier; none for embeddings.
    labels: usize,
    pool: PoolKind,
    /// What tensor names start with: nothing, or the family's prefix.
    prefix: &'static str,
}

/// One layer's parameters.
struct Layer {
    qkv: Dense,
    output: Dense,
    attention_norm: Scale,
    up: Dense,
    down: Dense,
    mlp_norm: Scale,
}

/// Buffers that every layer uses in turn.
struct Buffers {
    hidden: Buf,
    qkv: Buf,
}

pub(super) fn outline(description: &Description<'_>) -> Result<Outline, LoadError> {
    let shape = Shape::read(description)?;
    let (task, output_width) = match shape.labels {
        0 => (ModelTask::Embed, shape.hidden),
        1 => (ModelTask::Rerank, 1),
        labels => (ModelTask::Classify, labels),
    };
    let context = shape.positions - shape.first_position;
    Ok(Outline { task, context, kv: None, output_width })
}

/// How its answers are to be read.
pub(super) fn card(description: &Description<'_>) -> Result<Option<EncoderCard>, LoadError> {
    let shape = Shape::read(description)?;
    let Description::Json { config, modules, .. } = description else {
        return Err(LoadError::Shape("encoders are read from safetensors files".into()));
    };
    Ok(Some(EncoderCard {
        vocab: shape.vocab as u32,
        width: if shape.labels == 0 { shape.hidden } else { shape.labels } as u32,
        pooling: match shape.pool {
            PoolKind::Mean => "mean",
            PoolKind::Cls => "cls",
            PoolKind::Last => "last_token",
        },
        normalize: normalizes(*modules)?,
        labels: labels(config)?.unwrap_or_default(),
        independent: shape.labels == 1 || multi_label(config),
        segments: shape.family.segments && has_segments(config),
        matryoshka: false,
    }))
}

pub(super) fn build(
    description: &Description<'_>,
    weights: &Weights,
    capacity: Capacity,
) -> Result<Program, LoadError> {
    let mut shape = Shape::read(description)?;
    let prefix = shape.family.prefix;
    if weights.has(&format!("{prefix}embeddings.word_embeddings.weight")) {
        shape.prefix = prefix;
    }
    let layers = in_parallel(shape.layers, |index| Layer::load(&shape, weights, index))?;
    let table = weights.matrix(&[shape.embedding("word", shape.vocab)], shape.hidden)?;
    let (positions, types) = (shape.position_table(weights)?, shape.types(weights)?);
    let norm = shape.norm(weights, "embeddings.LayerNorm")?;

    let mut builder = Builder::new(capacity);
    let buffers = Buffers {
        hidden: builder.full(Rows::All, shape.hidden),
        qkv: builder.full(Rows::All, 3 * shape.hidden),
    };
    let hidden = buffers.hidden;
    builder.push(Op::Embed(Embed { table, positions: Some(positions), types, output: hidden }));
    builder.norm(&norm, hidden, Activation::Full(hidden));
    for layer in &layers {
        layer.push(&mut builder, &shape, &buffers);
    }
    builder.keep_hidden(hidden);
    let output = match shape.labels {
        0 => head::pool(&mut builder, hidden, shape.pool),
        labels => {
            let names = &shape.family.head;
            let dense = dense(weights, &[names.dense], (shape.hidden, shape.hidden))?;
            let scores = self::dense(weights, &[names.output], (labels, shape.hidden))?;
            head::scores(&mut builder, hidden, (&dense, names.activation), &scores)
        }
    };
    Ok(builder.finish(output, None))
}

impl Shape {
    fn read(description: &Description<'_>) -> Result<Self, LoadError> {
        let Description::Json { config, pooling, .. } = description else {
            return Err(LoadError::Shape("encoders are read from safetensors files".into()));
        };
        let text = |key: &str| config.get(key).and_then(Json::as_str);
        let family = match text("model_type").unwrap_or_default() {
            "distilbert" => &DISTILBERT,
            "roberta" | "xlm-roberta" | "camembert" => &ROBERTA,
            _ => &BERT,
        };
        let size = |key: &str| -> Result<usize, LoadError> {
            let value = config.get(key).and_then(Json::as_u64).filter(|&v| v > 0 && v < 1 << 24);
            let message = || LoadError::Shape(format!("config.json: '{key}' is missing or absurd"));
            value.map(|value| value as usize).ok_or_else(message)
        };
        let positions = text("position_embedding_type").unwrap_or("absolute");
        if positions != "absolute" {
            let message = format!("config.json: position_embedding_type '{positions}' is unknown");
            return Err(LoadError::Shape(message));
        }
        let activation = match text(family.keys.activation).unwrap_or("gelu") {
            "gelu" => Epilogue::Gelu,
            "relu" => Epilogue::Relu,
            other => {
                let message = format!("config.json: activation '{other}' is not known yet");
                return Err(LoadError::Shape(message));
            }
        };
        let padding = config.get("pad_token_id").and_then(Json::as_u64).unwrap_or(1) as usize;
        let this = Self {
            hidden: size(family.keys.hidden)?,
            layers: size(family.keys.layers)?,
            heads: size(family.keys.heads)?,
            ff: size(family.keys.ff)?,
            activation,
            vocab: size("vocab_size")?,
            positions: size("max_position_embeddings")?,
            first_position: if family.padded_positions { padding + 1 } else { 0 },
            eps: config.get("layer_norm_eps").and_then(Json::as_f64).unwrap_or(1e-12) as f32,
            labels: labels(config)?.map_or(0, |labels| labels.len()),
            pool: pooling_kind(*pooling)?,
            prefix: "",
            family,
        };
        if !this.hidden.is_multiple_of(this.heads) || this.layers > 1024 {
            let message = "config.json: the hidden size is no multiple of the number of heads";
            return Err(LoadError::Shape(message.into()));
        }
        if this.first_position >= this.positions {
            let message = "config.json: max_position_embeddings leaves no position in use";
            return Err(LoadError::Shape(message.into()));
        }
        Ok(this)
    }

    fn embedding(&self, name: &str, rows: usize) -> Part {
        Part::plain(format!("{}embeddings.{name}_embeddings.weight", self.prefix), rows)
    }

    /// The rows in use.
    fn position_table(&self, weights: &Weights) -> Result<Vector, LoadError> {
        let table = weights.rows(&self.embedding("position", self.positions), self.hidden)?;
        Ok(table[self.first_position * self.hidden..].into())
    }

    /// Token types are a vocabulary of their own, of a size that old configs leave out.
    fn types(&self, weights: &Weights) -> Result<Option<Vector>, LoadError> {
        if !self.family.types {
            return Ok(None);
        }
        let name = format!("{}embeddings.token_type_embeddings.weight", self.prefix);
        let rows = weights.size(&name)?.0;
        Ok(Some(weights.rows(&Part::plain(name, rows), self.hidden)?.into()))
    }

    fn norm(&self, weights: &Weights, name: &str) -> Result<Scale, LoadError> {
        // Checkpoints of BERT's first years call them by the letters of its paper.
        let vector = |part: &str, before: &str| {
            let name = |part: &str| format!("{}{name}.{part}", self.prefix);
            let old = !weights.has(&name(part)) && weights.has(&name(before));
            weights.vector(&[name(if old { before } else { part })], self.hidden)
        };
        let (weight, bias) = (vector("weight", "gamma")?, vector("bias", "beta")?);
        Ok(Scale { weight, bias: Some(bias), eps: self.eps })
    }
}

impl Layer {
    fn load(shape: &Shape, weights: &Weights, index: usize) -> Result<Self, LoadError> {
        let names = &shape.family.layer;
        let layer = format!("{}.{index}", names.layers);
        let prefix = format!("{}{layer}", shape.prefix);
        let matrix = |names: &[&str], size: (usize, usize)| {
            let names: Vec<String> = names.iter().map(|name| format!("{prefix}.{name}")).collect();
            dense(weights, &names, size)
        };
        let hidden = shape.hidden;
        Ok(Self {
            qkv: matrix(&names.qkv, (hidden, hidden))?,
            output: matrix(&[names.output], (hidden, hidden))?,
            attention_norm: shape.norm(weights, &format!("{layer}.{}", names.attention_norm))?,
            up: matrix(&[names.up], (shape.ff, hidden))?,
            down: matrix(&[names.down], (hidden, shape.ff))?,
            mlp_norm: shape.norm(weights, &format!("{layer}.{}", names.mlp_norm))?,
        })
    }

    fn push(&self, builder: &mut Builder, shape: &Shape, buffers: &Buffers) {
        let &Buffers { hidden, qkv } = buffers;
        let (heads, head_dim) = (shape.heads, shape.hidden / shape.heads);
        let scale = 1.0 / (head_dim as f32).sqrt();

        builder.linear(&self.qkv, Activation::Full(hidden), Epilogue::Store, qkv);
        let output = builder.input_for(&self.output.weight, Rows::All);
        let (kv_heads, causal) = (heads, false);
        let attention = PackedAttention { qkv, heads, kv_heads, causal, head_dim, scale, output };
        builder.push(Op::PackedAttention(attention));
        builder.linear(&self.output, output, Epilogue::Add, hidden);
        builder.norm(&self.attention_norm, hidden, Activation::Full(hidden));
        let ff = builder.linear_for(&self.down.weight, &self.up, hidden, shape.activation);
        builder.linear(&self.down, ff, Epilogue::Add, hidden);
        builder.norm(&self.mlp_norm, hidden, Activation::Full(hidden));
    }
}

/// The stacked matrices `names`, each `rows × columns`, and their biases.
fn dense(
    weights: &Weights,
    names: &[impl AsRef<str>],
    (rows, columns): (usize, usize),
) -> Result<Dense, LoadError> {
    let named = |part: &str| -> Vec<String> {
        names.iter().map(|name| format!("{}.{part}", name.as_ref())).collect()
    };
    let parts: Vec<Part> =
        named("weight").into_iter().map(|name| Part::plain(name, rows)).collect();
    let weight = weights.coarse_matrix(&parts, columns)?;
    let bias = Some(weights.vector(&named("bias"), rows * names.len())?);
    Ok(Dense { weight, bias })
}

/// What sentence-transformers' pooling configuration asks for; the mean if it says nothing. Since
/// version 5 it names the mode, or a list of them; before, each mode was a switch.
fn pooling_kind(pooling: Option<&Json>) -> Result<PoolKind, LoadError> {
    let Some(pooling) = pooling.and_then(Json::as_object) else { return Ok(PoolKind::Mean) };
    if let Some(mode) = pooling.get("pooling_mode") {
        let only = mode.as_array().map_or(Some(mode), |modes| match modes.as_slice() {
            [one] => Some(one),
            _ => None,
        });
        return match only.and_then(Json::as_str) {
            Some("mean") => Ok(PoolKind::Mean),
            Some("cls") => Ok(PoolKind::Cls),
            Some("lasttoken") => Ok(PoolKind::Last),
            _ => Err(LoadError::Shape(format!("pooling.json: pooling_mode {mode} is not known"))),
        };
    }
    let modes = pooling
        .iter()
        .filter(|(key, value)| key.starts_with("pooling_mode_") && value.as_bool() == Some(true));
    let modes: Vec<&str> = modes.map(|(key, _)| key.as_str()).collect();
    match modes.as_slice() {
        ["pooling_mode_mean_tokens"] | [] => Ok(PoolKind::Mean),
        ["pooling_mode_cls_token"] => Ok(PoolKind::Cls),
        ["pooling_mode_lasttoken"] => Ok(PoolKind::Last),
        other => Err(LoadError::Shape(format!("pooling.json: {} is not known", other.join(" + ")))),
    }
}

/// Whether the model's pipeline ends in a normalisation; without a list of modules it does, as
/// nearly every embedding model expects.
fn normalizes(modules: Option<&Json>) -> Result<bool, LoadError> {
    let Some(modules) = modules.and_then(Json::as_array) else { return Ok(true) };
    let kinds = modules.iter().filter_map(|module| module.get("type").and_then(Json::as_str));
    let mut normalizes = false;
    for kind in kinds {
        match kind.rsplit('.').next().unwrap_or_default() {
            "Transformer" | "Pooling" => {}
            "Normalize" => normalizes = true,
            _ => return Err(LoadError::Shape(format!("modules.json: '{kind}' is not known yet"))),
        }
    }
    Ok(normalizes)
}

/// Labels of which several may hold at once.
fn multi_label(config: &Json) -> bool {
    config.get("problem_type").and_then(Json::as_str) == Some("multi_label_classification")
}

/// Whether there is a token type for a second text.
fn has_segments(config: &Json) -> bool {
    config.get("type_vocab_size").and_then(Json::as_u64).unwrap_or(2) > 1
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn poolings_are_those_that_are_known() {
        let kind = |config: Json| pooling_kind(Some(&config)).map_err(|error| error.to_string());
        assert_eq!(kind(json!({ "pooling_mode": "cls" })), Ok(PoolKind::Cls));
        assert_eq!(kind(json!({ "pooling_mode": ["lasttoken"] })), Ok(PoolKind::Last));
        assert_eq!(kind(json!({ "pooling_mode_cls_token": true })), Ok(PoolKind::Cls));
        assert_eq!(kind(json!({ "pooling_mode_cls_token": false })), Ok(PoolKind::Mean));
        for other in [json!("max"), json!(["cls", "mean"]), json!([]), json!(7)] {
            let error = kind(json!({ "pooling_mode": other })).unwrap_err();
            assert!(error.contains("pooling_mode"), "{error}");
        }
        let error = kind(json!({ "pooling_mode_max_tokens": true })).unwrap_err();
        assert!(error.contains("pooling_mode_max_tokens"), "{error}");
    }
}
