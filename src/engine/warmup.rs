//! Steps that nobody asked for: a model's first ones, which touch memory and tell the scheduler
//! what a step costs, and the trial of a model whose steps fail. They write to pages that no
//! request gets, so they may run while others serve.

use crate::engine::runner::{Runner, StepError};
use crate::request::{LaneId, Micros, RequestId, Sampling, TenantId};
use crate::scheduler::step::{
    BLOCK_TOKENS, BlockId, Grant, Input, Outcome, Output, Span, Step, StepKind, TRIAL_SEAT,
};
use crate::scheduler::{LaneConfig, LaneKind};

/// KV blocks that a trial writes to, at most.
pub const TRIAL_BLOCKS: usize = 2;

/// Rows of the larger step.
const ROWS: usize = TRIAL_BLOCKS * BLOCK_TOKENS;

/// How often each size is run; the fastest counts, for the slower ones were disturbed.
const ROUNDS: usize = 3;

/// KV pages behind those that the scheduler knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scratch {
    /// The first of them: as many as the scheduler has.
    pub first: u32,
}

/// What trying a lane takes to know.
#[derive(Debug, Clone)]
pub struct Trial {
    /// The lane.
    pub lane: LaneId,
    /// As the scheduler has it.
    pub config: LaneConfig,
    /// Its longest sequence.
    pub context: usize,
}

/// A model's first steps, one at a time.
#[derive(Debug)]
pub struct Warmup {
    small: Step,
    large: Step,
    /// Steps done, and the fastest of each size.
    done: usize,
    fastest: [Micros; 2],
}

impl Warmup {
    /// The first steps of a lane.
    pub fn new(trial: &Trial, scratch: Scratch) -> Self {
        let rows = ROWS.min(trial.context).min(trial.config.rows_max as usize);
        let [small, large] = [1, rows].map(|rows| step(trial, scratch, rows));
        Self { small, large, done: 0, fastest: [Micros(u64::MAX); 2] }
    }

    /// Runs the next step. After the last one: the fixed part of a step's time, and the part for
    /// each row.
    ///
    /// # Errors
    /// The model cannot run.
    pub fn advance(
        &mut self,
        runner: &mut dyn Runner,
    ) -> Result<Option<(Micros, Micros)>, StepError> {
        // The large one first: what it touches, the small one need not.
        let size = 1 - self.done % 2;
        let step = if size == 0 { &self.small } else { &self.large };
        self.fastest[size] = self.fastest[size].min(time(runner, step)?);
        self.done += 1;
        if self.done < 2 * ROUNDS {
            return Ok(None);
        }
        let [small, large] = self.fastest;
        let row = large.since(small).0 / (self.large.rows() as u64 - 1).max(1);
        Ok(Some((Micros(small.0.saturating_sub(row)), Micros(row.max(1)))))
    }
}

/// Runs all of a lane's first steps: what one costs, as [`Warmup::advance`] says it.
///
/// # Errors
/// The model cannot run.
pub fn measure(
    runner: &mut dyn Runner,
    trial: &Trial,
    scratch: Scratch,
) -> Result<(Micros, Micros), StepError> {
    let mut warmup = Warmup::new(trial, scratch);
    loop {
        if let Some(cost) = warmup.advance(runner)? {
            return Ok(cost);
        }
    }
}

/// Whether a lane can compute at all.
///
/// # Errors
/// It cannot.
pub fn attempt(runner: &mut dyn Runner, trial: &Trial, scratch: Scratch) -> Result<(), StepError> {
    time(runner, &step(trial, scratch, 1)).map(drop)
}

fn time(runner: &mut dyn Runner, step: &Step) -> Result<Micros, StepError> {
    let mut outcome = Outcome::default();
    runner.submit(step)?;
    runner.collect(step.slot, &mut outcome)?;
    Ok(outcome.elapsed)
}

/// One sequence of `rows` rows, alone on the device.
fn step(trial: &Trial, scratch: Scratch, rows: usize) -> Step {
    let mut step = Step { lane: trial.lane, tokens: vec![0; rows], ..Step::default() };
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let output = match trial.config.kind {
        LaneKind::Generate { layers, blocks_per_page, .. } => {
            step.kind = if rows == 1 { StepKind::Decode } else { StepKind::Prefill };
            let blocks = rows.div_ceil(BLOCK_TOKENS) as u32;
            // The lane's own groups have lower numbers: they share the pages before these.
            let first = scratch.first.div_ceil(layers);
            let place = |block| BlockId {
                group: first + block / blocks_per_page,
                slot: block % blocks_per_page,
            };
            step.blocks.extend((0..blocks).map(place));
            let page = |group| scratch.first + group * layers;
            let grant = |group| Grant {
                group: first + group,
                pages: (page(group)..page(group + 1)).collect(),
            };
            step.grants.extend((0..blocks.div_ceil(blocks_per_page)).map(grant));
            Output::Sample { seat: TRIAL_SEAT, sampling, position: rows as u32 }
        }
        LaneKind::Encode => {
            step.kind = StepKind::Encode;
            Output::Answer
        }
    };
    step.spans.push(Span {
        request: RequestId(u64::MAX),
        tenant: TenantId::default(),
        part: 0,
        rows: 0..rows as u32,
        start: 0,
        blocks: 0..step.blocks.len() as u32,
        input: Input::Known,
        output,
    });
    step
}
