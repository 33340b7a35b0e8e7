//! The life of the process: phases, the deadline, who is in flight. The transition function is
//! pure; `signal.rs` turns signals into events. Knows no HTTP and no device.

mod flight;
pub mod last_words;
pub mod phase;
pub mod signal;
pub mod summary;
pub mod watchdog;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::request::Micros;
use crate::telemetry::Telemetry;
use flight::{End, Flights};
use phase::{Event, Life};
use summary::DrainSummary;

/// The exit code of a drain that cut something.
pub const CUT: u8 = 3;

/// The exit code after the engine or its device failed.
pub const FAILED: u8 = 4;

/// Where the process is in its life; forward only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Models are on their way.
    Loading,
    /// Serving.
    Ready,
    /// Told to go, still admitting: endpoints and proxies need seconds to learn.
    LameDuck,
    /// Finishing what can finish; nothing new.
    Draining,
    /// Nothing in flight, waiting for SIGTERM or the deadline.
    Drained,
    /// Cutting what is left.
    Closing,
    /// All threads joined, all said.
    Stopped,
}

/// Somebody says that the process has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// Who, for the summary: `sigterm`, `drain`, `file`, ...
    pub source: &'static str,
    /// Time until it will be gone; the configured grace if not known.
    pub within: Option<Duration>,
    /// It may exit when it is done, because it is not started again (SIGTERM). Without, it waits
    /// in `Drained` for SIGTERM or the deadline.
    pub terminate: bool,
}

/// One server's life, shared by everybody. No method waits but the `async` ones.
#[derive(Debug)]
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    /// Whether the engine died; read without the record's lock.
    failed: watch::Sender<bool>,
    record: Mutex<Record>,
    flights: Arc<Flights>,
    /// Somebody is impatient: no last scrape.
    hurry: Notify,
    started: Instant,
    grace: Duration,
    eta_ms: AtomicU64,
    rejected_late: AtomicU64,
    telemetry: Arc<Telemetry>,
}

/// Counts one accepted request until it is fully answered; dropping it says that it is over.
#[derive(Debug)]
#[must_use = "the request counts as answered once this is dropped"]
pub struct InFlight {
    flights: Arc<Flights>,
    end: End,
}

/// The machine's state and what the summary says of it.
#[derive(Debug)]
struct Record {
    life: Life,
    /// When each phase was entered.
    entered: [Option<Micros>; 7],
    first_notice: Option<FirstNotice>,
}

#[derive(Debug, Clone, Copy)]
struct FirstNotice {
    reason: &'static str,
    at: Micros,
    in_flight: usize,
}

