//! Causal attention over KV blocks. Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    Block, Blocks, Patch, QUERIES_MAX, Query, Room, SIDE_BY_SIDE, Shape, Sums, Tile, attend, room,
};
use crate::kernels::batch::{Batch, BatchSpan};
use crate::kernels::cpu::executor::Surroundings;
use crate::kernels::cpu::isa::{Isa, LANES, Task};
use crate::kernels::cpu::rope::{HeadBlock, KvBlocks};
use crate::kernels::cpu::views::{Floats, Sink};
use crate::kernels::ops::PagedAttention;
use crate::scheduler::step::BLOCK_TOKENS;

/// Rows of a prompt that a unit takes at most, to share keys and values.
const ROWS_MAX: usize = 16;

/// [`PagedAttention`]; a unit is up to 16 rows and one or all query heads of a KV head.
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
    Tile { rows: (rows / 16).clamp(1, ROWS_MAX), heads }
}

impl Task for PagedTask<'_> {
    fn units(&self) -> usize {
        self.tile.units(self.batch.tokens.len(), self.op.heads)
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let group = self.op.heads / self.op.kv.heads;
        // SAFETY: nothing else in this thread uses it meanwhile.
        let Room { sums, blocks: [keys, values] } = unsafe { &mut *room() };
        for unit in units {
            for patch in self.tile.patches(unit, self.op.heads, self.batch) {
                let head = patch.heads.start / group;
                let mut blocks = PagedBlocks { blocks: &self.blocks, span: patch.span, head };
                if patch.len() <= SIDE_BY_SIDE {
                    self.patch::<S, _, SIDE_BY_SIDE>(s, (&mut blocks, sums), &patch);
                } else {
                    let head_dim = self.shape.head_dim;
                    let keys = &mut keys[..head_dim];
                    let values = values[..head_dim].as_flattened_mut();
                    let mut blocks = FloatBlocks { blocks, keys, values };
                    self.patch::<S, _, QUERIES_MAX>(s, (&mut blocks, sums), &patch);
                }
            }
        }
    }
}

impl PagedTask<'_> {
    /// Takes a patch through its blocks, `N` queries at a time.
    #[inline(always)]
    fn patch<S: Isa, B: Blocks, const N: usize>(
        &self,
        s: S,
        (blocks, sums): (&mut B, &mut [Sums]),
        patch: &Patch<'_>,
    ) {
        let head_dim = self.shape.head_dim;
        for from in (0..patch.len()).step_by(N) {
            let (places, count) = patch.places::<N>(from);
            let queries = places.map(|(row, head)| Query {
                row,
                head,
                values: self.qkv.row(row).columns(head * head_dim, head_dim),
                visible: self.batch.positions[row] as usize + 1,
            });
            let queries = (&queries[..count], &mut sums[..]);
            attend(s, blocks, queries, self.shape, &self.output);
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

/// As [`PagedBlocks`], each block made f32 once for many queries.
struct FloatBlocks<'a> {
    blocks: PagedBlocks<'a>,
    /// Keys of a block, a row for each dimension.
    keys: &'a mut [[f32; BLOCK_TOKENS]],
    /// Its values, `head_dim` for each position.
    values: &'a mut [f32],
}

impl Blocks for FloatBlocks<'_> {
    type Block<'b>
        = FloatBlock
    where
        Self: 'b;

    #[inline(always)]
    fn open<S: Isa>(&mut self, s: S, index: usize, visible: usize) -> FloatBlock {
        let PagedBlock { block, next, head_dim } = self.blocks.open(s, index, visible);
        let keys = (self.keys.as_flattened_mut(), block.keys, next.keys);
        let values = (&mut *self.values, block.values, next.values);
        for (to, from, next) in [keys, values] {
            for (i, lanes) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let at = i * LANES;
                // SAFETY: a head's keys are `[head_dim][32]`, its values as many; only earlier ops
                // write KV.
                *lanes = s.store(unsafe { s.read_half(from.add(at)) });
                s.prefetch(next.wrapping_add(at));
            }
        }
        FloatBlock { keys: self.keys.as_ptr(), values: self.values.as_ptr(), head_dim }
    }
}

/// As [`PagedBlock`], in f32. Its room outlives it: `open` borrows what holds it.
struct FloatBlock {
    keys: *const [f32; BLOCK_TOKENS],
    values: *const f32,
    head_dim: usize,
}

impl Block for FloatBlock {
    #[inline(always)]
    fn keys<S: Isa>(&self, s: S, d: usize) -> [S::F; 2] {
        debug_assert!(d < self.head_dim);
        // SAFETY: keys are `[head_dim][32]`.
        unsafe {
            let keys = self.keys.add(d).cast::<f32>();
            [s.read(keys), s.read(keys.add(LANES))]
        }
    }

    #[inline(always)]
    fn values<S: Isa>(&self, s: S, t: usize, c: usize) -> S::F {
        debug_assert!(t < BLOCK_TOKENS && c + LANES <= self.head_dim);
        // SAFETY: values are `[32][head_dim]`.
        unsafe { s.read(self.values.add(t * self.head_dim + c)) }
    }
}
