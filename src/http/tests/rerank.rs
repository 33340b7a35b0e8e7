//! Reranking as Cohere's and Jina's clients know it.

use serde_json::{Value, json};

use super::encoders::app;

fn body(extra: Value) -> String {
    let mut body = json!({"model": "rank", "query": "q", "documents": ["a", "ccc", "bb"]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

#[tokio::test]
async fn one_body_suits_every_client() {
    let app = app();
    for (path, version) in [("/rerank", "1"), ("/v1/rerank", "1"), ("/v2/rerank", "2")] {
        let reply = app.post(path, body(json!({"raw_scores": true, "top_n": 2}))).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        let mut answer = reply.json();
        let id = answer.as_object_mut().unwrap().remove("id").unwrap();
        assert!(id.as_str().unwrap().starts_with("rerank-"));
        let expected = json!({
            "model": "rank",
            "results": [
                {"index": 1, "relevance_score": 4.0}, {"index": 2, "relevance_score": 3.0}
            ],
            "meta": {
                "api_version": {"version": version},
                "billed_units": {"search_units": 1},
                "tokens": {"input_tokens": 9}
            },
            "usage": {"prompt_tokens": 9, "total_tokens": 9}
        });
        assert_eq!(answer, expected, "{path}");
    }
}

#[tokio::test]
async fn documents_come_as_text_or_objects_and_go_back_if_wanted() {
    let app = app();
    let documents = json!(["aa", {"text": "b", "title": "ignored"}]);
    let extra = json!({"documents": documents, "return_documents": true, "model": null});
    let answer = app.post("/v2/rerank", body(extra)).await.json();
    assert_eq!(answer["results"][0]["document"], json!({"text": "aa"}));
    assert_eq!(answer["results"][1]["document"], json!({"text": "b"}));
    let score = answer["results"][1]["relevance_score"].as_f64().unwrap();
    assert!((score - 0.880_797).abs() < 1e-5, "{answer}");
}

#[tokio::test]
async fn long_documents_are_cut() {
    let app = app();
    let ask = async |extra: Value| {
        let answer = app.post("/v1/rerank", body(extra)).await.json();
        answer["results"][0]["relevance_score"].as_f64().unwrap()
    };
    let long = json!(["x".repeat(4000)]);
    assert_eq!(ask(json!({"documents": long, "raw_scores": true})).await, 16.0);
    let extra = json!({"documents": long, "raw_scores": true, "max_tokens_per_doc": 4});
    assert_eq!(ask(extra).await, 5.0);
    // Of two texts the longer one is cut first.
    let extra = json!({"query": "q".repeat(40), "documents": ["d"], "raw_scores": true});
    assert_eq!(ask(extra).await, 16.0);
}

#[tokio::test]
async fn mistakes_have_a_message_at_the_top_too() {
    let app = app();
    for (extra, status, code, what) in [
        (json!({"documents": []}), 400, "invalid_request", "0 documents"),
        (json!({"documents": vec!["a"; 2049]}), 400, "invalid_request", "2049"),
        (json!({"documents": null}), 400, "invalid_request", "required"),
        (json!({"documents": [5]}), 400, "invalid_request", "did not match"),
        (json!({"query": null}), 400, "invalid_request", "required"),
        (json!({"query": ""}), 400, "invalid_request", "empty"),
        (json!({"top_n": 0}), 400, "invalid_request", "top_n"),
        (json!({"top_n": -1}), 400, "invalid_request", "expected"),
        (json!({"max_tokens_per_doc": 0}), 400, "invalid_request", "max_tokens_per_doc"),
        (json!({"model": "org/vec"}), 400, "invalid_request", "reranking"),
        (json!({"model": "nobody"}), 404, "model_not_found", "nobody"),
    ] {
        let shown: String = extra.to_string().chars().take(80).collect();
        let reply = app.post("/v2/rerank", body(extra)).await;
        let answer = reply.json();
        assert_eq!(reply.status, status, "{shown}: {answer}");
        assert_eq!(answer["error"]["code"], code, "{shown}");
        assert!(answer["message"].as_str().unwrap().contains(what), "{shown}: {answer}");
    }
}
