//! The op set: plain structs that name their weights and the buffers they read and write. All
//! shapes are per row; the number of rows is the step's. Each doc comment is the definition that
//! the scalar reference spells out.

use std::sync::Arc;

use super::coarse::Coarse;
use super::packed::Packed;
use crate::device::arena::Region;

/// A row-major f32 buffer of the workspace: `rows_max × width`, row stride = `width`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buf {
    /// Byte offset in the workspace, 64-byte aligned.
    pub offset: usize,
    /// Values a row.
    pub width: usize,
}

impl Buf {
    /// Row `row` of this buffer in `workspace`.
    ///
    /// # Panics
    /// If the workspace ends before.
    pub fn row<'w>(&self, workspace: &'w Region, row: usize) -> &'w [f32] {
        workspace.floats(self.offset + row * self.width * size_of::<f32>(), self.width)
    }
}

/// A buffer of rows quantised to 8 bits in groups of 32 along the row (`width % 32 == 0`).
/// `scale = max|x| / peak`, `q = x × (1 / scale)`: the exact product, rounded once to the nearest
/// integer, ties to even. A scale below the smallest normal f32 counts as zero, and so do all q
/// then. `sum = Σq`. Three parts, each `rows_max` long: q (i8, `width` a row), scales (f32,
/// `width / 32` a row), sums (f32, `width / 32` a row). The order inside a part is private to
/// `kernels/` and depends on the number of rows, so an op reads the same [`Rows`] that were
/// written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantBuf {
    /// Byte offset of the values, 64-byte aligned.
    pub values: usize,
    /// Byte offset of the scales, 64-byte aligned.
    pub scales: usize,
    /// Byte offset of the sums, 64-byte aligned.
    pub sums: usize,
    /// Values a row.
    pub width: usize,
    /// What the largest value of a group becomes: 127, or [`QuantBuf::LOW`].
    pub peak: i8,
}

impl QuantBuf {
    /// The peak with which the sum of two products of bytes fits 16 bits, at which some processors
    /// cut it, if weights are as small: 2 × 90 × (90 + 90), for one factor has to be positive.
    pub const LOW: i8 = 90;
}

/// A buffer of rows rounded to bf16: to the nearest, ties to even; what is smaller than 2^-50 in
/// size becomes zero. So no product of two such values, and no sum of such products, is ever
/// subnormal: processors that flush subnormal numbers compute what others compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HalfBuf {
    /// Byte offset in the workspace, 64-byte aligned.
    pub offset: usize,
    /// Values a row; even.
    pub width: usize,
}

impl Op {
    /// The rows that it reads, besides keys and values of earlier ones.
    pub fn input(&self) -> Option<Activation> {
        match self {
            Op::Embed(_) => None,
            Op::Norm(op) => Some(op.input.into()),
            Op::Linear(op) => Some(op.input),
            Op::HeadNorm(op) => Some(op.qkv.into()),
            Op::HalfLinear(op) => Some(Activation::Half(op.input)),
            Op::Convert(op) => Some(op.input.into()),
            Op::RopeStore(op) => Some(op.qkv.into()),
            Op::Rope(op) => Some(op.qkv.into()),
            Op::PagedAttention(op) => Some(op.qkv.into()),
            Op::PackedAttention(op) => Some(op.qkv.into()),
            Op::GatedSilu(op) => Some(op.input.into()),
            Op::Gather(op) => Some(op.input.into()),
            Op::Pool(op) => Some(op.input.into()),
        }
    }

    /// Whether it adds to the rows that it writes.
    pub fn adds(&self) -> bool {
        match self {
            Op::Linear(op) => op.epilogue == Epilogue::Add,
            Op::HalfLinear(op) => op.epilogue == Epilogue::Add,
            _ => false,
        }
    }

