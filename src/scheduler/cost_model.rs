//! How long a step will take, learned from the steps before it. Knows rows, kinds and measured
//! microseconds; no device and no clock.

use super::step::StepKind;
use crate::request::Micros;

/// How many samples of a knot count as a first impression.
const YOUNG: u32 = 8;

/// Predicts the device time of one lane's steps, for each kind of step.
///
/// A curve has a knot at each power of two of rows and is linear in between. Knots without
/// samples keep the shape of the prior (fixed part + part for each row), scaled to the nearest
/// knot that has some. One outlier moves a settled prediction by at most a twelfth of itself.
#[derive(Debug)]
pub(super) struct CostModel {
    fixed: f64,
    per_row: f64,
    rows_max: u32,
    target: Micros,
    curves: [Curve; 4],
    /// Measured / prior over all kinds: what an unseen kind is scaled by.
    scale: f64,
    /// Microseconds a row in the reference step, by kind.
    rates: [f64; 4],
}

#[derive(Debug, Default)]
struct Curve {
    /// Time at `2^k` rows.
    micros: Vec<f64>,
    /// Samples near it.
    samples: Vec<u32>,
    seen: bool,
}

impl CostModel {
    /// A model that knows only the prior.
    pub(super) fn new(prior: (Micros, Micros), rows_max: u32, target: Micros) -> Self {
        let (fixed, per_row) = (prior.0.0 as f64, (prior.1.0 as f64).max(0.01));
        let knots = rows_max.next_power_of_two().ilog2() as usize + 2;
        let curve = || Curve {
            micros: (0..knots).map(|k| fixed + per_row * (1u64 << k) as f64).collect(),
            samples: vec![0; knots],
            seen: false,
        };
        let curves = [curve(), curve(), curve(), curve()];
        let mut model =
            Self { fixed, per_row, rows_max, target, curves, scale: 1.0, rates: [0.0; 4] };
        model.refresh_rates();
        model
    }

    /// Expected time of a step of `rows` rows; at least 1.
    pub(super) fn predict(&self, kind: StepKind, rows: u32) -> Micros {
        Micros((self.estimate(kind, rows).round() as u64).max(1))
    }

    /// The largest number of rows, in `1 ..= rows_max`, that is expected to take no longer than
    /// `limit`; 1 if even that takes longer.
    pub(super) fn rows_within(&self, kind: StepKind, limit: Micros) -> u32 {
        let (mut fits, mut above) = (1, self.rows_max + 1);
        while above - fits > 1 {
            let middle = fits + (above - fits) / 2;
            if self.estimate(kind, middle) <= limit.0 as f64 {
                fits = middle;
            } else {
                above = middle;
            }
        }
        fits
    }

    /// Microseconds a row in the reference step: the largest one within the step target.
    pub(super) fn rate(&self, kind: StepKind) -> f64 {
        self.rates[kind as usize]
    }

    /// Rows of that step.
    pub(super) fn reference_rows(&self, kind: StepKind) -> u32 {
        self.rows_within(kind, self.target)
    }

    /// Takes in that a step of `rows` rows took `measured`.
    pub(super) fn learn(&mut self, kind: StepKind, rows: u32, measured: Micros) {
        let measured = (measured.0 as f64).max(1.0);
        let guess = self.estimate(kind, rows);
        let (knot, fraction) = place(rows);
        let curve = &mut self.curves[kind as usize];
        if !curve.seen {
            curve.seen = true;
            let scale = self.scale;
            curve.micros.iter_mut().for_each(|micros| *micros *= scale);
        }
        let near = knot + usize::from(fraction > 0.5);
        let error = measured / guess - 1.0;
        let change = match curve.samples[near] {
            0 => error,
            n if n < YOUNG => 0.5 * error.clamp(-0.75, 3.0),
            _ => 0.15 * error.clamp(-0.5, 0.5),
        };
        let nearest = fraction.max(1.0 - fraction);
        for (k, weight) in [(knot, 1.0 - fraction), (knot + 1, fraction)] {
            curve.micros[k] *= 1.0 + change * weight / nearest;
            if weight > 0.25 {
                curve.samples[k] = curve.samples[k].saturating_add(1);
            }
        }
        curve.spread(near, self.fixed, self.per_row);
        let prior = self.fixed + self.per_row * f64::from(rows);
        self.scale +=
            0.1 * ((measured / prior).clamp(0.25 * self.scale, 4.0 * self.scale) - self.scale);
        self.refresh_rates();
    }

