//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};

use super::answer::Prompt;
use super::generate::{self, Running};
use super::object::Object;
use super::openai::{Answer, ChatChoice, ChatDelta, ChatMessage, Content, GenerateBody};
use super::openapi::{ChatBody, Operation, SERVED};
use super::params::{self, Params};
use super::sse::Shape;
use super::{Id, body, error};
use crate::admission::Front;
use crate::admission::ticket::Ticket;
use crate::error::{Error, ErrorKind, Result};
use crate::model::ModelTask;
use crate::text::Message;

/// Most messages in a conversation.
const MESSAGES_MAX: usize = 2048;

/// Longest `name` of a message, in characters.
const NAME_CHARACTERS_MAX: usize = 64;

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

pub(super) fn router() -> Router<Arc<Front>> {
    Router::new().route("/v1/chat/completions", post(create))
}

pub(super) fn operations() -> Vec<Operation> {
    let chat = Operation::post("/v1/chat/completions", "openai", "Answers a conversation");
    vec![
        chat.takes::<ChatBody>()
            .gives::<Answer<'static, ChatChoice<'static>>>()
            .streams::<Answer<'static, ChatDelta<'static>>>()
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
    let mut params = Params::take(&mut body, Shape::Chat, &front.config.limits)?;
    let messages = messages(body.messages.take().unwrap_or_default())?;
    let name = generate::model_name(body.model.as_ref())?;
    let entry = front.enter(ticket, name, ModelTask::Generate)?;
    params::check_effort(body.reasoning_effort.as_deref(), entry.text.template.as_deref())?;
    let flags = std::mem::take(&mut params.flags);
    let tokens = front.render(entry.text, messages, flags, entry.model.context()).await?;
    generate::submit(front, ticket, entry, &params, &[Prompt { tokens, echo: None }])
}

fn messages(given: Vec<Object<ChatMessage>>) -> Result<Vec<Message>> {
    if given.is_empty() {
        return Err(Error::invalid("messages", "'messages' has to have at least one message"));
    }
    if given.len() > MESSAGES_MAX {
        let message = format!("{} messages, at most {MESSAGES_MAX}", given.len());
        return Err(Error::invalid("messages", message));
    }
    given.into_iter().enumerate().map(|(index, Object(message))| flatten(index, message)).collect()
}

fn flatten(index: usize, message: ChatMessage) -> Result<Message> {
    let invalid = |what: String| Error::invalid("messages", format!("message {index}: {what}"));
    let unsupported = |what: String| {
        let message = format!("message {index}: {what}");
        Error::new(ErrorKind::Unsupported, message).at("messages")
    };
    if !ROLES.contains(&message.role.as_str()) {
        let shown: String = message.role.chars().take(40).collect();
        return Err(invalid(format!("role '{shown}' is none of {}", ROLES.join(", "))));
    }
    let name = message.name.as_deref().unwrap_or("");
    if name.chars().count() > NAME_CHARACTERS_MAX {
        return Err(invalid(format!("its name has more than {NAME_CHARACTERS_MAX} characters")));
    }
    if message.tool_calls.is_some_and(|calls| !calls.is_empty()) {
        return Err(unsupported("tool_calls are not served".into()));
    }
    match message.content {
        Some(Content::Text(content)) => Ok(Message { role: message.role, content }),
        Some(Content::NotText(kind)) => {
            let shown: String = kind.chars().take(40).collect();
            Err(unsupported(format!("content parts of type '{shown}' are not served")))
        }
        None => Err(invalid("it has no content".into())),
    }
}
