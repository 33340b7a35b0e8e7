//! Encoding with a GGUF vocabulary and with a `tokenizer.json`.

use std::time::{Duration, Instant};

use super::*;

/// The pieces of `text`: each token's text.
fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, false).unwrap();
    assert!(ids.iter().all(|id| !tokenizer.controls.contains(*id)));
    ids.iter().map(|id| tokenizer.decode(&[*id])).collect()
}

#[test]
fn merges_by_rank() {
    let tokenizer = tokenizer("gpt-2");
    assert_eq!(pieces(&tokenizer, "hello hell"), ["hello", " ", "hell"]);
    assert_eq!(pieces(&tokenizer, "hellll w"), ["hell", "ll", " w"]);
    assert_eq!(pieces(&tokenizer, ""), [""; 0]);
    assert_eq!(tokenizer.vocab_size(), 256 + 6 + 2 + 6);
    assert_eq!(tokenizer.token_bytes(262), b"<think>");
    assert_eq!(tokenizer.token_bytes(264), b"");
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
    assert_eq!(format!("{tokenizer:?}"), "Tokenizer { tokens: 270, .. }");
}

/// Against merging by looking for the best pair again and again.
#[test]
fn merging_is_what_its_definition_says() {
    let text = header("gpt-2");
    let alphabet: Vec<String> = "abc".chars().map(String::from).collect();
    let mut random = Random(7);
    for _ in 0..200 {
        let mut tokens = alphabet.clone();
        let mut merges: Vec<(String, String)> = Vec::new();
        while merges.len() < 12 {
            let pair =
                (tokens[random.below(tokens.len())].clone(), tokens[random.below(3)].clone());
            let joined = pair.0.clone() + &pair.1;
            if merges.contains(&pair) || tokens.contains(&joined) {
                continue;
            }
            tokens.push(joined);
            merges.push(pair);
        }
        let strings =
            |texts: &[String]| Value::Array(texts.iter().cloned().map(Value::String).collect());
        let mut header = text.clone();
        header.metadata.remove("tokenizer.ggml.token_type");
        header.metadata.insert("tokenizer.ggml.tokens".into(), strings(&tokens));
        let written: Vec<_> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
        header.metadata.insert("tokenizer.ggml.merges".into(), strings(&written));
        let tokenizer = Tokenizer::from_gguf(&header).unwrap();

        let word: String = (0..random.below(30)).map(|_| random.pick(&['a', 'b', 'c'])).collect();
        let mut symbols: Vec<String> = word.chars().map(String::from).collect();
        let rank =
            |pair: &[String]| merges.iter().position(|(a, b)| [a, b] == [&pair[0], &pair[1]]);
        while let Some((_, at)) =
            symbols.windows(2).enumerate().filter_map(|(at, pair)| Some((rank(pair)?, at))).min()
        {
            let right = symbols.remove(at + 1);
            symbols[at] += &right;
        }
        assert_eq!(pieces(&tokenizer, &word), symbols, "{merges:?}");
    }
}

#[test]
fn the_pretokenizer_is_known_or_named() {
    for pre in ["default-2", "mpt-9", ""] {
        let error = Tokenizer::from_gguf(&header(pre)).unwrap_err().to_string();
        assert!(error.contains(&format!("{pre:?}")), "{error}");
    }
    let mut other = header("gpt-2");
    let model = Value::String("t5".into());
    other.metadata.insert("tokenizer.ggml.model".into(), model);
    assert!(Tokenizer::from_gguf(&other).unwrap_err().to_string().contains("\"t5\""));
}

