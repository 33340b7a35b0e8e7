//! Ops that work row by row: embedding, norms, gated SiLU, gather, pooling.

#![allow(unsafe_code)]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, LANES, Task};
use super::math;
use super::views::{Floats, Row, Sink};
use crate::kernels::batch::Batch;
use crate::kernels::ops::{Embed, GatedSilu, Gather, Norm, Pool, PoolKind};

/// [`Embed`]; a unit is a row.
pub(super) struct EmbedTask<'a> {
    op: &'a Embed,
    batch: &'a Batch,
    output: Floats,
}

impl<'a> EmbedTask<'a> {
    pub(super) fn new(op: &'a Embed, around: &Surroundings<'a>) -> Self {
        let output = Floats::new(around.workspace, &op.output, around.batch.tokens.len());
        assert_eq!(op.table.k, output.width(), "a table row fills an output row");
        Self { op, batch: around.batch, output }
    }
}

impl Task for EmbedTask<'_> {
    fn units(&self) -> usize {
        self.batch.tokens.len()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, _: S, units: Range<usize>) {
        let width = self.output.width();
        for r in units {
            // SAFETY: the row is this unit's.
            let row = unsafe { self.output.row(r).values_mut() };
            self.op.table.read_row(self.batch.tokens[r] as usize, row);
            if let Some(positions) = &self.op.positions {
                let start = self.batch.positions[r] as usize * width;
                let position = &positions[start..start + width];
                row.iter_mut().zip(position).for_each(|(value, p)| *value += p);
            }
            if let Some(constant) = &self.op.constant {
                assert_eq!(constant.len(), width);
                row.iter_mut().zip(constant.iter()).for_each(|(value, c)| *value += c);
            }
        }
    }
}

/// [`Norm`]; a unit is a row.
pub(super) struct NormTask<'a> {
    op: &'a Norm,
    input: Floats,
    output: Sink,
}

impl<'a> NormTask<'a> {
    pub(super) fn new(op: &'a Norm, around: &Surroundings<'a>) -> Self {
        let rows = around.rows(op.rows);
        let input = Floats::new(around.workspace, &op.input, rows);
        let output = Sink::new(around.workspace, &op.output, rows);
        assert_eq!(op.weight.len(), input.width(), "one scale a value");
        assert_eq!(output.width(), input.width());
        assert!(op.bias.as_ref().is_none_or(|bias| bias.len() == input.width()));
        Self { op, input, output }
    }
}

impl Task for NormTask<'_> {
    fn units(&self) -> usize {
        self.input.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let width = self.input.width();
        let count = width as f32;
        for r in units {
            let row = self.input.row(r);
            if let Some(bias) = &self.op.bias {
                let mean = total(s, row, |x, sum| s.add(sum, x)) / count;
                let shift = s.splat(mean);
                // Lanes beyond the row would count as -mean: they are zero by their weight.
                let squares = centred_squares(s, row, mean);
                let inverse = s.splat(1.0 / (squares / count + self.op.eps).sqrt());
                self.output.fill(s, r, 0..width, |c| {
                    let x = s.mul(s.sub(row.load(s, c), shift), inverse);
                    s.fma(x, vector(s, &self.op.weight, c), vector(s, bias, c))
                });
            } else {
                let squares = total(s, row, |x, sum| s.fma(x, x, sum));
                let inverse = s.splat(1.0 / (squares / count + self.op.eps).sqrt());
                self.output.fill(s, r, 0..width, |c| {
                    let x = s.mul(row.load(s, c), inverse);
                    s.mul(x, vector(s, &self.op.weight, c))
                });
            }
        }
    }
}

/// Folds a row into 16 lanes (zeros beyond its end) and adds them.
#[inline(always)]
fn total<S: Isa>(s: S, row: Row, fold: impl Fn(S::F, S::F) -> S::F) -> f32 {
    let mut sum = s.splat(0.0);
    for c in (0..row.width()).step_by(LANES) {
        sum = fold(row.load(s, c), sum);
    }
    s.sum(sum)
}

