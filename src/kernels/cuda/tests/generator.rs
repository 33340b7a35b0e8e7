//! A whole small Llama: prompts in chunks, then decoding, against the reference; as single
//! launches and as a graph.

use super::*;
use crate::kernels::builder::{Builder, Capacity, Dense, Scale};
use crate::kernels::cuda::lower::products::is_for_product;
use crate::kernels::ops::{
    Embed, Epilogue, GatedSilu, Gather, KvShape, Linear, Norm, Op, PagedAttention, RopeStore, Rows,
};
use crate::kernels::packed::Encoding;
use std::sync::Arc;

const VOCABULARY: usize = 90;
/// As wide as all heads, so that norms and attention share a buffer of rows.
const HIDDEN: usize = 128;
const FF: usize = 96;
const HEADS: usize = 4;
const KV: KvShape = KvShape { layers: 2, heads: 2, head_dim: 32 };
const CONTEXT: usize = 128;

fn matrix(random: &mut Random, encoding: Encoding, n: usize, k: usize) -> Arc<Packed> {
    if encoding == Encoding::F32 {
        return dense(random, n, k, 0.125);
    }
    let mut bytes = random.bytes(n * encoding.row_bytes(k));
    for block in bytes.chunks_exact_mut(encoding.row_bytes(32)) {
        let value = 0.02 + random.floats(1)[0] * 0.01;
        let scale = if encoding == Encoding::Q8Zero { value / 16.0 } else { value };
        block[..2].copy_from_slice(&half::f16::from_f32(scale).to_le_bytes());
        if encoding == Encoding::Q4One {
            let minimum = half::f16::from_f32(-8.0 * scale);
            block[2..4].copy_from_slice(&minimum.to_le_bytes());
        }
    }
    Packed::from_bytes(n, k, encoding, &bytes).unwrap().into()
}

fn llama(encoding: Encoding) -> Program {
    let random = &mut Random::new(11);
    let mut builder = Builder::new(Capacity { rows: 80, yields: 8, context: CONTEXT });
    let hidden = builder.full(Rows::All, HIDDEN);
    let qkv = builder.full(Rows::All, (HEADS + 2 * KV.heads) * KV.head_dim);
    let gate_up = builder.full(Rows::All, 2 * FF);
    let scale = |random: &mut Random| Scale {
        weight: random.floats(HIDDEN).into_iter().map(|x| 1.0 + x / 4.0).collect(),
        bias: None,
        eps: 1e-5,
    };
    let dense_of = |random: &mut Random, n: usize, k: usize| Dense {
        weight: matrix(random, encoding, n, k),
        bias: None,
    };
    let table = dense(random, VOCABULARY, HIDDEN, 1.0);
    builder.push(Op::Embed(Embed { table, positions: None, types: None, output: hidden }));
    let angles = (0..CONTEXT * KV.head_dim).map(|i| {
        let (position, i) = (i / KV.head_dim, i % KV.head_dim);
        let angle = position as f32 / 100_f32.powf((i % 16) as f32 / 16.0);
        if i < 16 { angle.cos() } else { angle.sin() }
    });
    let angles: Arc<[f32]> = angles.collect();
    for layer in 0..KV.layers {
        let weights = dense_of(random, (HEADS + 2 * KV.heads) * KV.head_dim, HIDDEN);
        let normed = builder.input_for(&weights.weight, Rows::All);
        builder.norm(&scale(random), hidden, normed);
        builder.linear(&weights, normed, Epilogue::Store, qkv);
        let table = angles.clone();
        builder.push(Op::RopeStore(RopeStore { qkv, heads: HEADS, kv: KV, layer, table }));
        let weights = dense_of(random, HIDDEN, HEADS * KV.head_dim);
        let output = builder.input_for(&weights.weight, Rows::All);
        let (heads, kv) = (HEADS, KV);
        let scale_of = 1.0 / (KV.head_dim as f32).sqrt();
        let attention = PagedAttention { qkv, heads, kv, layer, scale: scale_of, output };
        builder.push(Op::PagedAttention(attention));
        builder.linear(&weights, output, Epilogue::Add, hidden);
        let weights = dense_of(random, 2 * FF, HIDDEN);
        let normed = builder.input_for(&weights.weight, Rows::All);
        builder.norm(&scale(random), hidden, normed);
        builder.linear(&weights, normed, Epilogue::Store, gate_up);
        let weights = dense_of(random, HIDDEN, FF);
        let output = builder.input_for(&weights.weight, Rows::All);
        builder.push(Op::GatedSilu(GatedSilu { input: gate_up, output }));
        builder.linear(&weights, output, Epilogue::Add, hidden);
    }
    head(builder, hidden, scale(random), matrix(random, encoding, VOCABULARY, HIDDEN))
}

