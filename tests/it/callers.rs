//! Clients that ask a set of pods again and again, each as soon as it has its answer, and what they
//! saw. Knows nothing of scalers.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::server::{chat, post};

/// Answers that ended longer ago do not count.
const RECENT: Duration = Duration::from_secs(15);
/// Before somebody who was refused asks again.
const AGAIN: Duration = Duration::from_millis(300);

/// The pods that take requests, and what clients saw of them.
#[derive(Default)]
pub(crate) struct Service {
    urls: Mutex<Vec<String>>,
    turn: AtomicUsize,
    /// Tokens of an answer.
    tokens: AtomicU32,
    /// When an answer came and how long it took.
    answers: Mutex<Vec<(Instant, f64)>>,
    /// Requests without an answer so far.
    waiting: AtomicUsize,
    /// What was answered that no client should see.
    wrong: Mutex<Vec<String>>,
}

impl Service {
    /// From now on these pods are asked, in turn.
    pub(crate) fn set(&self, urls: Vec<String>) {
        *self.urls.lock().unwrap() = urls;
    }

    /// From now on answers have so many tokens.
    pub(crate) fn answer_with(&self, tokens: u32) {
        self.tokens.store(tokens, Ordering::Relaxed);
    }

    /// How many pods are asked.
    pub(crate) fn pods(&self) -> usize {
        self.urls.lock().unwrap().len()
    }

    /// Requests that somebody waits for.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Answers since `since`.
    pub(crate) fn answered(&self, since: Instant) -> usize {
        self.answers.lock().unwrap().iter().filter(|(at, _)| *at > since).count()
    }

    /// What went wrong.
    pub(crate) fn wrong(&self) -> Vec<String> {
        self.wrong.lock().unwrap().clone()
    }

    /// The 95th percentile of the answers of late to what was asked since `since`.
    pub(crate) fn p95(&self, since: Instant) -> Option<f64> {
        let answers = self.answers.lock().unwrap();
        let asked = |at: Instant, took| at.checked_sub(Duration::from_secs_f64(took));
        let recent = answers
            .iter()
            .filter(|&&(at, took)| at.elapsed() < RECENT && asked(at, took) > Some(since));
        let mut took: Vec<f64> = recent.map(|(_, took)| *took).collect();
        took.sort_by(f64::total_cmp);
        took.get(took.len() * 95 / 100).copied()
    }

    fn url(&self) -> String {
        let urls = self.urls.lock().unwrap();
        urls[self.turn.fetch_add(1, Ordering::Relaxed) % urls.len()].clone()
    }

    fn ask(&self, text: &str) {
        let mut body = chat(text, self.tokens.load(Ordering::Relaxed));
        body["ignore_eos"] = json!(true);
        let started = Instant::now();
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // A pod that drains or is full says so, and the client tries again, as its SDK would.
        let (status, answer) = loop {
            let (status, answer) = post(&self.url(), &body);
            if ![429, 503].contains(&status) {
                break (status, answer);
            }
            std::thread::sleep(AGAIN);
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        if status == 200 {
            let took = started.elapsed().as_secs_f64();
            self.answers.lock().unwrap().push((Instant::now(), took));
        } else {
            self.wrong.lock().unwrap().push(format!("{status}: {answer}"));
            std::thread::sleep(AGAIN);
        }
    }
}

/// Clients at work, until they are told to stop.
pub(crate) struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    pub(crate) fn start(service: &Arc<Service>, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |number: usize| {
            let (service, stop) = (Arc::clone(service), Arc::clone(&stop));
            std::thread::spawn(move || {
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    service.ask(&format!("{number}, {turn}: what is a lamp?"));
                }
            })
        };
        let threads = (0..count).map(client).collect();
        Self { stop, threads }
    }

    /// No new requests; those under way go on.
    pub(crate) fn cease(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Ends them, each after its answer.
    pub(crate) fn stop(self) {
        self.cease();
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

/// Manifests of the default models below `folder`, the chat model with so many seats.
pub(crate) fn manifests_with_seats(folder: &Path, seats: u32) {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    for entry in std::fs::read_dir(models).unwrap() {
        let path = entry.unwrap().path();
        let mut text = std::fs::read_to_string(&path).unwrap();
        if text.contains("task = \"generate\"") {
            assert!(!text.contains("[limits]"), "{}", path.display());
            text = text.replacen(
                "\n[[files]]",
                &format!("\n[limits]\nseats = {seats}\n\n[[files]]"),
                1,
            );
        }
        std::fs::write(folder.join(path.file_name().unwrap()), text).unwrap();
    }
}
