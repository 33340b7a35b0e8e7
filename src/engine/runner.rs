//! What runs a step: real models on a device, or the fake one of the tests.

use crate::request::LaneId;
use crate::scheduler::step::{Outcome, Step};

/// Runs steps. Called from the engine thread only.
pub trait Runner: Send {
    /// Computes `step` and fills `outcome` (cleared by the caller), `elapsed` included.
    ///
    /// # Errors
    /// The step failed; its requests are lost, the runner stays usable unless `fatal`.
    fn run(&mut self, step: &Step, outcome: &mut Outcome) -> Result<(), StepError>;

    /// Forgets a lane's page groups, after the scheduler took them back.
    fn forget(&mut self, lane: LaneId);
}

/// A step that failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("step failed: {message}")]
pub struct StepError {
    /// What happened.
    pub message: String,
    /// The device cannot be used any more: the process must end.
    pub fatal: bool,
}
