//! Rotary positions, KV blocks in scattered pages, and both kinds of attention.

use super::*;
use crate::kernels::ops::{Activation, KvShape, PackedAttention, PagedAttention, Rope, RopeStore};
use crate::scheduler::step::BLOCK_TOKENS;
use half::f16;

const LAYERS: usize = 2;
const GROUPS: usize = 3;
const BLOCKS_PER_PAGE: usize = 5;
const POSITIONS: usize = 200;

#[derive(Clone, Copy)]
struct Model {
    heads: usize,
    kv: KvShape,
}

impl Model {
    fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self { heads, kv: KvShape { layers: LAYERS, heads: kv_heads, head_dim } }
    }

    fn width(self) -> usize {
        (self.heads + 2 * self.kv.heads) * self.kv.head_dim
    }

    fn scale(self) -> f32 {
        1.0 / (self.kv.head_dim as f32).sqrt()
    }

    /// cos and sin of each position's angles.
    fn table(self) -> Vec<f32> {
        let half = self.kv.head_dim / 2;
        let angle = |p: usize, i: usize| p as f64 / 10_000_f64.powf(i as f64 / half as f64);
        let row = |p| {
            let cos = (0..half).map(move |i| angle(p, i).cos() as f32);
            cos.chain((0..half).map(move |i| angle(p, i).sin() as f32))
        };
        (0..POSITIONS).flat_map(row).collect()
    }

    /// Pages of all groups and layers, shuffled over the region.
    fn map(self) -> (KvMap, usize) {
        let page = self.kv.block_bytes() * BLOCKS_PER_PAGE;
        let pages = GROUPS * LAYERS + 1;
        let offsets = (0..GROUPS * LAYERS).map(|i| (i * 3 + 1) % pages * page).collect();
        (KvMap { layers: LAYERS, offsets }, pages * page)
    }
}

/// A piece of a sequence: which one, from where, how many rows.
type Piece = (usize, usize, usize);

/// The batch of some pieces of sequences; a sequence has the same blocks wherever it appears.
fn batch(pieces: &[Piece]) -> Batch {
    let mut batch = spans(&pieces.iter().map(|piece| piece.2).collect::<Vec<_>>());
    for (span, (sequence, start, rows)) in pieces.iter().enumerate() {
        let first = batch.blocks.len() as u32;
        for block in 0..(start + rows).div_ceil(BLOCK_TOKENS) {
            // Block b of sequence s is slot s of group b % 3, or the one 3 further.
            let slot = sequence + block / GROUPS * 3;
            batch.blocks.push(((block % GROUPS) as u32, slot as u32));
        }
        let to = &mut batch.spans[span];
        to.start = *start as u32;
        to.blocks = first..batch.blocks.len() as u32;
        let rows = to.rows.start as usize..to.rows.end as usize;
        batch.positions[rows].iter_mut().for_each(|position| *position += *start as u32);
    }
    batch
}

/// Runs rope, store and attention over `pieces` of `sequences` (qkv rows each); returns what
/// attention gave. The KV region is full of infinities where nothing was stored.
fn run(
    model: Model,
    sequences: &[Vec<f32>],
    steps: &[Vec<Piece>],
    quantised: bool,
) -> Vec<Vec<f32>> {
    let width = model.heads * model.kv.head_dim;
    let (map, bytes) = model.map();
    let mut kv = Region::new(bytes).unwrap();
    kv.as_bytes_mut().as_chunks_mut().0.fill(f16::NEG_INFINITY.to_le_bytes());
    let mut outputs: Vec<Vec<f32>> =
        sequences.iter().map(|rows| vec![0.0; rows.len() / model.width() * width]).collect();
    for pieces in steps {
        let batch = batch(pieces);
        let rows = batch.tokens.len();
        let mut layout = Layout::default();
        let (qkv, full) = (layout.buf(rows, model.width()), layout.buf(rows, width));
        let quant = layout.quant(rows, width);
        let output = if quantised { Activation::Quant(quant) } else { Activation::Full(full) };
        let (heads, shape, layer) = (model.heads, model.kv, 1);
        let table = model.table().into();
        let rope = RopeStore { qkv, heads, kv: shape, layer, table };
        let attention =
            PagedAttention { qkv, heads, kv: shape, layer, scale: model.scale(), output };
        let ops = vec![Op::RopeStore(rope), Op::PagedAttention(attention)];
        let mut case = Case::new(ops, &layout, batch);
        (case.map, case.kv) = (map.clone(), kv);
        let values: Vec<f32> = pieces
            .iter()
            .flat_map(|(sequence, start, rows)| {
                &sequences[*sequence][start * model.width()..(start + rows) * model.width()]
            })
            .copied()
            .collect();
        case.fill(qkv, &values);
        case.run_everywhere();
        let got = match output {
            Activation::Full(buf) => case.floats(buf, rows),
            Activation::Half(_) => unreachable!("not asked for"),
            Activation::Quant(buf) => {
                case.dequantised(buf, rows).iter().map(|x| *x as f32).collect()
            }
        };
        let mut from = 0;
        for (sequence, start, rows) in pieces {
            outputs[*sequence][start * width..(start + rows) * width]
                .copy_from_slice(&got[from..from + rows * width]);
            from += rows * width;
        }
        kv = case.kv;
    }
    outputs
}

