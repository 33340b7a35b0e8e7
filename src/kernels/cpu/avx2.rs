//! The AVX2 set, also with AVX-VNNI: 16 lanes are two registers.

#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::ops::Range;

use products::{
    add_dots, add_products, add_signed_products, add_wide_products, exact, floats, high_halves,
    lines, low_halves,
};

use super::isa::{Isa, LANES, Task};
use crate::kernels::ops::QuantBuf;
use crate::kernels::packed::{GROUP, HALF_LEAST};

mod products;
#[cfg(test)]
mod tests;

/// A processor with AVX2, FMA and F16C; and AVX-VNNI if `VNNI`.
#[derive(Clone, Copy)]
struct Avx2<const VNNI: bool>;

/// Runs `units` of `task` with AVX2.
///
/// # Safety
/// The processor has the features that are enabled here.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<T: Task>(task: &T, units: Range<usize>) {
    task.run(Avx2::<false>, units);
}

/// Runs `units` of `task` with AVX2 and AVX-VNNI.
///
/// # Safety
/// The processor has the features that are enabled here.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn run_vnni<T: Task>(task: &T, units: Range<usize>) {
    task.run(Avx2::<true>, units);
}

type Pair = [__m256; 2];

#[inline(always)]
fn both(f: impl Fn(usize) -> __m256) -> Pair {
    [f(0), f(1)]
}

// SAFETY, for every block below: a value of `Avx2` is made only by `run` and `run_vnni`, whose
// callers promise the instructions; what else a method needs is its own caller's promise.
impl<const VNNI: bool> Avx2<VNNI> {
    /// For each row the exact sums of products of 4-bit values, in `LINES` times 64 bytes, with
    /// the row's quads from `first` on.
    ///
    /// # Safety
    /// `weights` has so many bytes, and a row `2 × LINES` quads from there on.
    #[inline(always)]
    unsafe fn dots_of_halves<const R: usize, const LINES: usize>(
        weights: *const u8,
        rows: &[[i8; GROUP]; R],
        first: usize,
    ) -> [Pair; R] {
        // SAFETY: the caller's promise, and see above.
        unsafe {
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            for j in 0..LINES {
                let (packed, quad) = (lines(weights.add(j * 64)), first + 2 * j);
                if VNNI {
                    add_dots(low_halves(packed), rows, quad, &mut sums);
                    add_dots(high_halves(packed), rows, quad + 1, &mut sums);
                } else {
                    // Sums of two products are at most 2 × 15 × 127, eight of them fit 16 bits.
                    add_products(low_halves(packed), rows, quad, &mut sums);
                    add_products(high_halves(packed), rows, quad + 1, &mut sums);
                }
            }
            if VNNI { floats(sums) } else { exact(sums) }
        }
    }

    /// For each row the exact sums of products of bytes, in `LINES` times 64, with the row's quads
    /// from `first` on. Two products fit 16 bits.
    ///
    /// # Safety
    /// As [`Self::dots_of_halves`], with `LINES` quads.
    #[inline(always)]
    unsafe fn dots_of_bytes<const R: usize, const LINES: usize>(
        weights: *const u8,
        rows: &[[i8; GROUP]; R],
        first: usize,
    ) -> [Pair; R] {
        // SAFETY: the caller's promise, and see above.
        unsafe {
            let mut dots = [[_mm256_setzero_si256(); 2]; R];
            for j in 0..LINES {
                let bytes = lines(weights.add(j * 64));
                match VNNI {
                    true => add_dots(bytes, rows, first + j, &mut dots),
                    false => add_wide_products(bytes, rows, first + j, &mut dots),
                }
            }
            floats(dots)
        }
    }

    /// Sums of products with weights that are `offset` too large, less `offset` times the sums of
    /// each row's bytes: all three are integers below 2^24, so this is exact.
    #[inline(always)]
    fn without_offset<const R: usize>(
        self,
        mut dots: [Pair; R],
        offset: u8,
        sums: &[f32; R],
    ) -> [Pair; R] {
        let offset = self.splat(-f32::from(offset));
        for r in 0..R {
            dots[r] = self.fma(offset, self.splat(sums[r]), dots[r]);
        }
        dots
    }
}

