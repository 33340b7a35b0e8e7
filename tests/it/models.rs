//! The real models against other software's answers, and against themselves in other batches.

use std::ops::Range;
use std::sync::Arc;

use sconce::device::threads::Team;
use sconce::engine::budget::{self, Wish};
use sconce::engine::model_runner::ModelRunner;
use sconce::engine::residency;
use sconce::engine::runner::Runner;
use sconce::kernels::cpu::executor::Executor;
use sconce::kernels::cpu::isa::SetKind;
use sconce::model::Dtype;
use sconce::request::{Adjustment, Detail, LaneId, Micros, RequestId, Sampling, TenantId};
use sconce::scheduler::step::{
    BLOCK_TOKENS, BlockId, Grant, Input, Outcome, Output, Seat, Span, SpanDetail, Step,
};
use sconce::scheduler::{LaneConfig, LaneKind};
use sconce::store::ModelFiles;
use serde_json::Value;

use crate::checkpoint::floats;
use crate::fixtures::{golden_json, model_files};

pub(crate) const GENERATOR: &str = "smollm2-135m-instruct";
pub(crate) const ENCODER: &str = "all-minilm-l6-v2";

/// One model alone on a device; steps are written by hand.
pub(crate) struct Bench {
    runner: ModelRunner,
    config: LaneConfig,
    step: Step,
    outcome: Outcome,
}

impl Bench {
    pub(crate) fn new(model: &str, set: SetKind, threads: usize) -> Self {
        Self::over(&model_files(model), set, threads)
    }

    /// Over files of any origin.
    pub(crate) fn over(files: &ModelFiles, set: SetKind, threads: usize) -> Self {
        Self::with_dtype(files, Dtype::Auto, set, threads)
    }

    /// As [`Bench::over`], with float weights kept as `dtype`.
    pub(crate) fn with_dtype(
        files: &ModelFiles,
        dtype: Dtype,
        set: SetKind,
        threads: usize,
    ) -> Self {
        let opened = residency::open(files).unwrap().with_dtype(dtype, Some(SetKind::detect()));
        let wish = Wish {
            weight: 1.0,
            context: Some(2048),
            seats: None,
            weight_bytes: opened.weight_bytes(),
        };
        let lane = (opened.outline, budget::capacity(&opened.outline, &wish));
        let loaded = opened.load(lane.1).unwrap();
        let kvs: Vec<_> = lane.0.kv.into_iter().collect();
        let page_bytes = budget::page_bytes(&kvs);
        let config = budget::lane_config(&lane, &wish, page_bytes, (Micros(1), Micros(1)));
        let executor = Executor::new(Team::new(threads).unwrap(), set);
        let mut runner = ModelRunner::new(executor, 1, (4096, page_bytes)).unwrap();
        runner.install(LaneId(0), loaded).unwrap();
        Self { runner, config, step: Step::default(), outcome: Outcome::default() }
    }

    /// Adds `tokens` at position `start` of a sequence whose KV lies in the groups of `home`: each
    /// sequence has groups of its own, far from the next one's.
    pub(crate) fn add(&mut self, home: u32, start: usize, tokens: &[u32]) {
        self.add_as(home, start, tokens, (Input::Known, Output::Answer));
    }

    /// As [`Bench::add`]; `encode` says what an encoder does.
    pub(crate) fn add_as(
        &mut self,
        home: u32,
        start: usize,
        tokens: &[u32],
        encode: (Input, Output),
    ) {
        let rows = self.step.tokens.len() as u32;
        let rows = rows..rows + tokens.len() as u32;
        self.step.tokens.extend_from_slice(tokens);
        let (blocks, output) = match self.config.kind {
            LaneKind::Generate { layers, blocks_per_page, .. } => {
                let end = start + tokens.len();
                let blocks = self.place(home, end, (layers, blocks_per_page));
                let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
                let position = end as u32;
                (blocks, Output::Sample { seat: Seat(home), sampling, position })
            }
            LaneKind::Encode => (0..0, encode.1),
        };
        self.step.spans.push(Span {
            request: RequestId(u64::from(home)),
            tenant: TenantId::default(),
            part: 0,
            rows,
            start: start as u32,
            blocks,
            input: encode.0,
            output,
        });
    }

