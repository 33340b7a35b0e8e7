//! BERT encoders: learned positions, layer norms after attention and MLP, biases everywhere,
//! exact GELU; one pooled vector an input. From safetensors.

use serde_json::Value as Json;

use crate::arch::{Description, Outline};
use crate::head;
use crate::kernels::builder::{Builder, Capacity, Dense, Scale};
use crate::kernels::ops::{
    Activation, Buf, Embed, Epilogue, Op, PackedAttention, PoolKind, Program, Rows,
};
use crate::model::ModelTask;
use crate::weights::{LoadError, Part, Weights, in_parallel};

/// Hyper-parameters, checked.
struct Shape {
    hidden: usize,
    layers: usize,
    heads: usize,
    ff: usize,
    vocab: usize,
    positions: usize,
    eps: f32,
    pool: PoolKind,
    normalize: bool,
    /// What tensor names start with: empty, or `bert.`.
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
    Ok(Outline {
        task: ModelTask::Embed,
        context: shape.positions,
        kv: None,
        output_width: shape.hidden,
    })
}

pub(super) fn build(
    description: &Description<'_>,
    weights: &Weights,
    capacity: Capacity,
) -> Result<Program, LoadError> {
    let mut shape = Shape::read(description)?;
    if weights.has("bert.embeddings.word_embeddings.weight") {
        shape.prefix = "bert.";
    }
    let layers = in_parallel(shape.layers, |index| Layer::load(&shape, weights, index))?;
    let embedding = |name: &str, rows: usize| {
        Part::plain(format!("{}embeddings.{name}_embeddings.weight", shape.prefix), rows)
    };
    let table = weights.matrix(&[embedding("word", shape.vocab)], shape.hidden)?;
    let positions = weights.rows(&embedding("position", shape.positions), shape.hidden)?;
    let types = weights.rows(&embedding("token_type", shape.types(weights)?), shape.hidden)?;
    let norm = shape.norm(weights, "embeddings.LayerNorm")?;

    let mut builder = Builder::new(capacity);
    let buffers = Buffers {
        hidden: builder.full(Rows::All, shape.hidden),
        qkv: builder.full(Rows::All, 3 * shape.hidden),
    };
    let hidden = buffers.hidden;
    builder.push(Op::Embed(Embed {
        table,
        positions: Some(positions.into()),
        constant: Some(types[..shape.hidden].into()),
        output: hidden,
    }));
    builder.norm(&norm, hidden, Activation::Full(hidden));
    for layer in &layers {
        layer.push(&mut builder, &shape, &buffers);
    }
    let output = head::pool(&mut builder, hidden, shape.pool, shape.normalize);
    Ok(builder.finish(output, None))
}

impl Shape {
    fn read(description: &Description<'_>) -> Result<Self, LoadError> {
        let Description::Json { config, pooling, modules } = description else {
            return Err(LoadError::Shape("bert models are read from safetensors files".into()));
        };
        let size = |key: &str| -> Result<usize, LoadError> {
            let value = config.get(key).and_then(Json::as_u64).filter(|&v| v > 0 && v < 1 << 24);
            let message = || LoadError::Shape(format!("config.json: '{key}' is missing or absurd"));
            value.map(|value| value as usize).ok_or_else(message)
        };
        for (key, known) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
            let value = config.get(key).and_then(Json::as_str).unwrap_or(known);
            if value != known {
                let message = format!("config.json: {key} '{value}' is not known, only '{known}'");
                return Err(LoadError::Shape(message));
            }
        }
        let this = Self {
            hidden: size("hidden_size")?,
            layers: size("num_hidden_layers")?,
            heads: size("num_attention_heads")?,
            ff: size("intermediate_size")?,
            vocab: size("vocab_size")?,
            positions: size("max_position_embeddings")?,
            eps: config.get("layer_norm_eps").and_then(Json::as_f64).unwrap_or(1e-12) as f32,
            pool: pooling_kind(*pooling)?,
            normalize: normalizes(*modules),
            prefix: "",
        };
        if !this.hidden.is_multiple_of(this.heads) || this.layers > 1024 {
            let message = "config.json: hidden_size is no multiple of num_attention_heads";
            return Err(LoadError::Shape(message.into()));
        }
        Ok(this)
    }

    /// Token types are a vocabulary of their own, of a size that old configs leave out.
    fn types(&self, weights: &Weights) -> Result<usize, LoadError> {
        let name = format!("{}embeddings.token_type_embeddings.weight", self.prefix);
        Ok(weights.size(&name)?.0)
    }

    fn norm(&self, weights: &Weights, name: &str) -> Result<Scale, LoadError> {
        let vector =
            |part: &str| weights.vector(&[format!("{}{name}.{part}", self.prefix)], self.hidden);
        Ok(Scale { weight: vector("weight")?, bias: Some(vector("bias")?), eps: self.eps })
    }
}

