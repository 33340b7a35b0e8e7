//! Every refusal that a client can meet: status, code, body, headers, and one outcome each.

use axum::body::Body;
use axum::http::{HeaderName, Method, Request};
use serde_json::{Value, json};

use super::{App, post};
use crate::admission::testing::{advance, done, ended, metric};
use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::lifecycle::Phase;
use crate::request::{Event, Finish, Micros, Submission};
use crate::scheduler::{LaneLoad, Load};

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

fn quiet() -> App {
    App::scripted(|Submission { sink, .. }| done(&sink, Finish::Stop, 1, 0))
}

/// Sends `body` and checks the error's whole shape.
async fn refused(app: &App, path: &str, body: impl Into<Body>) -> (u16, Value) {
    let before = ended(&app.front);
    let reply = app.post(path, body).await;
    assert_eq!(reply.header("content-type"), "application/json", "{}", reply.body);
    let json = reply.json();
    let error = json["error"].as_object().unwrap_or_else(|| panic!("{json}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
    assert!(error["message"].as_str().unwrap().contains(reply.header("x-request-id")));
    assert_eq!(ended(&app.front), before + 1.0, "one outcome a request");
    assert_eq!(app.front.telemetry.snapshot().in_flight, 0);
    (reply.status.as_u16(), json["error"].clone())
}

#[tokio::test]
async fn malformed_bodies() {
    let app = quiet();
    let deep = "[".repeat(200_000);
    let deep_content = format!(r#"{{"model":"tiny","messages":{deep}"#);
    let deep_choice = format!(r#"{{"model":"tiny","tool_choice":{deep}"#);
    let cases: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"{".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"\"text\"".to_vec(),
        deep.into_bytes(),
        deep_content.into_bytes(),
        deep_choice.into_bytes(),
        b"{\"model\":\"\xff\xfe\"}".to_vec(),
        br#"{"model":"tiny","model":"tiny"}"#.to_vec(),
        br#"{"model":"tiny","messages":"hi"}"#.to_vec(),
        br#"{"model":5,"messages":[]}"#.to_vec(),
        chat(json!({"max_tokens": "many"})).into_bytes(),
        chat(json!({"max_tokens": -1})).into_bytes(),
        chat(json!({"max_tokens": 1e20})).into_bytes(),
        chat(json!({"n": 99_999_999_999_u64})).into_bytes(),
        chat(json!({"seed": u64::MAX})).into_bytes(),
        chat(json!({"stop": [1]})).into_bytes(),
    ];
    for body in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let (status, error) = refused(&app, CHAT, body).await;
        assert_eq!((status, error["code"].as_str()), (400, Some("invalid_request")), "{shown}");
        assert!(error["message"].as_str().unwrap().len() < 400, "{error}");
    }
}

#[tokio::test]
async fn values_of_the_wrong_type_name_their_field() {
    let app = quiet();
    for (extra, param) in [
        (json!({"max_tokens": "many"}), "max_tokens"),
        (json!({"n": -1}), "n"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"stop": [1]}), "stop"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (json!({"messages": [{"role": 5}]}), "messages"),
        (json!({"stream_options": {"include_usage": 3}}), "stream_options"),
        (json!({"seed": 1.5}), "seed"),
    ] {
        let (status, error) = refused(&app, CHAT, chat(extra)).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{error}");
    }
    for body in ["{", "5", r#"{"model":"tiny"} x"#] {
        assert_eq!(refused(&app, CHAT, body).await.1["param"], Value::Null, "{body}");
    }
}

#[tokio::test]
async fn out_of_range_and_incomplete() {
    let app = quiet();
    let many = vec![json!({"role": "user", "content": "a"}); 2049];
    let biases: std::collections::HashMap<String, i32> =
        (0..1025).map(|id| (id.to_string(), 1)).collect();
    let message = |message: Value| json!({"messages": [message]});
    for (extra, param) in [
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": 1e39}), "temperature"),
        (json!({"top_p": 1.01}), "top_p"),
        (json!({"min_p": -1}), "min_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": "x".repeat(1025)}), "stop"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"model": null}), "model"),
        (json!({"model": "org/vec"}), "model"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": many}), "messages"),
        (json!({"n": 0}), "n"),
        (json!({"n": 17}), "n"),
        (json!({"logprobs": 1}), "logprobs"),
        (json!({"logprobs": "yes"}), "logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"top_logprobs": 1}), "top_logprobs"),
        (json!({"frequency_penalty": 2.01}), "frequency_penalty"),
        (json!({"presence_penalty": -2.01}), "presence_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"repetition_penalty": -1}), "repetition_penalty"),
        (json!({"repetition_penalty": 11}), "repetition_penalty"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"logit_bias": {"5": "1"}}), "logit_bias"),
        (json!({"logit_bias": {"5": null}}), "logit_bias"),
        (json!({"logit_bias": {"a": 1}}), "logit_bias"),
        (json!({"logit_bias": {"-1": 1}}), "logit_bias"),
        (json!({"logit_bias": {"05": 1}}), "logit_bias"),
        (json!({"logit_bias": {"257": 1}}), "logit_bias"),
        (json!({"logit_bias": {"4294967296": 1}}), "logit_bias"),
        (json!({"logit_bias": biases}), "logit_bias"),
        (json!({"chat_template_kwargs": {"enable_thinking": "no"}}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"bos_token": true}}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (message(json!({"role": "robot", "content": "a"})), "messages"),
        (message(json!({"role": "user"})), "messages"),
        (message(json!({"role": "user", "content": "a", "name": "n".repeat(65)})), "messages"),
    ] {
        let (status, error) = refused(&app, CHAT, chat(extra)).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["code"], "invalid_request");
    }
    for (extra, param) in [
        (json!({"logprobs": 6}), "logprobs"),
        (json!({"logprobs": -1}), "logprobs"),
        (json!({"logprobs": 0.5}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"prompt": vec!["a"; 9], "n": 16}), "n"),
    ] {
        let (status, error) = refused(&app, TEXT, text(extra)).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{error}");
    }
    let mut config = Config::default();
    config.limits.queue_requests = 3;
    let (app, _inbox) = App::new(config);
    let (status, error) = refused(&app, CHAT, chat(json!({"n": 4}))).await;
    assert_eq!((status, error["param"].as_str()), (400, Some("n")), "never a 429: {error}");
}