    /// The rows that it writes, besides keys and values.
    pub fn output(&self) -> Activation {
        match self {
            Op::Embed(op) => op.output.into(),
            Op::Norm(op) => op.output,
            Op::Linear(op) => op.output.into(),
            Op::HeadNorm(op) => op.qkv.into(),
            Op::HalfLinear(op) => op.output,
            Op::Convert(op) => op.output,
            Op::RopeStore(op) => op.qkv.into(),
            Op::Rope(op) => op.qkv.into(),
            Op::PagedAttention(op) => op.output,
            Op::PackedAttention(op) => op.output,
            Op::GatedSilu(op) => op.output,
            Op::Gather(op) => op.output.into(),
            Op::Pool(op) => op.output.into(),
        }
    }
}

/// What a [`Linear`] reads: f32 rows for f32 weights, quantised rows for quantised weights; and
/// bf16 rows, what a [`HalfLinear`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// f32 rows.
    Full(Buf),
    /// 8-bit rows.
    Quant(QuantBuf),
    /// bf16 rows.
    Half(HalfBuf),
}

impl From<Buf> for Activation {
    fn from(buf: Buf) -> Self {
        Activation::Full(buf)
    }
}

impl Activation {
    /// Values a row.
    pub fn width(&self) -> usize {
        match self {
            Activation::Full(buf) => buf.width,
            Activation::Quant(buf) => buf.width,
            Activation::Half(buf) => buf.width,
        }
    }
}

/// Which rows an op works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rows {
    /// Every row of the step.
    #[default]
    All,
    /// The gathered rows only (`Batch::gather`): those that yield something.
    Gathered,
}

/// A vector of f32 parameters.
pub type Vector = Arc<[f32]>;

/// One operation.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the structs are documented")]
pub enum Op {
    Embed(Embed),
    Norm(Norm),
    Linear(Linear),
    HeadNorm(HeadNorm),
    HalfLinear(HalfLinear),
    Convert(Convert),
    RopeStore(RopeStore),
    Rope(Rope),
    PagedAttention(PagedAttention),
    PackedAttention(PackedAttention),
    GatedSilu(GatedSilu),
    Gather(Gather),
    Pool(Pool),
}

/// A model's step: ops in order, and the workspace they need.
#[derive(Debug, Clone, Default)]
pub struct Program {
    /// In order; each sees what the ones before wrote.
    pub ops: Vec<Op>,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
    /// Rows that the workspace is sized for.
    pub rows_max: usize,
    /// Gathered rows that it is sized for.
    pub gathered_max: usize,
    /// Where a generator's logits are (gathered rows × vocabulary), or an encoder's vectors or
    /// scores (spans × width).
    pub output: Option<Buf>,
    /// Where an encoder leaves the last hidden state of each row (rows × width).
    pub hidden: Option<Buf>,
    /// KV heads × head size, for generators.
    pub kv: Option<KvShape>,
    /// A shorter way to the largest logits, for kernel sets that take it.
    pub coarse: Option<Coarse>,
}

/// Shape of one layer's part of a KV block: K then V, f16.
///
/// K is `[kv_heads][head_dim][BLOCK_TOKENS]` (token fastest), V is
/// `[kv_heads][BLOCK_TOKENS][head_dim]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// Heads that keys and values have.
    pub heads: usize,
    /// Values a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of one token in all layers.
    pub fn token_bytes(&self) -> usize {
        self.layers * self.block_bytes() / crate::scheduler::step::BLOCK_TOKENS
    }

    /// Bytes of one block in one layer.
    pub fn block_bytes(&self) -> usize {
        2 * 2 * self.heads * self.head_dim * crate::scheduler::step::BLOCK_TOKENS
    }
}

/// `output[r] = table[token[r]] (+ positions[position[r]]) (+ types[type[r]])`, in this order;
/// 4-bit values are `fma(q, scale, minimum)`, 8-bit ones `q × scale`.
#[derive(Debug, Clone)]
pub struct Embed {
    /// One row a token, any format; rows are dequantised one by one.
    pub table: Arc<Packed>,
    /// Learned positions (f32, `width` a row).
    pub positions: Option<Vector>,
    /// Learned token types (f32, `width` a row): which of two texts a token belongs to.
    pub types: Option<Vector>,
    /// Where rows go.
    pub output: Buf,
}

