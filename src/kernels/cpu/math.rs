//! Functions of 16 lanes that all sets share: exp, SiLU, GELU, the 8-bit quantiser. Knows no op
//! and no buffer. Coefficients are least-maximum fits (2026-11); errors are in the tests.

use super::isa::{Isa, LANES};

/// 1.5 × 2^23: adding it to a number below 2^22 in size leaves that number, rounded to the nearest
/// integer (ties to even), in the low bits of the sum's encoding.
const ROUND: f32 = 12_582_912.0;

const EXP: [f32; 5] = [0.5, 0.166_665_78, 0.041_666_556, 0.008_363_173, 0.001_392_617_6];

/// `e^x`, relative error below 1.2e-7 for -87 ≤ x ≤ 88. Zero below, e^88 above.
///
/// `n = round(x / ln 2)`, `r = x - n ln 2` in two steps, a polynomial in Horner's order, times
/// `2^n` by its exponent bits.
#[inline(always)]
pub(in crate::kernels) fn exp<S: Isa>(s: S, x: S::F) -> S::F {
    const LN2_HIGH: f32 = 0.693_115_23;
    const LN2_LOW: f32 = 3.194_618_3e-5;
    let top = s.splat(88.0);
    let capped = s.where_less(top, x, top, x);
    let t = s.fma(capped, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(t, s.splat(ROUND));
    let r = s.fma(n, s.splat(-LN2_HIGH), capped);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(EXP[4]);
    for c in [EXP[3], EXP[2], EXP[1], EXP[0]] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    s.where_less(x, s.splat(-87.0), s.splat(0.0), s.scale_by_bits(p, t))
}

/// `x / (1 + e^-x)`
#[inline(always)]
pub(super) fn silu<S: Isa>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// `tanh x`, absolute error below 2e-7: `(1 - e) / (1 + e)` with `e = exp(-2 |x|)`, and the sign
/// of x.
#[inline(always)]
pub(super) fn tanh<S: Isa>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    let e = exp(s, s.mul(s.abs(x), s.splat(-2.0)));
    let size = s.div(s.sub(one, e), s.add(one, e));
    s.where_less(x, s.splat(0.0), s.sub(s.splat(0.0), size), size)
}

const TAIL: [f32; 10] = [
    0.099_751_79,
    0.099_416_62,
    0.096_150_87,
    0.069_011_636,
    0.095_375_57,
    -0.003_677_959_3,
    0.048_318_084,
    0.036_615_256,
    -0.056_345_463,
    0.015_383_603,
];

/// `x Φ(x)`, with `Φ(-a) = (1 - erf(a / √2)) / 2 = e^(-a²/2) t P(t)` for a ≥ 0 where
/// `t = 1 / (1 + a/4)`; `Φ(a) = 1 - Φ(-a)`.
#[inline(always)]
pub(super) fn gelu<S: Isa>(s: S, x: S::F) -> S::F {
    let a = s.abs(x);
    let one = s.splat(1.0);
    let t = s.div(one, s.fma(a, s.splat(0.25), one));
    let mut p = s.splat(TAIL[9]);
    for i in (0..9).rev() {
        p = s.fma(p, t, s.splat(TAIL[i]));
    }
    let e = exp(s, s.mul(s.mul(a, s.splat(-0.5)), a));
    let below = s.mul(e, s.mul(t, p));
    let phi = s.where_less(x, s.splat(0.0), below, s.sub(one, below));
    s.mul(x, phi)
}

/// A group of 32 values as signed bytes.
pub(super) struct Quantised {
    pub(super) bytes: [[i8; LANES]; 2],
    pub(super) scale: f32,
    pub(super) sum: f32,
}

/// `scale = max|x| / peak`; each byte is `x × (1 / scale)`, the exact product rounded to the
/// nearest integer, ties to even. A scale below the smallest normal number counts as zero, and so
/// do all values then.
#[inline(always)]
pub(super) fn quantise<S: Isa>(s: S, x: [S::F; 2], peak: i8) -> Quantised {
    let scale = s.peak(s.max(s.abs(x[0]), s.abs(x[1]))) / f32::from(peak);
    if scale < f32::MIN_POSITIVE {
        return Quantised { bytes: [[0; LANES]; 2], scale: 0.0, sum: 0.0 };
    }
    let inverse = s.splat(1.0 / scale);
    let round = s.splat(ROUND);
    let (a, b) = (s.fma(x[0], inverse, round), s.fma(x[1], inverse, round));
    let sum = s.sum(s.add(s.sub(a, round), s.sub(b, round)));
    Quantised { bytes: [s.low_bytes(a), s.low_bytes(b)], scale, sum }
}
