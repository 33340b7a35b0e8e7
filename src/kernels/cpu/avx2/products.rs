//! The innermost loops of the AVX2 set: products of a panel's bytes with those of rows. Knows no
//! scale.
//!
//! They are written out. Left to itself, the compiler takes one row after the other through a
//! whole group of weights, which are more than the registers hold: it keeps their halves on the
//! stack, and takes a third longer (Zen 3, 2026-11).

use std::arch::asm;
use std::arch::x86_64::*;

use super::Pair;
use crate::kernels::packed::GROUP;

/// 64 bytes of a panel.
///
/// # Safety
/// The processor has AVX2, and the bytes are readable.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn lines(from: *const u8) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
}

/// The low 4 bits of each byte.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn low_halves([a, b]: [__m256i; 2]) -> [__m256i; 2] {
    let low = _mm256_set1_epi8(15);
    [_mm256_and_si256(a, low), _mm256_and_si256(b, low)]
}

/// The high 4 bits of each byte.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn high_halves([a, b]: [__m256i; 2]) -> [__m256i; 2] {
    low_halves([_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)])
}

/// Sums as f32, which they all fit.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn floats<const R: usize>(sums: [[__m256i; 2]; R]) -> [Pair; R] {
    sums.map(|[low, high]| [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)])
}

/// Sums of two neighbours each, as f32.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn exact<const R: usize>(words: [[__m256i; 2]; R]) -> [Pair; R] {
    let ones = _mm256_set1_epi16(1);
    let mut exact = [[_mm256_setzero_ps(); 2]; R];
    for r in 0..R {
        for half in 0..2 {
            exact[r][half] = _mm256_cvtepi32_ps(_mm256_madd_epi16(words[r][half], ones));
        }
    }
    exact
}