impl Lifecycle {
    /// Starts in `Loading`. `grace` is the time from SIGTERM to SIGKILL.
    pub fn new(grace: Duration, telemetry: Arc<Telemetry>) -> Arc<Self> {
        let mut entered = [None; 7];
        entered[0] = Some(Micros(0));
        telemetry.phase_entered(Phase::Loading.as_str());
        Arc::new(Self {
            phase: watch::Sender::new(Phase::Loading),
            failed: watch::Sender::new(false),
            record: Mutex::new(Record { life: Life::default(), entered, first_notice: None }),
            flights: Flights::new(Arc::clone(&telemetry)),
            hurry: Notify::new(),
            started: Instant::now(),
            grace,
            eta_ms: AtomicU64::new(0),
            rejected_late: AtomicU64::new(0),
            telemetry,
        })
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Follows the phase. Phases that pass quickly may not be seen: ask for `>=`, never `==`.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Lets a request in, or says why not: `ModelLoading` while loading, `Draining` from then on,
    /// `DeviceFailed` after the engine died. The guard keeps the gauge of requests in flight.
    ///
    /// # Errors
    /// As above, with the time after which to try again.
    pub fn admit(&self) -> Result<InFlight> {
        let mut phase = Phase::Loading;
        let admitted = self.flights.enter(|| {
            phase = self.phase();
            phase.admits()
        });
        match admitted {
            true => Ok(InFlight { flights: Arc::clone(&self.flights), end: End::Finished }),
            // Outside of the count's lock: a refusal looks at the record.
            false => Err(self.refusal(phase)),
        }
    }

    /// Whether a request would be let in now; counts none.
    ///
    /// # Errors
    /// As [`Lifecycle::admit`].
    pub fn check_admits(&self) -> Result<()> {
        let phase = self.phase();
        if phase.admits() { Ok(()) } else { Err(self.refusal(phase)) }
    }

    /// Whether responses should ask clients to close their connection.
    pub fn closing_connections(&self) -> bool {
        self.phase() >= Phase::LameDuck
    }

    /// Jumps to a phase that time would lead to: for tests of those who follow it.
    #[cfg(test)]
    pub(crate) fn jump(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// How long loading may still take: what early requests are told.
    pub fn set_eta(&self, eta: Duration) {
        self.eta_ms.store(eta.as_millis() as u64, Ordering::Relaxed);
    }

    /// Every model that the server waits for is warm.
    pub fn models_ready(&self) {
        self.apply(Event::ModelsReady, "models_ready");
    }

    /// Somebody says that the process has to go. The first notice begins the drain, a later one
    /// may bring the deadline nearer, a second one that terminates ends the drain.
    pub fn notify(&self, notice: Notice) {
        let within = notice.within.unwrap_or(self.grace).into();
        let told = Event::Told { within, terminate: notice.terminate, at_once: false };
        self.apply(told, notice.source);
    }

    /// A person at a terminal says so: as SIGTERM, without a lame duck or a last scrape.
    pub fn interrupt(&self) {
        let told = Event::Told { within: self.grace.into(), terminate: true, at_once: true };
        self.apply(told, "sigint");
    }

    /// The engine is dead: nothing in flight will be finished.
    pub fn engine_failed(&self) {
        // Afterwards it does not matter any more.
        if self.phase() < Phase::Stopped {
            self.failed.send_replace(true);
        }
        self.apply(Event::EngineFailed, "engine_failed");
    }

    /// As [`Lifecycle::engine_failed`], said by who watches the engine: it cannot count itself.
    pub fn engine_hangs(&self) {
        self.telemetry.device_error("fatal");
        self.engine_failed();
    }

    /// Whether the engine is dead.
    pub fn has_failed(&self) -> bool {
        *self.failed.borrow()
    }

    /// Ends when the engine is dead.
    pub async fn failed(&self) {
        // The sender lives as long as `self`.
        let _ = self.failed.subscribe().wait_for(|failed| *failed).await;
    }

    /// Ends when `Closing` nearly does: who has not been told by then that it is cut has to be
    /// told now.
    pub async fn nearly_closed(&self) {
        // The sender lives as long as `self`.
        let _ = self.watch().wait_for(|phase| *phase >= Phase::Closing).await;
        let last_call = self.record().life.last_call();
        tokio::time::sleep_until(self.started + duration(last_call)).await;
    }

    /// Time until the process will be gone, if a notice has come.
    pub fn remaining(&self) -> Option<Duration> {
        let deadline = self.record().life.deadline?;
        Some(duration(deadline.since(self.now())))
    }

    /// Requests accepted and not fully answered.
    pub fn in_flight(&self) -> usize {
        self.flights.count()
    }

    /// Walks the phases as time passes and requests end. Ends when the process may stop: the
    /// guards are dropped or the margin is spent. In `Closing` others have to stop the engine and
    /// to end every stream with an error; this waits for them as long as the deadline lets it.
    pub async fn run(self: Arc<Self>) -> DrainSummary {
        loop {
            let wake = self.look();
            if self.phase() == Phase::Stopped {
                return self.summary();
            }
            let time = async {
                match wake {
                    Some(wake) => tokio::time::sleep_until(self.started + duration(wake)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.flights.changed.notified() => {}
                () = time => {}
            }
        }
    }

    /// After `run`: waits until a scraper has seen the last counts, at most for `most`, never into
    /// the time for last words before the deadline, and not if a second signal came.
    pub async fn linger(&self, most: Duration) {
        let last_words = duration(self.record().life.last_words());
        let left = self.remaining().map(|left| left.saturating_sub(last_words));
        let bound = left.map_or(most, |left| left.min(most));
        tokio::select! {
            () = self.telemetry.settled() => {}
            () = self.hurry.notified() => {}
            () = tokio::time::sleep(bound) => {}
        }
    }

    /// What the drain has done until now.
    pub fn summary(&self) -> DrainSummary {
        let record = self.record();
        let now = self.now();
        let end = record.entered[Phase::Stopped as usize].unwrap_or(now);
        let first = record.first_notice;
        let begun = first.map_or(end, |first| first.at);
        let (finished, cut) = self.flights.drained();
        let exit_code = match (record.life.failed, cut) {
            (true, _) => FAILED,
            (false, 0) => 0,
            (false, _) => CUT,
        };
        DrainSummary {
            reason: first.map_or("none", |first| first.reason),
            phase_seconds: record.phase_seconds(end),
            in_flight_at_notice: first.map_or(0, |first| first.in_flight),
            finished,
            handed_over: 0,
            checkpointed: 0,
            cut,
            rejected_late: self.rejected_late.load(Ordering::Relaxed),
            deadline_s: record.life.deadline.map_or(0.0, |until| seconds(until.since(begun))),
            elapsed_s: seconds(end.since(begun)),
            exit_code,
        }
    }

    /// Lets time and the count of requests do what they can; says when to look again.
    fn look(&self) -> Option<Micros> {
        let mut record = self.record();
        loop {
            let before = record.life.phase;
            // Counted under the lock: in a phase that admits nobody, none means none.
            self.advance(&mut record, Event::Look { in_flight: self.in_flight() }, "");
            if record.life.phase == before {
                return record.life.wake();
            }
        }
    }

    /// Moves the machine and wakes the driver.
    fn apply(&self, event: Event, source: &'static str) {
        self.advance(&mut self.record(), event, source);
        self.flights.changed.notify_one();
    }

    fn advance(&self, record: &mut Record, event: Event, source: &'static str) {
        let (before, now) = (record.life, self.now());
        let life = before.next(event, now);
        record.life = life;
        if let Event::Told { terminate: true, at_once, .. } = event
            && (at_once || before.terminate)
        {
            self.hurry.notify_one();
        }
        if life.deadline != before.deadline {
            let in_flight = self.in_flight();
            if record.first_notice.is_none() {
                record.first_notice = Some(FirstNotice { reason: source, at: now, in_flight });
                self.flights.begin();
            }
            let left = life.deadline.map_or(Micros(0), |deadline| deadline.since(now));
            self.telemetry.drain_deadline(duration(left));
            tracing::info!(source, in_flight, seconds = left.as_seconds(), "told to go");
        }
        if life.phase != before.phase {
            self.entered(record, now);
        }
    }

    /// Says everywhere that a phase has begun.
    fn entered(&self, record: &mut Record, now: Micros) {
        let phase = record.life.phase;
        record.entered[phase as usize] = Some(now);
        if phase == Phase::Stopped {
            self.flights.end();
        }
        self.telemetry.phase_entered(phase.as_str());
        self.phase.send_replace(phase);
        tracing::info!(phase = phase.as_str(), in_flight = self.in_flight(), "phase entered");
    }

    fn refusal(&self, phase: Phase) -> Error {
        if phase == Phase::Loading {
            let eta = self.eta_ms.load(Ordering::Relaxed).clamp(1_000, 60_000);
            let message = format!("models are still loading; try again in {} s", eta / 1_000);
            return Error::new(ErrorKind::ModelLoading, message)
                .retry_after(Duration::from_millis(eta));
        }
        self.rejected_late.fetch_add(1, Ordering::Relaxed);
        let life = self.record().life;
        let (kind, why) = match life.failed {
            true => (ErrorKind::DeviceFailed, "the device has failed"),
            false => (ErrorKind::Draining, "the server is draining"),
        };
        let left = life.deadline.map_or(0.0, |deadline| deadline.since(self.now()).as_seconds());
        let left = left.ceil();
        let message = format!("{why} and will be gone within {left} s; another replica may answer");
        Error::new(kind, message).retry_after(Duration::from_secs(1))
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        // A record is never left half-written, so one that a panic left behind is good.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Micros {
        self.started.elapsed().into()
    }
}

impl InFlight {
    /// Says that the request was cut off instead of finished.
    pub fn cut(&mut self) {
        self.end = End::Cut;
    }

    /// Says that the request was refused after all: a drain has not finished it.
    pub fn refused(&mut self) {
        self.end = End::Refused;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.flights.leave(self.end);
    }
}

impl Record {
    /// Seconds in each phase that was entered, until `end`.
    fn phase_seconds(&self, end: Micros) -> std::collections::BTreeMap<&'static str, f64> {
        let entered = |phase: Phase| self.entered[phase as usize];
        let mut until = end;
        let mut spent = Vec::new();
        for phase in Phase::ALL.into_iter().rev().filter(|phase| *phase != Phase::Stopped) {
            if let Some(from) = entered(phase) {
                spent.push((phase.as_str(), seconds(until.since(from))));
                until = from;
            }
        }
        spent.into_iter().collect()
    }
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Phase; 7] = [
        Phase::Loading,
        Phase::Ready,
        Phase::LameDuck,
        Phase::Draining,
        Phase::Drained,
        Phase::Closing,
        Phase::Stopped,
    ];

    /// Whether requests are let in.
    pub fn admits(self) -> bool {
        matches!(self, Phase::Ready | Phase::LameDuck)
    }

    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Loading => "loading",
            Phase::Ready => "ready",
            Phase::LameDuck => "lame_duck",
            Phase::Draining => "draining",
            Phase::Drained => "drained",
            Phase::Closing => "closing",
            Phase::Stopped => "stopped",
        }
    }
}

fn duration(time: Micros) -> Duration {
    Duration::from_micros(time.0)
}

/// Seconds, rounded to milliseconds.
fn seconds(time: Micros) -> f64 {
    (time.0 / 1_000) as f64 / 1e3
}