    fn estimate(&self, kind: StepKind, rows: u32) -> f64 {
        let curve = &self.curves[kind as usize];
        let (knot, fraction) = place(rows);
        let (low, high) = (curve.micros[knot], curve.micros[knot + 1]);
        let micros = low + fraction * (high - low);
        if curve.seen { micros } else { micros * self.scale }
    }

    fn refresh_rates(&mut self) {
        for kind in [StepKind::Prefill, StepKind::Decode, StepKind::Mixed, StepKind::Encode] {
            let rows = self.reference_rows(kind);
            self.rates[kind as usize] = self.estimate(kind, rows) / f64::from(rows);
        }
    }
}

impl Curve {
    /// Scales the knots without samples around the one just learned by what the prior was wrong
    /// there.
    fn spread(&mut self, from: usize, fixed: f64, per_row: f64) {
        let prior = |k: usize| fixed + per_row * (1u64 << k) as f64;
        let ratio = self.micros[from] / prior(from);
        let samples = &self.samples;
        let nearest_seen = |k: usize| {
            (0..samples.len()).filter(|&j| samples[j] > 0).min_by_key(|&j| j.abs_diff(k))
        };
        for (k, micros) in self.micros.iter_mut().enumerate() {
            if samples[k] == 0 && nearest_seen(k) == Some(from) {
                *micros = ratio * prior(k);
            }
        }
    }
}

/// The knot at or below `rows`, and how far it is to the next one.
fn place(rows: u32) -> (usize, f64) {
    let rows = rows.max(1);
    let knot = rows.ilog2();
    let low = f64::from(1u32 << knot);
    (knot as usize, (f64::from(rows) - low) / low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn within(model: &CostModel, kind: StepKind, rows: u32, truth: f64, share: f64) {
        let guess = model.predict(kind, rows).0 as f64;
        assert!((guess - truth).abs() <= share * truth, "{rows} rows: {guess}, in truth {truth}");
    }

    #[test]
    fn learns_a_line_far_from_the_prior() {
        let mut model = CostModel::new((Micros(10), Micros(1)), 512, Micros(8000));
        let truth = |rows: u32| 2000.0 + 37.0 * f64::from(rows);
        for round in 0..400u32 {
            let rows = 1 + (round * 97) % 512;
            model.learn(StepKind::Decode, rows, Micros(truth(rows) as u64));
        }
        for rows in [1, 3, 16, 100, 511] {
            within(&model, StepKind::Decode, rows, truth(rows), 0.15);
        }
        let fits = model.rows_within(StepKind::Decode, Micros(8000));
        assert!((130..=190).contains(&fits), "{fits}");
        // A kind without samples is scaled like the others.
        let unseen = model.predict(StepKind::Prefill, 512).0;
        assert!(unseen > 5000, "{unseen}");
    }

    #[test]
    fn one_outlier_moves_little_and_a_change_is_followed() {
        let mut model = CostModel::new((Micros(1000), Micros(10)), 256, Micros(8000));
        for _ in 0..50 {
            model.learn(StepKind::Encode, 128, Micros(4000));
        }
        model.learn(StepKind::Encode, 128, Micros(400_000));
        within(&model, StepKind::Encode, 128, 4000.0, 0.09);
        for _ in 0..60 {
            model.learn(StepKind::Encode, 128, Micros(12_000));
        }
        within(&model, StepKind::Encode, 128, 12_000.0, 0.05);
    }

    #[test]
    fn one_row_always_fits_and_no_more_than_rows_max() {
        let model = CostModel::new((Micros(90_000), Micros(10)), 64, Micros(8000));
        assert_eq!(model.rows_within(StepKind::Decode, Micros(8000)), 1);
        assert_eq!(model.rows_within(StepKind::Decode, Micros(1_000_000)), 64);
    }

    #[test]
    fn the_reference_row_is_cheaper_than_a_lone_one() {
        let model = CostModel::new((Micros(5000), Micros(10)), 1024, Micros(8000));
        assert!(model.rate(StepKind::Decode) < 30.0, "{}", model.rate(StepKind::Decode));
    }
}
