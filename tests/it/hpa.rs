//! What Kubernetes' horizontal autoscaler does with a ScaledObject's thresholds, bounds and
//! behaviour: its formula, tolerance, stabilisation and policies. Knows no clock and no metric
//! source; both are the caller's.

use serde_json::Value;

/// Deviations smaller than this change nothing; the autoscaler's default.
const TOLERANCE: f64 = 0.1;
/// Seconds between two decisions; the autoscaler's default.
pub(crate) const SYNC_SECONDS: f64 = 15.0;

/// An autoscaler's settings and what it remembers.
#[derive(Debug)]
pub(crate) struct Hpa {
    pub(crate) min: u32,
    pub(crate) max: u32,
    up: Behavior,
    down: Behavior,
    /// When and what was recommended.
    recommended: Vec<(f64, u32)>,
    /// When and by how much the number changed.
    changes: Vec<(f64, i64)>,
}

#[derive(Debug)]
struct Behavior {
    window: f64,
    /// Pods, in how many seconds.
    policies: Vec<(u32, f64)>,
}

/// A metric's value over all pods and its threshold for one.
pub(crate) type Metric = (f64, f64);

impl Hpa {
    /// Of a ScaledObject. `speed`: how many of its seconds pass in one.
    pub(crate) fn new(scaled_object: &Value, speed: f64) -> Self {
        let spec = &scaled_object["spec"];
        let behavior = &spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"];
        let of = |name: &str| {
            let behavior = &behavior[name];
            let policy = |policy: &Value| {
                assert_eq!(policy["type"], "Pods");
                let pods = policy["value"].as_u64().unwrap() as u32;
                (pods, policy["periodSeconds"].as_f64().unwrap() / speed)
            };
            Behavior {
                window: behavior["stabilizationWindowSeconds"].as_f64().unwrap() / speed,
                policies: behavior["policies"].as_array().unwrap().iter().map(policy).collect(),
            }
        };
        Self {
            min: spec["minReplicaCount"].as_u64().unwrap() as u32,
            max: spec["maxReplicaCount"].as_u64().unwrap() as u32,
            up: of("scaleUp"),
            down: of("scaleDown"),
            recommended: Vec::new(),
            changes: Vec::new(),
        }
    }

    /// What it would have, before windows and policies, at its last decision.
    pub(crate) fn last_wish(&self) -> u32 {
        self.recommended.last().map_or(self.min, |(_, wish)| *wish)
    }

    /// Seconds that a wish for more pods is remembered.
    pub(crate) fn down_window(&self) -> f64 {
        self.down.window
    }

    /// The number of pods that it asks for at `now`, while `current` are asked for.
    pub(crate) fn decide(&mut self, now: f64, current: u32, metrics: &[Metric]) -> u32 {
        let wishes = metrics.iter().map(|metric| wish(current, *metric));
        let wish = wishes.max().unwrap_or(current).clamp(self.min, self.max);
        let stable = self.stabilize(now, current, wish);
        let limited = if stable > current {
            stable.min(self.limit_up(now, current).max(current))
        } else {
            stable.max(self.limit_down(now, current).min(current))
        };
        if limited != current {
            self.changes.push((now, i64::from(limited) - i64::from(current)));
        }
        limited
    }

    /// Up to the lowest wish of the one window, down to the highest of the other.
    fn stabilize(&mut self, now: f64, current: u32, wish: u32) -> u32 {
        let since = |window: f64| {
            let inside = self.recommended.iter().filter(move |(at, _)| *at > now - window);
            inside.map(|(_, wish)| *wish)
        };
        let up = since(self.up.window).fold(wish, u32::min);
        let down = since(self.down.window).fold(wish, u32::max);
        self.recommended.push((now, wish));
        current.max(up).min(down)
    }

    fn limit_up(&self, now: f64, current: u32) -> u32 {
        let limits = self.up.policies.iter().map(|(pods, period)| {
            let added: i64 = self.changed(now, *period, |change| change > 0);
            (i64::from(current) - added + i64::from(*pods)).max(0) as u32
        });
        limits.max().unwrap_or(u32::MAX)
    }

    fn limit_down(&self, now: f64, current: u32) -> u32 {
        let limits = self.down.policies.iter().map(|(pods, period)| {
            let taken: i64 = self.changed(now, *period, |change| change < 0);
            (i64::from(current) - taken - i64::from(*pods)).max(0) as u32
        });
        limits.min().unwrap_or(0)
    }

