//! Which lane goes next: start-time fair queueing over device time (Goyal, Vin, Cheng 1996).
//! Knows lanes only as indices and time only as microseconds already spent or predicted.

use crate::request::Micros;

/// Shares the device between lanes in proportion to their weights.
///
/// Every lane has a start tag: the virtual time at which its next step begins. The lane with the
/// smallest tag goes next, and its tag moves on by device time / weight: by the predicted time
/// when a step is dispatched, and by the error of the prediction when the step commits. A lane
/// that wakes up starts no earlier than the device's virtual time, so being idle earns nothing.
#[derive(Debug)]
pub(super) struct FairQueue {
    /// Largest start tag of any step dispatched so far.
    now: f64,
    lanes: Vec<Share>,
}

#[derive(Debug)]
struct Share {
    weight: f64,
    start: f64,
}

impl FairQueue {
    /// One share for each weight.
    pub(super) fn new(weights: impl Iterator<Item = f64>) -> Self {
        let lanes: Vec<Share> = weights.map(|weight| Share { weight, start: 0.0 }).collect();
        for share in &lanes {
            assert!(share.weight.is_finite() && share.weight > 0.0, "a weight is positive");
        }
        Self { now: 0.0, lanes }
    }

    /// The lane has work again after having had none.
    pub(super) fn wake(&mut self, lane: usize) {
        let share = &mut self.lanes[lane];
        share.start = share.start.max(self.now);
    }

    /// The virtual time at which the lane's next step starts; the smallest goes first.
    pub(super) fn start(&self, lane: usize) -> f64 {
        self.lanes[lane].start
    }

    /// A step of the lane was sent to the device.
    pub(super) fn dispatched(&mut self, lane: usize, predicted: Micros) {
        let share = &mut self.lanes[lane];
        self.now = self.now.max(share.start);
        share.start += predicted.0 as f64 / share.weight;
    }

    /// A dispatched step took `measured`, not `predicted`.
    pub(super) fn measured(&mut self, lane: usize, predicted: Micros, measured: Micros) {
        let share = &mut self.lanes[lane];
        share.start += (measured.0 as f64 - predicted.0 as f64) / share.weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(queue: &FairQueue, lanes: &[usize]) -> usize {
        *lanes.iter().min_by(|&&a, &&b| queue.start(a).total_cmp(&queue.start(b))).unwrap()
    }

    #[test]
    fn device_time_follows_the_weights() {
        let mut queue = FairQueue::new([1.0, 3.0].into_iter());
        let mut used = [0u64; 2];
        for _ in 0..4000 {
            let lane = next(&queue, &[0, 1]);
            let took = [700, 100][lane];
            queue.dispatched(lane, Micros(250));
            queue.measured(lane, Micros(250), Micros(took));
            used[lane] += took;
        }
        let ratio = used[1] as f64 / used[0] as f64;
        assert!((2.95..3.05).contains(&ratio), "{ratio}");
    }

    #[test]
    fn an_idle_lane_earns_nothing() {
        let mut queue = FairQueue::new([1.0, 1.0].into_iter());
        for _ in 0..1000 {
            queue.dispatched(0, Micros(100));
        }
        queue.wake(1);
        let first: Vec<usize> = (0..10)
            .map(|_| {
                let lane = next(&queue, &[0, 1]);
                queue.dispatched(lane, Micros(100));
                lane
            })
            .collect();
        assert_eq!(first.iter().filter(|&&lane| lane == 1).count(), 5, "{first:?}");
    }
}
