//! Products of bf16 rows and weights, and the rounding of f32 rows. Tiles share each load of a
//! panel among rows and each broadcast of a pair among panels. Knows no model.

#![allow(unsafe_code)]
#![expect(clippy::needless_range_loop, reason = "tiles are indexed by row and column")]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, LANES, Task};
use super::linear::Blocks;
use super::math;
use super::rows::vector;
use super::views::{Floats, HalfRow, Halves, Row, Sink};
use crate::kernels::ops::{Convert, Epilogue, HalfLinear};
use crate::kernels::packed::{PANEL, PackedFormat};

/// [`HalfLinear`]; a unit is a block of rows in a block of panels.
pub(super) struct HalfLinearTask<'a> {
    op: &'a HalfLinear,
    input: Halves,
    output: Output,
    blocks: Blocks,
}

#[derive(Clone, Copy)]
enum Output {
    Full(Floats),
    Half(Halves),
}

/// A row of the output.
#[derive(Clone, Copy)]
enum Place {
    Full(Row),
    Half(HalfRow),
}

impl<'a> HalfLinearTask<'a> {
    pub(super) fn new(op: &'a HalfLinear, around: &Surroundings<'a>) -> Self {
        let rows = around.rows(op.rows);
        let input = Halves::new(around.workspace, &op.input, rows);
        assert_eq!(op.weight.format, PackedFormat::Bf16, "bf16 rows by bf16 weights");
        assert_eq!(input.width(), op.weight.k, "a row is as wide as the weight's inputs");
        assert!(op.bias.as_ref().is_none_or(|bias| bias.len() == op.weight.n));
        assert_eq!(op.output.width(), op.weight.n, "an output row fits the weight's outputs");
        let output = match Sink::new(around.workspace, &op.output, rows) {
            Sink::Full(floats) => Output::Full(floats),
            Sink::Half(halves) => Output::Half(halves),
            Sink::Quant(_) => panic!("8-bit rows need a conversion of their own"),
        };
        let adds = op.epilogue == Epilogue::Add;
        assert!(!adds || matches!(output, Output::Full(_)), "sums stay in f32");
        let blocks = Blocks::new(rows, op.weight.panels(), around.members);
        Self { op, input, output, blocks }
    }

    #[inline(always)]
    fn panels<S: Isa, const P: usize>(&self, s: S, panel: usize, rows: Range<usize>) -> usize {
        let mut r = rows.start;
        while r < rows.end {
            r += match rows.end - r {
                6.. if S::WIDE => self.tile::<S, 6, P>(s, panel, r),
                4.. if S::WIDE => self.tile::<S, 4, P>(s, panel, r),
                // Eight sums and the halves of a pair fill few registers.
                4.. => {
                    for p in panel..panel + P {
                        self.tile::<S, 4, 1>(s, p, r);
                    }
                    4
                }
                2.. => self.tile::<S, 2, P>(s, panel, r),
                _ => self.tile::<S, 1, P>(s, panel, r),
            };
        }
        P
    }

    #[inline(always)]
    fn tile<S: Isa, const R: usize, const P: usize>(
        &self,
        s: S,
        panel: usize,
        first: usize,
    ) -> usize {
        let rows: [*const u16; R] = std::array::from_fn(|r| self.input.row(first + r).values());
        let panels: [&[u8]; P] = std::array::from_fn(|p| self.op.weight.panel(panel + p));
        let sums = product(s, &panels, &rows, self.op.weight.k);
        for r in 0..R {
            let place = match &self.output {
                Output::Full(floats) => Place::Full(floats.row(first + r)),
                Output::Half(halves) => Place::Half(halves.row(first + r)),
            };
            for p in 0..P {
                self.finish(s, sums[r][p], place, (panel + p) * PANEL);
            }
        }
        R
    }

    /// Bias and epilogue of 16 outputs from column `c` on.
    #[inline(always)]
    fn finish<S: Isa>(&self, s: S, sum: S::F, place: Place, c: usize) {
        let y = match &self.op.bias {
            Some(bias) => s.add(sum, vector(s, bias, c)),
            None => sum,
        };
        let y = match self.op.epilogue {
            Epilogue::Store => y,
            Epilogue::Add => match place {
                Place::Full(row) => s.add(row.load(s, c), y),
                Place::Half(_) => unreachable!("`new` refuses it"),
            },
            Epilogue::Gelu => math::gelu(s, y),
            Epilogue::Tanh => math::tanh(s, y),
            Epilogue::Relu => s.where_less(y, s.splat(0.0), s.splat(0.0), y),
        };
        match place {
            Place::Full(row) => row.store(s, c, y),
            Place::Half(row) => row.store(s, c, y),
        }
    }
}

impl Task for HalfLinearTask<'_> {
    const HALVES: bool = true;

    fn units(&self) -> usize {
        self.blocks.units()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        for unit in units {
            let (panels, rows) = self.blocks.of(unit);
            let mut p = panels.start;
            while p < panels.end {
                p += match panels.end - p {
                    4.. if S::WIDE => self.panels::<S, 4>(s, p, rows.clone()),
                    2.. => self.panels::<S, 2>(s, p, rows.clone()),
                    _ => self.panels::<S, 1>(s, p, rows.clone()),
                };
            }
        }
    }
}

/// `R` rows by `P` panels: one chain for each output.
#[inline(always)]
fn product<S: Isa, const R: usize, const P: usize>(
    s: S,
    panels: &[&[u8]; P],
    rows: &[*const u16; R],
    k: usize,
) -> [[S::F; P]; R] {
    let panels: [*const u16; P] = std::array::from_fn(|p| {
        assert_eq!(panels[p].len(), k * PANEL * 2);
        panels[p].as_ptr().cast()
    });
    let mut acc = [[s.splat(0.0); P]; R];
    for pair in 0..k / 2 {
        // SAFETY: panels have `k / 2` lines as checked, rows `k` values as the caller says.
        unsafe {
            let mut weights = [s.read_pairs(panels[0].add(pair * 2 * LANES)); P];
            for p in 1..P {
                weights[p] = s.read_pairs(panels[p].add(pair * 2 * LANES));
            }
            for r in 0..R {
                let x = s.splat_pair(rows[r].add(pair * 2));
                for p in 0..P {
                    acc[r][p] = s.dot_pairs(weights[p], x, acc[r][p]);
                }
            }
        }
    }
    acc
}

/// [`Convert`]; a unit is a row.
pub(super) struct ConvertTask {
    input: Floats,
    output: Sink,
}

impl ConvertTask {
    pub(super) fn new(op: &Convert, around: &Surroundings<'_>) -> Self {
        let rows = around.rows(op.rows);
        let input = Floats::new(around.workspace, &op.input, rows);
        let output = Sink::new(around.workspace, &op.output, rows);
        assert_eq!(input.width(), output.width());
        Self { input, output }
    }
}

impl Task for ConvertTask {
    fn units(&self) -> usize {
        self.input.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let width = self.input.width();
        for r in units {
            let (row, output) = (self.input.row(r), self.output.row(r));
            for c in (0..width).step_by(2 * LANES) {
                output.store(s, c, width, [row.load(s, c), row.load(s, c + LANES)]);
            }
        }
    }
}
