//! Token ids against llama.cpp's and sentence-transformers', prompts against transformers'.

use std::io::Read;
use std::time::{Duration, Instant};

use sconce::request::TokenId;
use sconce::store::gguf::{self, Header, Value};
use sconce::text::{ChatTemplate, Message, ModelText, Tokenizer};

use crate::fixtures::{golden, golden_json, model_file};

type Json = serde_json::Value;

fn smollm2() -> ModelText {
    let header = gguf::read(&model_file("smollm2-135m-instruct", "model.gguf")).unwrap();
    ModelText::from_gguf(&header).unwrap()
}

fn packed_json(file: &str) -> Json {
    let file = std::fs::File::open(golden(file)).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The GGUF metadata that a packed vocabulary stands for.
fn vocabulary(name: &str) -> Header {
    let json = packed_json(&format!("vocab_{name}.json.gz"));
    let tokens: Vec<&str> =
        json["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    let mut merges = Vec::new();
    let mut result = 0;
    for pair in json["merges_packed"].as_array().unwrap().chunks(2) {
        result += pair[0].as_i64().unwrap();
        let token: Vec<char> = tokens[result as usize].chars().collect();
        let (left, right) = token.split_at(pair[1].as_u64().unwrap() as usize);
        let text: String = left.iter().chain(&[' ']).chain(right).collect();
        merges.push(Value::String(text));
    }
    let types = json["token_type_runs"].as_array().unwrap().iter().flat_map(|run| {
        vec![Value::Int(run[0].as_i64().unwrap()); run[1].as_u64().unwrap() as usize]
    });
    let mut header = Header::default();
    let mut set = |key: &str, value| header.metadata.insert(format!("tokenizer.ggml.{key}"), value);
    for key in ["model", "pre"] {
        set(key, Value::String(json[key].as_str().unwrap().to_owned()));
    }
    for key in ["bos_token_id", "eos_token_id"] {
        json[key].as_u64().map(|id| set(key, Value::Uint(id)));
    }
    for key in ["add_bos_token", "add_eos_token"] {
        json[key].as_bool().map(|flag| set(key, Value::Bool(flag)));
    }
    if let Some(runs) = json["score_runs"].as_array() {
        let scores = runs.iter().flat_map(|run| {
            let [first, step] = [0, 1].map(|at| run[at].as_f64().unwrap());
            (0..run[2].as_u64().unwrap()).map(move |i| Value::Float(first + step * i as f64))
        });
        set("scores", Value::Array(scores.collect()));
    }
    set("token_type", Value::Array(types.collect()));
    set("merges", Value::Array(merges));
    set("tokens", Value::Array(tokens.iter().map(|text| Value::String((*text).into())).collect()));
    header
}

fn ids(json: &Json) -> Vec<TokenId> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
}

/// Every case: its text to `ids`, and, written in a template, to `ids_special`. The number of
/// cases.
fn check_cases(tokenizer: &Tokenizer, file: &str) -> usize {
    let json = golden_json(file);
    let renamed: Vec<&str> = json["control_by_name"]
        .as_array()
        .map(|names| names.iter().filter_map(|name| name[1].as_str()).collect())
        .unwrap_or_default();
    let cases = json["cases"].as_array().unwrap();
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let plain = tokenizer.encode(text, false).unwrap();
        assert_eq!(plain, ids(&case["ids"]), "{file}: {text:?}");
        assert_eq!(tokenizer.decode(&plain), text, "{file}");
        if text.is_empty() || renamed.iter().any(|name| text.contains(name)) {
            continue;
        }
        let source = format!("{{{{ {} }}}}", serde_json::to_string(text).unwrap());
        let template = ChatTemplate::new(&source, "", "").unwrap();
        let special = template.render(tokenizer, &[]).unwrap();
        assert_eq!(special, ids(&case["ids_special"]), "{file}: {text:?}");
    }
    cases.len()
}

fn check_vocabulary(name: &str) {
    let mut header = vocabulary(name);
    header.metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(false));
    let tokenizer = Tokenizer::from_gguf(&header).unwrap();
    assert!(check_cases(&tokenizer, &format!("vocab_{name}_cases.json")) > 200);
}

#[test]
fn gpt_2_tokens() {
    check_vocabulary("gpt_2");
}

#[test]
fn llama_bpe_tokens() {
    check_vocabulary("llama_bpe");
    let wrapped = Tokenizer::from_gguf(&vocabulary("llama_bpe")).unwrap();
    assert_eq!(wrapped.encode("Hello", true).unwrap(), [128_000, 9906]);
}

#[test]
fn qwen2_tokens() {
    check_vocabulary("qwen2");
}

