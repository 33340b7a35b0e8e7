//! Products of every format, number of rows and odd size.

use super::*;
use crate::kernels::builder::{Builder, Capacity, Dense, Scale};
use crate::kernels::ops::{Activation, Embed, Epilogue, GatedSilu, Op, Rows};
use crate::kernels::packed::Encoding;
use std::sync::Arc;

const VOCABULARY: usize = 19;

/// Embeds tokens, then multiplies the rows.
fn program(table: &Arc<Packed>, layer: &Dense, epilogue: Epilogue, rows: usize) -> Program {
    let mut builder = Builder::new(Capacity { rows, yields: rows, context: rows });
    let input = builder.full(Rows::All, table.k);
    let output = builder.full(Rows::All, layer.weight.n);
    let embed = |output| {
        let table = table.clone();
        Op::Embed(Embed { table, positions: None, types: None, output })
    };
    builder.push(embed(input));
    builder.linear(layer, Activation::Full(input), Epilogue::Store, output);
    if epilogue != Epilogue::Store {
        builder.linear(layer, Activation::Full(input), epilogue, output);
    }
    builder.finish(output, None)
}

/// Where a block has its scales, and perhaps minimums, as f16.
fn scale_places(encoding: Encoding) -> &'static [usize] {
    match encoding {
        Encoding::Q4One | Encoding::Q5One | Encoding::Q4K | Encoding::Q5K => &[0, 2],
        Encoding::Q2K => &[80, 82],
        Encoding::Q3K => &[108],
        Encoding::Q6K => &[208],
        _ => &[0],
    }
}

fn quantised(random: &mut Random, encoding: Encoding, n: usize, k: usize) -> Arc<Packed> {
    let mut bytes = random.bytes(n * encoding.row_bytes(k));
    // Scales, and minimums, of about a hundredth.
    let block = if LARGE.contains(&encoding) { 256 } else { 32 };
    for block in bytes.chunks_exact_mut(encoding.row_bytes(block)) {
        for place in scale_places(encoding) {
            let value = 0.01 + random.floats(1)[0] * 0.02;
            block[*place..place + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
        }
    }
    Packed::from_bytes(n, k, encoding, &bytes).unwrap().into()
}

/// What f64 makes of it: inputs and weights are exact on both sides.
fn expected(table: &Packed, layer: &Dense, epilogue: Epilogue, work: &Work) -> Vec<f64> {
    let (n, k) = (layer.weight.n, layer.weight.k);
    let mut weights = vec![0.0; n * k];
    for (row, values) in weights.chunks_exact_mut(k).enumerate() {
        layer.weight.read_row(row, values);
    }
    let mut input = vec![0.0; k];
    let mut output = Vec::new();
    for token in &work.batch.tokens {
        table.read_row(*token as usize, &mut input);
        for (index, row) in weights.chunks_exact(k).enumerate() {
            let sum: f64 = row.iter().zip(&input).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let y = sum + layer.bias.as_ref().map_or(0.0, |bias| f64::from(bias[index]));
            output.push(match epilogue {
                Epilogue::Store => y,
                Epilogue::Add => y + y,
                Epilogue::Gelu => 0.5 * y * (1.0 + erf(y / std::f64::consts::SQRT_2)),
                Epilogue::Tanh => y.tanh(),
                Epilogue::Relu => y.max(0.0),
            });
        }
    }
    output
}

/// By its series; the sums of these tests are small.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn check(weight: Arc<Packed>, epilogue: Epilogue, rows: usize, tolerance: f64) {
    let mut random = Random::new((weight.n * 31 + rows) as u64);
    let table = dense(&mut random, VOCABULARY, weight.k, 1.0);
    let bias = (epilogue != Epilogue::Add).then(|| random.floats(weight.n).into());
    let layer = Dense { weight, bias };
    let mut pair = Pair::new(program(&table, &layer, epilogue, rows));
    let work = spans(&[rows], VOCABULARY);
    pair.step(&work).unwrap();
    let actual = pair.device.output(0, rows).unwrap();
    let error = error(&actual, expected(&table, &layer, epilogue, &work));
    assert!(error <= tolerance, "{rows} rows, {epilogue:?}: {error}");
}

#[test]
fn dense_products_are_right_for_few_and_many_rows() {
    let mut random = Random::new(1);
    // More than eight pieces of 128, an odd rest, fewer than one.
    // Outputs for blocks of every width, the last ones not full.
    for (n, k) in [(40, 1100), (140, 96), (300, 70), (16, 30)] {
        let weight = dense(&mut random, n, k, 0.125);
        for rows in [1, 7, 16, 17, 40, 64, 65, 140] {
            check(weight.clone(), Epilogue::Store, rows, 2e-6);
        }
    }
}

