//! Steps as the scheduler makes them, on the emulated device.

mod models;

use std::sync::Arc;

use super::*;
use crate::arch::Outline;
use crate::kernels::builder::{Builder, Capacity};
use crate::kernels::cuda::emulator::Emulator;
use crate::kernels::ops::{Embed, Gather, KvShape, Op, Rows};
use crate::kernels::packed::Packed;
use crate::model::ModelTask;
use crate::request::{RequestId, Sampling, TenantId};
use crate::scheduler::step::{BlockId, Grant, Seat, Span};

const VOCABULARY: usize = 48;
const KV: KvShape = KvShape { layers: 2, heads: 1, head_dim: 16 };

/// A model whose next token is the last one's successor.
fn successor() -> LoadedModel {
    let values = (0..VOCABULARY * VOCABULARY)
        .map(|i| if i % VOCABULARY == i / VOCABULARY + 1 { 1.0 } else { 0.0 });
    let values: Vec<f32> = values.collect();
    let table = Packed::from_f32(VOCABULARY, VOCABULARY, &values).unwrap().into();
    let mut builder = Builder::new(Capacity { rows: 8, yields: 4, context: 64 });
    let hidden = builder.full(Rows::All, VOCABULARY);
    let output = builder.full(Rows::Gathered, VOCABULARY);
    builder.push(Op::Embed(Embed { table, positions: None, types: None, output: hidden }));
    builder.push(Op::Gather(Gather { input: hidden, output }));
    let outline =
        Outline { task: ModelTask::Generate, context: 64, kv: Some(KV), output_width: VOCABULARY };
    LoadedModel { program: Arc::new(builder.finish(output, Some(KV))), outline }
}

fn runner(emulator: Emulator) -> GpuRunner {
    let options = Options { pages: 4, page_bytes: 4096, lanes: 2, deterministic: false };
    let mut runner = GpuRunner::new(Box::new(emulator), options).unwrap();
    runner.install(LaneId(1), successor()).unwrap();
    runner
}

/// One sequence's rows from `start` on.
fn step(start: u32, tokens: &[u32], input: Input) -> Step {
    let rows = tokens.len() as u32;
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let output = Output::Sample { seat: Seat(3), sampling, position: start + rows };
    let grants = if start == 0 { vec![Grant { group: 0, pages: vec![2, 3] }] } else { Vec::new() };
    Step {
        lane: LaneId(1),
        tokens: tokens.to_vec(),
        blocks: vec![BlockId { group: 0, slot: 0 }],
        grants,
        spans: vec![Span {
            request: RequestId(1),
            tenant: TenantId::default(),
            part: 0,
            rows: 0..rows,
            start,
            blocks: 0..1,
            input,
            output,
        }],
        ..Step::default()
    }
}

#[test]
fn two_steps_are_on_their_way_and_the_second_reads_the_first_ones_token() {
    let mut runner = runner(Emulator::new());
    runner.submit(&step(0, &[4, 5, 6], Input::Known)).unwrap();
    runner.submit(&step(3, &[0], Input::Seat(Seat(3)))).unwrap();
    let mut outcome = Outcome::default();
    runner.collect(SlotId(0), &mut outcome).unwrap();
    assert_eq!(outcome.tokens, [7]);
    assert!(outcome.elapsed >= Micros(1));
    outcome.clear();
    runner.collect(SlotId(0), &mut outcome).unwrap();
    assert_eq!(outcome.tokens, [8]);
}

#[test]
fn a_model_that_comes_meanwhile_changes_no_answer_on_its_way() {
    let mut runner = runner(Emulator::new());
    runner.submit(&step(0, &[4, 5, 6], Input::Known)).unwrap();
    // An encoder, whose answers need more room.
    let mut builder = Builder::new(Capacity { rows: 64, yields: 64, context: 64 });
    let values = vec![1.0; VOCABULARY * VOCABULARY];
    let table = Packed::from_f32(VOCABULARY, VOCABULARY, &values).unwrap().into();
    let hidden = builder.full(Rows::All, VOCABULARY);
    let output = builder.full(Rows::Gathered, VOCABULARY);
    builder.push(Op::Embed(Embed { table, positions: None, types: None, output: hidden }));
    builder.push(Op::Gather(Gather { input: hidden, output }));
    let outline =
        Outline { task: ModelTask::Embed, context: 64, kv: None, output_width: VOCABULARY };
    let encoder = LoadedModel { program: Arc::new(builder.finish(output, None)), outline };
    runner.install(LaneId(0), encoder).unwrap();
    let mut outcome = Outcome::default();
    runner.collect(SlotId(0), &mut outcome).unwrap();
    assert_eq!(outcome.tokens, [7]);
}

#[test]
fn a_model_that_comes_again_takes_its_memory_once() {
    let mut runner = runner(Emulator::new());
    let free = runner.executor.free_bytes();
    for _ in 0..3 {
        runner.install(LaneId(1), successor()).unwrap();
        assert_eq!(runner.executor.free_bytes(), free);
    }
    runner.submit(&step(0, &[4, 5, 6], Input::Known)).unwrap();
    let mut outcome = Outcome::default();
    runner.collect(SlotId(0), &mut outcome).unwrap();
    assert_eq!(outcome.tokens, [7]);
}

#[test]
fn a_lane_without_a_model_fails_its_step_only() {
    let mut runner = runner(Emulator::new());
    let other = Step { lane: LaneId(0), ..step(0, &[1], Input::Known) };
    assert_eq!(runner.submit(&other).unwrap_err().kind, StepErrorKind::Step);
    runner.submit(&step(0, &[1], Input::Known)).unwrap();
}

#[test]
fn sticky_errors_are_fatal_and_others_are_not() {
    for (code, kind) in [
        (700, StepErrorKind::Fatal),
        (702, StepErrorKind::Fatal),
        (719, StepErrorKind::Fatal),
        (214, StepErrorKind::Fatal),
        (999, StepErrorKind::Fatal),
        (2, StepErrorKind::Memory),
        (1, StepErrorKind::Step),
    ] {
        let mut emulator = Emulator::new();
        emulator.fails_at = Some((1, GpuError::new("cuLaunchKernel", code, "told to fail")));
        let failed = runner(emulator).submit(&step(0, &[1], Input::Known)).unwrap_err();
        assert_eq!(failed.kind, kind, "{code}");
    }
}

#[test]
fn floats_without_kernels_are_refused_by_name() {
    assert_eq!(dtype(Dtype::Auto).unwrap(), Dtype::Bf16);
    assert_eq!(dtype(Dtype::Int8).unwrap(), Dtype::Int8);
    let refused = dtype(Dtype::F32).unwrap_err().to_string();
    assert!(refused.contains("'f32'") && refused.contains("'bf16'"), "{refused}");
}

#[test]
fn pages_reach_the_device_also_if_their_step_was_refused() {
    let mut runner = runner(Emulator::new());
    let good = step(0, &[4, 5], Input::Known);
    let mut bad = good.clone();
    bad.spans[0].rows = 0..9;
    assert_eq!(runner.submit(&bad).unwrap_err().kind, StepErrorKind::Step);
    assert_eq!(runner.lanes[1].loans.len(), 2);
    runner.submit(&Step { grants: Vec::new(), ..good }).unwrap();
    assert!(runner.lanes[1].loans.is_empty());
}
