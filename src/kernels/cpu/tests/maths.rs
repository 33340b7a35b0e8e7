//! The shared functions against f64, over their whole range.

use std::ops::Range;
use std::sync::Mutex;

use super::*;
use crate::kernels::cpu::isa::{Isa, Set, Task};
use crate::kernels::cpu::math;

/// `x Φ(x)` with the complementary error function by its continued fraction and series.
pub(super) fn gelu(x: f64) -> f64 {
    0.5 * x * erfc(-x / std::f64::consts::SQRT_2)
}

fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.5 {
        // erf by its power series.
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-18 {
            n += 1.0;
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        return 1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    // Continued fraction, from its far end.
    let tail = (1..120).rev().fold(x, |rest, n| x + f64::from(n) / 2.0 / rest);
    (-x * x).exp() / (tail * std::f64::consts::PI.sqrt())
}

#[derive(Clone, Copy)]
enum Function {
    Exp,
    Silu,
    Gelu,
    Tanh,
    Sum,
    Turn,
}

struct Apply<'a> {
    function: Function,
    input: &'a [[f32; 16]],
    output: Mutex<Vec<f32>>,
}

impl Task for Apply<'_> {
    fn units(&self) -> usize {
        self.input.len()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let mut output = self.output.lock().unwrap();
        for lanes in &self.input[units] {
            let x = s.load(lanes);
            match self.function {
                Function::Exp => output.extend(s.store(math::exp(s, x))),
                Function::Silu => output.extend(s.store(math::silu(s, x))),
                Function::Gelu => output.extend(s.store(math::gelu(s, x))),
                Function::Tanh => output.extend(s.store(math::tanh(s, x))),
                Function::Sum => output.extend([s.sum(x), s.peak(x), s.sum(s.abs(x))]),
                Function::Turn => {
                    let rows = std::array::from_fn(|i| s.fma(x, s.splat(i as f32), x));
                    s.turn(rows).iter().for_each(|row| output.extend(s.store(*row)));
                }
            }
        }
    }
}

/// The same bits from every set.
fn apply(function: Function, input: &[f32]) -> Vec<f32> {
    let input = input.as_chunks().0;
    let mut outputs = SetKind::ALL.into_iter().filter_map(Set::new).map(|set| {
        let task = Apply { function, input, output: Mutex::default() };
        set.run(&task, 0..task.units());
        task.output.into_inner().unwrap()
    });
    let first = outputs.next().unwrap();
    outputs.for_each(|other| assert_same_bits(&first, &other));
    first
}

/// 16,000 values evenly over a range.
fn ramp(range: Range<f32>) -> Vec<f32> {
    let step = (range.end - range.start) / 16_000.0;
    (0..16_000).map(|i| range.start + i as f32 * step).collect()
}

#[test]
fn exp_is_accurate_to_single_precision() {
    let x = ramp(-87.0..88.0);
    for (x, y) in x.iter().zip(apply(Function::Exp, &x)) {
        let error = f64::from(y) / f64::from(*x).exp() - 1.0;
        assert!(error.abs() < 1.5e-7, "exp({x}) = {y}, off by {error:e}");
    }
    let mut ends = [0.0; 16];
    ends[..6].copy_from_slice(&[f32::NEG_INFINITY, -87.1, -1e9, f32::INFINITY, 1e9, -0.0]);
    let y = apply(Function::Exp, &ends);
    assert_eq!(y[..3], [0.0, 0.0, 0.0]);
    assert_eq!(y[3], y[4]);
    assert!(y[3].is_finite() && y[3] > 1.6e38);
    assert_eq!(y[5], 1.0);
    assert!(apply(Function::Exp, &[f32::NAN; 16])[0].is_nan());
}

#[test]
fn silu_and_gelu_are_accurate_in_their_tails() {
    for range in [-100.0..100.0, -8.0..8.0, -0.01..0.01] {
        let x = ramp(range);
        for (x, y) in x.iter().zip(apply(Function::Silu, &x)) {
            let expected = f64::from(*x) / (1.0 + (-f64::from(*x)).exp());
            let error = (f64::from(y) - expected).abs();
            assert!(error <= 3e-7 * expected.abs() + 1e-36, "silu({x}) = {y}, not {expected}");
        }
    }
    for range in [-12.0..12.0, -1.0..1.0, -40.0..40.0] {
        let x = ramp(range);
        for (x, y) in x.iter().zip(apply(Function::Gelu, &x)) {
            let expected = gelu(f64::from(*x));
            let error = (f64::from(y) - expected).abs();
            // The exponent -x²/2 is rounded to 24 bits.
            let tolerance = 6e-7 + 6e-8 * f64::from(x * x) / 2.0;
            let size = tolerance * expected.abs() + 1e-35;
            assert!(error <= size, "gelu({x}) = {y}, not {expected}");
        }
    }
}

#[test]
fn tanh_is_exact_to_the_last_bits_of_one() {
    for range in [-1.0..1.0, -10.0..10.0, -100.0..100.0] {
        let x = ramp(range);
        for (x, y) in x.iter().zip(apply(Function::Tanh, &x)) {
            let error = (f64::from(y) - f64::from(*x).tanh()).abs();
            assert!(error <= 2e-7, "tanh({x}) = {y}");
        }
    }
    let odd = apply(Function::Tanh, &[-3.0; 16]);
    assert!(odd.iter().zip(apply(Function::Tanh, &[3.0; 16])).all(|(a, b)| *a == -b));
}

#[test]
fn reductions_and_turns() {
    let mut random = Random::new(9);
    let x = random.floats(16 * 64);
    let sums = apply(Function::Sum, &x);
    for (lanes, sums) in x.as_chunks::<16>().0.iter().zip(sums.as_chunks::<3>().0) {
        let sum: f64 = lanes.iter().map(|x| f64::from(*x)).sum();
        assert!((f64::from(sums[0]) - sum).abs() < 1e-6);
        assert_eq!(sums[1], lanes.iter().copied().fold(f32::MIN, f32::max));
    }
    let turned = apply(Function::Turn, &x[..16]);
    for (at, y) in turned.iter().enumerate() {
        let (column, row) = (at / 16, at % 16);
        assert_eq!(*y, x[column].mul_add(row as f32, x[column]));
    }
}
