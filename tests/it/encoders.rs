//! Small encoders of every served kind with made-up weights, loaded as any model is, against what
//! transformers answers with the same weights.

use std::path::{Path, PathBuf};

use sconce::kernels::cpu::isa::SetKind;
use sconce::model::Dtype;
use sconce::scheduler::step::{Input, Output};
use sconce::store::ModelFiles;
use sconce::text::{Cut, Passage, Side, Tokenizer};
use serde_json::{Value, json};

use crate::checkpoint::floats;
use crate::fixtures::{golden, golden_json};
use crate::models::{Bench, ids};
use crate::noise::noise;

/// A tensor's values: embeddings of size 1, matrices that keep the size of what goes through them.
fn values(name: &str, shape: &[usize]) -> Vec<f32> {
    let noise = noise(name, shape.iter().product());
    let scale = match shape {
        [_, _] if name.contains("embeddings") => 1.0,
        [_, columns] => (2.5 / (*columns as f64).sqrt()) as f32,
        _ if name.ends_with("LayerNorm.weight") || name.ends_with("layer_norm.weight") => {
            return noise.into_iter().map(|x| 1.0 + 0.2 * x).collect();
        }
        _ => 0.1,
    };
    noise.into_iter().map(|x| scale * x).collect()
}

fn safetensors(tensors: &serde_json::Map<String, Value>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in tensors {
        let sizes: Vec<usize> =
            shape.as_array().unwrap().iter().map(|size| size.as_u64().unwrap() as usize).collect();
        let start = data.len();
        let of = name.replace(".gamma", ".weight").replace(".beta", ".bias");
        data.extend(values(&of, &sizes).iter().flat_map(|value| value.to_le_bytes()));
        let offsets = [start, data.len()];
        header
            .insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": offsets}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// The same with the names that norms had in BERT's first years.
fn with_old_names(tensors: &serde_json::Map<String, Value>) -> serde_json::Map<String, Value> {
    let old = |name: &String| {
        let parts = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")];
        parts.iter().fold(name.clone(), |name, (new, old)| name.replace(new, old))
    };
    tensors.iter().map(|(name, shape)| (old(name), shape.clone())).collect()
}

/// Writes the files of a golden encoder into `folder`; `pooling` is sentence-transformers' mode:
/// a switch, or after `=` a name, which comes with norms by their old names.
pub(crate) fn write_model(name: &str, pooling: &str, folder: &Path) -> Vec<(String, PathBuf)> {
    let golden_model = golden_json(&format!("encoders/{name}.json"));
    let tokenizer = golden(&format!("encoders/{}", golden_model["tokenizer"].as_str().unwrap()));
    let tensors = golden_model["tensors"].as_object().unwrap();
    let (pooling, tensors) = match pooling.strip_prefix('=') {
        Some(mode) => (json!({"pooling_mode": mode}), with_old_names(tensors)),
        None => (json!({format!("pooling_mode_{pooling}"): true}), tensors.clone()),
    };
    let files = [
        ("model.safetensors", safetensors(&tensors)),
        ("config.json", serde_json::to_vec(&golden_model["config"]).unwrap()),
        ("pooling.json", serde_json::to_vec(&pooling).unwrap()),
        ("tokenizer.json", std::fs::read(tokenizer).unwrap()),
    ];
    let write = |(file, content): (&str, Vec<u8>)| {
        let path = folder.join(file);
        std::fs::write(&path, content).unwrap();
        (file.to_owned(), path)
    };
    files.into_iter().map(write).collect()
}

fn bench(name: &str, pooling: &str) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let files = write_model(name, pooling, folder.path());
    Bench::with_dtype(&ModelFiles { files }, Dtype::F32, SetKind::detect(), 2)
}

fn assert_close(ours: &[f32], theirs: &Value, what: &str) {
    let theirs = floats(theirs);
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (a, b) in ours.iter().zip(&theirs) {
        assert!((a - b).abs() <= 2e-4 * b.abs().max(1.0), "{what}: {a}, not {b}");
    }
}

fn input(case: &Value) -> Input {
    let second = case["second"].as_u64();
    second.map_or(Input::Known, |second| Input::Pair { second: second as u32 })
}

#[test]
fn embeddings_of_every_pooling_agree_with_transformers() {
    for name in ["bert_embed", "xlm_roberta_embed", "distilbert_embed"] {
        let golden = golden_json(&format!("encoders/{name}.json"));
        let poolings = [
            ("mean_tokens", "mean"),
            ("cls_token", "cls"),
            ("lasttoken", "last_token"),
            ("=mean", "mean"),
            ("=cls", "cls"),
            ("=lasttoken", "last_token"),
        ];
        for (pooling, expected) in poolings {
            let mut bench = bench(name, pooling);
            for case in golden["cases"].as_array().unwrap() {
                bench.add(0, 0, &ids(&case["ids"]));
                let vector = bench.run().vectors.remove(0);
                assert_close(&vector, &case[expected], &format!("{name} {expected}"));
            }
        }
    }
}

#[test]
fn states_of_single_tokens_add_up_to_the_mean() {
    let golden = golden_json("encoders/bert_embed.json");
    let mut bench = bench("bert_embed", "cls_token");
    for case in golden["cases"].as_array().unwrap() {
        let ids = ids(&case["ids"]);
        // Two spans: the second one's rows are not the step's first.
        bench.add(0, 0, &[2, 7, 3]);
        bench.add_as(0, 0, &ids, (Input::Known, Output::Hidden));
        let states = bench.run().vectors.remove(1);
        assert_eq!(states.len(), ids.len() * 64);
        let mean: Vec<f32> = (0..64)
            .map(|c| states.iter().skip(c).step_by(64).sum::<f32>() / ids.len() as f32)
            .collect();
        assert_close(&mean, &case["mean"], "mean of states");
        assert_close(&states[states.len() - 64..], &case["last_token"], "last state");
    }
}

#[test]
fn scores_agree_with_transformers_alone_and_packed() {
    for name in [
        "bert_rerank",
        "bert_classify",
        "xlm_roberta_rerank",
        "roberta_classify",
        "distilbert_classify",
    ] {
        let golden = golden_json(&format!("encoders/{name}.json"));
        let mut bench = bench(name, "mean_tokens");
        let cases = golden["cases"].as_array().unwrap();
        let mut alone = Vec::new();
        for case in cases {
            bench.add_as(0, 0, &ids(&case["ids"]), (input(case), Output::Answer));
            let scores = bench.run().vectors.remove(0);
            assert_close(&scores, &case["scores"], name);
            alone.push(scores);
        }
        for case in cases {
            bench.add_as(0, 0, &ids(&case["ids"]), (input(case), Output::Answer));
        }
        assert_eq!(bench.run().vectors, alone, "{name}: scores depend on the batch");
    }
}

#[test]
fn token_types_change_the_scores() {
    let golden = golden_json("encoders/bert_rerank.json");
    let mut bench = bench("bert_rerank", "mean_tokens");
    let cases = golden["cases"].as_array().unwrap();
    let case = cases.iter().find(|case| case["second"].is_u64()).unwrap();
    bench.add_as(0, 0, &ids(&case["ids"]), (input(case), Output::Answer));
    bench.add(0, 0, &ids(&case["ids"]));
    let vectors = bench.run().vectors;
    assert_ne!(vectors[0], vectors[1]);
}

#[test]
fn texts_and_pairs_are_tokenised_and_cut_as_transformers_does() {
    let names = ["bert_rerank", "bert_classify", "xlm_roberta_rerank", "roberta_classify"];
    for name in names {
        let golden_model = golden_json(&format!("encoders/{name}.json"));
        let file = golden(&format!("encoders/{}", golden_model["tokenizer"].as_str().unwrap()));
        let tokenizer = Tokenizer::from_hf_json(&std::fs::read(file).unwrap()).unwrap();
        let length = golden_model["limit"].as_u64().unwrap() as usize;
        let cut = Cut { length, second: usize::MAX, side: Side::Right };
        let mut cuts = 0;
        for case in golden_model["cases"].as_array().unwrap() {
            let text = |index: usize| case["texts"].get(index)?.as_str().map(str::to_owned);
            let passage = Passage { text: text(0).unwrap().into(), second: text(1) };
            let encode = |cut| {
                let passages = std::slice::from_ref(&passage);
                tokenizer.encode_passages(passages, cut, usize::MAX).unwrap().remove(0)
            };
            let whole = encode(None);
            assert_eq!(whole.tokens.len() as u64, case["tokens"].as_u64().unwrap(), "{passage:?}");
            let short = encode(Some(cut));
            assert_eq!(short.tokens[..], ids(&case["ids"])[..], "{name}: {passage:?}");
            assert_eq!(short.second.map(u64::from), case["second"].as_u64(), "{passage:?}");
            cuts += usize::from(short.tokens.len() < whole.tokens.len());
        }
        assert!(cuts > 0, "{name}: nothing was cut");
    }
}
