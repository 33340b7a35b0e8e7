//! A device that fails or hangs under a server with real requests: who is told what, what goes on,
//! how soon the process ends, and what the next one says of it. The faults are put in by a debug
//! build's own hook; a release build has none.

#![cfg(debug_assertions)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sconce::lifecycle::last_words::Reason;
use sconce::lifecycle::{CUT, FAILED};
use serde_json::{Value, json};

use crate::server::{self, Server, chat, get, post};

const CHAT: &str = "smollm2-135m-instruct";

/// The longest that a failed server may take to be gone.
const END_MAX: Duration = Duration::from_secs(5);

/// A place for one server after the other: settings, a termination log, last words, a fault.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(more: &str) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        std::fs::write(place.file("termination-log"), "").unwrap();
        let (log, exit) = (place.file("termination-log"), place.file("last-exit.json"));
        let toml = format!("[admin]\ntermination_log = {log:?}\nlast_exit_file = {exit:?}\n{more}");
        std::fs::write(place.file("sconce.toml"), toml).unwrap();
        place
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn launch(&self, arguments: &[&str]) -> Server {
        let fault = self.file("fault");
        let fault = ("SCONCE_TEST_FAULTS", fault.to_str().unwrap());
        Server::run(&self.file("sconce.toml"), arguments, &[fault])
    }

    fn start(&self, arguments: &[&str]) -> Server {
        let server = self.launch(arguments);
        server.wait_ready();
        server
    }

    /// From now on steps meet this fault.
    fn strike(&self, fault: &str) -> Instant {
        // As a whole: a step may look at any moment.
        std::fs::write(self.file("new"), fault).unwrap();
        std::fs::rename(self.file("new"), self.file("fault")).unwrap();
        Instant::now()
    }

    fn termination_log(&self) -> String {
        std::fs::read_to_string(self.file("termination-log")).unwrap()
    }
}

/// How a server says that the one before it ended.
fn last_exit(server: &Server, code: &str, reason: Reason) -> f64 {
    let reason = reason.as_str();
    server.metric(&format!("sconce_last_exit_info{{code=\"{code}\",reason=\"{reason}\"}}"))
}

fn long_chat() -> Value {
    let mut body = chat("Tell me a long story about a lighthouse.", 7000);
    body["ignore_eos"] = json!(true);
    body
}

/// Opens streams that have begun; the code of the error event that ends each, or what else did.
fn open_streams(server: &Server, count: usize) -> Vec<JoinHandle<String>> {
    let mut body = long_chat();
    body["stream"] = json!(true);
    server::open_streams(count, &server.url("/v1/chat/completions"), &body, |events| {
        let last: Value =
            serde_json::from_str(&events.last().unwrap_or_default()).unwrap_or_default();
        last["error"]["code"].as_str().unwrap_or("no error event").to_owned()
    })
}

