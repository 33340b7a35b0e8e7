//! The second half of a greedy choice: outputs that a coarse matrix leaves in doubt, once more.
//! Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, Task};
use super::linear::LinearTask;
use super::views::Row;
use crate::kernels::coarse::Coarse;
use crate::kernels::packed::PANEL;

/// How many standard deviations an output of the coarse matrix is trusted to be within: of a
/// billion two are further off. Errors of weights are as good as independent of the row, and
/// every output of a panel is taken for its worst. SmolLM2 leaves 10 of its 3,072 panels in doubt,
/// for one token in four more than 36, at most 301 (366 tokens, 2026-11).
const DEVIATIONS: f32 = 6.0;

/// Panels that are looked at together first: most have nothing to offer.
const BLOCK: usize = 16;

/// [`Coarse`], when its first op is done; a unit is a row.
pub(super) struct RescoreTask<'a> {
    exact: LinearTask<'a>,
    coarse: &'a Coarse,
    /// The largest of its errors.
    worst: f32,
}

impl<'a> RescoreTask<'a> {
    pub(super) fn new(coarse: &'a Coarse, around: &Surroundings<'a>) -> Self {
        assert_eq!(coarse.errors.len() * PANEL, coarse.exact.output.width, "whole panels");
        let worst = coarse.errors.iter().copied().fold(0.0, f32::max);
        Self { exact: LinearTask::new(&coarse.exact, around), coarse, worst }
    }

    #[inline(always)]
    fn row<S: Isa>(&self, s: S, row: usize) {
        let Coarse { errors, spread, .. } = self.coarse;
        let outputs = self.exact.output.row(row);
        let blocks = || (0..errors.len()).step_by(BLOCK);
        let of_block = |first: usize| first..errors.len().min(first + BLOCK);
        let (mut first, mut most) = (0, f32::NEG_INFINITY);
        for block in blocks() {
            let peak = peak(s, outputs, of_block(block));
            if peak > most {
                (first, most) = (block, peak);
            }
        }
        while first + 1 < errors.len() && peak(s, outputs, first..first + 1) < most {
            first += 1;
        }
        self.exact.single(s, first, row);
        let mut least = peak(s, outputs, first..first + 1);
        let doubt = DEVIATIONS * self.exact.norm(row, spread);
        for block in blocks() {
            // What is no number is not below.
            if peak(s, outputs, of_block(block)) + doubt * self.worst < least {
                continue;
            }
            for panel in of_block(block) {
                let lanes = panel..panel + 1;
                if panel == first || peak(s, outputs, lanes.clone()) + doubt * errors[panel] < least
                {
                    continue;
                }
                self.exact.single(s, panel, row);
                least = least.max(peak(s, outputs, lanes));
            }
        }
    }
}

/// The largest output of these panels.
#[inline(always)]
fn peak<S: Isa>(s: S, outputs: Row, panels: Range<usize>) -> f32 {
    let mut peak = s.splat(f32::NEG_INFINITY);
    for panel in panels {
        // The second operand wins over NaN.
        peak = s.max(outputs.load(s, panel * PANEL), peak);
    }
    s.peak(peak)
}

impl Task for RescoreTask<'_> {
    const BYTES: bool = true;

    fn units(&self) -> usize {
        self.exact.output.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        for row in units {
            self.row(s, row);
        }
    }
}
