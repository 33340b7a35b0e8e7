//! Attention with an online softmax over blocks of 32 positions. Knows not where keys and values
//! lie: `paged.rs` finds them in KV blocks, `packed.rs` in the rows of the step.

#![allow(unsafe_code)]
#![expect(clippy::needless_range_loop, reason = "tiles are indexed by row and column")]

use std::cell::{OnceCell, UnsafeCell};
use std::ops::Range;

use super::isa::{Isa, LANES};
use super::math;
use super::views::Sink;
use crate::kernels::batch::{Batch, BatchSpan};
use crate::scheduler::step::BLOCK_TOKENS;

pub(super) mod packed;
pub(super) mod paged;

/// Largest head size: what a query's sums take on the stack.
const HEAD_DIM_MAX: usize = 256;

/// A head's sums, and 16 more so that pairs of vectors never run out.
const SUMS: usize = HEAD_DIM_MAX + LANES;

/// Queries that go through a block side by side at most, to share its loads and hide latencies.
/// `drops` of that many fit a vector.
const SIDE_BY_SIDE: usize = 6;

/// Queries that share a block's keys and values at most.
const QUERIES_MAX: usize = 8 * SIDE_BY_SIDE;

/// One query on its way through the blocks.
#[derive(Clone, Copy)]
struct Query {
    /// Row of the step.
    row: usize,
    /// Query head.
    head: usize,
    /// Its `head_dim` values.
    values: *const f32,
    /// It sees positions `0..visible`.
    visible: usize,
}

/// What a query has summed up so far.
#[derive(Clone, Copy)]
struct Sums {
    peak: f32,
    total: [[f32; LANES]; 2],
    values: [f32; SUMS],
}

impl Sums {
    const EMPTY: Self =
        Self { peak: f32::NEG_INFINITY, total: [[0.0; LANES]; 2], values: [0.0; SUMS] };
}

/// Where a thread keeps what it sums up, and keys and values on the way. Not on its stack: a frame
/// of that size is touched page by page at every call, which a step of few rows would feel.
struct Room {
    sums: [Sums; QUERIES_MAX],
    blocks: [[[f32; BLOCK_TOKENS]; HEAD_DIM_MAX]; 2],
}

thread_local! {
    static ROOM: OnceCell<Box<UnsafeCell<Room>>> = const { OnceCell::new() };
}

/// This thread's room. No two may be in use at once.
#[inline(never)]
fn room() -> *mut Room {
    let new = || {
        let blocks = [[[0.0; BLOCK_TOKENS]; HEAD_DIM_MAX]; 2];
        Box::new(UnsafeCell::new(Room { sums: [Sums::EMPTY; QUERIES_MAX], blocks }))
    };
    ROOM.with(|room| room.get_or_init(new).get())
}

/// What all queries of an op share.
#[derive(Clone, Copy)]
struct Shape {
    head_dim: usize,
    scale: f32,
}

impl Shape {
    fn new(head_dim: usize, scale: f32, output: &Sink) -> Self {
        assert!(
            head_dim.is_multiple_of(LANES) && (LANES..=HEAD_DIM_MAX).contains(&head_dim),
            "head size {head_dim} is not a multiple of {LANES} up to {HEAD_DIM_MAX}"
        );
        let groups_fit = head_dim.is_multiple_of(BLOCK_TOKENS);
        let quantised = matches!(output, Sink::Quant(_));
        assert!(groups_fit || !quantised, "8-bit groups would cross heads of size {head_dim}");
        Self { head_dim, scale }
    }
}

/// Keys and values of one KV head in one block of 32 positions.
trait Block {
    /// Dimension `d` is about to be read: a good time to ask for that of the next block.
    fn ahead<S: Isa>(&self, _: S, _: usize) {}
    /// Dimension `d` of all 32 keys.
    fn keys<S: Isa>(&self, s: S, d: usize) -> [S::F; 2];
    /// Dimensions `c..c + 16` of value `t`.
    fn values<S: Isa>(&self, s: S, t: usize, c: usize) -> S::F;
}

/// Where blocks come from, in ascending position.
trait Blocks {
    type Block<'b>: Block
    where
        Self: 'b;
    /// Block `index`, of which the first `visible` positions are there.
    fn open<S: Isa>(&mut self, s: S, index: usize, visible: usize) -> Self::Block<'_>;
}

