//! Log-probabilities of one row of logits. The same bits on every instruction set and in any
//! batch: sums have a fixed order. Knows no draw.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::kernels::cpu::isa::{Isa, LANES, Set, Task};
use crate::kernels::cpu::math;
use crate::request::{Logprobs, TokenId};

/// What stands for minus infinity: JSON has no word for that.
const LEAST: f32 = -9999.0;

/// Log-probabilities of `token` and of the `top` most likely tokens. NaN counts as minus infinity.
pub(super) fn logprobs(set: Set, logits: &[f32], token: TokenId, top: u8) -> Logprobs {
    let weigh = Weigh { logits, result: Mutex::new((f32::NEG_INFINITY, 0.0)) };
    set.run(&weigh, 0..1);
    let (peak, sum) = weigh.result.into_inner().unwrap_or_else(PoisonError::into_inner);
    let log_sum = sum.ln();
    let logprob = |logit: f32| match peak.is_finite() {
        true => ((f64::from(logit) - f64::from(peak) - log_sum) as f32).max(LEAST),
        false if logit == f32::INFINITY => 0.0,
        false => LEAST,
    };
    let mut likeliest = likeliest(logits, usize::from(top));
    likeliest.iter_mut().for_each(|(_, value)| *value = logprob(*value));
    let chosen = logits.get(token as usize).map_or(LEAST, |&logit| logprob(logit));
    Logprobs { chosen, top: likeliest }
}

/// The `count` largest logits, the largest first, of equals the lower id first.
fn likeliest(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return best;
    }
    // What a newcomer has to beat.
    let mut least = f32::NEG_INFINITY;
    for (id, &logit) in (0..).zip(logits) {
        if logit > least || (best.len() < count && !logit.is_nan()) {
            let place = best.partition_point(|&(_, other)| other >= logit);
            best.insert(place, (id, logit));
            best.truncate(count);
            if best.len() == count {
                least = best[count - 1].1;
            }
        }
    }
    best
}

/// Finds the largest logit and the sum of all `e^(logit − largest)`.
struct Weigh<'a> {
    logits: &'a [f32],
    result: Mutex<(f32, f64)>,
}

/// Vectors that are added as f32 before their sum goes into an f64.
const RUN: usize = 16;

impl Task for Weigh<'_> {
    fn units(&self) -> usize {
        1
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, _: Range<usize>) {
        let (whole, rest) = self.logits.as_chunks::<LANES>();
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut peak = s.splat(f32::NEG_INFINITY);
        for lanes in whole.iter().chain([&last]) {
            // The second operand wins over NaN.
            peak = s.max(s.load(lanes), peak);
        }
        let peak = s.peak(peak);
        let mut total = 0.0;
        if peak.is_finite() {
            for run in whole.chunks(RUN) {
                total += f64::from(sum(s, run, peak));
            }
            total += f64::from(sum(s, &[last], peak));
        }
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = (peak, total);
    }
}

/// The sum of `e^(x − peak)`; nothing for NaN.
#[inline(always)]
fn sum<S: Isa>(s: S, run: &[[f32; LANES]], peak: f32) -> f32 {
    let (peak, nothing) = (s.splat(peak), s.splat(-100.0));
    let mut sum = s.splat(0.0);
    for lanes in run {
        let x = s.sub(s.load(lanes), peak);
        sum = s.add(sum, math::exp(s, s.where_less(nothing, x, x, nothing)));
    }
    s.sum(sum)
}
