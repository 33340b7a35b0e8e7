//! Lets requests in: looks the model up, tokenises, checks limits and predicted wait, and hands
//! over a ticket. Knows no HTTP and no engine, only the inbox.

mod bodies;
pub mod callers;
pub mod encode;
mod open;
mod queue;
mod quota;
pub mod ticket;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::DeserializeOwned;
use tokio::sync::mpsc::{self, error::TrySendError};

use crate::catalog::{Catalog, Model};
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::lifecycle::Lifecycle;
use crate::model::{ModelState, ModelTask};
use crate::request::{Events, Micros, Request, RequestId, Sink, Submission, Task, TokenId};
use crate::telemetry::{Rejection, Telemetry};
use crate::text::{Message, ModelText};
use bodies::Bodies;
use callers::Callers;
use open::OpenRequests;
use queue::Bounds;
use ticket::Ticket;

/// CPU work that takes no longer than this is done where it arises: async code may block 500 µs.
const INLINE_MAX: Micros = Micros(400);

/// Bytes of text that a tokenizer does in a microsecond, and a JSON parser: rather low than high.
const TOKENISED_PER_MICRO: usize = 4;
const PARSED_PER_MICRO: usize = 100;

/// What a message costs a template beside its text.
const RENDERED_A_MESSAGE: Micros = Micros(20);

/// Deepest nesting of lists and objects in a body.
const JSON_DEPTH_MAX: usize = 96;

/// No text of more characters than this a token of the limit is tokenised: it cannot fit, and
/// finding that out by tokenising is the attack. Prose has 4 to 5, indented code up to 8.
const CHARACTERS_PER_TOKEN_MAX: usize = 16;

/// What the front knows: everything it reads, and the one door to the engine.
pub struct Front {
    /// Limits and listeners.
    pub config: Arc<Config>,
    /// The models.
    pub catalog: Arc<Catalog>,
    /// What happens, counted.
    pub telemetry: Arc<Telemetry>,
    /// The phase, and who is in flight.
    pub lifecycle: Arc<Lifecycle>,
    /// Who may call.
    pub callers: Callers,
    /// The engine; bounded by `limits.queue_requests`.
    pub inbox: mpsc::Sender<Submission>,
    /// Memory for what is not in the inbox yet.
    bodies: Bodies,
    /// One permit for each CPU-heavy job that may run beside the async threads.
    heavy: Arc<tokio::sync::Semaphore>,
    open: OpenRequests,
    next_id: AtomicU64,
}

/// A model that a request may use.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its tokenizer and template.
    pub text: &'a ModelText,
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front").field("phase", &self.lifecycle.phase()).finish_non_exhaustive()
    }
}

