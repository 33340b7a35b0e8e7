//! A plan against a running server: what its metrics show that should shrink or grow.

use std::time::Duration;

use serde::Serialize;

use super::probe::Target;
use super::report::Group;
use super::{Fault, PlanError};
use crate::telemetry::observed::Observed;

const MIB: f64 = 1_048_576.0;
/// Load below which a server is too large, and above which it is too small.
const LOAD_BAND: (f64, f64) = (0.5, 0.85);
/// What may stand beside a peak.
const MARGIN: f64 = 1.3;

/// The largest that was seen while watching, and the last scrape.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    last: Observed,
    kv_usage: f64,
    queue: f64,
    in_flight: f64,
    /// Part of a device that the rows needed: while watching, or else since the start.
    load: f64,
    seconds: u64,
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Finding {
    pub(super) what: String,
    pub(super) observed: String,
    pub(super) planned: String,
    /// Empty where both agree.
    pub(super) advice: String,
}

/// Scrapes `target` once a second for `seconds`, and once more.
///
/// # Errors
/// A server that does not answer, or is none of ours.
pub(super) async fn watch(target: &Target, seconds: u64) -> Result<Watched, PlanError> {
    let first = scrape(target).await?;
    let mut watched = Watched {
        kv_usage: first.kv_usage,
        queue: first.queue,
        in_flight: first.in_flight,
        load: first.work_seconds / first.wall_seconds.max(1e-9),
        seconds,
        last: first.clone(),
    };
    for _ in 0..seconds {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = scrape(target).await?;
        watched.kv_usage = watched.kv_usage.max(now.kv_usage);
        watched.queue = watched.queue.max(now.queue);
        watched.in_flight = watched.in_flight.max(now.in_flight);
        watched.last = now;
    }
    let wall = watched.last.wall_seconds - first.wall_seconds;
    if wall > 1.0 {
        watched.load = (watched.last.work_seconds - first.work_seconds) / wall;
    }
    Ok(watched)
}

async fn scrape(target: &Target) -> Result<Observed, PlanError> {
    let text = target.page("/metrics").await?;
    Observed::parse(&text).map_err(|what| PlanError::new(Fault::Data, format!("--from: {what}")))
}

impl Watched {
    /// What differs from the plan, and what to do about it.
    pub(super) fn against(&self, group: &Group) -> Vec<Finding> {
        let mut findings = Vec::new();
        self.memory(group, &mut findings);
        self.kv(group, &mut findings);
        self.traffic(group, &mut findings);
        self.models(group, &mut findings);
        findings
    }

    fn memory(&self, group: &Group, findings: &mut Vec<Finding>) {
        let fit = &group.memory;
        for (part, planned) in [("weights", fit.weights), ("workspace", fit.workspace)] {
            let seen = self.last.memory.get(part).copied().unwrap_or(0.0);
            let planned = planned as f64;
            let advice = if seen > planned * 1.05 {
                "more than planned: the plan's memory is too small for this server"
            } else if seen < planned * 0.95 {
                "less than planned: what was planned is not what runs"
            } else {
                ""
            };
            findings.push(Finding::of(part, mib(seen), mib(planned), advice));
        }
        let used: f64 =
            self.last.memory.iter().filter(|(use_, _)| *use_ != "free").map(|it| it.1).sum();
        let limit = self.last.memory_limit;
        let planned = group.pod.device_memory_limit as f64;
        let advice = match limit > used * 1.5 + 512.0 * MIB {
            true => format!(
                "{} are never used: a smaller device or limit holds this",
                mib(limit - used)
            ),
            false => String::new(),
        };
        findings.push(Finding::of("device.memory_limit", mib(limit), mib(planned), &advice));
    }

    fn kv(&self, group: &Group, findings: &mut Vec<Finding>) {
        let region = self.last.memory.get("kv").copied().unwrap_or(0.0);
        if region == 0.0 {
            return;
        }
        let peak = region * self.kv_usage;
        let enough = (peak * MARGIN).max(group.memory.kv_guaranteed as f64);
        let advice = if self.last.preemptions > 0.0 {
            format!(
                "{} requests were sent back for lack of KV: raise scheduler.kv_bytes to {}",
                self.last.preemptions,
                mib(region * MARGIN)
            )
        } else if enough < region * 0.7 {
            format!("shrink scheduler.kv_bytes to {}, the peak and 30 %", mib(enough))
        } else {
            String::new()
        };
        let seen = format!("peak {} of {}", mib(peak), mib(region));
        findings.push(Finding::of("KV cache", seen, mib(group.memory.kv as f64), &advice));
    }

    fn traffic(&self, group: &Group, findings: &mut Vec<Finding>) {
        let load = self.load;
        let planned = group.carries.map(|scale| 1.0 / (scale * f64::from(group.replicas)));
        let planned = planned.map_or_else(|| "-".into(), |load| format!("{:.0} %", load * 100.0));
        let advice = if load < LOAD_BAND.0 {
            format!(
                "below {:.0} %: fewer replicas, a share of the device, or more models in it",
                LOAD_BAND.0 * 100.0
            )
        } else if load > LOAD_BAND.1 {
            format!("above {:.0} %: more replicas or a faster device", LOAD_BAND.1 * 100.0)
        } else {
            String::new()
        };
        let over = match self.seconds {
            0 => "since the start".to_owned(),
            seconds => format!("in {seconds} s"),
        };
        findings.push(Finding::of(
            "load",
            format!("{:.0} % {over}", load * 100.0),
            planned,
            &advice,
        ));
        let threshold = f64::from(group.pod.queue_threshold);
        let advice = if self.queue > threshold { "more replicas: it should scale out" } else { "" };
        let seen = format!("peak {}", self.queue);
        findings.push(Finding::of("queue", seen, threshold.to_string(), advice));
        let threshold = group.pod.in_flight_threshold;
        let advice = if self.in_flight > threshold { "above the threshold" } else { "" };
        let seen = format!("peak {}", self.in_flight);
        findings.push(Finding::of("in flight", seen, threshold.to_string(), advice));
    }

    fn models(&self, group: &Group, findings: &mut Vec<Finding>) {
        for (index, name) in group.models.iter().enumerate() {
            let seen = self.last.models.get(name).copied().unwrap_or_default();
            let rate = seen.requests / self.last.wall_seconds.max(1e-9);
            let each = |tokens: f64| tokens / seen.requests.max(1.0);
            let observed = format!(
                "{rate:.3} requests/s, {:.0} + {:.0} tokens",
                each(seen.prompt_tokens),
                each(seen.generated_tokens)
            );
            let weights = group.memory.parts.get(index).map_or(0, |part| part.weights);
            let advice = match seen.requests == 0.0 {
                true => format!("nobody asked: without it {} are free", mib(weights as f64)),
                false => String::new(),
            };
            let load = group.loads[index];
            let planned =
                format!("{:.3} requests/s, {} + {} tokens", load.rps, load.prompt, load.output);
            findings.push(Finding::of(name, observed, planned, &advice));
        }
        for name in self.last.models.keys().filter(|name| !group.models.contains(name)) {
            let advice = "served, and not in the plan";
            findings.push(Finding::of(name, "served".into(), "-".into(), advice));
        }
    }
}

impl Finding {
    fn of(what: &str, observed: String, planned: String, advice: &str) -> Self {
        Self { what: what.to_owned(), observed, planned, advice: advice.to_owned() }
    }
}

fn mib(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / MIB)
}