    /// What was added last also says log-probabilities, of this many tokens besides its own.
    fn score(&mut self, top: u8) {
        self.detail(Detail { adjustment: None, logprobs: Some(top) });
    }

    /// What was added last goes on with `token`, and says how likely that was without being told.
    fn force(&mut self, token: u32) {
        let adjustment = Adjustment { bias: vec![(token, 1e9)], ..Adjustment::default() };
        self.detail(Detail { adjustment: Some(Arc::new(adjustment)), logprobs: Some(0) });
    }

    fn detail(&mut self, detail: Detail) {
        let span = self.step.spans.len() as u32 - 1;
        self.step.details.push(SpanDetail { span, detail, prompt: [].into(), generated: 0..0 });
    }

    fn place(&mut self, home: u32, end: usize, (layers, in_page): (u32, u32)) -> Range<u32> {
        let first = self.step.blocks.len() as u32;
        for block in 0..end.div_ceil(BLOCK_TOKENS) as u32 {
            let group = home * 16 + block / in_page;
            self.step.blocks.push(BlockId { group, slot: block % in_page });
            if !self.step.grants.iter().any(|grant| grant.group == group) {
                // Odd strides scatter the pages of a group.
                let page = |layer| (group * layers + layer) * 7 % 4096;
                let pages = (0..layers).map(page).collect();
                self.step.grants.push(Grant { group, pages });
            }
        }
        first..self.step.blocks.len() as u32
    }

    /// Runs what was added.
    pub(crate) fn run(&mut self) -> Outcome {
        self.go();
        let outcome = self.outcome.clone();
        self.clear();
        outcome
    }

    /// Runs what was added, and nothing else: what an engine does.
    pub(crate) fn go(&mut self) {
        self.runner.submit(&self.step).unwrap();
        self.runner.collect(self.step.slot, &mut self.outcome).unwrap();
    }

    /// Forgets what was added, and the outcome.
    pub(crate) fn clear(&mut self) {
        self.step.clear();
        self.outcome.clear();
    }
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn minilm_agrees_with_sentence_transformers() {
    let golden = golden_json("minilm_embeddings.json");
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 50);
    for (dtype, least) in [(Dtype::Auto, 0.9999), (Dtype::Bf16, 0.9999), (Dtype::Int8, 0.995)] {
        let mut bench = Bench::with_dtype(&model_files(ENCODER), dtype, SetKind::detect(), 2);
        let mut worst = 1.0f64;
        for case in cases {
            bench.add(0, 0, &ids(&case["ids"]));
            let vector = bench.run().vectors.remove(0);
            worst = worst.min(cosine(&vector, &floats(&case["embedding"])));
        }
        eprintln!("worst cosine as {dtype:?}: {worst:.6}");
        assert!(worst >= least, "worst cosine {worst} as {dtype:?}");
    }
}

#[test]
fn a_packed_batch_of_texts_equals_each_alone_bit_by_bit() {
    let golden = golden_json("minilm_embeddings.json");
    let mut bench = Bench::new(ENCODER, SetKind::detect(), 2);
    let texts: Vec<Vec<u32>> =
        golden["cases"].as_array().unwrap().iter().map(|case| ids(&case["ids"])).collect();
    let alone: Vec<Vec<f32>> = texts
        .iter()
        .map(|text| {
            bench.add(0, 0, text);
            bench.run().vectors.remove(0)
        })
        .collect();
    let mut packed = Vec::new();
    for text in &texts {
        if bench.step.tokens.len() + text.len() > bench.config.rows_max as usize {
            packed.extend(bench.run().vectors);
        }
        bench.add(0, 0, text);
    }
    packed.extend(bench.run().vectors);
    assert!(alone == packed, "a text's vector depends on its batch");
}

