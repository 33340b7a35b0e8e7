//! The page that Prometheus scrapes, and what is worked out only when somebody does: gauges from
//! the published load, and the ledger's families. (The metrics crate's counters are integers; the
//! ledger has seconds and dollars in billionths.) Takes no lock that an event takes.

use std::fmt::Write;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::metrics::{self, Family, Kind};
use super::{Snapshot, Telemetry, histogram};

impl Telemetry {
    /// Housekeeping of the metrics crate, to be called every few seconds.
    pub fn upkeep(&self) {
        self.series.handle.run_upkeep();
    }

    /// The text that Prometheus scrapes. Holds no lock that an event takes.
    pub fn render(&self) -> String {
        self.changed.store(false, Ordering::SeqCst);
        self.ledger.settle(self.nanos());
        self.show_load();
        let mut page = self.series.handle.render();
        histogram::write_all(&mut page, &self.series.histograms);
        self.write_ledger(&mut page);
        self.write_board(&mut page);
        if self.vllm_metrics {
            let blocks = self.published.block_counts();
            let named = self.models.iter().map(String::as_str).zip(blocks);
            metrics::vllm::append(&mut page, named);
        }
        page
    }

    /// A scraper has got a rendered page.
    pub fn scraped(&self) {
        self.scrapes.send_modify(|scrapes| *scrapes += 1);
    }

    /// Ends when a scraper has seen every counter's last change; at once where nothing has ever
    /// been scraped, because then nobody will.
    pub async fn settled(&self) {
        let mut scrapes = self.scrapes.subscribe();
        let ever = *scrapes.borrow_and_update() > 0;
        if ever && self.changed.load(Ordering::SeqCst) {
            // The sender lives as long as `self`.
            let _ = scrapes.changed().await;
        }
    }

    /// Brings the gauges to what was last published.
    pub(super) fn show_load(&self) {
        let Snapshot { load, inbox, inbox_tokens, in_flight, .. } = self.snapshot();
        let waiting: u32 = load.lanes.iter().map(|lane| lane.waiting).sum();
        let tokens: u64 = load.lanes.iter().map(|lane| lane.waiting_tokens).sum();
        let work: f64 = load.lanes.iter().map(|lane| lane.waiting_work.as_seconds()).sum();
        let queue = &self.series.queue;
        queue.depth.set(waiting + inbox);
        queue.tokens.set((tokens + inbox_tokens) as f64);
        queue.work.set(work);
        queue.oldest.set(load.oldest.map_or(0.0, |oldest| self.now().since(oldest).as_seconds()));
        queue.running.set(load.lanes.iter().map(|lane| lane.running).sum::<u32>());
        queue.in_flight.set(in_flight);
        queue.kv_usage.set(load.kv_usage);
        for (index, (model, lane)) in self.series.models.iter().zip(&load.lanes).enumerate() {
            model.queue_depth.set(lane.waiting);
            model.queue_tokens.set(lane.waiting_tokens as f64);
            model.running.set(lane.running);
            let pages = self.published.pages_per_block(index);
            model.kv_pages[0].set(f64::from(lane.blocks_used) * pages);
            model.kv_pages[1].set(f64::from(lane.blocks_cached) * pages);
            model.preemptions.absolute(lane.preemptions);
        }
    }

    /// Appends the families that the ledger keeps.
    pub(super) fn write_ledger(&self, page: &mut String) {
        let times = || self.models.iter().enumerate().map(|(i, m)| (&m[..], self.ledger.lane(i)));
        write_family(page, &metrics::DEVICE_BUSY, times().map(|(m, t)| ([m], t.busy())));
        write_family(page, &metrics::DEVICE_LOAD, times().map(|(m, t)| ([m], t.load())));
        write_family(page, &metrics::DEVICE_IDLE, [([], self.ledger.idle())]);
        write_family(page, &metrics::DEVICE_WORK, times().map(|(m, t)| ([m], t.work())));
        let reasons = || metrics::WASTES.into_iter().enumerate();
        let wasted =
            times().flat_map(|(m, t)| reasons().map(move |(i, name)| ([m, name], t.wasted(i))));
        write_family(page, &metrics::DEVICE_WASTED, wasted);
        let tenants = self.series.tenants.all().flat_map(|(i, tenant)| {
            let models = self.models.iter().enumerate();
            models.map(move |(j, m)| ([&tenant.name[..], m], self.ledger.tenant(i, j)))
        });
        write_family(page, &metrics::TENANT_SECONDS, tenants);
        let tariff = self.tariff.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(shown) = tariff.shown() else { return };
        write_values(page, &metrics::PRICE, [(&[][..], shown.hourly_usd)]);
        let labels = [&shown.as_of[..], &shown.source];
        write_values(page, &metrics::PRICE_INFO, [(&labels[..], 1.0)]);
        let spent = self.models.iter().enumerate().flat_map(|(lane, model)| {
            let [busy, load] = tariff.lane(lane, &self.ledger);
            [([&model[..], "busy"], busy), ([&model[..], "load"], load)]
        });
        let idle = (["", "idle"], tariff.idle(&self.ledger));
        write_family(page, &metrics::COST, spent.chain([idle]));
    }
}

/// Appends a family kept in billionths: a sample for each row of label values.
fn write_family<'a, const N: usize>(
    page: &mut String,
    family: &Family,
    rows: impl IntoIterator<Item = ([&'a str; N], u64)>,
) {
    assert!(family.kind == Kind::NanoCounter, "{}", family.name);
    write_head(page, family);
    for (values, nanos) in rows {
        write_series(page, family, &values);
        let (whole, part) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
        writeln!(page, " {whole}.{part:09}").expect("a String takes all");
    }
    page.push('\n');
}

/// Appends a family whose series come and go, which those of the metrics crate cannot; nothing
/// where there is nothing to say.
pub(super) fn write_values<'a>(
    page: &mut String,
    family: &Family,
    samples: impl IntoIterator<Item = (&'a [&'a str], f64)>,
) {
    let mut samples = samples.into_iter().peekable();
    if samples.peek().is_none() {
        return;
    }
    write_head(page, family);
    for (values, value) in samples {
        write_series(page, family, values);
        writeln!(page, " {value}").expect("a String takes all");
    }
    page.push('\n');
}

/// Appends `name{a="b"}`.
pub(super) fn write_series(page: &mut String, family: &Family, values: &[&str]) {
    page.push_str(family.name);
    if !values.is_empty() {
        page.push('{');
        write_labels(page, family, values);
        page.push('}');
    }
}

/// Appends a family's help and type.
pub(super) fn write_head(page: &mut String, family: &Family) {
    let (name, help, kind) = (family.name, family.help, family.kind.as_str());
    write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n").expect("a String takes all");
}

/// Appends `a="b",c="d"`.
pub(super) fn write_labels(page: &mut String, family: &Family, values: &[&str]) {
    assert_eq!(family.labels.len(), values.len(), "{}", family.name);
    for (index, (label, value)) in family.labels.iter().zip(values).enumerate() {
        page.push_str(if index == 0 { "" } else { "," });
        page.push_str(label);
        page.push_str("=\"");
        for letter in value.chars() {
            match letter {
                '\\' => page.push_str("\\\\"),
                '"' => page.push_str("\\\""),
                '\n' => page.push_str("\\n"),
                other => page.push(other),
            }
        }
        page.push('"');
    }
}
