//! A lane of either kind, as the scheduler sees it. Knows no other lane.

use super::cost_model::CostModel;
use super::encode::EncodeLane;
use super::generate::GenerateLane;
use super::pages::Needs;
use super::step::{BLOCK_TOKENS, SlotId, StepKind};
use super::turn::CommitTurn;
use super::{LaneConfig, LaneKind, LaneLoad, SchedulerConfig};
use crate::request::Micros;

/// A lane and what every kind of lane has.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) work: Work,
    pub(super) cost: CostModel,
    /// Rows of its largest step.
    pub(super) rows_max: u32,
    /// Rows that a step may have now: fewer after one found no memory, one more after each that
    /// did.
    pub(super) allowed: u32,
    /// Uncommitted steps, all in `slot`.
    pub(super) in_flight: usize,
    pub(super) slot: SlotId,
}

/// The two kinds of lane.
#[derive(Debug)]
pub(super) enum Work {
    Generate(GenerateLane),
    Encode(EncodeLane),
}

impl Lane {
    pub(super) fn new(number: usize, lane: &LaneConfig, config: &SchedulerConfig) -> Self {
        assert!(lane.rows_max > 0, "a step holds at least one row");
        let work = match lane.kind {
            LaneKind::Generate { context, blocks_per_page, guaranteed_groups, seats, .. } => {
                let positions =
                    u64::from(guaranteed_groups) * u64::from(blocks_per_page) * BLOCK_TOKENS as u64;
                assert!(
                    positions >= u64::from(context) && seats > 0,
                    "lane {number}: {positions} guaranteed positions and {seats} seats do not \
                     hold one sequence of {context}"
                );
                Work::Generate(GenerateLane::new(number, lane.rows_max, context))
            }
            LaneKind::Encode => Work::Encode(EncodeLane::new(lane.rows_max)),
        };
        let cost = CostModel::new(lane.cost, lane.rows_max, config.step_target);
        let rows_max = lane.rows_max;
        Self { work, cost, rows_max, allowed: rows_max, in_flight: 0, slot: SlotId(0) }
    }

    pub(super) fn has_work(&self) -> bool {
        match &self.work {
            Work::Generate(lane) => lane.has_work(),
            Work::Encode(lane) => lane.has_work(),
        }
    }

    /// Whether a live request has had no rows yet.
    pub(super) fn never_started(&self, index: u32) -> bool {
        match &self.work {
            Work::Generate(lane) => !lane.sequences[index].started,
            Work::Encode(lane) => lane.is_waiting(index),
        }
    }

    /// Arrival of the oldest waiting request.
    pub(super) fn oldest(&self) -> Option<Micros> {
        match &self.work {
            Work::Generate(lane) => {
                lane.waiting.front().map(|&index| lane.sequences[index].arrived)
            }
            Work::Encode(lane) => lane.oldest(),
        }
    }

    /// Ends a live request about which nothing more is to be said.
    pub(super) fn drop_request(&mut self, index: u32, turn: &mut CommitTurn) {
        match &mut self.work {
            Work::Generate(lane) => lane.drop_request(index, turn),
            Work::Encode(lane) => lane.drop_request(index),
        }
    }

    /// `seats`: how many more it could have.
    pub(super) fn load(&self, seats: u32, load: &mut LaneLoad) {
        match &self.work {
            Work::Generate(lane) => {
                load.waiting = lane.waiting.len() as u32;
                load.waiting_tokens = lane.waiting_tokens;
                load.running = lane.running.len() as u32;
                load.preemptions = lane.preemptions;
                load.seats = seats.saturating_sub(load.waiting);
                load.token_delay = self.cost.rate(StepKind::Prefill) * self.crowding(load.running);
                let prompts = lane.waiting_tokens as f64;
                let answers = lane.waiting_new as f64 * lane.answered;
                let answers = answers * self.cost.rate(StepKind::Decode);
                let work = prompts * self.cost.rate(StepKind::Prefill) + answers;
                let delay = prompts * load.token_delay + answers * lane.held_up(seats);
                load.waiting_work = Micros(work.round() as u64);
                load.start_delay = Micros(delay.round() as u64);
            }
            Work::Encode(lane) => {
                load.waiting = lane.waiting;
                load.waiting_tokens = lane.waiting_tokens;
                load.running = lane.running;
                load.seats = u32::MAX;
                load.token_delay = self.cost.rate(StepKind::Encode);
                let work = lane.waiting_tokens as f64 * load.token_delay;
                load.waiting_work = Micros(work.round() as u64);
                load.start_delay = load.waiting_work;
            }
        }
    }

    /// How many times as long prompts take beside `running` sequences, whose rows come first.
    fn crowding(&self, running: u32) -> f64 {
        let rows = self.cost.reference_rows(StepKind::Mixed);
        let left = rows.saturating_sub(running).max(BLOCK_TOKENS as u32);
        (f64::from(rows) / f64::from(left)).max(1.0)
    }
}

impl LaneKind {
    pub(super) fn needs(&self) -> Needs {
        match *self {
            LaneKind::Generate { layers, blocks_per_page, guaranteed_groups, .. } => {
                Needs { layers, per_group: blocks_per_page, guaranteed: guaranteed_groups }
            }
            LaneKind::Encode => Needs::default(),
        }
    }

    pub(super) fn seats(&self) -> u32 {
        match *self {
            LaneKind::Generate { seats, .. } => seats,
            LaneKind::Encode => 0,
        }
    }
}
