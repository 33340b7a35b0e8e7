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
            if let Some(types) = &self.op.types {
                let start = self.batch.types.get(r).map_or(0, |&kind| kind as usize) * width;
                let kind = &types[start..start + width];
                row.iter_mut().zip(kind).for_each(|(value, t)| *value += t);
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

impl NormTask<'_> {
    /// Mean (0 for root-mean-square) and `1 / sqrt(variance + eps)` of a row.
    #[inline(always)]
    fn moments<S: Isa>(&self, s: S, row: Row) -> (f32, f32) {
        let count = row.width() as f32;
        let (mean, squares) = if self.op.bias.is_some() {
            let mean = sum(s, row) / count;
            (mean, centred_squares(s, row, mean))
        } else {
            (0.0, squares(s, row))
        };
        (mean, 1.0 / (squares / count + self.op.eps).sqrt())
    }

    /// 16 normalised values from column `c` on.
    #[inline(always)]
    fn value<S: Isa>(&self, s: S, row: Row, c: usize, (mean, inverse): (f32, f32)) -> S::F {
        let (x, weight) = (row.load(s, c), vector(s, &self.op.weight, c));
        match &self.op.bias {
            Some(bias) => {
                let x = s.mul(s.sub(x, s.splat(mean)), s.splat(inverse));
                s.fma(x, weight, vector(s, bias, c))
            }
            None => s.mul(s.mul(x, s.splat(inverse)), weight),
        }
    }
}

impl Task for NormTask<'_> {
    fn units(&self) -> usize {
        self.input.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let width = self.input.width();
        for r in units {
            let (row, output) = (self.input.row(r), self.output.row(r));
            let moments = self.moments(s, row);
            for c in (0..width).step_by(2 * LANES) {
                let low = self.value(s, row, c, moments);
                let high = self.value(s, row, c + LANES, moments);
                output.store(s, c, width, [low, high]);
            }
        }
    }
}

/// Σ x, in 16 lanes.
#[inline(always)]
fn sum<S: Isa>(s: S, row: Row) -> f32 {
    let mut sum = s.splat(0.0);
    for c in (0..row.width()).step_by(LANES) {
        sum = s.add(sum, row.load(s, c));
    }
    s.sum(sum)
}

/// Σ x², in 16 lanes.
#[inline(always)]
fn squares<S: Isa>(s: S, row: Row) -> f32 {
    let mut sum = s.splat(0.0);
    for c in (0..row.width()).step_by(LANES) {
        let x = row.load(s, c);
        sum = s.fma(x, x, sum);
    }
    s.sum(sum)
}

/// Σ (x - mean)², in 16 lanes; lanes beyond the row add nothing.
#[inline(always)]
fn centred_squares<S: Isa>(s: S, row: Row, mean: f32) -> f32 {
    let shift = s.splat(mean);
    let mut sum = s.splat(0.0);
    for c in (0..row.width()).step_by(LANES) {
        let mut x = s.sub(row.load(s, c), shift);
        if c + LANES > row.width() {
            let mut lanes = s.store(x);
            lanes[row.width() - c..].fill(0.0);
            x = s.load(&lanes);
        }
        sum = s.fma(x, x, sum);
    }
    s.sum(sum)
}

/// 16 parameters from `c` on, zeros beyond the end.
#[inline(always)]
pub(super) fn vector<S: Isa>(s: S, values: &[f32], c: usize) -> S::F {
    let rest = values.get(c..).unwrap_or_default();
    if let Some(lanes) = rest.first_chunk() {
        return s.load(lanes);
    }
    let mut lanes = [0.0; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
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
            let (row, output) = (self.input.row(r), self.output.row(r));
            for c in (0..width).step_by(2 * LANES) {
                let mut values = [s.splat(0.0); 2];
                for (half, value) in values.iter_mut().enumerate() {
                    let c = c + half * LANES;
                    *value = s.mul(math::silu(s, row.load(s, c)), row.load(s, width + c));
                }
                output.store(s, c, width, values);
            }
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
                let length = squares(s, output).sqrt();
                if length > 0.0 {
                    for c in (0..output.width()).step_by(LANES) {
                        output.store(s, c, s.div(output.load(s, c), s.splat(length)));
                    }
                }
            }
        }
    }
}
