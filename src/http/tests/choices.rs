//! Several choices, log-probabilities, echoes, and what all of it is booked as.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::{App, post};
use crate::admission::testing::{done, metric, outcomes, prompt};
use crate::request::{Detail, Event, Finish, Generate, Logprobs, Submission, Task};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(extra: Value) -> String {
    with(json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}), extra)
}

fn text(extra: Value) -> String {
    with(json!({"model": "tiny", "prompt": "abc"}), extra)
}

fn with(mut body: Value, extra: Value) -> String {
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

fn generation(submission: &Submission) -> Generate {
    match &submission.request.task {
        Task::Generate(generate) => generate.clone(),
        Task::Encode(_) => panic!("not a generation"),
    }
}

/// An engine that says a choice's number after its prompt was found in the cache but for a token.
fn counting() -> App {
    App::scripted(|submission| {
        let Generate { prompt, sampling, .. } = generation(&submission);
        let cached_tokens = if sampling.choice == 0 { 0 } else { prompt.len() as u32 - 1 };
        submission.sink.send(Event::Started { cached_tokens });
        let number = b'a' + sampling.choice as u8;
        (0..=sampling.choice).for_each(|_| submission.sink.send(Event::Token(number.into())));
        let usage = crate::request::Usage {
            prompt_tokens: prompt.len() as u32,
            cached_tokens,
            generated_tokens: sampling.choice + 1,
        };
        submission.sink.send(Event::Done { finish: Finish::Stop, usage });
    })
}

/// An engine that scores the bytes of `answer`, each with the two bytes after it as the likeliest
/// and the end of text as the third.
fn scoring(answer: &'static str) -> App {
    App::scripted(move |Submission { sink, .. }| {
        sink.send(Event::Started { cached_tokens: 2 });
        for byte in answer.bytes() {
            let token = u32::from(byte);
            let top = vec![(token + 1, -0.5), (token + 2, -1.5), (256, -9999.0)];
            let logprobs = Box::new(Logprobs { chosen: -2.5, top });
            sink.send(Event::Scored { token, logprobs });
        }
        done(&sink, Finish::Stop, 18, answer.len() as u32);
    })
}

fn chunks(body: &str) -> Vec<Value> {
    let data = body.lines().filter_map(|line| line.strip_prefix("data: {"));
    data.map(|data| serde_json::from_str(&format!("{{{data}")).unwrap()).collect()
}

#[tokio::test]
async fn choices_come_in_order_and_their_prompt_counts_once() {
    let app = counting();
    let reply = app.post(TEXT, text(json!({"prompt": ["abc", "de"], "n": 3, "best_of": 3}))).await;
    let reply = reply.json();
    let choices = reply["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices.iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["a", "bb", "ccc", "a", "bb", "ccc"]);
    assert!(choices.iter().enumerate().all(|(index, choice)| choice["index"] == index));
    assert_eq!(reply["usage"]["prompt_tokens"], 5);
    assert_eq!(reply["usage"]["completion_tokens"], 12);
    assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let streamed = app.post(CHAT, chat(json!({"n": 2, "stream": true}))).await;
    let mut texts = [String::new(), String::new()];
    let mut ends = [0, 0];
    for chunk in chunks(&streamed.body) {
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice["delta"]["content"].as_str().unwrap_or("");
        ends[index] += usize::from(choice["finish_reason"] == "stop");
    }
    assert_eq!((texts, ends), (["a".into(), "bb".into()], [1, 1]));
    assert_eq!(outcomes(&app.front, "tiny", "generate", "ok"), 2.0);
}

#[tokio::test]
async fn a_client_that_leaves_cancels_every_choice_and_pays_for_what_it_got() {
    let sinks = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&sinks);
    let app = App::scripted(move |submission| {
        submission.sink.send(Event::Started { cached_tokens: 3 });
        submission.sink.send(Event::Token(65));
        kept.lock().unwrap().push(submission.sink);
    });
    for (round, extra) in [json!({"n": 3}), json!({"n": 3, "stream": true})].iter().enumerate() {
        let asked = app.send(post(TEXT, text(extra.clone())));
        let left = tokio::time::timeout(std::time::Duration::from_millis(200), asked).await;
        assert!(left.is_err(), "it was still waiting for more");
        assert_eq!(sinks.lock().unwrap().len(), 3 * (round + 1));
        assert!(sinks.lock().unwrap().iter().all(|sink| sink.is_cancelled()));
        let rounds = round as f64 + 1.0;
        assert_eq!(outcomes(&app.front, "tiny", "generate", "cancelled"), rounds);
        let tokens = |family: &str| metric(&app.front, family, &[("model", "tiny")]);
        assert_eq!(tokens("sconce_generated_tokens_total"), 3.0 * rounds);
        assert_eq!(tokens("sconce_prompt_tokens_total"), 3.0 * rounds);
        assert_eq!(tokens("sconce_prompt_tokens_cached_total"), 3.0 * rounds);
    }
}

#[tokio::test]
async fn usage_is_right_after_a_stop_string() {
    let app = App::scripted(|Submission { sink, .. }| {
        sink.send(Event::Started { cached_tokens: 2 });
        b"one END two".iter().for_each(|&byte| sink.send(Event::Token(byte.into())));
        // The engine does not hear of it at once, and never says `Done`.
        tokio::spawn(async move {
            while !sink.is_cancelled() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        });
    });
    let reply = app.post(TEXT, text(json!({"stop": "END"}))).await.json();
    assert_eq!(reply["choices"][0]["text"], "one ");
    let usage = &reply["usage"];
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 2, "{usage}");
    assert_eq!(usage["prompt_tokens"], 3);
    assert_eq!(usage["completion_tokens"], 7, "up to the token that ends the stop string");
}