#[test]
fn smollm2_chooses_the_oracles_next_token() {
    let golden = golden_json("smollm2_next_token.json");
    let mut bench = Bench::new(GENERATOR, SetKind::detect(), 2);
    let (mut positions, mut agreed, mut theirs, mut clear) = (0, 0, 0, 0);
    for prompt in golden["prompts"].as_array().unwrap() {
        let start = ids(&prompt["prompt_ids"]);
        let forced = ids(&prompt["continuation_ids"]);
        let expected = ids(&prompt["argmax"]);
        let llama_cpp = ids(&prompt["llama_cpp_argmax"]);
        bench.add(0, 0, &start);
        let mut chosen = bench.run().tokens;
        for (index, &token) in forced[..forced.len() - 1].iter().enumerate() {
            bench.add(0, start.len() + index, &[token]);
            chosen.extend(bench.run().tokens);
        }
        assert_eq!(chosen.len(), expected.len());
        for (index, (&ours, &oracle)) in chosen.iter().zip(&expected).enumerate() {
            positions += 1;
            agreed += usize::from(ours == oracle);
            theirs += usize::from(llama_cpp[index] == oracle);
            if prompt["margin"][index].as_f64().unwrap() > 1.0 {
                clear += 1;
                assert_eq!(ours, oracle, "position {index} of {:?}", prompt["rendered"]);
            }
        }
    }
    assert!(positions >= 400 && clear > 0);
    let share = |count: usize| count as f64 / positions as f64;
    let (ours, theirs) = (share(agreed), share(theirs));
    eprintln!("agreement with the oracle over {positions} positions: {ours:.4} ({theirs:.4})");
    assert!(ours >= 0.93, "{ours}");
    assert!(ours >= theirs - 0.02, "{ours}, llama.cpp has {theirs}");
}

