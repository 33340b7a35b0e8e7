//! How much may wait: predicted wait, waiting requests, waiting tokens. Pure arithmetic over the
//! last published numbers; knows no channel.

use std::time::Duration;

use crate::config::Limits;
use crate::config::manifest::Manifest;
use crate::error::{Error, ErrorKind};
use crate::request::{LaneId, Micros};
use crate::telemetry::{Rejection, Snapshot};

/// The queue's bounds.
pub(super) struct Bounds<'a> {
    pub(super) limits: &'a Limits,
    /// Lane weights, by lane.
    pub(super) manifests: &'a [Manifest],
}

impl Bounds<'_> {
    /// Whether `requests` more with `tokens` prompt tokens together may wait.
    pub(super) fn check(
        &self,
        snapshot: &Snapshot,
        lane: LaneId,
        requests: usize,
        tokens: u64,
    ) -> Result<(), (Rejection, Error)> {
        let limits = self.limits;
        if requests > limits.queue_requests {
            let message = format!(
                "the request has {requests} prompts; at most {} can wait \
                 (limits.queue_requests); send it in parts",
                limits.queue_requests
            );
            return Err((Rejection::TooLarge, Error::new(ErrorKind::TooLarge, message)));
        }
        if tokens > limits.queue_tokens as u64 {
            let message = format!(
                "the request has {tokens} prompt tokens; at most {} can wait \
                 (limits.queue_tokens); send it in parts",
                limits.queue_tokens
            );
            return Err((Rejection::TooLarge, Error::new(ErrorKind::TooLarge, message)));
        }
        let wait = self.predicted_wait(snapshot, lane);
        if wait > limits.max_wait {
            let message = format!(
                "the predicted wait is {:.1} s, the limit is {} s (limits.max_wait_seconds)",
                wait.as_secs_f64(),
                limits.max_wait.as_secs_f64()
            );
            return Err((Rejection::MaxWait, full(message, wait)));
        }
        let lanes = || snapshot.load.lanes.iter();
        let waiting =
            lanes().map(|lane| lane.waiting as usize).sum::<usize>() + snapshot.inbox as usize;
        if waiting + requests > limits.queue_requests {
            let message = format!(
                "{waiting} requests are waiting, the limit is {} (limits.queue_requests)",
                limits.queue_requests
            );
            return Err((Rejection::QueueFull, full(message, wait)));
        }
        let waiting = lanes().map(|lane| lane.waiting_tokens).sum::<u64>() + snapshot.inbox_tokens;
        if waiting + tokens > limits.queue_tokens as u64 {
            let message = format!(
                "{waiting} prompt tokens are waiting, with these {tokens} the limit of {} would \
                 be passed (limits.queue_tokens)",
                limits.queue_tokens
            );
            return Err((Rejection::QueueFull, full(message, wait)));
        }
        Ok(())
    }

    /// For a full inbox: the engine has not seen what waits there.
    pub(super) fn inbox_full(&self, snapshot: &Snapshot, lane: LaneId) -> Error {
        let message = format!(
            "the inbox holds its {} requests (limits.queue_requests)",
            self.limits.queue_requests
        );
        full(message, self.predicted_wait(snapshot, lane))
    }

    /// How long until the last that waits in `lane` begins: the lane's work until then over the
    /// share that it gets among the lanes with work, at most all the work there is.
    fn predicted_wait(&self, snapshot: &Snapshot, lane: LaneId) -> Duration {
        let lane = lane.0 as usize;
        let lanes = &snapshot.load.lanes;
        // The engine has not seen what is in the inbox, but it is just as much before us.
        let inbox = |lane: usize| snapshot.inbox_work.get(lane).copied().unwrap_or_default();
        let delay = |lane: usize| snapshot.inbox_delay.get(lane).copied().unwrap_or_default();
        let own = |lane: usize| lanes[lane].start_delay.plus(delay(lane));
        let other = |lane: usize| lanes[lane].waiting_work.plus(inbox(lane));
        if lane >= lanes.len() {
            return Duration::ZERO;
        }
        let has_work = |index: usize| {
            let load = &lanes[index];
            load.waiting + load.running > 0 || inbox(index) > Micros(0)
        };
        let competing = (0..lanes.len()).filter(|&index| index == lane || has_work(index));
        let competing: f64 = competing.map(|index| self.weight(index)).sum();
        let others = (0..lanes.len()).filter(|&index| index != lane).map(other);
        let total: f64 = others.chain([own(lane)]).map(Micros::as_seconds).sum();
        let scaled = own(lane).as_seconds() * competing / self.weight(lane);
        Duration::from_secs_f64(scaled.min(total))
    }

    fn weight(&self, lane: usize) -> f64 {
        self.manifests.get(lane).map_or(1.0, |manifest| manifest.weight.max(1e-3))
    }
}