/// Takes queries, in ascending order of what they see, through all their blocks; `sums` has room
/// for as many.
#[inline(always)]
fn attend<S: Isa, B: Blocks>(
    s: S,
    blocks: &mut B,
    (queries, sums): (&[Query], &mut [Sums]),
    shape: Shape,
    output: &Sink,
) {
    let sums = &mut sums[..queries.len()];
    sums.fill(Sums::EMPTY);
    let longest = queries.last().map_or(0, |query| query.visible);
    for index in 0..longest.div_ceil(BLOCK_TOKENS) {
        let start = index * BLOCK_TOKENS;
        let block = blocks.open(s, index, (longest - start).min(BLOCK_TOKENS));
        // Those that see nothing of this block come first, and take no part.
        let mut next = queries.iter().take_while(|query| query.visible <= start).count();
        while next < queries.len() {
            let (queries, sums) = (&queries[next..], &mut sums[next..]);
            next += match queries.len() {
                SIDE_BY_SIDE.. => {
                    pass::<S, _, SIDE_BY_SIDE>(s, &block, start, (queries, sums), shape)
                }
                4.. => pass::<S, _, 4>(s, &block, start, (queries, sums), shape),
                3 => pass::<S, _, 3>(s, &block, start, (queries, sums), shape),
                2 => pass::<S, _, 2>(s, &block, start, (queries, sums), shape),
                _ => pass::<S, _, 1>(s, &block, start, (queries, sums), shape),
            };
        }
    }
    for (query, sums) in queries.iter().zip(sums) {
        let total = s.add(s.load(&sums.total[0]), s.load(&sums.total[1]));
        let inverse = s.splat(1.0 / s.sum(total));
        let (row, from) = (output.row(query.row), query.head * shape.head_dim);
        for c in (0..shape.head_dim).step_by(2 * LANES) {
            let low = s.mul(s.load(lanes_at(&sums.values, c)), inverse);
            let high = s.mul(s.load(lanes_at(&sums.values, c + LANES)), inverse);
            row.store(s, from + c, from + shape.head_dim, [low, high]);
        }
    }
}

/// Takes the first `Q` queries, all of which see something of it, through the block that starts at
/// position `start`; returns their number.
#[inline(always)]
fn pass<S: Isa, B: Block, const Q: usize>(
    s: S,
    block: &B,
    start: usize,
    (queries, sums): (&[Query], &mut [Sums]),
    shape: Shape,
) -> usize {
    let queries: &[Query; Q] = queries.first_chunk().expect("Q queries");
    let sums: &mut [Sums; Q] = sums.first_chunk_mut().expect("their sums");
    let mut visible = [0; Q];
    for q in 0..Q {
        visible[q] = (queries[q].visible - start).min(BLOCK_TOKENS);
    }

    let mut scores = scores(s, block, queries, shape);
    let mut drops = [0.0; LANES];
    for q in 0..Q {
        let limit = s.splat(visible[q] as f32);
        for half in 0..2 {
            let position = s.load(&POSITIONS[half]);
            let unseen = s.splat(f32::NEG_INFINITY);
            scores[q][half] = s.where_less(position, limit, scores[q][half], unseen);
        }
        let peak = s.peak(s.max(scores[q][0], scores[q][1])).max(sums[q].peak);
        drops[q] = sums[q].peak - peak;
        sums[q].peak = peak;
    }
    let rescale = s.store(math::exp(s, s.load(&drops)));

    let mut weights = [[0.0; BLOCK_TOKENS]; Q];
    for q in 0..Q {
        for half in 0..2 {
            let weight = math::exp(s, s.sub(scores[q][half], s.splat(sums[q].peak)));
            weights[q][half * LANES..(half + 1) * LANES].copy_from_slice(&s.store(weight));
            let total = s.fma(s.load(&sums[q].total[half]), s.splat(rescale[q]), weight);
            sums[q].total[half] = s.store(total);
        }
    }

    let weighted = Weighted { visible, weights, rescale };
    let mut c = 0;
    while c < shape.head_dim {
        // As many sums side by side as the registers hold.
        c += match shape.head_dim - c {
            64.. if S::WIDE || Q == 1 => weighted.add::<S, B, 4>(s, block, sums, c),
            32.. if S::WIDE || Q <= 2 => weighted.add::<S, B, 2>(s, block, sums, c),
            _ => weighted.add::<S, B, 1>(s, block, sums, c),
        };
    }
    Q
}

