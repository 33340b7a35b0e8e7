//! What a spot node's end looks like from outside: the real binary, real signals, open streams.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{self, Server, chat, get, post};

const STREAMS: usize = 16;

/// How one stream ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// With `[DONE]`, after this many content chunks.
    Done(usize),
    /// With an error event of this code.
    Told(String),
    /// Just gone.
    Cut,
}

/// Opens `count` streams of exactly `tokens` tokens; all have begun.
fn open_streams(server: &Server, count: usize, tokens: u32) -> Vec<JoinHandle<End>> {
    let mut body = chat("Tell me a long story about a lighthouse.", tokens);
    body["stream"] = json!(true);
    body["ignore_eos"] = json!(true);
    server::open_streams(count, &server.url("/v1/chat/completions"), &body, |events| {
        let mut chunks = 0;
        for event in events {
            if event == "[DONE]" {
                return End::Done(chunks);
            }
            let event: Value = serde_json::from_str(&event).unwrap();
            if let Some(code) = event["error"]["code"].as_str() {
                return End::Told(code.to_owned());
            }
            if event["choices"][0]["delta"]["content"].as_str().is_some_and(|s| !s.is_empty()) {
                chunks += 1;
            }
        }
        End::Cut
    })
}

/// The summary is the last line of standard output.
fn summary(stdout: &str) -> Value {
    let line = stdout.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|_| panic!("no summary in {stdout:?}"))
}

#[test]
fn sigterm_cuts_no_stream_that_fits_the_grace() {
    let mut server = Server::start(&["--grace-seconds", "60"]);
    let streams = open_streams(&server, STREAMS, 120);
    server.signal("TERM");
    server.wait_until("lame duck", Duration::from_secs(5), || {
        get(&server.admin_url("/readyz")).0 == 503
    });
    assert_eq!(get(&server.admin_url("/livez")).0, 200, "a draining server is alive");

    // While lame, late arrivals are still served, and told to go elsewhere next time.
    let late = raw(&server, &chat("Hi", 1));
    assert!(late.starts_with("HTTP/1.1 200"), "{late}");
    assert!(late.to_ascii_lowercase().contains("connection: close"), "{late}");

    let ends: Vec<End> = streams.into_iter().map(|stream| stream.join().unwrap()).collect();
    assert!(ends.iter().all(|end| matches!(end, End::Done(_))), "{ends:?}");
    let (status, stdout) = server.wait_exit(Duration::from_secs(60));
    assert_eq!(status.code(), Some(0), "{}", server.log());
    let summary = summary(&stdout);
    assert_eq!(summary["cut"], 0, "{summary}");
    assert!(summary["finished"].as_u64().unwrap() >= STREAMS as u64, "{summary}");
}

#[test]
fn streams_that_do_not_fit_the_grace_are_told() {
    let mut server = Server::start(&["--grace-seconds", "5"]);
    let streams = open_streams(&server, STREAMS, 7000);
    let noticed = Instant::now();
    server.signal("TERM");
    // Lame duck takes 2 s of these 5; after it, arrivals are refused.
    server.wait_until("draining", Duration::from_secs(4), || {
        post(&server.url("/v1/chat/completions"), &chat("Hi", 1)).0 == 503
    });
    let refused = raw(&server, &chat("Hi", 1)).to_ascii_lowercase();
    assert!(refused.starts_with("http/1.1 503"), "{refused}");
    assert!(refused.contains("retry-after: 1") && refused.contains("connection: close"));
    assert!(refused.contains("\"code\":\"draining\""), "{refused}");

    let ends: Vec<End> = streams.into_iter().map(|stream| stream.join().unwrap()).collect();
    assert!(ends.iter().all(|end| matches!(end, End::Told(_))), "{ends:?}");
    let (status, stdout) = server.wait_exit(Duration::from_secs(10));
    assert!(noticed.elapsed() < Duration::from_secs(6), "{:?}", noticed.elapsed());
    assert_eq!(status.code(), Some(3), "{}", server.log());
    assert_eq!(summary(&stdout)["cut"], STREAMS, "{stdout}");
}

#[test]
fn a_second_sigterm_closes_at_once() {
    let mut server = Server::start(&["--grace-seconds", "100"]);
    let [stream] = open_streams(&server, 1, 7000).try_into().unwrap();
    server.signal("TERM");
    std::thread::sleep(Duration::from_millis(300));
    let again = Instant::now();
    server.signal("TERM");
    let (status, _) = server.wait_exit(Duration::from_secs(8));
    assert!(again.elapsed() < Duration::from_secs(7));
    assert_eq!(status.code(), Some(3));
    assert!(matches!(stream.join().unwrap(), End::Told(_)));
}

#[test]
fn sigterm_while_loading_ends_quickly() {
    let mut server = Server::launch(&["--grace-seconds", "30"]);
    server.signal("TERM");
    let (status, _) = server.wait_exit(Duration::from_secs(10));
    assert_eq!(status.code(), Some(0), "{}", server.log());
}

#[test]
fn a_drain_by_request_waits_for_sigterm() {
    let mut server = Server::start(&["--grace-seconds", "20"]);
    let (status, drain) = post(&server.admin_url("/drain?deadline=60"), &json!(null));
    assert!(status == 200 || status == 202, "{status} {drain}");
    server.wait_until("drained", Duration::from_secs(30), || {
        server.metric("sconce_phase{phase=\"drained\"}") == 1.0
    });
    assert_eq!(get(&server.admin_url("/livez")).0, 200);
    assert_eq!(post(&server.url("/v1/chat/completions"), &chat("Hi", 1)).0, 503);
    let (_, stats) = get(&server.admin_url("/stats"));
    let stats: Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(stats["scaling"]["in_flight"], 0, "{stats}");
    server.signal("TERM");
    let (status, _) = server.wait_exit(Duration::from_secs(10));
    assert_eq!(status.code(), Some(0), "{}", server.log());
}

/// A chat request over a bare socket: the whole response, headers and all.
fn raw(server: &Server, body: &Value) -> String {
    let url = server.url("");
    let mut socket = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let body = body.to_string();
    write!(
        socket,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut response = String::new();
    let _ = socket.read_to_string(&mut response);
    response
}
