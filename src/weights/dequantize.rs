//! Tensor data to f32 at load time, by candle's own tables: for vectors, and for formats that
//! have no kernel of ours. Never on the step path.

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};

use super::LoadError;
use crate::store::gguf::GgmlType;

/// The values of `data`, in file order.
///
/// # Errors
/// A format that candle does not know, or data that is no whole number of blocks.
pub(super) fn to_f32(name: &str, kind: GgmlType, data: &[u8]) -> Result<Vec<f32>, LoadError> {
    let unusable = |what: String| LoadError::Shape(format!("tensor '{name}': {what}"));
    let dtype = match kind {
        GgmlType::F32 => return Ok(words(data, |word| f32::from_le_bytes(*word))),
        GgmlType::F16 => {
            return Ok(words(data, |word| half::f16::from_le_bytes(*word).to_f32()));
        }
        GgmlType::BF16 => {
            return Ok(words(data, |word| half::bf16::from_le_bytes(*word).to_f32()));
        }
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q2_K => GgmlDType::Q2K,
        GgmlType::Q3_K => GgmlDType::Q3K,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
        GgmlType::Other(id) => return Err(unusable(format!("unknown format {id}"))),
    };
    if !data.len().is_multiple_of(dtype.type_size()) {
        return Err(unusable(format!("{} bytes are no whole blocks", data.len())));
    }
    let count = data.len() / dtype.type_size() * dtype.block_size();
    // candle reads blocks in place, so the copy must be aligned as its block types are.
    let aligned: Vec<u64> = bytemuck::pod_collect_to_vec(data);
    let blocks = &bytemuck::cast_slice(&aligned)[..data.len()];
    let values = QStorage::from_data(Cow::Borrowed(blocks), &Device::Cpu, dtype)
        .and_then(|storage| QTensor::new(storage, count))
        .and_then(|tensor| tensor.dequantize(&Device::Cpu))
        .and_then(|tensor| tensor.to_vec1::<f32>());
    values.map_err(|error| unusable(error.to_string()))
}

fn words<const N: usize>(data: &[u8], value: impl Fn(&[u8; N]) -> f32) -> Vec<f32> {
    data.as_chunks::<N>().0.iter().map(value).collect()
}
