//! The scheduler's load as last published: written by the engine in every turn, read by every
//! request and scrape. Single atomics instead of a lock, so that a reader that is descheduled
//! never stops the engine; a reader may see two turns mixed, which no decision here minds.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};

use super::Snapshot;
use crate::request::{LaneId, Micros};
use crate::scheduler::{LaneLoad, Load};

/// The last published numbers.
#[derive(Debug)]
pub(super) struct Published {
    lanes: Vec<PublishedLane>,
    /// Arrival of the oldest waiting request; `NONE` if nothing waits.
    oldest: AtomicU64,
    /// Pages in all.
    kv_pages: AtomicU32,
    kv_pages_lent: AtomicU32,
    kv_usage: AtomicU64,
    inbox: AtomicI64,
    in_flight: AtomicI64,
}

#[derive(Debug, Default)]
struct PublishedLane {
    waiting: AtomicU32,
    waiting_tokens: AtomicU64,
    waiting_work: AtomicU64,
    start_delay: AtomicU64,
    /// `f64` bits.
    token_delay: AtomicU64,
    seats: AtomicU32,
    running: AtomicU32,
    blocks_used: AtomicU32,
    blocks_cached: AtomicU32,
    preemptions: AtomicU64,
    /// Prompt tokens that were submitted and not yet seen by the scheduler.
    inbox_tokens: AtomicI64,
    /// Predicted microseconds a waiting prompt token when last something waited, as `f64` bits.
    work_per_token: AtomicU64,
    /// Pages that one block takes, as `f64` bits.
    pages_per_block: AtomicU64,
}

const NONE: u64 = u64::MAX;

impl Published {
    /// Nothing waits in any of `lanes`.
    pub(super) fn new(lanes: usize) -> Self {
        Self {
            lanes: (0..lanes).map(|_| PublishedLane::default()).collect(),
            oldest: AtomicU64::new(NONE),
            kv_pages: AtomicU32::new(0),
            kv_pages_lent: AtomicU32::new(0),
            kv_usage: AtomicU64::new(0),
            inbox: AtomicI64::new(0),
            in_flight: AtomicI64::new(0),
        }
    }

    /// Takes in the scheduler's load.
    pub(super) fn publish(&self, load: &Load) {
        for (lane, load) in self.lanes.iter().zip(&load.lanes) {
            lane.waiting.store(load.waiting, Relaxed);
            lane.waiting_tokens.store(load.waiting_tokens, Relaxed);
            lane.waiting_work.store(load.waiting_work.0, Relaxed);
            lane.start_delay.store(load.start_delay.0, Relaxed);
            lane.token_delay.store(load.token_delay.to_bits(), Relaxed);
            lane.seats.store(load.seats, Relaxed);
            if load.waiting_tokens > 0 {
                let rate = load.waiting_work.0 as f64 / load.waiting_tokens as f64;
                lane.work_per_token.store(rate.to_bits(), Relaxed);
            }
            lane.running.store(load.running, Relaxed);
            lane.blocks_used.store(load.blocks_used, Relaxed);
            lane.blocks_cached.store(load.blocks_cached, Relaxed);
            lane.preemptions.store(load.preemptions, Relaxed);
        }
        self.oldest.store(load.oldest.map_or(NONE, |oldest| oldest.0), Relaxed);
        self.kv_pages_lent.store(load.kv_pages_lent, Relaxed);
        self.kv_usage.store(load.kv_usage.to_bits(), Relaxed);
    }

    /// Requests of `lane` went into the inbox (positive) or out of it.
    pub(super) fn inbox(&self, lane: LaneId, requests: i64, tokens: i64) {
        self.inbox.fetch_add(requests, Relaxed);
        if let Some(lane) = self.lanes.get(lane.0 as usize) {
            lane.inbox_tokens.fetch_add(tokens, Relaxed);
        }
    }

    /// Requests were accepted (positive) or fully answered.
    pub(super) fn in_flight(&self, change: i64) {
        self.in_flight.fetch_add(change, Relaxed);
    }

    /// Sets how many pages a block of the lane takes.
    pub(super) fn layout(&self, lane: LaneId, pages_per_block: f64) {
        if let Some(lane) = self.lanes.get(lane.0 as usize) {
            lane.pages_per_block.store(pages_per_block.to_bits(), Relaxed);
        }
    }

    /// Pages that one block of the lane takes.
    pub(super) fn pages_per_block(&self, lane: usize) -> f64 {
        f64::from_bits(self.lanes[lane].pages_per_block.load(Relaxed))
    }

    /// Sets how many pages there are.
    pub(super) fn kv_limit(&self, pages: u32) {
        self.kv_pages.store(pages, Relaxed);
    }

    /// Blocks that each lane could have if it had all pages; 0 for one without.
    pub(super) fn block_counts(&self) -> impl Iterator<Item = u64> {
        let pages = f64::from(self.kv_pages.load(Relaxed));
        (0..self.lanes.len()).map(move |lane| match self.pages_per_block(lane) {
            0.0 => 0,
            each => (pages / each) as u64,
        })
    }

    /// Everything at once.
    pub(super) fn snapshot(&self) -> Snapshot {
        let oldest = self.oldest.load(Relaxed);
        let load = Load {
            lanes: self.lanes.iter().map(PublishedLane::load).collect(),
            oldest: (oldest != NONE).then_some(Micros(oldest)),
            kv_pages_lent: self.kv_pages_lent.load(Relaxed),
            kv_usage: f64::from_bits(self.kv_usage.load(Relaxed)),
        };
        // The engine may take a request out before the front has noted that it went in.
        let inbox = self.inbox.load(Relaxed).max(0) as u32;
        Snapshot {
            load,
            inbox,
            inbox_tokens: self.lanes.iter().map(PublishedLane::inbox_tokens).sum(),
            inbox_work: self.lanes.iter().map(PublishedLane::inbox_work).collect(),
            inbox_delay: self.lanes.iter().map(|lane| lane.inbox_delay(inbox)).collect(),
            in_flight: self.in_flight.load(Relaxed).max(0) as u32,
        }
    }
}

impl PublishedLane {
    fn inbox_tokens(&self) -> u64 {
        self.inbox_tokens.load(Relaxed).max(0) as u64
    }

    fn inbox_work(&self) -> Micros {
        let rate = f64::from_bits(self.work_per_token.load(Relaxed));
        Micros((self.inbox_tokens() as f64 * rate) as u64)
    }

    /// `inbox` requests of all lanes, of which any number may be this one's.
    fn inbox_delay(&self, inbox: u32) -> Micros {
        if inbox > self.seats.load(Relaxed) {
            return self.inbox_work();
        }
        let each = f64::from_bits(self.token_delay.load(Relaxed));
        Micros((self.inbox_tokens() as f64 * each) as u64)
    }

    fn load(&self) -> LaneLoad {
        LaneLoad {
            waiting: self.waiting.load(Relaxed),
            waiting_tokens: self.waiting_tokens.load(Relaxed),
            waiting_work: Micros(self.waiting_work.load(Relaxed)),
            start_delay: Micros(self.start_delay.load(Relaxed)),
            token_delay: f64::from_bits(self.token_delay.load(Relaxed)),
            seats: self.seats.load(Relaxed),
            running: self.running.load(Relaxed),
            blocks_used: self.blocks_used.load(Relaxed),
            blocks_cached: self.blocks_cached.load(Relaxed),
            preemptions: self.preemptions.load(Relaxed),
        }
    }
}
