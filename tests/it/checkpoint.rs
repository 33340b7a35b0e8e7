//! Small decoders with made-up weights, written as real files: safetensors with an index, GGUF.
//! Weights are a function of the tensor's name, so that other software can make the same ones.

use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use sconce::device::arena::Region;
use sconce::device::threads::Team;
use sconce::engine::residency;
use sconce::kernels::batch::{Batch, BatchSpan, KvMap};
use sconce::kernels::builder::Capacity;
use sconce::kernels::cpu::executor::Executor;
use sconce::kernels::cpu::isa::SetKind;
use sconce::model::Dtype;
use sconce::scheduler::step::BLOCK_TOKENS;
use sconce::store::ModelFiles;
use serde_json::Value as Json;

use crate::noise::noise;

/// A tensor of a checkpoint; its values are bfloat16 ones, so that every format keeps them.
struct Weight {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

fn weights(case: &Json) -> Vec<Weight> {
    let tensors = case["tensors"].as_object().unwrap();
    let weight = |(name, shape): (&String, &Json)| {
        let shape: Vec<usize> =
            shape.as_array().unwrap().iter().map(|size| size.as_u64().unwrap() as usize).collect();
        let scale = (1.7 / (*shape.last().unwrap() as f64).sqrt()) as f32;
        let value = |x: f32| match (shape.len(), name.ends_with("bias")) {
            (2, _) => x * scale,
            (_, true) => x * 0.25,
            _ => 1.0 + x * 0.25,
        };
        let values = noise(name, shape.iter().product()).into_iter().map(value);
        let values = values.map(|x| bf16::from_f32(x).to_f32()).collect();
        Weight { name: name.clone(), shape, values }
    };
    tensors.iter().map(weight).collect()
}

fn size(case: &Json, key: &str) -> usize {
    case["config"][key].as_u64().unwrap() as usize
}

/// One safetensors file.
fn safetensors(weights: &[Weight], format: &str) -> Vec<u8> {
    let mut data = Vec::new();
    let mut header = serde_json::Map::new();
    for Weight { name, shape, values } in weights {
        let start = data.len();
        match format {
            "F32" => data.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            "F16" => data.extend(values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes())),
            _ => data.extend(values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes())),
        }
        let offsets = [start, data.len()];
        let entry = serde_json::json!({ "dtype": format, "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// The case as `config.json` and safetensors files in `folder`, with an index if there are several.
pub(crate) fn write_safetensors(case: &Json, folder: &Path) -> ModelFiles {
    let mut files = Vec::new();
    let mut write = |name: String, content: &[u8]| {
        let path = folder.join(&name);
        std::fs::write(&path, content).unwrap();
        files.push((name, path));
    };
    write("config.json".into(), &serde_json::to_vec(&case["config"]).unwrap());
    let (weights, format) = (weights(case), case["format"].as_str().unwrap());
    let count = case["files"].as_u64().unwrap() as usize;
    if count == 1 {
        write("model.safetensors".into(), &safetensors(&weights, format));
        return ModelFiles { files };
    }
    let mut index = serde_json::Map::new();
    for (number, part) in weights.chunks(weights.len().div_ceil(count)).enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", number + 1);
        index.extend(part.iter().map(|weight| (weight.name.clone(), name.clone().into())));
        write(name, &safetensors(part, format));
    }
    let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": index });
    write("model.safetensors.index.json".into(), &serde_json::to_vec(&index).unwrap());
    ModelFiles { files }
}

const NAMES: [(&str, &str); 14] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

fn gguf_name(name: &str) -> String {
    let (stem, ending) = name.rsplit_once('.').unwrap();
    let known = |part: &str| NAMES.iter().find(|(from, _)| *from == part).unwrap().1;
    match stem.strip_prefix("model.layers.") {
        Some(rest) => {
            let (index, part) = rest.split_once('.').unwrap();
            format!("blk.{index}.{}.{ending}", known(part))
        }
        None => format!("{}.{ending}", known(stem)),
    }
}

/// Pairs that are half a head apart put side by side, as GGUF's Llama has them.
fn interleave(weight: &mut Weight, heads: usize) {
    let rows = weight.shape[0];
    let (width, half) = (weight.values.len() / rows, rows / heads / 2);
    let row = |row: usize| weight.values[row * width..(row + 1) * width].to_vec();
    let order = (0..heads).flat_map(|head| {
        (0..half).flat_map(move |pair| [0, 1].map(|side| (head * 2 + side) * half + pair))
    });
    weight.values = order.flat_map(row).collect();
}

/// The case as `model.gguf` in `folder`, in f32.
pub(crate) fn write_gguf(case: &Json, folder: &Path) -> ModelFiles {
    let config = &case["config"];
    let kind = config["model_type"].as_str().unwrap();
    let architecture = if kind == "mistral" { "llama" } else { kind };
    let (heads, kv_heads) = (size(case, "num_attention_heads"), size(case, "num_key_value_heads"));
    let tensor = |shape: &[usize], values: Vec<f32>| {
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
    };
    let mut tensors = Vec::new();
    for mut weight in weights(case) {
        let is = |part: &str| weight.name.contains(part);
        if ["llama", "smollm3"].contains(&architecture) && (is("q_proj") || is("k_proj")) {
            let heads = if is("q_proj") { heads } else { kv_heads };
            interleave(&mut weight, heads);
        }
        tensors.push((gguf_name(&weight.name), tensor(&weight.shape, weight.values)));
    }
    let factors: Vec<f32> = floats(&case["rope_factors"]);
    if !factors.is_empty() {
        tensors.push(("rope_freqs.weight".into(), tensor(&[factors.len()], factors)));
    }

    let mut metadata: Vec<(String, Value)> =
        vec![("general.architecture".into(), Value::String(architecture.into()))];
    let mut set = |key: &str, value| metadata.push((format!("{architecture}.{key}"), value));
    let number = |key: &str| Value::U32(size(case, key) as u32);
    set("block_count", number("num_hidden_layers"));
    set("context_length", number("max_position_embeddings"));
    set("embedding_length", number("hidden_size"));
    set("feed_forward_length", number("intermediate_size"));
    set("attention.head_count", number("num_attention_heads"));
    set("attention.head_count_kv", number("num_key_value_heads"));
    let head_dim =
        config["head_dim"].as_u64().unwrap_or((size(case, "hidden_size") / heads) as u64);
    set("attention.key_length", Value::U32(head_dim as u32));
    set("attention.value_length", Value::U32(head_dim as u32));
    set("rope.dimension_count", Value::U32(head_dim as u32));
    set("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    let rope = &config["rope_parameters"];
    let theta = rope["rope_theta"].as_f64().or(config["rope_theta"].as_f64()).unwrap();
    set("rope.freq_base", Value::F32(theta as f32));
    if rope["rope_type"] == "linear" {
        set("rope.scaling.type", Value::String("linear".into()));
        set("rope.scaling.factor", Value::F32(rope["factor"].as_f64().unwrap() as f32));
    }
    let metadata: Vec<(&str, &Value)> =
        metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    let path = folder.join("model.gguf");
    std::fs::write(&path, file.into_inner()).unwrap();
    ModelFiles { files: vec![("model.gguf".into(), path)] }
}

pub(crate) fn floats(list: &Json) -> Vec<f32> {
    list.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
}

/// The logits after each of `tokens`, in one step of one sequence.
pub(crate) fn logits(files: &ModelFiles, tokens: &[u32]) -> Vec<Vec<f32>> {
    let opened = residency::open(files).unwrap().with_dtype(Dtype::F32, Some(SetKind::detect()));
    let rows = tokens.len();
    let capacity = Capacity { rows, yields: rows, context: opened.outline.context };
    let program = opened.load(capacity).unwrap().program;
    let shape = program.kv.unwrap();
    let blocks = rows.div_ceil(BLOCK_TOKENS) as u32;
    let page = shape.block_bytes() * blocks as usize;
    let batch = Batch {
        tokens: tokens.to_vec(),
        positions: (0..rows as u32).collect(),
        span_of: vec![0; rows],
        spans: vec![BatchSpan { rows: 0..rows as u32, start: 0, blocks: 0..blocks }],
        blocks: (0..blocks).map(|slot| (0, slot)).collect(),
        gather: (0..rows as u32).collect(),
        ..Batch::default()
    };
    let map = KvMap {
        layers: shape.layers,
        offsets: (0..shape.layers).map(|layer| layer * page).collect(),
    };
    let mut kv = Region::new(shape.layers * page).unwrap();
    let mut workspace = Region::new(program.workspace_bytes).unwrap();
    let mut executor = Executor::new(Team::new(2).unwrap(), SetKind::detect());
    executor.execute(&program, &batch, &map, &mut kv, &mut workspace).unwrap();
    let output = program.output.unwrap();
    (0..rows).map(|row| output.row(&workspace, row).to_vec()).collect()
}