#[tokio::test]
async fn unserved_fields_are_refused_by_name() {
    let app = quiet();
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
    let calls = json!([{"role": "assistant", "tool_calls": [{"id": "1"}]}]);
    for (extra, param) in [
        (json!({"best_of": 3}), "best_of"),
        (json!({"echo": true}), "echo"),
        (json!({"suffix": "s"}), "suffix"),
        (json!({"prompt_logprobs": 1}), "prompt_logprobs"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"guided_json": {}}), "guided_json"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"messages": image}), "messages"),
        (json!({"messages": calls}), "messages"),
        (json!({"add_generation_prompt": false}), "add_generation_prompt"),
        (json!({"include_stop_str_in_output": true}), "include_stop_str_in_output"),
        (json!({"allowed_token_ids": [1]}), "allowed_token_ids"),
        (json!({"bad_words": ["a"]}), "bad_words"),
        (json!({"truncate_prompt_tokens": -1}), "truncate_prompt_tokens"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"grammar": "root ::= \"a\""}), "grammar"),
        (json!({"json_schema": {}}), "json_schema"),
        // The template has a switch for thinking.
        (json!({"reasoning_effort": "none"}), "reasoning_effort"),
    ] {
        let (status, error) = refused(&app, CHAT, chat(extra)).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{error}");
        assert_eq!(error["code"], "unsupported");
    }
    for (extra, param) in [
        (json!({"suffix": "s"}), "suffix"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"n": 2, "best_of": 3}), "best_of"),
        (json!({"echo": true, "logprobs": 0}), "echo"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
    ] {
        let (status, error) = refused(&app, TEXT, text(extra)).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{error}");
        assert_eq!(error["code"], "unsupported");
    }
}

