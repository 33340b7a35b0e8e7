//! The loop over a device that goes wrong: what ends, what goes on, and who is told what.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::arch::Outline;
use crate::device::cuda::fault::Fault as DeviceFault;
use crate::engine::faults::Fault;
use crate::engine::residency::LoadedModel;
use crate::engine::runner::{StepError, StepErrorKind};
use crate::kernels::ops::Program;
use crate::lifecycle::last_words::Reason;
use crate::model::ModelState;

/// Faults at steps counted from 0.
fn at(steps: &[u64], fault: Fault) -> Script {
    Script::Steps(steps.iter().map(|step| (*step..step + 1, fault)).collect())
}

impl Bench {
    fn failing(device: FakeDevice, script: Script) -> Self {
        Self::over(device, script, [true, true])
    }

    fn failing_at(depth: u8, device: FakeDevice, script: Script) -> Self {
        Self::deep(device, script, [true, true], depth)
    }

    fn embed(&mut self, inputs: usize) -> Events {
        let inputs = (0..inputs).map(|_| Text::single(vec![7; 20])).collect();
        self.ask(EMBED, Task::Encode(Encode { inputs, yields: Yield::Answer }))
    }

    fn errors(&self, kind: &str) -> f64 {
        let series = format!("sconce_device_errors_total{{kind=\"{kind}\"}} ");
        let page = self.telemetry.render();
        let line = page.lines().find_map(|line| line.strip_prefix(&series));
        line.unwrap_or_else(|| panic!("no {series}")).parse().unwrap()
    }

    fn stop(&mut self) {
        self.phase.send(Phase::Closing).unwrap();
        assert_eq!(self.end(), Ending::Stopped);
    }
}

#[test]
fn a_panic_in_a_step_fails_that_batch_only() {
    let faults = [Fault::Panic, Fault::Step, Fault::Device(DeviceFault::Call)];
    for (fault, depth) in faults.into_iter().flat_map(|fault| [(fault, 1), (fault, 2)]) {
        let mut bench = Bench::failing_at(depth, device(), at(&[1], fault));
        let events = bench.generate(4);
        let heard = bench.hear(events);
        assert_eq!(tokens(&heard), [8]);
        assert_eq!(failure(&heard), Some(ErrorKind::StepFailed));
        let events = bench.generate(4);
        assert_eq!(tokens(&bench.hear(events)), [8, 5, 6, 7], "the next one is served");
        bench.stop();
        let kind = if fault == Fault::Panic { "panic" } else { "step" };
        assert_eq!((bench.errors(kind), bench.errors("fatal")), (1.0, 0.0));
    }
}

#[test]
fn a_dead_device_tells_everybody_and_ends_the_engine() {
    let sticky = DeviceFault::ALL.into_iter().filter(|fault| fault.is_sticky());
    for fault in sticky {
        let step = Duration::from_millis(5);
        let script = at(&[3], Fault::Device(fault));
        let mut bench = Bench::failing(FakeDevice { step, ..device() }, script);
        let running: Vec<Events> = (0..3).map(|_| bench.generate(100)).collect();
        for events in running {
            assert_eq!(failure(&bench.hear(events)), Some(ErrorKind::DeviceFailed));
        }
        let Ending::Failed(failure) = bench.end() else { panic!("it goes on") };
        assert_eq!(failure.reason, Reason::Device);
        assert!(failure.message.contains(fault.as_str()), "{}", failure.message);
        assert!(bench.inbox.is_closed(), "nobody is let in any more");
        assert_eq!(bench.errors("fatal"), 1.0);
    }
}

#[test]
fn a_model_that_fails_alone_is_taken_out_and_others_go_on() {
    for fault in [Fault::Step, Fault::Panic] {
        let mut bench = Bench::failing(device(), Script::Lane(GENERATE, fault));
        bench.catalog.lane(GENERATE).set_state(ModelState::Ready);
        for _ in 0..3 {
            let events = bench.generate(4);
            assert_eq!(failure(&bench.hear(events)), Some(ErrorKind::StepFailed));
        }
        for _ in 0..5 {
            let events = bench.embed(2);
            let heard = bench.hear(events);
            assert!(matches!(heard.last(), Some(Event::Done { .. })), "{heard:?}");
            let events = bench.generate(4);
            let heard = bench.hear(events);
            assert_eq!(failure(&heard), Some(ErrorKind::ModelLoading), "{heard:?}");
        }
        assert_eq!(bench.catalog.lane(GENERATE).state(), ModelState::Failed);
        bench.stop();
    }
}

#[test]
fn a_device_that_fails_every_model_ends_the_engine() {
    let script = Script::Steps(vec![(0..u64::MAX, Fault::Step)]);
    let mut bench = Bench::failing(device(), script);
    for _ in 0..3 {
        let events = bench.generate(4);
        let told = failure(&bench.hear(events));
        assert!(matches!(told, Some(ErrorKind::StepFailed | ErrorKind::DeviceFailed)), "{told:?}");
    }
    // Nobody has asked the other model: it was tried.
    let Ending::Failed(failure) = bench.end() else { panic!("it goes on") };
    assert_eq!(failure.reason, Reason::Device);
}

