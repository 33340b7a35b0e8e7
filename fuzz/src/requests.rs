//! One request through the router, and what every answer to it has to be.

use std::cell::RefCell;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use sconce::admission::Front;
use sconce::http::{admin_router, main_router};
use sconce::request::{Event, Finish, Generate, Logprobs, Submission, Task, Usage, Yield};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tower::ServiceExt;

use crate::front::{WIDTH, front};

/// Where a body may go. The first byte of an input chooses.
const PATHS: [&str; 20] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/embed",
    "/embed_all",
    "/similarity",
    "/predict",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/tokenize",
    "/decode",
    "/models/vec",
    "/models/mood/predict",
    "/models/rank/rerank",
    "/models/tiny/tokenize",
    "/v2/models/vec/infer",
    "/v2/models/rank/infer",
    "/v2/models/mood/versions/1/infer",
    "/drain",
];

/// Most tokens that the engine says.
const TOKENS_MAX: u32 = 8;

/// The routers, and the engine's end of the inbox.
pub struct Site {
    runtime: Runtime,
    front: Arc<Front>,
    main: Router,
    admin: Router,
    inbox: RefCell<mpsc::Receiver<Submission>>,
}

impl Site {
    /// A site that serves.
    pub fn open() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let (front, inbox) = front();
        Self {
            runtime: runtime.expect("a runtime"),
            main: main_router(Arc::clone(&front)),
            admin: admin_router(Arc::clone(&front)),
            front,
            inbox: RefCell::new(inbox),
        }
    }
}

/// Sends the input and checks the answer: its first byte is the path, its second how the engine
/// answers, the rest the body.
pub fn check(site: &Site, data: &[u8]) {
    let [path, manner, body @ ..] = data else { return };
    let path = PATHS[usize::from(*path) % PATHS.len()];
    let mut request = Request::post(path);
    // The binary form of tensors.
    if path.ends_with("/infer") && manner & 1 == 1 {
        let json = body.iter().rposition(|&byte| byte == b'}').map_or(0, |last| last + 1);
        request = request.header("inference-header-content-length", json);
    }
    let request = request.body(Body::from(body.to_vec())).expect("a request");
    // A drain without a word from this machine is refused, with whatever body.
    let router = if path == "/drain" { &site.admin } else { &site.main };
    let (status, kind, answer) = site.runtime.block_on(async {
        let mut inbox = site.inbox.borrow_mut();
        let answered = async {
            let response = router.clone().oneshot(request).await.expect("no error but answers");
            let (parts, body) = response.into_parts();
            let body = body.collect().await.expect("no error but answers").to_bytes();
            let kind = parts.headers.get(header::CONTENT_TYPE).cloned();
            (parts.status, kind.expect("a content type"), body)
        };
        let mut answered = std::pin::pin!(answered);
        loop {
            tokio::select! {
                answer = &mut answered => return answer,
                Some(submission) = inbox.recv() => answer_with(&site.front, submission, *manner),
            }
        }
    });
    let shown = || String::from_utf8_lossy(&answer);
    // A model of another kind is 424 in TEI's own words.
    assert!(!status.is_server_error(), "{path}: {status} {}", shown());
    if kind == "text/event-stream" {
        assert_eq!(status, StatusCode::OK);
        assert!(answer.ends_with(b"data: [DONE]\n\n"), "{path}: {}", shown());
        let text = std::str::from_utf8(&answer).expect("a stream is UTF-8");
        for event in text.split_terminator("\n\n").filter(|event| *event != "data: [DONE]") {
            let json = event.strip_prefix("data: ").expect("an event is one line of data");
            serde_json::from_str::<serde_json::Value>(json).expect("an event is JSON");
        }
        return;
    }
    assert_eq!(kind, "application/json");
    let json = serde_json::from_slice::<serde_json::Value>(&answer);
    assert!(json.is_ok(), "{path}: {status} {}", shown());
}

/// Says what a sound engine may say.
fn answer_with(front: &Front, submission: Submission, manner: u8) {
    let Submission { request, sink } = submission;
    let mut usage = Usage::default();
    match &request.task {
        Task::Generate(generate) => {
            let prompt = generate.prompt.len();
            front.telemetry.received(request.lane, prompt as u64);
            sink.send(Event::Started { cached_tokens: 0 });
            let count = generate.max_tokens.min(TOKENS_MAX).min(u32::from(manner));
            for step in 0..count {
                let text = generate.prompt[step as usize % prompt];
                sink.send(token(generate, (text + u32::from(manner) * step) % 256));
            }
            usage = Usage { prompt_tokens: prompt as u32, generated_tokens: count, ..usage };
            let finish = if manner & 2 == 0 { Finish::Stop } else { Finish::Length };
            sink.send(Event::Done { finish, usage });
        }
        Task::Encode(encode) => {
            front.telemetry.received(request.lane, encode.tokens());
            for (index, input) in (0..).zip(&encode.inputs) {
                let rows = if encode.yields == Yield::Tokens { input.tokens.len() } else { 1 };
                let values = vec![f32::from(manner) - 100.0; rows * WIDTH as usize];
                sink.send(Event::Vector { index, values });
            }
            usage.prompt_tokens = encode.tokens() as u32;
            sink.send(Event::Done { finish: Finish::Complete, usage });
        }
    }
}

/// A token, with its log-probability where that is asked for.
fn token(generate: &Generate, token: u32) -> Event {
    match generate.detail.logprobs {
        None => Event::Token(token),
        Some(top) => {
            let top = (0..u32::from(top)).map(|other| (other * 13 % 257, -1.5)).collect();
            Event::Scored { token, logprobs: Box::new(Logprobs { chosen: -0.5, top }) }
        }
    }
}
