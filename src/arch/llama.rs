//! Llama and its family: RMS norms before attention and MLP, rotary positions, grouped KV heads,
//! gated SiLU. From GGUF.

use crate::arch::rope::rope_table;
use crate::arch::{Description, Outline, shape};
use crate::head;
use crate::kernels::builder::{Builder, Capacity, Dense, Scale};
use crate::kernels::ops::{
    Buf, Embed, Epilogue, GatedSilu, KvShape, Op, PagedAttention, Program, RopeStore, Rows, Vector,
};
use crate::model::ModelTask;
use crate::store::gguf::Header;
use crate::weights::{LoadError, Part, RowOrder, Weights, in_parallel};

/// Hyper-parameters, checked.
struct Shape {
    hidden: usize,
    heads: usize,
    ff: usize,
    vocab: usize,
    eps: f32,
    rope_base: f64,
    context: usize,
    kv: KvShape,
}

/// One layer's parameters.
struct Layer {
    attention_norm: Scale,
    qkv: Dense,
    output: Dense,
    mlp_norm: Scale,
    gate_up: Dense,
    down: Dense,
}

/// Buffers that every layer uses in turn.
struct Buffers {
    hidden: Buf,
    qkv: Buf,
    gate_up: Buf,
}

pub(super) fn outline(description: &Description<'_>) -> Result<Outline, LoadError> {
    let shape = Shape::read(description)?;
    Ok(Outline {
        task: ModelTask::Generate,
        context: shape.context,
        kv: Some(shape.kv),
        output_width: shape.vocab,
    })
}

pub(super) fn build(
    description: &Description<'_>,
    weights: &Weights,
    capacity: Capacity,
) -> Result<Program, LoadError> {
    let shape = Shape::read(description)?;
    let layers = in_parallel(shape.kv.layers, |index| Layer::load(&shape, weights, index))?;
    let embed = Part::plain("token_embd.weight", shape.vocab);
    let table = weights.matrix(&[embed], shape.hidden)?;
    let tied = !weights.has("output.weight");
    let vocabulary = if tied {
        table.clone()
    } else {
        weights.matrix(&[Part::plain("output.weight", shape.vocab)], shape.hidden)?
    };
    let final_norm = shape.norm(weights, "output_norm.weight")?;
    let head_dim = shape.kv.head_dim;
    let rope = rope_table(capacity.context, head_dim, shape.rope_base, head_dim);

    let mut builder = Builder::new(capacity);
    let buffers = Buffers {
        hidden: builder.full(Rows::All, shape.hidden),
        qkv: builder.full(Rows::All, (shape.heads + 2 * shape.kv.heads) * head_dim),
        gate_up: builder.full(Rows::All, 2 * shape.ff),
    };
    let output = buffers.hidden;
    builder.push(Op::Embed(Embed { table, positions: None, types: None, output }));
    for (index, layer) in layers.iter().enumerate() {
        layer.push(&mut builder, &shape, &buffers, (index, &rope));
    }
    let output = head::language_model(&mut builder, buffers.hidden, final_norm, vocabulary);
    Ok(builder.finish(output, Some(shape.kv)))
}

impl Shape {
    fn read(description: &Description<'_>) -> Result<Self, LoadError> {
        let Description::Gguf(header) = description else {
            return Err(LoadError::Shape("llama models are read from GGUF files".into()));
        };
        let size = |key: &str| header.u32(key).map(|value| value as usize).map_err(shape);
        let heads = size("llama.attention.head_count")?;
        let hidden = size("llama.embedding_length")?;
        let kv_heads = size("llama.attention.head_count_kv").unwrap_or(heads);
        let key_length = size("llama.attention.key_length");
        let head_dim = key_length.unwrap_or(hidden.checked_div(heads).unwrap_or(0));
        let this = Self {
            hidden,
            heads,
            ff: size("llama.feed_forward_length")?,
            vocab: vocabulary(header)?,
            eps: header.f32("llama.attention.layer_norm_rms_epsilon").map_err(shape)?,
            rope_base: f64::from(header.f32("llama.rope.freq_base").unwrap_or(10_000.0)),
            context: size("llama.context_length")?,
            kv: KvShape { layers: size("llama.block_count")?, heads: kv_heads, head_dim },
        };
        this.check(size("llama.rope.dimension_count").unwrap_or(head_dim), header)?;
        Ok(this)
    }

