//! The AVX-512 set.

#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::isa::{Isa, LANES, Task};
use crate::kernels::packed::{GROUP, HALF_LEAST};

/// A processor with AVX-512 F, BW, VL, VNNI, and AVX2, FMA, F16C; and BF16 if `HALVES`.
#[derive(Clone, Copy)]
struct Avx512<const HALVES: bool>;

/// Runs `units` of `task` with AVX-512.
///
/// # Safety
/// The processor has the features that are enabled here.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn run<T: Task>(task: &T, units: Range<usize>) {
    task.run(Avx512::<false>, units);
}

/// Runs `units` of `task` with AVX-512 and its bf16 instructions.
///
/// # Safety
/// The processor has the features that are enabled here.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn run_bf16<T: Task>(task: &T, units: Range<usize>) {
    task.run(Avx512::<true>, units);
}

// SAFETY, for every block below: a value of `Avx512` is made only by `run` and `run_bf16`, whose
// callers promise the instructions; what else a method needs is its own caller's promise.
impl<const HALVES: bool> Isa for Avx512<HALVES> {
    type F = __m512;
    type H = __m512i;

    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn write(self, x: __m512, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn read_half(self, from: *const u16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn write_half(self, x: __m512, to: *mut u16) {
        // SAFETY: see above.
        unsafe {
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm256_storeu_si256(to.cast(), halves);
        }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_abs_ps(a) }
    }

    #[inline(always)]
    fn where_less(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) }
    }

    #[inline(always)]
    fn scale_by_bits(self, p: __m512, t: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent))
        }
    }

    #[inline(always)]
    fn low_bytes(self, t: __m512) -> [i8; LANES] {
        let mut bytes = [0; LANES];
        // SAFETY: see above; 16 bytes of our own.
        unsafe {
            let low = _mm512_cvtepi32_epi8(_mm512_castps_si512(t));
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), low);
        }
        bytes
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: see above.
        unsafe {
            let high = _mm512_castpd_ps(_mm512_shuffle_f64x2::<0b1110>(
                _mm512_castps_pd(a),
                _mm512_castps_pd(a),
            ));
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_castps512_ps256(high));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }

    #[inline(always)]
    fn peak(self, a: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn prefetch<T>(self, from: *const T) {
        // SAFETY: a hint, which faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn read_pairs(self, from: *const u16) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat_pair(self, from: *const u16) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    fn dot_pairs(self, a: __m512i, b: __m512i, c: __m512) -> __m512 {
        // SAFETY: see above; the bf16 instruction only where `HALVES` says that it is there.
        unsafe {
            if HALVES {
                return _mm512_dpbf16_ps(c, bf16_pairs(a), bf16_pairs(b));
            }
            let high = _mm512_set1_epi32(!0xFFFF);
            let second = |x| _mm512_castsi512_ps(_mm512_and_si512(x, high));
            let first = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
            _mm512_fmadd_ps(first(a), first(b), _mm512_fmadd_ps(second(a), second(b), c))
        }
    }

    #[inline(always)]
    unsafe fn write_bf16(self, x: __m512, to: *mut u16) {
        // SAFETY: see above.
        unsafe {
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
            let half = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, up));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let half = _mm512_mask_mov_epi32(half, nan, _mm512_set1_epi32(0x7FC0));
            let least = _mm512_set1_ps(HALF_LEAST);
            let large = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(_mm512_abs_ps(x), least);
            let half = _mm512_maskz_cvtepi32_epi16(large, half);
            _mm256_storeu_si256(to.cast(), half);
        }
    }

    #[inline(always)]
    fn dot_q4<const R: usize>(self, weights: &[u8; 256], rows: &[[i8; GROUP]; R]) -> [__m512; R] {
        // SAFETY: see above; 4 vectors of 64 bytes, 8 quads a row.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); R];
            let low = _mm512_set1_epi8(15);
            for j in 0..4 {
                let both = _mm512_loadu_si512(weights.as_ptr().add(j * 64).cast());
                let first = _mm512_and_si512(both, low);
                let second = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                for r in 0..R {
                    sums[r] = _mm512_dpbusd_epi32(sums[r], first, quad(&rows[r], 2 * j));
                    sums[r] = _mm512_dpbusd_epi32(sums[r], second, quad(&rows[r], 2 * j + 1));
                }
            }
            let mut exact = [_mm512_setzero_ps(); R];
            for r in 0..R {
                exact[r] = _mm512_cvtepi32_ps(sums[r]);
            }
            exact
        }
    }

    #[inline(always)]
    fn dot_q8<const R: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[i8; GROUP]; R],
        sums: &[f32; R],
    ) -> [__m512; R] {
        // SAFETY: see above; 8 vectors of 64 bytes, 8 quads a row.
        unsafe {
            let mut dots = [_mm512_setzero_si512(); R];
            for j in 0..8 {
                let bytes = _mm512_loadu_si512(weights.as_ptr().add(j * 64).cast());
                for r in 0..R {
                    dots[r] = _mm512_dpbusd_epi32(dots[r], bytes, quad(&rows[r], j));
                }
            }
            // Weights are 128 too large, so the sum is by 128 Σq; all three are integers below
            // 2^24, so this is exact.
            let offset = _mm512_set1_ps(-128.0);
            let mut exact = [_mm512_setzero_ps(); R];
            for r in 0..R {
                let sum = _mm512_set1_ps(sums[r]);
                exact[r] = _mm512_fmadd_ps(offset, sum, _mm512_cvtepi32_ps(dots[r]));
            }
            exact
        }
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; LANES]) -> __m512 {
        // SAFETY: see above; 16 bytes behind a shared reference.
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
        }
    }

    #[inline(always)]
    fn dot_half_q4<const R: usize>(
        self,
        weights: &[u8; 128],
        rows: &[[i8; GROUP]; R],
        half: usize,
    ) -> [__m512; R] {
        assert!(half < 2);
        // SAFETY: see above; 2 vectors of 64 bytes, 4 quads half a row.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); R];
            let low = _mm512_set1_epi8(15);
            for j in 0..2 {
                let both = _mm512_loadu_si512(weights.as_ptr().add(j * 64).cast());
                let first = _mm512_and_si512(both, low);
                let second = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                for r in 0..R {
                    let at = 4 * half + 2 * j;
                    sums[r] = _mm512_dpbusd_epi32(sums[r], first, quad(&rows[r], at));
                    sums[r] = _mm512_dpbusd_epi32(sums[r], second, quad(&rows[r], at + 1));
                }
            }
            exact(sums)
        }
    }

    #[inline(always)]
    fn dot_half_q8<const R: usize>(
        self,
        weights: &[u8; 256],
        rows: &[[i8; GROUP]; R],
        half: usize,
    ) -> [__m512; R] {
        assert!(half < 2);
        // SAFETY: see above; 4 vectors of 64 bytes, 4 quads half a row.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); R];
            for j in 0..4 {
                let bytes = _mm512_loadu_si512(weights.as_ptr().add(j * 64).cast());
                for r in 0..R {
                    sums[r] = _mm512_dpbusd_epi32(sums[r], bytes, quad(&rows[r], 4 * half + j));
                }
            }
            exact(sums)
        }
    }
}

/// Sums as f32, which they all fit.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline(always)]
unsafe fn exact<const R: usize>(sums: [__m512i; R]) -> [__m512; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut exact = [_mm512_setzero_ps(); R];
        for r in 0..R {
            exact[r] = _mm512_cvtepi32_ps(sums[r]);
        }
        exact
    }
}

/// The same bits.
#[inline(always)]
fn bf16_pairs(x: __m512i) -> __m512bh {
    // SAFETY: two types of the same vector; every bit pattern is 32 bf16.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(x) }
}

/// Four bytes of a row, in every lane.
///
/// # Safety
/// The processor has AVX-512 F, and `index` is below 8.
#[inline(always)]
unsafe fn quad(row: &[i8; GROUP], index: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_set1_epi32(row.as_ptr().cast::<i32>().add(index).read_unaligned()) }
}
