//! What a connection may cost: headers, bodies, readers that do not read, and the admin socket.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body_util::StreamBody;
use hyper::body::Frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::auth::{KEY, bearer};
use super::edge::write;
use super::edge::{LIMITS, LIVEZ, LOOPBACK, PATIENCE, Site, chat, read_to_end, read_until, until};
use super::{App, drive, post};
use crate::admission::testing::{advance, done, front, metric, outcomes, say};
use crate::admission::ticket::Ticket;
use crate::config::Config;
use crate::http::admin_router;
use crate::http::listener::{Limits, Server};
use crate::lifecycle::Phase;
use crate::model::ModelTask;
use crate::request::{Event, Finish};
use crate::telemetry::request_log::RequestLog;

/// The status and the error's code of a whole answer.
fn refusal(answer: &str) -> (&str, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    let json: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    let code = json["error"]["code"].as_str().unwrap_or_default().to_owned();
    (head.split(' ').nth(1).unwrap(), code)
}

#[tokio::test]
async fn headers_have_limits() {
    let site = Site::open(LIMITS);
    let get = |headers: &str| format!("GET /livez HTTP/1.1\r\nconnection: close\r\n{headers}\r\n");
    let many = |count: usize| (0..count).map(|n| format!("x{n}: y\r\n")).collect::<String>();
    let long = |bytes: usize| format!("x: {}\r\n", "y".repeat(bytes));
    let told = ("431", "too_large".to_owned());
    let bare = ("431", String::new());
    for (request, expected) in [
        (get(&many(101)), &told),
        (get(&long(70_000)), &told),
        // Beyond what is read at all, the protocol's own answer.
        (get(&many(400)), &bare),
        (get(&long(2_000_000)), &bare),
    ] {
        let mut client = site.connect().await;
        // The answer may come, and the connection go, before all is written.
        let _ = client.write_all(request.as_bytes()).await;
        let answer = read_to_end(&mut client).await;
        assert!(
            answer.is_empty() && *expected == bare || refusal(&answer) == *expected,
            "{answer}"
        );
    }
    let path = format!("GET /{} HTTP/1.1\r\nconnection: close\r\n\r\n", "p".repeat(60_000));
    let mut client = site.connect().await;
    write(&mut client, &path).await;
    assert_eq!(refusal(&read_to_end(&mut client).await).0, "404");
    for (request, status) in [
        ("GET /livez HTTP/1.1\r\nbad header\r\n\r\n", "400"),
        ("GET /livez HTTP/3.9\r\n\r\n", "400"),
        ("\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\r\n\r\n", "400"),
        ("POST /v1/embeddings HTTP/1.1\r\ncontent-length: -1\r\n\r\n", "400"),
        ("POST /v1/embeddings HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", "400"),
    ] {
        let mut client = site.connect().await;
        write(&mut client, request).await;
        let answer = read_to_end(&mut client).await;
        assert_eq!(answer.split(' ').nth(1), Some(status), "{request:?}: {answer}");
    }
    let mut client = site.connect().await;
    write(&mut client, LIVEZ).await;
    read_until(&mut client, "ok\n").await;
}

#[tokio::test]
async fn a_body_above_the_limit_is_answered_unread() {
    let site = Site::open(LIMITS);
    let mut client = site.connect().await;
    let head = "POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n";
    write(&mut client, &format!("{head}content-length: 99999999\r\n\r\n")).await;
    let answer = read_until(&mut client, "}}").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    // One that does not say how long it is.
    let mut client = site.connect().await;
    let head = "POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    write(&mut client, head).await;
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 20, " ".repeat(1 << 20));
    for _ in 0..5 {
        let _ = client.write_all(chunk.as_bytes()).await;
    }
    let answer = read_until(&mut client, "}}").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