#[test]
fn blocks_that_share_a_tile_add_up_in_the_same_order_every_time() {
    let mut random = Random::new(13);
    let table = dense(&mut random, VOCABULARY, 1100, 1.0);
    let layer = Dense { weight: dense(&mut random, 40, 1100, 0.125), bias: None };
    for rows in [33, 70] {
        let work = spans(&[rows], VOCABULARY);
        let mut other = work.clone();
        other.batch.tokens.reverse();
        let mut pair = Pair::new(program(&table, &layer, Epilogue::Store, rows));
        let mut run = |work: &Work| {
            pair.step(work).unwrap();
            let actual = pair.device.output(0, rows).unwrap();
            let error = error(&actual, expected(&table, &layer, Epilogue::Store, work));
            assert!(error <= 2e-6, "{rows} rows: {error}");
            actual
        };
        let first = run(&work);
        run(&other);
        assert!(run(&work) == first, "{rows} rows");
    }
}

#[test]
fn products_that_fill_a_gpu_are_right() {
    if !on_gpu() {
        // Only there do so many processors have a block each: one would take minutes.
        return;
    }
    let mut random = Random::new(10);
    for (n, rows) in [(4300, 64), (2200, 16), (12_000, 300), (4300, 300), (600, 900)] {
        check(dense(&mut random, n, 200, 0.125), Epilogue::Store, rows, 5e-6);
    }
    // Here several blocks share a tile.
    for (n, rows) in [(1024, 40), (4096, 64), (1000, 100), (6144, 130)] {
        check(dense(&mut random, n, 2080, 0.125), Epilogue::Add, rows, 5e-3);
    }
}

const SMALL: [Encoding; 5] =
    [Encoding::Q4Zero, Encoding::Q4One, Encoding::Q5Zero, Encoding::Q5One, Encoding::Q8Zero];
const LARGE: [Encoding; 5] =
    [Encoding::Q2K, Encoding::Q3K, Encoding::Q4K, Encoding::Q5K, Encoding::Q6K];

#[test]
fn quantised_products_are_right() {
    let mut random = Random::new(2);
    for encoding in SMALL {
        // Outputs for blocks of every width; enough inputs that blocks share a tile, and too few.
        for (n, k) in [(24, 1184), (40, 96), (300, 320)] {
            let weight = quantised(&mut random, encoding, n, k);
            for rows in [1, 20, 64, 70] {
                check(weight.clone(), Epilogue::Store, rows, 1e-5);
            }
        }
    }
}

#[test]
fn products_of_large_blocks_are_right() {
    let mut random = Random::new(6);
    for encoding in LARGE {
        for (n, k) in [(24, 1280), (300, 256)] {
            let weight = quantised(&mut random, encoding, n, k);
            for rows in [1, 20, 70] {
                // Scales are rounded to 11 bits.
                check(weight.clone(), Epilogue::Store, rows, 4e-4);
            }
        }
    }
}

#[test]
fn quantised_products_are_right_for_all_numbers_of_rows() {
    let mut random = Random::new(7);
    for encoding in [Encoding::Q4K, Encoding::Q6K, Encoding::Q8Zero] {
        let weight = quantised(&mut random, encoding, 16, 256);
        for rows in [2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 200, 255, 256] {
            check(weight.clone(), Epilogue::Store, rows, 4e-4);
        }
    }
}

#[test]
fn rows_of_quantised_tables_are_right() {
    let mut random = Random::new(8);
    for encoding in SMALL.into_iter().chain(LARGE) {
        let table = quantised(&mut random, encoding, VOCABULARY, 512);
        let mut builder = Builder::new(Capacity { rows: 8, yields: 8, context: 8 });
        let output = builder.full(Rows::All, 512);
        let embed = Embed { table: table.clone(), positions: None, types: None, output };
        builder.push(Op::Embed(embed));
        let mut pair = Pair::new(builder.finish(output, None));
        let work = spans(&[8], VOCABULARY);
        pair.step(&work).unwrap();
        let mut row = vec![0.0; 512];
        let mut expected = Vec::new();
        for token in &work.batch.tokens {
            table.read_row(*token as usize, &mut row);
            expected.extend(row.iter().map(|x| f64::from(*x)));
        }
        let error = error(&pair.device.output(0, 8).unwrap(), expected);
        assert!(error <= 4e-4, "{encoding:?}: {error}");
    }
}

