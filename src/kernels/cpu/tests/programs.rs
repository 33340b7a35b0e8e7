//! Whole programs: what goes wrong is an error, and the executor goes on.

use std::sync::Arc;

use super::*;
use crate::kernels::cpu::executor::Draw;
use crate::kernels::ops::{
    Activation, Embed, Epilogue, GatedSilu, Gather, KvShape, Linear, Norm, PagedAttention,
    RopeStore, Rows,
};
use crate::kernels::packed::{Encoding, Packed};
use crate::kernels::sample::Sampler;
use crate::request::Sampling;

const VOCABULARY: usize = 100;
const WIDTH: usize = 64;
const ROWS: usize = 24;

/// One decoder layer over random weights, logits of two gathered rows.
fn decoder() -> Case {
    let mut random = Random::new(31);
    let mut layout = Layout::default();
    let (x, qkv) = (layout.buf(ROWS, WIDTH), layout.buf(ROWS, 2 * WIDTH));
    let (gates, last) = (layout.buf(ROWS, 256), layout.buf(2, WIDTH));
    let logits = layout.buf(2, VOCABULARY);
    let normed = layout.quant(ROWS, WIDTH);
    let wide = layout.quant(ROWS, 128);
    let ones: Arc<[f32]> = vec![1.0; WIDTH].into();
    let norm = |rows, input| {
        let output = Activation::Quant(normed);
        Op::Norm(Norm { rows, input, weight: Arc::clone(&ones), bias: None, eps: 1e-5, output })
    };
    let mut matrix = |n: usize, k: usize| {
        let mut bytes = random.bytes(n * k / 32 * 34);
        for block in bytes.chunks_exact_mut(34) {
            block[..2].copy_from_slice(&half::f16::from_f32(0.001).to_le_bytes());
        }
        Arc::new(Packed::from_bytes(n, k, Encoding::Q8Zero, &bytes).unwrap())
    };
    let table = matrix(VOCABULARY, WIDTH);
    let linear = |rows, input, weight, epilogue, output| {
        let input = Activation::Quant(input);
        Op::Linear(Linear { rows, input, weight, bias: None, epilogue, output })
    };
    let kv = KvShape { layers: 1, heads: 1, head_dim: 32 };
    let angles: Arc<[f32]> = vec![0.5; 32 * 40].into();
    let ops = vec![
        Op::Embed(Embed { table: Arc::clone(&table), positions: None, types: None, output: x }),
        norm(Rows::All, x),
        linear(Rows::All, normed, matrix(128, WIDTH), Epilogue::Store, qkv),
        Op::RopeStore(RopeStore { qkv, heads: 2, kv, layer: 0, table: angles }),
        Op::PagedAttention(PagedAttention {
            qkv,
            heads: 2,
            kv,
            layer: 0,
            scale: 0.2,
            output: Activation::Quant(normed),
        }),
        linear(Rows::All, normed, matrix(WIDTH, WIDTH), Epilogue::Add, x),
        norm(Rows::All, x),
        linear(Rows::All, normed, matrix(256, WIDTH), Epilogue::Store, gates),
        Op::GatedSilu(GatedSilu { input: gates, output: Activation::Quant(wide) }),
        linear(Rows::All, wide, matrix(WIDTH, 128), Epilogue::Add, x),
        Op::Gather(Gather { input: x, output: last }),
        norm(Rows::Gathered, last),
        linear(Rows::Gathered, normed, table, Epilogue::Store, logits),
    ];
    let mut batch = spans(&[20, 4]);
    batch.gather = vec![19, 23];
    batch.blocks = vec![(0, 0), (0, 1)];
    batch.spans[0].blocks = 0..1;
    batch.spans[1].blocks = 1..2;
    batch.tokens.iter_mut().enumerate().for_each(|(i, token)| *token = i as u32 * 4);
    let mut case = Case::new(ops, &layout, batch);
    case.program.output = Some(logits);
    case.program.kv = Some(kv);
    case.map = KvMap { layers: 1, offsets: vec![0] };
    case.kv = Region::new(2 * kv.block_bytes()).unwrap();
    case
}