#[tokio::test]
async fn fields_that_change_nothing_pass() {
    let app = quiet();
    for extra in [
        json!({"add_generation_prompt": true, "include_stop_str_in_output": false}),
        json!({"allowed_token_ids": [], "bad_words": [], "grammar": "", "use_beam_search": false}),
        json!({"reasoning_effort": "medium"}),
        json!({"reasoning_effort": "high"}),
        json!({
            "add_generation_prompt": null, "include_stop_str_in_output": null,
            "allowed_token_ids": null, "bad_words": null, "truncate_prompt_tokens": null,
            "use_beam_search": null, "grammar": null, "json_schema": null,
            "reasoning_effort": null,
        }),
    ] {
        let reply = app.post(CHAT, chat(extra)).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
    }
    let reply = app.post(TEXT, text(json!({"add_generation_prompt": false}))).await;
    assert_eq!(reply.status, 200, "there is no template: {}", reply.body);
}

#[tokio::test]
async fn too_long() {
    let app = quiet();
    let too_long = |content: usize, extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x".repeat(content)}]});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        chat(body)
    };
    for body in [
        too_long(64, json!({})),
        too_long(10, json!({"max_tokens": 60})),
        too_long(10, json!({"max_tokens": u32::MAX})),
        too_long(2_000, json!({})),
    ] {
        let (status, error) = refused(&app, CHAT, body).await;
        let code = error["code"].as_str();
        assert_eq!((status, code), (400, Some("context_length_exceeded")), "{error}");
        assert!(error["message"].as_str().unwrap().contains("64"), "{error}");
    }
    let labels = [("model", "tiny"), ("reason", "too_large")];
    assert_eq!(metric(&app.front, "sconce_rejections_total", &labels), 4.0);
    for prompt in [json!(""), json!([]), json!([""]), json!([[]]), json!(vec!["x"; 129])] {
        let body = json!({"model": "tiny", "prompt": prompt}).to_string();
        let (status, error) = refused(&app, "/v1/completions", body).await;
        assert_eq!((status, error["param"].as_str()), (400, Some("prompt")), "{error}");
    }
    let foreign = json!({"model": "tiny", "prompt": [1, 300]}).to_string();
    assert_eq!(refused(&app, "/v1/completions", foreign).await.0, 400);
    let huge = "x".repeat(Config::default().server.max_body_bytes + 1);
    for path in [CHAT, "/v1/completions", "/v1/embeddings"] {
        let (status, error) = refused(&app, path, huge.clone()).await;
        assert_eq!((status, error["code"].as_str()), (413, Some("too_large")));
        assert!(error["message"].as_str().unwrap().contains("server.max_body_bytes"));
    }
}

#[tokio::test]
async fn unknown_model_names_the_nearest() {
    let (status, error) = refused(&quiet(), CHAT, chat(json!({"model": "tinny"}))).await;
    assert_eq!((status, error["code"].as_str()), (404, Some("model_not_found")));
    assert!(error["message"].as_str().unwrap().contains("Did you mean 'tiny'?"), "{error}");
}

#[tokio::test]
async fn retry_headers_follow_the_case() {
    let app = quiet();
    let reply = app.post(CHAT, chat(json!({"model": "late"}))).await;
    assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (503, "7"));
    assert_eq!(reply.json()["error"]["code"], "model_loading");
    let waiting = LaneLoad { start_delay: Micros(40_000_000), ..LaneLoad::default() };
    app.front.telemetry.publish(&Load { lanes: vec![waiting], ..Load::default() });
    let reply = app.post(CHAT, chat(json!({}))).await;
    assert_eq!(reply.status, 429);
    let seconds: u64 = reply.header("retry-after").parse().unwrap();
    assert!((24..=36).contains(&seconds), "{seconds}");
    assert_eq!(reply.json()["error"]["code"], "queue_full");
    assert_eq!(reply.json()["error"]["type"], "rate_limit_exceeded");
    advance(&app.front.lifecycle, Phase::Draining);
    let reply = app.post(CHAT, chat(json!({}))).await;
    assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (503, "1"));
    assert_eq!(reply.header("connection"), "close");
    assert_eq!(reply.json()["error"]["code"], "draining");
}

