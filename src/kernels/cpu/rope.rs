//! Rotary positions and the way of keys and values into KV blocks. Knows no model.

#![allow(unsafe_code)]

use std::ops::Range;

use super::executor::Surroundings;
use super::isa::{Isa, LANES, Task};
use super::views::{Floats, Memory};
use crate::kernels::batch::{Batch, BatchSpan, KvMap};
use crate::kernels::ops::{KvShape, Rope, RopeStore};
use crate::scheduler::step::BLOCK_TOKENS;

/// One layer's KV blocks, as a step sees them.
#[derive(Clone, Copy)]
pub(super) struct KvBlocks<'a> {
    memory: Memory,
    map: &'a KvMap,
    batch: &'a Batch,
    shape: KvShape,
    layer: usize,
}

/// Keys and values of one KV head in one block, f16: `[head_dim][32]` and `[32][head_dim]`.
#[derive(Clone, Copy)]
pub(super) struct HeadBlock {
    pub(super) keys: *mut u16,
    pub(super) values: *mut u16,
}

impl<'a> KvBlocks<'a> {
    pub(super) fn new(shape: KvShape, layer: usize, around: &Surroundings<'a>) -> Self {
        assert!(shape.head_dim.is_multiple_of(LANES), "head size {}", shape.head_dim);
        assert!(layer < shape.layers && shape.layers == around.map.layers, "layer {layer}");
        Self { memory: around.kv, map: around.map, batch: around.batch, shape, layer }
    }

    pub(super) fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    /// Head `head` of the block that holds `position` of `span`.
    ///
    /// # Panics
    /// If the span's table does not reach that far, or leads out of the KV region.
    #[inline(always)]
    pub(super) fn at(&self, span: &BatchSpan, position: usize, head: usize) -> HeadBlock {
        let table = &self.batch.blocks[span.blocks.start as usize..span.blocks.end as usize];
        let bytes = self.shape.block_bytes();
        let start = self.map.start(self.layer, table[position / BLOCK_TOKENS], bytes);
        let start = start.expect("a block's group is in the map");
        let block = self.memory.at::<u16>(start, bytes / 2);
        let head_values = self.shape.head_dim * BLOCK_TOKENS;
        assert!(head < self.shape.heads);
        // SAFETY: keys of all heads, then values of all heads, are the block that `at` checked.
        unsafe {
            HeadBlock {
                keys: block.add(head * head_values),
                values: block.add((self.shape.heads + head) * head_values),
            }
        }
    }
}

/// [`RopeStore`]; a unit is a row.
pub(super) struct RopeStoreTask<'a> {
    op: &'a RopeStore,
    batch: &'a Batch,
    qkv: Floats,
    blocks: KvBlocks<'a>,
}

impl<'a> RopeStoreTask<'a> {
    pub(super) fn new(op: &'a RopeStore, around: &Surroundings<'a>) -> Self {
        let qkv = Floats::new(around.workspace, &op.qkv, around.batch.tokens.len());
        assert_eq!(qkv.width(), (op.heads + 2 * op.kv.heads) * op.kv.head_dim);
        let blocks = KvBlocks::new(op.kv, op.layer, around);
        Self { op, batch: around.batch, qkv, blocks }
    }
}

impl Task for RopeStoreTask<'_> {
    fn units(&self) -> usize {
        self.qkv.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let head_dim = self.op.kv.head_dim;
        for r in units {
            // SAFETY: the row is this unit's.
            let row = unsafe { self.qkv.row(r).values_mut() };
            let position = self.batch.positions[r] as usize;
            let rotated = (self.op.heads + self.op.kv.heads) * head_dim;
            rotate_heads(&mut row[..rotated], head_dim, &self.op.table, position);
            let span = &self.batch.spans[self.batch.span_of[r] as usize];
            let (keys, values) =
                row[self.op.heads * head_dim..].split_at(self.op.kv.heads * head_dim);
            for head in 0..self.op.kv.heads {
                let block = self.blocks.at(span, position, head);
                let own = head * head_dim..(head + 1) * head_dim;
                store(s, block, position % BLOCK_TOKENS, &keys[own.clone()], &values[own]);
            }
        }
    }
}

/// [`Rope`]; a unit is a row.
pub(super) struct RopeTask<'a> {
    op: &'a Rope,
    batch: &'a Batch,
    qkv: Floats,
}

impl<'a> RopeTask<'a> {
    pub(super) fn new(op: &'a Rope, around: &Surroundings<'a>) -> Self {
        let qkv = Floats::new(around.workspace, &op.qkv, around.batch.tokens.len());
        assert_eq!(qkv.width(), (op.heads + 2 * op.kv_heads) * op.head_dim);
        Self { op, batch: around.batch, qkv }
    }
}

impl Task for RopeTask<'_> {
    fn units(&self) -> usize {
        self.qkv.rows()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, _: S, units: Range<usize>) {
        let Rope { heads, kv_heads, head_dim, table, .. } = self.op;
        for r in units {
            // SAFETY: the row is this unit's.
            let row = unsafe { self.qkv.row(r).values_mut() };
            let position = self.batch.positions[r] as usize;
            rotate_heads(&mut row[..(heads + kv_heads) * head_dim], *head_dim, table, position);
        }
    }
}

/// Rotates every head of a row.
#[inline(always)]
fn rotate_heads(row: &mut [f32], head_dim: usize, table: &[f32], position: usize) {
    let angles = &table[position * head_dim..(position + 1) * head_dim];
    let (cos, sin) = angles.split_at(head_dim / 2);
    for head in row.chunks_exact_mut(head_dim) {
        rotate(head, cos, sin);
    }
}

/// `(a, b) = (a cos - b sin, b cos + a sin)`, the second product of each rounded first.
#[inline(always)]
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    let angles = cos.iter().zip(sin);
    for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
        let (x, y) = (*a, *b);
        *a = x.mul_add(*cos, -(y * sin));
        *b = y.mul_add(*cos, x * sin);
    }
}

/// Writes a key and a value as token `token` of a block.
#[inline(always)]
fn store<S: Isa>(s: S, block: HeadBlock, token: usize, key: &[f32], value: &[f32]) {
    for (c, lanes) in key.as_chunks::<LANES>().0.iter().enumerate() {
        let mut halves = [0; LANES];
        // SAFETY: 16 values of our own.
        unsafe { s.write_half(s.load(lanes), halves.as_mut_ptr()) };
        for (i, half) in halves.into_iter().enumerate() {
            // SAFETY: dimension c × 16 + i < head_dim and token < 32: inside the head's keys,
            // and this position is this unit's alone.
            unsafe { block.keys.add((c * LANES + i) * BLOCK_TOKENS + token).write(half) };
        }
    }
    for (c, lanes) in value.as_chunks::<LANES>().0.iter().enumerate() {
        // SAFETY: inside the head's values, and this position is this unit's alone.
        unsafe {
            let to = block.values.add(token * value.len() + c * LANES);
            s.write_half(s.load(lanes), to);
        }
    }
}
