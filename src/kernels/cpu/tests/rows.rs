//! Embedding, norms, gated SiLU, gather, pooling.

use std::sync::Arc;

use super::*;
use crate::kernels::ops::{
    Activation, Embed, GatedSilu, Gather, Norm, Pool, PoolKind, Rows, Vector,
};
use crate::kernels::packed::Packed;

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

#[test]
fn embeddings_add_positions_and_types() {
    let mut random = Random::new(11);
    let (vocabulary, width, rows) = (50, 36, 9);
    let table = random.floats(vocabulary * width);
    let positions = random.floats(20 * width);
    let types = random.floats(3 * width);
    let mut layout = Layout::default();
    let output = layout.buf(rows, width);
    let op = Embed {
        table: Arc::new(Packed::from_f32(vocabulary, width, &table).unwrap()),
        positions: Some(positions.clone().into()),
        types: Some(types.clone().into()),
        output,
    };
    let mut batch = spans(&[5, 4]);
    batch.tokens = (0..rows).map(|_| random.below(vocabulary) as u32).collect();
    let mut case = Case::new(vec![Op::Embed(op)], &layout, batch);
    // Without a list every row is of type 0.
    for of_rows in [vec![], vec![0, 0, 1, 1, 1, 0, 2, 2, 2]] {
        case.batch.types = of_rows;
        case.run_everywhere();
        let got = case.floats(output, rows);
        for r in 0..rows {
            let token = case.batch.tokens[r] as usize * width;
            let position = case.batch.positions[r] as usize * width;
            let kind = case.batch.types.get(r).map_or(0, |&kind| kind as usize) * width;
            for c in 0..width {
                let expected = table[token + c] + positions[position + c] + types[kind + c];
                assert_eq!(got[r * width + c], expected);
            }
        }
    }
}

