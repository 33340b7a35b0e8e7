//! Typed, bounds-checked views of the workspace and the KV region that the members of a team
//! share while a program runs. Knows no op.
//!
//! The discipline that makes sharing sound: an op falls into units, a unit is claimed by one
//! member, units of one op write disjoint places, and none reads what another of the same op
//! writes. Between ops stands a barrier.

#![allow(unsafe_code)]

use super::isa::{Isa, LANES};
use super::math;
use crate::device::arena::Region;
use crate::kernels::ops::{Activation, Buf, HalfBuf, QuantBuf};
use crate::kernels::packed::GROUP;

/// A region, for the time of one step, as every member sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: whoever makes views of it keeps the discipline above.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// All of `region`.
    ///
    /// # Safety
    /// It is used only while `region` stays borrowed, under the discipline above.
    pub(super) unsafe fn new(region: &mut Region) -> Self {
        let bytes = region.as_bytes_mut();
        Self { start: bytes.as_mut_ptr(), bytes: bytes.len() }
    }

    /// `count` values of `T` from byte `offset` on.
    ///
    /// # Panics
    /// If they are not inside, or misaligned.
    pub(super) fn at<T>(self, offset: usize, count: usize) -> *mut T {
        let bytes = count.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(offset));
        assert!(
            bytes.is_some_and(|end| end <= self.bytes),
            "{count} values at byte {offset} leave a region of {} bytes",
            self.bytes
        );
        // SAFETY: `offset` is inside, as just checked.
        let start = unsafe { self.start.add(offset).cast::<T>() };
        assert!(start.is_aligned(), "byte {offset} is misaligned");
        start
    }
}

/// Rows of f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct Floats {
    start: *mut f32,
    width: usize,
    rows: usize,
}

// SAFETY: under the discipline of this module.
unsafe impl Send for Floats {}
// SAFETY: under the discipline of this module.
unsafe impl Sync for Floats {}

impl Floats {
    pub(super) fn new(memory: Memory, buf: &Buf, rows: usize) -> Self {
        let start = memory.at(buf.offset, rows * buf.width);
        Self { start, width: buf.width, rows }
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> Row {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: inside the buffer, as checked here and in `new`.
        Row { start: unsafe { self.start.add(row * self.width) }, width: self.width }
    }
}

/// One row of f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    start: *mut f32,
    width: usize,
}

impl Row {
    #[inline(always)]
    pub(super) fn width(self) -> usize {
        self.width
    }

    /// 16 values from column `c` on, zeros beyond the row.
    #[inline(always)]
    pub(super) fn load<S: Isa>(self, s: S, c: usize) -> S::F {
        if c + LANES <= self.width {
            // SAFETY: inside the row; no other member writes it during this op.
            return unsafe { s.read(self.start.add(c)) };
        }
        let mut lanes = [0.0; LANES];
        for (i, lane) in lanes.iter_mut().enumerate().take(self.width.saturating_sub(c)) {
            *lane = self.get(c + i);
        }
        s.load(&lanes)
    }

    /// 16 values to column `c` on, less those beyond the row.
    #[inline(always)]
    pub(super) fn store<S: Isa>(self, s: S, c: usize, x: S::F) {
        if c + LANES <= self.width {
            // SAFETY: inside the row, which is this unit's.
            return unsafe { s.write(x, self.start.add(c)) };
        }
        for (i, x) in s.store(x).into_iter().enumerate().take(self.width.saturating_sub(c)) {
            self.set(c + i, x);
        }
    }

    #[inline(always)]
    pub(super) fn get(self, c: usize) -> f32 {
        assert!(c < self.width);
        // SAFETY: inside the row; no other member writes it during this op.
        unsafe { *self.start.add(c) }
    }

    #[inline(always)]
    pub(super) fn set(self, c: usize, x: f32) {
        assert!(c < self.width);
        // SAFETY: inside the row, which is this unit's.
        unsafe { *self.start.add(c) = x }
    }