/// A client that sends all before it reads gets its answer, not a reset.
#[tokio::test]
async fn a_refused_body_may_be_finished() {
    let site = Site::open(LIMITS);
    let chunk = "x".repeat(100 << 10);
    for (path, status) in [("/nothing", "404"), ("/v1/models", "405"), ("/v1/embeddings", "400")] {
        let mut client = site.connect().await;
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\n");
        write(&mut client, &format!("{head}content-length: {}\r\n\r\n", 6 * chunk.len())).await;
        for _ in 0..6 {
            write(&mut client, &chunk).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let answer = read_to_end(&mut client).await;
        assert_eq!(answer.split(' ').nth(1), Some(status), "{path}: {answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    }
}

/// Requests together hold a bounded amount of memory before they are submitted.
#[tokio::test]
async fn large_bodies_share_a_budget() {
    let mut config = Config::default();
    config.server.max_body_bytes = 100 << 10;
    let (app, inbox) = App::new(config);
    drive(&app.front, inbox, |submission| done(&submission.sink, Finish::Stop, 1, 0));
    let ticket =
        || Ticket::new(Arc::clone(&app.front), ModelTask::Generate, RequestLog::new("id".into()));
    let padded = |bytes: usize| {
        let padding = "x".repeat(bytes);
        serde_json::json!({"model": "tiny", "prompt": "a", "user": padding}).to_string()
    };
    let mut others = ticket();
    others.grow_body(32 * (100 << 10) - (10 << 10)).unwrap();
    for (bytes, status) in [(0, 200), (60 << 10, 200), (70 << 10, 200), (90 << 10, 429)] {
        // Each gives back what it took.
        for _ in 0..3 {
            let reply = app.post("/v1/completions", padded(bytes)).await;
            assert_eq!(reply.status, status, "{bytes}: {}", reply.body);
            if status == 429 {
                assert_eq!(reply.json()["error"]["code"], "queue_full");
                assert!(!reply.header("retry-after").is_empty());
                assert!(reply.body.contains("server.max_body_bytes"), "{}", reply.body);
            }
        }
    }
    drop(others);
    assert_eq!(app.post("/v1/completions", padded(90 << 10)).await.status, 200);
    let labels = [("model", "unknown"), ("reason", "queue_full")];
    assert_eq!(metric(&app.front, "sconce_rejections_total", &labels), 3.0);
}

#[tokio::test]
async fn no_body_is_read_that_cannot_be_let_in() {
    let (config, _folder) = super::auth::guarded("concurrency = 1");
    let (app, _inbox) = App::new(config);
    let endless = || {
        let nothing = tokio_stream::pending::<Result<Frame<Bytes>, std::convert::Infallible>>();
        bearer(post("/v1/completions", Body::new(StreamBody::new(nothing))), KEY)
    };
    const SHORT: Duration = Duration::from_millis(100);
    let mut first = std::pin::pin!(app.send(endless()));
    assert!(timeout(SHORT, &mut first).await.is_err(), "this one is read");
    let answer = async || timeout(SHORT, app.send(endless())).await.expect("an answer");
    assert_eq!(answer().await.status, 429);
    advance(&app.front.lifecycle, Phase::Draining);
    assert_eq!(answer().await.status, 503);
}

#[tokio::test]
async fn a_body_has_its_time() {
    let mut config = Config::default();
    config.server.body_timeout = Duration::from_millis(200);
    let site = Site::configured(LIMITS, config);
    let mut client = site.connect().await;
    let request = chat(false);
    let (last, first) = (request.len() - 20, request.len() - 30);
    write(&mut client, &request[..first]).await;
    // It makes progress, and is too slow all the same.
    let drip = async {
        for byte in request.as_bytes()[first..last].iter().cycle() {
            if client.write_all(&[*byte]).await.is_err() {
                break;
            }
            let answered = timeout(Duration::from_millis(50), client.readable()).await;
            if answered.is_ok() {
                break;
            }
        }
    };
    timeout(PATIENCE, drip).await.expect("an answer");
    let answer = read_until(&mut client, "}}").await;
    assert_eq!(refusal(&answer), ("408", "request_timeout".into()), "{answer}");
    assert!(answer.contains("server.body_timeout_seconds"), "{answer}");
    assert_eq!(outcomes(&site.front, "unknown", "generate", "client_error"), 1.0);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cancelled() {
    const PROMPTS: usize = 120;
    let mut site = Site::open(Limits { write_time: Duration::from_millis(300), ..LIMITS });
    let prompts = vec!["a"; PROMPTS];
    let body = serde_json::json!({"model": "tiny", "stream": true, "max_tokens": 60,
                                  "prompt": prompts});
    let body = body.to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: ";
    for reads in [true, false] {
        let mut client = site.connect().await;
        write(&mut client, &format!("{head}{}\r\n\r\n{body}", body.len())).await;
        let mut sinks = Vec::new();
        for _ in 0..PROMPTS {
            sinks.push(site.submission().await);
        }
        if reads {
            // Slow and steady is not stuck, however long it takes.
            for _ in 0..5 {
                say(&sinks[0], "a");
                read_until(&mut client, "\n\n\r\n").await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            assert!(sinks.iter().all(|sink| !sink.is_cancelled()));
            drop(client);
        } else {
            // More than the system takes in for it.
            let long = "a".repeat(60);
            sinks.iter().for_each(|sink| say(sink, &long));
        }
        until("the cancellation", || sinks.iter().all(|sink| sink.is_cancelled())).await;
        until("the guard's end", || site.front.lifecycle.in_flight() == 0).await;
    }
    assert_eq!(outcomes(&site.front, "tiny", "generate", "cancelled"), 2.0);
}

/// A whole answer is in flight until it is taken, not until it is computed.
#[tokio::test]
async fn an_answer_is_in_flight_while_it_is_written() {
    const NUMBERS: usize = 2_100_000;
    let mut site = Site::open(LIMITS);
    let body = r#"{"inputs":"a"}"#;
    let head = "POST /models/org/vec/embed_all HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    let mut client = site.connect().await;
    write(&mut client, &format!("{head}content-length: {}\r\n\r\n{body}", body.len())).await;
    let sink = site.submission().await;
    sink.send(Event::Vector { index: 0, values: vec![0.1; NUMBERS] });
    done(&sink, Finish::Complete, 1, 0);
    read_until(&mut client, "\r\n\r\n").await;
    assert_eq!(outcomes(&site.front, "org/vec", "embed", "ok"), 1.0);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(site.front.lifecycle.in_flight(), 1, "megabytes wait for the client");
    assert!(read_to_end(&mut client).await.ends_with("[0.1,0.1,0.1]]]"));
    assert_eq!(site.front.lifecycle.in_flight(), 0);
}

#[tokio::test]
async fn tokens_of_a_client_that_left_are_counted() {
    let mut site = Site::open(LIMITS);
    for stream in [false, true] {
        let mut client = site.connect().await;
        write(&mut client, &chat(stream)).await;
        let sink = site.submission().await;
        say(&sink, "abc");
        if stream {
            read_until(&mut client, "\"content\":\"c\"}").await;
        }
        drop(client);
        until("the cancellation", || sink.is_cancelled()).await;
    }
    // One that leaves before anything was done for it has taken nothing.
    let mut client = site.connect().await;
    write(&mut client, &chat(false)).await;
    let sink = site.submission().await;
    drop(client);
    until("the cancellation", || sink.is_cancelled()).await;
    until("three ends", || outcomes(&site.front, "tiny", "generate", "cancelled") == 3.0).await;
    let tokens = |family| metric(&site.front, family, &[("model", "tiny")]);
    assert_eq!(tokens("sconce_generated_tokens_total"), 6.0);
    let prompt = "user:hi\nassistant:".len() as f64;
    assert_eq!(tokens("sconce_prompt_tokens_total"), 2.0 * prompt);
}

#[tokio::test]
async fn idle_listeners_hold_no_slot() {
    let limits = Limits { max_connections: 1, ..LIMITS };
    let (front, _inbox) = front(Config::default());
    let both = [LOOPBACK, "::1".parse().unwrap()];
    let server = Server::bind(&both, 0, limits).unwrap();
    let (port, addresses) = (server.port(), server.addresses());
    assert_eq!(addresses.len(), 2);
    tokio::spawn(server.serve(admin_router(front.clone()), front.lifecycle.watch()));
    for address in addresses {
        let mut client = tokio::net::TcpStream::connect((address.ip(), port)).await.unwrap();
        write(&mut client, LIVEZ).await;
        read_until(&mut client, "ok\n").await;
    }
}

#[tokio::test]
async fn the_admin_socket_is_for_its_owner() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let (config, _keys) = super::auth::guarded("");
    let (front, _inbox) = front(config);
    // One that a killed process left behind is replaced, one that answers is not.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let mut server = Server::bind(&[LOOPBACK], 0, LIMITS).unwrap();
    server.bind_socket(&path).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut second = Server::bind(&[LOOPBACK], 0, LIMITS).unwrap();
    let error = second.bind_socket(&path).unwrap_err().to_string();
    assert!(error.contains("admin.sock"), "{error}");
    let serving = tokio::spawn(server.serve(admin_router(front.clone()), front.lifecycle.watch()));
    let mut client = UnixStream::connect(&path).await.unwrap();
    let request = "POST /drain?deadline=20 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 202") && answer.contains("lame_duck"), "{answer}");
    advance(&front.lifecycle, Phase::Stopped);
    timeout(PATIENCE, serving).await.unwrap().unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn hostile_bodies_are_told_what_is_wrong() {
    let app = App::scripted(|submission| {
        done(&submission.sink, Finish::Stop, 1, 0);
    });
    let chat = |content: &str, extra: &str| {
        format!(r#"{{"model":"tiny",{extra}"messages":[{{"role":"user","content":"{content}"}}]}}"#)
    };
    let nested =
        |depth: usize| format!(r#""metadata":{{"x":{}{}}},"#, "[".repeat(depth), "]".repeat(depth));
    let word = "w".repeat(1 << 20);
    let mut invalid = chat("?", "").into_bytes();
    *invalid.iter_mut().find(|byte| **byte == b'?').unwrap() = 0xff;
    for (body, status, code, says) in [
        // Nobody reads this field, and its depth counts all the same.
        (chat("a", &nested(95)).into(), 400, "invalid_request", "nested deeper than 96"),
        (chat("a", &nested(100_000)).into(), 400, "invalid_request", "nested deeper than 96"),
        (chat(&word, "").into(), 400, "context_length_exceeded", "limits.context"),
        (invalid, 400, "invalid_request", "not JSON"),
        (b"\x00\x01\x02".to_vec(), 400, "invalid_request", "not JSON"),
    ] {
        let reply = app.post("/v1/chat/completions", body).await;
        let error = &reply.json()["error"];
        assert_eq!(
            (reply.status.as_u16(), error["code"].as_str()),
            (status, Some(code)),
            "{error}"
        );
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(says) && message.len() < 500, "{message}");
    }
    for body in [chat("a", &nested(94)), chat(&"[{".repeat(15), ""), chat(r#"\"[\\"#, "")] {
        assert_eq!(app.post("/v1/chat/completions", body).await.status, 200);
    }
}

#[tokio::test]
async fn more_prompts_than_can_ever_wait_are_refused() {
    let mut config = Config::default();
    config.limits.queue_requests = 3;
    let (app, _inbox) = App::new(config);
    let body = serde_json::json!({"model": "tiny", "prompt": ["a", "b", "c", "d"]});
    let reply = app.post("/v1/completions", body.to_string()).await;
    let code = &reply.json()["error"]["code"];
    assert_eq!((reply.status.as_u16(), code), (400, &"invalid_request".into()));
    assert!(reply.body.contains("limits.queue_requests") && reply.body.contains("4 prompts"));
}
