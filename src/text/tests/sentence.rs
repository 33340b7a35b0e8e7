//! SentencePiece vocabularies, and what `tokenizer.json` and its neighbours say about a generator.

use serde_json::json;

use super::*;
use crate::text::huggingface::HfFiles;

/// Control tokens, byte tokens, then pieces with scores: the later the worse.
fn sentence_header(pieces: &[&str]) -> Header {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    let mut types = vec![2, 3, 3];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    types.extend([6; 256]);
    tokens.push("<tool>".into());
    types.push(4);
    tokens.extend(pieces.iter().map(|piece| (*piece).to_owned()));
    types.extend(vec![1; pieces.len()]);
    let scores = (0..tokens.len()).map(|id| Value::Float(-(id as f64)));
    let mut header = Header::default();
    let mut set = |key: &str, value| header.metadata.insert(format!("tokenizer.ggml.{key}"), value);
    set("model", Value::String("llama".into()));
    set("bos_token_id", Value::Uint(1));
    set("eos_token_id", Value::Uint(2));
    set("scores", Value::Array(scores.collect()));
    set("token_type", Value::Array(types.into_iter().map(Value::Int).collect()));
    set("tokens", Value::Array(tokens.into_iter().map(Value::String).collect()));
    header
}

const PIECES: [&str; 9] = ["▁", "h", "e", "l", "o", "he", "llo", "ll", "▁he"];

fn written(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, false).unwrap();
    let texts = ids.iter().map(|id| String::from_utf8_lossy(tokenizer.token_bytes(*id)));
    texts.map(|text| text.into_owned()).collect()
}

#[test]
fn the_best_score_is_merged_first() {
    let tokenizer = Tokenizer::from_gguf(&sentence_header(&PIECES)).unwrap();
    // "he" is better than "llo", "llo" than "ll"; yet "llo" is only reached through "ll".
    assert_eq!(written(&tokenizer, "hello"), [" he", "llo"]);
    assert_eq!(written(&tokenizer, "h e"), [" ", "h", " ", "e"]);
    assert_eq!(written(&tokenizer, "é"), [" ", "\u{fffd}", "\u{fffd}"]);
    for text in ["", "hello", " hello  ", "é\n<0x41></s>", "▁"] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert!(ids.iter().all(|id| !tokenizer.controls.contains(*id)), "{text}: {ids:?}");
        assert_eq!(tokenizer.decode(&ids), text.replace('▁', " "));
    }
    assert_eq!(tokenizer.encode("h", true).unwrap()[0], 1);
    let text = ModelText::from_gguf(&sentence_header(&PIECES)).unwrap();
    assert_eq!(*text.stop_tokens, [2]);
}

#[test]
fn a_space_goes_before_texts_and_after_literals_unless_declined() {
    let mut header = sentence_header(&PIECES);
    let tokenizer = Tokenizer::from_gguf(&header).unwrap();
    assert_eq!(written(&tokenizer, "he<tool>he"), [" he", "<tool>", " he"]);
    header.metadata.insert("tokenizer.ggml.add_space_prefix".into(), Value::Bool(false));
    let tokenizer = Tokenizer::from_gguf(&header).unwrap();
    assert_eq!(written(&tokenizer, "he<tool>he"), ["he", "<tool>", "he"]);
    assert_eq!(tokenizer.decode(&tokenizer.encode(" he", false).unwrap()), " he");
}

