//! The second half of a greedy choice: outputs that a coarse matrix leaves in doubt, once more.
//! Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, Task};
use super::linear::LinearTask;
use crate::kernels::coarse::Coarse;
use crate::kernels::packed::PANEL;

/// How many standard deviations an output of the coarse matrix is trusted to be within. Errors of
/// weights are as good as independent of the row, and [`Coarse::errors`] are those of the worst
/// group, so that less would do: of a billion outputs two are further off than six even if all
/// groups were as bad.
const DEVIATIONS: f32 = 6.0;

/// [`Coarse`], when its first op is done; a unit is a row.
pub(super) struct RescoreTask<'a> {
    exact: LinearTask<'a>,
    errors: &'a [f32],
}

impl<'a> RescoreTask<'a> {
    pub(super) fn new(coarse: &'a Coarse, around: &Surroundings<'a>) -> Self {
        assert_eq!(coarse.errors.len() * PANEL, coarse.exact.output.width, "whole panels");
        Self { exact: LinearTask::new(&coarse.exact, around), errors: &coarse.errors }
    }

    #[inline(always)]
    fn row<S: Isa>(&self, s: S, row: usize) {
        let (outputs, doubt) = (self.exact.output.row(row), DEVIATIONS * self.exact.norm(row));
        // What the largest output is at least.
        let mut least = f32::NEG_INFINITY;
        for (panel, error) in self.errors.iter().enumerate() {
            least = least.max(s.peak(outputs.load(s, panel * PANEL)) - doubt * error);
        }
        for (panel, error) in self.errors.iter().enumerate() {
            let most = s.peak(outputs.load(s, panel * PANEL)) + doubt * error;
            // What is no number is not below.
            if most < least {
                continue;
            }
            self.exact.single(s, panel, row);
        }
    }
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
