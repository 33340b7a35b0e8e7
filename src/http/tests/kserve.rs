//! The Open Inference Protocol: health, metadata, JSON and binary tensors.

use axum::http::Request;
use serde_json::{Value, json};

use super::encoders::app;
use super::{App, Reply, post};
use crate::admission::testing::advance;
use crate::config::Config;
use crate::lifecycle::Phase;
use crate::model::ModelState;

const INFER: &str = "/v2/models/org/vec/infer";

fn texts(name: &str, texts: &[&str]) -> Value {
    json!({"name": name, "datatype": "BYTES", "shape": [texts.len()], "data": texts})
}

/// A body with one binary input.
async fn binary(app: &App, head: Value, tail: &[u8]) -> Reply {
    let head = head.to_string();
    let body = [head.as_bytes(), tail].concat();
    let request = Request::post(INFER)
        .header("content-type", "application/octet-stream")
        .header("inference-header-content-length", head.len());
    app.send(request.body(body.into()).unwrap()).await
}

#[tokio::test]
async fn the_server_and_its_models_are_described() {
    let app = app();
    let server = app.get("/v2").await.json();
    assert_eq!(server["name"], "sconce");
    assert_eq!(server["extensions"], json!(["binary_tensor_data"]));
    let expected = json!({
        "name": "org/vec", "versions": ["1"], "platform": "sconce",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": "embedding", "datatype": "FP32", "shape": [-1, 3]}]
    });
    assert_eq!(app.get("/v2/models/org/vec").await.json(), expected);
    assert_eq!(app.get("/v2/models/org/vec/versions/1").await.json(), expected);
    assert_eq!(app.get("/v2/models/rank").await.json()["inputs"][0]["name"], "query");
    assert_eq!(app.get("/v2/models/mood").await.json()["outputs"][0]["name"], "scores");
    for (path, status) in [
        ("/v2/models/org/vec/versions/2", 404),
        ("/v2/models/nobody", 404),
        ("/v2/models/tiny", 400),
    ] {
        let reply = app.get(path).await;
        assert_eq!(reply.status, status, "{path}");
        assert!(reply.json()["error"].is_string(), "{}", reply.body);
    }
}

#[tokio::test]
async fn the_server_is_ready_when_every_model_is() {
    let (app, _inbox) = App::new(Config::default());
    assert_eq!(app.get("/v2/health/live").await.json(), json!({"live": true}));
    let ready = app.get("/v2/health/ready").await;
    assert_eq!((ready.status.as_u16(), ready.json()), (503, json!({"ready": false})));
    let late = app.get("/v2/models/late/ready").await;
    assert_eq!((late.status.as_u16(), late.json()), (503, json!({"name": "late", "ready": false})));
    app.front.catalog.find("late").unwrap().set_state(ModelState::Ready);
    assert_eq!(app.get("/v2/health/ready").await.json(), json!({"ready": true}));
    let one = app.get("/v2/models/org/vec/versions/1/ready").await;
    assert_eq!((one.status.as_u16(), one.json()), (200, json!({"name": "org/vec", "ready": true})));
    advance(&app.front.lifecycle, Phase::LameDuck);
    assert_eq!(app.get("/v2/health/ready").await.status, 503);
    assert_eq!(app.get("/v2/health/live").await.status, 200);
}

#[tokio::test]
async fn texts_become_vectors_and_scores() {
    let app = app();
    let body = json!({"id": "my-7", "inputs": [texts("text", &["ab", "c"])]});
    let answer = app.post(INFER, body.to_string()).await.json();
    let expected = json!({
        "model_name": "org/vec", "model_version": "1", "id": "my-7",
        "outputs": [{
            "name": "embedding", "datatype": "FP32", "shape": [2, 3],
            "data": [2.0, 97.0, 98.0, 1.0, 99.0, 99.0]
        }]
    });
    assert_eq!(answer, expected);
    // A column of texts, and outputs by name.
    let column =
        json!({"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": [["ab"], ["c"]]});
    let body = json!({"inputs": [column], "outputs": [{"name": "embedding"}]});
    let answer = app.post(INFER, body.to_string()).await.json();
    assert_eq!(answer["outputs"], expected["outputs"]);
    assert!(answer.get("id").is_none());
    let body = json!({"inputs": [texts("text", &["d", "ee"]), texts("query", &["q"])]});
    let answer = app.post("/v2/models/rank/versions/1/infer", body.to_string()).await.json();
    assert_eq!(answer["outputs"][0]["shape"], json!([2, 1]));
    let score = answer["outputs"][0]["data"][0].as_f64().unwrap();
    assert!((score - 0.880_797).abs() < 1e-5, "{answer}");
    let long = "x".repeat(40);
    let body = json!({"inputs": [texts("text", &[&long])], "parameters": {"truncate": true}});
    assert_eq!(app.post(INFER, body.to_string()).await.json()["outputs"][0]["data"][0], 16.0);
}

