//! Norms of single heads, between projection and rotation. Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, LANES, Task};
use super::views::Floats;
use crate::kernels::ops::HeadNorm;

/// [`HeadNorm`]; a unit is a row.
pub(super) struct HeadNormTask<'a> {
    op: &'a HeadNorm,
    qkv: Floats,
}

impl<'a> HeadNormTask<'a> {
    pub(super) fn new(op: &'a HeadNorm, around: &Surroundings<'a>) -> Self {
        let qkv = Floats::new(around.workspace, &op.qkv, around.batch.tokens.len());
        let head_dim = op.weights[0].len();
        assert!(head_dim > 0 && head_dim.is_multiple_of(LANES), "head size {head_dim}");
        assert_eq!(op.weights[1].len(), head_dim, "q and k heads have one size");
        assert_eq!(qkv.width(), (op.heads[0] + 2 * op.heads[1]) * head_dim);
        Self { op, qkv }
    }
}

impl Task for HeadNormTask<'_> {
    fn units(&self) -> usize {
        self.qkv.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let head_dim = self.op.weights[0].len();
        for r in units {
            // SAFETY: the row is this unit's.
            let row = unsafe { self.qkv.row(r).values_mut() };
            let (q, rest) = row.split_at_mut(self.op.heads[0] * head_dim);
            let k = &mut rest[..self.op.heads[1] * head_dim];
            for (heads, weight) in [q, k].into_iter().zip(&self.op.weights) {
                for head in heads.chunks_exact_mut(head_dim) {
                    normalise(s, head, weight, self.op.eps);
                }
            }
        }
    }
}

/// `(x × inverse) × weight`, with `inverse = 1 / sqrt(Σx² / width + eps)`.
#[inline(always)]
fn normalise<S: Isa>(s: S, head: &mut [f32], weight: &[f32], eps: f32) {
    let mut squares = s.splat(0.0);
    for lanes in head.as_chunks::<LANES>().0 {
        let x = s.load(lanes);
        squares = s.fma(x, x, squares);
    }
    let inverse = s.splat(1.0 / (s.sum(squares) / weight.len() as f32 + eps).sqrt());
    let weights = weight.as_chunks::<LANES>().0;
    for (lanes, weight) in head.as_chunks_mut::<LANES>().0.iter_mut().zip(weights) {
        *lanes = s.store(s.mul(s.mul(s.load(lanes), inverse), s.load(weight)));
    }
}