#[test]
fn unsound_sentence_vocabularies_are_refused() {
    let refusal = |key: &str, value: Value| {
        let mut header = sentence_header(&PIECES);
        header.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        Tokenizer::from_gguf(&header).unwrap_err().to_string()
    };
    assert!(refusal("scores", Value::Array(vec![Value::Float(0.0)])).contains("scores"));
    assert!(refusal("scores", Value::Array(vec![Value::Int(1); 269])).contains("list of floats"));
    let nan = vec![Value::Float(f64::NAN); 269];
    assert!(refusal("scores", Value::Array(nan)).contains("not a number"));
    assert!(refusal("token_type", Value::Array(vec![Value::Int(6); 269])).contains("byte token 0"));
    assert!(refusal("bos_token_id", Value::Uint(269)).contains("269 of 269"));
    let mut header = sentence_header(&["a", "a"]);
    assert!(Tokenizer::from_gguf(&header).unwrap_err().to_string().contains("twice"));
    header.metadata.remove("tokenizer.ggml.scores");
    assert!(Tokenizer::from_gguf(&header).unwrap_err().to_string().contains("scores"));
}

/// A vocabulary from a stranger is refused or used, without a panic, and text is not lost.
#[test]
fn nonsense_sentence_vocabularies_do_no_harm() {
    let parts = ["", "▁", "a", "b", "ab", "▁a", "é", "<0x41>", "<0xGG>", "</s>", "\u{0}", "aab"];
    let mut random = Random(17);
    let mut used = 0;
    for _ in 0..3_000 {
        let tokens: Vec<&str> = (0..random.below(6)).map(|_| random.pick(&parts)).collect();
        let count = tokens.len();
        let types = (0..count).map(|_| Value::Int(random.below(9) as i64 - 1)).collect();
        let wild = [0.0, -1.0, f64::INFINITY, f64::NEG_INFINITY, 1e300];
        let scores = (0..count).map(|_| Value::Float(random.pick(&wild))).collect();
        let mut header = sentence_header(&[]);
        let texts = tokens.iter().map(|text| Value::String((*text).to_owned())).collect();
        for (key, value) in [("tokens", texts), ("token_type", types), ("scores", scores)] {
            header.metadata.insert(format!("tokenizer.ggml.{key}"), Value::Array(value));
        }
        header.metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(false));
        let Ok(tokenizer) = Tokenizer::from_gguf(&header) else { continue };
        used += 1;
        let text: String = (0..6).map(|_| random.pick(&parts)).collect();
        let ids = tokenizer.encode(&text, true).unwrap();
        assert!(ids.iter().all(|id| (*id as usize) < count));
    }
    assert!(used > 100, "{used}");
}

#[test]
fn merging_sentences_takes_time_in_proportion() {
    let tokenizer = Tokenizer::from_gguf(&sentence_header(&PIECES)).unwrap();
    for unit in ["hello", "h", " ", "é", "<tool", "\n"] {
        let text = unit.repeat((1 << 20) / unit.len());
        let started = std::time::Instant::now();
        let ids = tokenizer.encode(&text, false).unwrap();
        let took = started.elapsed();
        assert_eq!(tokenizer.decode(&ids), text);
        assert!(took < std::time::Duration::from_secs(10), "{unit:?} took {took:?}");
    }
}

