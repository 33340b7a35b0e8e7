//! Products of 8-bit rows with panels of large blocks, and of 8-bit groups with minimums. Knows no
//! model.

#![allow(unsafe_code)]

use super::isa::{Isa, LANES};
use super::linear::Ahead;
use super::views::QuantTile;
use crate::kernels::packed::large::{LARGE_GROUPS, LargeLayout};
use crate::kernels::packed::{GROUP, PackedFormat, Q8_MINIMUM_GROUP_BYTES};

/// `R` rows by a panel of 8-bit groups with minimums: for each group in ascending order
/// `acc = fma(fma(scale, isum, minimum × Σq), scale_x, acc)`.
#[inline(always)]
pub(super) fn product_minimum<S: Isa, const R: usize>(
    s: S,
    panel: &[u8],
    rows: &QuantTile<R>,
    ahead: &mut Ahead<'_>,
) -> [S::F; R] {
    let panel = panel.as_chunks::<Q8_MINIMUM_GROUP_BYTES>().0;
    assert_eq!(panel.len(), rows.groups());
    let mut acc = [s.splat(0.0); R];
    for (g, weights) in panel.iter().enumerate() {
        ahead.ask::<S, R>(s);
        let (header, values) = weights.split_at(64);
        let values = values.try_into().expect("512 bytes");
        // SAFETY: there are as many groups as in the rows, which only earlier ops wrote; a
        // group's header is 16 scales and 16 minimums.
        unsafe {
            let (bytes, scales, sums) = rows.group(g);
            let dots = s.dot_q8(values, bytes, sums);
            let scale = s.read_half(header.as_ptr().cast());
            let minimum = s.read_half(header.as_ptr().cast::<u16>().add(LANES));
            for r in 0..R {
                let group = s.fma(scale, dots[r], s.mul(minimum, s.splat(sums[r])));
                acc[r] = s.fma(group, s.splat(scales[r]), acc[r]);
            }
        }
    }
    acc
}

/// `R` rows by a panel of large blocks, as [`Linear`](crate::kernels::ops::Linear) defines it.
#[inline(always)]
pub(super) fn product_large<S: Isa, const R: usize>(
    s: S,
    format: PackedFormat,
    panel: &[u8],
    rows: &QuantTile<R>,
    ahead: &mut Ahead<'_>,
) -> [S::F; R] {
    match format {
        PackedFormat::K4 => product::<S, R, 1, 256>(s, format, panel, rows, ahead),
        PackedFormat::K4Halves => product::<S, R, 2, 256>(s, format, panel, rows, ahead),
        PackedFormat::K8 => product::<S, R, 1, 512>(s, format, panel, rows, ahead),
        _ => product::<S, R, 2, 512>(s, format, panel, rows, ahead),
    }
}

/// With `PARTS` factors and shifts a group, and `BYTES` bytes of values.
#[inline(always)]
fn product<S: Isa, const R: usize, const PARTS: usize, const BYTES: usize>(
    s: S,
    format: PackedFormat,
    panel: &[u8],
    rows: &QuantTile<R>,
    ahead: &mut Ahead<'_>,
) -> [S::F; R] {
    let layout = LargeLayout::of(format).expect("a format of large blocks");
    assert_eq!((layout.parts, layout.value_bytes), (PARTS, BYTES));
    let blocks = panel.chunks_exact(layout.bytes());
    assert_eq!(blocks.len() * LARGE_GROUPS, rows.groups());
    let mut acc = [s.splat(0.0); R];
    for (b, block) in blocks.enumerate() {
        let ends = [0, 64].map(|at| block[at..].as_ptr().cast::<f32>());
        // SAFETY: a block starts with 16 f32 scales and 16 f32 minimums.
        let [scale, minimum] = ends.map(|from| unsafe { s.read(from) });
        for g in 0..LARGE_GROUPS {
            ahead.ask::<S, R>(s);
            let small = block[layout.factors(g)..].as_chunks::<LANES>().0;
            let values: &[u8; BYTES] = block[layout.values(g)..].first_chunk().expect("a group");
            // SAFETY: there are as many groups as in the rows, which only earlier ops wrote.
            let (bytes, scales, sums) = unsafe { rows.group(b * LARGE_GROUPS + g) };
            if PARTS == 1 {
                let dots = whole(s, values, bytes, sums);
                let factor = s.mul(scale, s.bytes(&small[0]));
                let shift = s.mul(minimum, s.bytes(&small[1]));
                for r in 0..R {
                    let group = s.fma(factor, dots[r], s.mul(shift, s.splat(sums[r])));
                    acc[r] = s.fma(group, s.splat(scales[r]), acc[r]);
                }
            } else {
                let [first, second] = halves(s, values, bytes);
                let [f, g] = [0, 1].map(|part| s.bytes(&small[part]));
                let [m, n] = [2, 3].map(|part| s.bytes(&small[part]));
                for r in 0..R {
                    let sum = first_sum(&bytes[r]);
                    let product = s.fma(g, second[r], s.mul(f, first[r]));
                    let shift = s.fma(n, s.splat(sums[r] - sum), s.mul(m, s.splat(sum)));
                    let group = s.fma(scale, product, s.mul(minimum, shift));
                    acc[r] = s.fma(group, s.splat(scales[r]), acc[r]);
                }
            }
        }
    }
    acc
}

/// Sums of products over a group.
#[inline(always)]
fn whole<S: Isa, const R: usize>(
    s: S,
    values: &[u8],
    bytes: &[[i8; GROUP]; R],
    sums: &[f32; R],
) -> [S::F; R] {
    match values.first_chunk::<512>() {
        Some(values) => s.dot_q8(values, bytes, sums),
        None => s.dot_q4(values.first_chunk().expect("256 bytes"), bytes),
    }
}

/// Sums of products over the first and over the second half of a group.
#[inline(always)]
fn halves<S: Isa, const R: usize>(s: S, values: &[u8], bytes: &[[i8; GROUP]; R]) -> [[S::F; R]; 2] {
    match values.as_chunks::<256>().0 {
        [first, second] => [s.dot_half_q8(first, bytes, 0), s.dot_half_q8(second, bytes, 1)],
        _ => {
            let halves = values.as_chunks::<128>().0;
            [s.dot_half_q4(&halves[0], bytes, 0), s.dot_half_q4(&halves[1], bytes, 1)]
        }
    }
}

/// Sum of the first half of a group, exact.
#[inline(always)]
fn first_sum(bytes: &[i8; GROUP]) -> f32 {
    let mut sum = 0;
    for byte in &bytes[..GROUP / 2] {
        sum += i32::from(*byte);
    }
    sum as f32
}
