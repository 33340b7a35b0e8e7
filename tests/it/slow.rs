//! Slow clients by trade: slowhttptest takes its time with headers, bodies and answers while others
//! are served. Needs Debian's `slowhttptest` package: `cargo test -- --ignored`.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use crate::server::{Server, post};

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
        // Many answers in one go, so that they do not fit into the system's buffers.
        ("read", &metrics, &["-X", "-w", "10", "-y", "20", "-n", "5", "-z", "32", "-k", "10"]),
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
            let told = attack(url, mode);
            over.store(true, Ordering::Relaxed);
            (told, others.join().unwrap())
        });
        assert!(served > 10, "{served} during {name}");
        assert!(told.contains("No open connections left"), "{name}: {told}");
        assert!(told.contains("YES") && !told.contains("NO\n"), "{name}: {told}");
    }
}
