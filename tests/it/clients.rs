//! Real clients, unchanged, from packages of the test's own.

use std::path::{Path, PathBuf};
use std::process::Command;

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::{OpenAIError, WrappedError};
use async_openai::types::chat::{CreateChatCompletionResponse, CreateChatCompletionStreamResponse};
use async_openai::types::completions::CreateCompletionResponse;
use async_openai::types::embeddings::CreateEmbeddingResponse;
use async_openai::types::models::{ListModelResponse, Model};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use crate::server::{Server, get, post, stream};

pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed:\n{text}\n{told}");
    text
}

fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// A folder with the packages that a file of requirements names, filled on first use by `install`
/// and kept in the target folder under what the file says.
fn packages(requirements: &str, install: impl Fn(&Path, &Path)) -> PathBuf {
    let requirements = clients().join(requirements);
    let pinned = std::fs::read_to_string(&requirements).unwrap();
    let name = pinned.trim().replace(['=', '\n', ' ', '@', '[', ']'], "-");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("packages-{name}"));
    let done = folder.join("done");
    if !done.exists() {
        std::fs::create_dir_all(&folder).unwrap();
        install(&folder, &requirements);
        std::fs::write(done, "").unwrap();
    }
    folder
}

pub(crate) fn python_packages(requirements: &str) -> PathBuf {
    packages(requirements, |folder, requirements| {
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        let mut install = Command::new("python3");
        run(install.args(pip).arg("--target").arg(folder).arg("-r").arg(requirements));
    })
}

/// Runs a client's script against the server.
fn check(program: &str, script: &str, packages: (&str, &Path), server: &Server) {
    let (variable, folder) = packages;
    let mut command = Command::new(program);
    command.env(variable, folder).arg(clients().join(script)).arg(server.url("/v1"));
    assert_eq!(run(&mut command).trim(), "all is well", "{script}");
}

#[test]
fn the_openai_sdk_works_unchanged() {
    let server = Server::start(&[]);
    let folder = python_packages("requirements.txt");
    check("python3", "openai_sdk.py", ("PYTHONPATH", &folder), &server);
}

/// LangChain and LiteLLM, which many applications use instead of the SDK.
#[test]
#[ignore = "fetches 300 MB of packages"]
fn frameworks_work_unchanged() {
    let server = Server::start(&[]);
    let folder = python_packages("frameworks.txt");
    for script in ["frameworks_langchain.py", "frameworks_litellm.py"] {
        check("python3", script, ("PYTHONPATH", &folder), &server);
    }
}

#[test]
#[ignore = "needs node and npm"]
fn the_node_sdk_works_unchanged() {
    let server = Server::start(&[]);
    let folder = packages("node.txt", |folder, requirements| {
        let pinned = std::fs::read_to_string(requirements).unwrap();
        let npm = ["install", "--silent", "--no-audit", "--no-fund", "--prefix"];
        run(Command::new("npm").args(npm).arg(folder).arg(pinned.trim()));
    });
    check("node", "openai_node.mjs", ("PACKAGES", &folder), &server);
}

/// What the types make of an answer is the same JSON again, as far as they know its fields.
fn strict<T: DeserializeOwned + Serialize>(answer: &Value) -> T {
    let typed = serde_json::from_value(answer.clone());
    let typed: T = typed.unwrap_or_else(|error| panic!("{error}: {answer}"));
    let back = serde_json::to_value(&typed).unwrap();
    check_known(&back, answer, "$");
    typed
}

/// Every value that is in both is the same; nothing but null is in the typed one alone.
fn check_known(typed: &Value, answer: &Value, path: &str) {
    match (typed, answer) {
        (Value::Object(typed), Value::Object(answer)) => {
            for (key, value) in typed {
                let path = format!("{path}.{key}");
                match answer.get(key) {
                    Some(given) => check_known(value, given, &path),
                    None => assert!(value.is_null(), "{path} is {value} and was not sent"),
                }
            }
        }
        (Value::Array(typed), Value::Array(answer)) => {
            assert_eq!(typed.len(), answer.len(), "{path}");
            typed.iter().zip(answer).for_each(|(typed, answer)| check_known(typed, answer, path));
        }
        (Value::Number(typed), Value::Number(answer)) => {
            let (typed, answer) = (typed.as_f64().unwrap(), answer.as_f64().unwrap());
            assert!((typed - answer).abs() <= 1e-5 * answer.abs(), "{path}: {typed} {answer}");
        }
        _ => assert_eq!(typed, answer, "{path}"),
    }
}