/// Gathered rows, normalised, times the vocabulary.
fn head(
    mut builder: Builder,
    hidden: crate::kernels::ops::Buf,
    scale: Scale,
    weight: Arc<Packed>,
) -> Program {
    let last = builder.full(Rows::Gathered, HIDDEN);
    let logits = builder.full(Rows::Gathered, VOCABULARY);
    let normed = builder.input_for(&weight, Rows::Gathered);
    builder.push(Op::Gather(Gather { input: hidden, output: last }));
    builder.push(Op::Norm(Norm {
        rows: Rows::Gathered,
        input: last,
        weight: scale.weight,
        bias: None,
        eps: scale.eps,
        output: normed,
    }));
    builder.push(Op::Linear(Linear {
        rows: Rows::Gathered,
        input: normed,
        weight,
        bias: None,
        epilogue: Epilogue::Store,
        output: logits,
    }));
    builder.finish(logits, Some(KV))
}

fn piece(sequence: usize, start: usize, rows: usize, yields: bool) -> Piece {
    let tokens = (start..start + rows).map(|i| ((i * 37 + sequence * 11) % VOCABULARY) as u32);
    Piece { sequence, start, tokens: tokens.collect(), yields }
}

/// Three prompts, one in chunks, then all decode: fewer rows than the graph is for.
fn steps() -> Vec<Vec<Piece>> {
    let mut steps = vec![
        vec![piece(0, 0, 70, false)],
        vec![piece(0, 70, 9, true), piece(1, 0, 12, true), piece(2, 0, 3, true)],
    ];
    steps.extend((0..3).map(|i| {
        [(1, 12), (0, 79), (2, 3)].map(|(of, start)| piece(of, start + i, 1, true)).to_vec()
    }));
    steps
}

#[test]
fn logits_agree_with_the_reference() {
    for encoding in [Encoding::F32, Encoding::Q4One, Encoding::Q8Zero] {
        let mut pair = Pair::new(llama(encoding));
        for pieces in steps() {
            let work = work(&pieces);
            let (device, reference) = pair.both(&work, work.batch.gather.len());
            if !device.is_empty() {
                // Quantised weights: the reference also quantises what they are multiplied with.
                let tolerance = if encoding == Encoding::F32 { 1e-2 } else { 2e-2 };
                assert_near(&device, &reference, tolerance);
            }
        }
    }
}

#[test]
fn a_copied_block_serves_what_it_shares() {
    let text = piece(0, 0, 60, true).tokens;
    // The same for 45 tokens: a block, which is shared, and 13 of the next.
    let mut other = text[..45].to_vec();
    other.extend([7, 8, 9, 10]);
    let continued = |from: usize, sequence| {
        let tokens = other[from..].to_vec();
        work(&[Piece { sequence, start: from, tokens, yields: true }])
    };
    let mut pair = Pair::new(llama(Encoding::F32));
    pair.both(&work(&[piece(0, 0, 60, true)]), 1);
    let theirs = work(&[piece(0, 0, 60, true)]).batch.blocks;
    let mut copying = continued(45, 1);
    copying.batch.blocks[0] = theirs[0];
    copying.batch.copies.push([theirs[1], copying.batch.blocks[1]]);
    let (device, reference) = pair.both(&copying, 1);
    assert_near(&device, &reference, 1e-2);
    let mut alone = Pair::new(llama(Encoding::F32));
    let (device_alone, reference_alone) = alone.both(&continued(0, 1), 1);
    assert_near(&device, &device_alone, 1e-2);
    assert_eq!(reference, reference_alone);
}