#[test]
fn requests_that_fail_by_themselves_cost_nobody_else_the_model() {
    // Nine in a row, all of one model; each time after three the model is tried, and computes.
    let failing = [0, 1, 2, 4, 5, 6, 8, 9, 10];
    let mut bench = Bench::failing(device(), at(&failing, Fault::Step));
    for _ in failing {
        let events = bench.generate(4);
        assert_eq!(failure(&bench.hear(events)), Some(ErrorKind::StepFailed));
    }
    let events = bench.generate(4);
    assert_eq!(tokens(&bench.hear(events)), [8, 5, 6, 7]);
    bench.stop();
}

#[test]
fn a_step_that_finds_no_memory_is_done_later_in_smaller_parts() {
    for depth in [1, 2] {
        // The first steps of each kind, in full and then by half, find no memory.
        let script = at(&[0, 1, 3, 5], Fault::Device(DeviceFault::Memory));
        let mut bench = Bench::failing_at(depth, device(), script);
        let running: Vec<Events> = (0..5).map(|_| bench.generate(6)).collect();
        let encoding = bench.embed(7);
        for events in running {
            let heard = bench.hear(events);
            assert_eq!(tokens(&heard), [8, 5, 6, 7, 8, 5], "nothing lost, nothing twice");
            assert!(matches!(heard.last(), Some(Event::Done { .. })));
        }
        let heard = bench.hear(encoding);
        assert_eq!(heard.len(), 8, "{heard:?}");
        assert!(matches!(heard.last(), Some(Event::Done { .. })));
        assert_eq!((bench.errors("memory"), bench.errors("fatal")), (4.0, 0.0));
        bench.stop();
    }
}

#[test]
fn memory_that_never_comes_fails_the_request_and_not_the_server() {
    let script = Script::Lane(GENERATE, Fault::Device(DeviceFault::Memory));
    let mut bench = Bench::failing(device(), script);
    for _ in 0..4 {
        let events = bench.generate(4);
        assert_eq!(failure(&bench.hear(events)), Some(ErrorKind::StepFailed));
    }
    let events = bench.embed(1);
    assert_eq!(bench.hear(events).len(), 2);
    bench.stop();
}

#[test]
fn a_slow_step_is_no_failure() {
    let slow = Fault::Slow(Duration::from_millis(200));
    let mut bench = Bench::failing(device(), at(&[1], slow));
    let events = bench.generate(4);
    assert_eq!(tokens(&bench.hear(events)), [8, 5, 6, 7]);
    bench.stop();
}

fn model() -> LoadedModel {
    let outline = Outline { task: ModelTask::Generate, context: 64, kv: None, output_width: 1 };
    LoadedModel { program: Arc::new(Program::default()), outline }
}

/// Brings the generator in while nobody asks for anything.
fn install(bench: &Bench) -> Result<(), StepError> {
    let (installed, answer) = std::sync::mpsc::channel();
    let install = Install { lane: GENERATE, model: model(), installed };
    bench.installs.send(install).unwrap();
    answer.recv_timeout(Duration::from_secs(20)).expect("an idle engine notices a model")
}

#[test]
fn a_model_that_comes_late_is_warmed_up_beside_others() {
    // Six steps warm it up; one that fails then does not come in.
    let (script, step) = (at(&[1], Fault::Step), Duration::from_millis(1));
    let mut bench = Bench::over(FakeDevice { step, ..device() }, script, [false, true]);
    assert_eq!(install(&bench).unwrap_err().kind, StepErrorKind::Step);
    let events = bench.embed(2);
    assert_eq!(bench.hear(events).len(), 3);
    install(&bench).unwrap();
    let page = bench.telemetry.render();
    let load = "sconce_device_load_seconds_total{model=\"chat\"} ";
    let load = page.lines().find_map(|line| line.strip_prefix(load)).unwrap();
    assert!(load.parse::<f64>().unwrap() > 0.0, "{load}");
    let events = bench.generate(4);
    assert_eq!(tokens(&bench.hear(events)), [8, 5, 6, 7]);
    bench.stop();
}

#[test]
fn a_model_without_memory_may_come_again() {
    let mut bench =
        Bench::over(FakeDevice { full: 2, ..device() }, Script::Steps(vec![]), [false, true]);
    for _ in 0..2 {
        assert_eq!(install(&bench).unwrap_err().kind, StepErrorKind::Memory);
        let events = bench.embed(2);
        assert_eq!(bench.hear(events).len(), 3, "others go on");
    }
    install(&bench).unwrap();
    let events = bench.generate(4);
    assert_eq!(tokens(&bench.hear(events)), [8, 5, 6, 7]);
    assert_eq!(bench.errors("memory"), 2.0);
    bench.stop();
}