#[test]
fn contradictions_are_refused() {
    let refusal = |key: &str, value: Value| {
        let mut header = header("gpt-2");
        header.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        Tokenizer::from_gguf(&header).unwrap_err().to_string()
    };
    let strings = |texts: &[&str]| {
        Value::Array(texts.iter().map(|text| Value::String((*text).to_owned())).collect())
    };
    assert!(refusal("merges", strings(&["h e", "zz q"])).contains("\"zz\""));
    assert!(refusal("merges", strings(&["he"])).contains("not a pair"));
    assert!(refusal("merges", strings(&["o o"])).contains("\"oo\""));
    // A merge cannot reach a control token.
    assert!(refusal("merges", strings(&["# #"])).contains("no such token"));
    assert!(refusal("token_type", Value::Array(vec![Value::Int(1)])).contains("270"));
    assert!(refusal("tokens", strings(&["a"; 270])).contains("twice"));

    let mut header = header("gpt-2");
    header.metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(true));
    header.metadata.insert("tokenizer.ggml.bos_token_id".into(), Value::Uint(270));
    assert!(Tokenizer::from_gguf(&header).unwrap_err().to_string().contains("270 of 270"));
    assert!(ModelText::from_gguf(&header).is_err());
}

/// A vocabulary from a stranger is refused or used, without a panic.
#[test]
fn nonsense_vocabularies_do_no_harm() {
    let parts = ["", " ", "a", "b", "ab", "a b", "é", "Ġ", "<|x|>", "\u{0}", "<"];
    let mut random = Random(13);
    let mut used = 0;
    for _ in 0..5_000 {
        let mut strings = |limit: usize| {
            let texts = (0..random.below(limit)).map(|_| random.pick(&parts).to_owned());
            Value::Array(texts.map(Value::String).collect())
        };
        let (tokens, merges) = (strings(5), strings(3));
        let Value::Array(texts) = &tokens else { unreachable!() };
        let types = texts.iter().map(|_| Value::Int(random.below(9) as i64 - 1)).collect();
        let mut header = header(random.pick(&["gpt-2", "smollm", "llama-bpe", "qwen2"]));
        for (key, value) in [
            ("tokens", tokens),
            ("merges", merges),
            ("token_type", Value::Array(types)),
            ("add_bos_token", Value::Bool(random.below(2) == 0)),
            ("bos_token_id", Value::Uint(random.below(4) as u64)),
            ("eos_token_id", Value::Uint(random.below(4) as u64)),
        ] {
            header.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        }
        let template = Value::String("{{ bos_token }}{{ messages[0].content }}".to_owned());
        header.metadata.insert("tokenizer.chat_template".to_owned(), template);
        let Ok(text) = ModelText::from_gguf(&header) else { continue };
        used += 1;
        let content: String = (0..6).map(|_| random.pick(&parts)).collect();
        let ids = text.tokenizer.encode(&content, true).unwrap();
        assert!(ids.iter().all(|id| (*id as usize) < text.tokenizer.vocab_size()));
        let message = Message { role: "user".to_owned(), content };
        let _ = text.template.unwrap().render(&text.tokenizer, &[message]);
    }
    assert!(used > 100, "{used}");
}

#[test]
fn plain_text_never_yields_control_tokens() {
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let tokenizer = tokenizer(pre);
        for text in CONTROLS {
            if text.len() > 1 {
                assert_eq!(pieces(&tokenizer, text).concat(), text);
            }
        }
        // The single byte is a token of its own kind; as a control token it stays out of reach.
        assert!(pieces(&tokenizer, "<|im_start|>system<|im_end|>").len() > 8);
        assert_eq!(pieces(&tokenizer, "a<think>b"), ["a", "<think>", "b"]);
    }
}

#[test]
fn wrapping_follows_the_file() {
    let ids =
        |header: &Header, wrap| Tokenizer::from_gguf(header).unwrap().encode("w", wrap).unwrap();
    let w = u32::from(b'w');
    let [begin, end] = [265, 266];
    assert_eq!(ids(&header("gpt-2"), true), [w]);
    assert_eq!(ids(&header("llama-bpe"), true), [begin, w]);
    assert_eq!(ids(&header("llama-bpe"), false), [w]);
    let mut asked = header("qwen2");
    asked.metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(true));
    asked.metadata.insert("tokenizer.ggml.add_eos_token".into(), Value::Bool(true));
    assert_eq!(ids(&asked, true), [begin, w, end]);
    let mut declined = header("llama-bpe");
    declined.metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(false));
    assert_eq!(ids(&declined, true), [w]);
}

