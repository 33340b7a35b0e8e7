//! Programs of the CPU kernels at the shapes of SmolLM2-135M (Q4_1, head Q8_0) and MiniLM-L6 (f32,
//! bf16, int8), over made-up weights.

use std::sync::Arc;

use half::f16;
use sconce::device::arena::Region;
use sconce::kernels::batch::{Batch, BatchSpan, KvMap};
use sconce::kernels::builder::{Builder, Capacity, Dense, Scale};
use sconce::kernels::cpu::executor::Executor;
use sconce::kernels::ops::{
    Activation, Buf, Embed, Epilogue, GatedSilu, Gather, KvShape, Linear, Norm, Op,
    PackedAttention, PagedAttention, Pool, PoolKind, Program, QuantBuf, RopeStore, Rows, Vector,
};
use sconce::kernels::packed::{Encoding, Packed, PackedFormat};

/// Positions before a decoding row.
pub(crate) const CONTEXT: usize = 128;

/// Tokens of the chat model's vocabulary.
pub(crate) const VOCABULARY: usize = 49_152;

/// Keys and values of the chat model.
const KV: KvShape = KvShape { layers: 30, heads: 3, head_dim: 64 };

#[derive(Default)]
struct Layout(usize);

impl Layout {
    fn take(&mut self, bytes: usize) -> usize {
        let offset = self.0;
        self.0 = (offset + bytes).next_multiple_of(64);
        offset
    }

    fn buf(&mut self, rows: usize, width: usize) -> Buf {
        Buf { offset: self.take(rows * width * 4), width }
    }

    fn quant(&mut self, rows: usize, width: usize) -> QuantBuf {
        QuantBuf {
            values: self.take(rows * width),
            scales: self.take(rows * width / 8),
            sums: self.take(rows * width / 8),
            width,
            peak: i8::MAX,
        }
    }
}

pub(crate) fn quantised(n: usize, k: usize, encoding: Encoding) -> Arc<Packed> {
    let block = encoding.row_bytes(32);
    let mut bytes: Vec<u8> =
        (0..n * k / 32 * block).map(|i| (i as u32).wrapping_mul(2_654_435_761) as u8).collect();
    for block in bytes.chunks_exact_mut(block) {
        block[..2].copy_from_slice(&f16::from_f32(0.002).to_le_bytes());
        if encoding == Encoding::Q4One {
            block[2..4].copy_from_slice(&f16::from_f32(-0.015).to_le_bytes());
        }
    }
    Arc::new(Packed::from_bytes(n, k, encoding, &bytes).expect("whole blocks"))
}

pub(crate) fn float(n: usize, k: usize, format: PackedFormat) -> Arc<Packed> {
    let value = |i: usize| ((i as f32 * 0.37).sin() * 0.05).to_le_bytes();
    let bytes: Vec<u8> = (0..n * k).flat_map(value).collect();
    let row = |row: usize| &bytes[row * k * 4..(row + 1) * k * 4];
    let packed = Packed::from_rows_as(n, k, (Encoding::F32, format), row);
    Arc::new(packed.expect("n × k values"))
}

fn linear(input: Activation, weight: Arc<Packed>, epilogue: Epilogue, output: Buf) -> Op {
    Op::Linear(Linear { rows: Rows::All, input, weight, bias: None, epilogue, output })
}

/// SmolLM2-135M; with only its products, or whole.
pub(crate) fn decoder(rows: usize, gathered: usize, whole: bool) -> Program {
    let mut layout = Layout::default();
    let (x, qkv) = (layout.buf(rows, 576), layout.buf(rows, 960));
    let (gates, last) = (layout.buf(rows, 3072), layout.buf(gathered, 576));
    let (narrow, wide) = (layout.quant(rows, 576), layout.quant(rows, 1536));
    let logits = layout.buf(gathered, VOCABULARY);
    let (ones, table): (Vector, Vector) = (vec![1.0; 576].into(), vec![0.5; 64 * 2048].into());
    let (a, b) = (Activation::Quant(narrow), Activation::Quant(wide));
    let norm = |rows, input| {
        let weight = Arc::clone(&ones);
        Op::Norm(Norm { rows, input, weight, bias: None, eps: 1e-5, output: a })
    };
    let q4 = |n, k| quantised(n, k, Encoding::Q4One);
    let head = quantised(VOCABULARY, 576, Encoding::Q8Zero);
    let embed = Embed { table: Arc::clone(&head), positions: None, types: None, output: x };
    let mut ops = vec![Op::Embed(embed)];
    for layer in 0..30 {
        let table = Arc::clone(&table);
        ops.extend([
            norm(Rows::All, x),
            linear(a, q4(960, 576), Epilogue::Store, qkv),
            Op::RopeStore(RopeStore { qkv, heads: 9, kv: KV, layer, table }),
            Op::PagedAttention(PagedAttention {
                qkv,
                heads: 9,
                kv: KV,
                layer,
                scale: 0.125,
                output: a,
            }),
            linear(a, q4(576, 576), Epilogue::Add, x),
            norm(Rows::All, x),
            linear(a, q4(3072, 576), Epilogue::Store, gates),
            Op::GatedSilu(GatedSilu { input: gates, output: b }),
            linear(b, q4(576, 1536), Epilogue::Add, x),
        ]);
    }
    ops.extend([Op::Gather(Gather { input: x, output: last }), norm(Rows::Gathered, last)]);
    let rows_taken = Rows::Gathered;
    let (input, weight, epilogue, output) = (a, head, Epilogue::Store, logits);
    ops.push(Op::Linear(Linear { rows: rows_taken, input, weight, bias: None, epilogue, output }));
    program(ops, whole, (rows, gathered), layout.0, logits)
}