#[test]
fn llama_sentence_tokens() {
    check_vocabulary("llama_spm");
    let wrapped = Tokenizer::from_gguf(&vocabulary("llama_spm")).unwrap();
    assert_eq!(wrapped.encode("Hello", true).unwrap(), [1, 15043]);
}

/// Every known pre-tokenizer by its own name, with Llama 3's tokens and merges.
#[test]
fn every_pretokenizer_cuts_as_the_reference_does() {
    let golden = packed_json("pre_cases.json.gz");
    let texts = golden["texts"].as_array().unwrap();
    assert!(texts.len() > 250);
    let names = golden["ids"].as_object().unwrap();
    assert!(names.len() >= 14);
    let mut header = vocabulary("llama_bpe");
    for (name, expected) in names {
        header.metadata.insert("tokenizer.ggml.pre".into(), Value::String(name.clone()));
        let tokenizer = Tokenizer::from_gguf(&header).unwrap();
        for (text, expected) in texts.iter().zip(expected.as_array().unwrap()) {
            let text = text.as_str().unwrap();
            let ours = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ours), text, "{name}");
            // Its patterns count the ideographic space among the punctuation, and so do we; the
            // reference's regex library does not.
            if name.starts_with("deepseek") && text.contains(['\u{a0}', '\u{3000}']) {
                continue;
            }
            assert_eq!(ours, ids(expected), "{name}: {text:?}");
        }
    }
}

/// All vocabularies that llama.cpp publishes with vectors, where its source tree is at hand: they
/// are too large to keep here.
#[test]
fn published_vocabularies() {
    let Ok(folder) = std::env::var("LLAMA_CPP_VOCABULARIES") else { return };
    let mut checked = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let beside = |ending: &str| format!("{}.{ending}", path.display());
        if path.extension().is_none_or(|ending| ending != "gguf") {
            continue;
        }
        let Ok(inputs) = std::fs::read_to_string(beside("inp")) else { continue };
        let outputs = std::fs::read_to_string(beside("out")).unwrap();
        let mut header = gguf::read(&path).unwrap();
        header.metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(false));
        let tokenizer = match Tokenizer::from_gguf(&header) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                println!("{}: {error}", path.display());
                continue;
            }
        };
        let texts = inputs.split("\n__ggml_vocab_test__\n");
        let (mut same, mut all) = (0, 0);
        for (text, line) in texts.zip(outputs.lines()) {
            let expected: Vec<TokenId> =
                line.split_whitespace().map(|id| id.parse().unwrap()).collect();
            let ours = tokenizer.encode(text, false).unwrap();
            if ours != expected {
                println!("{}: {text:?} is {expected:?}, not {ours:?}", path.display());
            }
            same += usize::from(ours == expected);
            all += 1;
        }
        println!("{}: {same} of {all}", path.display());
        checked.push((same, all));
    }
    assert!(checked.len() >= 8 && checked.iter().all(|(same, all)| same == all), "{checked:?}");
}

#[test]
fn smollm2_tokens() {
    let text = smollm2();
    assert!(check_cases(&text.tokenizer, "smollm2_tokens.json") >= 200);
    assert_eq!(*text.stop_tokens, [0, 2]);
    assert_eq!(text.tokenizer.vocab_size(), 49_152);
}

/// Decoding token by token gives the text back, whatever it is.
#[test]
fn smollm2_streams() {
    let tokenizer = smollm2().tokenizer;
    for case in golden_json("smollm2_tokens.json")["cases"].as_array().unwrap() {
        let mut stream = tokenizer.stream();
        let mut text: String = ids(&case["ids"]).iter().map(|id| stream.push(*id)).collect();
        text += &stream.finish();
        assert_eq!(text, case["text"].as_str().unwrap());
    }
}

fn messages(json: &Json) -> Vec<Message> {
    let field = |message: &Json, key: &str| message[key].as_str().unwrap().to_owned();
    json.as_array()
        .unwrap()
        .iter()
        .map(|message| Message { role: field(message, "role"), content: field(message, "content") })
        .collect()
}

#[test]
fn smollm2_prompts() {
    let text = smollm2();
    let template = text.template.unwrap();
    let prompts = golden_json("smollm2_next_token.json");
    let prompts = prompts["prompts"].as_array().unwrap();
    for prompt in prompts {
        let tokens = template.render(&text.tokenizer, &messages(&prompt["messages"])).unwrap();
        assert_eq!(tokens, ids(&prompt["prompt_ids"]), "{}", prompt["rendered"]);
    }
    assert!(prompts.len() >= 10);
}

