//! The real server's log: one line for each request, and in no line what was said.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::server::{Server, chat, get};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// A word that nobody says by chance.
const WORD: &str = "quibblewort";

/// POSTs with an id and a trace of its own; status, `traceparent` of the answer, body.
fn post(url: &str, id: &str, body: &str) -> (u16, Option<String>, String) {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    let agent: ureq::Agent = config.build().into();
    let request = agent
        .post(url)
        .header("content-type", "application/json")
        .header("x-request-id", id)
        .header("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-00"))
        .header("tracestate", "vendor=1");
    let mut answer = request.send(body).expect("an answer");
    let parent = answer.headers().get("traceparent");
    let parent = parent.map(|value| value.to_str().unwrap().to_owned());
    let text = answer.body_mut().read_to_string().unwrap();
    (answer.status().as_u16(), parent, text)
}

/// The lines about requests by request id; a second line of one id is a defect.
fn lines(log: &str) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        if line["message"] == "request finished" {
            let id = line["request_id"].as_str().unwrap().to_owned();
            assert_eq!(line["level"], "INFO", "{line}");
            assert!(found.insert(id.clone(), line).is_none(), "{id} was logged twice");
        }
    }
    found
}

/// At the most talkative level: what leaks nowhere there leaks nowhere.
#[test]
fn each_request_is_one_line_that_says_nothing_of_what_was_said() {
    let server = Server::start(&["--log-filter", "trace"]);
    let mut talk = chat(&format!("Say something about the {WORD}."), 12);
    let (status, parent, answer) =
        post(&server.url("/v1/chat/completions"), "whole", &talk.to_string());
    assert_eq!(status, 200, "{answer}");
    let parent = parent.expect("the trace goes on");
    assert!(parent.starts_with(&format!("00-{TRACE}-")), "{parent}");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let said = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert!(said.len() > 10, "{said}");

    talk["stream"] = true.into();
    let streamed = post(&server.url("/v1/chat/completions"), "streamed", &talk.to_string());
    assert!(streamed.2.ends_with("data: [DONE]\n\n"));
    let text = json!({"model": "all-minilm-l6-v2", "input": [WORD, "two"], "user": WORD});
    assert_eq!(post(&server.url("/v1/embeddings"), "vectors", &text.to_string()).0, 200);
    let text = json!({"model": WORD, "prompt": WORD}).to_string();
    assert_eq!(post(&server.url("/v1/completions"), "nobody", &text).0, 404);
    let text = format!("{{\"model\": \"all-minilm-l6-v2\", \"input\": {WORD}}}");
    assert_eq!(post(&server.url("/v1/embeddings"), "broken", &text).0, 400);
    let text = json!({"model": "smollm2-135m-instruct", "prompt": [WORD, 5]}).to_string();
    assert_eq!(post(&server.url("/v1/completions"), "mixed", &text).0, 400);
    assert_eq!(post(&server.url(&format!("/v1/{WORD}?{WORD}")), "nowhere", "{}").0, 404);
    assert_eq!(get(&server.url("/livez")).0, 200);

    let done = || lines(&server.log()).len() >= 7;
    server.wait_until("all logged", std::time::Duration::from_secs(10), done);
    let log = server.log();
    for secret in [WORD, &said, said.split_whitespace().last().unwrap()] {
        let leak = log.lines().find(|line| secret.len() > 5 && line.contains(secret));
        assert_eq!(leak, None, "{secret:?} is in the log");
    }
    let lines = lines(&log);
    assert_eq!(lines.len(), 7, "probes are not logged: {:?}", lines.keys());
    assert!(lines.values().all(|line| line["trace_id"] == TRACE && line["duration_ms"].is_f64()));

    let whole = &lines["whole"];
    let usage = &answer["usage"];
    assert_eq!(whole["route"], "POST /v1/chat/completions");
    assert_eq!(whole["model"], "smollm2-135m-instruct");
    assert_eq!((&whole["task"], &whole["outcome"]), (&json!("generate"), &json!("ok")));
    assert_eq!(whole["status"], 200);
    assert_eq!(whole["prompt_tokens"], usage["prompt_tokens"]);
    assert_eq!(whole["generated_tokens"], usage["completion_tokens"]);
    assert_eq!((&whole["tenant"], &whole["code"]), (&json!("anonymous"), &Value::Null));
    let [waited, first, whole_ms] = ["queue_wait_ms", "first_token_ms", "duration_ms"]
        .map(|key| whole[key].as_f64().unwrap_or_else(|| panic!("no {key}: {whole}")));
    assert!(0.0 <= waited && waited < first && first < whole_ms, "{whole}");

    let streamed = &lines["streamed"];
    assert_eq!(streamed["generated_tokens"], whole["generated_tokens"]);
    assert!(streamed["cached_tokens"].as_u64() > Some(0), "{streamed}");
    let vectors = &lines["vectors"];
    assert_eq!((&vectors["task"], &vectors["outcome"]), (&json!("embed"), &json!("ok")));
    assert!(vectors["queue_wait_ms"].is_f64() && vectors["first_token_ms"].is_null());
    for (id, status, model, code) in [
        ("nobody", 404, "unknown", "model_not_found"),
        ("broken", 400, "unknown", "invalid_request"),
        ("mixed", 400, "unknown", "invalid_request"),
    ] {
        let line = &lines[id];
        assert_eq!((&line["status"], &line["model"]), (&json!(status), &json!(model)), "{line}");
        assert_eq!((&line["outcome"], &line["code"]), (&json!("client_error"), &json!(code)));
    }
    let nowhere = &lines["nowhere"];
    assert_eq!((&nowhere["status"], &nowhere["route"]), (&json!(404), &json!("POST unknown")));
    assert!(nowhere["model"].is_null());
}
