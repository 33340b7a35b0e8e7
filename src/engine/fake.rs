//! A runner without a device: answers at once, or after a given time; `faults.rs` makes it fail.
//! For tests of the loop and of the front, and for measuring the front alone.

use std::collections::VecDeque;
use std::time::Duration;

use crate::engine::residency::LoadedModel;
use crate::engine::runner::{Runner, StepError, StepErrorKind};
use crate::request::{LaneId, Logprobs, Micros, TokenId};
use crate::scheduler::step::{Outcome, Output, SlotId, SpanDetail, Step};

/// What the fake device does.
#[derive(Debug, Clone, Default)]
pub struct FakeDevice {
    /// Tokens that are "generated": `vocabulary[position % len]`.
    pub vocabulary: Vec<TokenId>,
    /// Values a vector, or a token's state.
    pub width: usize,
    /// Time of a step without rows.
    pub step: Duration,
    /// Time of each row.
    pub row: Duration,
    /// Models that cannot be installed at first, because there is no memory for them.
    pub full: u32,
}

/// Runs nothing, plausibly.
#[derive(Debug)]
pub struct FakeRunner {
    device: FakeDevice,
    done: VecDeque<(SlotId, Outcome)>,
}

impl FakeRunner {
    /// A runner over `device`.
    pub fn new(device: FakeDevice) -> Self {
        Self { device, done: VecDeque::new() }
    }

    fn answer(&self, step: &Step, outcome: &mut Outcome) {
        let asking = |detail: &&SpanDetail| detail.detail.logprobs.is_some();
        outcome.logprobs.extend(step.details.iter().filter(asking).map(|_| Logprobs::default()));
        for span in &step.spans {
            match span.output {
                Output::None => {}
                Output::Sample { position, .. } => {
                    let words = &self.device.vocabulary;
                    outcome.tokens.push(words[position as usize % words.len()]);
                }
                Output::Answer | Output::Hidden => {
                    let rows = if span.output == Output::Answer { 1 } else { span.len() };
                    let value = 1.0 / (self.device.width as f32).sqrt();
                    outcome.vectors.push(vec![value; rows * self.device.width]);
                }
            }
        }
    }
}

impl Runner for FakeRunner {
    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        let time = self.device.step + self.device.row * step.rows() as u32;
        if !time.is_zero() {
            std::thread::sleep(time);
        }
        let mut outcome = Outcome::default();
        self.answer(step, &mut outcome);
        outcome.elapsed = Micros(time.as_micros().max(1) as u64);
        self.done.push_back((step.slot, outcome));
        Ok(())
    }

    fn collect(&mut self, slot: SlotId, outcome: &mut Outcome) -> Result<(), StepError> {
        let found = self.done.iter().position(|(of, _)| *of == slot);
        let at = found.expect("collect follows submit");
        *outcome = self.done.remove(at).expect("just found").1;
        Ok(())
    }

    fn install(&mut self, _lane: LaneId, _model: LoadedModel) -> Result<(), StepError> {
        if self.device.full == 0 {
            return Ok(());
        }
        self.device.full -= 1;
        let message = "no memory for a model".to_owned();
        Err(StepError { message, kind: StepErrorKind::Memory })
    }
}