#[test]
fn a_decoder_layer_is_the_same_everywhere() {
    let mut case = decoder();
    case.run_everywhere();
    let logits = case.floats(case.program.output.unwrap(), 2);
    assert!(logits.iter().all(|x| x.is_finite()) && logits.iter().any(|x| x.abs() > 1e-3));
}

#[test]
fn draws_are_the_same_on_any_number_of_threads() {
    let mut random = Random::new(33);
    let (rows, vocabulary) = (9, 3000);
    let mut layout = Layout::default();
    let logits = layout.buf(rows, vocabulary);
    let mut case = Case::new(Vec::new(), &layout, spans(&[rows]));
    case.fill(logits, &random.floats(rows * vocabulary));
    let draws: Vec<Draw> = (0..rows)
        .map(|row| {
            let seed = row as u64 / 2;
            let sampling = Sampling { top_p: 0.9, seed, ..Sampling::default() };
            Draw { row: rows - 1 - row, sampling, position: 40 }
        })
        .collect();
    let mut sampler = Sampler::new(SetKind::Reference, vocabulary);
    let each = draws.iter().map(|draw| {
        let row = logits.row(&case.workspace, draw.row);
        sampler.sample(row, &draw.sampling, draw.position)
    });
    let expected: Vec<u32> = each.collect();
    for threads in [1, 3] {
        let mut executor = Executor::new(Team::new(threads).unwrap(), SetKind::detect());
        let mut tokens = vec![0; rows];
        executor.sample(&logits, &case.workspace, &draws, &mut tokens).unwrap();
        assert_eq!(tokens, expected);
        let beyond = [Draw { row: rows, ..draws[0] }];
        assert!(executor.sample(&logits, &case.workspace, &beyond, &mut tokens[..1]).is_err());
        executor.sample(&logits, &case.workspace, &draws[3..4], &mut tokens[..1]).unwrap();
        assert_eq!(tokens[0], expected[3]);
    }
}

#[test]
fn an_empty_step_is_done_at_once() {
    let mut case = decoder();
    case.batch = Batch::default();
    case.run_everywhere();
}

#[test]
fn a_step_may_yield_nothing() {
    let mut case = decoder();
    case.batch.gather.clear();
    case.run_everywhere();
}

#[test]
fn a_contradictory_batch_is_refused() {
    let refusal = |change: fn(&mut Batch)| {
        let mut case = decoder();
        change(&mut case.batch);
        let error = case.run(SetKind::Reference, 1).unwrap_err();
        assert!(matches!(error, ExecuteError::Batch(_)), "{error}");
        error.to_string()
    };
    let says = refusal(|batch| batch.positions.truncate(3));
    assert_eq!(says, "24 tokens, 3 positions, 24 span numbers");
    let says = refusal(|batch| *batch = spans(&[25]));
    assert_eq!(says, "25 rows, the workspace is for 24");
    let says = refusal(|batch| batch.gather = vec![1, 2, 3]);
    assert_eq!(says, "3 gathered rows, the limit is 2");
}

#[test]
fn what_kernels_find_out_of_place_is_an_error_and_the_executor_goes_on() {
    let mut good = decoder();
    let mut executor = Executor::new(Team::new(3).unwrap(), SetKind::detect());
    let mut execute = |case: &mut Case| {
        let Case { program, batch, map, kv, workspace } = case;
        executor.execute(program, batch, map, kv, workspace)
    };
    let breaks: [fn(&mut Case); 7] = [
        |case| case.batch.tokens[5] = VOCABULARY as u32,
        |case| case.batch.positions[5] = 40,
        |case| case.batch.span_of[5] = 2,
        |case| case.batch.blocks[1] = (1, 0),
        |case| case.batch.blocks[1] = (0, 2),
        |case| case.batch.gather[1] = 24,
        |case| case.workspace = Region::new(4096).unwrap(),
    ];
    for (index, broken) in breaks.into_iter().enumerate() {
        let mut case = decoder();
        broken(&mut case);
        let error = execute(&mut case).unwrap_err();
        assert!(matches!(error, ExecuteError::Kernel(_)), "break {index}: {error}");
        execute(&mut good).unwrap();
    }
}