/// Takes four rows at a time through `$products`, which need one address, not four; the last ones
/// alone. `$operands` are what it reads besides.
macro_rules! by_fours {
    ($products:ident, $sums:ident, $rows:ident, $quad:ident, $($operands:tt)*) => {
        debug_assert!($quad < GROUP / 4);
        let (fours, last) = $sums.as_chunks_mut::<4>();
        for (i, [[a0, b0], [a1, b1], [a2, b2], [a3, b3]]) in fours.iter_mut().enumerate() {
            // SAFETY: reads four bytes of each of four rows, and changes registers only.
            unsafe {
                asm!(
                    $products!(0, "a0", "b0"),
                    $products!(32, "a1", "b1"),
                    $products!(64, "a2", "b2"),
                    $products!(96, "a3", "b3"),
                    $($operands)*
                    from = in(reg) $rows.as_ptr().add(4 * i).cast::<i8>().add(4 * $quad),
                    a0 = inout(ymm_reg) *a0,
                    b0 = inout(ymm_reg) *b0,
                    a1 = inout(ymm_reg) *a1,
                    b1 = inout(ymm_reg) *b1,
                    a2 = inout(ymm_reg) *a2,
                    b2 = inout(ymm_reg) *b2,
                    a3 = inout(ymm_reg) *a3,
                    b3 = inout(ymm_reg) *b3,
                    quad = out(ymm_reg) _,
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
        }
        for ([a, b], row) in last.iter_mut().zip(&$rows[R / 4 * 4..]) {
            // SAFETY: as above, of one row.
            unsafe {
                asm!(
                    $products!(0, "a", "b"),
                    $($operands)*
                    from = in(reg) row.as_ptr().add(4 * $quad),
                    a = inout(ymm_reg) *a,
                    b = inout(ymm_reg) *b,
                    quad = out(ymm_reg) _,
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
        }
    };
}

/// One row's part of [`add_products`]: its quad is `$at` bytes on.
macro_rules! products {
    ($at:literal, $low:literal, $high:literal) => {
        concat!(
            "vpbroadcastd {quad}, dword ptr [{from} + ",
            $at,
            "]\n",
            "vpmaddubsw {products}, {low}, {quad}\n",
            "vpmaddubsw {quad}, {high}, {quad}\n",
            "vpaddw {",
            $low,
            "}, {",
            $low,
            "}, {products}\n",
            "vpaddw {",
            $high,
            "}, {",
            $high,
            "}, {quad}\n",
        )
    };
}

/// Adds the products of unsigned bytes with quad `quad` of each row, in pairs.
///
/// # Safety
/// The processor has AVX2, and `quad` is below 8.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn add_products<const R: usize>(
    [low, high]: [__m256i; 2],
    rows: &[[i8; GROUP]; R],
    quad: usize,
    words: &mut [[__m256i; 2]; R],
) {
    by_fours!(
        products, words, rows, quad,
        low = in(ymm_reg) low,
        high = in(ymm_reg) high,
        products = out(ymm_reg) _,
    );
}

/// One row's part of [`add_signed_products`].
macro_rules! signed_products {
    ($at:literal, $low:literal, $high:literal) => {
        concat!(
            "vpbroadcastd {quad}, dword ptr [{from} + ",
            $at,
            "]\n",
            "vpsignb {products}, {quad}, {low}\n",
            "vpsignb {quad}, {quad}, {high}\n",
            "vpmaddubsw {products}, {low_size}, {products}\n",
            "vpmaddubsw {quad}, {high_size}, {quad}\n",
            "vpmaddwd {products}, {products}, {ones}\n",
            "vpmaddwd {quad}, {quad}, {ones}\n",
            "vpaddd {",
            $low,
            "}, {",
            $low,
            "}, {products}\n",
            "vpaddd {",
            $high,
            "}, {",
            $high,
            "}, {quad}\n",
        )
    };
}

/// Adds the products of signed bytes `w` with quad `quad` of each row, in fours, as |w| × ±a: two
/// of them are at most 2 × 128 × 127 and fit 16 bits.
///
/// # Safety
/// As [`add_products`].
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn add_signed_products<const R: usize>(
    [low, high]: [__m256i; 2],
    rows: &[[i8; GROUP]; R],
    quad: usize,
    dots: &mut [[__m256i; 2]; R],
) {
    debug_assert!(quad < GROUP / 4);
    let ones = _mm256_set1_epi16(1);
    let (low_size, high_size) = (_mm256_abs_epi8(low), _mm256_abs_epi8(high));
    let (pairs, last) = dots.as_chunks_mut::<2>();
    for (i, [[a0, b0], [a1, b1]]) in pairs.iter_mut().enumerate() {
        // SAFETY: reads four bytes of each of two rows, and changes registers only.
        unsafe {
            asm!(
                signed_products!(0, "a0", "b0"),
                signed_products!(32, "a1", "b1"),
                from = in(reg) rows.as_ptr().add(2 * i).cast::<i8>().add(4 * quad),
                low = in(ymm_reg) low,
                high = in(ymm_reg) high,
                low_size = in(ymm_reg) low_size,
                high_size = in(ymm_reg) high_size,
                ones = in(ymm_reg) ones,
                a0 = inout(ymm_reg) *a0,
                b0 = inout(ymm_reg) *b0,
                a1 = inout(ymm_reg) *a1,
                b1 = inout(ymm_reg) *b1,
                quad = out(ymm_reg) _,
                products = out(ymm_reg) _,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
    }
    for ([a, b], row) in last.iter_mut().zip(&rows[R / 2 * 2..]) {
        // SAFETY: as above, of one row.
        unsafe {
            asm!(
                signed_products!(0, "a", "b"),
                from = in(reg) row.as_ptr().add(4 * quad),
                low = in(ymm_reg) low,
                high = in(ymm_reg) high,
                low_size = in(ymm_reg) low_size,
                high_size = in(ymm_reg) high_size,
                ones = in(ymm_reg) ones,
                a = inout(ymm_reg) *a,
                b = inout(ymm_reg) *b,
                quad = out(ymm_reg) _,
                products = out(ymm_reg) _,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
    }
}

/// One row's part of [`add_wide_products`].
macro_rules! wide_products {
    ($at:literal, $low:literal, $high:literal) => {
        concat!(
            "vpbroadcastd {quad}, dword ptr [{from} + ",
            $at,
            "]\n",
            "vpmaddubsw {products}, {low}, {quad}\n",
            "vpmaddubsw {quad}, {high}, {quad}\n",
            "vpmaddwd {products}, {products}, {ones}\n",
            "vpmaddwd {quad}, {quad}, {ones}\n",
            "vpaddd {",
            $low,
            "}, {",
            $low,
            "}, {products}\n",
            "vpaddd {",
            $high,
            "}, {",
            $high,
            "}, {quad}\n",
        )
    };
}

/// Adds the products of unsigned bytes with quad `quad` of each row, in fours. Two of them fit 16
/// bits, or are cut off.
///
/// # Safety
/// As [`add_products`].
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn add_wide_products<const R: usize>(
    [low, high]: [__m256i; 2],
    rows: &[[i8; GROUP]; R],
    quad: usize,
    dots: &mut [[__m256i; 2]; R],
) {
    by_fours!(
        wide_products, dots, rows, quad,
        low = in(ymm_reg) low,
        high = in(ymm_reg) high,
        ones = in(ymm_reg) _mm256_set1_epi16(1),
        products = out(ymm_reg) _,
    );
}

/// One row's part of [`add_dots`].
macro_rules! dots {
    ($at:literal, $low:literal, $high:literal) => {
        concat!(
            "vpbroadcastd {quad}, dword ptr [{from} + ",
            $at,
            "]\n",
            "{{vex}} vpdpbusd {",
            $low,
            "}, {low}, {quad}\n",
            "{{vex}} vpdpbusd {",
            $high,
            "}, {high}, {quad}\n",
        )
    };
}

/// Adds the products of unsigned bytes with quad `quad` of each row, in fours.
///
/// # Safety
/// As [`add_products`], and the processor has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn add_dots<const R: usize>(
    [low, high]: [__m256i; 2],
    rows: &[[i8; GROUP]; R],
    quad: usize,
    dots: &mut [[__m256i; 2]; R],
) {
    by_fours!(dots, dots, rows, quad, low = in(ymm_reg) low, high = in(ymm_reg) high,);
}
