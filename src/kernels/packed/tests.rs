//! Packed rows read back, against an independent reader of the same blocks.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use std::borrow::Cow;

use super::*;

/// Values that no two places share.
fn values(n: usize, k: usize) -> Vec<f32> {
    (0..n * k).map(|i| (i as f32 * 0.37).sin() * (1.0 + i as f32 * 1e-3)).collect()
}

fn rows_of(packed: &Packed) -> Vec<f32> {
    let mut rows = vec![0.0; packed.n * packed.k];
    rows.chunks_exact_mut(packed.k).enumerate().for_each(|(n, row)| packed.read_row(n, row));
    rows
}

#[test]
fn quantised_blocks_read_as_candle_reads_them() {
    let formats = [
        (Encoding::Q4Zero, GgmlDType::Q4_0),
        (Encoding::Q4One, GgmlDType::Q4_1),
        (Encoding::Q8Zero, GgmlDType::Q8_0),
    ];
    for (encoding, dtype) in formats {
        for (n, k) in [(16, 32), (37, 96), (1, 576)] {
            let tensor = Tensor::from_vec(values(n, k), (n, k), &Device::Cpu).unwrap();
            let quantised = QTensor::quantize(&tensor, dtype).unwrap();
            let bytes = quantised.data().unwrap();
            let packed = Packed::from_bytes(n, k, encoding, &bytes).unwrap();
            let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, dtype).unwrap();
            let read = QTensor::new(storage, (n, k)).unwrap().dequantize(&Device::Cpu).unwrap();
            let expected: Vec<f32> = read.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(rows_of(&packed), expected, "{encoding:?} {n} × {k}");
        }
    }
}

/// Every format of GGUF, quantised by candle: its blocks, and its own reading of them.
fn quantised(dtype: GgmlDType, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
    let tensor = Tensor::from_vec(values(n, k), (n, k), &Device::Cpu).unwrap();
    let bytes = QTensor::quantize(&tensor, dtype).unwrap().data().unwrap().into_owned();
    let aligned: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
    let blocks = &bytemuck::cast_slice(&aligned)[..bytes.len()];
    let storage = QStorage::from_data(Cow::Borrowed(blocks), &Device::Cpu, dtype).unwrap();
    let read = QTensor::new(storage, (n, k)).unwrap().dequantize(&Device::Cpu).unwrap();
    (bytes, read.flatten_all().unwrap().to_vec1().unwrap())
}

#[test]
fn five_bit_and_large_blocks_are_kept_exactly() {
    use PackedFormat::{K4, K4Halves, K8, K8Halves, Q8, Q8Minimum};
    for (encoding, dtype, format, bits) in [
        (Encoding::Q5Zero, GgmlDType::Q5_0, Q8, 8.5),
        (Encoding::Q5One, GgmlDType::Q5_1, Q8Minimum, 9.0),
        (Encoding::Q2K, GgmlDType::Q2K, K4Halves, 5.25),
        (Encoding::Q3K, GgmlDType::Q3K, K4Halves, 5.25),
        (Encoding::Q4K, GgmlDType::Q4K, K4, 4.75),
        (Encoding::Q5K, GgmlDType::Q5K, K8, 8.75),
        (Encoding::Q6K, GgmlDType::Q6K, K8Halves, 9.25),
    ] {
        for (n, k) in [(16, 256), (37, 512), (1, 768)] {
            let (bytes, expected) = quantised(dtype, n, k);
            let packed = Packed::from_bytes(n, k, encoding, &bytes).unwrap();
            assert_eq!(packed.format, format);
            assert_eq!(rows_of(&packed), expected, "{encoding:?} {n} × {k}");
        }
        let (bytes, _) = quantised(dtype, 32, 512);
        let packed = Packed::from_bytes(32, 512, encoding, &bytes).unwrap();
        assert_eq!(packed.bytes() as f64 * 8.0 / (32.0 * 512.0), bits, "{encoding:?}");
        assert_eq!(packed.bytes(), format.bytes(32, 512));
    }
}