/// The types of the Rust client async-openai are the strictest there are.
#[test]
fn answers_have_the_types_that_rust_clients_expect() {
    let server = Server::start(&[]);
    let ask = |path: &str, body: &Value| {
        let (status, answer) = post(&server.url(path), body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let (chat, text) = ("/v1/chat/completions", "/v1/completions");
    let generator = "smollm2-135m-instruct";
    let mut body = json!({
        "model": generator, "messages": [{"role": "user", "content": "Say a word."}],
        "max_tokens": 6, "n": 2, "logprobs": true, "top_logprobs": 2,
    });
    let typed: CreateChatCompletionResponse = strict(&ask(chat, &body));
    assert_eq!(typed.choices.len(), 2);
    let content = typed.choices[1].logprobs.as_ref().unwrap().content.as_ref().unwrap();
    assert_eq!(content[0].top_logprobs.len(), 2);
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let events = stream(&server.url(chat), &body).filter(|event| event != "[DONE]");
    let chunks: Vec<CreateChatCompletionStreamResponse> =
        events.map(|event| strict(&serde_json::from_str(&event).unwrap())).collect();
    let scored = chunks.iter().flat_map(|chunk| &chunk.choices).filter(|c| c.logprobs.is_some());
    assert!(scored.count() >= 2 && chunks.last().unwrap().usage.is_some());

    let mut body = json!({
        "model": generator, "prompt": ["One, two,", "A, B,"], "max_tokens": 6, "logprobs": 2,
    });
    let typed: CreateCompletionResponse = strict(&ask(text, &body));
    let logprobs = typed.choices[1].logprobs.as_ref().unwrap();
    assert_eq!((logprobs.tokens.len(), logprobs.text_offset[0]), (6, 0));
    body["stream"] = json!(true);
    for event in stream(&server.url(text), &body).filter(|event| event != "[DONE]") {
        strict::<CreateCompletionResponse>(&serde_json::from_str(&event).unwrap());
    }

    let body = json!({"model": "all-minilm-l6-v2", "input": ["a", "b"]});
    assert_eq!(strict::<CreateEmbeddingResponse>(&ask("/v1/embeddings", &body)).data.len(), 2);
    let models = |path: &str| -> Value {
        let (status, text) = get(&server.url(path));
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    };
    assert_eq!(strict::<ListModelResponse>(&models("/v1/models")).data.len(), 2);
    strict::<Model>(&models(&format!("/v1/models/{generator}")));
    let (status, error) = post(&server.url(chat), &json!({"model": generator, "n": 0}));
    assert_eq!(status, 400);
    let WrappedError { error } = strict(&error);
    assert_eq!(
        (error.param.as_deref(), error.code.as_deref()),
        (Some("n"), Some("invalid_request"))
    );
}

/// The Rust client async-openai, as its users call it.
#[test]
fn the_rust_client_works_unchanged() {
    let server = Server::start(&[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = OpenAIConfig::new().with_api_base(server.url("/v1")).with_api_key("none");
        let client = Client::with_config(config);
        rust_chat(&client).await;
        rust_embeddings(&client).await;
    });
}

/// A request of the client's own type.
fn typed<T: DeserializeOwned>(request: &Value) -> T {
    serde_json::from_value(request.clone()).unwrap()
}

async fn rust_chat(client: &Client<OpenAIConfig>) {
    let generator = "smollm2-135m-instruct";
    let mut request = json!({
        "model": generator, "max_completion_tokens": 24, "temperature": 0,
        "messages": [{"role": "user", "content": "Name three colours."}],
    });
    let chat = client.chat();
    let whole = chat.create(typed(&request)).await.unwrap();
    let text = whole.choices[0].message.content.clone().unwrap();
    assert!(text.contains("Red"), "{text}");
    let mut streamed = String::new();
    let mut chunks = chat.create_stream(typed(&request)).await.unwrap();
    while let Some(chunk) = chunks.next().await {
        for choice in chunk.unwrap().choices {
            streamed += choice.delta.content.as_deref().unwrap_or("");
        }
    }
    assert_eq!(streamed, text);
    request["n"] = json!(100);
    match chat.create(typed(&request)).await {
        Err(OpenAIError::ApiError(told)) => {
            assert_eq!(told.status_code.as_u16(), 400);
            assert_eq!(told.api_error.param.as_deref(), Some("n"), "{told}");
        }
        other => panic!("{other:?}"),
    }
    let prompt = json!({"model": generator, "prompt": "One, two,", "max_tokens": 4});
    let completed = client.completions().create(typed(&prompt)).await.unwrap();
    assert_eq!(completed.usage.unwrap().completion_tokens, 4);
    let models = client.models();
    assert_eq!(models.list().await.unwrap().data.len(), 2);
    assert_eq!(models.retrieve(generator).await.unwrap().id, generator);
}

async fn rust_embeddings(client: &Client<OpenAIConfig>) {
    let mut request = json!({"model": "all-minilm-l6-v2", "input": ["a small lamp", "a lamp"]});
    let floats = client.embeddings().create(typed(&request)).await.unwrap();
    assert_eq!(floats.data.len(), 2);
    request["encoding_format"] = json!("base64");
    let packed = client.embeddings().create_base64(typed(&request)).await.unwrap();
    for (floats, packed) in floats.data.iter().zip(&packed.data) {
        let bytes = STANDARD.decode(&packed.embedding.0).unwrap();
        let values = bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
        assert_eq!(values.collect::<Vec<_>>(), floats.embedding);
    }
}