    fn check(&self, rope_dims: usize, header: &Header) -> Result<(), LoadError> {
        let KvShape { layers, heads: kv_heads, head_dim } = self.kv;
        let sizes = [self.hidden, self.heads, self.ff, self.vocab, self.context, layers, kv_heads];
        let refuse = |what: &str| Err(LoadError::Shape(what.to_owned()));
        if sizes.contains(&0) || head_dim == 0 || head_dim % 2 != 0 {
            return refuse("a size in the header is zero, or the head size is odd");
        }
        if sizes.iter().any(|&size| size > 1 << 24) || layers > 1024 || head_dim > 1024 {
            return refuse("a size in the header is beyond any known model");
        }
        if !self.heads.is_multiple_of(kv_heads) {
            return refuse("query heads are no multiple of KV heads");
        }
        if rope_dims != head_dim || header.metadata.contains_key("llama.rope.scaling.type") {
            return refuse("partial or scaled rotary positions are not known yet");
        }
        if header.tensors.contains_key("rope_freqs.weight") {
            return refuse("per-frequency rotary factors (rope_freqs) are not known yet");
        }
        Ok(())
    }

    fn norm(&self, weights: &Weights, tensor: &str) -> Result<Scale, LoadError> {
        let weight = weights.vector(&[tensor.to_owned()], self.hidden)?;
        Ok(Scale { weight, bias: None, eps: self.eps })
    }
}

impl Layer {
    fn load(shape: &Shape, weights: &Weights, index: usize) -> Result<Self, LoadError> {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        let KvShape { heads: kv_heads, head_dim, .. } = shape.kv;
        let turned = |part: &str, heads: usize| Part {
            tensor: name(part),
            rows: heads * head_dim,
            order: RowOrder::Interleaved { head_dim },
        };
        let qkv = [
            turned("attn_q", shape.heads),
            turned("attn_k", kv_heads),
            Part::plain(name("attn_v"), kv_heads * head_dim),
        ];
        let gate_up =
            [Part::plain(name("ffn_gate"), shape.ff), Part::plain(name("ffn_up"), shape.ff)];
        let output = [Part::plain(name("attn_output"), shape.hidden)];
        let down = [Part::plain(name("ffn_down"), shape.hidden)];
        let dense = |parts: &[Part], columns: usize| -> Result<Dense, LoadError> {
            Ok(Dense { weight: weights.matrix(parts, columns)?, bias: None })
        };
        Ok(Self {
            attention_norm: shape.norm(weights, &name("attn_norm"))?,
            qkv: dense(&qkv, shape.hidden)?,
            output: dense(&output, shape.heads * head_dim)?,
            mlp_norm: shape.norm(weights, &name("ffn_norm"))?,
            gate_up: dense(&gate_up, shape.hidden)?,
            down: dense(&down, shape.ff)?,
        })
    }

    fn push(
        &self,
        builder: &mut Builder,
        shape: &Shape,
        buffers: &Buffers,
        (layer, rope): (usize, &Vector),
    ) {
        let &Buffers { hidden, qkv, gate_up } = buffers;
        let (heads, kv) = (shape.heads, shape.kv);
        let scale = 1.0 / (kv.head_dim as f32).sqrt();

        let normed = builder.input_for(&self.qkv.weight, Rows::All);
        builder.norm(&self.attention_norm, hidden, normed);
        builder.linear(&self.qkv, normed, Epilogue::Store, qkv);
        builder.push(Op::RopeStore(RopeStore { qkv, heads, kv, layer, table: rope.clone() }));
        let output = builder.input_for(&self.output.weight, Rows::All);
        builder.push(Op::PagedAttention(PagedAttention { qkv, heads, kv, layer, scale, output }));
        builder.linear(&self.output, output, Epilogue::Add, hidden);

        let normed = builder.input_for(&self.gate_up.weight, Rows::All);
        builder.norm(&self.mlp_norm, hidden, normed);
        builder.linear(&self.gate_up, normed, Epilogue::Store, gate_up);
        let gated = builder.input_for(&self.down.weight, Rows::All);
        builder.push(Op::GatedSilu(GatedSilu { input: gate_up, output: gated }));
        builder.linear(&self.down, gated, Epilogue::Add, hidden);
    }
}

/// The embedding table says how large the vocabulary is; the metadata key is optional.
fn vocabulary(header: &Header) -> Result<usize, LoadError> {
    let table = header.tensors.get("token_embd.weight");
    let rows = table.and_then(|tensor| tensor.shape.first()).copied();
    rows.ok_or_else(|| LoadError::Shape("tensor 'token_embd.weight' is missing".into()))
}
