//! Products of bf16, their rounding, and what the builder makes of f32 rows before such weights.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::*;
use crate::kernels::builder::{Builder, Capacity, Dense};
use crate::kernels::cpu::isa::{Isa, Set, Task};
use crate::kernels::ops::{Activation, Convert, Epilogue, HalfBuf, HalfLinear, Rows};
use crate::kernels::packed::{Encoding, Packed, PackedFormat, round_half};
use half::bf16;

fn layout_half(layout: &mut Layout, rows: usize, width: usize) -> HalfBuf {
    HalfBuf { offset: layout.take(rows * width * 2), width }
}

fn pack(n: usize, k: usize, format: PackedFormat, values: &[f32]) -> Packed {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let row = |row: usize| &bytes[row * k * 4..(row + 1) * k * 4];
    Packed::from_rows_as(n, k, (Encoding::F32, format), row).unwrap()
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|x| bf16::from_bits(round_half(*x)).to_f32()).collect()
}

/// The chain that the definition spells out.
fn chain(x: &[f32], w: &[f32]) -> f32 {
    x.as_chunks::<2>().0.iter().zip(w.as_chunks::<2>().0).fold(0.0, |sum, (x, w)| {
        let second = x[1].mul_add(w[1], sum);
        x[0].mul_add(w[0], second)
    })
}

#[test]
fn products_are_the_defined_chain_in_every_set() {
    let mut random = Random::new(31);
    for (n, k, rows) in [(1, 2, 1), (40, 38, 7), (16, 384, 1), (100, 66, 64), (70, 34, 513)] {
        let (x, w) = (random.floats(rows * k), random.floats(n * k));
        let (bias, before) = (random.floats(n), random.floats(rows * n));
        let weight = Arc::new(pack(n, k, PackedFormat::Bf16, &w));
        let (rounded_x, rounded_w) = (rounded(&x), rounded(&w));
        for epilogue in [Epilogue::Store, Epilogue::Add, Epilogue::Gelu] {
            for halves in [false, true] {
                if halves && (epilogue == Epilogue::Add || n % 2 == 1) {
                    continue;
                }
                let mut layout = Layout::default();
                let (from, input) = (layout.buf(rows, k), layout_half(&mut layout, rows, k));
                let (full, half) = (layout.buf(rows, n), layout_half(&mut layout, rows, n));
                let output = if halves { Activation::Half(half) } else { Activation::Full(full) };
                let (weight, bias) = (Arc::clone(&weight), Some(bias.clone().into()));
                let convert =
                    Convert { rows: Rows::All, input: from, output: Activation::Half(input) };
                let rows_taken = Rows::All;
                let op = HalfLinear {
                    rows: rows_taken,
                    input,
                    weight,
                    bias: bias.clone(),
                    epilogue,
                    output,
                };
                let ops = vec![Op::Convert(convert), Op::HalfLinear(op)];
                let mut case = Case::new(ops, &layout, spans(&[rows]));
                case.fill(from, &x);
                case.fill(full, &before);
                case.run_everywhere();
                let got = match output {
                    Activation::Half(buf) => read_halves(&case, buf, rows),
                    _ => case.floats(full, rows),
                };
                let bias = bias.as_deref().unwrap();
                for (i, got) in got.iter().enumerate() {
                    let (r, c) = (i / n, i % n);
                    let y = chain(&rounded_x[r * k..(r + 1) * k], &rounded_w[c * k..(c + 1) * k])
                        + bias[c];
                    match epilogue {
                        Epilogue::Gelu => {
                            let tolerance = if halves { 0.005 } else { 1e-6 };
                            assert_close(&[*got], &[maths::gelu(f64::from(y))], tolerance);
                        }
                        Epilogue::Add => assert_eq!(*got, before[i] + y, "value {i}"),
                        Epilogue::Store if halves => assert_eq!(*got, rounded(&[y])[0]),
                        Epilogue::Store => assert_eq!(*got, y, "value {i}"),
                        Epilogue::Tanh | Epilogue::Relu => unreachable!("not among the cases"),
                    }
                }
            }
        }
    }
}

fn read_halves(case: &Case, buf: HalfBuf, rows: usize) -> Vec<f32> {
    let bytes = &case.workspace.as_bytes()[buf.offset..][..rows * buf.width * 2];
    bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_ne_bytes(*b).to_f32()).collect()
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let mut random = Random::new(32);
    let (n, k, total) = (50, 96, 70);
    let x = random.floats(total * k);
    let weight = Arc::new(pack(n, k, PackedFormat::Bf16, &random.floats(n * k)));
    let mut outputs = Vec::new();
    for (first, rows) in [(0, 70), (0, 1), (69, 1), (3, 2), (10, 5), (5, 64), (40, 30)] {
        let mut layout = Layout::default();
        let (from, input) = (layout.buf(rows, k), layout_half(&mut layout, rows, k));
        let output = layout.buf(rows, n);
        let op = HalfLinear {
            rows: Rows::All,
            input,
            weight: Arc::clone(&weight),
            bias: None,
            epilogue: Epilogue::Store,
            output: Activation::Full(output),
        };
        let convert = Convert { rows: Rows::All, input: from, output: Activation::Half(input) };
        let ops = vec![Op::Convert(convert), Op::HalfLinear(op)];
        let mut case = Case::new(ops, &layout, spans(&[rows]));
        case.fill(from, &x[first * k..(first + rows) * k]);
        case.run_everywhere();
        outputs.push((first, case.floats(output, rows)));
    }
    let whole = outputs[0].1.clone();
    for (first, part) in &outputs {
        assert_same_bits(part, &whole[first * n..first * n + part.len()]);
    }
}

