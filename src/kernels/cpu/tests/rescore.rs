//! The shorter way to the largest output.

use std::sync::Arc;

use half::f16;

use super::*;
use crate::kernels::coarse::Coarse;
use crate::kernels::ops::{Activation, Epilogue, Linear, Rows};
use crate::kernels::packed::{Encoding, Packed, PackedFormat};

/// `n` rows of `k` random weights as 8 bits.
fn matrix(n: usize, k: usize, values: &[f32]) -> Packed {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let row = |row: usize| &bytes[row * k * 4..(row + 1) * k * 4];
    Packed::from_rows_as(n, k, (Encoding::F32, PackedFormat::Q8), row).unwrap()
}

/// Random blocks of 256 with 6 bits a weight.
fn large(n: usize, k: usize, random: &mut Random) -> Packed {
    let mut bytes = random.bytes(n * k / 256 * 210);
    for block in bytes.chunks_exact_mut(210) {
        block[208..].copy_from_slice(&f16::from_f32(0.001).to_le_bytes());
    }
    Packed::from_bytes(n, k, Encoding::Q6K, &bytes).unwrap()
}

/// A matrix and nothing else, with its coarse copy.
fn head(weight: Packed, rows: usize) -> (Case, QuantBuf, Buf) {
    let mut layout = Layout::default();
    let (input, output) = (layout.quant(rows, weight.k), layout.buf(rows, weight.n));
    let op = Linear {
        rows: Rows::Gathered,
        input: Activation::Quant(input),
        weight: Arc::new(weight),
        bias: None,
        epilogue: Epilogue::Store,
        output,
    };
    let mut case = Case::new(vec![Op::Linear(op)], &layout, spans(&[rows]));
    case.program.output = Some(output);
    case.program.coarse = Coarse::of(&case.program).unwrap();
    (case, input, output)
}

/// Index and bits of the largest, the first of equals.
fn largest(row: &[f32]) -> (usize, u32) {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (row.iter().position(|x| *x == most).unwrap(), most.to_bits())
}

/// The outputs of all rows by the matrix itself, and by the shorter way.
fn both(case: &mut Case, output: Buf, rows: usize) -> [Vec<f32>; 2] {
    [false, true].map(|greedy| {
        case.batch.greedy = greedy;
        case.run_everywhere();
        case.floats(output, rows)
    })
}

#[test]
fn the_largest_output_is_that_of_the_matrix_itself() {
    let mut random = Random::new(71);
    for (n, k, rows) in [(1024, 64, 1), (2048, 256, 3), (16, 32, 9), (640, 768, 8)] {
        let mut values = random.floats(n * k);
        // Equal outputs, in two panels: the first of them counts.
        let (first, last) = values.split_at_mut(k);
        last[(n - 2) * k..].copy_from_slice(first);
        let mut weights = vec![matrix(n, k, &values)];
        if k.is_multiple_of(256) {
            weights.push(large(n, k, &mut random));
        }
        for weight in weights {
            let (mut case, input, output) = head(weight, rows);
            // Rows of which one is much like the first output.
            let mut inputs = random.floats(rows * k);
            inputs[..k].copy_from_slice(&values[..k]);
            case.fill_quant(input, &inputs);
            let [exact, short] = both(&mut case, output, rows);
            for (exact, short) in exact.chunks(n).zip(short.chunks(n)) {
                assert_eq!(largest(exact), largest(short), "{n} outputs of {k}");
            }
            if n >= 1024 {
                let same = exact.iter().zip(&short).filter(|(a, b)| a == b).count();
                assert!(same < exact.len() / 2, "{same} of {} computed twice", exact.len());
            }
        }
    }
}

#[test]
fn weights_that_are_no_numbers_hide_nothing() {
    let (n, k) = (256, 64);
    let mut random = Random::new(72);
    let mut bytes = random.bytes(n * k / 32 * 34);
    for (index, block) in bytes.chunks_exact_mut(34).enumerate() {
        let scale = if index == 7 { f16::NAN } else { f16::from_f32(0.001) };
        block[..2].copy_from_slice(&scale.to_le_bytes());
    }
    let weight = Packed::from_bytes(n, k, Encoding::Q8Zero, &bytes).unwrap();
    let (mut case, input, output) = head(weight, 2);
    case.fill_quant(input, &random.floats(2 * k));
    let [exact, short] = both(&mut case, output, 2);
    assert!(exact[3].is_nan() && short[3].is_nan());
    for (exact, short) in exact.chunks(n).zip(short.chunks(n)) {
        assert_eq!(largest(exact), largest(short));
    }
}

#[test]
fn only_matrices_of_more_than_four_bits_have_a_coarse_copy() {
    let mut random = Random::new(73);
    let values = random.floats(32 * 64);
    assert!(head(matrix(32, 64, &values), 1).0.program.coarse.is_some());
    assert!(
        head(matrix(31, 64, &values[..31 * 64]), 1).0.program.coarse.is_none(),
        "a broken panel"
    );
    let four = Packed::from_bytes(32, 64, Encoding::Q4Zero, &random.bytes(32 * 2 * 18)).unwrap();
    assert!(head(four, 1).0.program.coarse.is_none());
}