#[tokio::test]
async fn what_never_came_to_the_device_costs_no_prompt() {
    let app = App::scripted(|Submission { sink, .. }| {
        let error = crate::error::Error::new(crate::error::ErrorKind::StepFailed, "failed");
        sink.send(Event::Failed(error));
    });
    assert_eq!(app.post(TEXT, text(json!({}))).await.status, 500);
    assert_eq!(metric(&app.front, "sconce_prompt_tokens_total", &[("model", "tiny")]), 0.0);
}

#[tokio::test]
async fn chat_logprobs_name_tokens_and_their_bytes() {
    let app = scoring("ké");
    let body = json!({"logprobs": true, "top_logprobs": 3});
    let reply = app.post(CHAT, chat(body.clone())).await.json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], "ké");
    assert_eq!(choice["logprobs"]["refusal"], Value::Null);
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 3);
    assert_eq!(
        content[0],
        json!({"token": "k", "logprob": -2.5, "bytes": [107], "top_logprobs": [
            {"token": "l", "logprob": -0.5, "bytes": [108]},
            {"token": "m", "logprob": -1.5, "bytes": [109]},
            {"token": "<|end|>", "logprob": -9999.0, "bytes": null},
        ]})
    );
    assert_eq!((&content[1]["token"], &content[1]["bytes"]), (&json!("\\xc3"), &json!([0xc3])));
    assert_eq!((&content[2]["token"], &content[2]["bytes"]), (&json!("\\xa9"), &json!([0xa9])));
    let off = app.post(CHAT, chat(json!({"logprobs": false}))).await.json();
    assert_eq!(off["choices"][0]["logprobs"], Value::Null);
    // Streamed, both bytes of the character come with it.
    let mut streamed = body;
    streamed["stream"] = true.into();
    let reply = app.post(CHAT, chat(streamed)).await;
    let mut seen = Vec::new();
    for chunk in chunks(&reply.body) {
        let choice = &chunk["choices"][0];
        if let Some(tokens) = choice["logprobs"]["content"].as_array() {
            seen.push((choice["delta"]["content"].clone(), tokens.len()));
            assert_eq!(tokens[0]["top_logprobs"].as_array().unwrap().len(), 3);
        }
    }
    assert_eq!(seen, [(json!("k"), 1), (json!("é"), 2)]);
}

#[tokio::test]
async fn completions_logprobs_are_columns() {
    let app = scoring("aé\u{301}b");
    let reply = app.post(TEXT, text(json!({"logprobs": 3}))).await.json();
    let logprobs = &reply["choices"][0]["logprobs"];
    let expected = ["a", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xcc", "bytes:\\x81", "b"];
    assert_eq!(logprobs["tokens"], json!(expected));
    assert_eq!(logprobs["token_logprobs"], json!([-2.5, -2.5, -2.5, -2.5, -2.5, -2.5]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 1, 2, 2, 3]), "characters");
    assert_eq!(
        logprobs["top_logprobs"][0],
        json!({"b": -0.5, "c": -1.5, "<|end|>": -9999.0, "a": -2.5}),
        "the chosen token is among them"
    );
    let body = json!({"logprobs": 0, "stream": true});
    let reply = app.post(TEXT, text(body)).await;
    let offsets: Vec<Value> = chunks(&reply.body)
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"].as_object().cloned())
        .flat_map(|logprobs| logprobs["text_offset"].as_array().unwrap().clone())
        .collect();
    assert_eq!(offsets, [0, 1, 1, 2, 2, 3].map(Value::from));
}

