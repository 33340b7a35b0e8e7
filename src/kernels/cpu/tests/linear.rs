//! Matrix products of every format and shape.

use std::sync::Arc;

use super::*;
use crate::kernels::ops::{Activation, Epilogue, Linear, Rows};
use crate::kernels::packed::{Encoding, Packed, PackedFormat};
use half::f16;

/// Random rows in `encoding`, with scales around 0.01.
fn encoded(random: &mut Random, encoding: Encoding, n: usize, k: usize) -> Vec<u8> {
    let block = match encoding {
        Encoding::Q4Zero => 18,
        Encoding::Q4One => 20,
        Encoding::Q8Zero => 34,
        _ => unreachable!("quantised encodings only"),
    };
    let mut bytes = random.bytes(n * k / 32 * block);
    for block in bytes.chunks_exact_mut(block) {
        let scale = f16::from_f32(0.01 + 0.005 * random.float());
        block[..2].copy_from_slice(&scale.to_le_bytes());
        if encoding == Encoding::Q4One {
            let minimum = f16::from_f32(-0.08 * random.float());
            block[2..4].copy_from_slice(&minimum.to_le_bytes());
        }
    }
    bytes
}

/// Rows of a packed matrix as f64.
fn weights(packed: &Packed) -> Vec<Vec<f64>> {
    let mut row = vec![0.0; packed.k];
    (0..packed.n)
        .map(|n| {
            packed.read_row(n, &mut row);
            row.iter().map(|x| f64::from(*x)).collect()
        })
        .collect()
}

/// `input × weightsᵀ`
fn product(input: &[f64], weights: &[Vec<f64>]) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    let k = weights[0].len();
    input.chunks_exact(k).flat_map(|x| weights.iter().map(move |w| dot(x, w))).collect()
}

fn linear(input: Activation, weight: &Arc<Packed>, output: Buf) -> Linear {
    Linear {
        rows: Rows::All,
        input,
        weight: Arc::clone(weight),
        bias: None,
        epilogue: Epilogue::Store,
        output,
    }
}

#[test]
fn quantised_products_are_exact_sums_in_every_set() {
    let mut random = Random::new(1);
    for encoding in [Encoding::Q4Zero, Encoding::Q4One, Encoding::Q8Zero] {
        for (n, k, rows) in
            [(1, 32, 1), (40, 96, 7), (16, 576, 1), (77, 160, 64), (33, 64, 513), (200, 32, 13)]
        {
            let bytes = encoded(&mut random, encoding, n, k);
            let packed = Arc::new(Packed::from_bytes(n, k, encoding, &bytes).unwrap());
            let mut layout = Layout::default();
            let (input, output) = (layout.quant(rows, k), layout.buf(rows, n));
            let op = linear(Activation::Quant(input), &packed, output);
            let mut case = Case::new(vec![Op::Linear(op)], &layout, spans(&[rows]));
            case.fill_quant(input, &random.floats(rows * k));
            case.run_everywhere();
            let expected = product(&case.dequantised(input, rows), &weights(&packed));
            assert_close(&case.floats(output, rows), &expected, 2e-6);
        }
    }
}

#[test]
fn low_products_are_exact_sums_in_every_set() {
    let mut random = Random::new(4);
    for (n, k, rows) in [(1, 32, 1), (40, 96, 7), (77, 160, 64), (33, 64, 130)] {
        // Random ones, and all at an end of their range: the largest sums there are.
        let cases = [
            (random.floats(n * k), random.floats(rows * k)),
            (vec![1.0; n * k], vec![90.0; rows * k]),
            (vec![1.0; n * k], vec![-90.0; rows * k]),
            (vec![-1.0; n * k], vec![90.0; rows * k]),
        ];
        for (values, x) in cases {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let row = |row: usize| &bytes[row * k * 4..(row + 1) * k * 4];
            let format = (Encoding::F32, PackedFormat::Q8Low);
            let packed = Arc::new(Packed::from_rows_as(n, k, format, row).unwrap());
            let mut layout = Layout::default();
            let input = layout.quant_to(QuantBuf::LOW, rows, k);
            let output = layout.buf(rows, n);
            let op = linear(Activation::Quant(input), &packed, output);
            let mut case = Case::new(vec![Op::Linear(op)], &layout, spans(&[rows]));
            case.fill_quant(input, &x);
            case.run_everywhere();
            let expected = product(&case.dequantised(input, rows), &weights(&packed));
            assert_close(&case.floats(output, rows), &expected, 2e-6);
        }
    }
}