#[test]
fn stop_tokens_are_those_named_by_key_or_text() {
    let mut header = header("gpt-2");
    header.metadata.insert("tokenizer.ggml.eom_token_id".into(), Value::Uint(268));
    let text = ModelText::from_gguf(&header).unwrap();
    assert_eq!(*text.stop_tokens, [264, 266, 268]);
    assert!(text.template.is_none());
}

/// Long text, long words, and runs that make look-ahead or pairwise merging quadratic.
#[test]
fn time_is_linear_in_the_text() {
    let megabyte = 1 << 20;
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let tokenizer = tokenizer(pre);
        for unit in
            ["hell", "h", " ", "\n", " \n", "1", "<|im_", "hello w 12.\n", "é", "'", "<think"]
        {
            let text = unit.repeat(megabyte / unit.len()) + "x";
            let start = Instant::now();
            let ids = tokenizer.encode(&text, false).unwrap();
            let took = start.elapsed();
            assert_eq!(tokenizer.decode(&ids), text);
            assert!(took < Duration::from_secs(10), "{pre} {unit:?} took {took:?}");
        }
    }
}

#[test]
fn many_threads_may_encode() {
    let tokenizer = tokenizer("smollm");
    let text = "hello 42 worlds\n\n  <think> it's".repeat(50);
    let expected = tokenizer.encode(&text, false).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(tokenizer.encode(&text, false).unwrap(), expected);
                }
            });
        }
    });
}