/// What an attention is like.
#[derive(Clone, Copy)]
struct Like {
    rope: bool,
    /// Keys and values are rounded to f16.
    half: bool,
    causal: bool,
}

const PAGED: Like = Like { rope: true, half: true, causal: true };

/// Attention by f64.
fn expected(model: Model, rows: &[f32], Like { rope, half: rounded, causal }: Like) -> Vec<f64> {
    let (head_dim, table) = (model.kv.head_dim, model.table());
    let count = rows.len() / model.width();
    let vector = |row: usize, head: usize| -> Vec<f64> {
        let values = &rows[row * model.width() + head * head_dim..][..head_dim];
        let mut values: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
        let half = head_dim / 2;
        if rope && head < model.heads + model.kv.heads {
            for i in 0..half {
                let (a, b) = (values[i], values[half + i]);
                let cos = f64::from(table[row * head_dim + i]);
                let sin = f64::from(table[row * head_dim + half + i]);
                (values[i], values[half + i]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        if rounded && head >= model.heads {
            values.iter_mut().for_each(|x| *x = f64::from(f16::from_f64(*x)));
        }
        values
    };
    let mut output = Vec::new();
    for row in 0..count {
        for head in 0..model.heads {
            let kv_head = model.heads + head / (model.heads / model.kv.heads);
            let q = vector(row, head);
            let seen = if causal { row + 1 } else { count };
            let scores: Vec<f64> = (0..seen)
                .map(|t| {
                    let k = vector(t, kv_head);
                    q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>() * f64::from(model.scale())
                })
                .collect();
            let peak = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - peak).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sum = vec![0.0; head_dim];
            for (t, weight) in weights.iter().enumerate() {
                let v = vector(t, kv_head + model.kv.heads);
                sum.iter_mut().zip(v).for_each(|(sum, v)| *sum += weight / total * v);
            }
            output.extend(sum);
        }
    }
    output
}

fn sequence(random: &mut Random, model: Model, rows: usize) -> Vec<f32> {
    random.floats(rows * model.width()).iter().map(|x| 3.0 * x).collect()
}

#[test]
fn paged_attention_of_whole_prompts() {
    let mut random = Random::new(21);
    for model in [
        Model::new(9, 3, 64),
        Model::new(2, 2, 16),
        Model::new(4, 1, 128),
        Model::new(7, 1, 80),
        Model::new(2, 1, 256),
    ] {
        let lengths = [1, 33, 70];
        let sequences: Vec<_> =
            lengths.iter().map(|rows| sequence(&mut random, model, *rows)).collect();
        let step: Vec<Piece> = lengths.iter().enumerate().map(|(s, n)| (s, 0, *n)).collect();
        let outputs = run(model, &sequences, &[step], false);
        for (rows, output) in sequences.iter().zip(outputs) {
            assert_close(&output, &expected(model, rows, PAGED), 2e-3);
        }
    }
}

#[test]
fn a_row_attends_the_same_in_any_chunk_and_company() {
    let mut random = Random::new(22);
    let model = Model::new(6, 2, 32);
    let lengths = [130, 75, 1];
    let sequences: Vec<_> =
        lengths.iter().map(|rows| sequence(&mut random, model, *rows)).collect();
    for quantised in [false, true] {
        let whole = run(model, &sequences, &[vec![(0, 0, 130), (1, 0, 75), (2, 0, 1)]], quantised);
        let chunks = vec![
            vec![(1, 0, 31), (0, 0, 40)],
            vec![(0, 40, 1), (1, 31, 1), (2, 0, 1)],
            vec![(1, 32, 43), (0, 41, 22)],
            vec![(0, 63, 1)],
            vec![(0, 64, 1)],
            vec![(0, 65, 65)],
        ];
        let chunked = run(model, &sequences, &chunks, quantised);
        for (whole, chunked) in whole.iter().zip(&chunked) {
            assert_same_bits(whole, chunked);
        }
    }
}

#[test]
fn quantised_attention_is_close_to_the_full_one() {
    let mut random = Random::new(23);
    let model = Model::new(4, 2, 64);
    let sequences = [sequence(&mut random, model, 50)];
    let outputs = run(model, &sequences, &[vec![(0, 0, 50)]], true);
    assert_close(&outputs[0], &expected(model, &sequences[0], PAGED), 2e-2);
}

/// An encoder with rotary positions sees what a generator sees, keys and values not rounded.
#[test]
fn packed_causal_attention_with_rope_is_paged_attention_without_a_cache() {
    let mut random = Random::new(25);
    let model = Model::new(6, 2, 32);
    let sequence = sequence(&mut random, model, 90);
    let batch = spans(&[90]);
    let (heads, kv_heads, head_dim) = (model.heads, model.kv.heads, model.kv.head_dim);
    let mut layout = Layout::default();
    let (qkv, out) = (layout.buf(90, model.width()), layout.buf(90, heads * head_dim));
    let (scale, output, causal) = (model.scale(), Activation::Full(out), true);
    let rope = Rope { qkv, heads, kv_heads, head_dim, table: model.table().into() };
    let attention = PackedAttention { qkv, heads, kv_heads, causal, head_dim, scale, output };
    let ops = vec![Op::Rope(rope), Op::PackedAttention(attention)];
    let mut case = Case::new(ops, &layout, batch);
    case.fill(qkv, &sequence);
    case.run_everywhere();
    let like = Like { half: false, ..PAGED };
    assert_close(&case.floats(out, 90), &expected(model, &sequence, like), 2e-5);
}

#[test]
fn packed_attention_stays_within_spans() {
    let mut random = Random::new(24);
    let models = [
        (Model::new(12, 12, 32), false),
        (Model::new(2, 2, 64), false),
        (Model::new(3, 3, 16), true),
        (Model::new(1, 1, 48), false),
        (Model::new(6, 2, 32), true),
        (Model::new(4, 1, 64), false),
    ];
    for (model, causal) in models {
        let Model { heads, kv: KvShape { heads: kv_heads, head_dim, .. } } = model;
        let lengths = [1, 20, 33, 100, 64];
        let sequences: Vec<_> =
            lengths.iter().map(|rows| sequence(&mut random, model, *rows)).collect();
        let mut together = Vec::new();
        for alone in [false, true] {
            let parts: Vec<Vec<usize>> = match alone {
                false => vec![(0..lengths.len()).collect()],
                true => (0..lengths.len()).map(|index| vec![index]).collect(),
            };
            let mut rows_out = Vec::new();
            for part in parts {
                let batch = spans(&part.iter().map(|i| lengths[*i]).collect::<Vec<_>>());
                let rows = batch.tokens.len();
                let mut layout = Layout::default();
                let qkv = layout.buf(rows, model.width());
                let output = layout.buf(rows, heads * head_dim);
                let (scale, to) = (model.scale(), Activation::Full(output));
                let op =
                    PackedAttention { qkv, heads, kv_heads, causal, head_dim, scale, output: to };
                let mut case = Case::new(vec![Op::PackedAttention(op)], &layout, batch);
                let values: Vec<f32> = part.iter().flat_map(|i| sequences[*i].clone()).collect();
                case.fill(qkv, &values);
                case.run_everywhere();
                rows_out.extend(case.floats(output, rows));
            }
            if !alone {
                let expected: Vec<f64> = sequences
                    .iter()
                    .flat_map(|rows| {
                        expected(model, rows, Like { rope: false, half: false, causal })
                    })
                    .collect();
                assert_close(&rows_out, &expected, 3e-6);
                together = rows_out;
            } else {
                assert_same_bits(&rows_out, &together);
            }
        }
    }
}
