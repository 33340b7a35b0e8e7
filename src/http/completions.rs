//! `POST /v1/completions`: one answer for each prompt.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};

use super::answer::Prompt;
use super::generate::{self, Running};
use super::openai::{Answer, GenerateBody, TextChoice};
use super::openapi::{Operation, SERVED, TextBody};
use super::params::Params;
use super::sse::Shape;
use super::{Id, body, error};
use crate::admission::Front;
use crate::admission::ticket::Ticket;
use crate::error::{Error, Result};
use crate::model::ModelTask;
use crate::request::TokenId;

/// Most prompts in one request.
const PROMPTS_MAX: usize = 128;

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new().route("/v1/completions", post(create))
}

pub(super) fn operations() -> Vec<Operation> {
    let text = Operation::post("/v1/completions", "openai", "Goes on with a text, or several");
    vec![
        text.takes::<TextBody>()
            .gives::<Answer<'static, TextChoice<'static>>>()
            .streams::<Answer<'static, TextChoice<'static>>>()
            .refuses(error::WORDING, &SERVED),
    ]
}

async fn create(
    State(front): State<Arc<Front>>,
    Extension(id): Extension<Id>,
    request: Request,
) -> Response {
    let mut ticket = Ticket::new(Arc::clone(&front), ModelTask::Generate, id.0);
    match begin(&front, &mut ticket, request).await {
        Ok(running) => running.respond(&front, ticket).await,
        Err(error) => generate::refuse(ticket, &error),
    }
}

async fn begin(front: &Front, ticket: &mut Ticket, request: Request) -> Result<Running> {
    let mut body: GenerateBody = body::json(front, ticket, request).await?;
    let params = Params::take(&mut body, Shape::Text, &front.config.limits)?;
    let input = body.prompt.take();
    let input = input.ok_or_else(|| Error::invalid("prompt", "'prompt' is required"))?;
    if input.len() > PROMPTS_MAX {
        let message = format!("{} prompts, at most {PROMPTS_MAX}", input.len());
        return Err(Error::invalid("prompt", message));
    }
    let echoes = if params.echo { input.texts() } else { None };
    let name = generate::model_name(body.model.as_ref())?;
    let entry = front.enter(ticket, name, ModelTask::Generate)?;
    let prompts = input.encode_prompts(front, entry.text, entry.model.context(), "prompt").await?;
    let mut echoes = echoes.into_iter().flatten();
    let prompt = |tokens: Arc<[TokenId]>| {
        let echo = || echoes.next().unwrap_or_else(|| entry.text.tokenizer.decode(&tokens));
        Prompt { echo: params.echo.then(echo), tokens }
    };
    let prompts: Vec<Prompt> = prompts.into_iter().map(prompt).collect();
    generate::submit(front, ticket, entry, &params, &prompts)
}
