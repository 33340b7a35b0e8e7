//! Runs real models on a GPU: turns a step into tables, gives it to the device, and takes answers
//! in when they come. Host work for the next step goes on meanwhile. Knows no requests and no
//! driver.

use std::time::Duration;

use crate::device::cuda::fault::{Fault, GpuError};
use crate::device::cuda::{self, Gpu, GpuInfo};
use crate::engine::residency::LoadedModel;
use crate::engine::runner::{Runner, StepError, StepErrorKind};
use crate::kernels::batch::BatchSpan;
use crate::kernels::cuda::details::DrawDetail;
use crate::kernels::cuda::executor::{Answers, DEPTH, Executor, Options, RunError};
use crate::kernels::cuda::tables::{FROM_SEAT, Loan, SeatDraw, Work};
use crate::kernels::ops::Program;
use crate::model::Dtype;
use crate::request::{LaneId, Micros};
use crate::scheduler::step::{BlockCopy, BlockId, Input, Outcome, Output, SlotId, Step};
use crate::weights::LoadError;

/// Execution slots of a GPU, and uncommitted steps a slot: one runs while the next is planned.
pub const GPU_SLOTS: (u8, u8) = (1, DEPTH as u8);

/// The runner of a GPU.
#[derive(Debug)]
pub struct GpuRunner {
    executor: Executor,
    lanes: Vec<Lane>,
    work: Work,
    answers: Answers,
}

#[derive(Debug, Clone, Default)]
struct Lane {
    /// Layers of its KV cache; 0 for encoders, none where no model is yet.
    layers: Option<u32>,
    /// Pages that the device has not heard of yet: a step that it refused takes none in.
    loans: Vec<Loan>,
}

/// Opens the GPU of this process.
///
/// # Errors
/// There is none, it or its driver is too old, or this program was built without CUDA.
pub fn open() -> Result<Box<dyn Gpu>, GpuError> {
    cuda::open(crate::kernels::cuda::IMAGE)
}

/// Bytes that a program takes on the device beside its weights.
pub fn workspace_bytes(program: &Program) -> u64 {
    Executor::workspace_bytes(program)
}

/// Bytes that all programs share on a device, the KV region apart.
pub fn shared_bytes(info: &GpuInfo) -> u64 {
    Executor::shared_bytes(info)
}

/// How float weights are kept on a GPU, of what a manifest may say.
///
/// # Errors
/// There are no kernels for what it says.
pub fn dtype(asked: Dtype) -> Result<Dtype, LoadError> {
    match asked {
        Dtype::Auto | Dtype::Bf16 => Ok(Dtype::Bf16),
        Dtype::Int8 => Ok(Dtype::Int8),
        Dtype::F32 => Err(LoadError::Shape(
            "dtype 'f32' has no CUDA kernels: 'auto' and 'bf16' keep floats as bf16 on a GPU, \
             'int8' in 8 bits; f32 is for a processor (device.kind 'cpu')"
                .into(),
        )),
    }
}

impl GpuRunner {
    /// A runner over `gpu`.
    ///
    /// # Errors
    /// There is too little memory for the KV region.
    pub fn new(gpu: Box<dyn Gpu>, options: Options) -> Result<Self, GpuError> {
        let executor = Executor::new(gpu, options)?;
        let lanes = vec![Lane::default(); options.lanes];
        Ok(Self { executor, lanes, work: Work::default(), answers: Answers::default() })
    }