/// Scores of the block's 32 positions: two chains of fused multiply-adds, over even and over odd
/// dimensions, added and multiplied by the scale.
#[inline(always)]
fn scores<S: Isa, B: Block, const Q: usize>(
    s: S,
    block: &B,
    queries: &[Query; Q],
    shape: Shape,
) -> [[S::F; 2]; Q] {
    let mut scores = [[s.splat(0.0); 2]; Q];
    if S::WIDE {
        score::<S, B, Q, 2, 0>(s, block, queries, shape, &mut scores);
        return scores;
    }
    // Few registers: half the positions at a time.
    half::<S, B, Q, 0>(s, block, queries, shape, &mut scores);
    half::<S, B, Q, 1>(s, block, queries, shape, &mut scores);
    scores
}

/// As [`scores`], half `HALF` of the block, for up to three queries at a time. A number that is
/// known while compiling: else both halves of each dimension would be read, and go by the stack.
#[inline(always)]
fn half<S: Isa, B: Block, const Q: usize, const HALF: usize>(
    s: S,
    block: &B,
    queries: &[Query; Q],
    shape: Shape,
    scores: &mut [[S::F; 2]; Q],
) {
    let mut one = [[s.splat(0.0); 1]; Q];
    if Q <= 3 {
        score::<S, B, Q, 1, HALF>(s, block, queries, shape, &mut one);
    } else if Q.is_multiple_of(3) {
        parts::<S, B, Q, 3, HALF>(s, block, queries, shape, &mut one);
    } else {
        parts::<S, B, Q, 2, HALF>(s, block, queries, shape, &mut one);
    }
    for q in 0..Q {
        scores[q][HALF] = one[q][0];
    }
}

/// As [`score`] of half a block, `P` of the `Q` queries at a time.
#[inline(always)]
fn parts<S: Isa, B: Block, const Q: usize, const P: usize, const HALF: usize>(
    s: S,
    block: &B,
    queries: &[Query; Q],
    shape: Shape,
    scores: &mut [[S::F; 1]; Q],
) {
    debug_assert!(Q.is_multiple_of(P));
    for (queries, scores) in queries.as_chunks().0.iter().zip(scores.as_chunks_mut().0) {
        score::<S, B, P, 1, HALF>(s, block, queries, shape, scores);
    }
}

/// As [`scores`], `N` halves of a block from half `FIRST` on.
#[inline(always)]
fn score<S: Isa, B: Block, const Q: usize, const N: usize, const FIRST: usize>(
    s: S,
    block: &B,
    queries: &[Query; Q],
    shape: Shape,
    scores: &mut [[S::F; N]; Q],
) {
    let mut chains = [[[s.splat(0.0); N]; 2]; Q];
    for d in (0..shape.head_dim).step_by(2) {
        for odd in 0..2 {
            if FIRST == 0 {
                block.ahead(s, d + odd);
            }
            let keys = block.keys(s, d + odd);
            for q in 0..Q {
                // SAFETY: a query has `head_dim` values, an even number.
                let x = s.splat(unsafe { *queries[q].values.add(d + odd) });
                for half in 0..N {
                    chains[q][odd][half] = s.fma(x, keys[FIRST + half], chains[q][odd][half]);
                }
            }
        }
    }
    for q in 0..Q {
        for half in 0..N {
            let sum = s.add(chains[q][0][half], chains[q][1][half]);
            scores[q][half] = s.mul(sum, s.splat(shape.scale));
        }
    }
}

/// `Q` queries' weights for the 32 positions of a block.
struct Weighted<const Q: usize> {
    visible: [usize; Q],
    weights: [[f32; BLOCK_TOKENS]; Q],
    /// By how much earlier sums count less, now that the largest score has grown.
    rescale: [f32; LANES],
}

