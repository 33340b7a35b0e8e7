//! Matrix products over panels of 16 outputs. One tile function for every row count, so that a
//! row has the same bits in any batch. Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, LANES, Task};
use super::large::{product_large, product_minimum};
use super::math;
use super::rows::vector;
use super::views::{Floats, QuantTile, Quants, ROWS_TOGETHER};
use crate::kernels::ops::{Activation, Epilogue, Linear, QuantBuf};
use crate::kernels::packed::{PANEL, PackedFormat, Q4_GROUP_BYTES, q8_places};

/// Rows that go through a panel before the next: their activations stay in the first-level cache.
const ROWS_MAX: usize = 64;

/// Panels that a unit takes at most: they stay in the second-level cache while rows pass.
const PANELS_MAX: usize = 8;

/// [`Linear`]; a unit is a block of rows in a block of panels.
pub(super) struct LinearTask<'a> {
    op: &'a Linear,
    input: Input,
    pub(super) output: Floats,
    blocks: Blocks,
}

#[derive(Clone, Copy)]
enum Input {
    Full(Floats),
    Quant(Quants),
}

impl<'a> LinearTask<'a> {
    pub(super) fn new(op: &'a Linear, around: &Surroundings<'a>) -> Self {
        let rows = around.rows(op.rows);
        let input = match &op.input {
            Activation::Full(buf) => Input::Full(Floats::new(around.workspace, buf, rows)),
            Activation::Quant(buf) => Input::Quant(Quants::new(around.workspace, buf, rows)),
            Activation::Half(_) => panic!("bf16 rows are for HalfLinear"),
        };
        let width = match &input {
            Input::Full(floats) => floats.width(),
            Input::Quant(quants) => quants.width(),
        };
        assert_ne!(op.weight.format, PackedFormat::Bf16, "such weights are for HalfLinear");
        let quantised = op.weight.format != PackedFormat::F32;
        assert_eq!(quantised, matches!(input, Input::Quant(_)), "8-bit rows for such weights");
        if let (PackedFormat::Q8Low, Activation::Quant(buf)) = (op.weight.format, &op.input) {
            assert!(buf.peak <= QuantBuf::LOW, "low rows for low weights");
        }
        assert_eq!(width, op.weight.k, "a row is as wide as the weight's inputs");
        assert!(op.bias.as_ref().is_none_or(|bias| bias.len() == op.weight.n));
        let output = Floats::new(around.workspace, &op.output, rows);
        assert_eq!(output.width(), op.weight.n, "an output row is as wide as the weight's outputs");
        let blocks = Blocks::new(rows, op.weight.panels(), around.members);
        Self { op, input, output, blocks }
    }

    /// 8-bit rows through one panel.
    #[inline(always)]
    fn quantised<S: Isa>(&self, s: S, input: Quants, panel: usize, rows: Range<usize>) {
        let weight = &self.op.weight;
        let next = (panel + 1 < weight.panels()).then(|| weight.panel(panel + 1));
        let mut ahead = Ahead::new(next.unwrap_or_default(), rows.len(), input.groups());
        let mut r = rows.start;
        while r < rows.end {
            r += match rows.end - r {
                8.. if S::WIDE => self.quantised_tile::<S, 8>(s, input, panel, r, &mut ahead),
                4.. => self.quantised_tile::<S, 4>(s, input, panel, r, &mut ahead),
                2.. => self.quantised_tile::<S, 2>(s, input, panel, r, &mut ahead),
                _ => self.quantised_tile::<S, 1>(s, input, panel, r, &mut ahead),
            };
        }
    }

    #[inline(always)]
    fn quantised_tile<S: Isa, const R: usize>(
        &self,
        s: S,
        input: Quants,
        panel: usize,
        first: usize,
        ahead: &mut Ahead<'_>,
    ) -> usize {
        let (rows, bytes) = (input.tile::<R>(first), self.op.weight.panel(panel));
        let sums = match self.op.weight.format {
            PackedFormat::Q8 => product_bytes::<S, R, false>(s, bytes, &rows, ahead),
            PackedFormat::Q8Low => product_bytes::<S, R, true>(s, bytes, &rows, ahead),
            PackedFormat::Q4 | PackedFormat::F32 => product_q4(s, bytes, &rows, ahead),
            PackedFormat::Q8Minimum => product_minimum(s, bytes, &rows, ahead),
            large => product_large(s, large, bytes, &rows, ahead),
        };
        for (r, sum) in sums.into_iter().enumerate() {
            self.finish(s, sum, first + r, panel);
        }
        R
    }

    /// An 8-bit row through one panel.
    #[inline(always)]
    pub(super) fn single<S: Isa>(&self, s: S, panel: usize, row: usize) {
        let Input::Quant(input) = self.input else { panic!("8-bit rows only") };
        let mut ahead = Ahead::new(&[], 1, input.groups());
        self.quantised_tile::<S, 1>(s, input, panel, row, &mut ahead);
    }