/// The oracle's 20 most likely tokens at each position of its own continuations. Weights are the
/// same 4-bit ones; activations are not, neither here nor in llama.cpp.
#[test]
fn log_probabilities_agree_with_the_oracle() {
    let golden = golden_json("smollm2_logprobs.json");
    let theirs = golden["llama_cpp_mean_difference"].as_f64().unwrap();
    let mut bench = Bench::new(GENERATOR, SetKind::detect(), 2);
    let (mut sum, mut count, mut missing) = (0.0, 0, 0);
    for prompt in golden["prompts"].as_array().unwrap() {
        let start = ids(&prompt["prompt_ids"]);
        let answer = ids(&prompt["answer_ids"]);
        for position in 0..answer.len() {
            match position {
                0 => bench.add(0, 0, &start),
                _ => bench.add(0, start.len() + position - 1, &answer[position - 1..position]),
            }
            bench.score(20);
            let outcome = bench.run();
            let [told] = &outcome.logprobs[..] else { panic!("{:?}", outcome.logprobs) };
            assert_eq!((told.top[0].0, told.top[0].1), (outcome.tokens[0], told.chosen), "greedy");
            assert_eq!(told.top.len(), 20);
            assert!(told.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
            assert!(told.top.iter().map(|(_, logprob)| logprob.exp()).sum::<f32>() <= 1.0001);
            let expected = ids(&prompt["top20_ids"][position]);
            let values = prompt["top20"][position].as_array().unwrap();
            for (id, value) in expected.iter().zip(values) {
                count += 1;
                match told.top.iter().find(|(other, _)| other == id) {
                    Some((_, ours)) => sum += (f64::from(*ours) - value.as_f64().unwrap()).abs(),
                    None => missing += 1,
                }
            }
        }
    }
    let mean = sum / f64::from(count - missing);
    eprintln!("mean difference {mean:.4} (llama.cpp's {theirs}); {missing} of {count} not listed");
    assert!(count >= 2000 && mean <= theirs * 1.25, "{mean}, llama.cpp has {theirs}");
    assert!(f64::from(missing) <= 0.12 * f64::from(count), "{missing} of {count}");
}

/// The text is windows of the same length side by side, fed token by token from their middles on.
#[test]
fn perplexity_is_llama_cpps() {
    let golden = golden_json("smollm2_perplexity.json");
    let given = golden["windows"].as_array().unwrap();
    let windows: Vec<Vec<u32>> = given.iter().map(|window| ids(&window["ids"])).collect();
    let mut bench = Bench::new(GENERATOR, SetKind::detect(), 2);
    let (length, half) = (windows[0].len(), windows[0].len() / 2);
    for (home, window) in (0..).zip(&windows) {
        bench.add(home, 0, &window[..half - 1]);
        bench.run();
    }
    let (mut surprise, mut count) = (0.0, 0);
    for at in half..length {
        for (home, window) in (0..).zip(&windows) {
            bench.add(home, at - 1, &window[at - 1..at]);
            bench.force(window[at]);
        }
        let outcome = bench.run();
        for (i, told) in outcome.logprobs.iter().enumerate() {
            assert_eq!(outcome.tokens[i], windows[i][at]);
            surprise -= f64::from(told.chosen);
            count += 1;
        }
    }
    assert_eq!(count, windows.len() * half);
    let ours = (surprise / count as f64).exp();
    let theirs = golden["llama_cpp_perplexity"].as_f64().unwrap();
    let exact = golden["perplexity"].as_f64().unwrap();
    eprintln!("perplexity {ours:.4}; llama.cpp {theirs:.4}; in float32 {exact:.4}");
    assert!(ours <= theirs * 1.005, "{ours}, llama.cpp has {theirs}");
    assert!((ours / exact - 1.0).abs() < 0.01, "{ours}, {exact} in float32");
}

#[test]
fn a_sequence_has_the_same_tokens_in_any_batch_and_chunking() {
    let golden = golden_json("smollm2_next_token.json");
    let prompts: Vec<Vec<u32>> = golden["prompts"].as_array().unwrap()[..6]
        .iter()
        .map(|prompt| ids(&prompt["prompt_ids"]))
        .collect();
    let mut bench = Bench::new(GENERATOR, SetKind::detect(), 2);
    let new_tokens = 24;
    let alone: Vec<Vec<u32>> = prompts.iter().map(|p| generate_alone(&mut bench, p)).collect();

    // Together: prompts in chunks of uneven size while others already decode.
    let mut known: Vec<Vec<u32>> = prompts.clone();
    let mut done = vec![0; prompts.len()];
    while (0..prompts.len()).any(|i| known[i].len() < prompts[i].len() + new_tokens) {
        let mut yields = Vec::new();
        for i in 0..prompts.len() {
            let (from, len) = (done[i], known[i].len());
            if from == len || len >= prompts[i].len() + new_tokens {
                continue;
            }
            let to = len.min(from + 7 + 13 * i);
            bench.add(i as u32 + 1, from, &known[i][from..to]);
            done[i] = to;
            yields.push((i, to == len));
        }
        let outcome = bench.run();
        for (&(i, last), token) in yields.iter().zip(outcome.tokens) {
            if last {
                known[i].push(token);
            }
        }
    }
    for (i, alone) in alone.iter().enumerate() {
        assert_eq!(&known[i][prompts[i].len()..], &alone[..], "prompt {i}");
    }

    fn generate_alone(bench: &mut Bench, prompt: &[u32]) -> Vec<u32> {
        bench.add(0, 0, prompt);
        let mut tokens = bench.run().tokens;
        while tokens.len() < 24 {
            let at = prompt.len() + tokens.len() - 1;
            let last = [*tokens.last().unwrap()];
            bench.add(0, at, &last);
            tokens.extend(bench.run().tokens);
        }
        tokens
    }
}
