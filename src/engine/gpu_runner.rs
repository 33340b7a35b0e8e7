//! Runs real models on a GPU: turns a step into tables, gives it to the device, and takes answers
//! in when they come. Host work for the next step goes on meanwhile. Knows no requests and no
//! driver.

use std::time::Duration;

use crate::device::cuda::fault::{Fault, GpuError};
use crate::device::cuda::{self, Gpu};
use crate::engine::residency::LoadedModel;
use crate::engine::runner::{Runner, StepError, StepErrorKind};
use crate::kernels::batch::BatchSpan;
use crate::kernels::cuda::executor::{Answers, DEPTH, Executor, Options, RunError};
use crate::kernels::cuda::tables::{FROM_SEAT, Loan, SeatDraw, Work};
use crate::kernels::ops::Program;
use crate::request::{LaneId, Micros};
use crate::scheduler::step::{Grant, Input, Outcome, Output, SlotId, Span, Step};

/// Execution slots of a GPU, and uncommitted steps a slot: one runs while the next is planned.
pub const GPU_SLOTS: (u8, u8) = (1, DEPTH as u8);

/// The runner of a GPU.
#[derive(Debug)]
pub struct GpuRunner {
    executor: Executor,
    /// Layers of each lane's KV cache; 0 for encoders, none where no model is yet.
    layers: Vec<Option<u32>>,
    work: Work,
    answers: Answers,
}

/// Opens the GPU of this process.
///
/// # Errors
/// There is none, its driver is too old, or this program was built without CUDA.
pub fn open() -> Result<Box<dyn Gpu>, GpuError> {
    cuda::open(crate::kernels::cuda::IMAGE)
}

/// Bytes that a program takes on the device beside its weights, about: rows, and as much again
/// for split attention and choosing tokens.
pub fn workspace_bytes(program: &Program) -> u64 {
    2 * Executor::workspace_bytes(program) as u64
}

impl GpuRunner {
    /// A runner over `gpu`.
    ///
    /// # Errors
    /// There is too little memory for the KV region.
    pub fn new(gpu: Box<dyn Gpu>, options: Options) -> Result<Self, GpuError> {
        let executor = Executor::new(gpu, options)?;
        let layers = vec![None; options.lanes];
        Ok(Self { executor, layers, work: Work::default(), answers: Answers::default() })
    }

    fn take_in(&mut self, grants: &[Grant], layers: u32) {
        for grant in grants {
            let first = grant.group * layers;
            let pages = grant.pages.iter().zip(first..);
            self.work.loans.extend(pages.map(|(&page, place)| Loan { place, page }));
        }
    }

    /// Resolves a step for the device.
    fn pack(&mut self, step: &Step) {
        let Work { batch, draws, .. } = &mut self.work;
        batch.tokens.extend_from_slice(&step.tokens);
        batch.blocks.extend(step.blocks.iter().map(|block| (block.group, block.slot)));
        for (index, span) in step.spans.iter().enumerate() {
            let (rows, blocks) = (span.rows.clone(), span.blocks.clone());
            batch.positions.extend((0..span.len() as u32).map(|row| span.start + row));
            batch.span_of.extend(std::iter::repeat_n(index as u32, span.len()));
            if let Input::Seat(seat) = span.input {
                batch.tokens[rows.start as usize] = FROM_SEAT | seat.0;
            }
            if let Output::Sample { seat, sampling, position } = span.output {
                let row = batch.gather.len() as u32;
                batch.gather.push(rows.end - 1);
                draws.push(SeatDraw { row, seat: seat.0, position, sampling });
            }
            batch.spans.push(BatchSpan { rows, start: span.start, blocks });
        }
    }
}

impl Runner for GpuRunner {
    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        let lane = step.lane.0 as usize;
        let Some(layers) = self.layers[lane] else {
            return Err(StepError::step(format!("lane {} has no model yet", step.lane)));
        };
        self.work.clear();
        self.take_in(&step.grants, layers);
        if let Some(what) = without_kernel(step) {
            return Err(StepError::step(format!("the CUDA kernels do not serve {what} yet")));
        }
        self.pack(step);
        self.executor.submit(lane, &self.work).map_err(|error| failed(&error))
    }

    fn collect(&mut self, _slot: SlotId, outcome: &mut Outcome) -> Result<(), StepError> {
        self.executor.collect(&mut self.answers).map_err(|error| failed(&error))?;
        let Answers { elapsed, tokens, vectors } = &mut self.answers;
        outcome.elapsed = micros(*elapsed);
        outcome.tokens.append(tokens);
        outcome.vectors.append(vectors);
        Ok(())
    }

    fn install(&mut self, lane: LaneId, model: LoadedModel) -> Result<(), StepError> {
        let index = lane.0 as usize;
        let program = &model.program;
        let installed = self.executor.install(index, program);
        let bytes = installed.map_err(|error| match error.device() {
            Some(device) => failed(&device.clone().into()),
            None => StepError::step(error.to_string()),
        })?;
        let graphs = self.executor.record(index).map_err(|error| failed(&error.into()))?;
        self.layers[index] = Some(program.kv.map_or(0, |kv| kv.layers as u32));
        tracing::info!(%lane, bytes, graphs, "model is on the device");
        Ok(())
    }
}

/// What of a step has no kernel.
fn without_kernel(step: &Step) -> Option<&'static str> {
    let pair = |span: &Span| matches!(span.input, Input::Pair { .. });
    let hidden = |span: &Span| span.output == Output::Hidden;
    if !step.details.is_empty() {
        return Some("penalties, bias and log-probabilities");
    }
    if step.spans.iter().any(hidden) {
        return Some("the states of single tokens");
    }
    step.spans.iter().any(pair).then_some("pairs of texts with token types")
}

/// At least one microsecond: nothing is free.
fn micros(elapsed: Duration) -> Micros {
    Micros((elapsed.as_nanos() as u64).div_ceil(1000).max(1))
}

/// A sticky error has poisoned the context: no later step can succeed.
fn failed(error: &RunError) -> StepError {
    let message = match error.fault() {
        Some(fault) if fault != Fault::Call => format!("{}: {error}", fault.as_str()),
        _ => error.to_string(),
    };
    let kind = error.fault().map_or(StepErrorKind::Step, StepErrorKind::of);
    StepError { message, kind }
}

#[cfg(test)]
mod tests;
