//! A runner that goes wrong when it is told to, over another one: over the fake device in unit
//! tests, over a real model in tests of the whole process. Never part of a release build's server.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use crate::device::cuda::fault::Fault as DeviceFault;
use crate::engine::residency::LoadedModel;
use crate::engine::runner::{Runner, StepError, StepErrorKind};
use crate::request::LaneId;
use crate::scheduler::step::{Outcome, SlotId, Step};

/// A way to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The step panics.
    Panic,
    /// The step fails for a reason of its own; the device goes on.
    Step,
    /// The device fails, as its driver would say it.
    Device(DeviceFault),
    /// The step takes this much longer.
    Slow(Duration),
    /// The step does not end as long as the script tells it not to.
    Hang,
}

/// When to go wrong.
#[derive(Debug, Clone)]
pub enum Script {
    /// At these steps, counted from 0.
    Steps(Vec<(Range<u64>, Fault)>),
    /// At every step of this lane.
    Lane(LaneId, Fault),
    /// As long as this file is there: it holds a fault's word, and perhaps a lane's number. So a
    /// test can wait until requests are in flight.
    File(PathBuf),
}

/// Goes wrong as scripted; else does what `inner` does.
pub struct FaultyRunner {
    inner: Box<dyn Runner>,
    script: Script,
    steps: u64,
}

impl Fault {
    /// By its word: `panic`, `step`, `slow`, `hang`, or a device's failure.
    pub fn of(word: &str) -> Option<Self> {
        let device = DeviceFault::ALL.into_iter().find(|fault| fault.as_str() == word);
        match word {
            "panic" => Some(Fault::Panic),
            "step" => Some(Fault::Step),
            "slow" => Some(Fault::Slow(Duration::from_millis(300))),
            "hang" => Some(Fault::Hang),
            _ => device.map(Fault::Device),
        }
    }
}

impl Script {
    /// The fault that step `number` meets, if any.
    fn fault(&self, number: u64, lane: LaneId) -> Option<Fault> {
        match self {
            Script::Steps(steps) => {
                steps.iter().find(|(at, _)| at.contains(&number)).map(|(_, fault)| *fault)
            }
            Script::Lane(of, fault) => (*of == lane).then_some(*fault),
            Script::File(path) => {
                let text = std::fs::read_to_string(path).ok()?;
                let mut words = text.split_whitespace();
                let fault = Fault::of(words.next()?);
                let of = words.next().map_or(Some(lane.0), |number| number.parse().ok());
                fault.filter(|_| of == Some(lane.0))
            }
        }
    }
}

impl FaultyRunner {
    /// `inner`, with faults.
    pub fn new(inner: Box<dyn Runner>, script: Script) -> Self {
        Self { inner, script, steps: 0 }
    }
}

/// Gives a debug build's server the faults of the file that `SCONCE_TEST_FAULTS` names. Whoever
/// can set a process's environment can end it anyway; a release build does not look.
pub fn scripted(runner: Box<dyn Runner>) -> Box<dyn Runner> {
    match std::env::var_os("SCONCE_TEST_FAULTS") {
        Some(file) if cfg!(debug_assertions) => {
            tracing::warn!(?file, "this server fails on command: it is being tested");
            Box::new(FaultyRunner::new(runner, Script::File(file.into())))
        }
        _ => runner,
    }
}

impl Runner for FaultyRunner {
    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        let (number, lane) = (self.steps, step.lane);
        self.steps += 1;
        match self.script.fault(number, lane) {
            None => {}
            Some(Fault::Panic) => panic!("told to panic"),
            Some(Fault::Step) => return Err(StepError::step("told to fail")),
            Some(Fault::Device(fault)) => {
                let message = format!("{}: told to fail", fault.as_str());
                return Err(StepError { message, kind: StepErrorKind::of(fault) });
            }
            Some(Fault::Slow(time)) => std::thread::sleep(time),
            Some(Fault::Hang) => {
                while self.script.fault(number, lane) == Some(Fault::Hang) {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
        self.inner.submit(step)
    }

    fn collect(&mut self, slot: SlotId, outcome: &mut Outcome) -> Result<(), StepError> {
        self.inner.collect(slot, outcome)
    }

    fn install(&mut self, lane: LaneId, model: LoadedModel) -> Result<(), StepError> {
        self.inner.install(lane, model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_names_a_fault_and_perhaps_a_lane() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("fault");
        let script = Script::File(file.clone());
        assert_eq!(script.fault(0, LaneId(0)), None, "no file");
        let ecc = Some(Fault::Device(DeviceFault::Ecc));
        for (text, first, second) in [
            ("hang", Some(Fault::Hang), Some(Fault::Hang)),
            ("ecc 1\n", None, ecc),
            ("earthquake", None, None),
            ("", None, None),
        ] {
            std::fs::write(&file, text).unwrap();
            let seen = [0, 1].map(|lane| script.fault(7, LaneId(lane)));
            assert_eq!(seen, [first, second], "{text}");
        }
    }
}
