//! How fast models are on a device, by the roofline: a step takes as long as the bytes that it
//! reads or the arithmetic that it does, whichever is longer. From that, what load a replica
//! carries within its objectives. Knows nothing of money.

use super::devices::{Assumptions, Device, Kind};
use super::fit::{Fit, Wanted, sequence_bytes};

/// A device as steps meet it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    bytes_a_second: f64,
    flops: f64,
    flops_quantised: f64,
    overhead: f64,
    /// 95th percentile over mean: of answers, of encoder requests.
    tails: (f64, f64),
    kind: Kind,
}

/// What a replica does at some load.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Point {
    /// How many times the asked load a replica carries before an objective or the device breaks.
    pub(super) scale: f64,
    /// For each model, at that load.
    pub(super) lanes: Vec<Lane>,
}

/// One model at some load.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(super) struct Lane {
    /// Requests that are in the server at once, on average.
    pub(super) in_flight: f64,
    pub(super) mean_seconds: f64,
    pub(super) p95_seconds: f64,
}

/// Rounds of the fixed point: each lane's share depends on the others'.
const ROUNDS: usize = 24;
/// Encoders are given at most this part of the device: the rest keeps answers flowing.
const ENCODERS_MAX: f64 = 0.9;

impl Speed {
    pub(super) fn of(device: &Device, assumed: &Assumptions) -> Self {
        Self {
            bytes_a_second: device.bandwidth * assumed.bandwidth_efficiency,
            flops: device.flops * assumed.flops_efficiency,
            flops_quantised: device.flops_quantised * assumed.flops_efficiency,
            overhead: assumed.step_overhead_us / 1e6,
            tails: (assumed.p95_generate, assumed.p95_encode),
            kind: device.kind,
        }
    }

    fn step(&self, one: &Wanted<'_>, bytes: f64, flops: f64) -> f64 {
        let quantised = one.model.weights.quantised;
        let rate = if quantised { self.flops_quantised } else { self.flops };
        (bytes / self.bytes_a_second).max(flops / rate) + self.overhead
    }

    /// Weights that a step reads: embeddings are looked up row by row.
    fn read_bytes(&self, one: &Wanted<'_>) -> f64 {
        let weights = &one.model.weights;
        let file = (weights.layers + weights.head) as f64;
        // A CPU keeps them in another form, larger by the same factor everywhere.
        let kept = if self.kind == Kind::Cpu { weights.cpu } else { weights.total };
        file * kept as f64 / weights.total.max(1) as f64
    }

    /// Seconds of a decode step with `rows` sequences, each half way through its answer.
    pub(super) fn decode(&self, one: &Wanted<'_>, rows: f64) -> f64 {
        let weights = &one.model.weights;
        let length = f64::from(one.load.prompt) + f64::from(one.load.output) / 2.0;
        let kv = one.model.shape.kv().map_or(0, |kv| kv.token_bytes()) as f64;
        let flops = 2.0 * (weights.layer_params + weights.head_params) as f64 * rows;
        self.step(one, self.read_bytes(one) + rows * length * kv, flops)
    }

    /// Seconds of device time for a prompt, or for an encoder's whole request.
    pub(super) fn prefill(&self, one: &Wanted<'_>) -> f64 {
        let (shape, weights) = (&one.model.shape, &one.model.weights);
        let tokens = f64::from(one.load.prompt);
        // Scores and values: each token with each other, or with those before it.
        let pairs = if shape.decoder { tokens * tokens / 2.0 } else { tokens * tokens };
        let attention = 4.0 * pairs * (shape.heads * shape.head_dim * shape.layers) as f64;
        let matrices = 2.0 * (weights.layer_params as f64 * tokens + weights.head_params as f64);
        self.step(one, self.read_bytes(one), matrices + attention)
    }

