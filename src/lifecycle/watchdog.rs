//! Ends a process that hangs: work waits, and no step finishes. A thread of its own, which shares
//! no lock and no runtime with those it watches, so that it runs whatever they wait for. Knows no
//! device: the engine says when it has work and when a step is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::last_words::{LastWords, Reason};
use super::{FAILED, Lifecycle};

/// From the failure of the device to the end of the process, at most: what is in flight is told
/// meanwhile, by those who still can.
const END_WITHIN: Duration = Duration::from_secs(4);

/// How often the engine is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// The engine's signs of life.
#[derive(Debug, Default)]
pub struct Pulse {
    working: AtomicBool,
    steps: AtomicU64,
    /// Milliseconds that a step may take; 0: no matter how long.
    patience: AtomicU64,
}

/// What watches.
#[derive(Debug)]
pub struct Watchdog {
    /// Whom.
    pub pulse: Arc<Pulse>,
    /// Is told of a failure, and says when others noticed one.
    pub lifecycle: Arc<Lifecycle>,
    /// Where the reason goes.
    pub words: Arc<LastWords>,
}

impl Pulse {
    /// Whether there is work, so that steps are to be expected.
    pub fn working(&self, working: bool) {
        self.working.store(working, Ordering::Relaxed);
    }

    /// A step is done, well or not.
    pub fn step_done(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// A step that takes longer will never end.
    pub fn set_patience(&self, patience: Duration) {
        self.patience.store(patience.as_millis().max(1) as u64, Ordering::Relaxed);
    }
}

/// How long work has waited without a step. Adds up its own looks instead of reading the clock: a
/// process that was stopped or starved as a whole did not hang.
#[derive(Debug, Default)]
struct Stall {
    steps: u64,
    lasted: Duration,
}

impl Stall {
    /// Takes a look, `since` after the last one; true if the engine hangs.
    fn look(&mut self, pulse: &Pulse, since: Duration) -> bool {
        let steps = pulse.steps.load(Ordering::Relaxed);
        let patience = pulse.patience.load(Ordering::Relaxed);
        if steps != self.steps || !pulse.working.load(Ordering::Relaxed) || patience == 0 {
            *self = Self { steps, lasted: Duration::ZERO };
            return false;
        }
        self.lasted += since.min(2 * LOOK);
        self.lasted > Duration::from_millis(patience)
    }
}

impl Watchdog {
    /// Starts to watch.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(self) -> std::io::Result<()> {
        let thread = std::thread::Builder::new().name("watchdog".to_owned());
        thread.spawn(move || self.watch()).map(drop)
    }

    fn watch(self) {
        let (mut stall, mut looked) = (Stall::default(), Instant::now());
        loop {
            std::thread::sleep(LOOK);
            let now = Instant::now();
            if self.lifecycle.has_failed() {
                break;
            }
            if stall.look(&self.pulse, now - looked) {
                self.tell(stall.lasted);
                break;
            }
            looked = now;
        }
        std::thread::sleep(END_WITHIN.saturating_sub(LOOK));
        // The usual end would run the driver's exit handlers, and a device that hangs, hangs them.
        signal_hook::low_level::exit(FAILED.into());
    }

    /// Says on another thread that the engine hangs: a disk or a log may hang as well.
    fn tell(&self, lasted: Duration) {
        let (words, lifecycle) = (Arc::clone(&self.words), Arc::clone(&self.lifecycle));
        let tell = move || {
            let seconds = lasted.as_secs_f64();
            let why = format!(
                "work waits and no step finished for {seconds:.1} s (device.stall_seconds)"
            );
            words.say(FAILED, Reason::Hung, &why);
            lifecycle.engine_hangs();
            tracing::error!(reason = why, "the engine hangs");
        };
        // Without another thread the end matters more than the words.
        let _ = std::thread::Builder::new().name("last-words".to_owned()).spawn(tell);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_waiting_work_without_a_step_is_a_stall() {
        let pulse = Pulse::default();
        pulse.working(true);
        let mut stall = Stall::default();
        let mut looks = |times: usize, since: Duration| {
            (0..times).filter(|_| stall.look(&pulse, since)).count()
        };
        assert_eq!(looks(1000, LOOK), 0, "nobody said how long a step may take");
        pulse.set_patience(Duration::from_secs(1));
        assert_eq!(looks(10, LOOK), 0);
        pulse.step_done();
        assert_eq!(looks(11, LOOK), 0, "a step, and a second");
        pulse.working(false);
        assert_eq!(looks(100, LOOK), 0, "idle");
        pulse.working(true);
        assert_eq!(looks(11, LOOK), 1, "a second and a bit");
    }

    #[test]
    fn a_process_that_was_stopped_did_not_hang() {
        let pulse = Pulse::default();
        pulse.working(true);
        pulse.set_patience(Duration::from_secs(1));
        let mut stall = Stall::default();
        assert!(!stall.look(&pulse, Duration::from_secs(3600)));
        assert!(!stall.look(&pulse, LOOK));
    }
}
