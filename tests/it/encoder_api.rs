//! Encoders behind the real server: a real embedding model, and a cross-encoder and a classifier
//! with made-up weights whose scores transformers knows.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::clients::{python_packages, run};
use crate::encoders::write_model;
use crate::fixtures::golden_json;
use crate::server::{Server, get, post};

/// A folder of manifests: `cross` reranks, `mood` classifies, and the MiniLM of this repository.
fn manifests(folder: &Path) {
    let models = [("cross", "rerank", "xlm_roberta_rerank"), ("mood", "classify", "bert_classify")];
    for (name, task, golden) in models {
        let files = folder.join(name);
        std::fs::create_dir(&files).unwrap();
        let mut manifest =
            format!("name = \"{name}\"\ntask = \"{task}\"\ndtype = \"f32\"\nlicense = \"MIT\"\n");
        for (file, path) in write_model(golden, "mean_tokens", &files) {
            let content = std::fs::read(&path).unwrap();
            let hash: String =
                Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
            let bytes = content.len();
            manifest += &format!(
                "[[files]]\nfile = \"{file}\"\nsha256 = \"{hash}\"\nbytes = {bytes}\n\
                 sources = [\"file:{name}/{file}\"]\n"
            );
        }
        std::fs::write(folder.join(format!("{name}.toml")), manifest).unwrap();
    }
    let minilm = "all-minilm-l6-v2.toml";
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(minilm);
    std::fs::copy(own, folder.join(minilm)).unwrap();
}

/// One server for all checks: a test of its own for each would load the models each time.
#[test]
fn encoders_answer() {
    let folder = tempfile::tempdir().unwrap();
    manifests(folder.path());
    let server = Server::start(&["--models-dir", folder.path().to_str().unwrap()]);
    a_cross_encoder_scores_as_transformers_does(&server);
    a_classifier_scores_as_transformers_does(&server);
    every_token_of_a_real_model_has_a_state(&server);
    an_answer_that_would_be_too_large_is_refused(&server);
    requests_are_counted_by_task(&server);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/encoders.py");
    let mut clients = Command::new("python3");
    clients
        .env("PYTHONPATH", python_packages("encoders.txt"))
        .arg(script)
        .arg(server.main_address());
    assert_eq!(run(&mut clients).trim(), "all is well");
}

fn ask(server: &Server, path: &str, body: Value) -> Value {
    let (status, answer) = post(&server.url(path), &body);
    assert_eq!(status, 200, "{path} {body}: {answer}");
    answer
}

fn close(ours: &Value, theirs: f64) -> bool {
    (ours.as_f64().unwrap() - theirs).abs() <= 2e-4 * theirs.abs().max(1.0)
}

fn a_cross_encoder_scores_as_transformers_does(server: &Server) {
    let golden = golden_json("encoders/xlm_roberta_rerank.json");
    let pairs = golden["cases"].as_array().unwrap().iter();
    for case in pairs.filter(|case| case["texts"].as_array().unwrap().len() == 2) {
        let theirs = case["scores"][0].as_f64().unwrap();
        let texts = [&case["texts"][1]];
        let mut body = json!({"query": case["texts"][0], "texts": texts, "truncate": true});
        let sigmoid = 1.0 / (1.0 + (-theirs).exp());
        assert!(close(&ask(server, "/rerank", body.clone())[0]["score"], sigmoid), "{case}");
        body["raw_scores"] = json!(true);
        assert!(close(&ask(server, "/rerank", body)[0]["score"], theirs), "{case}");
        let body = json!({"query": case["texts"][0], "documents": texts});
        let ranking = ask(server, "/v2/rerank", body);
        assert!(close(&ranking["results"][0]["relevance_score"], sigmoid), "{ranking}");
    }
}

fn a_classifier_scores_as_transformers_does(server: &Server) {
    let golden = golden_json("encoders/bert_classify.json");
    let labels = ["calm", "glad", "sad"];
    for case in golden["cases"].as_array().unwrap() {
        let body = json!({"inputs": [case["texts"]], "raw_scores": true, "truncate": true});
        let answer = ask(server, "/models/mood/predict", body);
        for prediction in answer[0].as_array().unwrap() {
            let label = labels.iter().position(|label| prediction["label"] == *label).unwrap();
            let theirs = case["scores"][label].as_f64().unwrap();
            assert!(close(&prediction["score"], theirs), "{case}: {answer}");
        }
    }
    let long = json!({"inputs": "lamp ".repeat(60)});
    let (status, answer) = post(&server.url("/models/mood/predict"), &long);
    assert_eq!((status, &answer["error_type"]), (413, &json!("Validation")), "{answer}");
}

fn every_token_of_a_real_model_has_a_state(server: &Server) {
    let text = "a small lamp";
    let states = ask(server, "/embed_all", json!({"inputs": text}));
    let states = states[0].as_array().unwrap().clone();
    let tokens = ask(server, "/models/all-minilm-l6-v2/tokenize", json!({"inputs": text}));
    let tokens = tokens[0].as_array().unwrap();
    assert_eq!((states.len(), tokens.len()), (5, 5));
    assert_eq!((&tokens[0]["text"], &tokens[0]["special"]), (&json!("[CLS]"), &json!(true)));
    assert_eq!(tokens[2]["text"], "small");
    assert_eq!((&tokens[2]["start"], &tokens[2]["stop"]), (&json!(2), &json!(7)));
    let ids: Vec<&Value> = tokens.iter().map(|token| &token["id"]).collect();
    let decode = json!({"ids": ids, "model": "all-minilm-l6-v2"});
    assert_eq!(ask(server, "/decode", decode), json!([text]));
    let raw = ask(server, "/embed", json!({"inputs": text, "normalize": false}));
    for c in [0, 100, 383] {
        let mean = states.iter().map(|state| state[c].as_f64().unwrap()).sum::<f64>() / 5.0;
        assert!(close(&raw[0][c], mean), "column {c}");
    }
    let unit = ask(server, "/embed", json!({"inputs": text}));
    let body = json!({"model": "all-minilm-l6-v2", "input": text});
    assert_eq!(ask(server, "/v1/embeddings", body)["data"][0]["embedding"], unit[0]);
}

fn an_answer_that_would_be_too_large_is_refused(server: &Server) {
    // 80 texts of 256 tokens of 384 numbers.
    let texts = vec!["lamp ".repeat(254); 80];
    let (status, answer) = post(&server.url("/embed_all"), &json!({"inputs": texts}));
    assert_eq!(status, 413, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("7864320 numbers"), "{answer}");
}

fn requests_are_counted_by_task(server: &Server) {
    for (model, task) in [("cross", "rerank"), ("mood", "classify"), ("all-minilm-l6-v2", "embed")]
    {
        let labels = format!("{{model=\"{model}\",task=\"{task}\",outcome=\"ok\"}}");
        assert!(server.metric(&format!("sconce_requests_total{labels}")) > 0.0, "{labels}");
    }
    let (status, info) = get(&server.url("/models/mood/info"));
    assert!(status == 200 && info.contains("\"classifier\""), "{info}");
}
