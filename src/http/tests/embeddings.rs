//! Embeddings: inputs in every form, vectors in both encodings.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::App;
use crate::admission::testing::{done, outcomes};
use crate::request::{Event, Finish, Submission, Task, Text};

const PATH: &str = "/v1/embeddings";

/// An engine whose vectors tell the input's index, length and first token; last input first.
fn vectors() -> App {
    App::scripted(|Submission { request, sink }| {
        let Task::Encode(embed) = request.task else { panic!("not an embedding") };
        for (index, Text { tokens: input, .. }) in embed.inputs.iter().enumerate().rev() {
            let values = vec![index as f32 + 0.5, input.len() as f32, input[0] as f32];
            sink.send(Event::Vector { index: index as u32, values });
        }
        done(&sink, Finish::Complete, embed.tokens() as u32, 0);
    })
}

fn body(extra: Value) -> String {
    let mut body = json!({"model": "org/vec", "input": "ab"});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

#[tokio::test]
async fn floats_byte_for_byte() {
    let app = vectors();
    let reply = app.post(PATH, body(json!({"input": ["ab", "c"]}))).await;
    assert_eq!(
        (reply.status.as_u16(), reply.body.as_str()),
        (
            200,
            concat!(
                r#"{"object":"list","data":["#,
                r#"{"object":"embedding","index":0,"embedding":[0.5,2.0,97.0]},"#,
                r#"{"object":"embedding","index":1,"embedding":[1.5,1.0,99.0]}],"#,
                r#""model":"org/vec","usage":{"prompt_tokens":3,"total_tokens":3}}"#
            )
        )
    );
    assert_eq!(outcomes(&app.front, "org/vec", "embed", "ok"), 1.0);
}

#[tokio::test]
async fn base64_is_little_endian() {
    let reply = vectors().post(PATH, body(json!({"encoding_format": "base64"}))).await.json();
    let bytes = STANDARD.decode(reply["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let expected: Vec<u8> = [0.5_f32, 2.0, 97.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(bytes, expected);
}

#[tokio::test]
async fn every_form_of_input() {
    let app = vectors();
    for (input, lengths) in [
        (json!("abc"), vec![3.0]),
        (json!(["a", "bc"]), vec![1.0, 2.0]),
        (json!([1, 2, 256]), vec![3.0]),
        (json!([[1], [2, 3]]), vec![1.0, 2.0]),
        (json!(vec!["x"; 2048]), vec![1.0; 2048]),
    ] {
        let reply = app.post(PATH, body(json!({"input": input}))).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        let data = reply.json()["data"].clone();
        let data = data.as_array().unwrap();
        let got: Vec<f64> =
            data.iter().map(|item| item["embedding"][1].as_f64().unwrap()).collect();
        assert_eq!(got, lengths);
        assert_eq!(data.last().unwrap()["index"], lengths.len() - 1);
    }
}

#[tokio::test]
async fn wrong_inputs_are_named() {
    let app = vectors();
    for (extra, status, code, what) in [
        (json!({"input": ""}), 400, "invalid_request", "empty"),
        (json!({"input": []}), 400, "invalid_request", "empty"),
        (json!({"input": ["a", ""]}), 400, "invalid_request", "(1)"),
        (json!({"input": [[]]}), 400, "invalid_request", "empty"),
        (json!({"input": null}), 400, "invalid_request", "required"),
        (json!({"input": [1, 257]}), 400, "invalid_request", "check_embedding_ctx_length=False"),
        (json!({"input": [[1], [99_999]]}), 400, "invalid_request", "99999"),
        (json!({"input": vec!["x"; 2049]}), 400, "invalid_request", "2049"),
        (json!({"input": {"a": 1}}), 400, "invalid_request", "expected"),
        (
            json!({"input": ["ok", "x".repeat(17)]}),
            400,
            "context_length_exceeded",
            "input 1 has 17",
        ),
        (json!({"dimensions": 2}), 400, "unsupported", "'org/vec' have 3"),
        (json!({"dimensions": 4}), 400, "invalid_request", "1 to 3"),
        (json!({"dimensions": 0}), 400, "invalid_request", "dimensions"),
        (json!({"dimensions": "2"}), 400, "invalid_request", "expected u64"),
        (json!({"encoding_format": "int8"}), 400, "invalid_request", "base64"),
        (json!({"model": "tiny"}), 400, "invalid_request", "generate"),
        (json!({"model": null}), 400, "invalid_request", "model"),
    ] {
        let reply = app.post(PATH, body(extra)).await;
        let error = reply.json()["error"].clone();
        assert_eq!(
            (reply.status.as_u16(), error["code"].as_str()),
            (status, Some(code)),
            "{error}"
        );
        assert!(error["message"].as_str().unwrap().contains(what), "{what}: {error}");
    }
}

#[tokio::test]
async fn vectors_that_are_not_numbers_are_our_fault() {
    for values in [vec![f32::NAN], vec![]] {
        let app = App::scripted(move |Submission { sink, .. }| {
            sink.send(Event::Vector { index: 0, values: values.clone() });
            done(&sink, Finish::Complete, 2, 0);
        });
        let reply = app.post(PATH, body(json!({}))).await;
        assert_eq!(reply.status, 500);
        assert_eq!(reply.header("x-should-retry"), "false");
        assert_eq!(outcomes(&app.front, "org/vec", "embed", "error"), 1.0);
    }
}
