//! Matrix products over panels of 16 outputs. One tile function for every row count, so that a
//! row has the same bits in any batch. Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, LANES, Task};
use super::math;
use super::rows::vector;
use super::views::{Floats, QuantRow, Quants};
use crate::kernels::ops::{Activation, Epilogue, Linear};
use crate::kernels::packed::{GROUP, PANEL, PackedFormat, header_bytes};

/// Rows that go through a panel before the next: their activations stay in the first-level cache.
const ROWS_TOGETHER: usize = 64;

/// Panels that a unit takes at most: they stay in the second-level cache while rows pass.
const PANELS_TOGETHER: usize = 8;

/// [`Linear`]; a unit is a block of rows in a block of panels.
pub(super) struct LinearTask<'a> {
    op: &'a Linear,
    input: Input,
    output: Floats,
    rows: usize,
    row_block: usize,
    panel_block: usize,
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
        };
        let width = match &input {
            Input::Full(floats) => floats.width(),
            Input::Quant(quants) => quants.width(),
        };
        let quantised = op.weight.format != PackedFormat::F32;
        assert_eq!(quantised, matches!(input, Input::Quant(_)), "8-bit rows for such weights");
        assert_eq!(width, op.weight.k, "a row is as wide as the weight's inputs");
        assert!(op.bias.as_ref().is_none_or(|bias| bias.len() == op.weight.n));
        let output = Floats::new(around.workspace, &op.output, rows);
        assert_eq!(output.width(), op.weight.n, "an output row is as wide as the weight's outputs");

        let row_blocks = rows.div_ceil(ROWS_TOGETHER).max(1);
        let row_block = rows.div_ceil(row_blocks).next_multiple_of(8).max(8);
        // Eight units a member, so that a slow neighbour is waited for an eighth at most.
        let panel_block = op.weight.panels() * row_blocks / (8 * around.members);
        let panel_block = match panel_block {
            0..4 => panel_block.max(1),
            _ => panel_block.min(PANELS_TOGETHER) / 4 * 4,
        };
        Self { op, input, output, rows, row_block, panel_block }
    }

    fn row_blocks(&self) -> usize {
        self.rows.div_ceil(self.row_block)
    }

    /// 8-bit rows through one panel.
    #[inline(always)]
    fn quantised<S: Isa>(&self, s: S, input: Quants, panel: usize, rows: Range<usize>) {
        let mut r = rows.start;
        while r < rows.end {
            r += match rows.end - r {
                8.. if S::WIDE => self.quantised_tile::<S, 8>(s, input, panel, r),
                4.. if S::WIDE => self.quantised_tile::<S, 4>(s, input, panel, r),
                2.. => self.quantised_tile::<S, 2>(s, input, panel, r),
                _ => self.quantised_tile::<S, 1>(s, input, panel, r),
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
    ) -> usize {
        let rows: [QuantRow; R] = std::array::from_fn(|r| input.row(first + r));
        let groups = self.op.weight.k / GROUP;
        let bytes = self.op.weight.panel(panel);
        let sums = match self.op.weight.format {
            PackedFormat::Q8 => product_q8(s, bytes, &rows, groups),
            _ => product_q4(s, bytes, &rows, groups),
        };
        for (r, sum) in sums.into_iter().enumerate() {
            self.finish(s, sum, first + r, panel);
        }
        R
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
        let y = self.op.bias.as_ref().map_or(sum, |bias| s.add(sum, vector(s, bias, c)));
        let y = match self.op.epilogue {
            Epilogue::Store => y,
            Epilogue::Add => s.add(row.load(s, c), y),
            Epilogue::Gelu => math::gelu(s, y),
        };
        row.store(s, c, y);
    }
}

impl Task for LinearTask<'_> {
    fn units(&self) -> usize {
        self.row_blocks() * self.op.weight.panels().div_ceil(self.panel_block)
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let row_blocks = self.row_blocks();
        for unit in units {
            let first = unit / row_blocks * self.panel_block;
            let panels = first..self.op.weight.panels().min(first + self.panel_block);
            let first = unit % row_blocks * self.row_block;
            let rows = first..self.rows.min(first + self.row_block);
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

/// `R` rows of 8-bit groups by a panel of 4-bit groups: for each group in ascending order
/// `acc = fma(fma(scale, isum, minimum × Σq), scale_x, acc)`.
#[inline(always)]
fn product_q4<S: Isa, const R: usize>(
    s: S,
    panel: &[u8],
    rows: &[QuantRow; R],
    groups: usize,
) -> [S::F; R] {
    let (header, values) = panel.split_at(header_bytes(PackedFormat::Q4, groups * GROUP));
    assert!(values.len() == groups * 256 && header.len() == groups * 64);
    let (header, values) = (header.as_ptr().cast::<u16>(), values.as_ptr());
    let mut acc = [s.splat(0.0); R];
    for g in 0..groups {
        // SAFETY: group `g` lies inside header, values and rows: the lengths of the first two are
        // checked above, rows are as wide as the weight.
        unsafe {
            let bytes: [*const i8; R] = std::array::from_fn(|r| rows[r].bytes.add(g * GROUP));
            let dots = s.dot_q4(values.add(g * 256), &bytes);
            let scale = s.read_half(header.add(g * 2 * LANES));
            let minimum = s.read_half(header.add((g * 2 + 1) * LANES));
            for r in 0..R {
                let low = s.mul(minimum, s.splat(*rows[r].sums.add(g)));
                let group = s.fma(scale, dots[r], low);
                acc[r] = s.fma(group, s.splat(*rows[r].scales.add(g)), acc[r]);
            }
        }
    }
    acc
}

/// As [`product_q4`] with 8-bit groups: `acc = fma(scale × isum, scale_x, acc)`.
#[inline(always)]
fn product_q8<S: Isa, const R: usize>(
    s: S,
    panel: &[u8],
    rows: &[QuantRow; R],
    groups: usize,
) -> [S::F; R] {
    let (header, values) = panel.split_at(header_bytes(PackedFormat::Q8, groups * GROUP));
    assert!(values.len() == groups * 512 && header.len() >= groups * 32);
    let (header, values) = (header.as_ptr().cast::<u16>(), values.as_ptr());
    let mut acc = [s.splat(0.0); R];
    for g in 0..groups {
        // SAFETY: as in `product_q4`.
        unsafe {
            let bytes: [*const i8; R] = std::array::from_fn(|r| rows[r].bytes.add(g * GROUP));
            let sums: [S::F; R] = std::array::from_fn(|r| s.splat(*rows[r].sums.add(g)));
            let dots = s.dot_q8(values.add(g * 512), &bytes, &sums);
            let scale = s.read_half(header.add(g * LANES));
            for r in 0..R {
                let group = s.mul(scale, dots[r]);
                acc[r] = s.fma(group, s.splat(*rows[r].scales.add(g)), acc[r]);
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
            let weights: [S::F; P] = std::array::from_fn(|p| s.read(panels[p].add(i * LANES)));
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
