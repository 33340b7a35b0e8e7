//! The 16-lane vocabulary that op bodies are written in, and the choice of an instruction set at
//! run time. Knows no op.
//!
//! What computes with lanes is a loop in an `#[inline(always)]` function, not a closure: a closure
//! is compiled without the instruction set, and one that is not inlined makes calls of single
//! instructions (20 × slower, 2026-11).

#![allow(unsafe_code)]

use std::ops::Range;

use super::scalar::Scalar;
use crate::device::cpu::Features;
use crate::kernels::ops::QuantBuf;
use crate::kernels::packed::{GROUP, PackedFormat};

/// Lanes of every vector.
pub(in crate::kernels) const LANES: usize = 16;

/// An instruction set as 16 lanes of f32. Each operation rounds each lane once, to nearest even,
/// so every implementation gives the same bits (the payload of a NaN apart). A value of an
/// implementing type is the proof that the processor has the instructions.
pub(in crate::kernels) trait Isa: Copy + Sync + 'static {
    /// 16 f32.
    type F: Copy;
    /// 16 pairs of bf16.
    type H: Copy;

    /// Whether 32 vectors fit the registers: how large tiles may be.
    const WIDE: bool;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::F;
    /// 16 values from `from` on, at any alignment.
    ///
    /// # Safety
    /// They are readable and nobody writes them meanwhile.
    unsafe fn read(self, from: *const f32) -> Self::F;
    /// 16 values to `to` on, at any alignment.
    ///
    /// # Safety
    /// They are writable and nobody else uses them meanwhile.
    unsafe fn write(self, x: Self::F, to: *mut f32);
    /// As [`Isa::read`], from f16.
    ///
    /// # Safety
    /// As [`Isa::read`].
    unsafe fn read_half(self, from: *const u16) -> Self::F;
    /// As [`Isa::write`], to f16, to nearest even.
    ///
    /// # Safety
    /// As [`Isa::write`].
    unsafe fn write_half(self, x: Self::F, to: *mut u16);
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a × b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a × b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Without its sign.
    fn abs(self, a: Self::F) -> Self::F;
    /// `yes` where `a < b`, else `no` (also where either is NaN).
    fn where_less(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// `p × 2^n` for `n` in the low bits of `t`'s encoding: adds `bits(t) << 23` to the bits of p.
    fn scale_by_bits(self, p: Self::F, t: Self::F) -> Self::F;
    /// The low byte of each lane's encoding.
    fn low_bytes(self, t: Self::F) -> [i8; LANES];
    /// Lanes added pairwise: i + i+8, then +4, +2, +1.
    fn sum(self, a: Self::F) -> f32;
    /// The largest lane; none may be NaN.
    fn peak(self, a: Self::F) -> f32;

    /// For each of `R` rows of 32 signed bytes the exact sums of products with the 4-bit values
    /// of one group of a panel.
    fn dot_q4<const R: usize>(self, weights: &[u8; 256], rows: &[[i8; GROUP]; R]) -> [Self::F; R];

    /// As [`Isa::dot_q4`] with 8-bit values, 128 too large each; `sums` are the sums of each row's
    /// bytes.
    fn dot_q8<const R: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[i8; GROUP]; R],
        sums: &[f32; R],
    ) -> [Self::F; R];

    /// As [`Isa::dot_q8`], of weights and rows with no value larger than [`QuantBuf::LOW`]; weights
    /// are by that too large.
    #[inline(always)]
    fn dot_low<const R: usize>(
        self,
        weights: &[u8; 512],
        rows: &[[i8; GROUP]; R],
        sums: &[f32; R],
    ) -> [Self::F; R] {
        // 128 were subtracted instead of that; integers below 2^24, so this is exact.
        let missing = self.splat(128.0 - f32::from(QuantBuf::LOW));
        let mut dots = self.dot_q8(weights, rows, sums);
        for (dot, sum) in dots.iter_mut().zip(sums) {
            *dot = self.fma(missing, self.splat(*sum), *dot);
        }
        dots
    }

    /// 16 signed bytes.
    fn bytes(self, from: &[u8; LANES]) -> Self::F;

    /// As [`Isa::dot_q4`] with half a group of weights and half `half` of each row.
    fn dot_half_q4<const R: usize>(
        self,
        weights: &[u8; 128],
        rows: &[[i8; GROUP]; R],
        half: usize,
    ) -> [Self::F; R];

    /// As [`Isa::dot_half_q4`] with 8-bit values of at most 127.
    fn dot_half_q8<const R: usize>(
        self,
        weights: &[u8; 256],
        rows: &[[i8; GROUP]; R],
        half: usize,
    ) -> [Self::F; R];

    /// 16 pairs of bf16 from `from` on, at any alignment.
    ///
    /// # Safety
    /// They are readable and nobody writes them meanwhile.
    unsafe fn read_pairs(self, from: *const u16) -> Self::H;
    /// The pair of bf16 at `from`, at any alignment, 16 times.
    ///
    /// # Safety
    /// As [`Isa::read_pairs`].
    unsafe fn splat_pair(self, from: *const u16) -> Self::H;
    /// `fma(a0, b0, fma(a1, b1, c))` for each pair. No value is subnormal.
    fn dot_pairs(self, a: Self::H, b: Self::H, c: Self::F) -> Self::F;
    /// As [`Isa::write`], to bf16 as [`round_half`](crate::kernels::packed::round_half) does.
    ///
    /// # Safety
    /// As [`Isa::write`].
    unsafe fn write_bf16(self, x: Self::F, to: *mut u16);

    /// Says that the cache line at `from` is read soon.
    #[inline(always)]
    fn prefetch<T>(self, _from: *const T) {}

    /// Rows as columns: lane `j` of vector `i` becomes lane `i` of vector `j`.
    #[inline(always)]
    fn turn(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        let mut columns = [[0.0; LANES]; LANES];
        for (i, row) in rows.into_iter().enumerate() {
            for (j, x) in self.store(row).into_iter().enumerate() {
                columns[j][i] = x;
            }
        }
        let mut turned = rows;
        for (lanes, column) in turned.iter_mut().zip(&columns) {
            *lanes = self.load(column);
        }
        turned
    }

    /// 16 values.
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        // SAFETY: 16 values behind a shared reference.
        unsafe { self.read(from.as_ptr()) }
    }

    /// 16 values.
    #[inline(always)]
    fn store(self, x: Self::F) -> [f32; LANES] {
        let mut to = [0.0; LANES];
        // SAFETY: 16 values of our own.
        unsafe { self.write(x, to.as_mut_ptr()) };
        to
    }
}