#[test]
fn epilogues_are_right() {
    let mut random = Random::new(3);
    let weight = dense(&mut random, 48, 64, 0.25);
    for rows in [3, 90] {
        for epilogue in [Epilogue::Add, Epilogue::Gelu] {
            check(weight.clone(), epilogue, rows, 5e-3);
        }
    }
}

/// Gates and what they let through in one product, against f64.
fn check_gated(weight: Arc<Packed>, rows: usize, tolerance: f64) {
    let mut random = Random::new((weight.n * 37 + rows) as u64);
    let table = dense(&mut random, VOCABULARY, weight.k, 1.0);
    let mut builder = Builder::new(Capacity { rows, yields: rows, context: rows });
    let input = builder.full(Rows::All, weight.k);
    let gate_up = builder.full(Rows::All, weight.n);
    let output = builder.full(Rows::All, weight.n / 2);
    let embedded = table.clone();
    let embed = Embed { table: embedded, positions: None, types: None, output: input };
    builder.push(Op::Embed(embed));
    let layer = Dense { weight, bias: None };
    builder.linear(&layer, Activation::Full(input), Epilogue::Store, gate_up);
    let gated = Activation::Full(output);
    builder.push(Op::GatedSilu(GatedSilu { input: gate_up, output: gated }));
    let mut pair = Pair::new(builder.finish(output, None));
    let work = spans(&[rows], VOCABULARY);
    pair.step(&work).unwrap();
    let actual = pair.device.output(0, rows).unwrap();
    let products = expected(&table, &layer, Epilogue::Store, &work);
    let expected = products.chunks_exact(layer.weight.n).flat_map(|row| {
        let (gates, ups) = row.split_at(row.len() / 2);
        let pairs = gates.iter().zip(ups);
        pairs.map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect::<Vec<_>>()
    });
    let error = error(&actual, expected);
    assert!(error <= tolerance, "{rows} rows, {} gates: {error}", layer.weight.n / 2);
}

/// The product of a norm, against f64; scales are such that few rows lose nothing by becoming bf16
/// where the product does the norm, and do where a kernel before it does.
fn check_normed(weight: Arc<Packed>, rows: usize, tolerance: f64) {
    let mut random = Random::new((weight.n * 41 + rows) as u64);
    let (n, k) = (weight.n, weight.k);
    let table = dense(&mut random, VOCABULARY, k, 4.0);
    let scale: Vec<f32> = (0..k).map(|i| [1.0, 0.5, 2.0][i % 3]).collect();
    let (eps, bias) = (0.5, random.floats(n));
    let mut builder = Builder::new(Capacity { rows, yields: rows, context: rows });
    let input = builder.full(Rows::All, k);
    let output = builder.full(Rows::All, n);
    let embedded = table.clone();
    let embed = Embed { table: embedded, positions: None, types: None, output: input };
    builder.push(Op::Embed(embed));
    let normed = builder.input_for(&weight, Rows::All);
    builder.norm(&Scale { weight: scale.clone().into(), bias: None, eps }, input, normed);
    let layer = Dense { weight, bias: Some(bias.clone().into()) };
    builder.linear(&layer, normed, Epilogue::Store, output);
    let mut pair = Pair::new(builder.finish(output, None));
    let work = spans(&[rows], VOCABULARY);
    pair.step(&work).unwrap();
    let actual = pair.device.output(0, rows).unwrap();
    let mut weights = vec![0.0; n * k];
    for (row, values) in weights.chunks_exact_mut(k).enumerate() {
        layer.weight.read_row(row, values);
    }
    let mut x = vec![0.0; k];
    let expected = work.batch.tokens.iter().flat_map(|token| {
        table.read_row(*token as usize, &mut x);
        let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        let inverse = 1.0 / (squares / k as f64 + f64::from(eps)).sqrt();
        let rows = weights.chunks_exact(k).zip(&bias);
        let sums = rows.map(|(row, bias)| {
            let values = row.iter().zip(&x).zip(&scale);
            let sum: f64 = values.map(|((w, x), s)| f64::from(*w) * f64::from(x * s)).sum();
            sum * inverse + f64::from(*bias)
        });
        sums.collect::<Vec<_>>()
    });
    let error = error(&actual, expected);
    assert!(error <= tolerance, "{rows} rows, {n} outputs: {error}");
}

