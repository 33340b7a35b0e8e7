//! Attention within spans, over the rows of the step itself. Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::{Block, Blocks, QUERIES_MAX, Query, Room, Shape, Tile, attend, room};
use crate::kernels::batch::Batch;
use crate::kernels::cpu::executor::Surroundings;
use crate::kernels::cpu::isa::{Isa, LANES, Task};
use crate::kernels::cpu::views::{Floats, Sink};
use crate::kernels::ops::PackedAttention;
use crate::scheduler::step::BLOCK_TOKENS;

/// [`PackedAttention`]; a unit is up to 48 rows and one head.
pub(in crate::kernels::cpu) struct PackedTask<'a> {
    op: &'a PackedAttention,
    batch: &'a Batch,
    qkv: Floats,
    output: Sink,
    shape: Shape,
    tile: Tile,
}

impl<'a> PackedTask<'a> {
    pub(in crate::kernels::cpu) fn new(op: &'a PackedAttention, around: &Surroundings<'a>) -> Self {
        let rows = around.batch.tokens.len();
        let qkv = Floats::new(around.workspace, &op.qkv, rows);
        let output = Sink::new(around.workspace, &op.output, rows);
        assert_eq!(qkv.width(), (op.heads + 2 * op.kv_heads) * op.head_dim);
        assert!(op.heads.is_multiple_of(op.kv_heads), "{} heads on {}", op.heads, op.kv_heads);
        assert_eq!(output.width(), op.heads * op.head_dim);
        let shape = Shape::new(op.head_dim, op.scale, &output);
        let tile = Tile { rows: QUERIES_MAX, heads: 1 };
        Self { op, batch: around.batch, qkv, output, shape, tile }
    }
}

impl Task for PackedTask<'_> {
    fn units(&self) -> usize {
        self.tile.units(self.batch.tokens.len(), self.op.heads)
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let &PackedAttention { heads, kv_heads, causal, .. } = self.op;
        let head_dim = self.shape.head_dim;
        // SAFETY: nothing else in this thread uses it meanwhile.
        let Room { sums, blocks: [turned, _] } = unsafe { &mut *room() };
        for unit in units {
            for patch in self.tile.patches(unit, heads, self.batch) {
                let keys = (heads + patch.heads.start / (heads / kv_heads)) * head_dim;
                let first = patch.span.rows.start as usize;
                let mut blocks = PackedBlocks {
                    qkv: self.qkv,
                    rows: first..patch.span.rows.end as usize,
                    keys,
                    values: keys + kv_heads * head_dim,
                    turned: &mut turned[..head_dim],
                };
                for from in (0..patch.len()).step_by(QUERIES_MAX) {
                    let (places, count) = patch.places::<QUERIES_MAX>(from);
                    let queries = places.map(|(row, head)| Query {
                        row,
                        head,
                        values: self.qkv.row(row).columns(head * head_dim, head_dim),
                        visible: if causal { row + 1 - first } else { patch.span.rows.len() },
                    });
                    let queries = (&queries[..count], &mut sums[..]);
                    attend(s, &mut blocks, queries, self.shape, &self.output);
                }
            }
        }
    }
}

/// One head of one span.
struct PackedBlocks<'a> {
    qkv: Floats,
    rows: Range<usize>,
    /// Column of the head's keys.
    keys: usize,
    /// Column of its values.
    values: usize,
    /// Keys of a block, a row for each dimension.
    turned: &'a mut [[f32; BLOCK_TOKENS]],
}

impl Blocks for PackedBlocks<'_> {
    type Block<'b>
        = PackedBlock<'b>
    where
        Self: 'b;

    #[inline(always)]
    fn open<S: Isa>(&mut self, s: S, index: usize, visible: usize) -> PackedBlock<'_> {
        let head_dim = self.turned.len();
        let first = self.rows.start + index * BLOCK_TOKENS;
        for t in (0..visible).step_by(LANES) {
            for d in (0..head_dim).step_by(LANES) {
                let mut square = [s.splat(0.0); LANES];
                for (i, lanes) in square.iter_mut().enumerate() {
                    // Beyond the span the last key stands in; its scores are masked.
                    let row = self.qkv.row(first + (t + i).min(visible - 1));
                    *lanes = row.load(s, self.keys + d);
                }
                for (i, lanes) in s.turn(square).into_iter().enumerate() {
                    self.turned[d + i][t..t + LANES].copy_from_slice(&s.store(lanes));
                }
            }
        }
        PackedBlock { turned: self.turned, qkv: self.qkv, first, values: self.values }
    }
}

struct PackedBlock<'a> {
    turned: &'a [[f32; BLOCK_TOKENS]],
    qkv: Floats,
    first: usize,
    values: usize,
}

impl Block for PackedBlock<'_> {
    #[inline(always)]
    fn keys<S: Isa>(&self, s: S, d: usize) -> [S::F; 2] {
        let (a, b) = self.turned[d].split_at(LANES);
        [s.load(a.try_into().expect("half of 32")), s.load(b.try_into().expect("half of 32"))]
    }

    #[inline(always)]
    fn values<S: Isa>(&self, s: S, t: usize, c: usize) -> S::F {
        self.qkv.row(self.first + t).load(s, self.values + c)
    }
}