    fn changed(&self, now: f64, period: f64, which: fn(i64) -> bool) -> i64 {
        let inside =
            self.changes.iter().filter(|(at, change)| *at > now - period && which(*change));
        inside.map(|(_, change)| change).sum()
    }
}

/// KEDA's own part: whether there is work at all. The horizontal autoscaler never says zero.
#[derive(Debug)]
pub(crate) struct Activity {
    /// Of each metric; more than this is work.
    thresholds: Vec<f64>,
    /// Seconds without work before the last pod goes, where the minimum is zero.
    cooldown: f64,
    seen: Option<f64>,
}

impl Activity {
    /// Of a ScaledObject, whatever its minimum. `speed`: how many of its seconds pass in one.
    pub(crate) fn new(scaled_object: &Value, speed: f64) -> Self {
        let spec = &scaled_object["spec"];
        let threshold = |trigger: &Value| {
            let metadata = &trigger["metadata"];
            let text = ["activationThreshold", "activationTargetValue"].map(|key| &metadata[key]);
            let text = text.into_iter().find_map(Value::as_str).unwrap();
            text.parse().unwrap()
        };
        Self {
            thresholds: spec["triggers"].as_array().unwrap().iter().map(threshold).collect(),
            cooldown: spec["cooldownPeriod"].as_f64().unwrap_or(300.0) / speed,
            seen: None,
        }
    }

    /// Whether it would let the last pod go at `now`.
    pub(crate) fn asks_for_none(&mut self, now: f64, values: &[f64]) -> bool {
        if values.iter().zip(&self.thresholds).any(|(value, threshold)| value > threshold) {
            self.seen = Some(now);
        }
        now - *self.seen.get_or_insert(now) > self.cooldown
    }
}

/// Pods that one metric asks for.
fn wish(current: u32, (value, threshold): Metric) -> u32 {
    let ratio = value / (threshold * f64::from(current.max(1)));
    if current > 0 && (ratio - 1.0).abs() <= TOLERANCE {
        return current;
    }
    (value / threshold).ceil() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::k8s_tools::{one, rendered};

    #[test]
    fn the_last_pod_goes_after_the_cooldown_only() {
        let objects = &rendered()["components/keda-metrics-api"];
        let mut activity = Activity::new(one(objects, "ScaledObject", "sconce"), 1.0);
        assert!(!activity.asks_for_none(0.0, &[0.0, 1.0]));
        assert!(!activity.asks_for_none(300.0, &[0.0, 0.0]));
        assert!(activity.asks_for_none(301.0, &[0.0, 0.0]));
        assert!(!activity.asks_for_none(302.0, &[1.0, 0.0]));
    }

    fn hpa() -> Hpa {
        let objects = &rendered()["components/keda-prometheus"];
        Hpa::new(one(objects, "ScaledObject", "sconce"), 1.0)
    }

    #[test]
    fn grows_at_once_by_two_a_minute_to_the_maximum() {
        let mut hpa = hpa();
        let mut pods = 1;
        let mut at = Vec::new();
        for step in 0..40 {
            pods = hpa.decide(f64::from(step) * SYNC_SECONDS, pods, &[(400.0, 4.0)]);
            at.push(pods);
        }
        assert_eq!(&at[..6], [3, 3, 3, 3, 5, 5]);
        assert_eq!(*at.last().unwrap(), hpa.max);
    }

    #[test]
    fn shrinks_by_one_every_two_minutes_after_ten() {
        let mut hpa = hpa();
        let mut pods = hpa.decide(0.0, 3, &[(12.0, 4.0)]);
        assert_eq!(pods, 3);
        let mut fell = Vec::new();
        for step in 1..80 {
            let now = f64::from(step) * SYNC_SECONDS;
            let next = hpa.decide(now, pods, &[(0.0, 4.0), (0.0, 12.0)]);
            if next < pods {
                fell.push(now);
            }
            pods = next;
        }
        assert_eq!((pods, fell), (1, vec![600.0, 720.0]));
    }

    #[test]
    fn small_deviations_change_nothing_and_the_larger_wish_counts() {
        let mut hpa = hpa();
        assert_eq!(hpa.decide(0.0, 2, &[(8.7, 4.0)]), 2);
        assert_eq!(hpa.decide(15.0, 2, &[(0.0, 4.0), (30.0, 12.0)]), 3);
    }
}
