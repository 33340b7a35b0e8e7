//! candle-transformers as a second oracle: whole models, one request at a time, f32 activations.

use candle_core::quantized::gguf_file;
use candle_core::{D, DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use candle_transformers::models::quantized_llama::ModelWeights;
use sconce::kernels::cpu::isa::SetKind;

use crate::fixtures::{golden_json, model_files};
use crate::models::{Bench, ENCODER, GENERATOR, cosine, ids};

#[test]
fn smollm2_follows_candles_llama() {
    let files = model_files(GENERATOR);
    let path = files.path("model.gguf").unwrap();
    let mut file = std::fs::File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let device = Device::Cpu;
    let mut candle = ModelWeights::from_gguf(content, &mut file, &device).unwrap();
    let mut bench = Bench::new(GENERATOR, SetKind::detect(), 2);

    let golden = golden_json("smollm2_next_token.json");
    let (mut agreed, mut positions) = (0, 0);
    for prompt in &golden["prompts"].as_array().unwrap()[..2] {
        let prompt_ids = ids(&prompt["prompt_ids"]);
        let forced = ids(&prompt["continuation_ids"]);
        let mut position = 0;
        let mut tokens = prompt_ids.clone();
        for &next in forced.iter().take(24) {
            let input = Tensor::new(tokens.as_slice(), &device).unwrap().unsqueeze(0).unwrap();
            let logits = candle.forward(&input, position).unwrap();
            let logits = logits.flatten_all().unwrap();
            let theirs = logits.argmax(D::Minus1).unwrap().to_scalar::<u32>().unwrap();
            bench.add(0, position, &tokens);
            let ours = bench.run().tokens[0];
            agreed += usize::from(ours == theirs);
            positions += 1;
            position += tokens.len();
            tokens = vec![next];
        }
    }
    let share = f64::from(agreed as u32) / f64::from(positions as u32);
    assert!(share >= 0.93, "{agreed} of {positions} choices agree");
}

#[test]
fn minilm_agrees_with_candles_bert() {
    let files = model_files(ENCODER);
    let read = |name: &str| std::fs::read(files.path(name).unwrap()).unwrap();
    let config: Config = serde_json::from_slice(&read("config.json")).unwrap();
    let device = Device::Cpu;
    let weights = read("model.safetensors");
    let tensors = VarBuilder::from_buffered_safetensors(weights, DType::F32, &device).unwrap();
    let candle = BertModel::load(tensors, &config).unwrap();
    let mut bench = Bench::new(ENCODER, SetKind::detect(), 2);

    let golden = golden_json("minilm_embeddings.json");
    for case in golden["cases"].as_array().unwrap().iter().step_by(10) {
        let tokens = ids(&case["ids"]);
        let input = Tensor::new(tokens.as_slice(), &device).unwrap().unsqueeze(0).unwrap();
        let types = input.zeros_like().unwrap();
        let hidden = candle.forward(&input, &types, None).unwrap();
        let mean = hidden.i(0).unwrap().mean(0).unwrap().to_vec1::<f32>().unwrap();
        bench.add(0, 0, &tokens);
        let ours = bench.run().vectors.remove(0);
        let cosine = cosine(&ours, &mean);
        assert!(cosine >= 0.9999, "cosine {cosine} for {:?}", case["text"]);
    }
}
