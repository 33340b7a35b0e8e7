//! Slow clients. One that asks for much and reads nothing gives its pages back; and those by trade:
//! slowhttptest takes its time with headers, bodies and answers while others are served. It is in
//! Debian's package of that name: `cargo test -- --ignored`.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::server::{Server, SetOnDrop, chat, post};

const CONFIG: &str = "
[server]
body_timeout_seconds = 6
write_timeout_seconds = 6
[admin]
metrics_on_main = true
";

/// Runs it until the server has ended every one of its connections.
fn attack(url: &str, mode: &[&str]) -> String {
    let output = Command::new("slowhttptest")
        .args(["-c", "150", "-r", "150", "-l", "60", "-p", "20", "-u", url])
        .args(mode)
        .output()
        .expect("Debian's package slowhttptest is installed");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
#[ignore = "needs Debian's slowhttptest"]
fn slow_clients_are_ended_and_others_served() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::configured(folder.path(), CONFIG, &[]);
    let chat = server.url("/v1/chat/completions");
    let metrics = server.url("/metrics");
    let attacks: [(&str, &str, &[&str]); 3] = [
        ("headers", &chat, &["-H", "-i", "2", "-t", "GET"]),
        ("body", &chat, &["-B", "-i", "2", "-s", "8192", "-f", "application/json"]),
        // Many answers in one go, so that they do not fit into the system's buffers. It takes all
        // of its own small buffer at a time: else it would be long until it saw that it was cut.
        ("read", &metrics, &["-X", "-w", "10", "-y", "20", "-n", "2", "-z", "4096", "-k", "10"]),
    ];
    for (name, url, mode) in attacks {
        let over = AtomicBool::new(false);
        let (told, served) = std::thread::scope(|scope| {
            let others = scope.spawn(|| {
                let body = json!({"model": "all-minilm-l6-v2", "input": "a small lamp"});
                let mut served = 0;
                while !over.load(Ordering::Relaxed) {
                    let (status, answer) = post(&server.url("/v1/embeddings"), &body);
                    assert_eq!(status, 200, "during {name}: {answer}");
                    served += 1;
                }
                served
            });
            let end = SetOnDrop(&over);
            let told = attack(url, mode);
            drop(end);
            (told, others.join().unwrap())
        });
        assert!(served > 10, "{served} during {name}");
        assert!(told.contains("No open connections left"), "{name}: {told}");
        assert!(told.contains("YES") && !told.contains("NO\n"), "{name}: {told}");
    }
}

/// Everything it asked for would be more than the system keeps for a client that does not read.
#[test]
fn pages_of_a_client_that_does_not_read_are_freed() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::configured(folder.path(), "[server]\nwrite_timeout_seconds = 2", &[]);
    let used = || {
        let labels = "{model=\"smollm2-135m-instruct\",state=\"used\"}";
        server.metric(&format!("sconce_kv_pages{labels}"))
    };
    let cancelled = || {
        let labels = "{model=\"smollm2-135m-instruct\",task=\"generate\",outcome=\"cancelled\"}";
        server.metric(&format!("sconce_requests_total{labels}"))
    };
    assert_eq!((used(), cancelled()), (0.0, 0.0));
    let mut body = chat("Tell a long story.", 1500);
    body["stream"] = json!(true);
    body["ignore_eos"] = json!(true);
    body["n"] = json!(8);
    // Some four kilobytes a token.
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(20);
    let body = body.to_string();
    let mut client = TcpStream::connect(server.main_address()).unwrap();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json";
    write!(client, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let limit = Duration::from_secs(120);
    server.wait_until("running", limit, || used() > 0.0);
    server.wait_until("cancelled", limit, || cancelled() == 1.0);
    server.wait_until("freed", limit, || used() == 0.0);
    let running = "sconce_model_requests_running{model=\"smollm2-135m-instruct\"}";
    assert_eq!(server.metric(running), 0.0);
    // It was cut long before its end: what it was sent does not end as a stream does.
    let mut sent = Vec::new();
    client.set_read_timeout(Some(limit)).unwrap();
    let _ = client.read_to_end(&mut sent);
    assert!(!sent.ends_with(b"0\r\n\r\n"), "{} bytes were all", sent.len());
    assert_eq!(post(&server.url("/v1/chat/completions"), &chat("Hi", 4)).0, 200);
}
