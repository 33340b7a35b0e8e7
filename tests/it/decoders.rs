//! Every member of the Llama family against transformers, from safetensors and from GGUF, through
//! the real way of loading. `decoders.json` was made in f32 with the same made-up weights.

use sconce::engine::residency;
use serde_json::Value as Json;

use crate::checkpoint::{floats, logits, write_gguf, write_safetensors};
use crate::fixtures::golden_json;
use crate::models::ids;

/// Keys and values are f16 in our cache, f32 in the reference: of the largest logit, how far a
/// logit may be off. Measured: 5.3e-4.
const TOLERANCE: f32 = 1.5e-3;

fn cases() -> Vec<Json> {
    golden_json("decoders.json")["cases"].as_array().unwrap().clone()
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32
}

#[test]
fn every_decoder_has_transformers_logits_from_both_kinds_of_file() {
    let cases = cases();
    assert!(cases.len() >= 8);
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let tokens = ids(&case["tokens"]);
        let ours = logits(&write_safetensors(case, folder.path()), &tokens);
        let expected: Vec<Vec<f32>> =
            case["logits"].as_array().unwrap().iter().map(floats).collect();
        let peak = expected.iter().flatten().fold(0.0f32, |peak, x| peak.max(x.abs()));
        let mut worst = 0.0f32;
        for (at, expected) in ids(&case["logits_at"]).into_iter().zip(&expected) {
            for (ours, theirs) in ours[at as usize].iter().zip(expected) {
                worst = worst.max((ours - theirs).abs() / peak);
            }
        }
        println!("{name}: off by {worst:.1e} of the largest logit");
        assert!(worst <= TOLERANCE, "{name}: {worst}");

        // The same numbers in another order in the file, but for what f16 cannot hold, and for
        // factors of rotation, which a GGUF file has in f32.
        let gguf = logits(&write_gguf(case, folder.path()), &tokens);
        let exact = floats(&case["rope_factors"]).is_empty() && case["format"] != "F16";
        for (row, other) in ours.iter().zip(&gguf) {
            for (a, b) in row.iter().zip(other) {
                let apart = (a - b).abs() / peak;
                assert!(if exact { a == b } else { apart <= TOLERANCE }, "{name}: {a} and {b}");
            }
        }
    }
}

#[test]
fn every_decoder_continues_as_transformers_does() {
    for case in &cases() {
        let folder = tempfile::tempdir().unwrap();
        let files = write_safetensors(case, folder.path());
        let mut known = ids(&case["tokens"]);
        let margins = floats(&case["margins"]);
        let expected = ids(&case["continuation"]);
        let mut chosen = 0;
        for (next, margin) in expected.into_iter().zip(margins) {
            let ours = argmax(logits(&files, &known).last().unwrap());
            // A near tie may fall the other way; after it the texts are different ones.
            if ours != next {
                assert!(margin < 0.01, "{}: {ours} for {next}, margin {margin}", case["name"]);
                break;
            }
            known.push(next);
            chosen += 1;
        }
        assert!(chosen >= 4, "{}: {chosen} tokens", case["name"]);
    }
}

fn open_error(case: &Json, change: impl Fn(&mut Json)) -> String {
    let mut case = case.clone();
    change(&mut case["config"]);
    let folder = tempfile::tempdir().unwrap();
    let files = write_safetensors(&case, folder.path());
    residency::open(&files).unwrap_err().to_string()
}

fn named(name: &str) -> Json {
    cases().into_iter().find(|case| case["name"] == name).unwrap()
}

#[test]
fn what_would_change_the_result_is_refused_by_name() {
    let llama = named("llama");
    for (key, value, part) in [
        ("hidden_act", Json::from("gelu"), "hidden_act 'gelu'"),
        ("num_local_experts", Json::from(8), "mixtures of experts"),
        ("head_dim", Json::from(20), "head size of 20"),
        ("num_key_value_heads", Json::from(3), "4 query heads"),
        ("num_hidden_layers", Json::from(-1), "'num_hidden_layers' is -1"),
        ("hidden_size", Json::Null, "lacks 'hidden_size'"),
        ("quantization_config", serde_json::json!({ "bits": 4 }), "quantization_config"),
        ("model_type", Json::from("gpt_neox"), "architecture 'gpt_neox'"),
    ] {
        let error = open_error(&llama, |config| config[key] = value.clone());
        assert!(error.contains(part), "{key}: {error}");
    }
    let unknown = serde_json::json!({ "rope_type": "longrope", "factor": 4.0 });
    let error = open_error(&llama, |config| config["rope_parameters"] = unknown.clone());
    assert!(error.contains("'longrope'"), "{error}");
}

#[test]
fn a_window_limits_the_context() {
    let context = |name: &str, change: &dyn Fn(&mut Json)| {
        let mut case = named(name);
        change(&mut case["config"]);
        let folder = tempfile::tempdir().unwrap();
        let files = write_safetensors(&case, folder.path());
        residency::open(&files).unwrap().outline.context
    };
    assert_eq!(context("mistral_head_dim", &|_| {}), 128);
    assert_eq!(context("mistral_head_dim", &|config| config["sliding_window"] = 48.into()), 48);
    let idle = |config: &mut Json| config["sliding_window"] = 48.into();
    assert_eq!(context("qwen2", &idle), 128);
    let used = |config: &mut Json| {
        config["sliding_window"] = 48.into();
        config["use_sliding_window"] = true.into();
    };
    assert_eq!(context("qwen2", &used), 48);
}

#[test]
fn shards_that_do_not_fit_their_index_are_refused() {
    let case = named("llama_rope_llama3");
    let folder = tempfile::tempdir().unwrap();
    let files = write_safetensors(&case, folder.path());
    let mut fewer = files.clone();
    fewer.files.retain(|(name, _)| !name.starts_with("model-00002"));
    let error = residency::open(&fewer).unwrap_err().to_string();
    assert!(error.contains("model-00002-of-00003.safetensors"), "{error}");

    let index = files.path("model.safetensors.index.json").unwrap();
    let mut json: Json = serde_json::from_slice(&std::fs::read(index).unwrap()).unwrap();
    json["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors".into();
    std::fs::write(index, serde_json::to_vec(&json).unwrap()).unwrap();
    let error = residency::open(&files).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight"), "{error}");
}