#[test]
fn mixtures_keep_every_row_exactly() {
    let formats = |large: bool| match large {
        true => vec![
            (Encoding::Q2K, GgmlDType::Q2K),
            (Encoding::Q3K, GgmlDType::Q3K),
            (Encoding::Q4K, GgmlDType::Q4K),
            (Encoding::Q5K, GgmlDType::Q5K),
            (Encoding::Q6K, GgmlDType::Q6K),
        ],
        false => vec![
            (Encoding::Q4Zero, GgmlDType::Q4_0),
            (Encoding::Q4One, GgmlDType::Q4_1),
            (Encoding::Q5Zero, GgmlDType::Q5_0),
            (Encoding::Q5One, GgmlDType::Q5_1),
            (Encoding::Q8Zero, GgmlDType::Q8_0),
        ],
    };
    let (n, k) = (20, 512);
    for (large, format) in [(true, PackedFormat::K8Halves), (false, PackedFormat::Q8Minimum)] {
        let formats = formats(large);
        let all: Vec<_> = formats.iter().map(|(_, dtype)| quantised(*dtype, n, k)).collect();
        let row = |r: usize| {
            let encoding = formats[r % 5].0;
            let bytes = encoding.row_bytes(k);
            (encoding, &all[r % 5].0[r * bytes..(r + 1) * bytes])
        };
        let packed = Packed::from_mixed_rows(n, k, row).unwrap();
        assert_eq!(packed.format, format);
        let read = rows_of(&packed);
        for r in 0..n {
            let own = r * k..(r + 1) * k;
            assert_eq!(read[own.clone()], all[r % 5].1[own], "row {r} as {:?}", formats[r % 5].0);
        }
    }
    let (k4, q8) = (quantised(GgmlDType::Q4K, 1, 256).0, quantised(GgmlDType::Q8_0, 1, 256).0);
    let row = |r| if r == 0 { (Encoding::Q4K, &k4[..]) } else { (Encoding::Q8Zero, &q8[..]) };
    let error = Packed::from_mixed_rows(2, 256, row).unwrap_err().to_string();
    assert_eq!(error, "rows as Q4K and as Q8Zero in one quantised matrix");
    // Five-bit values without a minimum and 8-bit ones need none.
    let q5 = quantised(GgmlDType::Q5_0, 1, 256).0;
    let row = |r| if r == 0 { (Encoding::Q5Zero, &q5[..]) } else { (Encoding::Q8Zero, &q8[..]) };
    assert_eq!(Packed::from_mixed_rows(2, 256, row).unwrap().format, PackedFormat::Q8);
}

#[test]
fn floats_of_every_width() {
    for (n, k) in [(1, 1), (40, 37), (16, 64)] {
        let values = values(n, k);
        let packed = Packed::from_f32(n, k, &values).unwrap();
        assert_eq!(rows_of(&packed), values);
        let half: Vec<u8> = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let packed = Packed::from_bytes(n, k, Encoding::F16, &half).unwrap();
        let expected: Vec<f32> = values.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
        assert_eq!(rows_of(&packed), expected);
        let brain: Vec<u8> = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        let packed = Packed::from_bytes(n, k, Encoding::Bf16, &brain).unwrap();
        let expected: Vec<f32> = values.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        assert_eq!(rows_of(&packed), expected);
    }
}

#[test]
fn rows_may_come_in_any_order() {
    let values = values(20, 32);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let row = |r: usize| &bytes[(19 - r) * 128..(20 - r) * 128];
    let packed = Packed::from_rows(20, 32, Encoding::F32, row).unwrap();
    let mut first = vec![0.0; 32];
    packed.read_row(0, &mut first);
    assert_eq!(first, values[19 * 32..]);
}

