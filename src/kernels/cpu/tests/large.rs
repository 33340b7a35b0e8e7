//! Matrix products with large blocks and with 8-bit groups that have minimums; norms of heads.

use std::sync::Arc;

use super::*;
use crate::kernels::ops::{Activation, Epilogue, HeadNorm, Linear, Rows};
use crate::kernels::packed::{Encoding, Packed};
use half::f16;

const ENCODINGS: [Encoding; 7] = [
    Encoding::Q5Zero,
    Encoding::Q5One,
    Encoding::Q2K,
    Encoding::Q3K,
    Encoding::Q4K,
    Encoding::Q5K,
    Encoding::Q6K,
];

/// Where a block of `encoding` has its f16 scale, and its f16 minimum.
fn scales(encoding: Encoding) -> (usize, Option<usize>) {
    match encoding {
        Encoding::Q5Zero => (0, None),
        Encoding::Q5One | Encoding::Q4K | Encoding::Q5K => (0, Some(2)),
        Encoding::Q2K => (80, Some(82)),
        Encoding::Q3K => (108, None),
        Encoding::Q6K => (208, None),
        other => unreachable!("{other:?}"),
    }
}

/// Rows of blocks whose bytes are `fill`'s, with these scales and minimums.
fn blocks(
    encoding: Encoding,
    (n, k): (usize, usize),
    mut fill: impl FnMut(usize) -> Vec<u8>,
    mut scale: impl FnMut() -> (f32, f32),
) -> Vec<u8> {
    let small = matches!(encoding, Encoding::Q5Zero | Encoding::Q5One);
    let block = encoding.row_bytes(if small { 32 } else { 256 });
    let mut bytes = fill(n * encoding.row_bytes(k));
    for block in bytes.chunks_exact_mut(block) {
        let (scale, minimum) = scale();
        let (at, minimum_at) = scales(encoding);
        block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        if let Some(at) = minimum_at {
            block[at..at + 2].copy_from_slice(&f16::from_f32(minimum).to_le_bytes());
        }
    }
    bytes
}

/// `input × weightsᵀ`, by f64.
fn product(input: &[f64], packed: &Packed) -> Vec<f64> {
    let mut row = vec![0.0; packed.k];
    let mut weights = Vec::new();
    for n in 0..packed.n {
        packed.read_row(n, &mut row);
        weights.push(row.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
    }
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    input
        .chunks_exact(packed.k)
        .flat_map(|x| weights.iter().map(|w| dot(x, w)).collect::<Vec<_>>())
        .collect()
}

/// Runs the product in every set; the outputs, and what they should be.
fn run(packed: Packed, x: &[f32]) -> (Vec<f32>, Vec<f64>) {
    let packed = Arc::new(packed);
    let rows = x.len() / packed.k;
    let mut layout = Layout::default();
    let (input, output) = (layout.quant(rows, packed.k), layout.buf(rows, packed.n));
    let op = Linear {
        rows: Rows::All,
        input: Activation::Quant(input),
        weight: Arc::clone(&packed),
        bias: None,
        epilogue: Epilogue::Store,
        output,
    };
    let mut case = Case::new(vec![Op::Linear(op)], &layout, spans(&[rows]));
    case.fill_quant(input, x);
    case.run_everywhere();
    (case.floats(output, rows), product(&case.dequantised(input, rows), &packed))
}

#[test]
fn products_are_sums_in_every_set() {
    let mut random = Random::new(31);
    for encoding in ENCODINGS {
        for (n, k, rows) in [(1, 256, 1), (40, 768, 7), (16, 512, 64), (33, 256, 513)] {
            let mut scales = Random::new(n as u64);
            let scale = || (1e-3 + 5e-4 * scales.float(), 1e-2 * scales.float());
            let bytes = blocks(encoding, (n, k), |count| random.bytes(count), scale);
            let packed = Packed::from_bytes(n, k, encoding, &bytes).unwrap();
            let (got, expected) = run(packed, &random.floats(rows * k));
            assert_close(&got, &expected, 1e-5);
        }
    }
}

#[test]
fn extreme_bytes_do_not_overflow() {
    for encoding in ENCODINGS {
        for byte in [0xFF, 0x00, 0x7F, 0x80] {
            let (n, k) = (16, 1024);
            let bytes = blocks(encoding, (n, k), |count| vec![byte; count], || (1.0, 1.0));
            let packed = Packed::from_bytes(n, k, encoding, &bytes).unwrap();
            let (got, expected) = run(packed, &[vec![127.0; k], vec![-127.0; k]].concat());
            assert_close(&got, &expected, 1e-6);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let mut random = Random::new(32);
    let (n, k, total) = (50, 512, 40);
    let x = random.floats(total * k);
    for encoding in ENCODINGS {
        let bytes = blocks(encoding, (n, k), |count| random.bytes(count), || (1e-3, 1e-2));
        let pack = || Packed::from_bytes(n, k, encoding, &bytes).unwrap();
        let whole = run(pack(), &x).0;
        for (first, rows) in [(0, 1), (39, 1), (3, 2), (10, 5), (5, 32)] {
            let part = run(pack(), &x[first * k..(first + rows) * k]).0;
            assert_same_bits(&part, &whole[first * n..(first + rows) * n]);
        }
    }
}

#[test]
fn heads_are_normalised_one_by_one_and_values_stay() {
    let mut random = Random::new(33);
    for (heads, kv_heads, head_dim, rows) in [(4, 2, 16, 5), (3, 1, 80, 1), (2, 2, 128, 33)] {
        let width = (heads + 2 * kv_heads) * head_dim;
        let x = random.floats(rows * width);
        let weights = [random.floats(head_dim), random.floats(head_dim)];
        let mut layout = Layout::default();
        let qkv = layout.buf(rows, width);
        let op = HeadNorm {
            qkv,
            heads: [heads, kv_heads],
            weights: weights.clone().map(Into::into),
            eps: 1e-6,
        };
        let mut case = Case::new(vec![Op::HeadNorm(op)], &layout, spans(&[rows]));
        case.fill(qkv, &x);
        case.run_everywhere();
        let mut expected = Vec::new();
        for row in x.chunks_exact(width) {
            for (index, head) in row.chunks_exact(head_dim).enumerate() {
                let squares = head.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                let scale = 1.0 / (squares / head_dim as f64 + 1e-6).sqrt();
                for (i, x) in head.iter().enumerate() {
                    expected.push(match index {
                        _ if index < heads => f64::from(*x) * scale * f64::from(weights[0][i]),
                        _ if index < heads + kv_heads => {
                            f64::from(*x) * scale * f64::from(weights[1][i])
                        }
                        _ => f64::from(*x),
                    });
                }
            }
        }
        assert_close(&case.floats(qkv, rows), &expected, 2e-6);
    }
}
