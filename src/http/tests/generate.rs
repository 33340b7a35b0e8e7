//! Chat and completions: whole answers and streams, byte for byte.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::time::Instant;
use tower::ServiceExt;

use super::{App, Reply};
use crate::admission::testing::{CONTEXT, END, done, outcomes, prompt, say};
use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::request::{Event, Finish, Generate, Submission, Task};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(extra: Value) -> String {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    merge(&mut body, extra);
    body.to_string()
}

fn text(extra: Value) -> String {
    let mut body = json!({"model": "tiny", "prompt": "abc"});
    merge(&mut body, extra);
    body.to_string()
}

fn merge(body: &mut Value, extra: Value) {
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
}

/// An engine that says `answer` and ends with `finish`.
fn saying(answer: &'static str, finish: Finish) -> App {
    App::scripted(move |Submission { sink, .. }| {
        say(&sink, answer);
        done(&sink, finish, 18, answer.len() as u32);
    })
}

/// The body with the id and the time replaced: the rest is exact.
fn masked(reply: &Reply, prefix: &str) -> String {
    let start = reply.body.find(prefix).unwrap_or_else(|| panic!("no id: {}", reply.body));
    let id = &reply.body[start..start + prefix.len() + 32];
    assert!(id[prefix.len()..].chars().all(|c| c.is_ascii_hexdigit()), "{id}");
    let after = &reply.body[reply.body.find("\"created\":").unwrap() + 10..];
    let created: String = after.chars().take_while(char::is_ascii_digit).collect();
    assert!(created.parse::<u64>().unwrap() > 1_700_000_000);
    reply.body.replace(id, "ID").replace(&created, "0")
}

