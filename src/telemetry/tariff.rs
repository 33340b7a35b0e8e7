//! What device time has cost. A new price holds for the time after it, so that no counter falls and
//! no past hour is billed anew; time before the first price was free. Knows no metric names.

use super::Setup;
use super::cost::{Ledger, Nanos, Price};
use crate::config::price::PriceTag;

/// The price and the bill so far.
#[derive(Debug)]
pub(super) struct Tariff {
    /// Part of the device that this process pays for.
    share: f64,
    shown: Option<Shown>,
    /// Busy and load of each lane when the price last changed.
    lanes: Vec<[Billed; 2]>,
    idle: Billed,
}

/// What a page says of the price.
#[derive(Debug)]
pub(super) struct Shown {
    /// Of the whole device.
    pub(super) hourly_usd: f64,
    /// A day, where one is known.
    pub(super) as_of: String,
    /// Who says so.
    pub(super) source: String,
    /// Of what this process pays for.
    price: Price,
}

/// So much time was billed with so many billionths of a dollar.
#[derive(Debug, Clone, Copy, Default)]
struct Billed {
    time: Nanos,
    nano_usd: u64,
}

impl Billed {
    /// What `time` in all costs, if what is new in it has this price.
    fn until(self, time: Nanos, price: Option<Price>) -> u64 {
        self.nano_usd + price.map_or(0, |price| price.of(time.saturating_sub(self.time)))
    }
}

impl Tariff {
    /// From the beginning of time.
    pub(super) fn new(setup: &Setup) -> Self {
        let shown = setup.device_hourly_usd.map(|hourly_usd| Shown {
            hourly_usd,
            as_of: String::new(),
            source: "cost.device_hourly_usd".to_owned(),
            price: Price::new(hourly_usd, setup.device_share),
        });
        Self {
            share: setup.device_share,
            shown,
            lanes: vec![Default::default(); setup.models.len()],
            idle: Billed::default(),
        }
    }

    /// Bills what was until `now` at the old price.
    pub(super) fn change(&mut self, tag: &PriceTag, ledger: &Ledger, now: Nanos) {
        ledger.settle(now);
        let price = self.price();
        let close = |billed: &mut Billed, time: Nanos| {
            *billed = Billed { time, nano_usd: billed.until(time, price) };
        };
        for (lane, [busy, load]) in self.lanes.iter_mut().enumerate() {
            close(busy, ledger.lane(lane).busy());
            close(load, ledger.lane(lane).load());
        }
        close(&mut self.idle, ledger.idle());
        self.shown = Some(Shown {
            hourly_usd: tag.device_hourly_usd,
            as_of: tag.as_of.clone(),
            source: tag.source.clone(),
            price: Price::new(tag.device_hourly_usd, self.share),
        });
    }

    /// The price in force; none: there has been none yet.
    pub(super) fn shown(&self) -> Option<&Shown> {
        self.shown.as_ref()
    }

    fn price(&self) -> Option<Price> {
        self.shown.as_ref().map(|shown| shown.price)
    }

    /// What a lane's busy and load time cost so far, in billionths of a dollar.
    pub(super) fn lane(&self, lane: usize, ledger: &Ledger) -> [u64; 2] {
        let [busy, load] = self.lanes[lane];
        let time = ledger.lane(lane);
        [busy.until(time.busy(), self.price()), load.until(time.load(), self.price())]
    }

    /// As [`Tariff::lane`], for the time that nobody used.
    pub(super) fn idle(&self, ledger: &Ledger) -> u64 {
        self.idle.until(ledger.idle(), self.price())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelTask;
    use crate::request::LaneId;

    const HOUR: Nanos = 3_600_000_000_000;

    fn tag(device_hourly_usd: f64) -> PriceTag {
        PriceTag { device_hourly_usd, as_of: "2026-07-20".into(), source: "a list".into() }
    }

    /// Two hours of which one is busy, at each of three prices; then the same from a time without.
    #[test]
    fn each_hour_costs_what_was_asked_for_it() {
        for (first, busy_usd, idle_usd) in [(Some(2.0), 1.0 + 0.5 + 4.0, 5.5), (None, 4.5, 4.5)] {
            let setup = Setup {
                models: vec![("a".into(), ModelTask::Embed)],
                device_hourly_usd: first,
                device_share: 0.5,
                ..Setup::default()
            };
            let ledger = Ledger::new(1, 1);
            let mut tariff = Tariff::new(&setup);
            assert_eq!(tariff.shown().is_some(), first.is_some());
            let mut last = [0; 2];
            for (hours, next) in [(2, Some(1.0)), (4, Some(8.0)), (6, None)] {
                let now = hours * HOUR;
                ledger.step(LaneId(0), HOUR, &[], now);
                ledger.settle(now);
                if let Some(next) = next {
                    tariff.change(&tag(next), &ledger, now);
                    assert_eq!(tariff.shown().map(|shown| shown.hourly_usd), Some(next));
                }
                let sums = [tariff.lane(0, &ledger)[0], tariff.idle(&ledger)];
                assert!(sums >= last, "a counter fell");
                last = sums;
            }
            let usd = last.map(|nano| nano as f64 / 1e9);
            assert_eq!(usd, [busy_usd, idle_usd]);
            assert_eq!(tariff.lane(0, &ledger)[1], 0);
        }
    }
}
