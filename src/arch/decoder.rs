//! Decoders of the Llama family: RMS norms before attention and MLP, rotary positions, grouped KV
//! heads, gated SiLU; from GGUF and from safetensors. What differs between the members is in
//! [`Shape`], which each architecture's file adjusts, or in the tensors that a file has. Knows no
//! architecture by name.

use std::sync::Arc;

use crate::arch::facts::Facts;
use crate::arch::rope::{Rope, unturned};
use crate::arch::{Description, Outline};
use crate::head;
use crate::kernels::builder::{Builder, Capacity, Dense, Scale};
use crate::kernels::ops::{
    Buf, Embed, Epilogue, GatedSilu, HeadNorm, KvShape, Op, PagedAttention, Program, RopeStore,
    Rows, Vector,
};
use crate::kernels::packed::Packed;
use crate::model::ModelTask;
use crate::weights::{LoadError, Part, RowOrder, Weights, in_parallel};

/// Hyper-parameters, checked.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) hidden: usize,
    pub(super) heads: usize,
    pub(super) ff: usize,
    pub(super) vocab: usize,
    pub(super) eps: f32,
    pub(super) context: usize,
    pub(super) kv: KvShape,
    pub(super) rope: Rope,
    /// Which layers turn q and k by their positions; all if empty.
    pub(super) turned: Vec<bool>,
    /// The head is the embedding table.
    pub(super) tied: bool,
    /// q and k are normalised head by head.
    pub(super) head_norms: bool,
    /// q, k and v have biases. Files of other members may have them too.
    pub(super) qkv_bias: bool,
    /// How the file orders the rows of q and k.
    pub(super) order: RowOrder,
    is_gguf: bool,
    names: &'static Names,
}

/// What a kind of file calls its tensors.
#[derive(Debug)]
struct Names {
    embedding: &'static str,
    norm: &'static str,
    head: &'static str,
    /// Before a layer's number.
    layer: &'static str,
    attention_norm: &'static str,
    q: &'static str,
    k: &'static str,
    v: &'static str,
    q_norm: &'static str,
    k_norm: &'static str,
    output: &'static str,
    mlp_norm: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
}

static GGUF: Names = Names {
    embedding: "token_embd",
    norm: "output_norm",
    head: "output",
    layer: "blk",
    attention_norm: "attn_norm",
    q: "attn_q",
    k: "attn_k",
    v: "attn_v",
    q_norm: "attn_q_norm",
    k_norm: "attn_k_norm",
    output: "attn_output",
    mlp_norm: "ffn_norm",
    gate: "ffn_gate",
    up: "ffn_up",
    down: "ffn_down",
};

static SAFETENSORS: Names = Names {
    embedding: "model.embed_tokens",
    norm: "model.norm",
    head: "lm_head",
    layer: "model.layers",
    attention_norm: "input_layernorm",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    output: "self_attn.o_proj",
    mlp_norm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
};

/// Tensors that may be the head, the first that a file has.
pub(super) fn heads() -> impl Iterator<Item = String> {
    let names = [GGUF.head, SAFETENSORS.head, GGUF.embedding, SAFETENSORS.embedding];
    names.into_iter().map(|name| format!("{name}.weight"))
}

/// One layer's parameters.
struct Layer {
    attention_norm: Scale,
    qkv: Dense,
    head_norms: Option<[Scale; 2]>,
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

impl Shape {
    /// The shape that the description gives, before an architecture's own differences.
    ///
    /// # Errors
    /// Something is missing, out of range, or not known to any member of the family.
    pub(super) fn read(description: &Description<'_>) -> Result<Self, LoadError> {
        let facts = Facts::new(description)?;
        facts.refuse_unknown()?;
        let (hidden, heads) = (facts.hidden()?, facts.heads()?);
        let head_dim = facts.head_dim(hidden, heads)?;
        let context = facts.context()?;
        let rope = facts.rope(context)?;
        let shape = Self {
            hidden,
            heads,
            ff: facts.ff()?,
            vocab: facts.vocab()?,
            eps: facts.eps()?,
            context: rope.context(context),
            kv: KvShape { layers: facts.layers()?, heads: facts.kv_heads(heads)?, head_dim },
            rope,
            turned: Vec::new(),
            tied: facts.tied(),
            head_norms: false,
            qkv_bias: false,
            order: RowOrder::Plain,
            is_gguf: facts.is_gguf(),
            names: if facts.is_gguf() { &GGUF } else { &SAFETENSORS },
        };
        shape.check(facts.rope_dims(head_dim)?)?;
        Ok(shape)
    }

    /// For members whose GGUF files keep the halves of rotated pairs side by side.
    pub(super) fn with_interleaved_gguf(mut self) -> Self {
        if self.is_gguf {
            self.order = RowOrder::Interleaved { head_dim: self.kv.head_dim };
        }
        self
    }

    fn check(&self, rope_dims: usize) -> Result<(), LoadError> {
        let KvShape { layers, heads: kv_heads, head_dim } = self.kv;
        let sizes = [self.hidden, self.heads, self.ff, self.vocab, self.context, layers, kv_heads];
        let refuse = |what: String| Err(LoadError::Shape(what));
        if sizes.contains(&0) {
            return refuse("a size in the model's description is zero".into());
        }
        if sizes.iter().any(|&size| size > 1 << 24) || layers > 1024 {
            return refuse("a size in the model's description is beyond any known model".into());
        }
        if !head_dim.is_multiple_of(16) || !(16..=256).contains(&head_dim) {
            return refuse(format!(
                "a head size of {head_dim}: multiples of 16 up to 256 are known"
            ));
        }
        if !self.heads.is_multiple_of(kv_heads) {
            let heads = self.heads;
            return refuse(format!("{heads} query heads are no multiple of {kv_heads} KV heads"));
        }
        if rope_dims != head_dim {
            return refuse("partial rotary positions are not known yet".into());
        }
        if !self.eps.is_finite() || self.eps < 0.0 {
            return refuse(format!("a norm epsilon of {}", self.eps));
        }
        Ok(())
    }

