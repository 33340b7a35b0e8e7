//! Steps of the CPU kernels at the shapes of two real models: all matrix products alone, and whole
//! steps. Throughput is rows a second, on all threads that this process may use. `roofline` says
//! how much of the machine that is.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sconce::device::arena::Region;
use sconce::device::cpu::threads_available;
use sconce::device::threads::Team;
use sconce::kernels::batch::Batch;
use sconce::kernels::cpu::executor::{Draw, Executor};
use sconce::kernels::cpu::isa::SetKind;
use sconce::kernels::ops::{Buf, Program};
use sconce::kernels::packed::PackedFormat;
use sconce::request::Sampling;

mod programs;

use programs::{CONTEXT, Ready, VOCABULARY, batch, decoder, encoder};

/// Rows of an encoder's span.
const SPAN: usize = 128;

fn bench(criterion: &mut Criterion, name: &str, program: Program, batch: Batch) {
    let team = Team::new(threads_available()).expect("threads");
    let mut executor = Executor::new(team, SetKind::detect());
    let mut ready = Ready::new(program, batch);
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(ready.rows() as u64));
    group.bench_function(format!("{} rows", ready.rows()), |bencher| {
        bencher.iter(|| ready.run(&mut executor));
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
        bench(criterion, "SmolLM2 products", decoder(rows, gathered, false), batch.clone());
        bench(criterion, "SmolLM2 step", decoder(rows, gathered, true), batch);
    }
    let formats = [
        ("f32", PackedFormat::F32),
        ("bf16", PackedFormat::Bf16),
        ("int8", SetKind::detect().fastest_bytes()),
    ];
    for (name, format) in formats {
        for rows in [14, 512] {
            let batch = batch(rows, SPAN, 0, 0);
            let products = encoder(rows, format, false);
            bench(criterion, &format!("MiniLM {name} products"), products, batch.clone());
            bench(criterion, &format!("MiniLM {name} step"), encoder(rows, format, true), batch);
        }
    }
}

fn draws(criterion: &mut Criterion) {
    let team = Team::new(threads_available()).expect("threads");
    let mut executor = Executor::new(team, SetKind::detect());
    let rows = 16;
    let logits = Buf { offset: 0, width: VOCABULARY };
    let mut workspace = Region::new(rows * logits.width * 4).expect("memory");
    for (i, logit) in workspace.floats_mut(0, rows * logits.width).iter_mut().enumerate() {
        *logit = (i as f32 * 0.61).sin() * 8.0;
    }
    let mut group = criterion.benchmark_group(format!("sampling, 16 rows of {VOCABULARY}"));
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