#[tokio::test]
async fn tokens_of_a_stop_string_are_not_listed() {
    let app = scoring("ab<END>c");
    for stream in [false, true] {
        let body = json!({"logprobs": 1, "stop": "<END>", "stream": stream});
        let reply = app.post(TEXT, text(body)).await;
        let all = if stream { chunks(&reply.body) } else { vec![reply.json()] };
        let tokens: Vec<Value> = all
            .iter()
            .filter_map(|part| part["choices"][0]["logprobs"]["tokens"].as_array())
            .flatten()
            .cloned()
            .collect();
        assert_eq!(tokens, ["a", "b"].map(Value::from));
    }
}

#[tokio::test]
async fn an_echo_goes_before_each_answer() {
    let app = counting();
    let body = json!({"prompt": ["é ", "xy"], "n": 2, "echo": true});
    let reply = app.post(TEXT, text(body.clone())).await.json();
    let choices = reply["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices.iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["é a", "é bb", "xya", "xybb"]);
    let tokens = json!({"prompt": [104, 105], "echo": true, "stream": true, "stop": "hi"});
    let reply = app.post(TEXT, text(tokens)).await;
    let first = &chunks(&reply.body)[0];
    assert_eq!(first["choices"][0]["text"], "hia", "and stop strings are not looked for in it");
}

#[tokio::test]
async fn what_is_asked_in_detail_reaches_the_engine() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let slot = Arc::clone(&seen);
    let app = App::scripted(move |submission| {
        slot.lock().unwrap().push(generation(&submission));
        done(&submission.sink, Finish::Stop, 1, 0);
    });
    let given = json!({
        "n": 2, "seed": 5, "logprobs": true, "top_logprobs": 4, "repetition_penalty": 1.5,
        "frequency_penalty": -0.5, "presence_penalty": 2,
        "logit_bias": {"65": -100, "7": 2.5, "8": 0},
        "chat_template_kwargs": {"enable_thinking": false},
    });
    assert_eq!(app.post(CHAT, chat(given)).await.status, 200);
    {
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 2);
        assert!(Arc::ptr_eq(&seen[0].prompt, &seen[1].prompt), "one prompt for both");
        let choices: Vec<u32> = seen.iter().map(|task| task.sampling.choice).collect();
        assert_eq!((choices, seen[1].sampling.seed), (vec![0, 1], 5));
        let Detail { adjustment: Some(adjustment), logprobs: Some(4) } = &seen[1].detail else {
            panic!("{:?}", seen[1].detail)
        };
        assert_eq!(adjustment.bias, [(7, 2.5), (65, -100.0)]);
        let penalties = (adjustment.repetition, adjustment.frequency, adjustment.presence);
        assert_eq!(penalties, (1.5, -0.5, 2.0));
    }
    let neutral = json!({
        "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": -0.0,
        "logit_bias": {"65": 0}, "logprobs": false, "top_logprobs": 0,
    });
    assert_eq!(app.post(CHAT, chat(neutral)).await.status, 200);
    assert!(seen.lock().unwrap()[2].detail.is_empty());
    let whole = app.post(TEXT, text(json!({"logprobs": 0}))).await;
    assert_eq!(whole.json()["choices"][0]["logprobs"]["tokens"], json!([]));
    assert_eq!(seen.lock().unwrap()[3].detail.logprobs, Some(0));
}

#[tokio::test]
async fn a_template_is_told_of_switches() {
    let app = App::scripted(|submission| {
        let prompt = prompt(&submission);
        assert!(prompt.ends_with("assistant:<think>"), "{prompt:?}");
        done(&submission.sink, Finish::Stop, 1, 0);
    });
    let body = json!({"chat_template_kwargs": {"enable_thinking": true}});
    assert_eq!(app.post(CHAT, chat(body)).await.status, 200);
}