/// Asks without streaming; the whole response, headers and all.
fn ask(server: &Server, path: &str, body: &Value) -> JoinHandle<String> {
    let mut socket = TcpStream::connect(server.main_address()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = body.to_string();
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n");
    write!(socket, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
    std::thread::spawn(move || {
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer);
        answer.to_ascii_lowercase()
    })
}

/// Requests in flight when something strikes.
struct Flight {
    streams: Vec<JoinHandle<String>>,
    asked: Vec<JoinHandle<String>>,
}

impl Flight {
    fn new(server: &Server) -> Self {
        let streams = open_streams(server, 4);
        let asked = (0..2).map(|_| ask(server, "/v1/chat/completions", &long_chat())).collect();
        server.wait_until("in flight", Duration::from_secs(60), || {
            server.metric("sconce_requests_running") == 6.0
        });
        Self { streams, asked }
    }

    /// Everybody was told that the device failed, and that another server may be better off.
    fn assert_told(self) {
        for stream in self.streams {
            assert_eq!(stream.join().unwrap(), "device_failed");
        }
        for answer in self.asked {
            let answer = answer.join().unwrap();
            assert!(answer.starts_with("http/1.1 503 "), "{answer}");
            assert!(answer.contains("\"code\":\"device_failed\""), "{answer}");
            assert!(answer.contains("\r\nretry-after: 1\r\n"), "{answer}");
            assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        }
    }
}

/// What probes get now, and from now on until nobody answers.
fn probe(server: &Server) -> JoinHandle<Vec<(u16, u16)>> {
    let urls = ["/livez", "/readyz"].map(|path| server.admin_url(path));
    let ask = move || urls.each_ref().map(|url| get(url).0);
    let first = ask();
    std::thread::spawn(move || {
        let mut seen = vec![(first[0], first[1])];
        loop {
            let answers = ask();
            if answers.contains(&0) {
                return seen;
            }
            seen.push((answers[0], answers[1]));
            std::thread::sleep(Duration::from_millis(5));
        }
    })
}

#[test]
fn a_dead_device_ends_the_server_in_seconds_and_nobody_is_left_without_a_word() {
    // With a scraper to wait for: the longest way to the end.
    let place = Place::new("[drain]\nlinger_seconds = 20\n");
    let mut server = place.start(&[]);
    assert_eq!(server.metric("sconce_last_exit_info{code=\"none\",reason=\"none\"}"), 1.0);
    let flight = Flight::new(&server);
    let probes = probe(&server);
    let struck = place.strike("illegal_address");
    flight.assert_told();
    let told = struck.elapsed();
    let (status, _) = server.wait_exit(END_MAX);
    let ended = struck.elapsed();
    assert!(ended < END_MAX, "gone after {ended:?}");
    assert_eq!(status.code(), Some(FAILED.into()), "{}", server.log());
    let seen = probes.join().unwrap();
    assert_eq!(seen.first(), Some(&(200, 200)), "healthy before");
    assert_eq!(seen.last(), Some(&(503, 503)), "neither alive nor ready after {told:?}: {seen:?}");
    let log = place.termination_log();
    assert!(log.starts_with("device: ") && log.contains("illegal_address"), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
    // The container is started again, and works.
    std::fs::remove_file(place.file("fault")).unwrap();
    let server = place.start(&[]);
    assert_eq!(last_exit(&server, "4", Reason::Device), 1.0);
    assert_eq!(post(&server.url("/v1/chat/completions"), &chat("Hi", 1)).0, 200);
}

#[test]
fn a_device_that_hangs_is_found_and_ends_the_server_as_well() {
    let place = Place::new("[device]\nstall_seconds = 2\n[drain]\nlinger_seconds = 20\n");
    let mut server = place.start(&[]);
    // Slow is not hung: 300 ms more for each step.
    place.strike("slow");
    let slow = post(&server.url("/v1/chat/completions"), &chat("Hi", 12));
    assert_eq!(slow.0, 200, "{}", slow.1);
    std::fs::remove_file(place.file("fault")).unwrap();
    let flight = Flight::new(&server);
    let struck = place.strike("hang");
    // One that comes while nothing moves any more is told as well.
    std::thread::sleep(Duration::from_millis(500));
    let late = ask(&server, "/v1/chat/completions", &chat("Hi", 1));
    flight.assert_told();
    assert!(late.join().unwrap().contains("\"code\":\"device_failed\""));
    let (status, _) = server.wait_exit(Duration::from_secs(10));
    let ended = struck.elapsed();
    assert!(ended < Duration::from_secs(2) + END_MAX, "gone after {ended:?}");
    assert_eq!(status.code(), Some(FAILED.into()), "{}", server.log());
    let log = place.termination_log();
    assert!(log.starts_with("hung: ") && log.contains("device.stall_seconds"), "{log}");
    std::fs::remove_file(place.file("fault")).unwrap();
    let server = place.launch(&[]);
    assert_eq!(last_exit(&server, "4", Reason::Hung), 1.0);
}

#[test]
fn a_panic_while_loading_ends_the_server_at_once() {
    let place = Place::new("");
    place.strike("panic");
    let mut server = place.launch(&[]);
    let (status, _) = server.wait_exit(Duration::from_secs(60));
    assert_eq!(status.code(), Some(70), "{}", server.log());
    assert!(server.log().contains("loading panicked: told to panic"), "{}", server.log());
    assert!(place.termination_log().starts_with("start: loading panicked"));
    std::fs::remove_file(place.file("fault")).unwrap();
    let server = place.launch(&[]);
    assert_eq!(last_exit(&server, "70", Reason::Start), 1.0);
}

#[test]
fn every_end_is_exported_by_the_next_server() {
    let place = Place::new("[drain]\nlinger_seconds = 0\n");
    let mut server = place.start(&["--grace-seconds", "3"]);
    let [stream] = open_streams(&server, 1).try_into().unwrap();
    server.signal("TERM");
    let (status, _) = server.wait_exit(Duration::from_secs(10));
    assert_eq!(status.code(), Some(CUT.into()), "{}", server.log());
    assert_ne!(stream.join().unwrap(), "no error event");
    assert_eq!(place.termination_log(), "cut: 1 requests were cut off, 0 were finished");

    let mut server = place.launch(&[]);
    assert_eq!(last_exit(&server, "3", Reason::Cut), 1.0);
    server.signal("KILL");
    server.wait_exit(Duration::from_secs(10));

    let mut server = place.start(&["--grace-seconds", "3"]);
    assert_eq!(last_exit(&server, "unknown", Reason::Killed), 1.0);
    server.signal("TERM");
    assert_eq!(server.wait_exit(Duration::from_secs(20)).0.code(), Some(0), "{}", server.log());

    let server = place.launch(&[]);
    assert_eq!(last_exit(&server, "0", Reason::Drained), 1.0);
}

#[test]
fn one_model_that_cannot_compute_does_not_cost_the_others() {
    let place = Place::new("");
    let server = place.start(&[]);
    // Lanes are the models by name: 0 embeds, 1 chats.
    place.strike("step 1");
    let ask = || post(&server.url("/v1/chat/completions"), &chat("Hi", 4));
    for _ in 0..3 {
        let (status, answer) = ask();
        assert_eq!((status, &answer["error"]["code"]), (500, &json!("step_failed")), "{answer}");
    }
    let state = format!("sconce_model_state{{model=\"{CHAT}\",state=\"failed\"}}");
    server.wait_until("out", Duration::from_secs(10), || server.metric(&state) == 1.0);
    let (status, answer) = ask();
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("model_loading")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains(CHAT), "{answer}");
    let body = json!({"model": "all-minilm-l6-v2", "input": "a small lamp"});
    assert_eq!(post(&server.url("/v1/embeddings"), &body).0, 200);
    assert_eq!(get(&server.admin_url("/readyz")).0, 200, "others are served");
    // Now the other one too, and with it the device.
    place.strike("step");
    for _ in 0..3 {
        let (status, answer) = post(&server.url("/v1/embeddings"), &body);
        assert!(status == 500 || status == 503, "{answer}");
    }
    let mut server = server;
    assert_eq!(server.wait_exit(END_MAX).0.code(), Some(FAILED.into()), "{}", server.log());
    assert!(place.termination_log().starts_with("device: "));
}

#[test]
fn a_model_that_is_loaded_later_comes_without_being_asked_for() {
    let place = Place::new("");
    let models = place.file("models");
    std::fs::create_dir(&models).unwrap();
    for name in [CHAT, "all-minilm-l6-v2"] {
        let text = std::fs::read_to_string(format!("models/{name}.toml")).unwrap();
        let late = if name == CHAT { "preload = false\n" } else { "" };
        std::fs::write(models.join(format!("{name}.toml")), format!("{late}{text}")).unwrap();
    }
    let server = place.start(&["--models-dir", models.to_str().unwrap()]);
    let state = format!("sconce_model_state{{model=\"{CHAT}\",state=\"ready\"}}");
    server.wait_until("loaded", Duration::from_secs(120), || server.metric(&state) == 1.0);
    let warm = server.metric(&format!("sconce_device_load_seconds_total{{model=\"{CHAT}\"}}"));
    assert!(warm > 0.0, "its first steps are device time");
    assert_eq!(post(&server.url("/v1/chat/completions"), &chat("Hi", 3)).0, 200);
}
