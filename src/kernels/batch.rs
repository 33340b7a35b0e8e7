//! What a program reads besides its weights: the rows of one step, and where KV blocks lie.

use std::ops::Range;

/// The rows of one step, resolved for kernels: packed, no padding.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Input token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Token type of each row; empty where all are 0.
    pub types: Vec<u32>,
    /// Which span each row belongs to.
    pub span_of: Vec<u32>,
    /// Spans in row order.
    pub spans: Vec<BatchSpan>,
    /// Block tables of all spans, one after the other: (group, slot).
    pub blocks: Vec<(u32, u32)>,
    /// Blocks that are copied before the rows: from, to. None is both.
    pub copies: Vec<[(u32, u32); 2]>,
    /// The last row of each span that yields something, ascending.
    pub gather: Vec<u32>,
    /// Of each gathered row only the largest output is wanted.
    pub greedy: bool,
}

impl Batch {
    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.types.clear();
        self.span_of.clear();
        self.spans.clear();
        self.blocks.clear();
        self.copies.clear();
        self.gather.clear();
        self.greedy = false;
    }
}

/// A span, as kernels see it.
#[derive(Debug, Clone, Default)]
pub struct BatchSpan {
    /// Its rows.
    pub rows: Range<u32>,
    /// Position of its first row.
    pub start: u32,
    /// Its block table in `Batch::blocks`.
    pub blocks: Range<u32>,
}

/// Where a lane's KV blocks lie: byte offset in the KV region of each group's page, by layer.
/// Block `(group, slot)` of layer `l` starts at `offsets[group × layers + l] + slot × block_bytes`.
#[derive(Debug, Clone, Default)]
pub struct KvMap {
    /// Layers of the model.
    pub layers: usize,
    /// `groups × layers`.
    pub offsets: Vec<usize>,
}

impl KvMap {
    /// Where a block, (group, slot), of `block_bytes` starts in a layer; none if the map has no
    /// such group.
    #[inline(always)]
    pub fn start(
        &self,
        layer: usize,
        (group, slot): (u32, u32),
        block_bytes: usize,
    ) -> Option<usize> {
        let page = self.offsets.get(group as usize * self.layers + layer)?;
        Some(page + slot as usize * block_bytes)
    }
}
