//! Server-sent events: the chunks of a streamed generation, pings while it is quiet, an error
//! event when it fails. All events that are ready go out in one write.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hyper::body::Frame;
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use super::answer::{Answers, Piece};
use super::error;
use super::logprobs::{ChatLogprobs, TextLogprobs};
use super::openai::{Answer, ChatDelta, Delta, GenerateUsage, TextChoice};
use crate::admission::ticket::Ticket;
use crate::error::Error;
use crate::request::Usage;
use crate::text::Tokenizer;

/// Bytes after which a write goes out although more is ready.
const WRITE_BYTES: usize = 16 * 1024;

/// How long a stream's status may stay open: until then a failure can still have its own.
pub(super) const HEADERS_HELD_MAX: Duration = Duration::from_secs(10);

/// Which of the two generation endpoints is answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Text,
}

impl Shape {
    /// New tokens when the caller does not say, the rest of the context at most: what the API
    /// promises.
    pub(super) fn default_max(self) -> u32 {
        match self {
            Shape::Chat => u32::MAX,
            Shape::Text => 16,
        }
    }
}

/// What all chunks of one stream have in common.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) shape: Shape,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) include_usage: bool,
    /// Set where log-probabilities are asked for: what names tokens.
    pub(super) scored: Option<Arc<Tokenizer>>,
}

/// The response that streams `answers`, with a comment line every `ping` of silence.
pub(super) fn response(head: Head, answers: Answers, ticket: Ticket, ping: Duration) -> Response {
    let mut opening = Vec::new();
    if head.shape == Shape::Chat {
        (0..answers.len()).for_each(|index| head.role(&mut opening, index as u32));
    }
    let expires = Box::pin(tokio::time::sleep_until(ticket.expires()));
    let quiet = Box::pin(tokio::time::sleep(ping));
    let stream = Stream { head, running: Some((answers, ticket)), opening, expires, quiet, ping };
    let mut response = Response::new(Body::new(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx buffers answers otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Stream {
    head: Head,
    /// None once the last byte is handed over.
    running: Option<(Answers, Ticket)>,
    opening: Vec<u8>,
    expires: Pin<Box<Sleep>>,
    quiet: Pin<Box<Sleep>>,
    ping: Duration,
}

impl Stream {
    /// Appends everything that is ready to `out`.
    fn fill(&mut self, context: &mut Context<'_>, out: &mut Vec<u8>) {
        while let Some((answers, _)) = &mut self.running
            && out.len() < WRITE_BYTES
        {
            match answers.poll_next(context) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(piece))) => self.head.piece(out, &piece),
                Poll::Ready(Some(Err(error))) => self.fail(out, &error),
                Poll::Ready(None) => {
                    let usage = answers.usage();
                    self.head.end(out, usage);
                    if let Some((_, mut ticket)) = self.running.take() {
                        ticket.finish(usage);
                    }
                }
            }
        }
    }

    /// Ends the stream with an error event: a cut socket could pass for the end of the answer.
    fn fail(&mut self, out: &mut Vec<u8>, error: &Error) {
        if let Some((answers, mut ticket)) = self.running.take() {
            event(out, &error::body(error, ticket.request_id()));
            ticket.spent(answers.usage());
            ticket.fail(error);
        }
    }
}

impl hyper::body::Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.running.is_none() {
            return Poll::Ready(None);
        }
        let mut out = std::mem::take(&mut self.opening);
        self.fill(context, &mut out);
        if out.is_empty() && self.expires.as_mut().poll(context).is_ready() {
            let error = self.running.as_ref().map(|(_, ticket)| ticket.expired());
            error.iter().for_each(|error| self.fail(&mut out, error));
        }
        if out.is_empty() && self.quiet.as_mut().poll(context).is_ready() {
            out.extend_from_slice(b": ping\n\n");
        }
        if out.is_empty() {
            return Poll::Pending;
        }
        let next = Instant::now() + self.ping;
        self.quiet.as_mut().reset(next);
        Poll::Ready(Some(Ok(Frame::data(out.into()))))
    }
}

impl Head {
    fn role(&self, out: &mut Vec<u8>, index: u32) {
        let delta = Delta { role: Some("assistant"), content: Some("") };
        self.chunk(out, &[ChatDelta { index, delta, logprobs: None, finish_reason: None }]);
    }

    fn piece(&self, out: &mut Vec<u8>, piece: &Piece) {
        let Piece { index, text, tokens, finish } = piece;
        let (index, finish_reason) = (*index, *finish);
        let scored = self.scored.as_deref().filter(|_| !tokens.is_empty());
        let adds = !text.is_empty() || scored.is_some();
        match self.shape {
            Shape::Text if adds || finish.is_some() => {
                let logprobs = scored.map(|tokenizer| TextLogprobs::new(tokenizer, tokens));
                self.chunk(out, &[TextChoice { text, index, logprobs, finish_reason }]);
            }
            Shape::Text => {}
            Shape::Chat => {
                let chunk = |out: &mut Vec<u8>, delta, logprobs, finish_reason| {
                    self.chunk(out, &[ChatDelta { index, delta, logprobs, finish_reason }]);
                };
                if adds {
                    let logprobs = scored.map(|tokenizer| ChatLogprobs::new(tokenizer, tokens));
                    chunk(out, Delta { role: None, content: Some(text) }, logprobs, None);
                }
                if finish.is_some() {
                    chunk(out, Delta::default(), None, finish_reason);
                }
            }
        }
    }

    fn end(&self, out: &mut Vec<u8>, usage: Usage) {
        if self.include_usage {
            let choices: &[TextChoice<'_>] = &[];
            self.write(out, choices, Some(Some(GenerateUsage::from(usage))));
        }
        event(out, b"[DONE]");
    }

    fn chunk<C: Serialize>(&self, out: &mut Vec<u8>, choices: &[C]) {
        self.write(out, choices, self.include_usage.then_some(None));
    }

    fn write<C: Serialize>(
        &self,
        out: &mut Vec<u8>,
        choices: &[C],
        usage: Option<Option<GenerateUsage>>,
    ) {
        let object = match self.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Text => "text_completion",
        };
        let (id, model, created) = (self.id.as_str(), self.model.as_str(), self.created);
        out.extend_from_slice(b"data: ");
        let answer = Answer { id, object, created, model, choices, usage };
        serde_json::to_writer(&mut *out, &answer).expect("strings and numbers always serialise");
        out.extend_from_slice(b"\n\n");
    }
}

fn event(out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\n\n");
}