#[test]
fn products_of_few_rows_do_the_norm_before_them() {
    let mut random = Random::new(12);
    // Outputs for blocks of both widths.
    for (n, k) in [(8, 96), (40, 1184), (140, 64)] {
        let weight = dense(&mut random, n, k, 0.125);
        for (rows, tolerance) in [(1, 1e-6), (7, 1e-6), (16, 1e-6), (17, 5e-3), (70, 5e-3)] {
            check_normed(weight.clone(), rows, tolerance);
        }
    }
    for encoding in SMALL.into_iter().chain(LARGE) {
        let weight = quantised(&mut random, encoding, 40, 512);
        for (rows, tolerance) in [(5, 4e-4), (20, 5e-3)] {
            check_normed(weight.clone(), rows, tolerance);
        }
    }
}

#[test]
fn gated_products_are_right() {
    let mut random = Random::new(11);
    for (gates, k) in [(8, 70), (72, 96), (136, 200), (24, 600)] {
        let weight = dense(&mut random, 2 * gates, k, 0.125);
        for rows in [1, 16, 17, 40, 65, 140] {
            check_gated(weight.clone(), rows, 1e-5);
        }
    }
    for encoding in [Encoding::Q4One, Encoding::Q8Zero, Encoding::Q6K] {
        for gates in [24, 136] {
            let weight = quantised(&mut random, encoding, 2 * gates, 512);
            for rows in [1, 20, 64, 70] {
                check_gated(weight.clone(), rows, 1e-3);
            }
        }
    }
}

#[test]
fn gates_do_not_overwrite_rows_that_are_still_multiplied() {
    let mut random = Random::new(14);
    // As wide as what it is made of, the hidden layer has the same scratch buffer.
    let (k, rows) = (160, 40);
    let table = dense(&mut random, VOCABULARY, k, 1.0);
    let [up, down] =
        [2 * k, k].map(|n| Dense { weight: dense(&mut random, n, k, 0.125), bias: None });
    let scale = Scale { weight: vec![1.0; k].into(), bias: None, eps: 1e-5 };
    let run = |apart: bool| {
        let mut builder = Builder::new(Capacity { rows, yields: rows, context: rows });
        let [input, gate_up, output] = [k, 2 * k, k].map(|n| builder.full(Rows::All, n));
        let table = table.clone();
        builder.push(Op::Embed(Embed { table, positions: None, types: None, output: input }));
        let normed = builder.input_for(&up.weight, Rows::All);
        let own = Activation::Full(builder.full(Rows::All, k));
        let gated = if apart { own } else { builder.input_for(&down.weight, Rows::All) };
        assert_eq!(gated == normed, !apart);
        builder.norm(&scale, input, normed);
        builder.linear(&up, normed, Epilogue::Store, gate_up);
        builder.push(Op::GatedSilu(GatedSilu { input: gate_up, output: gated }));
        builder.linear(&down, gated, Epilogue::Store, output);
        let mut pair = Pair::new(builder.finish(output, None));
        pair.step(&spans(&[rows], VOCABULARY)).unwrap();
        pair.device.output(0, rows).unwrap()
    };
    let expected: Vec<f64> = run(true).into_iter().map(f64::from).collect();
    let error = error(&run(false), expected);
    assert!(error <= 1e-2, "{error}");
}

#[test]
fn a_rows_bits_do_not_depend_on_its_company() {
    let mut random = Random::new(4);
    let k = 512;
    let table = dense(&mut random, VOCABULARY, k, 1.0);
    let mut weights = vec![dense(&mut random, 32, k, 0.125)];
    // Outputs for blocks of both widths.
    for n in [32, 300] {
        let quantised = |encoding| quantised(&mut random, encoding, n, k);
        weights.extend([Encoding::Q4K, Encoding::Q6K, Encoding::Q8Zero].map(quantised));
    }
    for weight in weights {
        let (n, format) = (weight.n, weight.format);
        let layer = Dense { weight, bias: None };
        let row = |rows: usize, deterministic: bool| {
            let program = program(&table, &layer, Epilogue::Store, rows);
            let mut pair = Pair::with(program, gpu(), deterministic);
            let mut work = spans(&[rows], VOCABULARY);
            work.batch.tokens[rows - 1] = 5;
            pair.step(&work).unwrap();
            let bits = pair.device.output(0, rows).unwrap();
            bits[(rows - 1) * n..].iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let alone = row(1, true);
        for rows in [2, 9, 16, 17, 33, 64, 65, 100] {
            assert!(alone == row(rows, true), "{n} outputs, {format:?}, {rows} rows");
        }
        // Without being asked, up to 32 rows.
        assert!(alone == row(32, false), "{n} outputs, {format:?}");
    }
}
