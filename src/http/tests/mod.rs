//! The front over a hand-driven engine: wire shapes, errors, listeners.

mod admin;
mod auth;
mod choices;
mod edge;
mod limits;
mod embeddings;
mod encoders;
mod errors;
mod generate;
mod hostile;
mod kserve;
mod openapi;
mod rerank;
mod tei;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::sync::mpsc;
use tower::ServiceExt;

use super::{admin_router, main_router};
use crate::admission::{Front, testing};
use crate::config::Config;
use crate::request::Submission;

/// A front and its routers, without sockets.
pub(super) struct App {
    pub(super) front: Arc<Front>,
    main: Router,
    admin: Router,
}

/// A whole response.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
}

impl App {
    pub(super) fn new(config: Config) -> (Self, mpsc::Receiver<Submission>) {
        Self::over(testing::front(config))
    }

    fn over(
        (front, inbox): (Arc<Front>, mpsc::Receiver<Submission>),
    ) -> (Self, mpsc::Receiver<Submission>) {
        let main = main_router(Arc::clone(&front));
        let admin = admin_router(Arc::clone(&front));
        (Self { front, main, admin }, inbox)
    }

    /// An app whose engine answers every submission with `script`.
    pub(super) fn scripted(script: impl FnMut(Submission) + Send + 'static) -> Self {
        let (app, inbox) = Self::new(Config::default());
        drive(&app.front, inbox, script);
        app
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Reply {
        reply(self.main.clone(), request).await
    }

    pub(super) async fn admin(&self, request: Request<Body>) -> Reply {
        reply(self.admin.clone(), request).await
    }

    pub(super) async fn post(&self, path: &str, body: impl Into<Body>) -> Reply {
        self.send(post(path, body)).await
    }

    pub(super) async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }
}

impl Reply {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

pub(super) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

async fn reply(router: Router, request: Request<Body>) -> Reply {
    let response = router.oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let body = String::from_utf8(body.to_vec()).unwrap();
    Reply { status: parts.status, headers: parts.headers, body }
}

/// Answers every submission with `script`, counting it out of the inbox as the engine does.
pub(super) fn drive(
    front: &Arc<Front>,
    mut inbox: mpsc::Receiver<Submission>,
    mut script: impl FnMut(Submission) + Send + 'static,
) {
    let telemetry = Arc::clone(&front.telemetry);
    tokio::spawn(async move {
        while let Some(submission) = inbox.recv().await {
            let asked = &submission.request;
            telemetry.received(asked.lane, asked.task.prompt_tokens() as u64);
            script(submission);
        }
    });
}