#[test]
fn extreme_bytes_do_not_overflow() {
    // Every weight at an end of its range, every activation at ±127: the largest sums there are.
    for (encoding, block, byte) in [
        (Encoding::Q4One, 20, 0xFF),
        (Encoding::Q4Zero, 18, 0x00),
        (Encoding::Q8Zero, 34, 0x80),
        (Encoding::Q8Zero, 34, 0x7F),
    ] {
        let (n, k) = (16, 1536);
        let mut bytes = vec![byte; n * k / 32 * block];
        for block in bytes.chunks_exact_mut(block) {
            block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
            if encoding == Encoding::Q4One {
                block[2..4].copy_from_slice(&f16::NEG_ONE.to_le_bytes());
            }
        }
        let packed = Arc::new(Packed::from_bytes(n, k, encoding, &bytes).unwrap());
        let mut layout = Layout::default();
        let (input, output) = (layout.quant(2, k), layout.buf(2, n));
        let op = linear(Activation::Quant(input), &packed, output);
        let mut case = Case::new(vec![Op::Linear(op)], &layout, spans(&[2]));
        let rows: Vec<f32> = [vec![127.0; k], vec![-127.0; k]].concat();
        case.fill_quant(input, &rows);
        case.run_everywhere();
        let expected =
            product(&rows.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), &weights(&packed));
        assert_close(&case.floats(output, 2), &expected, 0.0);
    }
}

#[test]
fn float_products_with_bias_and_epilogues() {
    let mut random = Random::new(2);
    let shapes = [(1, 1, 1), (40, 37, 7), (16, 384, 1), (100, 65, 64), (70, 33, 513)];
    for (n, k, rows) in shapes {
        let values = random.floats(n * k);
        let packed = Arc::new(Packed::from_f32(n, k, &values).unwrap());
        let bias = random.floats(n);
        let (x, before) = (random.floats(rows * k), random.floats(rows * n));
        let weights: Vec<Vec<f64>> =
            values.chunks_exact(k).map(|w| w.iter().map(|x| f64::from(*x)).collect()).collect();
        let sums = product(&x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), &weights);
        for epilogue in
            [Epilogue::Store, Epilogue::Add, Epilogue::Gelu, Epilogue::Tanh, Epilogue::Relu]
        {
            let mut layout = Layout::default();
            let (input, output) = (layout.buf(rows, k), layout.buf(rows, n));
            let op = Linear {
                bias: Some(bias.clone().into()),
                epilogue,
                ..linear(Activation::Full(input), &packed, output)
            };
            let mut case = Case::new(vec![Op::Linear(op)], &layout, spans(&[rows]));
            case.fill(input, &x);
            case.fill(output, &before);
            case.run_everywhere();
            let expected: Vec<f64> = sums
                .iter()
                .enumerate()
                .map(|(i, sum)| match (epilogue, sum + f64::from(bias[i % n])) {
                    (Epilogue::Store, y) => y,
                    (Epilogue::Add, y) => f64::from(before[i]) + y,
                    (Epilogue::Gelu, y) => maths::gelu(y),
                    (Epilogue::Tanh, y) => y.tanh(),
                    (Epilogue::Relu, y) => y.max(0.0),
                })
                .collect();
            assert_close(&case.floats(output, rows), &expected, 1e-5);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let mut random = Random::new(3);
    let (n, k, total) = (50, 96, 70);
    let x = random.floats(total * k);
    let quantised = encoded(&mut random, Encoding::Q4One, n, k);
    let quantised = Packed::from_bytes(n, k, Encoding::Q4One, &quantised).unwrap();
    let float = Packed::from_f32(n, k, &random.floats(n * k)).unwrap();
    for packed in [Arc::new(quantised), Arc::new(float)] {
        let mut outputs = Vec::new();
        for (first, rows) in [(0, 70), (0, 1), (69, 1), (3, 2), (10, 5), (5, 64), (40, 30)] {
            let mut layout = Layout::default();
            let quant = layout.quant(rows, k);
            let (full, output) = (layout.buf(rows, k), layout.buf(rows, n));
            let input = match packed.format {
                PackedFormat::F32 => Activation::Full(full),
                _ => Activation::Quant(quant),
            };
            let op = linear(input, &packed, output);
            let mut case = Case::new(vec![Op::Linear(op)], &layout, spans(&[rows]));
            case.fill(full, &x[first * k..(first + rows) * k]);
            case.fill_quant(quant, &x[first * k..(first + rows) * k]);
            case.run_everywhere();
            outputs.push((first, case.floats(output, rows)));
        }
        let whole = outputs[0].1.clone();
        for (first, part) in &outputs {
            assert_same_bits(part, &whole[first * n..first * n + part.len()]);
        }
    }
}