    /// What a generator of this shape says about itself.
    pub(super) fn outline(&self) -> Outline {
        Outline {
            task: ModelTask::Generate,
            context: self.context,
            kv: Some(self.kv),
            output_width: self.vocab,
        }
    }

    /// The program of a generator.
    ///
    /// # Errors
    /// Tensors that are missing, misshapen or unreadable.
    pub(super) fn build(
        &self,
        weights: &Weights,
        capacity: Capacity,
    ) -> Result<Program, LoadError> {
        let layers = in_parallel(self.kv.layers, |index| Layer::load(self, weights, index))?;
        let table = self.vocabulary(weights, self.names.embedding)?;
        let head = format!("{}.weight", self.names.head);
        let vocabulary = if self.tied || (self.is_gguf && !weights.has(&head)) {
            table.clone()
        } else {
            self.vocabulary(weights, self.names.head)?
        };
        let final_norm = self.norm(weights, self.names.norm, self.hidden)?;
        let head_dim = self.kv.head_dim;
        let rope = self.scaled_rope(weights)?.table(capacity.context, head_dim);
        let unturned = match self.turned.contains(&false) {
            true => unturned(capacity.context, head_dim),
            false => rope.clone(),
        };

        let mut builder = Builder::new(capacity);
        let buffers = Buffers {
            hidden: builder.full(Rows::All, self.hidden),
            qkv: builder.full(Rows::All, (self.heads + 2 * self.kv.heads) * head_dim),
            gate_up: builder.full(Rows::All, 2 * self.ff),
        };
        let output = buffers.hidden;
        builder.push(Op::Embed(Embed { table, positions: None, types: None, output }));
        for (index, layer) in layers.iter().enumerate() {
            let table = if self.turned.get(index) == Some(&false) { &unturned } else { &rope };
            layer.push(&mut builder, self, &buffers, (index, table));
        }
        let output = head::language_model(&mut builder, buffers.hidden, final_norm, vocabulary);
        Ok(builder.finish(output, Some(self.kv)))
    }

    /// How pairs turn, with the factors that GGUF keeps as a tensor.
    fn scaled_rope(&self, weights: &Weights) -> Result<Rope, LoadError> {
        const FACTORS: &str = "rope_freqs.weight";
        if !weights.has(FACTORS) {
            return Ok(self.rope.clone());
        }
        let pairs = self.kv.head_dim / 2;
        let factors = weights.vector(&[FACTORS.to_owned()], pairs)?;
        self.rope.clone().with_factors(&factors, pairs)
    }

    fn vocabulary(&self, weights: &Weights, name: &str) -> Result<Arc<Packed>, LoadError> {
        weights.matrix(&[Part::plain(format!("{name}.weight"), self.vocab)], self.hidden)
    }

    fn norm(&self, weights: &Weights, name: &str, width: usize) -> Result<Scale, LoadError> {
        let weight = weights.vector(&[format!("{name}.weight")], width)?;
        Ok(Scale { weight, bias: None, eps: self.eps })
    }
}

impl Layer {
    fn load(shape: &Shape, weights: &Weights, index: usize) -> Result<Self, LoadError> {
        let names = shape.names;
        let name = |part: &str| format!("{}.{index}.{part}", names.layer);
        let KvShape { heads: kv_heads, head_dim, .. } = shape.kv;
        // A matrix of stacked parts, and their biases where the file has them.
        let dense = |parts: &[(&str, usize, RowOrder)], columns, must_bias| {
            let part = |ending: &str, &(part, rows, order): &(&str, usize, RowOrder)| Part {
                tensor: format!("{}.{ending}", name(part)),
                rows,
                order,
            };
            let of = |ending: &str| parts.iter().map(|p| part(ending, p)).collect::<Vec<_>>();
            let weight = weights.matrix(&of("weight"), columns)?;
            let biases = of("bias");
            let biased = must_bias || biases.iter().any(|bias| weights.has(&bias.tensor));
            let bias = biased.then(|| weights.bias(&biases)).transpose()?;
            Ok::<_, LoadError>(Dense { weight, bias })
        };
        let norm = |part: &str, width: usize| shape.norm(weights, &name(part), width);
        let plain = RowOrder::Plain;
        let qkv = [
            (names.q, shape.heads * head_dim, shape.order),
            (names.k, kv_heads * head_dim, shape.order),
            (names.v, kv_heads * head_dim, plain),
        ];
        let head_norms = || Ok([norm(names.q_norm, head_dim)?, norm(names.k_norm, head_dim)?]);
        Ok(Self {
            attention_norm: norm(names.attention_norm, shape.hidden)?,
            qkv: dense(&qkv, shape.hidden, shape.qkv_bias)?,
            head_norms: shape.head_norms.then(head_norms).transpose()?,
            output: dense(&[(names.output, shape.hidden, plain)], shape.heads * head_dim, false)?,
            mlp_norm: norm(names.mlp_norm, shape.hidden)?,
            gate_up: dense(
                &[(names.gate, shape.ff, plain), (names.up, shape.ff, plain)],
                shape.hidden,
                false,
            )?,
            down: dense(&[(names.down, shape.hidden, plain)], shape.ff, false)?,
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
        if let Some([q, k]) = &self.head_norms {
            let weights = [q.weight.clone(), k.weight.clone()];
            let heads = [heads, kv.heads];
            builder.push(Op::HeadNorm(HeadNorm { qkv, heads, weights, eps: q.eps }));
        }
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