impl Front {
    /// A front over one engine's inbox.
    pub fn new(
        config: Arc<Config>,
        catalog: Arc<Catalog>,
        telemetry: Arc<Telemetry>,
        lifecycle: Arc<Lifecycle>,
        callers: Callers,
        inbox: mpsc::Sender<Submission>,
    ) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            bodies: Bodies::new(config.server.max_body_bytes),
            config,
            catalog,
            telemetry,
            lifecycle,
            callers,
            inbox,
            heavy: Arc::new(tokio::sync::Semaphore::new(cores)),
            open: OpenRequests::default(),
            next_id: AtomicU64::new(1),
        })
    }

    /// Whether a request's body is worth reading; counts the request on its caller's key.
    ///
    /// # Errors
    /// `Draining`, `ModelLoading`, `DeviceFailed`, `RateLimited` when the caller's key has used up
    /// its limits.
    pub fn greet(&self, ticket: &mut Ticket) -> Result<()> {
        self.lifecycle.check_admits()?;
        ticket.take_quota()
    }

    /// Finds the model by name or alias and takes the in-flight guard; nothing is queued yet.
    ///
    /// # Errors
    /// `ModelNotFound`, `InvalidRequest` for a model of another task, `Draining`, `ModelLoading`.
    pub fn enter(&self, ticket: &mut Ticket, name: &str, task: ModelTask) -> Result<Entry<'_>> {
        let model = self.catalog.find(name)?;
        ticket.set_lane(model.lane);
        if model.task != task {
            let message = format!(
                "the model '{}' is for '{}', this endpoint is for '{}'",
                model.name,
                model.task.as_str(),
                task.as_str()
            );
            return Err(Error::invalid("model", message));
        }
        self.enter_model(ticket, model)
    }

    /// As [`Front::enter`], for a model that is found already, whatever it is for.
    ///
    /// # Errors
    /// `Draining`, `ModelLoading`.
    pub fn enter_model<'a>(&'a self, ticket: &mut Ticket, model: &'a Model) -> Result<Entry<'a>> {
        ticket.set_lane(model.lane);
        ticket.accepted(self.lifecycle.admit()?);
        match model.state() {
            ModelState::Ready | ModelState::Evicted => {}
            _ => return Err(model.loading()),
        }
        Ok(Entry { model, text: model.text()? })
    }

    /// Token ids of each prompt, wrapped in the model's own prefix and suffix tokens; control
    /// tokens may be written out, as in templates. They may be more than `limit`: only text that
    /// cannot fit is refused here.
    ///
    /// # Errors
    /// `ContextLengthExceeded`, naming the text's index and characters.
    pub async fn encode_prompts(
        &self,
        text: &ModelText,
        inputs: Vec<String>,
        limit: u32,
    ) -> Result<Vec<Arc<[TokenId]>>> {
        for (index, input) in inputs.iter().enumerate() {
            check_characters(index, input.len(), || input.chars().count(), limit)?;
        }
        let tokenizer = Arc::clone(&text.tokenizer);
        let bytes = inputs.iter().map(String::len).sum();
        self.heavy(tokenising(bytes), move || {
            inputs.iter().map(|input| Ok(tokenizer.encode_prompt(input)?.into())).collect()
        })
        .await
    }

    /// The prompt of a conversation; `flags` are what the template may look at besides.
    ///
    /// # Errors
    /// `ContextLengthExceeded` when it cannot fit; whatever the template refuses.
    pub async fn render(
        &self,
        text: &ModelText,
        messages: Vec<Message>,
        flags: Vec<(&'static str, bool)>,
        limit: u32,
    ) -> Result<Arc<[TokenId]>> {
        let template = text.template.clone().ok_or_else(|| {
            let message = "this model has no chat template; use /v1/completions";
            Error::new(ErrorKind::Unsupported, message).at("model")
        })?;
        let bytes = messages.iter().map(|message| message.content.len()).sum();
        let characters =
            || messages.iter().map(|message| message.content.chars().count()).sum::<usize>();
        check_characters(0, bytes, characters, limit)?;
        let tokenizer = Arc::clone(&text.tokenizer);
        let rendering = Micros(RENDERED_A_MESSAGE.0 * messages.len() as u64);
        self.heavy(tokenising(bytes).plus(rendering), move || {
            Ok(template.render_with(&tokenizer, &messages, &flags)?.into())
        })
        .await
    }

    /// Parses a JSON body.
    ///
    /// # Errors
    /// The parser's and the place that it is about, by way of `refuse`; `InvalidRequest` for one
    /// that is nested too deep.
    pub async fn parse<T: DeserializeOwned + Send + 'static>(
        &self,
        body: Vec<u8>,
        refuse: fn(&serde_path_to_error::Path, &serde_json::Error) -> Error,
    ) -> Result<T> {
        let expected = Micros((body.len() / PARSED_PER_MICRO) as u64);
        self.heavy(expected, move || {
            check_depth(&body)?;
            serde_json::from_slice(&body).map_err(|error| {
                // Keeping track of the place costs something: only what failed is parsed again.
                let again = &mut serde_json::Deserializer::from_slice(&body);
                match serde_path_to_error::deserialize::<_, T>(again) {
                    Err(placed) => refuse(placed.path(), placed.inner()),
                    Ok(_) => refuse(&serde_path_to_error::Track::new().path(), &error),
                }
            })
        })
        .await
    }

    /// Runs CPU work that takes about `expected`: here when that is short, else on the blocking
    /// pool, as many at once as there are cores. A caller that goes away frees no core early.
    ///
    /// # Errors
    /// Those of `job`; `Internal` if it panics.
    pub async fn heavy<T: Send + 'static>(
        &self,
        expected: Micros,
        job: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if expected <= INLINE_MAX {
            return catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|_| Err(panicked()));
        }
        let permit = Arc::clone(&self.heavy).acquire_owned().await;
        let running = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            job()
        });
        running.await.unwrap_or_else(|_| Err(panicked()))
    }

    /// Puts one request a task into the inbox, all or none, and gives a receiver for each.
    ///
    /// # Errors
    /// `QueueFull` with a predicted `Retry-After`, `TooLarge` for more tokens than the queue can
    /// ever hold, `DeviceFailed` when the engine is gone.
    pub fn submit(
        &self,
        ticket: &mut Ticket,
        model: &Model,
        tasks: Vec<Task>,
    ) -> Result<Vec<Events>> {
        let total = tasks.iter().map(|task| task.prompt_tokens() as u64).sum();
        let bounds = Bounds { limits: &self.config.limits, manifests: &self.config.manifests };
        let snapshot = self.telemetry.snapshot();
        if let Err((reason, error)) = bounds.check(&snapshot, model.lane, tasks.len(), total) {
            ticket.refused_for(reason);
            return Err(error);
        }
        let permits = self.inbox.try_reserve_many(tasks.len()).map_err(|error| match error {
            TrySendError::Full(()) => {
                ticket.refused_for(Rejection::QueueFull);
                bounds.inbox_full(&snapshot, model.lane)
            }
            TrySendError::Closed(()) => {
                Error::new(ErrorKind::DeviceFailed, "the engine has stopped; try another replica")
            }
        })?;
        ticket.submitted(total);
        let mut receivers = Vec::with_capacity(tasks.len());
        for (permit, task) in permits.zip(tasks) {
            let tokens = task.prompt_tokens() as u64;
            let (sink, events) = Sink::for_task(&task);
            ticket.metered(sink.meter());
            self.open.add(sink.weak());
            let request = Request {
                id: RequestId(self.next_id.fetch_add(1, Ordering::Relaxed)),
                lane: model.lane,
                tenant: ticket.tenant(),
                arrived: ticket.arrived(),
                deadline: Some(ticket.deadline()),
                task,
            };
            self.telemetry.submitted(model.lane, tokens);
            permit.send(Submission { request, sink });
            receivers.push(events);
        }
        Ok(receivers)
    }

    /// Ends everybody in flight with `error`, in the stead of an engine that says nothing.
    pub fn give_up(&self, error: &Error) {
        self.open.fail_all(error);
    }
}

/// The error for work that panicked: where and why is in the log.
fn panicked() -> Error {
    Error::new(ErrorKind::Internal, "work on this request failed: a defect of the server")
}

/// Refuses JSON in which lists and objects are nested deeper than any client means it: also in
/// fields that nobody reads.
fn check_depth(json: &[u8]) -> Result<()> {
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => depth += 1,
            b']' | b'}' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > JSON_DEPTH_MAX {
            let message = format!("the body is nested deeper than {JSON_DEPTH_MAX} levels");
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
    }
    Ok(())
}

fn tokenising(bytes: usize) -> Micros {
    Micros((bytes / TOKENISED_PER_MICRO) as u64)
}

fn check_characters(
    index: usize,
    bytes: usize,
    characters: impl Fn() -> usize,
    limit: u32,
) -> Result<()> {
    let most = limit as usize * CHARACTERS_PER_TOKEN_MAX;
    if bytes <= most {
        return Ok(());
    }
    let characters = characters();
    if characters <= most {
        return Ok(());
    }
    let message = format!(
        "input {index} has {characters} characters; the model takes {limit} tokens \
         (limits.context), and no more than {most} characters are looked at"
    );
    Err(Error::new(ErrorKind::ContextLengthExceeded, message))
}
