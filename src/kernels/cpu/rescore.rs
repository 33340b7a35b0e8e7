//! The second half of a greedy choice: outputs that a coarse matrix leaves in doubt, once more.
//! Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, Task};
use super::linear::LinearTask;
use super::views::Row;
use crate::kernels::coarse::{BLOCK, Coarse, GROUPS_MAX};
use crate::kernels::packed::{GROUP, PANEL};

/// How many standard deviations an output of the coarse matrix is trusted to be within: of a
/// billion two are further off. Errors of weights are as good as independent of the row.
const DEVIATIONS: f32 = 6.0;

/// By how much of itself an output may be off for the rounding of sums.
const ROUNDING: f32 = 1e-5;

/// [`Coarse`], when its first op is done; a unit is a row.
pub(super) struct RescoreTask<'a> {
    exact: LinearTask<'a>,
    coarse: &'a Coarse,
    panels: usize,
    groups: usize,
}

impl<'a> RescoreTask<'a> {
    pub(super) fn new(coarse: &'a Coarse, around: &Surroundings<'a>) -> Self {
        let weight = &coarse.exact.weight;
        let (panels, groups) = (weight.panels(), weight.k / GROUP);
        assert!(groups <= GROUPS_MAX && panels * PANEL == weight.n, "whole panels");
        assert_eq!(coarse.errors.len(), panels * groups);
        assert_eq!(coarse.block_errors.len(), panels.div_ceil(BLOCK) * groups);
        Self { exact: LinearTask::new(&coarse.exact, around), coarse, panels, groups }
    }

    #[inline(always)]
    fn row<S: Isa>(&self, s: S, row: usize) {
        let outputs = self.exact.output.row(row);
        let block = |index: usize| index * BLOCK..self.panels.min((index + 1) * BLOCK);
        let blocks = self.panels.div_ceil(BLOCK);
        let (mut first, mut most) = (0, f32::NEG_INFINITY);
        for index in 0..blocks {
            let peak = peak(s, outputs, block(index));
            if peak > most {
                (first, most) = (index * BLOCK, peak);
            }
        }
        while first + 1 < self.panels && peak(s, outputs, first..first + 1) < most {
            first += 1;
        }
        self.exact.single(s, first, row);
        let mut least = peak(s, outputs, first..first + 1);
        let mut energies = [0.0; GROUPS_MAX];
        let energies = &mut energies[..self.groups];
        self.exact.energies(row, energies);
        // Whether the largest of them cannot be the largest of all. One that is no number can.
        let beaten = |peak: f32, errors: &[f32], least: f32| {
            let mut variance = 0.0;
            for (error, energy) in errors.iter().zip(&*energies) {
                variance += error * energy;
            }
            let most = peak + DEVIATIONS * variance.sqrt() + ROUNDING * peak.abs();
            peak > f32::NEG_INFINITY && most < least
        };
        for index in 0..blocks {
            let errors = &self.coarse.block_errors[index * self.groups..][..self.groups];
            if beaten(peak(s, outputs, block(index)), errors, least) {
                continue;
            }
            for panel in block(index) {
                let errors = &self.coarse.errors[panel * self.groups..][..self.groups];
                let this = panel..panel + 1;
                if panel == first || beaten(peak(s, outputs, this.clone()), errors, least) {
                    continue;
                }
                self.exact.single(s, panel, row);
                least = least.max(peak(s, outputs, this));
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
