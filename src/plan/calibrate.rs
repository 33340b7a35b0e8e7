//! Measures how many requests a running server can have in flight within its objectives: closed
//! streams, doubled until a 95th percentile breaks, then halved in between. Bounded in streams,
//! requests and time.

use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use tokio::task::JoinSet;

use super::fit::Wanted;
use super::probe::Target;
use super::{Fault, PlanError};

/// Fewest requests from which a percentile is taken.
const SAMPLES_MIN: usize = 20;
/// A level is cut after this, whatever has ended by then.
const LEVEL_MAX: Duration = Duration::from_secs(60);
/// Narrowing steps between the last level that held and the first that broke.
const HALVINGS: usize = 3;

/// How far to go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) streams: usize,
    pub(super) total: Duration,
}

/// What was measured.
#[derive(Debug)]
pub(super) struct Measured {
    /// The most streams at which every objective held; none if not even one did.
    pub(super) concurrency: Option<usize>,
    /// The levels in words.
    pub(super) notes: Vec<String>,
}

/// What is sent for one model, and how it went.
#[derive(Debug, Clone)]
struct Kind {
    name: String,
    path: &'static str,
    body: Json,
    /// Where a text goes that is never the same.
    text: &'static str,
    words: u32,
    share: f64,
    objective: f64,
}

#[derive(Debug)]
struct Level {
    streams: usize,
    requests: usize,
    failed: Option<String>,
    /// 95th percentile of each kind, seconds; none without a request.
    p95: Vec<Option<f64>>,
    holds: bool,
}

