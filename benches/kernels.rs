//! Steps of the CPU kernels at the shapes of SmolLM2-135M (Q4_1, head Q8_0) and MiniLM-L6 (f32,
//! bf16, int8), over made-up weights: all matrix products alone, and whole steps. Throughput is
//! rows a second, on all threads that this process may use.

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use sconce::device::arena::Region;
use sconce::device::cpu::threads_available;
use sconce::device::threads::Team;
use sconce::kernels::batch::{Batch, BatchSpan, KvMap};
use sconce::kernels::builder::{Builder, Capacity, Dense, Scale};
use sconce::kernels::cpu::executor::{Draw, Executor};
use sconce::kernels::cpu::isa::SetKind;
use sconce::kernels::ops::{
    Activation, Buf, Embed, Epilogue, GatedSilu, Gather, KvShape, Linear, Norm, Op,
    PackedAttention, PagedAttention, Pool, PoolKind, Program, QuantBuf, RopeStore, Rows, Vector,
};
use sconce::kernels::packed::{Encoding, Packed, PackedFormat};
use sconce::request::Sampling;

/// Positions before a decoding row.
const CONTEXT: usize = 128;

/// Rows of an encoder's span.
const SPAN: usize = 128;

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
        }
    }
}

fn quantised(n: usize, k: usize, encoding: Encoding) -> Arc<Packed> {
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

fn float(n: usize, k: usize, format: PackedFormat) -> Arc<Packed> {
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
fn decoder(rows: usize, gathered: usize, whole: bool) -> Program {
    let mut layout = Layout::default();
    let (x, qkv) = (layout.buf(rows, 576), layout.buf(rows, 960));
    let (gates, last) = (layout.buf(rows, 3072), layout.buf(gathered, 576));
    let (narrow, wide) = (layout.quant(rows, 576), layout.quant(rows, 1536));
    let logits = layout.buf(gathered, 49_152);
    let kv = KvShape { layers: 30, heads: 3, head_dim: 64 };
    let (ones, table): (Vector, Vector) = (vec![1.0; 576].into(), vec![0.5; 64 * 2048].into());
    let (a, b) = (Activation::Quant(narrow), Activation::Quant(wide));
    let norm = |rows, input| {
        let weight = Arc::clone(&ones);
        Op::Norm(Norm { rows, input, weight, bias: None, eps: 1e-5, output: a })
    };
    let q4 = |n, k| quantised(n, k, Encoding::Q4One);
    let head = quantised(49_152, 576, Encoding::Q8Zero);
    let embed = Embed { table: Arc::clone(&head), positions: None, types: None, output: x };
    let mut ops = vec![Op::Embed(embed)];
    for layer in 0..30 {
        let table = Arc::clone(&table);
        ops.extend([
            norm(Rows::All, x),
            linear(a, q4(960, 576), Epilogue::Store, qkv),
            Op::RopeStore(RopeStore { qkv, heads: 9, kv, layer, table }),
            Op::PagedAttention(PagedAttention {
                qkv,
                heads: 9,
                kv,
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
fn encoder(rows: usize, format: PackedFormat, whole: bool) -> Program {
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
fn batch(rows: usize, span: usize, start: usize, gathered: usize) -> Batch {
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
    batch.tokens = (0..rows as u32).map(|row| row * 37 % 49_152).collect();
    batch.gather = (rows - gathered..rows).map(|row| row as u32).collect();
    batch
}

fn bench(criterion: &mut Criterion, name: &str, program: &Program, batch: &Batch) {
    let team = Team::new(threads_available()).expect("threads");
    let mut executor = Executor::new(team, SetKind::detect());
    let block = KvShape { layers: 30, heads: 3, head_dim: 64 }.block_bytes();
    let page = batch.blocks.len() * block;
    let map = KvMap { layers: 30, offsets: (0..30).map(|layer| layer * page).collect() };
    let mut kv = Region::new(30 * page).expect("memory");
    let mut workspace = Region::new(program.workspace_bytes).expect("memory");
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(batch.tokens.len() as u64));
    group.bench_function(format!("{} rows", batch.tokens.len()), |bencher| {
        bencher.iter(|| {
            executor.execute(program, batch, &map, &mut kv, &mut workspace).expect("a sound step");
        });
    });
    group.finish();
}

fn steps(criterion: &mut Criterion) {
    for rows in [1, 16, 512] {
        let gathered = if rows > 64 { 1 } else { rows };
        let batch = match rows {
            512 => batch(rows, rows, 0, gathered),
            _ => batch(rows, 1, CONTEXT, gathered),
        };
        bench(criterion, "SmolLM2 products", &decoder(rows, gathered, false), &batch);
        bench(criterion, "SmolLM2 step", &decoder(rows, gathered, true), &batch);
    }
    let formats =
        [("f32", PackedFormat::F32), ("bf16", PackedFormat::Bf16), ("int8", PackedFormat::Q8)];
    for (name, format) in formats {
        for rows in [14, 512] {
            let batch = batch(rows, SPAN, 0, 0);
            let products = encoder(rows, format, false);
            bench(criterion, &format!("MiniLM {name} products"), &products, &batch);
            bench(criterion, &format!("MiniLM {name} step"), &encoder(rows, format, true), &batch);
        }
    }
}

fn draws(criterion: &mut Criterion) {
    let team = Team::new(threads_available()).expect("threads");
    let mut executor = Executor::new(team, SetKind::detect());
    let rows = 16;
    let logits = Buf { offset: 0, width: 49_152 };
    let mut workspace = Region::new(rows * logits.width * 4).expect("memory");
    for (i, logit) in workspace.floats_mut(0, rows * logits.width).iter_mut().enumerate() {
        *logit = (i as f32 * 0.61).sin() * 8.0;
    }
    let mut group = criterion.benchmark_group("sampling, 16 rows of 49152");
    group.throughput(Throughput::Elements(rows as u64));
    let plain = Sampling::default();
    for (name, sampling) in [
        ("greedy", Sampling { temperature: 0.0, ..plain }),
        ("temperature", plain),
        ("top-p 0.9", Sampling { top_p: 0.9, ..plain }),
        ("top-k 40", Sampling { top_k: 40, ..plain }),
    ] {
        let draws: Vec<Draw> = (0..rows).map(|row| Draw { row, sampling, position: 7 }).collect();
        let mut tokens = vec![0; rows];
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                executor.sample(&logits, &workspace, &draws, &mut tokens).expect("rows are there");
            });
        });
    }
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
}

criterion_group! { name = benches; config = config(); targets = steps, draws }
criterion_main!(benches);