impl Layer {
    fn load(shape: &Shape, weights: &Weights, index: usize) -> Result<Self, LoadError> {
        let layer = format!("encoder.layer.{index}");
        let prefix = format!("{}{layer}", shape.prefix);
        let dense = |names: &[&str], rows: usize, columns: usize| -> Result<Dense, LoadError> {
            let named = |part: &str| -> Vec<String> {
                names.iter().map(|name| format!("{prefix}.{name}.{part}")).collect()
            };
            let parts: Vec<Part> =
                named("weight").into_iter().map(|name| Part::plain(name, rows)).collect();
            let weight = weights.matrix(&parts, columns)?;
            let bias = Some(weights.vector(&named("bias"), rows * names.len())?);
            Ok(Dense { weight, bias })
        };
        let self_attention = ["attention.self.query", "attention.self.key", "attention.self.value"];
        let hidden = shape.hidden;
        Ok(Self {
            qkv: dense(&self_attention, hidden, hidden)?,
            output: dense(&["attention.output.dense"], hidden, hidden)?,
            attention_norm: shape.norm(weights, &format!("{layer}.attention.output.LayerNorm"))?,
            up: dense(&["intermediate.dense"], shape.ff, hidden)?,
            down: dense(&["output.dense"], hidden, shape.ff)?,
            mlp_norm: shape.norm(weights, &format!("{layer}.output.LayerNorm"))?,
        })
    }

    fn push(&self, builder: &mut Builder, shape: &Shape, buffers: &Buffers) {
        let &Buffers { hidden, qkv } = buffers;
        let (heads, head_dim) = (shape.heads, shape.hidden / shape.heads);
        let scale = 1.0 / (head_dim as f32).sqrt();

        builder.linear(&self.qkv, Activation::Full(hidden), Epilogue::Store, qkv);
        let output = builder.input_for(&self.output.weight, Rows::All);
        builder.push(Op::PackedAttention(PackedAttention { qkv, heads, head_dim, scale, output }));
        builder.linear(&self.output, output, Epilogue::Add, hidden);
        builder.norm(&self.attention_norm, hidden, Activation::Full(hidden));
        let ff = builder.linear_for(&self.down.weight, &self.up, hidden, Epilogue::Gelu);
        builder.linear(&self.down, ff, Epilogue::Add, hidden);
        builder.norm(&self.mlp_norm, hidden, Activation::Full(hidden));
    }
}

/// What sentence-transformers' pooling configuration asks for; the mean if it says nothing.
fn pooling_kind(pooling: Option<&Json>) -> Result<PoolKind, LoadError> {
    let Some(pooling) = pooling.and_then(Json::as_object) else { return Ok(PoolKind::Mean) };
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
fn normalizes(modules: Option<&Json>) -> bool {
    let Some(modules) = modules.and_then(Json::as_array) else { return true };
    let kinds = modules.iter().filter_map(|module| module.get("type").and_then(Json::as_str));
    kinds.into_iter().any(|kind| kind.ends_with(".Normalize"))
}
