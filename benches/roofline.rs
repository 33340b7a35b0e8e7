//! How much of the machine the CPU kernels use: what it can multiply and read at most, measured
//! here and now, then each kind of op of two models' steps as a share of that, and where the rest
//! of a step goes. Best of several runs each: what else the machine does is not the kernels' doing.

#![allow(clippy::print_stdout, reason = "the table is the result")]

use std::time::{Duration, Instant};

use sconce::device::cpu::threads_available;
use sconce::device::threads::Team;
use sconce::kernels::cpu::executor::Executor;
use sconce::kernels::cpu::isa::SetKind;
use sconce::kernels::ops::{Op, Program};
use sconce::kernels::packed::PackedFormat;

mod probe;
mod programs;

use probe::Peak;
use programs::{CONTEXT, Ready, VOCABULARY, batch, decoder, encoder};

/// How long one thing is measured.
const TIME: Duration = Duration::from_millis(400);

/// Products of weights with one row, and the bytes of these weights as the kernels read them.
struct Work {
    macs: usize,
    bytes: f64,
}

/// One kind of op in a step.
struct Kind {
    name: &'static str,
    holds: fn(&Op, last: bool) -> bool,
    /// For each row that it works on, if it multiplies weights.
    work: Option<Work>,
}

fn is_product(op: &Op) -> bool {
    matches!(op, Op::Linear(_) | Op::HalfLinear(_) | Op::Convert(_))
}

fn is_attention(op: &Op) -> bool {
    matches!(op, Op::PagedAttention(_) | Op::PackedAttention(_))
}

/// The seconds of one run of `ready`, the best of all in [`TIME`].
fn seconds(executor: &mut Executor, ready: &mut Ready) -> f64 {
    ready.run(executor);
    let (begun, mut best) = (Instant::now(), f64::INFINITY);
    while begun.elapsed() < TIME {
        let start = Instant::now();
        ready.run(executor);
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// `program` with the ops that `holds` lets through only.
fn only(mut program: Program, holds: fn(&Op, bool) -> bool) -> Program {
    let (mut index, last) = (0, program.ops.len() - 1);
    program.ops.retain(|op| {
        index += 1;
        holds(op, index - 1 == last)
    });
    program
}

/// A step, kind by kind; `peak` is the most products a second.
fn step(
    executor: &mut Executor,
    (name, peak, read): (&str, f64, f64),
    kinds: &[Kind],
    make: &dyn Fn() -> Ready,
    part: &dyn Fn(fn(&Op, bool) -> bool) -> Ready,
) {
    let whole = seconds(executor, &mut make());
    println!("\n{name}: {:.0} µs a step", whole * 1e6);
    println!("| part | µs | of the step | G products/s | of the peak | GB/s | of the peak |");
    println!("|---|---|---|---|---|---|---|");
    let mut sum = 0.0;
    for kind in kinds {
        let mut ready = part(kind.holds);
        let time = seconds(executor, &mut ready);
        sum += time;
        print!("| {} | {:.0} | {:.0} % |", kind.name, time * 1e6, 100.0 * time / whole);
        let Some(work) = &kind.work else {
            println!(" | | | |");
            continue;
        };
        let products = (work.macs * ready.rows()) as f64 / time / 1e9;
        let bytes = work.bytes / time / 1e9;
        let shares = (100.0 * products / peak, 100.0 * bytes / read);
        println!(" {products:.1} | {:.0} % | {bytes:.1} | {:.0} % |", shares.0, shares.1);
    }
    let rest = whole - sum;
    println!(
        "| starting and waiting | {:.0} | {:.0} % | | | | |",
        rest * 1e6,
        100.0 * rest / whole
    );
}

fn main() {
    let threads = threads_available();
    let set = SetKind::detect();
    let peak = Peak::measure(threads);
    println!(
        "{threads} threads, {}: at most {:.0} G products/s of bytes, {:.0} of bf16, {:.0} of f32; \
         {:.1} GB/s read from memory",
        set.as_str(),
        peak.bytes,
        peak.halves,
        peak.floats,
        peak.read
    );
    let mut executor = Executor::new(Team::new(threads).expect("threads"), set);
    decoders(&mut executor, &peak);
    encoders(&mut executor, &peak);
}

/// The chat model: a few rows at a time, and a prompt.
fn decoders(executor: &mut Executor, peak: &Peak) {
    let layers = 30 * 576 * (960 + 576 + 3072 + 1536);
    let head = VOCABULARY * 576;
    let decoding = [
        Kind {
            name: "products of the layers (Q4_1)",
            holds: |op, last| is_product(op) && !last,
            work: Some(Work { macs: layers, bytes: layers as f64 * 20.0 / 32.0 }),
        },
        Kind {
            name: "product of the head (Q8_0)",
            holds: |op, last| is_product(op) && last,
            work: Some(Work { macs: head, bytes: head as f64 * 34.0 / 32.0 }),
        },
        Kind { name: "attention", holds: |op, _| is_attention(op), work: None },
        Kind { name: "all else", holds: |op, _| !is_product(op) && !is_attention(op), work: None },
    ];
    for rows in [1, 8, 16, 64] {
        let steps = || batch(rows, 1, CONTEXT, rows);
        let name = format!("SmolLM2-135M, {rows} rows at context {CONTEXT}");
        let make = || Ready::new(decoder(rows, rows, true), steps());
        let part = |holds| Ready::new(only(decoder(rows, rows, true), holds), steps());
        step(executor, (&name, peak.bytes, peak.read), &decoding, &make, &part);
    }
    // The head works on one row: its share of the peak is not that of the others.
    let [layers, _, attention, rest] = decoding;
    let prompt = [
        layers,
        Kind { name: "head", holds: |op, last| is_product(op) && last, work: None },
        attention,
        rest,
    ];
    let rows = 512;
    let make = || Ready::new(decoder(rows, 1, true), batch(rows, rows, 0, 1));
    let part = |holds| Ready::new(only(decoder(rows, 1, true), holds), batch(rows, rows, 0, 1));
    let name = "SmolLM2-135M, a prompt of 512 tokens";
    step(executor, (name, peak.bytes, peak.read), &prompt, &make, &part);
}

/// The encoder in its formats: one text, many short ones, and longer ones.
fn encoders(executor: &mut Executor, peak: &Peak) {
    let products = 6 * 384 * (1152 + 384 + 2 * 1536);
    for (name, format, peak_of, size) in [
        ("f32", PackedFormat::F32, peak.floats, 4.0),
        ("bf16", PackedFormat::Bf16, peak.halves, 2.0),
        ("int8", SetKind::detect().fastest_bytes(), peak.bytes, 34.0 / 32.0),
    ] {
        let kinds = [
            Kind {
                name: "products",
                holds: |op, _| is_product(op),
                work: Some(Work { macs: products, bytes: products as f64 * size }),
            },
            Kind { name: "attention", holds: |op, _| is_attention(op), work: None },
            Kind {
                name: "all else",
                holds: |op, _| !is_product(op) && !is_attention(op),
                work: None,
            },
        ];
        for (rows, span) in [(14, 14), (448, 14), (512, 128)] {
            let steps = || batch(rows, span, 0, 0);
            let make = || Ready::new(encoder(rows, format, true), steps());
            let part = |holds| Ready::new(only(encoder(rows, format, true), holds), steps());
            let name = format!("MiniLM-L6 {name}, {rows} rows in texts of {span}");
            step(executor, (&name, peak_of, peak.read), &kinds, &make, &part);
        }
    }
}