/// Work on one op that falls into independent units.
pub(in crate::kernels) trait Task: Sync {
    /// Whether it has products of bf16: the others are not compiled once more for them.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AVX-512 asks"))]
    const HALVES: bool = false;
    /// Whether it has products of bytes: as above, for AVX-VNNI.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AVX-VNNI asks"))]
    const BYTES: bool = false;

    /// How many units there are.
    fn units(&self) -> usize;
    /// Does `units`, for each unit the same whatever else is in the range.
    fn run<S: Isa>(&self, isa: S, units: Range<usize>);
}

/// Which instructions kernels are compiled for. All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SetKind {
    /// Plain Rust, any processor: the definition.
    Reference,
    /// AVX2, FMA, F16C.
    Avx2,
    /// The same and AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, VL, VNNI.
    Avx512,
    /// The same and AVX-512 BF16.
    Avx512Bf16,
}

impl SetKind {
    /// Every set, slowest first.
    pub const ALL: [SetKind; 5] =
        [SetKind::Reference, SetKind::Avx2, SetKind::AvxVnni, SetKind::Avx512, SetKind::Avx512Bf16];

    /// The fastest set that this processor runs.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rfind(|set| set.is_supported()).unwrap_or(Self::Reference)
    }

    /// Whether this processor runs it.
    pub fn is_supported(self) -> bool {
        match self {
            SetKind::Reference => true,
            SetKind::Avx2 => Features::detect().avx2,
            SetKind::AvxVnni => Features::detect().avx_vnni,
            SetKind::Avx512 => Features::detect().avx512,
            SetKind::Avx512Bf16 => Features::detect().bf16,
        }
    }

    /// Whether bf16 products are faster than those of f32.
    pub fn has_bf16(self) -> bool {
        self == SetKind::Avx512Bf16
    }

    /// The 8-bit format that is multiplied fastest: AVX2 cuts sums of two products to 16 bits.
    pub fn fastest_bytes(self) -> PackedFormat {
        if self == SetKind::Avx2 { PackedFormat::Q8Low } else { PackedFormat::Q8 }
    }

    /// In logs.
    pub fn as_str(self) -> &'static str {
        match self {
            SetKind::Reference => "reference",
            SetKind::Avx2 => "avx2",
            SetKind::AvxVnni => "avxvnni",
            SetKind::Avx512 => "avx512",
            SetKind::Avx512Bf16 => "avx512bf16",
        }
    }
}

/// A set that this processor is known to run.
#[derive(Debug, Clone, Copy)]
pub(in crate::kernels) struct Set(SetKind);

impl Set {
    /// None where the processor lacks the instructions.
    pub(in crate::kernels) fn new(kind: SetKind) -> Option<Self> {
        kind.is_supported().then_some(Self(kind))
    }

    pub(in crate::kernels) fn kind(self) -> SetKind {
        self.0
    }

    /// Runs `units` of `task`, compiled for this set.
    pub(in crate::kernels) fn run<T: Task>(self, task: &T, units: Range<usize>) {
        match self.0 {
            SetKind::Reference => task.run(Scalar, units),
            // SAFETY: `new` has seen that the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            SetKind::AvxVnni if T::BYTES => unsafe { super::avx2::run_vnni(task, units) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            SetKind::Avx2 | SetKind::AvxVnni => unsafe { super::avx2::run(task, units) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            SetKind::Avx512Bf16 if T::HALVES => unsafe { super::avx512::run_bf16(task, units) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            SetKind::Avx512 | SetKind::Avx512Bf16 => unsafe { super::avx512::run(task, units) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("`new` refuses sets of other processors"),
        }
    }
}
