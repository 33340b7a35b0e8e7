//! The same logits give the same token on the device as on a processor.

use super::*;
use crate::kernels::builder::{Builder, Capacity};
use crate::kernels::cuda::details::DrawDetail;
use crate::kernels::ops::{Embed, Gather, KvShape, Op, Rows};
use crate::kernels::sample::Sampler;
use crate::kernels::sample::adjust::Past;
use crate::request::{Adjustment, Detail};

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

/// Logits of every odd kind, and the device that has them.
fn odd_rows(random: &mut Random, vocabulary: usize) -> (Pair, Vec<Vec<f32>>) {
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
    let row = |row| {
        let mut logits = vec![0.0; vocabulary];
        table.read_row(row, &mut logits);
        logits.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect()
    };
    let rows = (0..ROWS).map(row).collect();
    let mut emulator = Emulator::new();
    emulator.twice = false;
    (Pair::with(logits(table), Box::new(emulator), false), rows)
}

fn adjustment(random: &mut Random, vocabulary: usize) -> Adjustment {
    let of = |random: &mut Random, values: &[f32]| values[random.below(values.len())];
    // Also tokens that the model does not have.
    let bias = (0..random.below(40)).map(|_| {
        let token = random.below(vocabulary + 5) as u32;
        (token, random.floats(1)[0] * 20.0)
    });
    Adjustment {
        bias: bias.collect(),
        repetition: of(random, &[1.0, 1.3, 0.7]),
        frequency: of(random, &[0.0, 0.6, -1.1]),
        presence: of(random, &[0.0, 0.4, -2.0]),
    }
}

/// Details of some of the draws, and what they are to look back at.
fn details(random: &mut Random, vocabulary: usize, work: &mut Work) {
    let token = |random: &mut Random| random.below(vocabulary.min(30) + 3) as u32;
    for draw in 0..work.draws.len() as u32 {
        if random.below(5) == 0 {
            continue;
        }
        let start = work.history.len() as u32;
        for _ in 0..random.below(50) {
            let token = token(random);
            work.history.push(token);
        }
        let adjusted = (random.below(4) > 0).then(|| adjustment(random, vocabulary).into());
        let logprobs = (random.below(3) > 0).then(|| [0, 1, 5, 20][random.below(4)]);
        let row = work.batch.gather[draw as usize];
        work.details.push(DrawDetail {
            draw,
            detail: Detail { adjustment: adjusted, logprobs },
            prompt: (0..random.below(60)).map(|_| token(random)).collect(),
            generated: start..work.history.len() as u32,
            last: (random.below(2) == 0).then_some(row),
        });
    }
}

#[test]
fn adjusted_tokens_and_log_probabilities_are_those_of_the_reference() {
    for vocabulary in [1500, 70] {
        let mut random = Random::new(vocabulary as u64 + 1);
        let (mut pair, rows) = odd_rows(&mut random, vocabulary);
        let mut sampler = Sampler::new(SetKind::detect(), vocabulary);
        for round in 0..12 {
            if round == 6 {
                // From now on details come in several parts.
                pair.device.narrow_details(0, 12_000);
            }
            let pieces: Vec<Piece> = (0..ROWS)
                .map(|row| Piece {
                    sequence: row,
                    start: 9,
                    tokens: vec![row as u32],
                    yields: true,
                })
                .collect();
            let mut work = work(&pieces);
            for draw in &mut work.draws {
                draw.sampling = settings(&mut random);
            }
            details(&mut random, vocabulary, &mut work);
            let answers = pair.step(&work).unwrap();
            let mut logprobs = answers.logprobs.iter();
            let mut wanted = work.details.iter().peekable();
            for (row, draw) in work.draws.iter().enumerate() {
                let detail = wanted.next_if(|of| of.draw as usize == row);
                let how = detail.and_then(|of| {
                    let generated = of.generated.start as usize..of.generated.end as usize;
                    let generated = &work.history[generated];
                    let last = of.last.map(|row| work.batch.tokens[row as usize]);
                    let past = Past { prompt: &of.prompt, generated, last };
                    Some((of.detail.adjustment.as_deref()?, past))
                });
                let token = match how {
                    Some(how) => {
                        sampler.sample_adjusted(&rows[row], how, &draw.sampling, draw.position)
                    }
                    None => sampler.sample(&rows[row], &draw.sampling, draw.position),
                };
                assert_eq!(answers.tokens[row], token, "row {row}, {detail:?}");
                if let Some(top) = detail.and_then(|of| of.detail.logprobs) {
                    let (ours, theirs) =
                        (logprobs.next().unwrap(), sampler.logprobs(&rows[row], token, top));
                    assert!((ours.chosen - theirs.chosen).abs() <= 1e-4, "{ours:?}, {theirs:?}");
                    assert_eq!(ours.top.len(), theirs.top.len());
                    for ((id, a), (other, b)) in ours.top.iter().zip(&theirs.top) {
                        assert_eq!(id, other, "row {row}");
                        assert!((a - b).abs() <= 1e-4, "row {row}: {a} and {b}");
                    }
                }
            }
            assert!(logprobs.next().is_none());
        }
    }
}

#[test]
fn penalties_see_a_token_that_is_still_in_its_seat() {
    // Every row of the table is largest at 3, then at 4.
    let values = (0..8 * 40).map(|i| match i % 40 {
        3 => 2.0,
        4 => 1.5,
        _ => 0.0,
    });
    let table = Packed::from_f32(8, 40, &values.collect::<Vec<f32>>()).unwrap();
    let mut pair = Pair::new(logits(table));
    let piece = |token| Piece { sequence: 2, start: 0, tokens: vec![token], yields: true };
    pair.device.submit(0, &work(&[piece(7)])).unwrap();
    let mut second = work(&[piece(super::super::tables::FROM_SEAT | 2)]);
    let adjustment = Adjustment { frequency: 1.0, ..Adjustment::default() };
    second.details.push(DrawDetail {
        draw: 0,
        detail: Detail { adjustment: Some(adjustment.into()), logprobs: None },
        prompt: [3, 3, 3].into(),
        generated: 0..0,
        last: Some(0),
    });
    pair.device.submit(0, &second).unwrap();
    let mut answers = Answers::default();
    pair.device.collect(&mut answers).unwrap();
    assert_eq!(answers.tokens, [3]);
    pair.device.collect(&mut answers).unwrap();
    assert_eq!(answers.tokens, [4], "3 has been generated once");
}

#[test]
fn tokens_are_those_of_the_reference() {
    // One of many threads' own chunks, and fewer tokens than threads.
    for vocabulary in [1500, 70] {
        let mut random = Random::new(vocabulary as u64);
        let (mut pair, rows) = odd_rows(&mut random, vocabulary);
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
