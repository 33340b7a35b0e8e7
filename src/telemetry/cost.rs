//! The ledger: every nanosecond of the device belongs to a model's steps, to a model's load or to
//! nobody, and has a price. Integers only; the time is given in. Knows no metric names.
//!
//! `accounted` is the sum of busy, load and idle time and never passes the wall clock: a charge
//! is cut to what is left, and idle time is what is left while nothing holds the device. So
//! busy + load + idle = wall by construction, and no counter ever falls.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use crate::request::{LaneId, TenantId};

/// Nanoseconds since the ledger was opened.
pub(super) type Nanos = u64;

/// Why part of a model's busy time was for nothing; an index of `LaneTime::wasted`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Waste {
    Cancelled,
    Preempted,
    Cut,
}

/// Device time by model, by tenant and idle.
#[derive(Debug)]
pub(super) struct Ledger {
    lanes: Vec<LaneTime>,
    /// Busy time by tenant, then lane.
    tenants: Vec<Vec<AtomicU64>>,
    idle: AtomicU64,
    accounted: AtomicU64,
    /// How many pieces of work hold the device, and since when at least one of them does.
    open: AtomicU32,
    open_since: AtomicU64,
}

/// One model's device time in nanoseconds.
#[derive(Debug, Default)]
pub(super) struct LaneTime {
    busy: AtomicU64,
    load: AtomicU64,
    work: AtomicU64,
    wasted: [AtomicU64; 3],
}

/// What the device costs this process: price times share, an integer so that sums are exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Price {
    nano_usd_per_hour: u64,
}

impl Ledger {
    /// An empty ledger for this many models and tenants.
    pub(super) fn new(lanes: usize, tenants: usize) -> Self {
        let zeros = |_| (0..lanes).map(|_| AtomicU64::new(0)).collect();
        Self {
            lanes: (0..lanes).map(|_| LaneTime::default()).collect(),
            tenants: (0..tenants).map(zeros).collect(),
            idle: AtomicU64::new(0),
            accounted: AtomicU64::new(0),
            open: AtomicU32::new(0),
            open_since: AtomicU64::new(0),
        }
    }

    /// Work takes the device: from `now` on time is not idle, whoever is charged for it later.
    pub(super) fn open(&self, now: Nanos) {
        if self.open.fetch_add(1, SeqCst) == 0 {
            self.open_since.store(now, SeqCst);
        }
    }

    /// The work gave the device back; charge it first.
    pub(super) fn close(&self) {
        self.open.fetch_sub(1, SeqCst);
    }

    /// Charges a step to its model, and to tenants by their rows. Returns what was charged: less
    /// than `busy` only if the wall clock has not that much left.
    pub(super) fn step(
        &self,
        lane: LaneId,
        busy: Nanos,
        rows: &[(TenantId, u32)],
        now: Nanos,
    ) -> Nanos {
        let Some(time) = self.lanes.get(lane.0 as usize) else { return 0 };
        let granted = self.take(busy, now);
        time.busy.fetch_add(granted, Relaxed);
        self.share(lane, granted, rows);
        granted
    }

    /// Charges loading or warming up to a model.
    pub(super) fn load(&self, lane: LaneId, elapsed: Nanos, now: Nanos) {
        if let Some(time) = self.lanes.get(lane.0 as usize) {
            time.load.fetch_add(self.take(elapsed, now), Relaxed);
        }
    }

    /// Notes what a full step would have needed for the same rows.
    pub(super) fn work(&self, lane: LaneId, work: Nanos) {
        if let Some(time) = self.lanes.get(lane.0 as usize) {
            time.work.fetch_add(work, Relaxed);
        }
    }

    /// Notes that part of the busy time was for nothing.
    pub(super) fn waste(&self, lane: LaneId, reason: Waste, part: Nanos) {
        if let Some(time) = self.lanes.get(lane.0 as usize) {
            time.wasted[reason as usize].fetch_add(part, Relaxed);
        }
    }

    /// Books what nobody used until `now` as idle. Time since the device was last taken is left
    /// open: who pays for it is not known yet.
    pub(super) fn settle(&self, now: Nanos) {
        let open_since = self.open_since.load(SeqCst);
        let until = if self.open.load(SeqCst) > 0 { open_since.min(now) } else { now };
        let before = self.accounted.fetch_max(until, SeqCst);
        self.idle.fetch_add(until.saturating_sub(before), Relaxed);
    }

    /// One model's times.
    pub(super) fn lane(&self, lane: usize) -> &LaneTime {
        &self.lanes[lane]
    }

    /// Busy time of one tenant on one model.
    pub(super) fn tenant(&self, tenant: usize, lane: usize) -> Nanos {
        self.tenants[tenant][lane].load(Relaxed)
    }

    /// Time that nobody used, as of the last `settle`.
    pub(super) fn idle(&self) -> Nanos {
        self.idle.load(Relaxed)
    }

    /// Takes up to `amount` out of what the wall clock has left.
    fn take(&self, amount: Nanos, now: Nanos) -> Nanos {
        let left = |accounted: Nanos| amount.min(now.saturating_sub(accounted));
        let before = self
            .accounted
            .fetch_update(SeqCst, SeqCst, |accounted| Some(accounted + left(accounted)))
            .expect("the update always gives a value");
        left(before)
    }

    /// Splits `total` over tenants by rows; differences of running sums, so nothing is lost.
    fn share(&self, lane: LaneId, total: Nanos, rows: &[(TenantId, u32)]) {
        let all: u64 = rows.iter().map(|&(_, rows)| u64::from(rows)).sum();
        let (mut seen, mut given) = (0, 0);
        for &(tenant, rows) in rows {
            seen += u64::from(rows);
            let until = (u128::from(total) * u128::from(seen) / u128::from(all.max(1))) as u64;
            let tenant = (tenant.0 as usize).min(self.tenants.len() - 1);
            self.tenants[tenant][lane.0 as usize].fetch_add(until - given, Relaxed);
            given = until;
        }
    }
}

impl LaneTime {
    /// Time of its steps.
    pub(super) fn busy(&self) -> Nanos {
        self.busy.load(Relaxed)
    }

    /// Time of loading and warming it up.
    pub(super) fn load(&self) -> Nanos {
        self.load.load(Relaxed)
    }

    /// Time that its rows would have needed in full steps.
    pub(super) fn work(&self) -> Nanos {
        self.work.load(Relaxed)
    }

    /// Time wasted, by `Waste`.
    pub(super) fn wasted(&self, reason: usize) -> Nanos {
        self.wasted[reason].load(Relaxed)
    }
}

impl Price {
    /// `share` of a device that costs `hourly_usd`.
    pub(super) fn new(hourly_usd: f64, share: f64) -> Self {
        Self { nano_usd_per_hour: (hourly_usd * share * 1e9).round() as u64 }
    }

    /// What so much device time costs, in billionths of a dollar, rounded down.
    pub(super) fn of(self, time: Nanos) -> u64 {
        const HOUR: u128 = 3_600_000_000_000;
        (u128::from(time) * u128::from(self.nano_usd_per_hour) / HOUR) as u64
    }
}