#[tokio::test]
async fn a_full_queue_is_429_and_a_dead_engine_503() {
    let mut config = Config::default();
    config.limits.queue_requests = 1;
    let (app, inbox) = App::new(config);
    let first = app.front.inbox.clone().try_reserve_owned().unwrap();
    let (status, error) = refused(&app, CHAT, chat(json!({}))).await;
    assert_eq!((status, error["code"].as_str()), (429, Some("queue_full")));
    drop((first, inbox));
    let (status, error) = refused(&app, CHAT, chat(json!({}))).await;
    assert_eq!((status, error["code"].as_str()), (503, Some("device_failed")));
}

#[tokio::test]
async fn engine_failures_map_to_statuses() {
    for (kind, status, retry) in [
        (ErrorKind::DeadlineExceeded, 504, "false"),
        (ErrorKind::StepFailed, 500, ""),
        (ErrorKind::DeviceFailed, 503, ""),
        (ErrorKind::Cut, 503, ""),
        (ErrorKind::Internal, 500, "false"),
    ] {
        let app = App::scripted(move |Submission { sink, .. }| {
            sink.send(Event::Failed(Error::new(kind, "it failed")));
        });
        let reply = app.post(CHAT, chat(json!({}))).await;
        assert_eq!(reply.status.as_u16(), status, "{kind:?}");
        assert_eq!(reply.header("x-should-retry"), retry, "{kind:?}");
        assert_eq!(reply.header("retry-after"), if retry.is_empty() { "1" } else { "" });
        assert_eq!(ended(&app.front), 1.0);
    }
}

#[tokio::test]
async fn bad_headers() {
    let app = quiet();
    for wrong in ["soon", "-1", "0"] {
        let mut request = post(CHAT, chat(json!({})));
        request.headers_mut().insert("x-request-timeout", wrong.parse().unwrap());
        assert_eq!(app.send(request).await.status, 400, "{wrong}");
    }
    for (given, status) in [
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
    ] {
        let mut request = post(CHAT, chat(json!({})));
        request.headers_mut().insert("content-type", given.parse().unwrap());
        assert_eq!(app.send(request).await.status.as_u16(), status, "{given}");
    }
    // What a page sends without asking needs no type; a program may leave it out.
    for (marks, status) in [("", 200), ("origin", 400), ("sec-fetch-site", 400)] {
        let mut request = post(CHAT, chat(json!({})));
        request.headers_mut().remove("content-type");
        if let Ok(name) = marks.parse::<HeaderName>() {
            request.headers_mut().insert(name, "cross-site".parse().unwrap());
        }
        assert_eq!(app.send(request).await.status.as_u16(), status, "{marks}");
    }
    for (given, kept) in [("abc-1.2:3", true), ("", false), ("a b", false), ("\u{e9}", false)] {
        let mut request = post(CHAT, chat(json!({})));
        request.headers_mut().insert("x-request-id", given.parse().unwrap());
        let reply = app.send(request).await;
        assert_eq!(reply.header("x-request-id") == given, kept, "{given}");
        assert!(!reply.header("x-request-id").is_empty());
    }
    let mut request = post(CHAT, chat(json!({})));
    request.headers_mut().insert("x-request-id", "x".repeat(129).parse().unwrap());
    assert_eq!(app.send(request).await.header("x-request-id").len(), 36);
}

#[tokio::test]
async fn paths_and_methods() {
    let app = quiet();
    let ask = |method: Method, path: &str| {
        app.send(Request::builder().method(method).uri(path).body(Body::empty()).unwrap())
    };
    for path in ["/v1", "/v1/chat", "/v1/chat/completions/", "//v1/models", "/metrics", "/stats"] {
        let reply = ask(Method::GET, path).await;
        assert_eq!(
            (reply.status.as_u16(), reply.json()["error"]["code"].as_str()),
            (404, Some("not_found"))
        );
    }
    for method in [Method::GET, Method::OPTIONS, Method::PUT, Method::DELETE] {
        let reply = ask(method, CHAT).await;
        assert_eq!((reply.status.as_u16(), reply.header("allow")), (405, "POST"));
        assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
        assert!(!reply.header("x-request-id").is_empty());
    }
    assert_eq!(ask(Method::HEAD, CHAT).await.status, 405);
    assert_eq!(ask(Method::POST, "/v1/models").await.status, 405);
    assert_eq!(ask(Method::HEAD, "/livez").await.status, 200);
    assert_eq!(ended(&app.front), 0.0);
}
