//! Models that are loaded while others serve, and wait for memory if others hold it. Knows the
//! engine as a channel only.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use crate::catalog::Model;
use crate::engine::Install;
use crate::engine::residency::{LoadedModel, OpenedModel};
use crate::engine::runner::{StepError, StepErrorKind};
use crate::engine::start::Startup;
use crate::kernels::builder::Capacity;
use crate::model::ModelState;
use crate::request::LaneId;

/// How long to wait before a model for which there was no memory is tried again, at first and at
/// most.
const MEMORY_REST: Duration = Duration::from_secs(1);
const MEMORY_REST_MAX: Duration = Duration::from_secs(60);

/// A model that is loaded while others serve.
pub struct Later {
    pub(super) lane: LaneId,
    pub(super) opened: OpenedModel,
    pub(super) capacity: Capacity,
}

impl Startup {
    /// Loads what was left for later; `install` brings each into the running engine.
    pub fn load_later(&self, later: Vec<Later>, install: &UnboundedSender<Install>) {
        for Later { lane, opened, capacity } in later {
            let model = self.catalog.lane(lane);
            let loaded = match self.timed_load(model, &opened, capacity) {
                Ok(loaded) => loaded,
                Err(error) => {
                    tracing::error!(model = model.name, %error, "model cannot be loaded");
                    self.set_state(model, ModelState::Failed);
                    continue;
                }
            };
            match self.install(model, &loaded, install) {
                Some(Ok(())) => self.set_state(model, ModelState::Ready),
                Some(Err(error)) => {
                    tracing::error!(model = model.name, %error, "model cannot be installed");
                    self.set_state(model, ModelState::Failed);
                }
                // The engine has ended: nobody will be served any more.
                None => return,
            }
        }
    }

    /// Brings a model into the running engine, as soon as there is memory for it: others may hold
    /// what it needs, and give it back. None when the engine has ended.
    fn install(
        &self,
        model: &Model,
        loaded: &LoadedModel,
        install: &UnboundedSender<Install>,
    ) -> Option<Result<(), StepError>> {
        let mut rest = MEMORY_REST;
        loop {
            let (installed, answer) = std::sync::mpsc::channel();
            let (lane, copy) = (model.lane, loaded.clone());
            install.send(Install { lane, model: copy, installed }).ok()?;
            match answer.recv().ok()? {
                Err(error) if error.kind == StepErrorKind::Memory => {
                    tracing::warn!(model = model.name, %error, ?rest, "no memory for a model yet");
                    model.set_eta(rest);
                    std::thread::sleep(rest);
                    rest = (rest * 2).min(MEMORY_REST_MAX);
                }
                result => return Some(result),
            }
        }
    }
}