const SENTENCE_JSON: &str = r#"{"version":"1.0","added_tokens":[
        {"id":0,"content":"<unk>","special":true,"single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false},
        {"id":1,"content":"<s>","special":true,"single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false},
        {"id":2,"content":"[INST]","special":true,"single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false}],
    "normalizer":null,
    "pre_tokenizer":{"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":false},
    "decoder":{"type":"Sequence","decoders":[
        {"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},
        {"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
    "model":{"type":"BPE","unk_token":"<unk>","byte_fallback":true,"fuse_unk":true,
        "vocab":{"<unk>":0,"<s>":1,"[INST]":2,"<0x0A>":3,"▁":4,"h":5,"i":6,"▁h":7,"hi":8,
            "<0xC3>":9,"<0xA9>":10},
        "merges":["▁ h","h i"]}}"#;

fn hf(change: impl Fn(&mut HfFiles)) -> Result<ModelText, TextError> {
    let mut files = HfFiles { tokenizer: SENTENCE_JSON.into(), ..HfFiles::default() };
    change(&mut files);
    ModelText::from_hf_generator(&files)
}

#[test]
fn hf_sentence_tokens_are_bytes_and_spaces() {
    let tokenizer = hf(|_| {}).unwrap().tokenizer;
    let ids = tokenizer.encode("hi\né h", false).unwrap();
    assert_eq!(ids, [7, 6, 3, 9, 10, 7]);
    assert_eq!(tokenizer.decode(&ids), "hi\né h");
    assert_eq!(tokenizer.token_bytes(7), b" h");
    assert_eq!(tokenizer.token_bytes(9), [0xC3]);
}

#[test]
fn only_the_first_piece_of_a_prompt_gets_its_space() {
    let text = hf(|files| {
        files.tokenizer_config = Some(json!({
            "bos_token": { "content": "<s>" },
            "chat_template": "{{ bos_token }}[INST]{{ messages[0].content }}" }));
    });
    let text = text.unwrap();
    let message = Message { role: "user".into(), content: "hi".into() };
    let ids = text.template.unwrap().render(&text.tokenizer, &[message]).unwrap();
    assert_eq!(ids, [1, 2, 8]);
    assert_eq!(text.tokenizer.encode("hi", false).unwrap(), [7, 6]);
    assert_eq!(text.tokenizer.encode_prompt("<s>[INST]hi").unwrap(), [1, 2, 8]);
    assert_eq!(text.tokenizer.encode_prompt("hi[INST]hi").unwrap(), [7, 6, 2, 8]);
}

#[test]
fn prompts_of_sentences_may_write_control_tokens_out() {
    let tokenizer = Tokenizer::from_gguf(&sentence_header(&PIECES)).unwrap();
    let he = tokenizer.encode("he", false).unwrap();
    for text in ["<s>he</s>he", "he</s>he"] {
        let ids = tokenizer.encode_prompt(text).unwrap();
        assert_eq!(ids, [&[1][..], &he, &[2], &he].concat(), "{text}");
    }
}

#[test]
fn templates_and_stops_come_from_the_files_that_say_so() {
    let named =
        json!([{ "name": "tool_use", "template": "T" }, { "name": "default", "template": "D" }]);
    let render = |text: ModelText| {
        let template = text.template.unwrap();
        let message = Message { role: "user".into(), content: "h".into() };
        text.tokenizer.decode(&template.render(&text.tokenizer, &[message]).unwrap())
    };
    let listed = hf(|files| {
        let template =
            json!([{ "name": "rag", "template": "i" }, { "name": "default", "template": "hi" }]);
        files.tokenizer_config = Some(json!({ "chat_template": template }));
    });
    assert_eq!(render(listed.unwrap()), "hi");
    let filed = hf(|files| {
        files.tokenizer_config = Some(json!({ "chat_template": named }));
        files.chat_template = Some("{{ messages[0].content }}".into());
    });
    assert_eq!(render(filed.unwrap()), "h");

    let stops = hf(|files| {
        files.generation_config = Some(json!({ "eos_token_id": [5, 6] }));
        files.config = Some(json!({ "eos_token_id": 5 }));
        files.tokenizer_config = Some(json!({ "eos_token": "[INST]" }));
    });
    assert_eq!(*stops.unwrap().stop_tokens, [2, 5, 6]);
    assert!(hf(|_| {}).unwrap().template.is_none());
    for (config, part) in [
        (json!({ "eos_token_id": 11 }), "eos_token_id 11"),
        (json!({ "eos_token_id": [1, "2"] }), "\"2\""),
        (json!({ "eos_token_id": -1 }), "-1"),
    ] {
        let refused = hf(|files| files.generation_config = Some(config.clone()));
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("generation_config.json"), "{error}");
    }
    for template in [json!(1), json!([{ "name": "other", "template": "x" }]), json!([])] {
        let config = json!({ "chat_template": template });
        assert!(hf(|files| files.tokenizer_config = Some(config.clone())).is_err());
    }
}