/// MiniLM-L6 in a format; with only its products, or whole.
pub(crate) fn encoder(rows: usize, format: PackedFormat, whole: bool) -> Program {
    let mut builder = Builder::new(Capacity { rows, yields: rows, context: rows });
    let (x, qkv) = (builder.full(Rows::All, 384), builder.full(Rows::All, 1152));
    let ones: Vector = vec![1.0; 384].into();
    let (weight, bias) = (ones.clone(), Some(ones));
    let norm = Scale { weight, bias, eps: 1e-12 };
    let dense = |n, k| Dense { weight: float(n, k, format), bias: Some(vec![0.1; n].into()) };
    builder.norm(&norm, x, Activation::Full(x));
    for _ in 0..6 {
        let (out, up, down) = (dense(384, 384), dense(1536, 384), dense(384, 1536));
        builder.linear(&dense(1152, 384), Activation::Full(x), Epilogue::Store, qkv);
        let output = builder.input_for(&out.weight, Rows::All);
        builder.push(Op::PackedAttention(PackedAttention {
            qkv,
            heads: 12,
            kv_heads: 12,
            causal: false,
            head_dim: 32,
            scale: 0.177,
            output,
        }));
        builder.linear(&out, output, Epilogue::Add, x);
        builder.norm(&norm, x, Activation::Full(x));
        let hidden = builder.linear_for(&down.weight, &up, x, Epilogue::Gelu);
        builder.linear(&down, hidden, Epilogue::Add, x);
        builder.norm(&norm, x, Activation::Full(x));
    }
    let output = builder.full(Rows::Gathered, 384);
    let kind = PoolKind::Mean;
    builder.push(Op::Pool(Pool { kind, normalize: true, input: x, output }));
    let mut program = builder.finish(output, None);
    if !whole {
        program.ops.retain(|op| matches!(op, Op::Linear(_) | Op::HalfLinear(_)));
    }
    program
}

fn program(
    mut ops: Vec<Op>,
    whole: bool,
    (rows_max, gathered_max): (usize, usize),
    workspace_bytes: usize,
    output: Buf,
) -> Program {
    if !whole {
        ops.retain(|op| matches!(op, Op::Linear(_)));
    }
    Program {
        ops,
        workspace_bytes,
        rows_max,
        gathered_max,
        output: Some(output),
        ..Program::default()
    }
}

/// `rows` rows in spans of `span`, which start at position `start`.
pub(crate) fn batch(rows: usize, span: usize, start: usize, gathered: usize) -> Batch {
    let mut batch = Batch::default();
    for first in (0..rows).step_by(span) {
        let end = rows.min(first + span);
        let blocks = batch.blocks.len() as u32;
        let index = batch.spans.len() as u32;
        for _ in 0..(start + end - first).div_ceil(32) {
            batch.blocks.push((0, batch.blocks.len() as u32));
        }
        batch.spans.push(BatchSpan {
            rows: first as u32..end as u32,
            start: start as u32,
            blocks: blocks..batch.blocks.len() as u32,
        });
        batch.positions.extend((0..(end - first)).map(|row| (start + row) as u32));
        batch.span_of.extend(std::iter::repeat_n(index, end - first));
    }
    batch.tokens = (0..rows as u32).map(|row| row * 37 % VOCABULARY as u32).collect();
    batch.gather = (rows - gathered..rows).map(|row| row as u32).collect();
    batch
}

/// A program with the memory that it needs.
pub(crate) struct Ready {
    program: Program,
    batch: Batch,
    map: KvMap,
    kv: Region,
    workspace: Region,
}

impl Ready {
    pub(crate) fn new(program: Program, batch: Batch) -> Self {
        let page = batch.blocks.len() * KV.block_bytes();
        let map = KvMap { layers: 30, offsets: (0..30).map(|layer| layer * page).collect() };
        let kv = Region::new(30 * page).expect("memory");
        let workspace = Region::new(program.workspace_bytes).expect("memory");
        Self { program, batch, map, kv, workspace }
    }

    /// Rows of its step.
    pub(crate) fn rows(&self) -> usize {
        self.batch.tokens.len()
    }

    pub(crate) fn run(&mut self, executor: &mut Executor) {
        let Self { program, batch, map, kv, workspace } = self;
        executor.execute(program, batch, map, kv, workspace).expect("a sound step");
    }
}