/// Loads the server at `target`.
///
/// # Errors
/// No objective to keep, or a server that does not answer at all.
pub(super) async fn run(
    target: &Target,
    wanted: &[Wanted<'_>],
    bounds: Bounds,
) -> Result<Measured, PlanError> {
    let kinds: Vec<Kind> = wanted.iter().filter_map(Kind::of).collect();
    if kinds.is_empty() {
        let message = "--calibrate: no load has an objective; --load MODEL:rps=1,latency=10 and \
                       so on, or objective.latency_seconds in the manifests";
        return Err(PlanError::new(Fault::Usage, message));
    }
    let started = Instant::now();
    let mut notes = Vec::new();
    let (mut held, mut broke): (Option<usize>, Option<usize>) = (None, None);
    let (mut streams, mut halvings) = (1, 0);
    while started.elapsed() < bounds.total {
        let left = bounds.total.saturating_sub(started.elapsed()).min(LEVEL_MAX);
        let level = measure(target, &kinds, streams, left).await;
        if let (Some(what), None) = (&level.failed, held)
            && level.requests == 0
        {
            return Err(PlanError::new(Fault::Unavailable, format!("--calibrate: {what}")));
        }
        notes.push(level.say(&kinds));
        if level.holds {
            held = Some(streams)
        } else {
            broke = Some(streams)
        }
        streams = match (held, broke) {
            (None, _) => break,
            (Some(held), None) if held >= bounds.streams => break,
            (Some(held), None) => (held * 2).min(bounds.streams),
            (Some(held), Some(broke)) if broke - held > 1 && halvings < HALVINGS => {
                halvings += 1;
                usize::midpoint(held, broke)
            }
            _ => break,
        };
    }
    Ok(Measured { concurrency: held, notes })
}

impl Kind {
    /// None for a model without an objective.
    fn of(one: &Wanted<'_>) -> Option<Self> {
        let objective = one.load.latency_seconds?;
        let name = one.model.name.clone();
        let (path, text, body) = match one.model.task {
            "generate" => {
                let most = one.load.output;
                let body = json!({"model": name, "max_tokens": most, "temperature": 0});
                ("/v1/completions", "prompt", body)
            }
            "score" => {
                let body = json!({"model": name, "documents": ["a wall bracket for candles"]});
                ("/v1/rerank", "query", body)
            }
            _ => ("/v1/embeddings", "input", json!({"model": name})),
        };
        let share = one.load.rps.max(0.001);
        Some(Self { name, path, body, text, words: one.load.prompt, share, objective })
    }

    /// A request that no prefix cache has seen. A common word is about one token.
    fn request(&self, number: usize) -> String {
        let words = "light ".repeat(self.words.saturating_sub(8).max(1) as usize);
        let mut body = self.body.clone();
        body[self.text] = format!("{number:x} {:x} {words}", number * 7919).trim_end().into();
        body.to_string()
    }
}

impl Level {
    fn say(&self, kinds: &[Kind]) -> String {
        let times = kinds.iter().zip(&self.p95).map(|(kind, p95)| {
            let p95 = p95.map_or_else(|| "-".into(), |seconds| format!("{seconds:.3} s"));
            format!("{} p95 {p95} of {} s", kind.name, kind.objective)
        });
        let times = times.collect::<Vec<_>>().join(", ");
        let failed = self.failed.as_ref().map(|what| format!("; {what}")).unwrap_or_default();
        let holds = if self.holds { "holds" } else { "breaks" };
        format!(
            "measured: {} streams, {} requests: {times}: {holds}{failed}",
            self.streams, self.requests
        )
    }
}

/// One level: `streams` requests in flight until there are enough samples.
async fn measure(target: &Target, kinds: &[Kind], streams: usize, limit: Duration) -> Level {
    let wanted = SAMPLES_MIN.max(streams * 3) * kinds.len();
    let started = Instant::now();
    let mut sent = vec![0_usize; kinds.len()];
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); kinds.len()];
    let mut failed = None;
    let mut flying = JoinSet::new();
    let mut number = streams * 100_000;
    let mut requests = 0;
    loop {
        let open = failed.is_none() && sent.iter().sum::<usize>() < wanted;
        while open && started.elapsed() < limit && flying.len() < streams {
            let index = next(kinds, &sent);
            sent[index] += 1;
            number += 1;
            let kind = kinds[index].clone();
            let target = target.clone();
            flying.spawn(async move {
                let begun = Instant::now();
                let body = kind.request(number);
                let answer = target.ask(kind.path, Some(body), LEVEL_MAX * 2).await;
                (index, answer.map(|(status, body)| (status, body, begun.elapsed())))
            });
            if sent.iter().sum::<usize>() >= wanted {
                break;
            }
        }
        let Some(ended) = flying.join_next().await else { break };
        match ended {
            Ok((index, Ok((200, _, elapsed)))) => {
                times[index].push(elapsed.as_secs_f64());
                requests += 1;
            }
            Ok((index, Ok((status, body, _)))) => {
                let text: String = String::from_utf8_lossy(&body).chars().take(200).collect();
                failed = Some(format!("{} answered {status}: {text}", kinds[index].name));
            }
            Ok((_, Err(what))) => failed = Some(what),
            Err(error) => failed = Some(error.to_string()),
        }
    }
    let p95: Vec<Option<f64>> = times.iter_mut().map(|times| percentile(times)).collect();
    let within = |(kind, p95): (&Kind, &Option<f64>)| p95.is_some_and(|p95| p95 <= kind.objective);
    let holds = failed.is_none() && kinds.iter().zip(&p95).all(within);
    Level { streams, requests, failed, p95, holds }
}

/// The kind that is furthest behind its share.
fn next(kinds: &[Kind], sent: &[usize]) -> usize {
    let behind = |index: &usize| (sent[*index] + 1) as f64 / kinds[*index].share;
    (0..kinds.len()).min_by(|a, b| behind(a).total_cmp(&behind(b))).unwrap_or(0)
}

/// The 95th percentile; the largest of few.
fn percentile(times: &mut [f64]) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    let rank = (times.len() * 95).div_ceil(100);
    times.get(rank.checked_sub(1)?).copied()
}
