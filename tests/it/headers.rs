//! The header readers on real files: what they find is where other readers find it.

use sconce::store::gguf::{self, GgmlType};
use sconce::store::safetensors::{self, DType};

use crate::fixtures::model_file;

#[test]
fn a_gguf_header_fits_its_file() {
    let path = model_file("smollm2-135m-instruct", "model.gguf");
    let header = gguf::read(&path).unwrap();
    assert_eq!((header.tensors.len(), header.metadata.len()), (272, 30 + 3));
    assert_eq!(header.u32("llama.block_count").unwrap(), 30);
    assert_eq!(header.f32("llama.attention.layer_norm_rms_epsilon").unwrap(), 1e-5);
    let embedding = header.tensor("token_embd.weight").unwrap();
    assert_eq!((embedding.kind, embedding.shape.as_slice()), (GgmlType::Q8_0, &[49_152, 576][..]));
    assert_eq!((embedding.offset, embedding.bytes), (1_785_664, 30_081_024));
    let down = header.tensor("blk.0.ffn_down.weight").unwrap();
    assert_eq!((down.kind, down.shape.as_slice()), (GgmlType::Q4_1, &[576, 1536][..]));
    let ends = header.tensors.values().map(|tensor| tensor.offset + tensor.bytes);
    assert_eq!(ends.max(), Some(std::fs::metadata(&path).unwrap().len()));
}

#[test]
fn a_safetensors_header_fits_its_file() {
    let path = model_file("all-minilm-l6-v2", "model.safetensors");
    let tensors = safetensors::read(&path).unwrap();
    let words = &tensors["embeddings.word_embeddings.weight"];
    assert_eq!((&words.dtype, words.shape.as_slice()), (&DType::F32, &[30_522, 384][..]));
    let ends = tensors.values().map(|tensor| tensor.offset + tensor.bytes);
    assert_eq!(ends.max(), Some(std::fs::metadata(&path).unwrap().len()));
}