#[test]
fn memory_is_what_the_values_take() {
    let bytes = vec![0; 960 * 576 / 32 * 20];
    let packed = Packed::from_bytes(960, 576, Encoding::Q4One, &bytes).unwrap();
    assert_eq!((packed.panels(), packed.bytes()), (60, bytes.len()));
    let bytes = vec![0; 100 * 64 / 32 * 34];
    let packed = Packed::from_bytes(100, 64, Encoding::Q8Zero, &bytes).unwrap();
    assert_eq!((packed.panels(), packed.bytes()), (7, 7 * 16 * (64 + 4)));
    // An odd number of groups takes half a cache line more a panel.
    let bytes = vec![0; 16 * 96 / 32 * 34];
    let packed = Packed::from_bytes(16, 96, Encoding::Q8Zero, &bytes).unwrap();
    assert_eq!(packed.bytes(), bytes.len() + 32);
}

#[test]
fn what_does_not_fit_is_refused() {
    let refusal = |k, encoding, bytes: usize| {
        Packed::from_bytes(2, k, encoding, &vec![0; bytes]).unwrap_err().to_string()
    };
    assert_eq!(refusal(33, Encoding::Q8Zero, 68), "a row of 33 values is not a multiple of 32");
    assert_eq!(refusal(128, Encoding::Q6K, 0), "a row of 128 values is not a multiple of 256");
    assert_eq!(refusal(32, Encoding::Q4One, 39), "row 0 has 39 bytes, 40 expected");
    assert!(Packed::from_f32(2, 3, &[0.0; 5]).is_err());
    let short = Packed::from_rows(2, 3, Encoding::F32, |r| &[0; 12][..12 - r]).unwrap_err();
    assert_eq!(short.to_string(), "row 1 has 11 bytes, 12 expected");
}

#[test]
fn floats_are_rounded_on_request() {
    let values: Vec<f32> = (0..20 * 64).map(|i| (i as f32 * 0.61).sin() * 0.07).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let rows = |k: usize| {
        let bytes = &bytes;
        move |row: usize| &bytes[row * k * 4..(row + 1) * k * 4]
    };
    for (format, error) in [
        (PackedFormat::Bf16, 1.0 / 256.0),
        (PackedFormat::Q8, 1.0 / 250.0),
        (PackedFormat::Q8Low, 1.0 / 178.0),
    ] {
        let packed = Packed::from_rows_as(20, 64, (Encoding::F32, format), rows(64)).unwrap();
        let mut row = vec![0.0; 64];
        for n in 0..20 {
            packed.read_row(n, &mut row);
            for (got, value) in row.iter().zip(&values[n * 64..]) {
                // Eight bits err by half a step of the group's largest value.
                let size = if format == PackedFormat::Bf16 { value.abs() } else { 0.07 };
                assert!((got - value).abs() <= size * error, "{got} for {value}");
            }
        }
    }
    let bf16 = (Encoding::F32, PackedFormat::Bf16);
    let odd = Packed::from_rows_as(2, 7, bf16, rows(7));
    assert!(matches!(odd, Err(PackError::Group { k: 7, block: 2 })));
    let twice = (Encoding::Q8Zero, PackedFormat::Bf16);
    assert!(matches!(Packed::from_rows_as(1, 32, twice, rows(32)), Err(PackError::Format(..))));
}

#[test]
fn halves_are_rounded_to_even_and_never_tiny() {
    let tie = f32::from_bits(0x3F80_8000);
    assert_eq!(round_half(tie), 0x3F80);
    assert_eq!(round_half(f32::from_bits(0x3F81_8000)), 0x3F82);
    assert_eq!(round_half(-1e-20), 0);
    assert_eq!(round_half(HALF_LEAST), 0x2680);
    assert_eq!(round_half(f32::NAN), 0x7FC0);
    assert_eq!(round_half(f32::MAX), 0x7F80);
}

#[test]
fn values_that_are_bf16_already_are_rounded_alike() {
    for bits in 0..=u16::MAX {
        let rounded = round_half(half::bf16::from_bits(bits).to_f32());
        assert_eq!(float::keep_half(bits), rounded, "{bits:#06x}");
    }
}
