//! Every architecture on the emulated device, loaded as any model is, against what transformers
//! answers with the same made-up weights.

#[path = "../../../../tests/it/noise.rs"]
mod noise;

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use noise::noise;

use super::*;
use crate::engine::residency;
use crate::store::ModelFiles;

/// Rows and weights are bf16, and a model has tens of roundings in a row.
const TOLERANCE: f32 = 3e-2;

fn golden(name: &str) -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(value: &Json) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn ids(value: &Json) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// What is added to, and multiplied with, a decoder's noise.
fn decoder_scale(name: &str, shape: &[usize]) -> (f32, f32) {
    match shape {
        [_, columns] => (0.0, (1.7 / (*columns as f64).sqrt()) as f32),
        _ if name.ends_with("bias") => (0.0, 0.25),
        _ => (1.0, 0.25),
    }
}

fn encoder_scale(name: &str, shape: &[usize]) -> (f32, f32) {
    match shape {
        [_, _] if name.contains("embeddings") => (0.0, 1.0),
        [_, columns] => (0.0, (2.5 / (*columns as f64).sqrt()) as f32),
        _ if name.ends_with("LayerNorm.weight") || name.ends_with("layer_norm.weight") => {
            (1.0, 0.2)
        }
        _ => (0.0, 0.1),
    }
}

/// A model with made-up weights, opened and loaded for a GPU.
fn load(case: &Json, scale: fn(&str, &[usize]) -> (f32, f32), capacity: Capacity) -> LoadedModel {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape) in case["tensors"].as_object().unwrap() {
        let sizes: Vec<usize> = ids(shape).into_iter().map(|size| size as usize).collect();
        let (start, (plus, times)) = (data.len(), scale(name, &sizes));
        let values = noise(name, sizes.iter().product()).into_iter().map(|x| plus + x * times);
        data.extend(values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()));
        let offsets = [start, data.len()];
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let weights = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    let folder = tempfile::tempdir().unwrap();
    let contents = [
        ("model.safetensors", weights),
        ("config.json", serde_json::to_vec(&case["config"]).unwrap()),
    ];
    let files = contents.map(|(name, content)| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        (name.to_owned(), path)
    });
    let opened = residency::open(&ModelFiles { files: files.into() }).unwrap();
    opened.with_dtype(dtype(Dtype::Auto).unwrap(), None).load(capacity).unwrap()
}

/// A runner with this model in its one lane.
fn serving(model: LoadedModel) -> GpuRunner {
    let kv = model.outline.kv.unwrap_or(KV);
    let (pages, page_bytes) = (kv.layers as u32 + 1, 4 * kv.block_bytes());
    let options = Options { pages, page_bytes, lanes: 1, deterministic: false };
    let mut emulator = Emulator::new();
    emulator.twice = false;
    let mut runner = GpuRunner::new(Box::new(emulator), options).unwrap();
    runner.install(LaneId(0), model).unwrap();
    runner
}

/// How far `ours` is off, of the largest of `theirs`.
fn apart(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let peak = theirs.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
    ours.iter().zip(theirs).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs() / peak))
}

/// A piece of the one sequence, whose blocks lie in one group.
fn generation(start: u32, tokens: &[u32], input: Input, layers: u32) -> Step {
    let end = start + tokens.len() as u32;
    let mut step = step(start, tokens, input);
    step.lane = LaneId(0);
    step.blocks = (0..end.div_ceil(32)).map(|slot| BlockId { group: 0, slot }).collect();
    step.spans[0].blocks = 0..step.blocks.len() as u32;
    let pages = (0..layers).map(|layer| layer + 1).collect();
    step.grants = if start == 0 { vec![Grant { group: 0, pages }] } else { Vec::new() };
    step
}

