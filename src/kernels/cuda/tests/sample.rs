//! The same logits give the same token on the device as on a processor.

use super::*;
use crate::kernels::builder::{Builder, Capacity};
use crate::kernels::ops::{Embed, Gather, KvShape, Op, Rows};
use crate::kernels::sample::Sampler;

const ROWS: usize = 6;

/// Rows of a table are the logits.
fn logits(table: Packed) -> Program {
    let (rows, width) = (table.n, table.k);
    let mut builder = Builder::new(Capacity { rows, yields: rows, context: 64 });
    let hidden = builder.full(Rows::All, width);
    let output = builder.full(Rows::Gathered, width);
    let table = table.into();
    builder.push(Op::Embed(Embed { table, positions: None, types: None, output: hidden }));
    builder.push(Op::Gather(Gather { input: hidden, output }));
    builder.finish(output, Some(KvShape { layers: 1, heads: 1, head_dim: 16 }))
}

fn settings(random: &mut Random) -> Sampling {
    let of = |random: &mut Random, values: &[f32]| values[random.below(values.len())];
    Sampling {
        temperature: of(random, &[0.0, 0.3, 1.0, 1.7, f32::NAN]),
        top_p: of(random, &[0.0, 0.1, 0.5, 0.9, 0.999, 1.0, 1.0]),
        top_k: of(random, &[0.0, 0.0, 1.0, 3.0, 40.0, 2000.0]) as u32,
        min_p: of(random, &[0.0, 0.0, 0.02, 0.2, 1.0]),
        seed: random.next(),
        choice: random.below(3) as u32,
    }
}

#[test]
fn tokens_are_those_of_the_reference() {
    // One of many threads' own chunks, and fewer tokens than threads.
    for vocabulary in [1500, 70] {
        let mut random = Random::new(vocabulary as u64);
        let mut values = random.floats(ROWS * vocabulary);
        for (i, value) in values.iter_mut().enumerate() {
            *value = match i / vocabulary {
                0 => *value * 8.0,
                // Many equals.
                1 => (*value * 4.0).round(),
                2 => 0.0,
                3 if i % 7 == 0 => f32::NAN,
                4 if i % 11 == 0 => f32::NEG_INFINITY,
                5 if i % vocabulary == 60 => f32::INFINITY,
                _ => *value * 2.0,
            };
        }
        let table = Packed::from_f32(ROWS, vocabulary, &values).unwrap();
        let rows: Vec<Vec<f32>> = (0..ROWS)
            .map(|row| {
                let mut logits = vec![0.0; vocabulary];
                table.read_row(row, &mut logits);
                logits.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect()
            })
            .collect();
        let mut emulator = Emulator::new();
        emulator.twice = false;
        let mut pair = Pair::with(logits(table), Box::new(emulator), false);
        let mut sampler = Sampler::new(SetKind::detect(), vocabulary);
        for round in 0..25 {
            let pieces: Vec<Piece> = (0..ROWS)
                .map(|row| {
                    let tokens = vec![row as u32];
                    Piece { sequence: row, start: round, tokens, yields: true }
                })
                .collect();
            let mut work = work(&pieces);
            for draw in &mut work.draws {
                draw.sampling = settings(&mut random);
            }
            let answers = pair.step(&work).unwrap();
            for (row, draw) in work.draws.iter().enumerate() {
                let token = sampler.sample(&rows[row], &draw.sampling, draw.position);
                assert_eq!(answers.tokens[row], token, "row {row}, {:?}", draw.sampling);
            }
        }
    }
}

#[test]
fn a_step_can_take_the_token_of_the_step_before() {
    // Row t of the table is largest at t + 1.
    let values: Vec<f32> =
        (0..40 * 40).map(|i| if i % 40 == i / 40 + 1 { 1.0 } else { 0.0 }).collect();
    let mut pair = Pair::new(logits(Packed::from_f32(40, 40, &values).unwrap()));
    let piece = |token| Piece { sequence: 2, start: 0, tokens: vec![token], yields: true };
    // Both steps are on their way before the first is collected.
    pair.device.submit(0, &work(&[piece(7)])).unwrap();
    pair.device.submit(0, &work(&[piece(super::super::tables::FROM_SEAT | 2)])).unwrap();
    let refused = pair.device.submit(0, &work(&[piece(0)]));
    assert!(matches!(refused, Err(RunError::Work(_))), "a third step");
    let mut answers = Answers::default();
    pair.device.collect(&mut answers).unwrap();
    assert_eq!(answers.tokens, [8]);
    pair.device.collect(&mut answers).unwrap();
    assert_eq!(answers.tokens, [9]);
}
