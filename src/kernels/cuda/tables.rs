//! The tables of a step, as kernels read them: one stretch of bytes that begins with the struct
//! `Step` of `common.cuh` and is copied to the device at once.

use bytemuck::{Pod, Zeroable, bytes_of, cast_slice};

use super::details::DrawDetail;
use crate::device::cuda::Address;
use crate::kernels::batch::Batch;
use crate::request::Sampling;

/// Set in a token's number: it is that of a seat, where an earlier step left the token.
pub const FROM_SEAT: u32 = 1 << 31;

/// Packed query rows of a large tile; a small one has up to 16.
pub(super) const LARGE_TILE: usize = 64;
pub(super) const SMALL_TILE: usize = 16;

/// A sequence is split as `attention.cu` does it.
const SPLITS_MAX: u32 = 16;
const SPLIT_TOKENS: u32 = 8 * crate::scheduler::step::BLOCK_TOKENS as u32;

/// One token to be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SeatDraw {
    /// Which gathered row.
    pub row: u32,
    /// Where the token goes on the device.
    pub seat: u32,
    /// Position of the new token in its sequence.
    pub position: u32,
    /// How it is chosen.
    pub sampling: Sampling,
}

/// A super-page that a group of the lane got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loan {
    /// Group × layers + layer.
    pub place: u32,
    /// Which super-page of the KV region.
    pub page: u32,
}

/// What one step works on.
#[derive(Debug, Clone, Default)]
pub struct Work {
    /// Its rows; a token may be a seat ([`FROM_SEAT`]).
    pub batch: Batch,
    /// Tokens to choose, in the order of answers.
    pub draws: Vec<SeatDraw>,
    /// What some draws are asked for besides, in their order.
    pub details: Vec<DrawDetail>,
    /// Generated tokens that details point at.
    pub history: Vec<u32>,
    /// Spans whose answer is the last hidden state of each row, ascending.
    pub states: Vec<u32>,
    /// Pages that come first.
    pub loans: Vec<Loan>,
}

impl Work {
    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.batch.clear();
        self.draws.clear();
        self.details.clear();
        self.history.clear();
        self.states.clear();
        self.loans.clear();
    }
}

/// How many there are of what a launch's grid depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Counts {
    pub(super) rows: u32,
    pub(super) gathered: u32,
    pub(super) spans: u32,
    pub(super) draws: u32,
    pub(super) small_tiles: u32,
    pub(super) large_tiles: u32,
    /// Of the longest sequence among the small tiles.
    pub(super) splits: u32,
    pub(super) loans: u32,
    pub(super) copies: u32,
    /// Of one launch.
    pub(super) details: u32,
}