/// Rounds 16 values a unit, or multiplies pairs of what they round to.
struct Halve<'a> {
    input: &'a [[f32; 16]],
    output: Mutex<Vec<u16>>,
    sums: Mutex<Vec<f32>>,
}

impl Task for Halve<'_> {
    const HALVES: bool = true;

    fn units(&self) -> usize {
        self.input.len()
    }

    #[inline(always)]
    fn run<S: Isa>(&self, s: S, units: Range<usize>) {
        let (mut output, mut sums) = (self.output.lock().unwrap(), self.sums.lock().unwrap());
        for lanes in &self.input[units] {
            let mut halves = [0u16; 32];
            // SAFETY: 32 values of our own.
            #[allow(unsafe_code)]
            unsafe {
                s.write_bf16(s.load(lanes), halves.as_mut_ptr());
                s.write_bf16(s.mul(s.load(lanes), s.splat(1.37)), halves.as_mut_ptr().add(16));
                let (pairs, pair) = (s.read_pairs(halves.as_ptr()), s.splat_pair(&halves[5]));
                sums.extend(s.store(s.dot_pairs(pairs, pair, s.load(lanes))));
            }
            output.extend(&halves[..16]);
        }
    }
}

#[test]
fn rounding_and_pairs_agree_in_every_set_on_every_kind_of_value() {
    // Every sign, exponent and upper mantissa, around every place where rounding changes.
    let lows = [0u32, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
    let values: Vec<f32> = (0..=u16::MAX)
        .flat_map(|high| lows.map(|low| f32::from_bits(u32::from(high) << 16 | low)))
        .collect();
    let chunks = values.as_chunks::<16>().0;
    let mut sets = SetKind::ALL.into_iter().filter_map(Set::new).map(|set| {
        let task = Halve { input: chunks, output: Mutex::default(), sums: Mutex::default() };
        set.run(&task, 0..task.units());
        (task.output.into_inner().unwrap(), task.sums.into_inner().unwrap())
    });
    let (halves, sums) = sets.next().unwrap();
    for (value, half) in values.iter().zip(&halves) {
        assert_eq!(*half, round_half(*value), "{value:e}");
    }
    // Sums start from the value itself here: in a product they start from zero and never are
    // subnormal.
    let ordinary = |x: f32| x == 0.0 || x.is_normal();
    for (others, other_sums) in sets {
        assert!(halves == others);
        for ((value, a), b) in values.iter().zip(&sums).zip(&other_sums) {
            if ordinary(*value) && ordinary(*a) {
                assert_eq!(a.to_bits(), b.to_bits(), "from {value:e}");
            }
        }
    }
}

#[test]
fn float_rows_become_what_a_matrix_reads() {
    let mut random = Random::new(33);
    let (n, k, rows) = (48, 64, 9);
    let mut small = |count| random.floats(count).iter().map(|x| x * 0.2).collect::<Vec<_>>();
    let (x, first, second) = (small(rows * k), small(n * k), small(k * n));
    let mut exact = Vec::new();
    for format in [PackedFormat::F32, PackedFormat::Bf16, PackedFormat::Q8] {
        // 48 inputs are no whole groups of 32: then 8 bits are left to the first matrix.
        let second_format = if format == PackedFormat::Q8 { PackedFormat::F32 } else { format };
        let dense = |n, k, format, values: &[f32]| Dense {
            weight: Arc::new(pack(n, k, format, values)),
            bias: None,
        };
        let up = dense(n, k, format, &first);
        let down = dense(k, n, second_format, &second);
        let mut builder = Builder::new(Capacity { rows, yields: 1, context: rows });
        let input = builder.full(Rows::All, k);
        let output = builder.full(Rows::All, k);
        let middle = builder.linear_for(&down.weight, &up, input, Epilogue::Gelu);
        builder.linear(&down, middle, Epilogue::Store, output);
        let program = builder.finish(output, None);
        let layout = Layout { bytes: program.workspace_bytes };
        let mut case = Case::new(program.ops, &layout, spans(&[rows]));
        case.fill(input, &x);
        case.run_everywhere();
        let got = case.floats(output, rows);
        if format == PackedFormat::F32 {
            exact = got.iter().map(|x| f64::from(*x)).collect();
        } else {
            assert_close(&got, &exact, 0.002);
        }
    }
}