/// Σ (x - mean)², in 16 lanes.
#[inline(always)]
fn centred_squares<S: Isa>(s: S, row: Row, mean: f32) -> f32 {
    let (whole, shift) = (row.width() / LANES * LANES, s.splat(mean));
    let mut sum = s.splat(0.0);
    for c in (0..whole).step_by(LANES) {
        let x = s.sub(row.load(s, c), shift);
        sum = s.fma(x, x, sum);
    }
    if whole < row.width() {
        let mut rest = [0.0; LANES];
        for (i, x) in rest.iter_mut().enumerate().take(row.width() - whole) {
            *x = row.get(whole + i) - mean;
        }
        let x = s.load(&rest);
        sum = s.fma(x, x, sum);
    }
    s.sum(sum)
}

/// 16 parameters from `c` on, zeros beyond the end.
#[inline(always)]
pub(super) fn vector<S: Isa>(s: S, values: &[f32], c: usize) -> S::F {
    if let Some(lanes) = values[c..].first_chunk() {
        return s.load(lanes);
    }
    let mut lanes = [0.0; LANES];
    lanes[..values.len() - c].copy_from_slice(&values[c..]);
    s.load(&lanes)
}

/// [`GatedSilu`]; a unit is a row.
pub(super) struct GatedSiluTask {
    input: Floats,
    output: Sink,
}

impl GatedSiluTask {
    pub(super) fn new(op: &GatedSilu, around: &Surroundings<'_>) -> Self {
        let rows = around.batch.tokens.len();
        let input = Floats::new(around.workspace, &op.input, rows);
        let output = Sink::new(around.workspace, &op.output, rows);
        assert_eq!(input.width(), 2 * output.width(), "gate and up side by side");
        Self { input, output }
    }
}

impl Task for GatedSiluTask {
    fn units(&self) -> usize {
        self.input.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let width = self.output.width();
        for r in units {
            let row = self.input.row(r);
            self.output.fill(s, r, 0..width, |c| {
                s.mul(math::silu(s, row.load(s, c)), row.load(s, width + c))
            });
        }
    }
}

/// [`Gather`]; a unit is a gathered row.
pub(super) struct GatherTask<'a> {
    batch: &'a Batch,
    input: Floats,
    output: Floats,
}

impl<'a> GatherTask<'a> {
    pub(super) fn new(op: &Gather, around: &Surroundings<'a>) -> Self {
        let batch = around.batch;
        let input = Floats::new(around.workspace, &op.input, batch.tokens.len());
        let output = Floats::new(around.workspace, &op.output, batch.gather.len());
        assert_eq!(input.width(), output.width());
        Self { batch, input, output }
    }
}

impl Task for GatherTask<'_> {
    fn units(&self) -> usize {
        self.output.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        for g in units {
            let from = self.input.row(self.batch.gather[g] as usize);
            let to = self.output.row(g);
            for c in (0..from.width()).step_by(LANES) {
                to.store(s, c, from.load(s, c));
            }
        }
    }
}

/// [`Pool`]; a unit is a span.
pub(super) struct PoolTask<'a> {
    op: &'a Pool,
    batch: &'a Batch,
    input: Floats,
    output: Floats,
}

impl<'a> PoolTask<'a> {
    pub(super) fn new(op: &'a Pool, around: &Surroundings<'a>) -> Self {
        let batch = around.batch;
        let input = Floats::new(around.workspace, &op.input, batch.tokens.len());
        let output = Floats::new(around.workspace, &op.output, batch.spans.len());
        assert_eq!(input.width(), output.width());
        Self { op, batch, input, output }
    }
}

impl Task for PoolTask<'_> {
    fn units(&self) -> usize {
        self.output.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        for span in units {
            let rows = &self.batch.spans[span].rows;
            assert!(!rows.is_empty(), "a span has at least one row");
            let rows = match self.op.kind {
                PoolKind::Mean => rows.clone(),
                PoolKind::Cls => rows.start..rows.start + 1,
                PoolKind::Last => rows.end - 1..rows.end,
            };
            let count = s.splat(rows.len() as f32);
            let output = self.output.row(span);
            for c in (0..output.width()).step_by(LANES) {
                let mut sum = s.splat(0.0);
                for r in rows.clone() {
                    sum = s.add(sum, self.input.row(r as usize).load(s, c));
                }
                output.store(s, c, s.div(sum, count));
            }
            if self.op.normalize {
                let length = total(s, output, |x, sum| s.fma(x, x, sum)).sqrt();
                if length > 0.0 {
                    for c in (0..output.width()).step_by(LANES) {
                        output.store(s, c, s.div(output.load(s, c), s.splat(length)));
                    }
                }
            }
        }
    }
}