    /// Where column `c` is, with `count` values to follow.
    #[inline(always)]
    pub(super) fn columns(self, c: usize, count: usize) -> *mut f32 {
        assert!(c + count <= self.width);
        // SAFETY: inside the row.
        unsafe { self.start.add(c) }
    }

    /// The whole row, for writing.
    ///
    /// # Safety
    /// The row is this unit's, and nothing else looks at it meanwhile.
    #[inline(always)]
    pub(super) unsafe fn values_mut<'a>(self) -> &'a mut [f32] {
        // SAFETY: inside the buffer; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.width) }
    }
}

/// Rows of 8-bit groups. Eight rows lie together, group by group, so that a tile of them is read
/// through one pointer: `[row / 8][group][row % 8]`, with as many rows in the last eight as the
/// step has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quants {
    bytes: *mut [i8; GROUP],
    scales: *mut f32,
    sums: *mut f32,
    groups: usize,
    rows: usize,
    peak: i8,
}

// SAFETY: under the discipline of this module.
unsafe impl Send for Quants {}
// SAFETY: under the discipline of this module.
unsafe impl Sync for Quants {}

impl Quants {
    pub(super) fn new(memory: Memory, buf: &QuantBuf, rows: usize) -> Self {
        assert!(buf.width.is_multiple_of(GROUP), "{} values are no whole groups", buf.width);
        let groups = buf.width / GROUP;
        Self {
            bytes: memory.at(buf.values, rows * groups),
            scales: memory.at(buf.scales, rows * groups),
            sums: memory.at(buf.sums, rows * groups),
            groups,
            rows,
            peak: buf.peak,
        }
    }

    pub(super) fn width(&self) -> usize {
        self.groups * GROUP
    }

    pub(super) fn groups(&self) -> usize {
        self.groups
    }

    /// `R` rows from `first` on, which lie together: all in the same eight.
    #[inline(always)]
    pub(super) fn tile<const R: usize>(&self, first: usize) -> QuantTile<R> {
        const { assert!(R > 0 && R <= ROWS_TOGETHER) };
        let inside = first % ROWS_TOGETHER;
        assert!(inside + R <= ROWS_TOGETHER && first + R <= self.rows, "row {first}");
        let stride = ROWS_TOGETHER.min(self.rows - (first - inside));
        let start = (first - inside) * self.groups + inside;
        // SAFETY: inside the three buffers, as checked here and in `new`.
        unsafe {
            QuantTile {
                bytes: self.bytes.add(start),
                scales: self.scales.add(start),
                sums: self.sums.add(start),
                stride,
                groups: self.groups,
                peak: self.peak,
            }
        }
    }
}

/// Rows of a [`Quants`] that lie together.
pub(super) const ROWS_TOGETHER: usize = 8;

/// `R` rows of 8-bit groups that lie together.
#[derive(Debug, Clone, Copy)]
pub(super) struct QuantTile<const R: usize> {
    bytes: *mut [i8; GROUP],
    scales: *mut f32,
    sums: *mut f32,
    stride: usize,
    groups: usize,
    peak: i8,
}

impl<const R: usize> QuantTile<R> {
    pub(super) fn groups(&self) -> usize {
        self.groups
    }

    /// Bytes, scales and sums of a group of all rows.
    ///
    /// # Safety
    /// `group` is below `groups()`, and nobody writes these rows meanwhile.
    #[inline(always)]
    pub(super) unsafe fn group<'a>(
        &self,
        group: usize,
    ) -> (&'a [[i8; GROUP]; R], &'a [f32; R], &'a [f32; R]) {
        let at = group * self.stride;
        // SAFETY: a group's `stride` rows, of which these are `R`, are inside the buffers.
        unsafe {
            (&*self.bytes.add(at).cast(), &*self.scales.add(at).cast(), &*self.sums.add(at).cast())
        }
    }
}

impl QuantTile<1> {
    /// Quantises 32 values into group `group`.
    #[inline(always)]
    pub(super) fn store<S: Isa>(&self, s: S, group: usize, x: [S::F; 2]) {
        assert!(group < self.groups);
        let q = math::quantise(s, x, self.peak);
        let at = group * self.stride;
        // SAFETY: inside the three buffers; the row is this unit's.
        unsafe {
            self.bytes.add(at).cast::<[[i8; LANES]; 2]>().write(q.bytes);
            self.scales.add(at).write(q.scale);
            self.sums.add(at).write(q.sum);
        }
    }
}