const WORD_PIECE: &str = r###"{"version":"1.0",
    "truncation":{"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":0},
    "padding":{"strategy":{"Fixed":128},"direction":"Right","pad_to_multiple_of":null,
        "pad_id":0,"pad_type_id":0,"pad_token":"[PAD]"},
    "added_tokens":[
        {"id":0,"content":"[PAD]","special":true,"single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false},
        {"id":1,"content":"[UNK]","special":true,"single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false},
        {"id":2,"content":"[CLS]","special":true,"single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false},
        {"id":3,"content":"[SEP]","special":true,"single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false}],
    "normalizer":{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,
        "strip_accents":null,"lowercase":true},
    "pre_tokenizer":{"type":"PRE"},
    "post_processor":{"type":"TemplateProcessing",
        "single":[{"SpecialToken":{"id":"[CLS]","type_id":0}},{"Sequence":{"id":"A","type_id":0}},
            {"SpecialToken":{"id":"[SEP]","type_id":0}}],
        "pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
        "special_tokens":{"[CLS]":{"id":"[CLS]","ids":[2],"tokens":["[CLS]"]},
            "[SEP]":{"id":"[SEP]","ids":[3],"tokens":["[SEP]"]}}},
    "decoder":{"type":"WordPiece","prefix":"##","cleanup":true},
    "model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##",
        "max_input_chars_per_word":100,
        "vocab":{"[PAD]":0,"[UNK]":1,"[CLS]":2,"[SEP]":3,
            "[":4,"]":5,"cls":6,"word":7,"##s":8}}}"###;

#[test]
fn hf_limits_and_padding_are_off() {
    let json = WORD_PIECE.replace("PRE", "BertPreTokenizer");
    let text = ModelText::from_hf(json.as_bytes()).unwrap();
    assert!(text.template.is_none() && text.stop_tokens.is_empty());
    let ids = text.tokenizer.encode("Words word word word wörd ☃", true).unwrap();
    assert_eq!(ids, [2, 7, 8, 7, 7, 7, 7, 1, 3]);
    assert_eq!(text.tokenizer.vocab_size(), 9);
}

#[test]
fn hf_look_alikes_are_plain_or_refused() {
    let encode = |pre: &str, text: &str| {
        let json = WORD_PIECE.replace("PRE", pre);
        Tokenizer::from_hf_json(json.as_bytes()).unwrap().encode(text, true)
    };
    assert_eq!(encode("BertPreTokenizer", "[CLS] word").unwrap(), [2, 4, 6, 5, 7, 3]);
    // Lower-cased, it is no control token; whole words that are one cannot be written otherwise.
    assert_eq!(encode("WhitespaceSplit", "[CLS] word").unwrap(), [2, 1, 7, 3]);
    let json = WORD_PIECE
        .replace("PRE", "WhitespaceSplit")
        .replace("\"lowercase\":true", "\"lowercase\":false");
    let tokenizer = Tokenizer::from_hf_json(json.as_bytes()).unwrap();
    let error = tokenizer.encode("word [CLS]", true).unwrap_err();
    assert_eq!(error.kind(), crate::error::ErrorKind::InvalidRequest);
    assert_eq!(tokenizer.encode("word [ UNKNOWN", true).unwrap(), [2, 7, 4, 1, 3]);
}

#[test]
fn prompts_may_write_control_tokens_out() {
    let tokenizer = tokenizer("gpt-2");
    let (begin, end) = (tokenizer.control("<|im_start|>"), tokenizer.control("<|im_end|>"));
    let (begin, end) = (begin.unwrap(), end.unwrap());
    let hello = tokenizer.encode("hello", false).unwrap();
    let ids = tokenizer.encode_prompt("<|im_start|>hello<|im_end|>hello").unwrap();
    assert_eq!(ids, [&[begin][..], &hello, &[end], &hello].concat());
    assert_eq!(tokenizer.encode_prompt("hello").unwrap(), tokenizer.encode("hello", true).unwrap());

    let json = WORD_PIECE.replace("PRE", "BertPreTokenizer");
    let tokenizer = Tokenizer::from_hf_json(json.as_bytes()).unwrap();
    let prompt = |text: &str| tokenizer.encode_prompt(text).unwrap();
    assert_eq!(prompt("word[SEP]words"), [2, 7, 3, 7, 8, 3]);
    assert_eq!(prompt("[CLS]word"), [2, 7, 3], "it begins only once");
    assert_eq!(prompt("[PAD]"), [2, 0, 3]);
    // Unknown words are no control token.
    assert_eq!(prompt("[SEP][UNK]"), [2, 3, 4, 1, 5, 3]);
}

#[test]
fn hf_files_that_contradict_themselves_are_refused() {
    for json in ["", "{}", "[1]", "{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}x"] {
        assert!(Tokenizer::from_hf_json(json.as_bytes()).is_err(), "{json}");
    }
    let bpe = r#"{"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":["a b"]}}"#;
    assert!(Tokenizer::from_hf_json(bpe.as_bytes()).is_err());
    let sparse = r#"{"model":{"type":"WordLevel","vocab":{"a":4000000000},"unk_token":"a"}}"#;
    let error = Tokenizer::from_hf_json(sparse.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("4000000000"), "{error}");
    let suffix = WORD_PIECE.replace("PRE", "BertPreTokenizer").replace("[3]", "[9]");
    let error = Tokenizer::from_hf_json(suffix.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("token 9") && error.contains("its 9"), "{error}");
    let second = r#""pair":[{"SpecialToken":{"id":"[SEP]","type_id":0}},"#;
    let pair = suffix.replace("\"pair\":[", second).replacen(
        r#"{"SpecialToken":{"id":"[SEP]","type_id":0}}],"#,
        r#"{"SpecialToken":{"id":"[CLS]","type_id":0}}],"#,
        1,
    );
    let error = Tokenizer::from_hf_json(pair.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("token 9"), "{error}");
}
