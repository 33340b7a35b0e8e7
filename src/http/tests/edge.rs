//! Real sockets: disconnects, timeouts, caps, and the end of connections in a drain.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::admission::Front;
use crate::admission::testing::{advance, done, ended, front, outcomes, say};
use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::http::listener::{Limits, Server};
use crate::http::main_router;
use crate::lifecycle::Phase;
use crate::request::{Event, Finish, Sink, Submission};

pub(super) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Longer than anything here should take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

pub(super) const LIMITS: Limits = Limits {
    max_connections: 8,
    keep_alive: Duration::from_secs(60),
    max_connection_age: Duration::from_secs(60),
    first_byte_time: Duration::from_secs(60),
    header_time: Duration::from_secs(60),
    write_time: Duration::from_secs(60),
};

pub(super) struct Site {
    pub(super) front: Arc<Front>,
    inbox: mpsc::Receiver<Submission>,
    port: u16,
    serving: JoinHandle<()>,
}

impl Site {
    pub(super) fn open(limits: Limits) -> Self {
        Self::configured(limits, Config::default())
    }

    pub(super) fn configured(limits: Limits, config: Config) -> Self {
        let (front, inbox) = front(config);
        let server = Server::bind(&[LOOPBACK], 0, limits).unwrap();
        let port = server.port();
        let serving = server.serve(main_router(Arc::clone(&front)), front.lifecycle.watch());
        Self { front, inbox, port, serving: tokio::spawn(serving) }
    }

    pub(super) async fn connect(&self) -> TcpStream {
        TcpStream::connect((LOOPBACK, self.port)).await.unwrap()
    }

    pub(super) async fn submission(&mut self) -> Sink {
        let submission = timeout(PATIENCE, self.inbox.recv()).await.unwrap().unwrap();
        self.front.telemetry.received(submission.request.lane, 0);
        submission.sink
    }

    fn advance(&self, phase: Phase) {
        advance(&self.front.lifecycle, phase);
    }
}

/// Waits until `holds`, or fails.
pub(super) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1_000 {
        if holds() {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not come");
}

pub(super) async fn write(stream: &mut TcpStream, bytes: &str) {
    stream.write_all(bytes.as_bytes()).await.unwrap();
}

/// Reads until what was read ends with `end`.
pub(super) async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut seen = Vec::new();
    let read = async {
        while !seen.ends_with(end.as_bytes()) {
            let byte = stream.read_u8().await;
            seen.push(byte.unwrap_or_else(|error| panic!("{error}")));
        }
    };
    let done = timeout(PATIENCE, read).await.is_ok();
    let seen = String::from_utf8_lossy(&seen).into_owned();
    assert!(done, "no {end:?} in {seen:?}");
    seen
}

/// Everything until the connection ends.
pub(super) async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut seen = Vec::new();
    // A connection that was cut may end with a reset.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut seen)).await.expect("the end came");
    String::from_utf8_lossy(&seen).into_owned()
}