    /// What a replica carries; none without any load, or where an objective cannot be met at all.
    pub(super) fn capacity(&self, wanted: &[Wanted<'_>], fit: &Fit) -> Option<Point> {
        if wanted.iter().all(|one| one.load.rps == 0.0) {
            return None;
        }
        let tries = |scale: f64| self.at(wanted, fit, scale);
        let mut low = 1e-6;
        tries(low)?;
        let mut high = 1.0;
        while tries(high).is_some() {
            low = high;
            high *= 2.0;
            if high > 1e9 {
                break;
            }
        }
        for _ in 0..40 {
            let middle = (low * high).sqrt();
            if tries(middle).is_some() { low = middle } else { high = middle }
        }
        Some(Point { scale: low, lanes: tries(low)? })
    }

    /// The lanes at `scale` times the asked load; none if it is too much for seats, KV, device or
    /// an objective.
    ///
    /// A generator's answers share each step: with b of them in flight, one takes its output's
    /// steps and the prompts of b. Generators that are busy take turns; encoders get what they
    /// need, and the rest of the device is the generators'. By Little's law b = rate × time.
    pub(super) fn at(&self, wanted: &[Wanted<'_>], fit: &Fit, scale: f64) -> Option<Vec<Lane>> {
        let rate = |one: &Wanted<'_>| one.load.rps * scale;
        let encoders: f64 = wanted
            .iter()
            .filter(|one| !one.model.shape.decoder)
            .map(|one| rate(one) * self.prefill(one))
            .sum();
        if encoders >= ENCODERS_MAX {
            return None;
        }
        let mut streams: Vec<f64> = vec![0.0; wanted.len()];
        for _ in 0..ROUNDS {
            let busy: f64 = streams.iter().map(|streams| streams.min(1.0)).sum();
            let before = streams.clone();
            for (index, one) in wanted.iter().enumerate() {
                if one.model.shape.decoder && one.load.rps > 0.0 {
                    let others = busy - before[index].min(1.0);
                    let slow = (1.0 + others) / (1.0 - encoders);
                    let most = fit.parts[index].streams as f64;
                    streams[index] = self.streams(one, rate(one), slow, most)?;
                }
            }
        }
        let held = wanted.iter().zip(&streams);
        let kv: f64 = held
            .map(|(one, streams)| streams * sequence_bytes(one, fit.pages.page_bytes) as f64)
            .sum();
        if kv > fit.kv as f64 {
            return None;
        }
        self.lanes(wanted, &streams, encoders, scale)
    }

    /// The least number of answers in flight at which as many end as begin; none up to `most`.
    fn streams(&self, one: &Wanted<'_>, rate: f64, slow: f64, most: f64) -> Option<f64> {
        // Convex: a step's time is the larger of two lines.
        let excess = |streams: f64| rate * self.answer(one, streams) * slow - streams;
        let (mut low, mut high) = (0.0, most);
        for _ in 0..60 {
            let (left, right) = (low + (high - low) / 3.0, high - (high - low) / 3.0);
            if excess(left) <= excess(right) { high = right } else { low = left }
        }
        let lowest = f64::midpoint(low, high);
        if excess(lowest) > 0.0 {
            return None;
        }
        (low, high) = (0.0, lowest);
        for _ in 0..50 {
            let middle = f64::midpoint(low, high);
            if excess(middle) <= 0.0 { high = middle } else { low = middle }
        }
        Some(high)
    }

    /// Seconds of an answer when `streams` share the device that is theirs alone.
    pub(super) fn answer(&self, one: &Wanted<'_>, streams: f64) -> f64 {
        let streams = streams.max(1.0);
        f64::from(one.load.output) * self.decode(one, streams) + streams * self.prefill(one)
    }

    fn lanes(
        &self,
        wanted: &[Wanted<'_>],
        streams: &[f64],
        encoders: f64,
        scale: f64,
    ) -> Option<Vec<Lane>> {
        let within = |lane: Lane, one: &Wanted<'_>| {
            let met = one.load.latency_seconds.is_none_or(|most| lane.p95_seconds <= most);
            met.then_some(lane)
        };
        let (p95_generate, p95_encode) = self.tails;
        // An encoder's step waits for the step that runs, which is a generator's if any is busy.
        let turn = wanted.iter().zip(streams).filter(|(one, _)| one.model.shape.decoder);
        let turn = turn
            .map(|(one, streams)| streams.min(1.0) * self.decode(one, streams.max(1.0)))
            .fold(0.0, f64::max);
        let busy: f64 = streams.iter().map(|streams| streams.min(1.0)).sum();
        let lane = |(one, streams): (&Wanted<'_>, &f64)| {
            let (mean, tail) = if one.model.shape.decoder {
                let slow = (1.0 + busy - streams.min(1.0)) / (1.0 - encoders);
                (self.answer(one, *streams) * slow, p95_generate)
            } else {
                (self.prefill(one) / (1.0 - encoders) + turn, p95_encode)
            };
            let in_flight = one.load.rps * scale * mean;
            within(Lane { in_flight, mean_seconds: mean, p95_seconds: mean * tail }, one)
        };
        wanted.iter().zip(streams).map(lane).collect()
    }
}