#[test]
fn every_decoder_has_transformers_logits_and_text() {
    let mut compared = 0;
    for case in golden("decoders.json")["cases"].as_array().unwrap() {
        let name = &case["name"];
        let model = load(case, decoder_scale, Capacity { rows: 40, yields: 2, context: 64 });
        let layers = model.outline.kv.unwrap().layers as u32;
        let mut runner = serving(model);
        let tokens = ids(&case["tokens"]);
        let (mut outcome, mut start) = (Outcome::default(), 0);
        let logits = case["logits"].as_array().unwrap();
        for (at, expected) in ids(&case["logits_at"]).into_iter().zip(logits) {
            let piece = &tokens[start as usize..=at as usize];
            runner.submit(&generation(start, piece, Input::Known, layers)).unwrap();
            outcome.clear();
            runner.collect(SlotId(0), &mut outcome).unwrap();
            let ours = runner.executor.output(0, 1).unwrap();
            let apart = apart(&ours, &floats(expected));
            assert!(apart <= TOLERANCE, "{name}: {apart} of the largest logit at {at}");
            start = at + 1;
        }
        // Two steps on their way at once, each with the token of the one before.
        let (texts, margins) = (ids(&case["continuation"]), floats(&case["margins"]));
        let mut chosen = outcome.tokens.clone();
        let next = |ahead| generation(start + ahead, &[0], Input::Seat(Seat(3)), layers);
        runner.submit(&next(0)).unwrap();
        for ahead in 1..texts.len() as u32 {
            runner.submit(&next(ahead)).unwrap();
            outcome.clear();
            runner.collect(SlotId(0), &mut outcome).unwrap();
            chosen.extend(&outcome.tokens);
        }
        // A near tie may fall the other way; after it the texts are different ones.
        let near = margins.iter().position(|margin| *margin < 0.1).unwrap_or(texts.len());
        assert_eq!(chosen[..near], texts[..near], "{name}");
        compared += near;
    }
    assert!(compared >= 25, "{compared} tokens");
}

/// All cases of a golden encoder in one step.
fn encode(name: &str, output: Output) -> (Json, Vec<Vec<f32>>) {
    let golden = golden(&format!("encoders/{name}.json"));
    let capacity = Capacity { rows: 300, yields: 300, context: 48 };
    let mut runner = serving(load(&golden, encoder_scale, capacity));
    let mut step = Step { lane: LaneId(0), ..Step::default() };
    for (index, case) in golden["cases"].as_array().unwrap().iter().enumerate() {
        let first = step.tokens.len() as u32;
        step.tokens.extend(ids(&case["ids"]));
        let second = case["second"].as_u64().map(|second| second as u32);
        step.spans.push(Span {
            request: RequestId(index as u64),
            tenant: TenantId::default(),
            part: 0,
            rows: first..step.tokens.len() as u32,
            start: 0,
            blocks: 0..0,
            input: second.map_or(Input::Known, |second| Input::Pair { second }),
            // Beside spans that ask for something else.
            output: if index == 0 { Output::Answer } else { output },
        });
    }
    runner.submit(&step).unwrap();
    let mut outcome = Outcome::default();
    runner.collect(SlotId(0), &mut outcome).unwrap();
    (golden, outcome.vectors)
}

#[test]
fn every_encoder_answers_as_transformers_does() {
    for (name, key) in [
        ("bert_embed", "mean"),
        ("xlm_roberta_embed", "mean"),
        ("distilbert_embed", "mean"),
        ("bert_rerank", "scores"),
        ("bert_classify", "scores"),
        ("xlm_roberta_rerank", "scores"),
        ("roberta_classify", "scores"),
        ("distilbert_classify", "scores"),
    ] {
        let (golden, vectors) = encode(name, Output::Answer);
        let cases = golden["cases"].as_array().unwrap();
        assert_eq!(vectors.len(), cases.len());
        let all: Vec<f32> = cases.iter().flat_map(|case| floats(&case[key])).collect();
        let apart = apart(&vectors.concat(), &all);
        assert!(apart <= TOLERANCE, "{name}: {apart} of the largest");
    }
}

#[test]
fn token_types_matter_on_the_device() {
    let (golden, vectors) = encode("bert_rerank", Output::Answer);
    let case = golden["cases"].as_array().unwrap().iter().position(|case| case["second"].is_u64());
    let scores = floats(&golden["cases"][case.unwrap()]["scores"]);
    assert!(apart(&vectors[case.unwrap()], &scores) <= 2.0 * TOLERANCE);
}

#[test]
fn states_of_single_tokens_come_back_by_span() {
    let (golden, vectors) = encode("bert_embed", Output::Hidden);
    for (index, case) in golden["cases"].as_array().unwrap().iter().enumerate() {
        let (states, rows) = (&vectors[index], ids(&case["ids"]).len());
        let mean = floats(&case["mean"]);
        if index == 0 {
            assert!(apart(states, &mean) <= TOLERANCE);
            continue;
        }
        assert_eq!(states.len(), rows * mean.len());
        let last = &states[states.len() - mean.len()..];
        assert!(apart(last, &floats(&case["last_token"])) <= TOLERANCE);
        let summed: Vec<f32> = (0..mean.len())
            .map(|c| states.iter().skip(c).step_by(mean.len()).sum::<f32>() / rows as f32)
            .collect();
        assert!(apart(&summed, &mean) <= TOLERANCE);
    }
}
