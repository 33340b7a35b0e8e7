//! How many requests are in flight, and what became of those that ended after the notice. Knows
//! no phase and no deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};

use tokio::sync::Notify;

use crate::telemetry::Telemetry;

/// The requests in flight, and the drain's counts.
#[derive(Debug)]
pub(super) struct Flights {
    telemetry: Arc<Telemetry>,
    count: AtomicUsize,
    /// Whether ends are the drain's: from the notice until all is said.
    draining: AtomicBool,
    finished: AtomicU64,
    cut: AtomicU64,
    /// Something changed that the driver should look at.
    pub(super) changed: Notify,
}

impl Flights {
    pub(super) fn new(telemetry: Arc<Telemetry>) -> Arc<Self> {
        Arc::new(Self {
            telemetry,
            count: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            finished: AtomicU64::new(0),
            cut: AtomicU64::new(0),
            changed: Notify::new(),
        })
    }

    /// Counts a request if `allowed` says so. It is asked after counting: whoever closes the door
    /// and then sees nobody in flight can rely on it.
    pub(super) fn enter<E>(&self, allowed: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        self.count.fetch_add(1, SeqCst);
        let answer = allowed();
        match answer {
            Ok(()) => self.telemetry.in_flight(1),
            Err(_) => self.left(),
        }
        answer
    }

    /// A request that entered is over; `cut` if it got no full answer.
    pub(super) fn leave(&self, cut: bool) {
        self.telemetry.in_flight(-1);
        if self.draining.load(SeqCst) {
            self.ended(cut);
        }
        self.left();
    }

    /// Requests accepted and not fully answered.
    pub(super) fn count(&self) -> usize {
        self.count.load(SeqCst)
    }

    /// From now on ends are counted as the drain's.
    pub(super) fn begin(&self) {
        self.draining.store(true, SeqCst);
    }

    /// Nobody waits any longer: who is left was cut.
    pub(super) fn end(&self) {
        if self.draining.swap(false, SeqCst) {
            (0..self.count()).for_each(|_| self.ended(true));
        }
    }

    /// Requests that ended during the drain: finished, and cut.
    pub(super) fn drained(&self) -> (u64, u64) {
        (self.finished.load(SeqCst), self.cut.load(SeqCst))
    }

    fn ended(&self, cut: bool) {
        let (counter, result) = if cut { (&self.cut, "cut") } else { (&self.finished, "finished") };
        counter.fetch_add(1, SeqCst);
        self.telemetry.drained(result);
    }

    fn left(&self) {
        if self.count.fetch_sub(1, SeqCst) == 1 {
            self.changed.notify_one();
        }
    }
}
