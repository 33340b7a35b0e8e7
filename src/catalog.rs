//! The models by name: what admission and the engine both look up. Knows no HTTP and no device.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::config::values::nearest;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{EncoderCard, ModelState, ModelTask};
use crate::request::LaneId;
use crate::text::ModelText;

/// One served model.
#[derive(Debug)]
pub struct Model {
    /// The manifest's name: the metric label and the API id.
    pub name: String,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// What it is for.
    pub task: ModelTask,
    /// Its lane: the index in the catalog.
    pub lane: LaneId,
    /// Unix seconds, for `created`.
    pub created: u64,
    /// Who is named as owner in `/v1/models`.
    pub owned_by: String,
    text: OnceLock<ModelText>,
    encoder: OnceLock<EncoderCard>,
    state: AtomicU8,
    context: AtomicU32,
    /// Predicted milliseconds until ready; 0 when unknown.
    eta_ms: AtomicU64,
}

/// All models, fixed at start.
#[derive(Debug, Default)]
pub struct Catalog {
    models: Vec<Model>,
    by_name: HashMap<String, LaneId>,
}

/// The fixed part of a [`Model`].
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// See [`Model::name`].
    pub name: String,
    /// See [`Model::aliases`].
    pub aliases: Vec<String>,
    /// See [`Model::task`].
    pub task: ModelTask,
    /// See [`Model::created`].
    pub created: u64,
    /// See [`Model::owned_by`].
    pub owned_by: String,
}

impl Catalog {
    /// A catalog in the given order; lane ids are the indices. Names and aliases are unique
    /// (checked by `config`).
    pub fn new(cards: Vec<ModelCard>) -> Self {
        let mut catalog = Catalog::default();
        for (index, card) in cards.into_iter().enumerate() {
            let lane = LaneId(index as u16);
            for name in card.aliases.iter().chain([&card.name]) {
                catalog.by_name.insert(name.clone(), lane);
            }
            catalog.models.push(Model::new(lane, card));
        }
        catalog
    }

    /// Every model, by lane.
    pub fn models(&self) -> &[Model] {
        &self.models
    }

    /// The model of a lane.
    pub fn lane(&self, lane: LaneId) -> &Model {
        &self.models[lane.0 as usize]
    }

    /// Looks a name or alias up.
    ///
    /// # Errors
    /// `ModelNotFound`, naming the nearest known name and the list.
    pub fn find(&self, name: &str) -> Result<&Model> {
        match self.by_name.get(name) {
            Some(&lane) => Ok(self.lane(lane)),
            None => Err(self.not_found(name)),
        }
    }

    /// The one model that is for any of `tasks`.
    ///
    /// # Errors
    /// `InvalidRequest` if there are several, `ModelNotFound` if there is none.
    pub fn only(&self, tasks: &[ModelTask]) -> Result<&Model> {
        let fitting: Vec<&Model> =
            self.models.iter().filter(|model| tasks.contains(&model.task)).collect();
        if let [model] = fitting[..] {
            return Ok(model);
        }
        let kinds: Vec<&str> = tasks.iter().map(|task| task.as_str()).collect();
        let kinds = kinds.join(" or ");
        if fitting.is_empty() {
            let message = format!("no model here is for {kinds}");
            return Err(Error::new(ErrorKind::ModelNotFound, message).at("model"));
        }
        let names: Vec<&str> = fitting.iter().map(|model| model.name.as_str()).collect();
        let message = format!(
            "several models are for {kinds}: {}; name one as 'model', or in the path as \
             /models/NAME/…",
            names.join(", ")
        );
        Err(Error::invalid("model", message))
    }

    fn not_found(&self, name: &str) -> Error {
        let known: Vec<&str> = self.models.iter().map(|model| model.name.as_str()).collect();
        let shown: String = name.chars().take(80).collect();
        let hint = nearest(name, self.by_name.keys().map(String::as_str));
        let hint = hint.map(|name| format!(" Did you mean '{name}'?")).unwrap_or_default();
        let list = known.join(", ");
        let message = format!("the model '{shown}' does not exist.{hint} Models here: {list}.");
        Error::new(ErrorKind::ModelNotFound, message).at("model")
    }
}

impl Model {
    fn new(lane: LaneId, card: ModelCard) -> Self {
        Self {
            name: card.name,
            aliases: card.aliases,
            task: card.task,
            lane,
            created: card.created,
            owned_by: card.owned_by,
            text: OnceLock::new(),
            encoder: OnceLock::new(),
            state: AtomicU8::new(ModelState::Absent as u8),
            context: AtomicU32::new(0),
            eta_ms: AtomicU64::new(0),
        }
    }

    /// Where it is on its way.
    pub fn state(&self) -> ModelState {
        ModelState::ALL[self.state.load(Ordering::Acquire) as usize]
    }

    /// Moves it on.
    pub fn set_state(&self, state: ModelState) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// Tokenizer and template.
    ///
    /// # Errors
    /// `ModelLoading` until they are there.
    pub fn text(&self) -> Result<&ModelText> {
        self.text.get().ok_or_else(|| self.loading())
    }

    /// Longest sequence in tokens: prompt and answer, or one input. The smaller of what the
    /// manifest allows and what the model was made for; 0 until its files are there.
    pub fn context(&self) -> u32 {
        self.context.load(Ordering::Acquire)
    }

    /// Gives it its tokenizer and template, and its longest sequence, once its files are there.
    pub fn set_text(&self, text: ModelText, context: u32) {
        self.context.store(context, Ordering::Release);
        let _ = self.text.set(text);
    }

    /// How an encoder's answers are to be read.
    ///
    /// # Errors
    /// `ModelLoading` until its files are there.
    pub fn encoder(&self) -> Result<&EncoderCard> {
        self.encoder.get().ok_or_else(|| self.loading())
    }

    /// Says how its answers are to be read, once its files are there and before its text is.
    pub fn set_encoder(&self, card: EncoderCard) {
        let _ = self.encoder.set(card);
    }

    /// Says how long loading may take.
    pub fn set_eta(&self, eta: std::time::Duration) {
        self.eta_ms.store(eta.as_millis() as u64, Ordering::Relaxed);
    }

    /// The error for a request that comes too early.
    pub fn loading(&self) -> Error {
        let eta = self.eta_ms.load(Ordering::Relaxed).clamp(1_000, 60_000);
        let state = self.state().as_str();
        let message = format!("the model '{}' is not ready yet (state: {state})", self.name);
        Error::new(ErrorKind::ModelLoading, message)
            .retry_after(std::time::Duration::from_millis(eta))
    }
}
