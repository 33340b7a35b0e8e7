//! What a lane works with while it plans or commits one step. Borrowed parts of the scheduler;
//! holds no state of its own.

use std::collections::HashMap;

use super::Said;
use super::cost_model::CostModel;
use super::notes::Notes;
use super::pages::Pages;
use super::seats::Seats;
use super::step::{Outcome, Step};
use crate::error::Error;
use crate::request::{Event, Finish, Micros, RequestId, Usage};

/// While a lane fills a step.
#[derive(Debug)]
pub(super) struct PlanTurn<'a> {
    /// The time.
    pub(super) now: Micros,
    /// A step should take no longer.
    pub(super) target: Micros,
    /// Rows that it may have, if not one alone is more.
    pub(super) allowed: u32,
    /// The lane's cost model.
    pub(super) cost: &'a CostModel,
    /// What is filled.
    pub(super) step: &'a mut Step,
    /// Whether `step` carries a prompt chunk.
    pub(super) chunked: bool,
    /// Slab index behind each span of `step`.
    pub(super) members: &'a mut Vec<u32>,
    /// All lanes' pages.
    pub(super) pages: &'a mut Pages,
    /// All lanes' seats.
    pub(super) seats: &'a mut Seats,
    /// For telemetry.
    pub(super) notes: &'a mut Notes,
    /// Events, in order.
    pub(super) said: &'a mut Vec<Said>,
}

/// While a lane takes in what became of a step, or of a request.
#[derive(Debug)]
pub(super) struct CommitTurn<'a> {
    /// All lanes' pages.
    pub(super) pages: &'a mut Pages,
    /// All lanes' seats.
    pub(super) seats: &'a mut Seats,
    /// For telemetry.
    pub(super) notes: &'a mut Notes,
    /// Requests about which something is still to be said.
    pub(super) live: &'a mut HashMap<RequestId, (usize, u32)>,
    /// Events, in order.
    pub(super) said: &'a mut Vec<Said>,
}

/// What became of a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Result<'a> {
    /// The time.
    pub(super) now: Micros,
    /// The step.
    pub(super) step: &'a Step,
    /// What it gave.
    pub(super) outcome: &'a Outcome,
}

impl CommitTurn<'_> {
    /// Says something about a live request.
    pub(super) fn say(&mut self, id: RequestId, event: Event) {
        self.said.push((id, event));
    }

    /// Says a request's last word: it is complete.
    pub(super) fn finish(&mut self, id: RequestId, finish: Finish, usage: Usage) {
        self.end(id, Event::Done { finish, usage });
    }

    /// Says a request's last word: it failed.
    pub(super) fn fail(&mut self, id: RequestId, error: &Error) {
        self.end(id, Event::Failed(error.clone()));
    }

    fn end(&mut self, id: RequestId, event: Event) {
        let live = self.live.remove(&id);
        assert!(live.is_some(), "request {} ends once", id.0);
        self.said.push((id, event));
    }
}