/// Rows of bf16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Halves {
    start: *mut u16,
    width: usize,
    rows: usize,
}

// SAFETY: under the discipline of this module.
unsafe impl Send for Halves {}
// SAFETY: under the discipline of this module.
unsafe impl Sync for Halves {}

impl Halves {
    pub(super) fn new(memory: Memory, buf: &HalfBuf, rows: usize) -> Self {
        assert!(buf.width.is_multiple_of(2), "{} values are no whole pairs", buf.width);
        Self { start: memory.at(buf.offset, rows * buf.width), width: buf.width, rows }
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> HalfRow {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: inside the buffer, as checked here and in `new`.
        HalfRow { start: unsafe { self.start.add(row * self.width) }, width: self.width }
    }
}

/// One row of bf16.
#[derive(Debug, Clone, Copy)]
pub(super) struct HalfRow {
    start: *mut u16,
    width: usize,
}

impl HalfRow {
    /// Where its values are.
    #[inline(always)]
    pub(super) fn values(self) -> *const u16 {
        self.start
    }

    /// 16 values to column `c` on, less those beyond the row.
    #[inline(always)]
    pub(super) fn store<S: Isa>(self, s: S, c: usize, x: S::F) {
        if c + LANES <= self.width {
            // SAFETY: inside the row, which is this unit's.
            return unsafe { s.write_bf16(x, self.start.add(c)) };
        }
        let mut halves = [0; LANES];
        // SAFETY: 16 values of our own.
        unsafe { s.write_bf16(x, halves.as_mut_ptr()) };
        for (i, half) in halves.into_iter().enumerate().take(self.width.saturating_sub(c)) {
            // SAFETY: inside the row, which is this unit's.
            unsafe { self.start.add(c + i).write(half) };
        }
    }
}

/// Where an op's output rows go.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sink {
    Full(Floats),
    Quant(Quants),
    Half(Halves),
}

impl Sink {
    pub(super) fn new(memory: Memory, activation: &Activation, rows: usize) -> Self {
        match activation {
            Activation::Full(buf) => Sink::Full(Floats::new(memory, buf, rows)),
            Activation::Quant(buf) => Sink::Quant(Quants::new(memory, buf, rows)),
            Activation::Half(buf) => Sink::Half(Halves::new(memory, buf, rows)),
        }
    }

    pub(super) fn width(&self) -> usize {
        match self {
            Sink::Full(floats) => floats.width(),
            Sink::Quant(quants) => quants.width(),
            Sink::Half(halves) => halves.width(),
        }
    }

    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> SinkRow {
        match self {
            Sink::Full(floats) => SinkRow::Full(floats.row(row)),
            Sink::Quant(quants) => SinkRow::Quant(quants.tile(row)),
            Sink::Half(halves) => SinkRow::Half(halves.row(row)),
        }
    }
}

/// One row of an op's output.
#[derive(Debug, Clone, Copy)]
pub(super) enum SinkRow {
    Full(Row),
    Quant(QuantTile<1>),
    Half(HalfRow),
}

impl SinkRow {
    /// 32 values to columns `c..end`, less those beyond. For 8-bit rows `c` and `end` are
    /// multiples of 32.
    #[inline(always)]
    pub(super) fn store<S: Isa>(self, s: S, c: usize, end: usize, x: [S::F; 2]) {
        match self {
            SinkRow::Full(row) => {
                row.store(s, c, x[0]);
                if c + LANES < end {
                    row.store(s, c + LANES, x[1]);
                }
            }
            SinkRow::Half(row) => {
                row.store(s, c, x[0]);
                if c + LANES < end {
                    row.store(s, c + LANES, x[1]);
                }
            }
            SinkRow::Quant(row) => row.store(s, c / GROUP, x),
        }
    }
}