/// What transformers renders, with its control tokens as such, is what we give, unless message
/// content looks like control tokens.
#[test]
fn smollm2_chats() {
    let text = smollm2();
    let template = text.template.unwrap();
    let chats = golden_json("smollm2_chat_template.json");
    let (mut honest, mut hostile) = (0, 0);
    for case in chats["cases"].as_array().unwrap() {
        if case["add_generation_prompt"] == false {
            continue;
        }
        let messages = messages(&case["messages"]);
        let rendered = case["rendered"].as_str().unwrap();
        let tokens = template.render(&text.tokenizer, &messages).unwrap();
        let source = format!("{{{{ {} }}}}", serde_json::to_string(rendered).unwrap());
        let literal = ChatTemplate::new(&source, "", "").unwrap();
        let parsed = literal.render(&text.tokenizer, &[]).unwrap();
        let controls = |tokens: &[TokenId]| tokens.iter().filter(|id| **id <= 16).count();
        if messages.iter().any(|message| message.content.contains("<|")) {
            hostile += 1;
            let framing = 1 + 2 * messages.len() + 2 * usize::from(messages[0].role != "system");
            assert_eq!(controls(&tokens), framing, "{rendered}");
        } else {
            honest += 1;
            assert_eq!(tokens, parsed, "{rendered}");
        }
    }
    assert!(honest >= 10, "{honest} honest, {hostile} hostile");
}

#[test]
fn minilm_tokens() {
    const SEPARATOR: TokenId = 102;
    const LAST_SPECIAL: TokenId = 103;
    let json = std::fs::read(model_file("all-minilm-l6-v2", "tokenizer.json")).unwrap();
    let tokenizer = ModelText::from_hf(&json).unwrap().tokenizer;
    let golden = golden_json("minilm_embeddings.json");
    let limit = golden["max_seq_length"].as_u64().unwrap() as usize;
    for case in golden["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let mut tokens = tokenizer.encode(text, true).unwrap();
        if ["[CLS]", "[SEP]"].iter().any(|name| text.contains(name)) {
            // The reference takes what is written for the control tokens; here it stays text.
            let inner = &tokens[1..tokens.len() - 1];
            assert!(inner.iter().all(|id| *id > LAST_SPECIAL), "{text}: {tokens:?}");
            continue;
        }
        assert_eq!(tokens.len(), case["wordpieces"].as_u64().unwrap() as usize, "{text}");
        if tokens.len() > limit {
            // The reference cuts; here limits are the front's.
            tokens.truncate(limit - 1);
            tokens.push(SEPARATOR);
        }
        assert_eq!(tokens, ids(&case["ids"]), "{text}");
    }
    assert_eq!(tokenizer.vocab_size(), 30_522);
}

/// Real vocabularies on a megabyte of text, and on a megabyte that is one word.
#[test]
fn a_megabyte_is_encoded_in_time() {
    let ModelText { tokenizer: gguf, template, .. } = smollm2();
    let json = std::fs::read(model_file("all-minilm-l6-v2", "tokenizer.json")).unwrap();
    let hf = ModelText::from_hf(&json).unwrap().tokenizer;
    let cases = golden_json("smollm2_tokens.json");
    let texts =
        cases["cases"].as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap());
    let texts = texts.collect::<Vec<_>>().join("\n");
    let prose = texts.repeat((1 << 20) / texts.len() + 1);
    let word = "abracadabra".repeat((1 << 20) / 11);
    for (name, tokenizer) in [("gguf", &gguf), ("hf", &hf)] {
        for (kind, text) in [("prose", &prose), ("word", &word)] {
            let start = Instant::now();
            let tokens = tokenizer.encode(text, true).unwrap();
            let took = start.elapsed();
            println!("{name} {kind}: {} bytes, {} tokens, {took:?}", text.len(), tokens.len());
            assert!(took < Duration::from_secs(5), "{name} {kind} took {took:?}");
            let start = Instant::now();
            let pieces = tokenizer.pieces(text, true).unwrap();
            let took = start.elapsed();
            println!("{name} {kind}: {} pieces, {took:?}", pieces.len());
            assert_eq!(pieces.len(), tokens.len());
            assert!(took < Duration::from_secs(20), "pieces of {name} {kind} took {took:?}");
        }
    }
    let template = template.unwrap();
    for (kind, text) in [("prose", &prose), ("hostile", &"<|im_end|>".repeat(100_000))] {
        let start = Instant::now();
        let message = Message { role: "user".to_owned(), content: text.clone() };
        let tokens = template.render(&gguf, &[message]).unwrap();
        let took = start.elapsed();
        println!("prompt {kind}: {} bytes, {} tokens, {took:?}", text.len(), tokens.len());
        assert!(took < Duration::from_secs(5), "prompt {kind} took {took:?}");
    }
}
