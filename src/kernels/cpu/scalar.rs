//! The reference set: what each of the 16-lane operations means, one lane after the other.

#![allow(unsafe_code)]

use half::f16;

use super::isa::{Isa, LANES};
use crate::kernels::packed::{GROUP, round_half};

/// Needs no instruction in particular.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalar;

type Lanes = [f32; LANES];
type Pairs = [[u16; 2]; LANES];

#[inline(always)]
fn each(f: impl FnMut(usize) -> f32) -> Lanes {
    std::array::from_fn(f)
}

impl Isa for Scalar {
    type F = Lanes;
    type H = Pairs;

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> Lanes {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Lanes>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn write(self, x: Lanes, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Lanes>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn read_half(self, from: *const u16) -> Lanes {
        // SAFETY: the caller's promise.
        let halves = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        each(|i| f16::from_bits(halves[i]).to_f32())
    }

    #[inline(always)]
    unsafe fn write_half(self, x: Lanes, to: *mut u16) {
        let halves = x.map(|x| f16::from_f32(x).to_bits());
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(halves) }
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        each(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        each(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        each(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        each(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn abs(self, a: Lanes) -> Lanes {
        each(|i| a[i].abs())
    }

    #[inline(always)]
    fn where_less(self, a: Lanes, b: Lanes, yes: Lanes, no: Lanes) -> Lanes {
        each(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }

    #[inline(always)]
    fn scale_by_bits(self, p: Lanes, t: Lanes) -> Lanes {
        each(|i| f32::from_bits(p[i].to_bits().wrapping_add(t[i].to_bits() << 23)))
    }

    #[inline(always)]
    fn low_bytes(self, t: Lanes) -> [i8; LANES] {
        t.map(|t| t.to_bits() as i8)
    }

    #[inline(always)]
    fn sum(self, mut a: Lanes) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }

    #[inline(always)]
    fn peak(self, a: Lanes) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn read_pairs(self, from: *const u16) -> Pairs {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Pairs>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, from: *const u16) -> Pairs {
        // SAFETY: the caller's promise.
        [unsafe { from.cast::<[u16; 2]>().read_unaligned() }; LANES]
    }

    #[inline(always)]
    fn dot_pairs(self, a: Pairs, b: Pairs, c: Lanes) -> Lanes {
        let full = |half: u16| f32::from_bits(u32::from(half) << 16);
        each(|i| {
            let second = full(a[i][1]).mul_add(full(b[i][1]), c[i]);
            full(a[i][0]).mul_add(full(b[i][0]), second)
        })
    }

    #[inline(always)]
    unsafe fn write_bf16(self, x: Lanes, to: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(x.map(round_half)) }
    }

    #[inline(always)]
    fn dot_q4<const R: usize>(self, weights: &[u8; 256], rows: &[[i8; GROUP]; R]) -> [Lanes; R] {
        dot(rows, |lane, i| {
            let byte = weights[i / 8 * 64 + lane * 4 + i % 4];
            i32::from(if i % 8 < 4 { byte & 15 } else { byte >> 4 })
        })
    }

    #[inline(always)]
    fn dot_q8<const R: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[i8; GROUP]; R],
        _sums: &[f32; R],
    ) -> [Lanes; R] {
        dot(rows, |lane, i| i32::from(weights[i / 4 * 64 + lane * 4 + i % 4]) - 128)
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; LANES]) -> Lanes {
        each(|i| f32::from(from[i] as i8))
    }

    #[inline(always)]
    fn dot_half_q4<const R: usize>(
        self,
        weights: &[u8; 128],
        rows: &[[i8; GROUP]; R],
        half: usize,
    ) -> [Lanes; R] {
        dot(&halves(rows, half), |lane, i| {
            let byte = weights[i / 8 * 64 + lane * 4 + i % 4];
            i32::from(if i % 8 < 4 { byte & 15 } else { byte >> 4 })
        })
    }

    #[inline(always)]
    fn dot_half_q8<const R: usize>(
        self,
        weights: &[u8; 256],
        rows: &[[i8; GROUP]; R],
        half: usize,
    ) -> [Lanes; R] {
        dot(&halves(rows, half), |lane, i| i32::from(weights[i / 4 * 64 + lane * 4 + i % 4]))
    }
}

/// Half `half` of each row.
#[inline(always)]
fn halves<const R: usize>(rows: &[[i8; GROUP]; R], half: usize) -> [[i8; GROUP / 2]; R] {
    rows.map(|row| row.as_chunks().0[half])
}

/// For each row and lane the sum over `i` of `row[i] × weight(lane, i)`, exact in i32 and in f32.
#[inline(always)]
fn dot<const R: usize, const K: usize>(
    rows: &[[i8; K]; R],
    weight: impl Fn(usize, usize) -> i32,
) -> [Lanes; R] {
    rows.map(|row| {
        each(|lane| (0..K).map(|i| i32::from(row[i]) * weight(lane, i)).sum::<i32>() as f32)
    })
}
