//! How many requests are in flight, and what became of those that ended after the notice. Knows
//! no phase and no deadline.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::telemetry::Telemetry;

/// How a request in flight ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Answered in full, or its client left.
    Finished,
    /// It got no full answer.
    Cut,
    /// It was refused before there was work on it.
    Refused,
}

/// The requests in flight, and the drain's counts.
#[derive(Debug)]
pub(super) struct Flights {
    telemetry: Arc<Telemetry>,
    /// One lock for all numbers: a request that is refused is never seen in flight, and one that
    /// leaves is either the drain's or not.
    numbers: Mutex<Numbers>,
    /// Something changed that the driver should look at.
    pub(super) changed: Notify,
}

#[derive(Debug, Default)]
struct Numbers {
    in_flight: usize,
    /// Whether ends are the drain's: from the notice until all is said.
    draining: bool,
    finished: u64,
    cut: u64,
}

impl Flights {
    pub(super) fn new(telemetry: Arc<Telemetry>) -> Arc<Self> {
        Arc::new(Self { telemetry, numbers: Mutex::default(), changed: Notify::new() })
    }

    /// Counts a request if `allowed` says so. Nobody else looks at the numbers meanwhile: whoever
    /// closes the door and then sees nobody in flight can rely on it. `allowed` must not wait.
    pub(super) fn enter(&self, allowed: impl FnOnce() -> bool) -> bool {
        let mut numbers = self.numbers();
        let enters = allowed();
        if enters {
            numbers.in_flight += 1;
            self.telemetry.in_flight(1);
        }
        enters
    }

    /// A request that entered is over.
    pub(super) fn leave(&self, end: End) {
        let mut numbers = self.numbers();
        numbers.in_flight -= 1;
        self.telemetry.in_flight(-1);
        if numbers.draining {
            self.ended(&mut numbers, end);
        }
        if numbers.in_flight == 0 {
            self.changed.notify_one();
        }
    }

    /// Requests accepted and not fully answered.
    pub(super) fn count(&self) -> usize {
        self.numbers().in_flight
    }

    /// From now on ends are counted as the drain's.
    pub(super) fn begin(&self) {
        self.numbers().draining = true;
    }

    /// Nobody waits any longer: who is left was cut.
    pub(super) fn end(&self) {
        let mut numbers = self.numbers();
        if std::mem::take(&mut numbers.draining) {
            (0..numbers.in_flight).for_each(|_| self.ended(&mut numbers, End::Cut));
        }
    }

    /// Requests that ended during the drain: finished, and cut.
    pub(super) fn drained(&self) -> (u64, u64) {
        let numbers = self.numbers();
        (numbers.finished, numbers.cut)
    }

    fn ended(&self, numbers: &mut Numbers, end: End) {
        let (counter, result) = match end {
            End::Finished => (&mut numbers.finished, "finished"),
            End::Cut => (&mut numbers.cut, "cut"),
            End::Refused => return,
        };
        *counter += 1;
        self.telemetry.drained(result);
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        // Numbers are whole after every statement, so those that a panic left behind are good.
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
