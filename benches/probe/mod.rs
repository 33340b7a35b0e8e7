//! What this machine's cores do at most, measured: products of bytes, of bf16 and of f32 in
//! registers, and bytes read from memory. All threads at once.

#![allow(unsafe_code, reason = "what a processor has is asked at run time")]

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// Times that everything is measured; the best counts.
const TRIES: usize = 5;

/// Rounds of a loop over registers.
const ROUNDS: usize = 2_000_000;

/// Bytes that each thread reads.
const READ: usize = 128 << 20;

/// Billions a second, of all threads together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peak {
    /// Products of two bytes, added up.
    pub(crate) bytes: f64,
    /// Products of two bf16, added up; of f32 where the processor has no instruction for it.
    pub(crate) halves: f64,
    /// Products of two f32, added up.
    pub(crate) floats: f64,
    /// Bytes read.
    pub(crate) read: f64,
}

impl Peak {
    pub(crate) fn measure(threads: usize) -> Self {
        let floats = best(threads, floats);
        let halves = if has_halves() { best(threads, halves) } else { floats };
        let memory = vec![1u64; READ / 8];
        let read = best(threads, || {
            let sum = memory.chunks_exact(64).fold([0; 64], |sums, chunk| {
                let mut sums: [u64; 64] = sums;
                sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value);
                sums
            });
            black_box(sum);
            READ
        });
        Self { bytes: best(threads, bytes), halves, floats, read }
    }
}

/// Billions of what `work` counts a second, on so many threads.
fn best(threads: usize, work: impl Fn() -> usize + Sync) -> f64 {
    let measure = |_| {
        let barrier = Barrier::new(threads);
        let run = || {
            barrier.wait();
            let start = Instant::now();
            work() as f64 / start.elapsed().as_secs_f64() / 1e9
        };
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            running.into_iter().map(|thread| thread.join().expect("no panic")).sum::<f64>()
        })
    };
    (0..TRIES).map(measure).fold(0.0, f64::max)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Each loop has as many independent sums as its instructions take cycles, and more.

    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::ROUNDS;

    const SUMS: usize = 12;

    pub(super) fn has_wide() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
    }

    pub(super) fn has_halves() -> bool {
        is_x86_feature_detected!("avx512bf16")
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn bytes_wide() -> usize {
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
        64 * SUMS * ROUNDS
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn bytes() -> usize {
        let (a, b) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi16(5)));
        let mut sums = [_mm256_setzero_si256(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                // Of its own result, or the product would be taken out of the loop.
                *sum = _mm256_add_epi16(_mm256_maddubs_epi16(*sum, a), b);
            }
        }
        black_box(sums);
        32 * SUMS * ROUNDS
    }

    #[target_feature(enable = "avx2,avxvnni")]
    pub(super) fn bytes_vnni() -> usize {
        let (a, b) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi8(5)));
        let mut sums = [_mm256_setzero_si256(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
            }
        }
        black_box(sums);
        32 * SUMS * ROUNDS
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn halves() -> usize {
        let pairs = black_box(_mm512_set1_epi32(0x3f80_3f80));
        // SAFETY: both are 512 bits, and any bits are a value of either.
        let pairs: __m512bh = unsafe { std::mem::transmute(pairs) };
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, pairs, pairs);
            }
        }
        black_box(sums);
        32 * SUMS * ROUNDS
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn floats_wide() -> usize {
        let (a, b) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(0.25)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        16 * SUMS * ROUNDS
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn floats() -> usize {
        let (a, b) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(0.25)));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        8 * SUMS * ROUNDS
    }
}

#[cfg(target_arch = "x86_64")]
fn has_halves() -> bool {
    x86::has_halves()
}

#[cfg(target_arch = "x86_64")]
fn halves() -> usize {
    // SAFETY: called where `has_halves` only.
    unsafe { x86::halves() }
}

#[cfg(target_arch = "x86_64")]
fn bytes() -> usize {
    if x86::has_wide() {
        // SAFETY: the processor has it.
        unsafe { x86::bytes_wide() }
    } else if is_x86_feature_detected!("avxvnni") {
        // SAFETY: the processor has it.
        unsafe { x86::bytes_vnni() }
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        unsafe { x86::bytes() }
    } else {
        floats()
    }
}

#[cfg(target_arch = "x86_64")]
fn floats() -> usize {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has it.
        unsafe { x86::floats_wide() }
    } else if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        unsafe { x86::floats() }
    } else {
        plain()
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has_halves() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
use plain as halves;

#[cfg(not(target_arch = "x86_64"))]
use plain as bytes;

#[cfg(not(target_arch = "x86_64"))]
use plain as floats;

/// As the compiler makes it.
fn plain() -> usize {
    const SUMS: usize = 64;
    let (a, b) = (black_box(0.5f32), black_box(0.25f32));
    let mut sums = [0.0f32; SUMS];
    for _ in 0..ROUNDS / 8 {
        sums.iter_mut().for_each(|sum| *sum = *sum * a + b);
    }
    black_box(sums);
    SUMS * ROUNDS / 8
}
