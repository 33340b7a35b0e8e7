//! The API with real models behind it: what clients send and what they get.

use base64::Engine as _;
use serde_json::{Value, json};

use crate::server::{Server, chat, get, post, stream};

/// One server for all checks: a test of its own for each would load the models each time.
#[test]
fn the_api_answers() {
    let server = Server::start(&[]);
    a_greedy_chat_is_the_same_streamed_or_not_and_again_from_the_cache(&server);
    a_seed_fixes_the_text_and_another_changes_it(&server);
    stop_strings_and_limits_end_an_answer(&server);
    a_prompt_may_be_token_ids(&server);
    choices_are_what_each_would_be_alone(&server);
    bias_and_penalties_change_the_text(&server);
    log_probabilities_come_with_the_tokens(&server);
    embeddings_are_the_same_in_every_form(&server);
    mistakes_are_told_with_value_and_limit(&server);
    the_models_are_listed(&server);
    operators_see_settings_and_sizes(&server);
}

const CHAT: &str = "/v1/chat/completions";
const EMBED: &str = "/v1/embeddings";

fn a_greedy_chat_is_the_same_streamed_or_not_and_again_from_the_cache(server: &Server) {
    let url = server.url(CHAT);
    let mut body = chat("Name three colours.", 24);
    let (status, whole) = post(&url, &body);
    assert_eq!(status, 200, "{whole}");
    let content = whole["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(content.contains("Red"), "{content}");
    assert_eq!(whole["object"], "chat.completion");
    let prompt_tokens = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!((33..64).contains(&prompt_tokens), "{prompt_tokens}");

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let events: Vec<String> = stream(&url, &body).collect();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, content);
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 32, "one full block");
}

