//! Small Llama files with made-up weights in every served format, against candle's whole model.

use std::io::Cursor;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{D, Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use sconce::kernels::cpu::isa::SetKind;
use sconce::store::ModelFiles;

use crate::models::Bench;
use crate::noise::noise;

const HIDDEN: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD: usize = 64;
const FF: usize = 512;
const VOCAB: usize = 320;
const LAYERS: usize = 2;

fn matrix(name: &str, (rows, columns): (usize, usize), format: GgmlDType) -> (String, QTensor) {
    // Scaled so that activations keep their size from layer to layer.
    let scale = 1.7 / (columns as f32).sqrt();
    let values: Vec<f32> =
        noise(name, rows * columns).into_iter().map(|value| value * scale).collect();
    let tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
    (format!("{name}.weight"), QTensor::quantize(&tensor, format).unwrap())
}

fn norm(name: &str) -> (String, QTensor) {
    let values: Vec<f32> = noise(name, HIDDEN).into_iter().map(|v| 1.0 + 0.2 * v).collect();
    let tensor = Tensor::from_vec(values, HIDDEN, &Device::Cpu).unwrap();
    (format!("{name}.weight"), QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
}

/// A whole file; `value_format` is the format of the v projections and the head, as mixes have it.
fn gguf(format: GgmlDType, value_format: GgmlDType) -> Vec<u8> {
    let mut tensors = vec![
        matrix("token_embd", (VOCAB, HIDDEN), format),
        norm("output_norm"),
        matrix("output", (VOCAB, HIDDEN), value_format),
    ];
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}");
        tensors.extend([
            norm(&name("attn_norm")),
            norm(&name("ffn_norm")),
            matrix(&name("attn_q"), (HEADS * HEAD, HIDDEN), format),
            matrix(&name("attn_k"), (KV_HEADS * HEAD, HIDDEN), format),
            matrix(&name("attn_v"), (KV_HEADS * HEAD, HIDDEN), value_format),
            matrix(&name("attn_output"), (HIDDEN, HEADS * HEAD), format),
            matrix(&name("ffn_gate"), (FF, HIDDEN), format),
            matrix(&name("ffn_up"), (FF, HIDDEN), format),
            matrix(&name("ffn_down"), (HIDDEN, FF), format),
        ]);
    }
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", Value::U32(LAYERS as u32)),
        ("llama.context_length", Value::U32(512)),
        ("llama.embedding_length", Value::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Value::U32(FF as u32)),
        ("llama.attention.head_count", Value::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32)),
        ("llama.rope.dimension_count", Value::U32(HEAD as u32)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    file.into_inner()
}

/// Of `POSITIONS` next tokens, teacher-forced, how many both choose alike.
fn agreement(format: GgmlDType, value_format: GgmlDType) -> usize {
    let bytes = gguf(format, value_format);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, &bytes).unwrap();
    let files = ModelFiles { files: vec![("model.gguf".into(), path)] };
    let mut ours = Bench::over(&files, SetKind::detect(), 1);

    let mut file = Cursor::new(bytes);
    let content = gguf_file::Content::read(&mut file).unwrap();
    let device = Device::Cpu;
    let mut candle = ModelWeights::from_gguf(content, &mut file, &device).unwrap();
    let text: Vec<u32> = (0..POSITIONS as u32).map(|i| (i * 37 + i * i) % VOCAB as u32).collect();
    let mut agreed = 0;
    for (position, token) in text.iter().enumerate() {
        let input = Tensor::new(&[*token], &device).unwrap().unsqueeze(0).unwrap();
        let logits = candle.forward(&input, position).unwrap().flatten_all().unwrap();
        let theirs = logits.argmax(D::Minus1).unwrap().to_scalar::<u32>().unwrap();
        ours.add(0, position, &[*token]);
        agreed += usize::from(ours.run().tokens[0] == theirs);
    }
    agreed
}

const POSITIONS: usize = 96;

#[test]
fn float_files_agree_everywhere() {
    // Keys and values are f16 in our cache: one near tie may fall the other way.
    for format in [GgmlDType::F32, GgmlDType::F16] {
        let agreed = agreement(format, format);
        assert!(agreed >= POSITIONS - 1, "{format:?}: {agreed} of {POSITIONS}");
    }
}

#[test]
fn quantised_files_agree_but_for_near_ties() {
    // Both round activations to 8 bits, each in its own groups; made-up weights have many ties.
    use GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let alone = [(Q4_0, Q4_0), (Q4_1, Q4_1), (Q8_0, Q8_0), (Q5_0, Q5_0), (Q4_0, Q8_0)];
    let mixes = [(Q4K, Q6K), (Q2K, Q3K), (Q5K, Q5K), (Q5_1, Q8_0), (Q4K, Q8_0)];
    let mixes = alone.into_iter().chain(mixes);
    for (format, value_format) in mixes {
        let agreed = agreement(format, value_format);
        eprintln!("{format:?} with {value_format:?}: {agreed} of {POSITIONS}");
        assert!(agreed >= POSITIONS * 85 / 100, "{format:?}: {agreed} of {POSITIONS}");
    }
}