pub(super) fn chat(stream: bool) -> String {
    let body = format!(
        r#"{{"model":"tiny","stream":{stream},"messages":[{{"role":"user","content":"hi"}}]}}"#
    );
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub(super) const LIVEZ: &str = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_request() {
    let mut site = Site::open(LIMITS);
    for stream in [false, true] {
        let mut client = site.connect().await;
        write(&mut client, &chat(stream)).await;
        let sink = site.submission().await;
        if stream {
            say(&sink, "a");
            read_until(&mut client, "\"content\":\"a\"}").await;
        }
        assert_eq!(site.front.lifecycle.in_flight(), 1);
        drop(client);
        until("the cancellation", || sink.is_cancelled()).await;
        until("the guard's end", || site.front.lifecycle.in_flight() == 0).await;
    }
    // One that goes in the middle of its body.
    let mut client = site.connect().await;
    let request = chat(false);
    write(&mut client, &request[..request.len() - 5]).await;
    sleep(Duration::from_millis(20)).await;
    drop(client);
    let cancelled = |model| outcomes(&site.front, model, "generate", "cancelled");
    until("the third outcome", || cancelled("unknown") == 1.0).await;
    assert_eq!((cancelled("tiny"), ended(&site.front)), (2.0, 3.0));
}

#[tokio::test]
async fn connections_are_kept_and_answer_pipelined_requests() {
    let mut site = Site::open(LIMITS);
    let mut client = site.connect().await;
    write(&mut client, &format!("{LIVEZ}{}", chat(true))).await;
    read_until(&mut client, "ok\n").await;
    let sink = site.submission().await;
    say(&sink, "a");
    done(&sink, Finish::Stop, 1, 1);
    let stream = read_until(&mut client, "0\r\n\r\n").await;
    assert!(stream.contains("transfer-encoding: chunked"), "{stream}");
    assert!(stream.contains("data: [DONE]\n\n"), "{stream}");
    write(&mut client, LIVEZ).await;
    assert!(read_until(&mut client, "ok\n").await.starts_with("HTTP/1.1 200 OK"));
}

#[tokio::test]
async fn slow_headers_end_the_connection_and_idle_ones_stay() {
    let limits = Limits { header_time: Duration::from_millis(200), ..LIMITS };
    let site = Site::open(limits);
    let mut idle = site.connect().await;
    write(&mut idle, LIVEZ).await;
    read_until(&mut idle, "ok\n").await;
    let mut fresh = site.connect().await;
    let (mut slow, mut dripping) = (site.connect().await, site.connect().await);
    write(&mut slow, "GET /livez HTTP/1.1\r\nhost").await;
    let drip = async {
        for byte in "GET /livez HTTP/1.1\r\nx: ".bytes().chain(std::iter::repeat(b'y')) {
            if dripping.write_all(&[byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(PATIENCE, drip).await.is_ok(), "a dripping client held its connection");
    assert_eq!(read_to_end(&mut slow).await, "");
    // The headers' time is over for these too, but they are idle.
    for client in [&mut idle, &mut fresh] {
        write(client, LIVEZ).await;
        read_until(client, "ok\n").await;
    }
}

#[tokio::test]
async fn a_new_connection_has_to_say_something_and_a_used_one_may_rest() {
    let limits = Limits { first_byte_time: Duration::from_millis(200), ..LIMITS };
    let site = Site::open(limits);
    let mut used = site.connect().await;
    write(&mut used, LIVEZ).await;
    read_until(&mut used, "ok\n").await;
    let mut silent = site.connect().await;
    assert_eq!(read_to_end(&mut silent).await, "");
    write(&mut used, LIVEZ).await;
    read_until(&mut used, "ok\n").await;
    // What the server runs with: a minute, unless used connections are closed sooner.
    let mut server = Config::default().server;
    assert_eq!(Limits::main(&server).first_byte_time, Duration::from_secs(60));
    server.keep_alive = Duration::from_secs(5);
    assert_eq!(Limits::admin(&server).first_byte_time, server.keep_alive);
    assert_eq!(Limits::main(&server).header_time, Duration::from_secs(10));
}

#[tokio::test]
async fn a_long_answer_is_neither_idle_nor_slow() {
    let short = Duration::from_millis(100);
    let mut site = Site::open(Limits { header_time: short, keep_alive: short, ..LIMITS });
    let mut client = site.connect().await;
    write(&mut client, &chat(true)).await;
    let sink = site.submission().await;
    for _ in 0..4 {
        sleep(Duration::from_millis(80)).await;
        say(&sink, "a");
    }
    done(&sink, Finish::Stop, 1, 4);
    let answer = read_until(&mut client, "0\r\n\r\n").await;
    assert_eq!(answer.matches("\"content\":\"a\"").count(), 4);
    // Now it is idle, and ends.
    assert_eq!(read_to_end(&mut client).await, "");
}

#[tokio::test]
async fn an_old_connection_is_closed_after_its_answer() {
    let site = Site::open(Limits { max_connection_age: Duration::from_millis(1), ..LIMITS });
    let mut client = site.connect().await;
    sleep(Duration::from_millis(20)).await;
    write(&mut client, LIVEZ).await;
    let answer = read_to_end(&mut client).await;
    assert!(answer.contains("connection: close") && answer.ends_with("ok\n"), "{answer}");
}

#[tokio::test]
async fn a_connection_above_the_cap_waits_while_all_are_busy() {
    let mut site = Site::open(Limits { max_connections: 2, ..LIMITS });
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut client = site.connect().await;
        write(&mut client, &chat(true)).await;
        held.push((site.submission().await, client));
    }
    let mut third = site.connect().await;
    write(&mut third, LIVEZ).await;
    let early = timeout(Duration::from_millis(100), third.read_u8()).await;
    assert!(early.is_err(), "the third connection was answered");
    for (sink, client) in &mut held {
        done(sink, Finish::Stop, 1, 0);
        read_until(client, "[DONE]\n\n\r\n0\r\n\r\n").await;
    }
    read_until(&mut third, "ok\n").await;
}

#[tokio::test]
async fn the_longest_idle_connection_makes_room() {
    let site = Site::open(Limits { max_connections: 3, ..LIMITS });
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut client = site.connect().await;
        write(&mut client, LIVEZ).await;
        read_until(&mut client, "ok\n").await;
        held.push(client);
    }
    // The first is used again: the second is now the one that was idle for longest.
    write(&mut held[0], LIVEZ).await;
    read_until(&mut held[0], "ok\n").await;
    let mut newcomer = site.connect().await;
    write(&mut newcomer, LIVEZ).await;
    read_until(&mut newcomer, "ok\n").await;
    assert_eq!(read_to_end(&mut held.remove(1)).await, "");
    for client in &mut held {
        write(client, LIVEZ).await;
        read_until(client, "ok\n").await;
    }
    // Those who connect and say nothing hold nobody up either.
    let silent = [site.connect().await, site.connect().await, site.connect().await];
    let mut newcomer = site.connect().await;
    write(&mut newcomer, LIVEZ).await;
    read_until(&mut newcomer, "ok\n").await;
    drop(silent);
}

#[tokio::test]
async fn a_drain_closes_connections_in_its_order() {
    let mut site = Site::open(LIMITS);
    let mut idle = site.connect().await;
    write(&mut idle, LIVEZ).await;
    read_until(&mut idle, "ok\n").await;
    let mut busy = site.connect().await;
    write(&mut busy, &chat(true)).await;
    let sink = site.submission().await;
    say(&sink, "a");
    read_until(&mut busy, "\"content\":\"a\"}").await;

    site.advance(Phase::LameDuck);
    let mut client = site.connect().await;
    write(&mut client, &chat(false)).await;
    let other = site.submission().await;
    done(&other, Finish::Stop, 1, 0);
    let answer = read_to_end(&mut client).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");

    for phase in [Phase::Draining, Phase::Closing] {
        site.advance(phase);
        let mut client = site.connect().await;
        write(&mut client, &chat(false)).await;
        let answer = read_to_end(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("connection: close") && answer.contains("retry-after: 1"));
        if phase == Phase::Draining {
            let early = timeout(Duration::from_millis(50), idle.read_u8()).await;
            assert!(early.is_err(), "an idle connection ended before the drain did");
        }
    }
    assert_eq!(read_to_end(&mut idle).await, "");
    sink.send(Event::Failed(Error::new(ErrorKind::Cut, "the drain deadline has come")));
    let rest = read_to_end(&mut busy).await;
    assert!(rest.contains(r#""code":"cut_by_drain""#) && rest.ends_with("0\r\n\r\n"), "{rest}");

    assert!(!site.serving.is_finished());
    site.advance(Phase::Stopped);
    timeout(PATIENCE, &mut site.serving).await.unwrap().unwrap();
    assert!(TcpStream::connect((LOOPBACK, site.port)).await.is_err());
    assert_eq!(outcomes(&site.front, "tiny", "generate", "cut"), 1.0);
}

#[tokio::test]
async fn stopping_does_not_wait_for_ever() {
    let mut site = Site::open(LIMITS);
    let mut client = site.connect().await;
    let silent = site.connect().await;
    write(&mut client, &chat(true)).await;
    let sink = site.submission().await;
    say(&sink, "a");
    read_until(&mut client, "\"content\":\"a\"}").await;
    site.advance(Phase::Stopped);
    timeout(PATIENCE, &mut site.serving).await.unwrap().unwrap();
    assert!(sink.is_cancelled());
    assert_eq!(outcomes(&site.front, "tiny", "generate", "cut"), 1.0);
    drop(silent);
}

#[tokio::test]
async fn binds_what_the_machine_has() {
    let missing: IpAddr = "192.0.2.1".parse().unwrap();
    let server = Server::bind(&[missing, LOOPBACK], 0, LIMITS).unwrap();
    assert_eq!(server.addresses().len(), 1);
    let taken = Server::bind(&[LOOPBACK], server.port(), LIMITS).unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    assert!(taken.to_string().contains("127.0.0.1"), "{taken}");
    assert!(Server::bind(&[missing], 0, LIMITS).is_err());
    assert!(Server::bind(&[], 0, LIMITS).is_err());
    let everywhere = Server::bind(&[Ipv6Addr::UNSPECIFIED.into()], 0, LIMITS).unwrap();
    let both = Server::bind(&[LOOPBACK, Ipv6Addr::LOCALHOST.into()], 0, LIMITS).unwrap();
    for server in [everywhere, both] {
        assert_ne!(server.port(), 0);
        assert!(server.addresses().iter().all(|address| address.port() == server.port()));
        let (front, _inbox) = front(Config::default());
        let port = server.port();
        tokio::spawn(server.serve(main_router(Arc::clone(&front)), front.lifecycle.watch()));
        let mut client = TcpStream::connect((LOOPBACK, port)).await.unwrap();
        write(&mut client, LIVEZ).await;
        read_until(&mut client, "ok\n").await;
    }
}
