//! The routes of Text Embeddings Inference: shapes, headers, which model, what is refused.

use serde_json::{Value, json};

use super::encoders::app;
use super::{App, Reply};
use crate::admission::testing::{ended, outcomes};

async fn ask(app: &App, path: &str, body: Value) -> Value {
    let reply = app.post(path, body.to_string()).await;
    assert_eq!(reply.status, 200, "{path} {body}: {}", reply.body);
    reply.json()
}

async fn refused(app: &App, path: &str, body: Value) -> (u16, String, String) {
    let reply: Reply = app.post(path, body.to_string()).await;
    let answer = reply.json();
    let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
    (reply.status.as_u16(), text("error_type"), text("error"))
}

#[tokio::test]
async fn embeddings_of_every_form_of_input() {
    let app = app();
    let path = "/models/org/vec/embed";
    let plain = |inputs: Value| json!({"inputs": inputs, "normalize": false});
    assert_eq!(ask(&app, path, plain(json!("abc"))).await, json!([[3.0, 97.0, 99.0]]));
    let two = json!([[1.0, 97.0, 97.0], [2.0, 98.0, 99.0]]);
    assert_eq!(ask(&app, path, plain(json!(["a", "bc"]))).await, two);
    assert_eq!(ask(&app, path, plain(json!([98, 99]))).await, json!([[2.0, 98.0, 99.0]]));
    assert_eq!(ask(&app, path, plain(json!([[97], [98, 99]]))).await, two);
    // Scaled to unit length unless told otherwise, whatever the model's own habit is.
    let unit = ask(&app, path, json!({"inputs": [[4, 4, 12, 3]]})).await;
    assert!((unit[0][0].as_f64().unwrap() - 4.0 / 41f64.sqrt()).abs() < 1e-6, "{unit}");
    let short = json!({"inputs": "ab", "dimensions": 2});
    assert_eq!(ask(&app, "/models/nest/embed", short).await[0].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn headers_tell_what_is_known() {
    let app = app();
    let reply = app.post("/models/org/vec/embed", r#"{"inputs":["é","bc"]}"#).await;
    assert_eq!(reply.header("x-compute-characters"), "3");
    assert_eq!(reply.header("x-compute-tokens"), "4");
    for name in ["x-compute-time", "x-total-time", "x-tokenization-time"] {
        assert!(reply.header(name).parse::<u64>().is_ok(), "{name}");
    }
}

#[tokio::test]
async fn every_token_has_its_state() {
    let app = app();
    let body = json!({"inputs": ["ab", "c"]});
    let states = ask(&app, "/models/org/vec/embed_all", body).await;
    assert_eq!(states, json!([[[97.0, 97.0, 97.0], [98.0, 98.0, 98.0]], [[99.0, 99.0, 99.0]]]));
}

#[tokio::test]
async fn an_answer_of_too_many_numbers_is_refused_before_any_work() {
    let app = app();
    let huge = vec!["x".repeat(16); 2048];
    // 2,048 × 16 tokens × 3 numbers are fine; the bound is far above this tiny model.
    let body = json!({"inputs": huge});
    assert_eq!(ask(&app, "/models/org/vec/embed_all", body).await.as_array().unwrap().len(), 2048);
}

#[tokio::test]
async fn similarity_is_the_cosine() {
    let app = app();
    let inputs = json!({"source_sentence": "ab", "sentences": ["ab", "zz", "a"]});
    let cosines = ask(&app, "/models/org/vec/similarity", json!({"inputs": inputs})).await;
    let cosines: Vec<f64> =
        cosines.as_array().unwrap().iter().map(|cosine| cosine.as_f64().unwrap()).collect();
    assert!((cosines[0] - 1.0).abs() < 1e-6 && cosines[1] < cosines[0], "{cosines:?}");
    assert_eq!(cosines.len(), 3);
}

#[tokio::test]
async fn predictions_are_sorted_and_single_or_many() {
    let app = app();
    let path = "/models/mood/predict";
    // Numbers are 3, 5, 4: the labels calm, glad, sad.
    let raw = |inputs: Value| json!({"inputs": inputs, "raw_scores": true});
    let expected = json!([
        {"score": 98.0, "label": "sad"}, {"score": 97.0, "label": "glad"},
        {"score": 2.0, "label": "calm"}
    ]);
    assert_eq!(ask(&app, path, raw(json!("ab"))).await, expected);
    assert_eq!(ask(&app, path, raw(json!(["a", "b"]))).await, expected, "a pair");
    let many = ask(&app, path, raw(json!([["ab"], ["a", "b"]]))).await;
    assert_eq!(many, json!([expected, expected]));
    let shared = ask(&app, path, json!({"inputs": "ab"})).await;
    let sum: f64 =
        shared.as_array().unwrap().iter().map(|label| label["score"].as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-6, "{shared}");
    // ln: the share of the best is 1 / (1 + e^-1).
    assert!((shared[0]["score"].as_f64().unwrap() - 0.731_058_6).abs() < 1e-5, "{shared}");
    let independent = ask(&app, "/models/tags/predict", json!({"inputs": "ab"})).await;
    assert!(independent[2]["score"].as_f64().unwrap() > 0.88, "sigmoid of 2: {independent}");
    let single = ask(&app, "/models/rank/predict", json!({"inputs": ["q", "d"]})).await;
    assert_eq!(single.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn texts_are_ranked() {
    let app = app();
    let body = json!({"query": "q", "texts": ["a", "ccc", "bb"], "raw_scores": true});
    let expected = json!([
        {"index": 1, "score": 4.0}, {"index": 2, "score": 3.0}, {"index": 0, "score": 2.0}
    ]);
    for path in ["/rerank", "/models/rank/rerank", "/models/rank"] {
        assert_eq!(ask(&app, path, body.clone()).await, expected, "{path}");
    }
    let body = json!({"query": "q", "texts": ["a"], "return_text": true});
    let ranked = ask(&app, "/rerank", body).await;
    assert_eq!(ranked[0]["text"], "a");
    assert!((ranked[0]["score"].as_f64().unwrap() - 0.880_797).abs() < 1e-5, "{ranked}");
    assert_eq!(outcomes(&app.front, "rank", "rerank", "ok"), 4.0);
}

#[tokio::test]
async fn texts_become_tokens_and_come_back() {
    let app = app();
    let body = json!({"inputs": "aé", "model": "org/vec"});
    let token = |id: u32, text: &str, start: usize, stop: usize| {
        json!({
            "id": id, "text": text, "special": false, "start": start, "stop": stop
        })
    };
    let tokens = ask(&app, "/tokenize", body).await;
    assert_eq!(tokens[0][0], token(97, "a", 0, 1));
    assert_eq!(tokens[0].as_array().unwrap().len(), 3, "two bytes of one character");
    assert_eq!(tokens[0][2], token(0xa9, "é", 1, 2));
    let body = json!({"ids": [[97, 0xc3, 0xa9], [98]]});
    assert_eq!(ask(&app, "/models/org/vec/decode", body).await, json!(["aé", "b"]));
    let body = json!({"ids": [97, 256], "skip_special_tokens": false});
    assert_eq!(ask(&app, "/models/tiny/decode", body).await, json!(["a<|end|>"]));
}

#[tokio::test]
async fn a_model_is_told_by_path_or_body_or_is_the_only_one() {
    let app = app();
    let (status, kind, error) = refused(&app, "/embed", json!({"inputs": "a"})).await;
    assert_eq!((status, kind.as_str()), (422, "Validation"));
    assert!(error.contains("org/vec, nest") && error.contains("/models/NAME"), "{error}");
    let named = json!({"inputs": "a", "model": "nest"});
    assert_eq!(app.post("/embed", named.to_string()).await.status, 200);
    // The path's name holds.
    let plain = json!({"inputs": "a", "model": "nest", "normalize": false});
    assert_eq!(
        ask(&app, "/models/org/vec/embed", plain.clone()).await,
        ask(&app, "/embed", plain).await
    );
    let (single, _inbox) = App::new(crate::config::Config::default());
    let info = single.get("/info").await.json();
    assert_eq!(info["model_id"], "org/vec");
    let wrong = refused(&app, "/models/rank/embed", json!({"inputs": "a"})).await;
    assert_eq!((wrong.0, wrong.1.as_str()), (424, "Backend"), "{wrong:?}");
    let (status, _, error) = refused(&app, "/models/nobody/embed", json!({"inputs": "a"})).await;
    assert!(status == 404 && error.contains("nobody"), "{error}");
    let (status, ..) = refused(&app, "/models/tiny", json!({"inputs": "a"})).await;
    assert_eq!(status, 422);
    // A path without a verb does what the model is for.
    let raw = json!({"inputs": "ab", "raw_scores": true});
    assert_eq!(ask(&app, "/models/mood", raw).await[0]["label"], "sad");
    assert_eq!(
        ask(&app, "/models/org/vec", json!({"inputs": "a"})).await[0].as_array().unwrap().len(),
        3
    );
}

#[tokio::test]
async fn info_tells_kind_and_limits() {
    let app = app();
    let info = app.get("/models/nest/info").await.json();
    assert_eq!(info["model_type"], json!({"embedding": {"pooling": "cls"}}));
    assert_eq!(
        (&info["max_input_length"], &info["max_client_batch_size"]),
        (&json!(16), &json!(2048))
    );
    let info = app.get("/models/mood/info").await.json();
    assert_eq!(
        info["model_type"]["classifier"]["id2label"],
        json!({"0": "calm", "1": "glad", "2": "sad"})
    );
    assert_eq!(info["model_type"]["classifier"]["label2id"]["sad"], 2);
    let info = app.get("/models/rank/info").await.json();
    assert_eq!(info["model_type"]["reranker"]["id2label"]["0"], "LABEL_0");
    assert_eq!(app.get("/info").await.status, 422, "several encoders");
    assert_eq!(app.get("/models/org/vec").await.status, 404);
    assert_eq!(app.get("/models/tiny/info").await.status, 422);
}

#[tokio::test]
async fn bad_input_is_refused_as_that_server_does() {
    let app = app();
    let (vec, mood) = ("/models/org/vec/embed", "/models/mood/predict");
    let cases = [
        (vec, json!({"inputs": ""}), 400, "Empty", "cannot be empty"),
        (vec, json!({"inputs": []}), 400, "Empty", "cannot be empty"),
        (vec, json!({"inputs": ["a", ""]}), 400, "Empty", "cannot be empty"),
        (vec, json!({"inputs": [[]]}), 400, "Empty", "cannot be empty"),
        (vec, json!({}), 422, "Validation", "required"),
        (vec, json!({"inputs": 5}), 422, "Validation", "expected"),
        (vec, json!({"inputs": vec!["a"; 2049]}), 413, "Validation", "2049"),
        (vec, json!({"inputs": "x".repeat(17)}), 413, "Validation", "17 tokens"),
        (vec, json!({"inputs": vec![97; 17]}), 413, "Validation", "17 tokens"),
        (vec, json!({"inputs": [[97, 300]]}), 422, "Validation", "check_embedding_ctx_length"),
        (vec, json!({"inputs": "a", "truncate": "yes"}), 422, "Validation", "expected"),
        (vec, json!({"inputs": "a", "truncation_direction": "up"}), 422, "Validation", "'Left'"),
        (vec, json!({"inputs": "a", "prompt_name": "query"}), 422, "Validation", "'query'"),
        (vec, json!({"inputs": "a", "dimensions": 2}), 422, "Validation", "matryoshka"),
        (mood, json!({"inputs": ["a", "b", "c"]}), 422, "Validation", "3 texts"),
        (mood, json!({"inputs": [["a"], []]}), 422, "Validation", "0 texts"),
        (mood, json!({"inputs": []}), 422, "Validation", "0 texts"),
        (mood, json!({"inputs": [["a"], "b"]}), 422, "Validation", "did not match"),
        (mood, json!({"inputs": ["a", ""]}), 400, "Empty", "cannot be empty"),
        ("/rerank", json!({"query": "q", "texts": []}), 400, "Empty", "cannot be empty"),
        ("/rerank", json!({"texts": ["a"]}), 422, "Validation", "query"),
        ("/rerank", json!({"query": "", "texts": ["a"]}), 422, "Validation", "empty"),
        ("/rerank", json!({"query": "q", "texts": "a"}), 422, "Validation", "expected"),
        ("/models/org/vec/decode", json!({"ids": [257]}), 422, "Validation", "257"),
        ("/models/org/vec/decode", json!({"ids": []}), 400, "Empty", "ids"),
        (
            "/models/org/vec/similarity",
            json!({"inputs": {"source_sentence": "a", "sentences": []}}),
            400,
            "Empty",
            "sentences",
        ),
    ];
    let count = cases.len() as f64;
    for (path, body, status, kind, what) in cases {
        let shown: String = body.to_string().chars().take(100).collect();
        let (got, error_type, error) = refused(&app, path, body).await;
        assert_eq!((got, error_type.as_str()), (status, kind), "{path} {shown}: {error}");
        assert!(error.contains(what) && error.contains("request id"), "{shown}: {error}");
    }
    assert_eq!(ended(&app.front), count, "each is counted once");
}

#[tokio::test]
async fn texts_are_cut_at_the_end_that_is_asked_for() {
    let app = app();
    let ask = async |side: &str| {
        let text = format!("a{}z", "x".repeat(5000));
        let body = json!({
            "inputs": text, "truncate": true, "truncation_direction": side, "normalize": false
        });
        ask(&app, "/models/org/vec/embed", body).await[0].clone()
    };
    assert_eq!(ask("Right").await, json!([16.0, 97.0, 120.0]));
    assert_eq!(ask("left").await, json!([16.0, 120.0, 122.0]));
    let ids =
        json!({"inputs": (0..20).collect::<Vec<u32>>(), "truncate": true, "normalize": false});
    let cut = super::tei::ask(&app, "/models/org/vec/embed", ids).await;
    assert_eq!(cut, json!([[16.0, 0.0, 15.0]]));
}
