//! Runs real models: turns a step into packed rows, runs the lane's program, samples. Owns the KV
//! region, the workspace and the token buffer; knows no requests.

use std::io;
use std::time::Instant;

use crate::device::arena::Region;
use crate::engine::residency::LoadedModel;
use crate::engine::runner::{Runner, StepError};
use crate::kernels::batch::{Batch, BatchSpan, KvMap};
use crate::kernels::cpu::executor::{Draw, Executor, Refine, Refined};
use crate::kernels::ops::Buf;
use crate::kernels::sample::adjust::Past;
use crate::request::{LaneId, TokenId};
use crate::scheduler::step::{
    BlockCopy, BlockId, Grant, Input, MAX_SEATS, Outcome, Output, SlotId, Span, Step,
};

/// The one runner of a device.
#[derive(Debug)]
pub struct ModelRunner {
    executor: Executor,
    lanes: Vec<Lane>,
    memory: Memory,
    batch: Batch,
    draws: Vec<Draw>,
    /// The sampled tokens, by seat: where a later step finds its input.
    seats: Vec<TokenId>,
    /// A CPU computes in `submit`; the outcome waits here for `collect`.
    done: Option<Outcome>,
}

/// What the device holds besides weights.
#[derive(Debug)]
struct Memory {
    kv: Region,
    page_bytes: usize,
    workspace: Region,
}

#[derive(Debug, Default)]
struct Lane {
    model: Option<LoadedModel>,
    map: KvMap,
}

impl ModelRunner {
    /// A runner for `lanes` lanes, with `pages` super-pages of `page_bytes` each for KV blocks.
    ///
    /// # Errors
    /// The system refuses the memory.
    pub fn new(
        executor: Executor,
        lanes: usize,
        (pages, page_bytes): (u32, usize),
    ) -> io::Result<Self> {
        let memory = Memory {
            kv: Region::new(pages as usize * page_bytes)?,
            page_bytes,
            workspace: Region::new(0)?,
        };
        Ok(Self {
            executor,
            lanes: (0..lanes).map(|_| Lane::default()).collect(),
            memory,
            batch: Batch::default(),
            draws: Vec::new(),
            seats: vec![0; MAX_SEATS],
            done: None,
        })
    }

    fn compute(&mut self, step: &Step, outcome: &mut Outcome) -> Result<(), StepError> {
        let lane = &mut self.lanes[step.lane.0 as usize];
        let Some(model) = &lane.model else {
            return Err(StepError::step(format!("lane {} has no model yet", step.lane)));
        };
        let program = &model.program;
        lane.map.layers = program.kv.map_or(0, |kv| kv.layers);
        for grant in &step.grants {
            take_in(&mut lane.map, grant, self.memory.page_bytes);
        }
        pack(&mut self.batch, step, &self.seats);
        let Memory { kv, workspace, .. } = &mut self.memory;
        let executed = self.executor.execute(program, &self.batch, &lane.map, kv, workspace);
        executed.map_err(|error| StepError::step(error.to_string()))?;
        let output = program.output.expect("every program has an output");
        let hidden = program.hidden;
        self.answer(step, (output, hidden), outcome)
    }

    /// Samples, or copies vectors out. A program yields rows in the order of its spans.
    fn answer(
        &mut self,
        step: &Step,
        (output, hidden): (Buf, Option<Buf>),
        outcome: &mut Outcome,
    ) -> Result<(), StepError> {
        self.draws.clear();
        let workspace = &self.memory.workspace;
        let yields = step.spans.iter().filter(|span| span.output != Output::None);
        for (row, span) in yields.enumerate() {
            match span.output {
                Output::None => {}
                Output::Sample { sampling, position, .. } => {
                    self.draws.push(Draw { row, sampling, position });
                }
                Output::Answer => {
                    outcome.vectors.push(output.row(workspace, row).to_vec());
                }
                Output::Hidden => {
                    let none = || StepError::step("this model keeps no state of single tokens");
                    let hidden = hidden.ok_or_else(none)?;
                    let rows = span.rows.clone();
                    let states = rows.flat_map(|row| hidden.row(workspace, row as usize));
                    outcome.vectors.push(states.copied().collect());
                }
            }
        }
        outcome.tokens.resize(self.draws.len(), 0);
        let sampled =
            self.executor.sample(&output, &self.memory.workspace, &self.draws, &mut outcome.tokens);
        sampled.map_err(|error| StepError::step(error.to_string()))?;
        if !step.details.is_empty() {
            self.refine(step, output, outcome)?;
        }
        let seats = step.spans.iter().filter_map(|span| match span.output {
            Output::Sample { seat, .. } => Some(seat),
            Output::None | Output::Answer | Output::Hidden => None,
        });
        for (seat, &token) in seats.zip(&outcome.tokens) {
            self.seats[seat.0 as usize] = token;
        }
        Ok(())
    }

