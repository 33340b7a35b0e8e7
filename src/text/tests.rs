//! A small vocabulary through every part of the text path. Golden values of real vocabularies are
//! in the integration tests.

use std::sync::Arc;

use super::*;
use crate::store::gguf::Value;

mod sentence;
mod stream;
mod template;
mod vocabulary;

/// Byte tokens 0..=255, then merges' tokens, then user-defined ones, then control tokens.
const MERGES: [&str; 6] = ["h e", "l l", "he ll", "hell o", "Ġ w", "i m"];
const USER_DEFINED: [&str; 2] = ["<think>", "</think>"];
const CONTROLS: [&str; 6] =
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|><x>", "<|user|>", "#"];

fn header(pre: &str) -> Header {
    let mut tokens: Vec<String> = bpe::alphabet().iter().map(char::to_string).collect();
    tokens.extend(MERGES.iter().map(|merge| merge.replace(' ', "")));
    let mut types = vec![1; tokens.len()];
    tokens.extend(USER_DEFINED.map(String::from));
    types.extend([4; USER_DEFINED.len()]);
    tokens.extend(CONTROLS.map(String::from));
    types.extend([3; CONTROLS.len()]);
    let position = |text: &str| {
        Value::Uint(tokens.iter().position(|token| token == text).expect("in the list") as u64)
    };
    let list = |texts: &[&str]| {
        Value::Array(texts.iter().map(|text| Value::String((*text).to_owned())).collect())
    };
    let mut header = Header::default();
    let mut set = |key: &str, value| header.metadata.insert(format!("tokenizer.ggml.{key}"), value);
    set("model", Value::String("gpt2".into()));
    set("pre", Value::String(pre.into()));
    set("bos_token_id", position("<|im_start|>"));
    set("eos_token_id", position("<|im_end|>"));
    set("merges", list(&MERGES));
    set("token_type", Value::Array(types.into_iter().map(Value::Int).collect()));
    set("tokens", Value::Array(tokens.into_iter().map(Value::String).collect()));
    header
}

fn tokenizer(pre: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_gguf(&header(pre)).unwrap())
}

/// Small numbers from a seed (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}