    /// The sum of squares of each group of an 8-bit row.
    #[inline(always)]
    pub(super) fn energies(&self, row: usize, energies: &mut [f32]) {
        let Input::Quant(input) = self.input else { panic!("8-bit rows only") };
        let tile = input.tile::<1>(row);
        assert_eq!(energies.len(), tile.groups());
        for (group, energy) in energies.iter_mut().enumerate() {
            // SAFETY: one of its groups, which only earlier ops wrote.
            let ([bytes], [scale], _) = unsafe { tile.group(group) };
            let mut sum = 0;
            for byte in bytes {
                sum += i32::from(*byte) * i32::from(*byte);
            }
            *energy = scale * scale * sum as f32;
        }
    }

    /// f32 rows through a block of panels.
    #[inline(always)]
    fn full<S: Isa>(&self, s: S, input: Floats, panels: Range<usize>, rows: Range<usize>) {
        let mut p = panels.start;
        while p < panels.end {
            p += match panels.end - p {
                4.. if S::WIDE => self.full_panels::<S, 4>(s, input, p, rows.clone()),
                2.. => self.full_panels::<S, 2>(s, input, p, rows.clone()),
                _ => self.full_panels::<S, 1>(s, input, p, rows.clone()),
            };
        }
    }

    #[inline(always)]
    fn full_panels<S: Isa, const P: usize>(
        &self,
        s: S,
        input: Floats,
        panel: usize,
        rows: Range<usize>,
    ) -> usize {
        let mut r = rows.start;
        while r < rows.end {
            r += match rows.end - r {
                6.. if S::WIDE => self.full_tile::<S, 6, P>(s, input, panel, r),
                4.. if S::WIDE => self.full_tile::<S, 4, P>(s, input, panel, r),
                // Twelve sums fill few registers best in one panel.
                6.. => {
                    for p in panel..panel + P {
                        self.full_tile::<S, 6, 1>(s, input, p, r);
                    }
                    6
                }
                2.. => self.full_tile::<S, 2, P>(s, input, panel, r),
                _ => self.full_tile::<S, 1, P>(s, input, panel, r),
            };
        }
        P
    }

    #[inline(always)]
    fn full_tile<S: Isa, const R: usize, const P: usize>(
        &self,
        s: S,
        input: Floats,
        panel: usize,
        first: usize,
    ) -> usize {
        let k = self.op.weight.k;
        let rows: [*const f32; R] =
            std::array::from_fn(|r| input.row(first + r).columns(0, k).cast_const());
        let panels: [&[u8]; P] = std::array::from_fn(|p| self.op.weight.panel(panel + p));
        for (r, sums) in product_f32(s, &panels, &rows, k).into_iter().enumerate() {
            for (p, sum) in sums.into_iter().enumerate() {
                self.finish(s, sum, first + r, panel + p);
            }
        }
        R
    }

    /// Bias and epilogue of 16 outputs.
    #[inline(always)]
    fn finish<S: Isa>(&self, s: S, sum: S::F, row: usize, panel: usize) {
        let (row, c) = (self.output.row(row), panel * PANEL);
        let y = match &self.op.bias {
            Some(bias) => s.add(sum, vector(s, bias, c)),
            None => sum,
        };
        let y = match self.op.epilogue {
            Epilogue::Store => y,
            Epilogue::Add => s.add(row.load(s, c), y),
            Epilogue::Gelu => math::gelu(s, y),
            Epilogue::Tanh => math::tanh(s, y),
            Epilogue::Relu => s.where_less(y, s.splat(0.0), s.splat(0.0), y),
        };
        row.store(s, c, y);
    }
}

impl Task for LinearTask<'_> {
    const BYTES: bool = true;

    fn units(&self) -> usize {
        self.blocks.units()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        for unit in units {
            let (panels, rows) = self.blocks.of(unit);
            match self.input {
                Input::Full(input) => self.full(s, input, panels, rows),
                Input::Quant(input) => {
                    for panel in panels {
                        self.quantised(s, input, panel, rows.clone());
                    }
                }
            }
        }
    }
}

/// A panel that is asked for while rows go through the one before it: the processor's own reading
/// ahead keeps the pace of the first rows only, and memory would rest during those after them.
pub(super) struct Ahead<'a> {
    panel: &'a [u8],
    /// Bytes for each group of each row.
    share: usize,
    /// Bytes that it is time for.
    due: usize,
    /// Bytes that were asked for, a cache line at a time.
    asked: usize,
}

impl<'a> Ahead<'a> {
    fn new(panel: &'a [u8], rows: usize, groups: usize) -> Self {
        Self { panel, share: panel.len().div_ceil(rows * groups), due: 0, asked: 0 }
    }

    /// `R` rows go through a group.
    #[inline(always)]
    pub(super) fn ask<S: Isa, const R: usize>(&mut self, s: S) {
        self.due += R * self.share;
        while self.asked < self.due {
            let Some(line) = self.panel.get(self.asked) else { return };
            s.prefetch(line);
            self.asked += 64;
        }
    }
}