/// Root-mean-square or layer normalisation of each row. Sums run in 16 lanes (`lane = i % 16`,
/// ascending) that are added pairwise: i + i+8, +4, +2, +1. Squares are added by `fma`.
///
/// With `inverse = 1 / sqrt(Σx² / width + eps)`: `(x × inverse) × weight`. With a bias,
/// `mean = Σx / width` and `inverse` of `x - mean`: `fma((x - mean) × inverse, weight, bias)`.
#[derive(Debug, Clone)]
pub struct Norm {
    /// Rows taken part.
    pub rows: Rows,
    /// Input rows.
    pub input: Buf,
    /// Scale.
    pub weight: Vector,
    /// Shift; layer normalisation if present, root-mean-square if not.
    pub bias: Option<Vector>,
    /// Added to the variance.
    pub eps: f32,
    /// May be the input buffer.
    pub output: Activation,
}

/// `output[r][n] = Σ_k input[r][k] × weight[n][k] (+ bias[n])`, then the epilogue.
///
/// Float weights: one chain of fused multiply-adds in ascending k for each output. Quantised
/// weights: the integer sum `isum` of each group of 32 is exact; groups are added in ascending
/// order as `acc = fma(group, scale_x, acc)`, where `group = fma(scale_w, isum, min × Σq)`, and
/// `scale_w × isum` for formats without a minimum. In large blocks `scale_w` is `scale × factor`
/// and `min` is `minimum × shift`; where each half of a group has its own,
/// `group = fma(scale, fma(factor₁, isum₁, factor₀ × isum₀), minimum × sum)` with
/// `sum = fma(shift₁, Σq₁, shift₀ × Σq₀)`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Rows taken part.
    pub rows: Rows,
    /// Input rows: `Full` for float weights, `Quant` for quantised ones.
    pub input: Activation,
    /// `n × k`.
    pub weight: Arc<Packed>,
    /// `n` values.
    pub bias: Option<Vector>,
    /// What happens to the sum.
    pub epilogue: Epilogue,
    /// `n` wide.
    pub output: Buf,
}

/// As [`Linear`], for bf16 weights and rows, and with rows of f32 or bf16 as the result.
///
/// One chain of fused multiply-adds in f32 for each output: over pairs of inputs in ascending
/// order, in each pair the second first (1, 0, 3, 2, …), as the processors' bf16 instruction does.
#[derive(Debug, Clone)]
pub struct HalfLinear {
    /// Rows taken part.
    pub rows: Rows,
    /// Input rows.
    pub input: HalfBuf,
    /// `n × k`, bf16.
    pub weight: Arc<Packed>,
    /// `n` values.
    pub bias: Option<Vector>,
    /// What happens to the sum.
    pub epilogue: Epilogue,
    /// `n` wide: f32, or bf16 unless the epilogue adds.
    pub output: Activation,
}

/// `output[r] = input[r]` in another form.
#[derive(Debug, Clone, Copy)]
pub struct Convert {
    /// Rows taken part.
    pub rows: Rows,
    /// f32.
    pub input: Buf,
    /// Rounded.
    pub output: Activation,
}

/// The end of a [`Linear`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// `output = y`
    Store,
    /// `output = output + y`
    Add,
    /// `output = gelu(y)`, the exact form with erf.
    Gelu,
    /// `output = tanh(y) = ±(1 - e) / (1 + e)` with `e = exp(-2 |y|)`.
    Tanh,
    /// `output = max(y, 0)`
    Relu,
}

/// Root-mean-square normalisation, as in [`Norm`], of each q head and of each k head in place.
#[derive(Debug, Clone)]
pub struct HeadNorm {
    /// q, k and v side by side.
    pub qkv: Buf,
    /// Query heads, and heads that keys and values have.
    pub heads: [usize; 2],
    /// Scale of q, and of k: a head's values each. Their length is the head size, a multiple of 16.
    pub weights: [Vector; 2],
    /// Added to the variance.
    pub eps: f32,
}

