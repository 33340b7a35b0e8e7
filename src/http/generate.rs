//! What chat and completions share once they have their prompts: submit, then stream or collect.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use super::answer::{Answers, Manner, Prompt, ScoredToken};
use super::logprobs::{ChatLogprobs, TextLogprobs};
use super::openai::{Answer, AnswerMessage, ChatChoice, GenerateUsage, TextChoice};
use super::params::Params;
use super::sse::{self, Head, Shape};
use super::{error, whole};
use crate::admission::ticket::Ticket;
use crate::admission::{Entry, Front};
use crate::error::{Error, Result};
use crate::request::{Generate, Sampling, Task};

/// Most answers to one request.
const REQUESTS_MAX: usize = 128;

/// Answers that are on their way.
pub(super) struct Running {
    head: Head,
    answers: Answers,
    stream: bool,
}

/// The model's name out of a body.
///
/// # Errors
/// `InvalidRequest` if there is none.
pub(super) fn model_name(name: Option<&String>) -> Result<&str> {
    name.map(String::as_str).ok_or_else(|| Error::invalid("model", "'model' is required"))
}

/// Submits a request for each choice of each prompt.
///
/// # Errors
/// `ContextLengthExceeded`, `InvalidRequest` for more choices than can ever wait, and whatever
/// admission refuses.
pub(super) fn submit(
    front: &Front,
    ticket: &mut Ticket,
    entry: Entry<'_>,
    params: &Params,
    prompts: &[Prompt],
) -> Result<Running> {
    let Entry { model, text } = entry;
    let requests = prompts.len() * params.choices as usize;
    let most = REQUESTS_MAX.min(front.config.limits.queue_requests);
    if requests > most {
        let message = format!(
            "{} prompts with n {} are {requests} answers, at most {most} (limits.queue_requests, \
             and no more than {REQUESTS_MAX})",
            prompts.len(),
            params.choices
        );
        return Err(Error::invalid(if params.choices > 1 { "n" } else { "prompt" }, message));
    }
    let mut tasks = Vec::with_capacity(requests);
    for prompt in prompts {
        let first = params.generate(Arc::clone(&prompt.tokens), text, model.context())?;
        tasks.extend((0..params.choices).map(|choice| {
            let sampling = Sampling { choice, ..first.sampling };
            Task::Generate(Generate { sampling, ..first.clone() })
        }));
    }
    let events = front.submit(ticket, model, tasks)?;
    let prefix = if params.shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let scored = params.detail.logprobs.is_some();
    let head = Head {
        shape: params.shape,
        id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
        created: now.as_secs(),
        model: model.name.clone(),
        include_usage: params.include_usage,
        scored: scored.then(|| Arc::clone(&text.tokenizer)),
    };
    let choices = params.choices as usize;
    let manner = Manner { tokenizer: &text.tokenizer, stops: &params.stops, scored, choices };
    let answers = Answers::new(prompts, events, &manner);
    Ok(Running { head, answers, stream: params.stream })
}

/// What has come of one choice.
#[derive(Default)]
struct Whole {
    text: String,
    tokens: Vec<ScoredToken>,
    finish: Option<&'static str>,
}

impl Running {
    /// The HTTP response, whole or streamed.
    pub(super) async fn respond(mut self, front: &Front, mut ticket: Ticket) -> Response {
        let result = if self.stream {
            self.wait_for_headers(front, &ticket).await.map(|()| None)
        } else {
            match timeout_at(ticket.expires(), self.collect()).await {
                Ok(whole) => whole.map(Some),
                Err(_) => Err(ticket.expired()),
            }
        };
        match result {
            Ok(None) => {
                sse::response(self.head, self.answers, ticket, front.config.limits.sse_ping)
            }
            Ok(Some(json)) => {
                let usage = self.answers.usage();
                whole::answered(ticket, usage, json)
            }
            Err(error) => {
                ticket.spent(self.answers.usage());
                refuse(ticket, &error)
            }
        }
    }

    /// A stream's status is still open until its first token: a failure before that gets a real
    /// status, which clients know how to retry. Not for longer than a ping, for proxies' sake.
    async fn wait_for_headers(&mut self, front: &Front, ticket: &Ticket) -> Result<()> {
        let ping = Instant::now() + front.config.limits.sse_ping.min(sse::HEADERS_HELD_MAX);
        match timeout_at(ping.min(ticket.expires()), self.answers.begin()).await {
            Ok(first) => first,
            Err(_) if Instant::now() >= ticket.expires() => Err(ticket.expired()),
            Err(_) => Ok(()),
        }
    }

    async fn collect(&mut self) -> Result<Vec<u8>> {
        let mut choices: Vec<Whole> = Vec::new();
        choices.resize_with(self.answers.len(), Whole::default);
        while let Some(piece) = self.answers.next().await {
            let piece = piece?;
            let choice = &mut choices[piece.index as usize];
            choice.text += &piece.text;
            choice.tokens.extend(piece.tokens);
            choice.finish = piece.finish.or(choice.finish);
        }
        let choices = (0_u32..).zip(&choices);
        let scored = self.head.scored.as_deref();
        Ok(match self.head.shape {
            Shape::Chat => {
                let choices = choices.map(|(index, Whole { text, tokens, finish })| {
                    let message = AnswerMessage { role: "assistant", content: text, refusal: None };
                    let logprobs = scored.map(|tokenizer| ChatLogprobs::new(tokenizer, tokens));
                    let finish_reason = finish.unwrap_or("stop");
                    ChatChoice { index, message, logprobs, finish_reason }
                });
                self.whole("chat.completion", &choices.collect::<Vec<_>>())
            }
            Shape::Text => {
                let choices = choices.map(|(index, Whole { text, tokens, finish })| {
                    let logprobs = scored.map(|tokenizer| TextLogprobs::new(tokenizer, tokens));
                    TextChoice { text, index, logprobs, finish_reason: *finish }
                });
                self.whole("text_completion", &choices.collect::<Vec<_>>())
            }
        })
    }

    fn whole<C: Serialize>(&self, object: &'static str, choices: &[C]) -> Vec<u8> {
        let usage = Some(Some(GenerateUsage::from(self.answers.usage())));
        let Head { id, model, created, .. } = &self.head;
        let answer = Answer { id, object, created: *created, model, choices, usage };
        serde_json::to_vec(&answer).expect("strings and numbers always serialise")
    }
}

/// Ends the ticket with `error` and says so.
pub(super) fn refuse(mut ticket: Ticket, error: &Error) -> Response {
    ticket.fail(error);
    error::response(error, ticket.request_id())
}

/// 200 with a JSON body.
pub(super) fn json_response(json: impl Into<Body>) -> Response {
    let mut response = Response::new(json.into());
    let content_type = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}