#[test]
fn blocks_that_are_not_there_are_refused() {
    let mut pair = Pair::new(llama(Encoding::F32));
    pair.step(&work(&[piece(0, 0, 40, true)])).unwrap();
    let good = work(&[piece(0, 40, 1, true)]);
    let beyond = [(1000, 0), (0, BLOCKS_PER_PAGE as u32)];
    for block in beyond {
        let mut wrong = good.clone();
        wrong.batch.blocks[0] = block;
        assert!(matches!(pair.step(&wrong), Err(RunError::Work(_))), "{block:?}");
        wrong.batch.blocks[0] = good.batch.blocks[0];
        wrong.batch.copies.push([good.batch.blocks[0], block]);
        assert!(matches!(pair.step(&wrong), Err(RunError::Work(_))), "{block:?}");
    }
    pair.step(&good).unwrap();
}

#[test]
fn a_graph_gives_the_bits_of_single_launches() {
    let mut plain = Pair::new(llama(Encoding::F32));
    let mut graphed = Pair::new(llama(Encoding::F32));
    assert!(graphed.device.record(0).unwrap() > 0);
    for pieces in steps() {
        let work = work(&pieces);
        let tokens = plain.step(&work).unwrap().tokens;
        assert_eq!(graphed.step(&work).unwrap().tokens, tokens);
        let rows = work.batch.gather.len();
        let bits = |pair: &mut Pair| {
            let output = pair.device.output(0, rows).unwrap();
            output.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(bits(&mut plain), bits(&mut graphed));
    }
}

#[test]
fn a_sequences_bits_do_not_depend_on_chunks_or_company_if_asked() {
    let logits = |steps: &[Vec<Piece>]| {
        let mut pair = Pair::with(llama(Encoding::F32), gpu(), true);
        pair.device.record(0).unwrap();
        let mut bits = Vec::new();
        for pieces in steps {
            let work = work(pieces);
            pair.step(&work).unwrap();
            let place = pieces.iter().filter(|piece| piece.yields).position(|of| of.sequence == 0);
            let output = pair.device.output(0, work.batch.gather.len()).unwrap();
            if let Some(place) = place {
                let row = &output[place * VOCABULARY..][..VOCABULARY];
                bits.push(row.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            }
        }
        bits
    };
    let alone = logits(&[vec![piece(0, 0, 41, true)], vec![piece(0, 41, 1, true)]]);
    let beside = logits(&[
        vec![piece(0, 0, 40, false), piece(1, 0, 30, true)],
        // The last of a prompt, alone in its chunk.
        vec![piece(1, 30, 1, true), piece(0, 40, 1, true), piece(2, 0, 20, true)],
        vec![piece(2, 20, 1, true), piece(0, 41, 1, true), piece(1, 31, 1, true)],
    ]);
    assert_eq!(alone.len(), 2);
    assert!(alone == beside);
}

#[test]
fn every_norm_of_a_llama_is_made_by_the_product_that_reads_it() {
    for encoding in [Encoding::F32, Encoding::Q4One] {
        let program = llama(encoding);
        let mut made = Vec::new();
        for (at, op) in program.ops.iter().enumerate() {
            if let Op::Norm(norm) = op {
                made.push(is_for_product(&program, norm, &program.ops[at + 1..]));
            }
        }
        assert_eq!(made, [true; 2 * KV.layers + 1]);
        // Not where something else reads its rows, before they are written anew.
        let mut other = program.clone();
        let first = other.ops.iter().position(|op| matches!(op, Op::Norm(_))).unwrap();
        let Op::Norm(norm) = other.ops[first].clone() else { unreachable!() };
        other.ops.insert(first + 2, other.ops[first + 1].clone());
        assert!(!is_for_product(&other, &norm, &other.ops[first + 1..]));
    }
}

#[test]
fn graphs_stop_where_their_memory_ends() {
    let mut roomy = Pair::new(llama(Encoding::F32));
    let all = roomy.device.record(0).unwrap();
    let mut emulator = Emulator::new();
    // Four graphs take what all may: of 25 MiB, another process is taken for the owner of some.
    emulator.graph_bytes = 25 << 20;
    let mut narrow = Pair::with(llama(Encoding::F32), Box::new(emulator), false);
    assert_eq!(narrow.device.record(0).unwrap(), 4);
    assert!(all > 4);
    // Steps run all the same.
    for pieces in steps() {
        let work = work(&pieces);
        assert_eq!(narrow.step(&work).unwrap().tokens, roomy.step(&work).unwrap().tokens);
    }
}