/// A norm by f64.
fn norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f64) -> Vec<f64> {
    let width = weight.len();
    let rows = x.chunks_exact(width);
    rows.flat_map(|row| {
        let row = wide(row);
        let mean = bias.map_or(0.0, |_| row.iter().sum::<f64>() / width as f64);
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (variance + eps).sqrt();
        let value = |(i, x): (usize, &f64)| {
            (x - mean) * scale * f64::from(weight[i]) + bias.map_or(0.0, |b| f64::from(b[i]))
        };
        row.iter().enumerate().map(value).collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn norms_of_any_width_into_floats_in_place_or_not() {
    let mut random = Random::new(12);
    for (rows, width) in [(1, 5), (7, 576), (64, 384), (3, 33), (513, 48)] {
        let (x, weight) = (random.floats(rows * width), random.floats(width));
        let bias = random.floats(width);
        for bias in [None, Some(&bias)] {
            for in_place in [false, true] {
                let mut layout = Layout::default();
                let input = layout.buf(rows, width);
                let output = if in_place { input } else { layout.buf(rows, width) };
                let op = Norm {
                    rows: Rows::All,
                    input,
                    weight: weight.clone().into(),
                    bias: bias.map(|bias| Vector::from(bias.clone())),
                    eps: 1e-5,
                    output: Activation::Full(output),
                };
                let mut case = Case::new(vec![Op::Norm(op)], &layout, spans(&[rows]));
                case.fill(input, &x);
                case.run_everywhere();
                let expected = norm(&x, &weight, bias.map(Vec::as_slice), 1e-5);
                assert_close(&case.floats(output, rows), &expected, 2e-6);
            }
        }
    }
}

#[test]
fn quantised_norms_round_to_half_a_step_of_each_group() {
    for peak in [i8::MAX, QuantBuf::LOW] {
        quantised_norms_round(peak);
    }
}

fn quantised_norms_round(steps: i8) {
    let mut random = Random::new(13);
    let (rows, width) = (9, 160);
    let mut x = random.floats(rows * width);
    // A row of zeros, and one too small to have a scale.
    x[..width].fill(0.0);
    let weight = vec![1.0; width];
    let mut layout = Layout::default();
    let (input, output) = (layout.buf(rows, width), layout.quant_to(steps, rows, width));
    let op = Norm {
        rows: Rows::All,
        input,
        weight: weight.clone().into(),
        bias: None,
        eps: 1e-5,
        output: Activation::Quant(output),
    };
    let mut case = Case::new(vec![Op::Norm(op)], &layout, spans(&[rows]));
    case.fill(input, &x);
    case.run_everywhere();
    let expected = norm(&x, &weight, None, 1e-5);
    let got = case.dequantised(output, rows);
    let groups = expected.chunks_exact(GROUP).zip(got.chunks_exact(GROUP));
    for (g, (expected, got)) in groups.enumerate() {
        let peak = expected.iter().fold(0.0_f64, |peak, x| peak.max(x.abs()));
        for (e, a) in expected.iter().zip(got) {
            let step = peak / f64::from(steps);
            assert!((e - a).abs() <= step / 2.0 * 1.000_01, "group {g}: {a}, expected {e}");
        }
        let (bytes, scale, sum) = case.group(output, rows, (g / 5, g % 5));
        assert_eq!(sum, bytes.iter().map(|q| i32::from(*q)).sum::<i32>() as f32);
        assert_eq!(scale == 0.0, g < 5, "the first row is zero");
    }
}

#[test]
fn ties_round_to_even() {
    let mut layout = Layout::default();
    let (input, output) = (layout.buf(1, 64), layout.quant(1, 32));
    let op = GatedSilu { input, output: Activation::Quant(output) };
    let mut case = Case::new(vec![Op::GatedSilu(op)], &layout, spans(&[1]));
    // silu(100) is 100, so that products are 127 and halves: the scale is 1.
    let mut values = vec![100.0; 64];
    for (i, up) in values[32..].iter_mut().enumerate() {
        *up = (i as f32 - 15.5) / 100.0;
    }
    values[32] = 1.27;
    case.fill(input, &values);
    case.run_everywhere();
    let scale = case.workspace.floats(output.scales, 1)[0];
    let bytes = &case.workspace.as_bytes()[output.values..output.values + 32];
    for (i, byte) in bytes.iter().enumerate().skip(1) {
        let exact = f64::from(100.0 * values[32 + i]) * f64::from(1.0 / scale);
        assert_eq!(i32::from(*byte as i8), exact.round_ties_even() as i32, "{exact}");
    }
    assert_eq!(bytes[0], 127);
}

#[test]
fn gated_silu() {
    let mut random = Random::new(14);
    let (rows, width) = (13, 100);
    let x: Vec<f32> = random.floats(rows * 2 * width).iter().map(|x| x * 6.0).collect();
    let mut layout = Layout::default();
    let (input, output) = (layout.buf(rows, 2 * width), layout.buf(rows, width));
    let op = GatedSilu { input, output: Activation::Full(output) };
    let mut case = Case::new(vec![Op::GatedSilu(op)], &layout, spans(&[rows]));
    case.fill(input, &x);
    case.run_everywhere();
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let expected: Vec<f64> = wide(&x)
        .chunks_exact(2 * width)
        .flat_map(|row| (0..width).map(|i| silu(row[i]) * row[width + i]).collect::<Vec<_>>())
        .collect();
    assert_close(&case.floats(output, rows), &expected, 1e-6);
}

#[test]
fn gather_takes_the_rows_that_yield() {
    let mut random = Random::new(15);
    let (rows, width) = (20, 70);
    let x = random.floats(rows * width);
    let mut layout = Layout::default();
    let (input, output) = (layout.buf(rows, width), layout.buf(3, width));
    let mut batch = spans(&[rows]);
    batch.gather = vec![0, 7, 19];
    let mut case = Case::new(vec![Op::Gather(Gather { input, output })], &layout, batch);
    case.fill(input, &x);
    case.run_everywhere();
    let got = case.floats(output, 3);
    for (g, r) in [0, 7, 19].into_iter().enumerate() {
        assert_same_bits(&got[g * width..(g + 1) * width], &x[r * width..(r + 1) * width]);
        assert_same_bits(output.row(&case.workspace, g), &x[r * width..(r + 1) * width]);
    }
}

#[test]
fn pooling_is_one_vector_a_span() {
    let mut random = Random::new(16);
    let (lengths, width) = ([1, 40, 7], 50);
    let mut x = random.floats(48 * width);
    // The one-row span is zero: normalising leaves it so.
    x[..width].fill(0.0);
    for kind in [PoolKind::Mean, PoolKind::Cls, PoolKind::Last] {
        for normalize in [false, true] {
            let mut layout = Layout::default();
            let (input, output) = (layout.buf(48, width), layout.buf(3, width));
            let op = Pool { kind, normalize, input, output };
            let mut case = Case::new(vec![Op::Pool(op)], &layout, spans(&lengths));
            case.fill(input, &x);
            case.run_everywhere();
            let mut start = 0;
            let mut expected = Vec::new();
            for length in lengths {
                let rows = match kind {
                    PoolKind::Mean => start..start + length,
                    PoolKind::Cls => start..start + 1,
                    PoolKind::Last => start + length - 1..start + length,
                };
                let mean = |c| {
                    let sum: f64 = rows.clone().map(|r| f64::from(x[r * width + c])).sum();
                    sum / rows.len() as f64
                };
                let mut vector: Vec<f64> = (0..width).map(mean).collect();
                let length_of = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
                if normalize && length_of > 0.0 {
                    vector.iter_mut().for_each(|x| *x /= length_of);
                }
                expected.extend(vector);
                start += length;
            }
            assert_close(&case.floats(output, 3), &expected, 1e-6);
        }
    }
}