/// How query rows are tiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Query heads that share a KV head.
    pub(super) group: usize,
    /// Single rows of sequences are taken apart from many rows; encoders have no such.
    pub(super) paged: bool,
    /// Small tiles that there is room for.
    pub(super) small_max: usize,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Header {
    rows: u32,
    spans: u32,
    gathered: u32,
    draws: u32,
    small_tiles: u32,
    large_tiles: u32,
    loans: u32,
    copies: u32,
    /// Tokens, positions, span numbers, gather list, spans, blocks, small and large tiles, draws,
    /// loans, token types, copies.
    tables: [u64; 12],
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Span {
    first: u32,
    rows: u32,
    start: u32,
    blocks: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Draw {
    row: u32,
    seat: u32,
    position: u32,
    choice: u32,
    seed: [u32; 2],
    temperature: f32,
    top_p: f32,
    min_p: f32,
    top_k: u32,
}

/// Puts tables together, in memory that is used again.
#[derive(Debug, Default)]
pub(super) struct Tables {
    bytes: Vec<u8>,
    small: Vec<[u32; 2]>,
    large: Vec<[u32; 2]>,
}

impl Tables {
    /// The tables of `work` for the address where they will lie.
    pub(super) fn fill(&mut self, work: &Work, tiling: Tiling, at: Address) -> (&[u8], Counts) {
        let splits = self.tile(work, tiling);
        let batch = &work.batch;
        let counts = Counts {
            rows: batch.tokens.len() as u32,
            gathered: batch.gather.len() as u32,
            spans: batch.spans.len() as u32,
            draws: work.draws.len() as u32,
            small_tiles: self.small.len() as u32,
            large_tiles: self.large.len() as u32,
            splits,
            loans: work.loans.len() as u32,
            copies: batch.copies.len() as u32,
            details: 0,
        };
        self.bytes.clear();
        self.bytes.resize(size_of::<Header>(), 0);
        let tables = [
            self.put(at, cast_slice(&batch.tokens)),
            self.put(at, cast_slice(&batch.positions)),
            self.put(at, cast_slice(&batch.span_of)),
            self.put(at, cast_slice(&batch.gather)),
            self.put_each(
                at,
                batch.spans.iter().map(|span| Span {
                    first: span.rows.start,
                    rows: span.rows.end - span.rows.start,
                    start: span.start,
                    blocks: span.blocks.start,
                }),
            ),
            self.put_each(at, batch.blocks.iter().map(|(group, slot)| [*group, *slot])),
            {
                let small = std::mem::take(&mut self.small);
                let place = self.put(at, cast_slice(&small));
                self.small = small;
                place
            },
            {
                let large = std::mem::take(&mut self.large);
                let place = self.put(at, cast_slice(&large));
                self.large = large;
                place
            },
            self.put_each(at, work.draws.iter().map(Draw::of)),
            self.put_each(at, work.loans.iter().map(|loan| [loan.place, loan.page])),
            if batch.types.is_empty() { 0 } else { self.put(at, cast_slice(&batch.types)) },
            self.put_each(at, batch.copies.iter().map(|[from, to]| [from.0, from.1, to.0, to.1])),
        ];
        let header = Header {
            rows: counts.rows,
            spans: counts.spans,
            gathered: counts.gathered,
            draws: counts.draws,
            small_tiles: counts.small_tiles,
            large_tiles: counts.large_tiles,
            loans: counts.loans,
            copies: counts.copies,
            tables,
        };
        self.bytes[..size_of::<Header>()].copy_from_slice(bytes_of(&header));
        (&self.bytes, counts)
    }

    /// Cuts query rows into tiles; returns the largest number of splits of a small one.
    fn tile(&mut self, work: &Work, tiling: Tiling) -> u32 {
        self.small.clear();
        self.large.clear();
        let each = tiling.group.div_ceil(SMALL_TILE);
        let mut splits = 0;
        for (index, span) in work.batch.spans.iter().enumerate() {
            let (index, rows) = (index as u32, span.rows.len());
            if tiling.paged && rows == 1 && self.small.len() + each <= tiling.small_max {
                self.small.extend((0..each).map(|i| [index, (i * SMALL_TILE) as u32]));
                splits = splits.max((span.start + 1).div_ceil(SPLIT_TOKENS).min(SPLITS_MAX));
            } else {
                let packed = rows * tiling.group;
                let tiles = (0..packed).step_by(LARGE_TILE);
                self.large.extend(tiles.map(|from| [index, from as u32]));
            }
        }
        // The longest first: what starts last should be short.
        let spans = &work.batch.spans;
        self.large.sort_unstable_by_key(|[span, from]| {
            let sees = spans[*span as usize].start as usize + *from as usize / tiling.group;
            std::cmp::Reverse(sees)
        });
        splits
    }

    fn put(&mut self, at: Address, table: &[u8]) -> u64 {
        let place = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(place, 0);
        self.bytes.extend_from_slice(table);
        at.plus(place).0
    }

    fn put_each<T: Pod>(&mut self, at: Address, rows: impl Iterator<Item = T>) -> u64 {
        let place = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(place, 0);
        for row in rows {
            self.bytes.extend_from_slice(bytes_of(&row));
        }
        at.plus(place).0
    }
}

impl Draw {
    fn of(draw: &SeatDraw) -> Self {
        let SeatDraw { row, seat, position, sampling } = *draw;
        Self {
            row,
            seat,
            position,
            choice: sampling.choice,
            seed: [sampling.seed as u32, (sampling.seed >> 32) as u32],
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            top_k: sampling.top_k,
        }
    }
}