// SAFETY, for every block below: as above.
impl<const VNNI: bool> Isa for Avx2<VNNI> {
    type F = Pair;
    type H = [__m256i; 2];

    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_loadu_ps(from.add(i * 8)) })
    }

    #[inline(always)]
    unsafe fn write(self, x: Pair, to: *mut f32) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }

    #[inline(always)]
    unsafe fn read_half(self, from: *const u16) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.add(i * 8).cast())) })
    }

    #[inline(always)]
    unsafe fn write_half(self, x: Pair, to: *mut u16) {
        // SAFETY: see above.
        unsafe {
            for (i, x) in x.into_iter().enumerate() {
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                _mm_storeu_si128(to.add(i * 8).cast(), halves);
            }
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_add_ps(a[i], b[i]) })
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_sub_ps(a[i], b[i]) })
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_mul_ps(a[i], b[i]) })
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_div_ps(a[i], b[i]) })
    }

    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_fmadd_ps(a[i], b[i], c[i]) })
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_max_ps(a[i], b[i]) })
    }

    #[inline(always)]
    fn abs(self, a: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a[i]) })
    }

    #[inline(always)]
    fn where_less(self, a: Pair, b: Pair, yes: Pair, no: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe {
            _mm256_blendv_ps(no[i], yes[i], _mm256_cmp_ps::<_CMP_LT_OQ>(a[i], b[i]))
        })
    }

    #[inline(always)]
    fn scale_by_bits(self, p: Pair, t: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe {
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(t[i]));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p[i]), exponent))
        })
    }

    #[inline(always)]
    fn low_bytes(self, t: Pair) -> [i8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: see above; 16 bytes of our own.
        unsafe {
            // Sign-extended first, so that narrowing saturates nothing.
            let [a, b] =
                t.map(|t| _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(_mm256_castps_si256(t))));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm_packs_epi16(low, high));
        }
        bytes
    }

    #[inline(always)]
    fn sum(self, a: Pair) -> f32 {
        // SAFETY: see above.
        unsafe {
            let a = _mm256_add_ps(a[0], a[1]);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }

    #[inline(always)]
    fn peak(self, a: Pair) -> f32 {
        // SAFETY: see above.
        unsafe {
            let a = _mm256_max_ps(a[0], a[1]);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }

    #[inline(always)]
    fn prefetch<T>(self, from: *const T) {
        // SAFETY: a hint, which faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn read_pairs(self, from: *const u16) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(LANES).cast())] }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, from: *const u16) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_set1_epi32(from.cast::<i32>().read_unaligned()); 2] }
    }

    #[inline(always)]
    fn dot_pairs(self, a: [__m256i; 2], b: [__m256i; 2], c: Pair) -> Pair {
        // SAFETY: see above.
        both(|i| unsafe {
            let high = _mm256_set1_epi32(!0xFFFF);
            let second = |x| _mm256_castsi256_ps(_mm256_and_si256(x, high));
            let first = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
            let sum = _mm256_fmadd_ps(second(a[i]), second(b[i]), c[i]);
            _mm256_fmadd_ps(first(a[i]), first(b[i]), sum)
        })
    }

    #[inline(always)]
    unsafe fn write_bf16(self, x: Pair, to: *mut u16) {
        // SAFETY: see above.
        unsafe {
            let rounded = x.map(|x| {
                let bits = _mm256_castps_si256(x);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
                let half = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, up));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
                let half = _mm256_blendv_epi8(half, _mm256_set1_epi32(0x7FC0), nan);
                let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
                let least = _mm256_set1_ps(HALF_LEAST);
                let large = _mm256_cmp_ps::<_CMP_NLT_UQ>(size, least);
                _mm256_and_si256(half, _mm256_castps_si256(large))
            });
            let words = _mm256_packus_epi32(rounded[0], rounded[1]);
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            _mm256_storeu_si256(to.cast(), words);
        }
    }

    #[inline(always)]
    fn dot_q4<const R: usize>(self, weights: &[u8; 256], rows: &[[i8; GROUP]; R]) -> [Pair; R] {
        // SAFETY: 4 vectors of 64 bytes, 8 quads a row.
        unsafe { Self::dots_of_halves::<R, 4>(weights.as_ptr(), rows, 0) }
    }

    #[inline(always)]
    fn dot_q8<const R: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[i8; GROUP]; R],
        sums: &[f32; R],
    ) -> [Pair; R] {
        // SAFETY: see above; 8 vectors of 64 bytes, 8 quads a row.
        unsafe {
            if VNNI {
                let dots = Self::dots_of_bytes::<R, 8>(weights.as_ptr(), rows, 0);
                return self.without_offset(dots, 128, sums);
            }
            let mut dots = [[_mm256_setzero_si256(); 2]; R];
            for j in 0..8 {
                let (offset, [a, b]) =
                    (_mm256_set1_epi8(-128), lines(weights.as_ptr().add(j * 64)));
                let signed = [_mm256_xor_si256(a, offset), _mm256_xor_si256(b, offset)];
                add_signed_products(signed, rows, j, &mut dots);
            }
            floats(dots)
        }
    }

    #[inline(always)]
    fn dot_low<const R: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[i8; GROUP]; R],
        sums: &[f32; R],
    ) -> [Pair; R] {
        // SAFETY: 8 vectors of 64 bytes, 8 quads a row. Two products are at most 2 × 180 × 90.
        let dots = unsafe { Self::dots_of_bytes::<R, 8>(weights.as_ptr(), rows, 0) };
        self.without_offset(dots, QuantBuf::LOW.unsigned_abs(), sums)
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; LANES]) -> Pair {
        // SAFETY: see above; twice 8 of the 16 bytes behind a shared reference.
        both(|i| unsafe {
            let bytes = _mm_loadl_epi64(from.as_ptr().add(i * 8).cast());
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
        })
    }

    #[inline(always)]
    fn dot_half_q4<const R: usize>(
        self,
        weights: &[u8; 128],
        rows: &[[i8; GROUP]; R],
        half: usize,
    ) -> [Pair; R] {
        assert!(half < 2);
        // SAFETY: 2 vectors of 64 bytes, 4 quads half a row.
        unsafe { Self::dots_of_halves::<R, 2>(weights.as_ptr(), rows, 4 * half) }
    }

    #[inline(always)]
    fn dot_half_q8<const R: usize>(
        self,
        weights: &[u8; 256],
        rows: &[[i8; GROUP]; R],
        half: usize,
    ) -> [Pair; R] {
        assert!(half < 2);
        // SAFETY: 4 vectors of 64 bytes, 4 quads half a row. Two products are at most
        // 2 × 127 × 127.
        unsafe { Self::dots_of_bytes::<R, 4>(weights.as_ptr(), rows, 4 * half) }
    }
}
