//! Rotary positions, KV blocks in scattered pages, and attention of every kind and head size.

use super::*;
use crate::kernels::builder::{Builder, Capacity, Dense};
use crate::kernels::ops::{
    Activation, Embed, Epilogue, HeadNorm, KvShape, Op, PackedAttention, PagedAttention, Rope,
    RopeStore, Rows, Vector,
};

const VOCABULARY: usize = 23;
const CONTEXT: usize = 448;

/// cos and sin of each position's angles.
fn table(head_dim: usize, context: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let angle = |p: usize, i: usize| p as f64 / 10_000_f64.powf(i as f64 / half as f64);
    let row = |p| {
        let cos = (0..half).map(move |i| angle(p, i).cos() as f32);
        cos.chain((0..half).map(move |i| angle(p, i).sin() as f32))
    };
    (0..context).flat_map(row).collect()
}

/// Tokens become qkv rows as they are.
fn paged(heads: usize, kv_heads: usize, head_dim: usize, rows: usize) -> Program {
    paged_for(CONTEXT, (heads, kv_heads, head_dim), rows)
}

fn paged_for(
    context: usize,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    rows: usize,
) -> Program {
    let kv = KvShape { layers: 2, heads: kv_heads, head_dim };
    let width = (heads + 2 * kv_heads) * head_dim;
    let mut random = Random::new((heads * head_dim) as u64);
    let embedding = dense(&mut random, VOCABULARY, width, 2.0);
    let mut builder = Builder::new(Capacity { rows, yields: rows, context });
    let qkv = builder.full(Rows::All, width);
    let output = builder.full(Rows::All, heads * head_dim);
    let embed = Embed { table: embedding, positions: None, types: None, output: qkv };
    builder.push(Op::Embed(embed));
    let (layer, scale) = (1, 1.0 / (head_dim as f32).sqrt());
    let table = table(head_dim, context).into();
    builder.push(Op::RopeStore(RopeStore { qkv, heads, kv, layer, table }));
    let output_rows = Activation::Full(output);
    let attention = PagedAttention { qkv, heads, kv, layer, scale, output: output_rows };
    builder.push(Op::PagedAttention(attention));
    builder.finish(output, Some(kv))
}

/// Scales of heads around one.
fn head_scales(random: &mut Random, head_dim: usize) -> [Vector; 2] {
    [0; 2].map(|_| random.floats(head_dim).into_iter().map(|x| 1.0 + x / 2.0).collect())
}

/// `program` with heads normalised before they are turned.
fn normed(mut program: Program) -> Program {
    let turn = program.ops.iter().position(|op| matches!(op, Op::RopeStore(_) | Op::Rope(_)));
    let (qkv, heads, head_dim) = match &program.ops[turn.unwrap()] {
        Op::RopeStore(op) => (op.qkv, [op.heads, op.kv.heads], op.kv.head_dim),
        Op::Rope(op) => (op.qkv, [op.heads, op.kv_heads], op.head_dim),
        _ => unreachable!("just found"),
    };
    let weights = head_scales(&mut Random::new(21), head_dim);
    let norm = HeadNorm { qkv, heads, weights, eps: 0.05 };
    program.ops.insert(turn.unwrap(), Op::HeadNorm(norm));
    program
}

#[test]
fn heads_are_normalised_before_they_are_turned() {
    for (heads, kv_heads, head_dim) in [(4, 2, 32), (3, 1, 128), (2, 2, 256), (2, 1, 80)] {
        let mut random = Random::new(head_dim as u64 + 1);
        let mut pair = Pair::new(normed(paged(heads, kv_heads, head_dim, 64)));
        for pieces in [vec![piece(&mut random, 0, 0, 40)], vec![piece(&mut random, 0, 40, 1)]] {
            let work = work(&pieces);
            let (device, reference) = pair.both(&work, work.batch.tokens.len());
            assert_near(&device, &reference, 2e-3);
        }
    }
}

fn piece(random: &mut Random, sequence: usize, start: usize, rows: usize) -> Piece {
    let tokens = (0..rows).map(|_| random.below(VOCABULARY) as u32).collect();
    Piece { sequence, start, tokens, yields: false }
}

/// Fills the KV region with infinities, to see that what nobody stored is not used.
fn poison(pair: &mut Pair) {
    pair.kv.as_bytes_mut().as_chunks_mut().0.fill(half::f16::NEG_INFINITY.to_le_bytes());
    let bytes = pair.kv.as_bytes().to_vec();
    pair.device.fill_kv(&bytes);
}

