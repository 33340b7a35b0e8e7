//! A model's first steps, before anybody waits for them: pages of memory are touched, and the
//! scheduler gets a first idea of what a step costs.

use crate::engine::runner::{Runner, StepError};
use crate::request::{LaneId, Micros, RequestId, Sampling};
use crate::scheduler::step::{
    BLOCK_TOKENS, BlockId, Grant, Input, Outcome, Output, Seat, Span, Step, StepKind,
};
use crate::scheduler::{LaneConfig, LaneKind};

/// Rows of the larger step.
const ROWS: usize = 2 * BLOCK_TOKENS;

/// How often each size is run; the fastest counts, for the slower ones were disturbed.
const ROUNDS: usize = 3;

/// Runs a small and a larger step of the lane and returns the fixed part of a step's time and the
/// part for each row; `context` is its longest sequence. The KV region must not be in use yet.
///
/// # Errors
/// The model cannot run.
pub fn measure(
    runner: &mut dyn Runner,
    lane: LaneId,
    config: &LaneConfig,
    context: usize,
) -> Result<(Micros, Micros), StepError> {
    let rows = ROWS.min(context).min(config.rows_max as usize);
    let mut small = Micros(u64::MAX);
    let mut large = Micros(u64::MAX);
    for _ in 0..ROUNDS {
        large = large.min(time(runner, &step(lane, config, rows))?);
        small = small.min(time(runner, &step(lane, config, 1))?);
    }
    let row = large.since(small).0 / (rows as u64 - 1).max(1);
    Ok((Micros(small.0.saturating_sub(row)), Micros(row.max(1))))
}

fn time(runner: &mut dyn Runner, step: &Step) -> Result<Micros, StepError> {
    let mut outcome = Outcome::default();
    runner.submit(step)?;
    runner.collect(step.slot, &mut outcome)?;
    Ok(outcome.elapsed)
}

/// One sequence of `rows` rows, alone on the device.
fn step(lane: LaneId, config: &LaneConfig, rows: usize) -> Step {
    let mut step = Step { lane, tokens: vec![0; rows], ..Step::default() };
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let output = match config.kind {
        LaneKind::Generate { layers, blocks_per_page, .. } => {
            step.kind = if rows == 1 { StepKind::Decode } else { StepKind::Prefill };
            let blocks = rows.div_ceil(BLOCK_TOKENS) as u32;
            let place =
                |block| BlockId { group: block / blocks_per_page, slot: block % blocks_per_page };
            step.blocks.extend((0..blocks).map(place));
            let pages = |group| (group * layers..(group + 1) * layers).collect();
            let groups = 0..blocks.div_ceil(blocks_per_page);
            step.grants.extend(groups.map(|group| Grant { group, pages: pages(group) }));
            Output::Sample { seat: Seat(0), sampling, position: rows as u32 }
        }
        LaneKind::Encode => {
            step.kind = StepKind::Encode;
            Output::Answer
        }
    };
    step.spans.push(Span {
        request: RequestId(u64::MAX),
        part: 0,
        rows: 0..rows as u32,
        start: 0,
        blocks: 0..step.blocks.len() as u32,
        input: Input::Known,
        output,
    });
    step
}