/// `QueueFull`, to be tried again after the predicted wait: 1 to 30 s, ± 20 % so that refused
/// clients do not come back together.
pub(super) fn full(message: String, wait: Duration) -> Error {
    let noise = (uuid::Uuid::new_v4().as_u128() as u32) as f64 / f64::from(u32::MAX);
    let seconds = wait.as_secs_f64().clamp(1.0, 30.0) * (0.8 + 0.4 * noise);
    Error::new(ErrorKind::QueueFull, message).retry_after(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelTask;
    use crate::scheduler::{LaneLoad, Load};

    fn manifest(weight: f64) -> Manifest {
        Manifest {
            name: "m".into(),
            aliases: vec![],
            task: ModelTask::Generate,
            dtype: Default::default(),
            license: "MIT".into(),
            owned_by: None,
            files: vec![],
            limits: Default::default(),
            objective: Default::default(),
            matryoshka: false,
            weight,
            preload: true,
        }
    }

    fn lane(waiting: u32, tokens: u64, seconds: u64) -> LaneLoad {
        LaneLoad {
            waiting,
            waiting_tokens: tokens,
            waiting_work: Micros(seconds * 1_000_000),
            start_delay: Micros(seconds * 1_000_000),
            ..LaneLoad::default()
        }
    }

    fn snapshot(lanes: Vec<LaneLoad>) -> Snapshot {
        Snapshot { load: Load { lanes, ..Load::default() }, ..Snapshot::default() }
    }

    fn wait(manifests: &[Manifest], lanes: Vec<LaneLoad>, lane: u16) -> f64 {
        let bounds = Bounds { limits: &Limits::default(), manifests };
        bounds.predicted_wait(&snapshot(lanes), LaneId(lane)).as_secs_f64()
    }

    #[test]
    fn predicted_wait_follows_the_share() {
        let equal = [manifest(1.0), manifest(1.0)];
        assert_eq!(wait(&equal, vec![lane(1, 1, 4), lane(0, 0, 0)], 0), 4.0);
        assert_eq!(wait(&equal, vec![lane(1, 1, 4), lane(9, 9, 100)], 0), 8.0);
        // At most all the work there is.
        assert_eq!(wait(&equal, vec![lane(1, 1, 4), lane(1, 1, 1)], 0), 5.0);
        // An idle lane is next, whatever the other holds.
        assert_eq!(wait(&equal, vec![lane(0, 0, 0), lane(9, 9, 100)], 0), 0.0);
        let heavy = [manifest(3.0), manifest(1.0)];
        let both = || vec![lane(1, 1, 6), lane(1, 1, 90)];
        assert_eq!(wait(&heavy, both(), 0), 8.0);
        assert_eq!(wait(&heavy, both(), 1), 96.0);
        // Answers for which there are seats keep nobody of their lane waiting.
        let seated = || LaneLoad { start_delay: Micros(1_000_000), ..lane(1, 1, 50) };
        assert_eq!(wait(&equal, vec![seated(), lane(0, 0, 0)], 0), 1.0);
        assert_eq!(wait(&equal, vec![lane(1, 1, 40), seated()], 0), 80.0);
        // A lane that only runs takes its share too.
        let running = LaneLoad { running: 3, ..LaneLoad::default() };
        assert_eq!(wait(&equal, vec![lane(1, 1, 4), running], 0), 4.0);
        assert_eq!(wait(&equal, vec![], 0), 0.0);
    }

    #[test]
    fn predicted_wait_counts_the_inbox() {
        let manifests = [manifest(1.0), manifest(1.0)];
        let bounds = Bounds { limits: &Limits::default(), manifests: &manifests };
        let seconds = |inbox_work: Vec<Micros>, lane| {
            let inbox_delay = inbox_work.clone();
            let lanes = vec![self::lane(1, 1, 4), idle()];
            let snapshot = Snapshot { inbox_work, inbox_delay, ..snapshot(lanes) };
            bounds.predicted_wait(&snapshot, LaneId(lane)).as_secs_f64()
        };
        assert_eq!(seconds(vec![], 0), 4.0);
        assert_eq!(seconds(vec![Micros(3_000_000), Micros(0)], 0), 7.0);
        // What waits in another lane's inbox makes that lane a competitor.
        assert_eq!(seconds(vec![Micros(0), Micros(3_000_000)], 0), 7.0);
        assert_eq!(seconds(vec![Micros(0), Micros(1_000_000)], 1), 2.0);
    }

    fn idle() -> LaneLoad {
        LaneLoad::default()
    }

    #[test]
    fn bounds_hold_in_their_order() {
        let limits = Limits { queue_requests: 4, queue_tokens: 100, ..Limits::default() };
        let bounds = Bounds { limits: &limits, manifests: &[] };
        let check = |snapshot: &Snapshot, requests, tokens| {
            let refused = bounds.check(snapshot, LaneId(0), requests, tokens);
            refused.map_err(|(reason, error)| (reason, error.kind()))
        };
        assert_eq!(check(&snapshot(vec![]), 1, 100), Ok(()));
        let large = Err((Rejection::TooLarge, ErrorKind::TooLarge));
        assert_eq!(check(&snapshot(vec![]), 1, 101), large);
        assert_eq!(check(&snapshot(vec![]), 5, 1), large);
        let full = Err((Rejection::QueueFull, ErrorKind::QueueFull));
        assert_eq!(check(&snapshot(vec![lane(3, 1, 1)]), 1, 1), Ok(()));
        assert_eq!(check(&snapshot(vec![lane(4, 1, 1)]), 1, 1), full);
        assert_eq!(check(&snapshot(vec![lane(3, 1, 1)]), 2, 1), full);
        assert_eq!(check(&snapshot(vec![lane(1, 99, 1)]), 1, 1), Ok(()));
        assert_eq!(check(&snapshot(vec![lane(1, 99, 1)]), 1, 2), full);
        let inbox = Snapshot { inbox: 4, ..Snapshot::default() };
        assert_eq!(check(&inbox, 1, 1), full);
        let inbox = Snapshot { inbox_tokens: 100, ..Snapshot::default() };
        assert_eq!(check(&inbox, 1, 1), full);
        let slow = Err((Rejection::MaxWait, ErrorKind::QueueFull));
        assert_eq!(check(&snapshot(vec![lane(9, 999, 31)]), 1, 1), slow);
    }

    #[test]
    fn retry_after_is_the_prediction_within_bounds_and_spread() {
        let seconds = |wait| full(String::new(), Duration::from_secs(wait)).wait().unwrap();
        for _ in 0..50 {
            assert!((0.8..=1.2).contains(&seconds(0).as_secs_f64()));
            assert!((8.0..=12.0).contains(&seconds(10).as_secs_f64()));
            assert!((24.0..=36.0).contains(&seconds(500).as_secs_f64()));
        }
        let some: std::collections::HashSet<_> = (0..20).map(|_| seconds(10)).collect();
        assert!(some.len() > 10, "no spread: {some:?}");
    }
}