#[tokio::test]
async fn binary_text_is_read() {
    let app = app();
    let head = |size: usize, count: usize| {
        json!({"inputs": [{
            "name": "text", "datatype": "BYTES", "shape": [count],
            "parameters": {"binary_data_size": size}
        }]})
    };
    let reply = binary(&app, head(11, 2), b"\x02\0\0\0ab\x01\0\0\0c").await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let data = json!([2.0, 97.0, 98.0, 1.0, 99.0, 99.0]);
    assert_eq!(reply.json()["outputs"][0]["data"], data);
    for (head, tail, what) in [
        (head(11, 3), &b"\x02\0\0\0ab\x01\0\0\0c"[..], "has 2 texts"),
        (head(12, 2), b"\x02\0\0\0ab\x01\0\0\0c", "fewer than 12"),
        (head(10, 2), b"\x02\0\0\0ab\x01\0\0\0c", "ends within"),
        (head(6, 1), b"\x02\0\0\0ab\x01\0\0\0c", "5 bytes belong to no input"),
        (head(3, 1), b"\x02\0\0", "ends within"),
        (head(8, 1), b"\xff\xff\xff\xffabcd", "ends within"),
        (head(5, 1), b"\x01\0\0\0\xff", "not UTF-8"),
    ] {
        let reply = binary(&app, head, tail).await;
        assert_eq!(reply.status, 400, "{what}");
        assert!(reply.json()["error"].as_str().unwrap().contains(what), "{}", reply.body);
    }
    let mut request = post(INFER, "{}");
    request.headers_mut().insert("inference-header-content-length", "3".parse().unwrap());
    assert_eq!(app.send(request).await.status, 400);
}

#[tokio::test]
async fn mistakes_are_one_message() {
    let app = app();
    let float = json!({"name": "text", "datatype": "FP32", "shape": [1], "data": [1.0]});
    let neither = json!({"name": "text", "datatype": "BYTES", "shape": [1]});
    let number = json!({"name": "text", "datatype": "BYTES", "shape": [1], "data": [1]});
    let huge = json!({"name": "text", "datatype": "BYTES", "shape": [u64::MAX, 2], "data": ["a"]});
    let wrong_name = json!([{"name": "logits"}]);
    for (path, body, status, what) in [
        (INFER, json!({"inputs": []}), 400, "no input 'text'"),
        (INFER, json!({}), 400, "inputs"),
        (INFER, json!({"inputs": [float]}), 400, "BYTES"),
        (INFER, json!({"inputs": [neither]}), 400, "binary_data_size"),
        (INFER, json!({"inputs": [number]}), 400, "lists of text"),
        (INFER, json!({"inputs": [huge]}), 400, "not a shape"),
        (INFER, json!({"inputs": [texts("text", &[""])]}), 400, "text 0 is empty"),
        (INFER, json!({"inputs": [texts("text", &[&"x".repeat(17)])]}), 400, "17 tokens"),
        (INFER, json!({"inputs": [texts("text", &["a"])], "outputs": wrong_name}), 400, "logits"),
        ("/v2/models/rank/infer", json!({"inputs": [texts("text", &["a"])]}), 400, "'query'"),
        ("/v2/models/tiny/infer", json!({"inputs": [texts("text", &["a"])]}), 400, "/v1"),
        ("/v2/models/nobody/infer", json!({"inputs": []}), 404, "nobody"),
        ("/v2/models/org/vec/load", json!({}), 404, "infer"),
    ] {
        let reply = app.post(path, body.to_string()).await;
        assert_eq!(reply.status, status, "{path} {body}: {}", reply.body);
        let error = reply.json()["error"].as_str().unwrap().to_owned();
        assert!(error.contains(what), "{body}: {error}");
    }
}