    /// What few spans ask for besides: adjusted draws and log-probabilities.
    fn refine(&mut self, step: &Step, output: Buf, outcome: &mut Outcome) -> Result<(), StepError> {
        let mut details = step.details.iter().peekable();
        let sampling = |(_, span): &(usize, &Span)| matches!(span.output, Output::Sample { .. });
        let spans = step.spans.iter().enumerate().filter(sampling);
        let mut wanted = Vec::with_capacity(step.details.len());
        let mut places = Vec::with_capacity(step.details.len());
        for (place, (index, span)) in spans.enumerate() {
            let Some(detail) = details.next_if(|detail| detail.span as usize == index) else {
                continue;
            };
            let generated = detail.generated.start as usize..detail.generated.end as usize;
            let in_seat = matches!(span.input, Input::Seat(_));
            let past = Past {
                prompt: &detail.prompt,
                generated: &step.history[generated],
                last: in_seat.then(|| self.batch.tokens[span.rows.start as usize]),
            };
            let (draw, plain) = (self.draws[place], outcome.tokens[place]);
            wanted.push(Refine { draw, detail: &detail.detail, past, plain });
            places.push(place);
        }
        let mut results = vec![Refined::default(); wanted.len()];
        let refined = self.executor.refine(&output, &self.memory.workspace, &wanted, &mut results);
        refined.map_err(|error| StepError::step(error.to_string()))?;
        for (place, Refined { token, logprobs }) in places.into_iter().zip(results) {
            outcome.tokens[place] = token;
            outcome.logprobs.extend(logprobs);
        }
        Ok(())
    }
}

impl Runner for ModelRunner {
    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        let started = Instant::now();
        let mut outcome = self.done.take().unwrap_or_default();
        outcome.clear();
        self.compute(step, &mut outcome)?;
        outcome.elapsed = started.elapsed().into();
        self.done = Some(outcome);
        Ok(())
    }

    fn collect(&mut self, _slot: SlotId, outcome: &mut Outcome) -> Result<(), StepError> {
        let done = self.done.as_mut().ok_or_else(|| StepError::step("nothing was submitted"))?;
        std::mem::swap(done, outcome);
        Ok(())
    }

    /// All programs share one workspace, for one step runs at a time: it has the size of the
    /// largest.
    fn install(&mut self, lane: LaneId, model: LoadedModel) -> Result<(), StepError> {
        let bytes = model.program.workspace_bytes;
        if bytes > self.memory.workspace.len() {
            let grown = Region::new(bytes);
            self.memory.workspace = grown.map_err(|error| StepError::step(error.to_string()))?;
        }
        self.lanes[lane.0 as usize].model = Some(model);
        Ok(())
    }
}

/// Notes where the pages of a group lie.
fn take_in(map: &mut KvMap, grant: &Grant, page_bytes: usize) {
    let start = grant.group as usize * map.layers;
    if map.offsets.len() < start + map.layers {
        map.offsets.resize(start + map.layers, 0);
    }
    for (place, page) in map.offsets[start..].iter_mut().zip(&grant.pages) {
        *place = *page as usize * page_bytes;
    }
}

/// Resolves a step for kernels, into memory that is reused.
fn pack(batch: &mut Batch, step: &Step, seats: &[TokenId]) {
    batch.clear();
    batch.tokens.extend_from_slice(&step.tokens);
    batch.blocks.extend(step.blocks.iter().map(BlockId::place));
    batch.copies.extend(step.copies.iter().map(BlockCopy::places));
    batch.greedy = step.is_greedy();
    for (index, span) in step.spans.iter().enumerate() {
        let Span { rows, start, blocks, input, output, .. } = span;
        batch.spans.push(BatchSpan { rows: rows.clone(), start: *start, blocks: blocks.clone() });
        batch.positions.extend((0..span.len() as u32).map(|row| start + row));
        batch.span_of.extend(std::iter::repeat_n(index as u32, span.len()));
        if let Input::Seat(seat) = input {
            batch.tokens[rows.start as usize] = seats[seat.0 as usize];
        }
        if let Input::Pair { second } = input {
            batch.types.resize(step.rows(), 0);
            batch.types[(rows.start + second) as usize..rows.end as usize].fill(1);
        }
        if *output != Output::None {
            batch.gather.push(rows.end - 1);
        }
    }
}
