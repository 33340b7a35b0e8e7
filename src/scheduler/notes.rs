//! What the scheduler tells telemetry about one turn, beyond the events. Plain data; knows no
//! metric.

use crate::request::{LaneId, Micros, RequestId};

/// Collected by the last `plan` or `commit`; its vectors are reused.
#[derive(Debug, Clone, Default)]
pub struct Notes {
    /// Requests that got their first rows.
    pub scheduled: Vec<ScheduledNote>,
    /// Tokens that were emitted.
    pub tokens: Vec<TokenNote>,
    /// Rows of the committed step whose request had been cancelled or failed meanwhile.
    pub cancelled_rows: u32,
    /// Rows of the committed step that recomputed what a preemption had dropped.
    pub recomputed_rows: u32,
    /// Rows of the committed step that ran ahead past the end of their answer.
    pub overrun_rows: u32,
}

/// A request that got its first rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduledNote {
    /// Which.
    pub request: RequestId,
    /// Whose.
    pub lane: LaneId,
    /// Time since it arrived.
    pub waited: Micros,
}

/// One emitted token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenNote {
    /// Of which request.
    pub request: RequestId,
    /// Whose.
    pub lane: LaneId,
    /// Whether it is the request's first: then `after` counts from its arrival.
    pub first: bool,
    /// Time since the request's last token, or since it arrived.
    pub after: Micros,
}

impl Notes {
    /// Empties the notes and keeps their memory.
    pub(super) fn clear(&mut self) {
        self.scheduled.clear();
        self.tokens.clear();
        self.cancelled_rows = 0;
        self.recomputed_rows = 0;
        self.overrun_rows = 0;
    }
}