#[test]
fn paged_attention_is_right_for_all_head_sizes() {
    for (heads, kv_heads, head_dim) in
        [(4, 2, 16), (3, 1, 64), (4, 4, 80), (2, 1, 128), (17, 1, 32), (2, 2, 256)]
    {
        let mut random = Random::new(head_dim as u64);
        let mut pair = Pair::new(paged(heads, kv_heads, head_dim, 96));
        poison(&mut pair);
        let steps = [
            // A prompt in chunks beside another's, then single rows of both.
            vec![piece(&mut random, 0, 0, 33), piece(&mut random, 1, 0, 5)],
            vec![piece(&mut random, 0, 33, 40), piece(&mut random, 1, 5, 1)],
            vec![piece(&mut random, 1, 6, 1), piece(&mut random, 0, 73, 1)],
            vec![piece(&mut random, 0, 74, 2)],
        ];
        for pieces in steps {
            let work = work(&pieces);
            let (device, reference) = pair.both(&work, work.batch.tokens.len());
            assert_near(&device, &reference, 2e-3);
        }
    }
}

#[test]
fn long_sequences_are_split_and_merged() {
    let mut random = Random::new(5);
    let mut pair = Pair::new(paged(4, 2, 32, 440));
    poison(&mut pair);
    let work_of = |pieces: &[Piece]| work(pieces);
    let first = work_of(&[piece(&mut random, 0, 0, 439)]);
    pair.both(&first, 0);
    let second = work_of(&[piece(&mut random, 1, 0, 3), piece(&mut random, 0, 439, 1)]);
    let (device, reference) = pair.both(&second, 4);
    assert_near(&device, &reference, 2e-3);
    // Nine blocks in splits of five: the last split is shorter.
    let third = work_of(&[piece(&mut random, 0, 270, 1)]);
    let (device, reference) = pair.both(&third, 1);
    assert_near(&device, &reference, 2e-3);
}

/// Lengths that do not divide among the most splits.
#[test]
fn no_split_of_a_long_sequence_is_empty() {
    let mut random = Random::new(6);
    let mut pair = Pair::new(paged_for(7300, (4, 2, 32), 440));
    pair.both(&work(&[piece(&mut random, 0, 0, 439)]), 0);
    for blocks in [128, 129, 135, 145, 161, 180, 209, 225, 228] {
        let mut long = work(&[piece(&mut random, 0, blocks * BLOCK_TOKENS - 1, 1)]);
        // The sequence goes through the same few blocks again and again.
        let few = long.batch.blocks[..13].to_vec();
        long.batch.blocks.iter_mut().zip(few.iter().cycle()).for_each(|(to, from)| *to = *from);
        let (device, reference) = pair.both(&long, 1);
        assert_near(&device, &reference, 2e-3);
    }
}

/// Rows are multiplied once before, so that they are bf16; turned if causal, as decoders are.
fn packed(heads: usize, kv_heads: usize, head_dim: usize, causal: bool) -> Program {
    let (hidden, rows) = (64, 120);
    let mut random = Random::new(9);
    let embedding = dense(&mut random, VOCABULARY, hidden, 1.0);
    let width = (heads + 2 * kv_heads) * head_dim;
    let weight = dense(&mut random, width, hidden, 0.25);
    let mut builder = Builder::new(Capacity { rows, yields: rows, context: rows });
    let input = builder.full(Rows::All, hidden);
    let qkv = builder.full(Rows::All, width);
    let output = builder.full(Rows::All, heads * head_dim);
    let embed = Embed { table: embedding, positions: None, types: None, output: input };
    builder.push(Op::Embed(embed));
    let layer = Dense { weight, bias: None };
    builder.linear(&layer, Activation::Full(input), Epilogue::Store, qkv);
    if causal {
        let table = table(head_dim, CONTEXT).into();
        builder.push(Op::Rope(Rope { qkv, heads, kv_heads, head_dim, table }));
    }
    let (scale, output_rows) = (1.0 / (head_dim as f32).sqrt(), Activation::Full(output));
    let attention =
        PackedAttention { qkv, heads, kv_heads, causal, head_dim, scale, output: output_rows };
    builder.push(Op::PackedAttention(attention));
    builder.finish(output, None)
}

#[test]
fn packed_heads_share_keys_and_see_no_later_rows() {
    for (heads, kv_heads, head_dim) in [(4, 2, 32), (6, 1, 64), (2, 2, 48), (17, 1, 16)] {
        for program in [
            packed(heads, kv_heads, head_dim, true),
            normed(packed(heads, kv_heads, head_dim, true)),
            packed(heads, kv_heads, head_dim, false),
        ] {
            let lengths = [1, 70, 9, 40];
            let work = spans(&lengths, VOCABULARY);
            let (device, reference) = Pair::new(program).both(&work, lengths.iter().sum());
            assert_near(&device, &reference, 8e-3);
        }
    }
}

#[test]
fn packed_attention_stays_within_spans() {
    for (heads, head_dim) in [(2, 32), (3, 64), (1, 128), (2, 48)] {
        let mut pair = Pair::new(packed(heads, heads, head_dim, false));
        for lengths in [&[1, 70, 9, 40][..], &[120], &[33]] {
            let work = spans(lengths, VOCABULARY);
            let (device, reference) = pair.both(&work, lengths.iter().sum());
            assert_near(&device, &reference, 6e-3);
        }
    }
}