/// How a product falls into units: a block of rows in a block of panels each.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    rows: usize,
    row_block: usize,
    panels: usize,
    panel_block: usize,
}

impl Blocks {
    pub(super) fn new(rows: usize, panels: usize, members: usize) -> Self {
        let row_blocks = rows.div_ceil(ROWS_MAX).max(1);
        let row_block =
            rows.div_ceil(row_blocks).next_multiple_of(ROWS_TOGETHER).max(ROWS_TOGETHER);
        // Eight units a member, so that a slow neighbour is waited for an eighth at most.
        let panel_block = panels * row_blocks / (8 * members);
        let panel_block = match panel_block {
            0..4 => panel_block.max(1),
            _ => panel_block.min(PANELS_MAX) / 4 * 4,
        };
        Self { rows, row_block, panels, panel_block }
    }

    fn row_blocks(&self) -> usize {
        self.rows.div_ceil(self.row_block)
    }

    pub(super) fn units(&self) -> usize {
        self.row_blocks() * self.panels.div_ceil(self.panel_block)
    }

    /// Panels and rows of a unit.
    #[inline(always)]
    pub(super) fn of(&self, unit: usize) -> (Range<usize>, Range<usize>) {
        let row_blocks = self.row_blocks();
        let first = unit / row_blocks * self.panel_block;
        let panels = first..self.panels.min(first + self.panel_block);
        let first = unit % row_blocks * self.row_block;
        (panels, first..self.rows.min(first + self.row_block))
    }
}

/// `R` rows of 8-bit groups by a panel of 4-bit groups: for each group in ascending order
/// `acc = fma(fma(scale, isum, minimum × Σq), scale_x, acc)`.
#[inline(always)]
fn product_q4<S: Isa, const R: usize>(
    s: S,
    panel: &[u8],
    rows: &QuantTile<R>,
    ahead: &mut Ahead<'_>,
) -> [S::F; R] {
    let panel = panel.as_chunks::<Q4_GROUP_BYTES>().0;
    assert_eq!(panel.len(), rows.groups());
    let mut acc = [s.splat(0.0); R];
    for (g, weights) in panel.iter().enumerate() {
        ahead.ask::<S, R>(s);
        let (header, values) = weights.split_at(64);
        let values = values.try_into().expect("256 bytes");
        // SAFETY: there are as many groups as in the rows, which only earlier ops wrote; a
        // group's header is 16 scales and 16 minimums.
        unsafe {
            let (bytes, scales, sums) = rows.group(g);
            let dots = s.dot_q4(values, bytes);
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

/// As [`product_q4`] with 8-bit groups: `acc = fma(scale × isum, scale_x, acc)`.
#[inline(always)]
fn product_bytes<S: Isa, const R: usize, const LOW: bool>(
    s: S,
    panel: &[u8],
    rows: &QuantTile<R>,
    ahead: &mut Ahead<'_>,
) -> [S::F; R] {
    let mut acc = [s.splat(0.0); R];
    // Group by group: two at once would need more registers than there are.
    for g in 0..rows.groups() {
        ahead.ask::<S, R>(s);
        let (scale, values) = q8_places(g);
        let (scale, values) = (&panel[scale..scale + 32], &panel[values..values + 512]);
        let values = values.try_into().expect("512 bytes");
        // SAFETY: the group is one of the rows', which only earlier ops wrote; there are 16 scales.
        unsafe {
            let (bytes, scales, sums) = rows.group(g);
            let dots = match LOW {
                true => s.dot_low(values, bytes, sums),
                false => s.dot_q8(values, bytes, sums),
            };
            let scale = s.read_half(scale.as_ptr().cast());
            for r in 0..R {
                acc[r] = s.fma(s.mul(scale, dots[r]), s.splat(scales[r]), acc[r]);
            }
        }
    }
    acc
}

/// `R` rows by `P` panels of f32: one chain of fused multiply-adds for each output.
#[inline(always)]
fn product_f32<S: Isa, const R: usize, const P: usize>(
    s: S,
    panels: &[&[u8]; P],
    rows: &[*const f32; R],
    k: usize,
) -> [[S::F; P]; R] {
    let panels: [*const f32; P] = std::array::from_fn(|p| {
        assert_eq!(panels[p].len(), k * PANEL * 4);
        panels[p].as_ptr().cast()
    });
    let mut acc = [[s.splat(0.0); P]; R];
    for i in 0..k {
        // SAFETY: panels have `k` lines as checked, rows `k` values as the caller says.
        unsafe {
            let mut weights = [s.splat(0.0); P];
            for p in 0..P {
                weights[p] = s.read(panels[p].add(i * LANES));
            }
            for r in 0..R {
                let x = s.splat(*rows[r].add(i));
                for p in 0..P {
                    acc[r][p] = s.fma(x, weights[p], acc[r][p]);
                }
            }
        }
    }
    acc
}