    /// Resolves a step for the device.
    fn pack(&mut self, step: &Step) {
        let Work { batch, draws, details, history, states, .. } = &mut self.work;
        batch.tokens.extend_from_slice(&step.tokens);
        batch.blocks.extend(step.blocks.iter().map(BlockId::place));
        batch.copies.extend(step.copies.iter().map(BlockCopy::places));
        history.extend_from_slice(&step.history);
        let mut wanted = step.details.iter().peekable();
        for (index, span) in step.spans.iter().enumerate() {
            let index = index as u32;
            let (rows, blocks) = (span.rows.clone(), span.blocks.clone());
            batch.positions.extend((0..span.len() as u32).map(|row| span.start + row));
            batch.span_of.extend(std::iter::repeat_n(index, span.len()));
            let mut last = None;
            match span.input {
                Input::Known => {}
                Input::Seat(seat) => {
                    batch.tokens[rows.start as usize] = FROM_SEAT | seat.0;
                    last = Some(rows.start);
                }
                Input::Pair { second } => {
                    batch.types.resize(step.rows(), 0);
                    batch.types[(rows.start + second) as usize..rows.end as usize].fill(1);
                }
            }
            let row = batch.gather.len() as u32;
            if span.output != Output::None {
                batch.gather.push(rows.end - 1);
            }
            match span.output {
                Output::None | Output::Answer => {}
                Output::Hidden => states.push(index),
                Output::Sample { seat, sampling, position } => {
                    let draw = draws.len() as u32;
                    draws.push(SeatDraw { row, seat: seat.0, position, sampling });
                    let detail = wanted.next_if(|detail| detail.span == index);
                    details.extend(detail.map(|of| DrawDetail {
                        draw,
                        detail: of.detail.clone(),
                        prompt: of.prompt.clone(),
                        generated: of.generated.clone(),
                        last,
                    }));
                }
            }
            batch.spans.push(BatchSpan { rows, start: span.start, blocks });
        }
    }
}

impl Runner for GpuRunner {
    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        let index = step.lane.0 as usize;
        let lane = &mut self.lanes[index];
        let Some(layers) = lane.layers else {
            return Err(StepError::step(format!("lane {} has no model yet", step.lane)));
        };
        for grant in &step.grants {
            let first = grant.group * layers;
            let places = first..first + layers;
            // A group that was lent anew before the device heard of it.
            lane.loans.retain(|loan| !places.contains(&loan.place));
            let pages = grant.pages.iter().zip(places);
            lane.loans.extend(pages.map(|(&page, place)| Loan { place, page }));
        }
        self.work.clear();
        self.pack(step);
        std::mem::swap(&mut self.work.loans, &mut self.lanes[index].loans);
        let submitted = self.executor.submit(index, &self.work);
        if submitted.is_err() {
            std::mem::swap(&mut self.work.loans, &mut self.lanes[index].loans);
        }
        submitted.map_err(|error| failed(&error))
    }

    fn collect(&mut self, _slot: SlotId, outcome: &mut Outcome) -> Result<(), StepError> {
        self.executor.collect(&mut self.answers).map_err(|error| failed(&error))?;
        let Answers { elapsed, tokens, logprobs, vectors } = &mut self.answers;
        outcome.elapsed = micros(*elapsed);
        outcome.tokens.append(tokens);
        outcome.logprobs.append(logprobs);
        outcome.vectors.append(vectors);
        Ok(())
    }

    fn install(&mut self, lane: LaneId, model: LoadedModel) -> Result<(), StepError> {
        let index = lane.0 as usize;
        let program = &model.program;
        // What was there is given back first.
        self.lanes[index] = Lane::default();
        let installed = self.executor.install(index, program);
        let bytes = installed.map_err(|error| match error.device() {
            Some(device) => failed(&device.clone().into()),
            None => StepError::step(error.to_string()),
        })?;
        let graphs = match self.executor.record(index) {
            Ok(graphs) => graphs,
            // Launches do without, a poisoned context does not.
            Err(error) if !error.fault.is_sticky() => {
                tracing::warn!(%lane, %error, "no graphs were recorded: each kernel is launched");
                0
            }
            Err(error) => return Err(failed(&error.into())),
        };
        self.lanes[index].layers = Some(program.kv.map_or(0, |kv| kv.layers as u32));
        tracing::info!(%lane, bytes, graphs, "model is on the device");
        Ok(())
    }
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
