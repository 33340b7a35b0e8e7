//! Load over HTTP against the real server with the default models: `cargo bench --bench load`.
//! Prints tokens a second, first-token and inter-token times at 1 to 16 streams, embeddings a
//! second, and what chat and embeddings keep of their speed when both run at once.

#![allow(clippy::unwrap_used, reason = "a broken measurement fails by it")]
#![allow(clippy::print_stdout, reason = "the table is the result")]

#[path = "../tests/it/server.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod server;
mod statistics;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use server::{Server, chat, post, stream};
use statistics::{median, quantile};

/// Length of one measurement; everything is repeated and the median quoted.
const SPAN: Duration = Duration::from_secs(8);
const ROUNDS: usize = 3;
const TOKENS: u32 = 64;
const TEXTS: usize = 32;

/// What one client thread saw.
#[derive(Default, Clone)]
struct Seen {
    tokens: usize,
    texts: usize,
    first: Vec<f64>,
    between: Vec<f64>,
}

fn main() {
    let server = Server::start(&[]);
    warm_up(&server);
    println!("| streams | tokens/s | first token p50 | p99 | between tokens p50 | p99 |");
    println!("|---|---|---|---|---|---|");
    for streams in [1, 4, 8, 16] {
        let rounds: Vec<Seen> = (0..ROUNDS).map(|_| run(&server, streams, 0)).collect();
        let speed = median(rounds.iter().map(|seen| seen.tokens as f64 / SPAN.as_secs_f64()));
        let all = |of: fn(&Seen) -> &Vec<f64>| -> Vec<f64> {
            rounds.iter().flat_map(|seen| of(seen).iter().copied()).collect()
        };
        let (first, between) = (all(|seen| &seen.first), all(|seen| &seen.between));
        println!(
            "| {streams} | {speed:.0} | {:.1} ms | {:.1} ms | {:.1} ms | {:.1} ms |",
            quantile(&first, 0.5),
            quantile(&first, 0.99),
            quantile(&between, 0.5),
            quantile(&between, 0.99),
        );
    }
    mixed(&server);
}

/// Chat alone, embeddings alone, both: alternated, so that a change of the machine's speed meets
/// all three alike.
fn mixed(server: &Server) {
    let (mut chats, mut texts, mut sums, mut slower) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let chat = run(server, 4, 0);
        let embed = run(server, 0, 4);
        let both = run(server, 4, 4);
        let chat_share = both.tokens as f64 / chat.tokens as f64;
        let embed_share = both.texts as f64 / embed.texts as f64;
        chats.push(chat_share);
        texts.push(embed.texts as f64 / SPAN.as_secs_f64());
        sums.push(chat_share + embed_share);
        slower.push(quantile(&both.between, 0.99) - quantile(&chat.between, 0.99));
    }
    println!();
    println!("embeddings alone: {:.0} texts/s ({TEXTS} a request, 4 clients)", median(texts));
    println!(
        "chat and embeddings at once: shares {:.2} + {:.2} = {:.2} of each alone; \
         between tokens p99 + {:.1} ms",
        median(chats.clone()),
        median(sums.iter().zip(&chats).map(|(sum, chat)| sum - chat)),
        median(sums.clone()),
        median(slower)
    );
}

/// Runs clients side by side for one span; sums what they saw.
fn run(server: &Server, streams: usize, embedders: usize) -> Seen {
    let over = AtomicBool::new(false);
    let over = &over;
    std::thread::scope(|scope| {
        let chats = (0..streams).map(|n| scope.spawn(move || chat_client(server, n, over)));
        let texts = (0..embedders).map(|n| scope.spawn(move || embed_client(server, n, over)));
        let clients: Vec<_> = chats.chain(texts).collect();
        std::thread::sleep(SPAN);
        over.store(true, Ordering::Relaxed);
        clients.into_iter().fold(Seen::default(), |mut sum, client| {
            let seen = client.join().expect("a client");
            sum.tokens += seen.tokens;
            sum.texts += seen.texts;
            sum.first.extend(seen.first);
            sum.between.extend(seen.between);
            sum
        })
    })
}

fn chat_client(server: &Server, number: usize, over: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut turn = 0;
    while !over.load(Ordering::Relaxed) {
        turn += 1;
        // Another prompt each time, or the prefix cache would answer for the prefill.
        let prompt = format!("{turn} {number}: describe a walk through an old harbour town.");
        let mut body = chat(&prompt, TOKENS);
        body["stream"] = json!(true);
        body["ignore_eos"] = json!(true);
        let asked = Instant::now();
        let mut last: Option<Instant> = None;
        for event in stream(&server.url("/v1/chat/completions"), &body) {
            if !event.contains("\"content\":\"") || event.contains("\"content\":\"\"") {
                continue;
            }
            let now = Instant::now();
            let since = |start: Instant| now.duration_since(start).as_secs_f64() * 1e3;
            match last {
                None => seen.first.push(since(asked)),
                Some(last) => seen.between.push(since(last)),
            }
            last = Some(now);
            if over.load(Ordering::Relaxed) {
                return seen;
            }
            seen.tokens += 1;
        }
    }
    seen
}

fn embed_client(server: &Server, number: usize, over: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let text = |n: usize| {
        format!("Client {number}, text {n}: the keeper lit the lamp before the fog came in.")
    };
    let texts: Vec<String> = (0..TEXTS).map(text).collect();
    let body = json!({
        "model": "all-minilm-l6-v2", "input": texts, "encoding_format": "base64",
    });
    while !over.load(Ordering::Relaxed) {
        let (status, answer) = post(&server.url("/v1/embeddings"), &body);
        assert_eq!(status, 200, "{answer}");
        if !over.load(Ordering::Relaxed) {
            seen.texts += TEXTS;
        }
    }
    seen
}

fn warm_up(server: &Server) {
    let over = AtomicBool::new(true);
    chat_client(server, 0, &over);
    let (status, _) = post(&server.url("/v1/chat/completions"), &chat("Hi", 8));
    assert_eq!(status, 200);
}