/// Rotates q and k of each row in place (pairs `(i, i + head_dim/2)`) and writes k and v into the
/// row's KV block, rounded to f16. Input rows are `[q heads][k heads][v heads]`; `head_dim` is a
/// multiple of 16. A pair becomes `(fma(a, cos, -(b × sin)), fma(b, cos, a × sin))`.
#[derive(Debug, Clone)]
pub struct RopeStore {
    /// q, k and v side by side.
    pub qkv: Buf,
    /// Query heads.
    pub heads: usize,
    /// Heads, size and layers of KV.
    pub kv: KvShape,
    /// Which layer.
    pub layer: usize,
    /// `head_dim` values a position: `head_dim / 2` cosines, then as many sines. The number of
    /// positions is the longest sequence.
    pub table: Vector,
}

/// The rotation of [`RopeStore`] without a KV cache: q and k of each row in place.
#[derive(Debug, Clone)]
pub struct Rope {
    /// q, k and v side by side.
    pub qkv: Buf,
    /// Query heads.
    pub heads: usize,
    /// Heads that keys and values have.
    pub kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// As in [`RopeStore`].
    pub table: Vector,
}

/// Causal attention over KV blocks: row at position p sees positions `0..=p`.
///
/// Scores: for each position two chains of fused multiply-adds, over even and over odd dimensions
/// in ascending order, added, times `scale`. Softmax is online by block of 32 positions: `peak`
/// is the new maximum, `rescale = exp(old peak - peak)`, `weight = exp(score - peak)` by the
/// shared polynomial; 32 lane sums by `fma(total, rescale, weight)`; each output is multiplied by
/// `rescale`, then values are added in ascending position by `fma(weight, value, output)`. At the
/// end lane sums i and i + 16 are added, then pairwise, and outputs multiplied by `1 / total`.
/// `head_dim` is a multiple of 16, at most 256; of 32 for 8-bit output.
#[derive(Debug, Clone)]
pub struct PagedAttention {
    /// As in [`RopeStore`]; only q is read.
    pub qkv: Buf,
    /// Query heads; `heads / kv.heads` share one KV head.
    pub heads: usize,
    /// Heads, size and layers of KV.
    pub kv: KvShape,
    /// Which layer.
    pub layer: usize,
    /// Usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// `heads × head_dim` wide.
    pub output: Activation,
}

/// Attention within each span, no KV: a row sees every row of its span, or those up to itself. The
/// same order of operations as [`PagedAttention`], in f32, blocks of 32 rows from the span's start.
#[derive(Debug, Clone)]
pub struct PackedAttention {
    /// `[q heads][k heads][v heads]`
    pub qkv: Buf,
    /// Query heads; `heads / kv_heads` share one KV head.
    pub heads: usize,
    /// Heads that keys and values have.
    pub kv_heads: usize,
    /// Whether a row sees only the rows of its span up to itself.
    pub causal: bool,
    /// Values a head.
    pub head_dim: usize,
    /// Usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// `heads × head_dim` wide.
    pub output: Activation,
}

/// `output[i] = silu(input[i]) × input[width + i]`, where the input is twice as wide;
/// `silu(x) = x / (1 + exp(-x))`. Afterwards the input may hold anything: a device may do this at
/// the end of the product before it.
#[derive(Debug, Clone)]
pub struct GatedSilu {
    /// `[gate][up]`.
    pub input: Buf,
    /// Half as wide.
    pub output: Activation,
}

/// `output[g] = input[gather[g]]`.
#[derive(Debug, Clone, Copy)]
pub struct Gather {
    /// Step rows.
    pub input: Buf,
    /// Gathered rows.
    pub output: Buf,
}

/// One vector a span: rows added in ascending order, divided by their number; normalised by
/// dividing by the root of the sum of squares, which runs in 16 lanes as in [`Norm`].
#[derive(Debug, Clone, Copy)]
pub struct Pool {
    /// How.
    pub kind: PoolKind,
    /// Scale to unit length (a zero vector stays zero).
    pub normalize: bool,
    /// Step rows.
    pub input: Buf,
    /// One row a span.
    pub output: Buf,
}

/// How rows become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolKind {
    /// Mean of all rows.
    Mean,
    /// First row.
    Cls,
    /// Last row.
    Last,
}
