//! Causal attention over KV blocks. Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::{Block, Blocks, Query, SIDE_BY_SIDE, Shape, Tile, attend};
use crate::kernels::batch::{Batch, BatchSpan};
use crate::kernels::cpu::executor::Surroundings;
use crate::kernels::cpu::isa::{Isa, LANES, Task};
use crate::kernels::cpu::rope::{HeadBlock, KvBlocks};
use crate::kernels::cpu::views::{Floats, Sink};
use crate::kernels::ops::PagedAttention;
use crate::scheduler::step::BLOCK_TOKENS;

/// [`PagedAttention`]; a unit is up to 4 rows and one or all query heads of a KV head.
pub(in crate::kernels::cpu) struct PagedTask<'a> {
    op: &'a PagedAttention,
    batch: &'a Batch,
    qkv: Floats,
    output: Sink,
    blocks: KvBlocks<'a>,
    shape: Shape,
    tile: Tile,
}

impl<'a> PagedTask<'a> {
    pub(in crate::kernels::cpu) fn new(op: &'a PagedAttention, around: &Surroundings<'a>) -> Self {
        let rows = around.batch.tokens.len();
        let qkv = Floats::new(around.workspace, &op.qkv, rows);
        let output = Sink::new(around.workspace, &op.output, rows);
        let head_dim = op.kv.head_dim;
        assert_eq!(qkv.width(), (op.heads + 2 * op.kv.heads) * head_dim);
        assert_eq!(output.width(), op.heads * head_dim);
        assert!(op.heads.is_multiple_of(op.kv.heads), "query heads share KV heads evenly");
        let tile = tile(op, rows, around.members);
        let blocks = KvBlocks::new(op.kv, op.layer, around);
        let shape = Shape::new(head_dim, op.scale, &output);
        Self { op, batch: around.batch, qkv, output, blocks, shape, tile }
    }
}

/// Heads of a group share loads: three side by side take less than twice the time of one. Few
/// rows on many members are cut finer, so that all have work.
fn tile(op: &PagedAttention, rows: usize, members: usize) -> Tile {
    let group = op.heads / op.kv.heads;
    let time = |heads: usize| {
        let units = rows * (op.heads / heads);
        units.div_ceil(members) * (2 + heads)
    };
    let together = (1..=group).rev().filter(|heads| group.is_multiple_of(*heads));
    let heads = together.min_by_key(|heads| time(*heads)).unwrap_or(1);
    Tile { rows: (rows / 16).clamp(1, 4), heads }
}

impl Task for PagedTask<'_> {
    fn units(&self) -> usize {
        self.tile.units(self.batch.tokens.len(), self.op.heads)
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let head_dim = self.shape.head_dim;
        let group = self.op.heads / self.op.kv.heads;
        for unit in units {
            for patch in self.tile.patches(unit, self.op.heads, self.batch) {
                let head = patch.heads.start / group;
                let mut blocks = PagedBlocks { blocks: &self.blocks, span: patch.span, head };
                for from in (0..patch.len()).step_by(SIDE_BY_SIDE) {
                    let (places, count) = patch.places::<SIDE_BY_SIDE>(from);
                    let queries = places.map(|(row, head)| Query {
                        row,
                        head,
                        values: self.qkv.row(row).columns(head * head_dim, head_dim),
                        visible: self.batch.positions[row] as usize + 1,
                    });
                    let queries = &queries[..count];
                    attend::<S, _, SIDE_BY_SIDE>(s, &mut blocks, queries, self.shape, &self.output);
                }
            }
        }
    }
}

/// One KV head of one span.
struct PagedBlocks<'a> {
    blocks: &'a KvBlocks<'a>,
    span: &'a BatchSpan,
    head: usize,
}

impl Blocks for PagedBlocks<'_> {
    type Block<'b>
        = PagedBlock
    where
        Self: 'b;

    #[inline(always)]
    fn open<S: Isa>(&mut self, _: S, index: usize, _: usize) -> PagedBlock {
        let last = self.span.blocks.len() - 1;
        let [block, next] = [index, last.min(index + 1)]
            .map(|index| self.blocks.at(self.span, index * BLOCK_TOKENS, self.head));
        PagedBlock { block, next, head_dim: self.blocks.head_dim() }
    }
}

struct PagedBlock {
    block: HeadBlock,
    /// Where attention goes next: blocks are too short for the processor to see a stream.
    next: HeadBlock,
    head_dim: usize,
}

impl Block for PagedBlock {
    #[inline(always)]
    fn ahead<S: Isa>(&self, s: S, d: usize) {
        debug_assert!(d < self.head_dim);
        let at = d * BLOCK_TOKENS;
        // SAFETY: a head's keys are `[head_dim][32]`, its values as many.
        unsafe {
            s.prefetch(self.next.keys.add(at));
            s.prefetch(self.next.values.add(at));
        }
    }

    #[inline(always)]
    fn keys<S: Isa>(&self, s: S, d: usize) -> [S::F; 2] {
        debug_assert!(d < self.head_dim);
        let at = d * BLOCK_TOKENS;
        // SAFETY: a head's keys are `[head_dim][32]`; only earlier ops write KV.
        unsafe {
            let keys = self.block.keys.add(at);
            [s.read_half(keys), s.read_half(keys.add(LANES))]
        }
    }

    #[inline(always)]
    fn values<S: Isa>(&self, s: S, t: usize, c: usize) -> S::F {
        debug_assert!(t < BLOCK_TOKENS && c + LANES <= self.head_dim);
        // SAFETY: a head's values are `[32][head_dim]`; only earlier ops write KV.
        unsafe { s.read_half(self.block.values.add(t * self.head_dim + c)) }
    }
}