impl<const Q: usize> Weighted<Q> {
    /// Adds the block's values, times their weights, to columns `c..c + 16 C` of the sums; returns
    /// the number of columns.
    #[inline(always)]
    fn add<S: Isa, B: Block, const C: usize>(
        &self,
        s: S,
        block: &B,
        sums: &mut [Sums; Q],
        c: usize,
    ) -> usize {
        let mut out = [[s.splat(0.0); C]; Q];
        for q in 0..Q {
            for i in 0..C {
                let lanes = lanes_at(&sums[q].values, c + i * LANES);
                out[q][i] = s.mul(s.load(lanes), s.splat(self.rescale[q]));
            }
        }
        // A position that a query does not see is left out, not weighted zero: what lies there
        // may be infinite.
        let common = self.visible.iter().copied().min().unwrap_or(0);
        for t in 0..common {
            let mut values = [s.splat(0.0); C];
            for i in 0..C {
                values[i] = block.values(s, t, c + i * LANES);
            }
            for q in 0..Q {
                let weight = s.splat(self.weights[q][t]);
                for i in 0..C {
                    out[q][i] = s.fma(weight, values[i], out[q][i]);
                }
            }
        }
        for q in 0..Q {
            for t in common..self.visible[q] {
                let weight = s.splat(self.weights[q][t]);
                for i in 0..C {
                    out[q][i] = s.fma(weight, block.values(s, t, c + i * LANES), out[q][i]);
                }
            }
            for i in 0..C {
                let to = &mut sums[q].values[c + i * LANES..c + (i + 1) * LANES];
                to.copy_from_slice(&s.store(out[q][i]));
            }
        }
        C * LANES
    }
}

#[inline(always)]
fn lanes_at(values: &[f32; SUMS], c: usize) -> &[f32; LANES] {
    values[c..].first_chunk().expect("16 more than any head has")
}

/// Positions in a block, as lanes.
const POSITIONS: [[f32; LANES]; 2] = {
    let mut positions = [[0.0; LANES]; 2];
    let mut i = 0;
    while i < 2 * LANES {
        positions[i / LANES][i % LANES] = i as f32;
        i += 1;
    }
    positions
};

/// Which rows and heads a unit takes.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    heads: usize,
}

/// One unit's rows of one span, and its heads.
struct Patch<'a> {
    span: &'a BatchSpan,
    rows: Range<usize>,
    heads: Range<usize>,
}

impl Tile {
    /// Number of units.
    fn units(self, rows: usize, heads: usize) -> usize {
        rows.div_ceil(self.rows) * (heads / self.heads)
    }

    /// Cuts a unit where spans end. Unit 0 has the last rows: they see most, and what takes longest
    /// is best begun first.
    #[inline(always)]
    fn patches(self, unit: usize, heads: usize, batch: &Batch) -> impl Iterator<Item = Patch<'_>> {
        let pieces = heads / self.heads;
        let unit = self.units(batch.tokens.len(), heads) - 1 - unit;
        let mut next = unit / pieces * self.rows;
        let end = batch.tokens.len().min(next + self.rows);
        let first_head = unit % pieces * self.heads;
        std::iter::from_fn(move || {
            (next < end).then(|| {
                let span = &batch.spans[batch.span_of[next] as usize];
                let rows = next..end.min(span.rows.end as usize);
                assert!(span.rows.start as usize <= next && !rows.is_empty(), "spans tile rows");
                next = rows.end;
                Patch { span, rows, heads: first_head..first_head + self.heads }
            })
        })
    }
}

impl Patch<'_> {
    /// Number of queries.
    fn len(&self) -> usize {
        self.rows.len() * self.heads.len()
    }

    /// Row and head of up to `N` queries from number `from` on, row by row; the last one stands in
    /// for those beyond the end.
    #[inline(always)]
    fn places<const N: usize>(&self, from: usize) -> ([(usize, usize); N], usize) {
        let heads = self.heads.len();
        let mut places = [(0, 0); N];
        for (i, place) in places.iter_mut().enumerate() {
            let i = (from + i).min(self.len() - 1);
            *place = (self.rows.start + i / heads, self.heads.start + i % heads);
        }
        (places, N.min(self.len() - from))
    }
}