/// What the engine was asked for.
async fn asked(path: &str, body: String) -> Generate {
    let seen = Arc::new(Mutex::new(None));
    let slot = Arc::clone(&seen);
    let app = App::scripted(move |Submission { request, sink }| {
        done(&sink, Finish::Stop, 1, 0);
        *slot.lock().unwrap() = Some(request.task);
    });
    let reply = app.post(path, body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    match seen.lock().unwrap().take() {
        Some(Task::Generate(generate)) => generate,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_whole_chat_answer() {
    let app = saying("héllo", Finish::Stop);
    let reply = app.post(CHAT, chat(json!({}))).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), "application/json");
    assert_eq!(
        masked(&reply, "chatcmpl-"),
        concat!(
            r#"{"id":"ID","object":"chat.completion","created":0,"model":"tiny","#,
            r#""choices":[{"index":0,"message":{"role":"assistant","content":"héllo","#,
            r#""refusal":null},"logprobs":null,"finish_reason":"stop"}],"#,
            r#""usage":{"prompt_tokens":18,"completion_tokens":6,"total_tokens":24,"#,
            r#""prompt_tokens_details":{"cached_tokens":2},"#,
            r#""completion_tokens_details":{"reasoning_tokens":0}}}"#
        )
    );
    assert_eq!(outcomes(&app.front, "tiny", "generate", "ok"), 1.0);
}

#[tokio::test]
async fn a_chat_stream_with_usage() {
    let app = saying("é!", Finish::Length);
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let reply = app.post(CHAT, chat(options)).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), "text/event-stream");
    assert_eq!(reply.header("cache-control"), "no-cache");
    assert_eq!(reply.header("x-accel-buffering"), "no");
    let head = r#"data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"tiny","#;
    let chunk = |delta: &str, finish: &str| {
        format!(
            "{head}\"choices\":[{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\
             \"finish_reason\":{finish}}}],\"usage\":null}}\n\n"
        )
    };
    let expected = [
        chunk(r#"{"role":"assistant","content":""}"#, "null"),
        chunk(r#"{"content":"é"}"#, "null"),
        chunk(r#"{"content":"!"}"#, "null"),
        chunk("{}", "\"length\""),
        format!(
            "{head}\"choices\":[],\"usage\":{{\"prompt_tokens\":18,\"completion_tokens\":3,\
             \"total_tokens\":21,\"prompt_tokens_details\":{{\"cached_tokens\":2}},\
             \"completion_tokens_details\":{{\"reasoning_tokens\":0}}}}}}\n\n"
        ),
        "data: [DONE]\n\n".to_owned(),
    ];
    assert_eq!(masked(&reply, "chatcmpl-"), expected.concat());
    assert_eq!(outcomes(&app.front, "tiny", "generate", "ok"), 1.0);
}

#[tokio::test]
async fn a_text_stream_without_usage() {
    let app = saying("ab", Finish::Stop);
    let reply = app.post(TEXT, text(json!({"stream": true}))).await;
    let chunk = |text: &str, finish: &str| {
        format!(
            "data: {{\"id\":\"ID\",\"object\":\"text_completion\",\"created\":0,\
             \"model\":\"tiny\",\"choices\":[{{\"text\":\"{text}\",\"index\":0,\
             \"logprobs\":null,\"finish_reason\":{finish}}}]}}\n\n"
        )
    };
    let expected =
        [chunk("a", "null"), chunk("b", "null"), chunk("", "\"stop\""), "data: [DONE]\n\n".into()];
    assert_eq!(masked(&reply, "cmpl-"), expected.concat());
}

#[tokio::test]
async fn several_prompts_are_several_choices() {
    let app = App::scripted(|submission| {
        let answer = prompt(&submission).to_uppercase();
        say(&submission.sink, &answer);
        done(&submission.sink, Finish::Stop, answer.len() as u32, answer.len() as u32);
    });
    let prompts = json!({"prompt": ["ab", "c", "def"]});
    let reply = app.post(TEXT, text(prompts.clone())).await.json();
    let texts: Vec<&str> =
        reply["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["AB", "C", "DEF"]);
    assert_eq!(reply["choices"][2]["index"], 2);
    assert_eq!(reply["usage"]["total_tokens"], 12);
    let mut streamed = prompts;
    streamed["stream"] = true.into();
    let reply = app.post(TEXT, text(streamed)).await;
    let mut texts = vec![String::new(); 3];
    let mut finished = 0;
    for data in reply.body.lines().filter_map(|line| line.strip_prefix("data: {")) {
        let chunk: Value = serde_json::from_str(&format!("{{{data}")).unwrap();
        let choice = &chunk["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
        finished += usize::from(choice["finish_reason"] == "stop");
    }
    assert_eq!((texts, finished), (vec!["AB".into(), "C".into(), "DEF".into()], 3));
    assert!(reply.body.ends_with("data: [DONE]\n\n"));
    assert_eq!(outcomes(&app.front, "tiny", "generate", "ok"), 2.0);
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_cancels_the_rest() {
    let (cancelled, seen) = tokio::sync::oneshot::channel();
    let mut cancelled = Some(cancelled);
    let app = App::scripted(move |Submission { sink, .. }| {
        say(&sink, "one EN");
        say(&sink, "D two");
        let cancelled = cancelled.take().unwrap();
        // The engine goes on; it is told by the receiver's end.
        tokio::spawn(async move {
            while !sink.is_cancelled() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            cancelled.send(()).unwrap();
        });
    });
    let body = chat(json!({"stop": ["END", "xyz"], "stream": true}));
    let reply = app.post(CHAT, body).await;
    let mut shown = String::new();
    for data in reply.body.lines().filter_map(|line| line.strip_prefix("data: {")) {
        let chunk: Value = serde_json::from_str(&format!("{{{data}")).unwrap();
        shown += chunk["choices"][0]["delta"]["content"].as_str().unwrap_or("");
    }
    assert_eq!(shown, "one ");
    assert!(reply.body.contains(r#""finish_reason":"stop""#), "{}", reply.body);
    seen.await.unwrap();
    assert_eq!(outcomes(&app.front, "tiny", "generate", "ok"), 1.0);
}

#[tokio::test]
async fn what_was_held_back_for_a_stop_string_comes_at_the_end() {
    let app = saying("abEN", Finish::Length);
    let reply = app.post(CHAT, chat(json!({"stop": "END"}))).await.json();
    assert_eq!(reply["choices"][0]["message"]["content"], "abEN");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn parameters_reach_the_engine() {
    let given = json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -1,
        "max_completion_tokens": 7, "max_tokens": 9, "user": "u", "metadata": {"a": "b"},
        "unknown": [1], "n": 1, "tools": [], "tool_choice": "none", "logprobs": false,
        "frequency_penalty": 0, "response_format": {"type": "text"}, "logit_bias": {},
        "stop": null, "stream": false
    });
    let asked_for = asked(CHAT, chat(given)).await;
    let sampling = asked_for.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.min_p), (0.5, 0.9, 0.1));
    assert_eq!((sampling.top_k, sampling.seed, sampling.choice), (40, u64::MAX, 0));
    assert_eq!((asked_for.max_tokens, &*asked_for.stop_tokens), (7, &[END][..]));
    let random = asked(CHAT, chat(json!({"ignore_eos": true, "top_k": -1}))).await;
    assert_eq!((&*random.stop_tokens, random.sampling.top_k), (&[][..], 0));
    assert_eq!(random.max_tokens, CONTEXT - random.prompt.len() as u32);
    let other = asked(CHAT, chat(json!({}))).await;
    assert_ne!(random.sampling.seed, other.sampling.seed);
    assert_eq!(asked(TEXT, text(json!({}))).await.max_tokens, 16);
    let near = text(json!({"prompt": "x".repeat(60)}));
    assert_eq!(asked(TEXT, near).await.max_tokens, 4);
    let tokens = asked(TEXT, text(json!({"prompt": [1, 2, 256]}))).await;
    assert_eq!(&*tokens.prompt, &[1, 2, 256]);
}

#[tokio::test]
async fn messages_become_one_prompt() {
    let messages = json!({"messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
         "name": "n"},
    ]});
    let asked_for = asked(CHAT, chat(messages)).await;
    let prompt: String = asked_for.prompt.iter().map(|&token| char::from(token as u8)).collect();
    let (system, user) = (prompt.find("s").unwrap(), prompt.find("a\nb").unwrap());
    assert!(system < user, "{prompt}");
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_a_status_and_later_an_event() {
    let error = || Error::new(ErrorKind::Cut, "the drain deadline has come");
    let app = App::scripted(move |Submission { sink, .. }| sink.send(Event::Failed(error())));
    let reply = app.post(CHAT, chat(json!({"stream": true}))).await;
    assert_eq!((reply.status.as_u16(), reply.header("connection")), (503, "close"));
    let app = App::scripted(move |Submission { sink, .. }| {
        say(&sink, "a");
        sink.send(Event::Failed(error()));
    });
    let reply = app.post(CHAT, chat(json!({"stream": true}))).await;
    assert_eq!(reply.status, 200);
    let last = reply.body.trim_end().rsplit("\n\n").next().unwrap();
    let event: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(event["error"]["code"], "cut_by_drain");
    assert_eq!(event["error"]["type"], "server_error");
    assert!(!reply.body.contains("[DONE]"), "{}", reply.body);
    assert_eq!(outcomes(&app.front, "tiny", "generate", "cut"), 1.0);
}

#[tokio::test]
async fn an_engine_that_goes_without_a_word_is_a_dead_device() {
    let app = App::scripted(|submission| drop(submission.sink));
    let reply = app.post(CHAT, chat(json!({}))).await;
    assert_eq!(
        (reply.status.as_u16(), reply.json()["error"]["code"].as_str()),
        (503, Some("device_failed"))
    );
}

/// The clock runs ahead whenever everybody waits.
#[tokio::test(start_paused = true)]
async fn a_streams_status_is_open_until_its_first_token_or_ten_seconds() {
    let (app, mut inbox) = App::new(Config::default());
    let ask = || {
        let start = Instant::now();
        let request = super::post(CHAT, chat(json!({"stream": true})));
        let asked = app.main.clone().oneshot(request);
        async move { (asked.await.unwrap(), start.elapsed()) }
    };
    let seconds = Duration::from_secs;
    let mut token_after = async |wait: Duration| {
        let submission = inbox.recv().await.unwrap();
        tokio::time::sleep(wait).await;
        say(&submission.sink, "a");
        submission.sink
    };
    let ((response, waited), sink) = tokio::join!(ask(), token_after(seconds(7)));
    assert_eq!((response.status().as_u16(), waited.as_secs()), (200, 7));
    drop((response, sink));
    let ((response, waited), submission) = tokio::join!(ask(), inbox.recv());
    assert_eq!((response.status().as_u16(), waited.as_secs()), (200, 10));
    // Then a comment every fifteen seconds of silence, and the first token when it is there.
    let mut body = response.into_body();
    let mut frames = Vec::new();
    let sink = submission.unwrap().sink;
    let later = async {
        tokio::time::sleep(seconds(40)).await;
        say(&sink, "a");
        done(&sink, Finish::Stop, 1, 1);
    };
    let read = async {
        let start = Instant::now();
        while let Some(frame) = body.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            frames.push((start.elapsed().as_secs(), String::from_utf8(data.to_vec()).unwrap()));
        }
    };
    tokio::join!(read, later);
    let pings = frames.iter().filter(|(_, data)| data == ": ping\n\n");
    assert_eq!(pings.map(|(second, _)| *second).collect::<Vec<_>>(), [15, 30]);
    let (second, last) = frames.last().unwrap();
    assert!(*second == 40 && last.ends_with("data: [DONE]\n\n"), "{frames:?}");
}

#[tokio::test]
async fn a_quiet_stream_is_kept_open_and_ends_at_its_deadline() {
    let mut config = Config::default();
    config.limits.sse_ping = Duration::from_millis(50);
    let (app, mut inbox) = App::new(config);
    let mut request = super::post(CHAT, chat(json!({"stream": true})));
    request.headers_mut().insert("x-request-timeout", "0.6".parse().unwrap());
    let (reply, submission) = tokio::join!(app.send(request), inbox.recv());
    // Headers after one ping's time of silence, then pings until the deadline.
    assert_eq!(reply.status, 200);
    assert!((1..12).contains(&reply.body.matches(": ping\n\n").count()), "{}", reply.body);
    assert!(reply.body.contains("deadline_exceeded") && !reply.body.contains("[DONE]"));
    assert!(submission.unwrap().sink.is_cancelled());
    assert_eq!(outcomes(&app.front, "tiny", "generate", "timeout"), 1.0);
}

#[tokio::test]
async fn a_whole_answer_has_its_deadline_too() {
    let held = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&held);
    let app = App::scripted(move |submission| keep.lock().unwrap().push(submission.sink));
    for extra in [json!({}), json!({"stream": true})] {
        let mut request = super::post(CHAT, chat(extra));
        request.headers_mut().insert("x-request-timeout", "0.05".parse().unwrap());
        let reply = app.send(request).await;
        assert_eq!(reply.status, 504);
        assert_eq!(reply.header("x-should-retry"), "false");
    }
    assert!(held.lock().unwrap().iter().all(|sink| sink.is_cancelled()));
    assert_eq!(outcomes(&app.front, "tiny", "generate", "timeout"), 2.0);
}