fn a_seed_fixes_the_text_and_another_changes_it(server: &Server) {
    let url = server.url(CHAT);
    let mut body = chat("Invent a name for a boat.", 32);
    body["temperature"] = json!(1.0);
    let mut say = |seed: u64| {
        body["seed"] = json!(seed);
        let (status, answer) = post(&url, &body);
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let first = say(7);
    assert_eq!(first, say(7));
    assert!((8..12).any(|seed| say(seed) != first));
}

fn stop_strings_and_limits_end_an_answer(server: &Server) {
    let url = server.url("/v1/completions");
    let mut body = json!({
        "model": "smollm2-135m-instruct", "prompt": "One, two, three, four, five,",
        "max_tokens": 24, "temperature": 0, "stop": [" seven"],
    });
    let (status, stopped) = post(&url, &body);
    assert_eq!(status, 200, "{stopped}");
    assert_eq!(stopped["choices"][0]["text"], " six,");
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    body["stop"] = Value::Null;
    body["max_tokens"] = json!(3);
    let (_, cut) = post(&url, &body);
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert_eq!(cut["usage"]["completion_tokens"], 3);
}

fn a_prompt_may_be_token_ids(server: &Server) {
    let url = server.url("/v1/completions");
    let ask = |prompt: Value| {
        let body = json!({"model": "smollm2-135m-instruct", "prompt": prompt, "temperature": 0});
        let (status, answer) = post(&url, &body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    // "Hello world" in this vocabulary.
    let ids = ask(json!([19556, 905]));
    assert_eq!(ids["choices"][0]["text"], ask(json!("Hello world"))["choices"][0]["text"]);
    assert_eq!(ids["usage"]["prompt_tokens"], 2);
    assert_eq!(ids["usage"]["completion_tokens"], 16, "the default of this endpoint");
}

fn choices_are_what_each_would_be_alone(server: &Server) {
    let url = server.url(CHAT);
    let words: Vec<String> = (0..100).map(|number| format!("lamp {number}")).collect();
    let ask = |n: u64, streamed: bool| {
        let mut body = chat(&format!("Tell me about {}.", words.join(", ")), 12);
        body["temperature"] = json!(1.2);
        body["seed"] = json!(11);
        body["n"] = json!(n);
        if streamed {
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
            let mut texts = vec![String::new(); n as usize];
            let mut usage = Value::Null;
            for event in stream(&url, &body).filter(|event| event != "[DONE]") {
                let chunk: Value = serde_json::from_str(&event).unwrap();
                usage = chunk["usage"].clone();
                let Some(choice) = chunk["choices"].get(0) else { continue };
                let index = choice["index"].as_u64().unwrap() as usize;
                texts[index] += choice["delta"]["content"].as_str().unwrap_or("");
            }
            return (texts, usage);
        }
        let (status, answer) = post(&url, &body);
        assert_eq!(status, 200, "{answer}");
        let choices = answer["choices"].as_array().unwrap().iter();
        let texts = choices.map(|c| c["message"]["content"].as_str().unwrap().to_owned());
        (texts.collect::<Vec<_>>(), answer["usage"].clone())
    };
    let rows = || -> f64 {
        let series = |kind| {
            format!("sconce_step_tokens_sum{{model=\"smollm2-135m-instruct\",kind=\"{kind}\"}}")
        };
        ["prefill", "mixed"].map(|kind| server.metric(&series(kind))).iter().sum()
    };
    let before = rows();
    let (four, usage) = ask(4, false);
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    assert!(prompt > 200, "{usage}");
    let cached = &usage["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(cached, 24, "the first computes it, but for the template");
    let computed = rows() - before;
    assert!(computed < 1.5 * prompt as f64, "{computed} prompt rows for {prompt} tokens");
    assert_eq!(ask(1, false).0, four[..1]);
    assert_eq!(ask(2, false).0, four[..2]);
    assert_ne!(four[0], four[1]);
    let (streamed, usage) = ask(4, true);
    assert_eq!(streamed, four);
    assert_eq!(usage["prompt_tokens"], prompt);
}

fn bias_and_penalties_change_the_text(server: &Server) {
    let url = server.url("/v1/completions");
    let ask = |extra: Value| {
        let mut body = json!({
            "model": "smollm2-135m-instruct", "prompt": "One, two, three,", "temperature": 0,
        });
        extra.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
        let (status, answer) = post(&url, &body);
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let plain = ask(json!({}));
    assert!(plain.starts_with(" four,"), "{plain}");
    assert_eq!(ask(json!({"logit_bias": {"19556": 100}, "max_tokens": 3})), "HelloHelloHello");
    let commas = |text: &str| text.matches(',').count();
    let penalised = ask(json!({"frequency_penalty": 2, "max_tokens": 16}));
    assert!(commas(&penalised) < commas(&plain), "{plain:?} {penalised:?}");
    let repeated = ask(json!({"repetition_penalty": 3, "max_tokens": 16}));
    assert!(commas(&repeated) < commas(&plain), "{plain:?} {repeated:?}");
    assert_eq!(ask(json!({"frequency_penalty": 2, "max_tokens": 16})), penalised);
}

fn log_probabilities_come_with_the_tokens(server: &Server) {
    let body = json!({
        "model": "smollm2-135m-instruct", "prompt": "One, two, three,", "temperature": 0,
        "max_tokens": 6, "logprobs": 2, "echo": false,
    });
    let (status, answer) = post(&server.url("/v1/completions"), &body);
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    let logprobs = &choice["logprobs"];
    let tokens: Vec<&str> =
        logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(tokens.len(), 6);
    assert_eq!(tokens.concat(), choice["text"].as_str().unwrap());
    for (index, token) in tokens.iter().enumerate() {
        let own = logprobs["token_logprobs"][index].as_f64().unwrap();
        assert!(own <= 0.0 && logprobs["top_logprobs"][index][token] == own, "{logprobs}");
        let offset = logprobs["text_offset"][index].as_u64().unwrap() as usize;
        assert_eq!(offset, tokens[..index].concat().len());
    }
    let mut body = chat("Say hi.", 4);
    body["logprobs"] = json!(true);
    let (status, answer) = post(&server.url(CHAT), &body);
    assert_eq!(status, 200, "{answer}");
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len() as u64, answer["usage"]["completion_tokens"].as_u64().unwrap());
    assert_eq!(content[0]["top_logprobs"], json!([]));
}

fn embeddings_are_the_same_in_every_form(server: &Server) {
    let url = server.url(EMBED);
    let ask = |input: Value, format: &str| {
        let body = json!({
            "model": "all-minilm-l6-v2", "input": input, "encoding_format": format,
        });
        let (status, answer) = post(&url, &body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let floats = |answer: &Value, index: usize| -> Vec<f32> {
        let values = answer["data"][index]["embedding"].as_array().unwrap();
        values.iter().map(|value| value.as_f64().unwrap() as f32).collect()
    };
    let one = ask(json!("a small lamp"), "float");
    let two = ask(json!(["something else", "a small lamp"]), "float");
    assert_eq!(floats(&one, 0).len(), 384);
    assert_eq!(floats(&one, 0), floats(&two, 1));
    assert_eq!(two["data"][1]["index"], 1);
    let packed = ask(json!("a small lamp"), "base64");
    let packed = packed["data"][0]["embedding"].as_str().unwrap().to_owned();
    let bytes = base64::engine::general_purpose::STANDARD.decode(packed).unwrap();
    let decoded: Vec<f32> =
        bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    assert_eq!(decoded, floats(&one, 0));
}

fn mistakes_are_told_with_value_and_limit(server: &Server) {
    let long = "word ".repeat(9000);
    let model = "smollm2-135m-instruct";
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let mistakes = [
        (CHAT, json!({"model": "smollm", "messages": messages}), 404, "model_not_found"),
        (CHAT, json!({"model": model, "messages": []}), 400, "invalid_request"),
        (CHAT, json!({"model": model}), 400, "invalid_request"),
        (CHAT, json!({"model": model, "messages": messages, "n": 17}), 400, "invalid_request"),
        (CHAT, json!({"model": model, "messages": messages, "best_of": 2}), 400, "unsupported"),
        (
            CHAT,
            json!({"model": model, "messages": messages, "temperature": 3}),
            400,
            "invalid_request",
        ),
        (
            CHAT,
            json!({"model": model, "messages": [{"role": "user", "content": long}]}),
            400,
            "context_length_exceeded",
        ),
        (EMBED, json!({"model": "all-minilm-l6-v2", "input": ""}), 400, "invalid_request"),
        (EMBED, json!({"model": model, "input": "x"}), 400, "invalid_request"),
        (EMBED, json!({"model": "all-minilm-l6-v2", "input": [999_999]}), 400, "invalid_request"),
    ];
    for (path, body, expected, code) in mistakes {
        let (status, answer) = post(&server.url(path), &body);
        let shown: String = body.to_string().chars().take(120).collect();
        assert_eq!(status, expected, "{shown}: {answer}");
        let error = &answer["error"];
        assert_eq!(error["code"], code, "{shown}: {answer}");
        assert!(error["message"].as_str().is_some_and(|text| text.len() > 10), "{answer}");
        assert!(error["type"].is_string());
    }
}

fn the_models_are_listed(server: &Server) {
    let (status, list) = get(&server.url("/v1/models"));
    assert_eq!(status, 200);
    let list: Value = serde_json::from_str(&list).unwrap();
    let names: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["all-minilm-l6-v2", "smollm2-135m-instruct"]);
}

fn operators_see_settings_and_sizes(server: &Server) {
    let ask = |path: &str| -> Value {
        let (status, text) = get(&server.admin_url(path));
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    };
    let config = ask("/config");
    assert_eq!(config["server.port"]["value"], "0", "{config}");
    assert_eq!(config["server.port"]["source"], "flag --port");
    assert_eq!(config["limits.queue_requests"]["source"], "default");
    let ready = ask("/readyz");
    assert_eq!(ready["models"]["smollm2-135m-instruct"]["bytes"], 98_362_432, "{ready}");
    // Weights and warm-up are load time of their model.
    let loaded = "sconce_device_load_seconds_total{model=\"smollm2-135m-instruct\"}";
    assert!(server.metric(loaded) > 0.01);
}
