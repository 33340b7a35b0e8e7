//! Ten thousand idle connections, held beside load.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use crate::server::{Server, SetOnDrop, get, post};

const IDLE: u64 = 10_000;

/// A connection may cost this much of the server's memory.
const KIB_EACH_MAX: f64 = 40.0;

/// Resident memory of a process in KiB.
fn resident(id: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// As many connections as this process and the server may hold, at most `IDLE`.
fn allowed() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = IDLE + 500;
    let granted = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if limit.current.is_some_and(|now| now < granted) {
        let raised = Rlimit { current: Some(granted), maximum: limit.maximum };
        setrlimit(Resource::Nofile, raised).unwrap();
    }
    IDLE.min(granted - 500) as usize
}

/// A client that keeps its connection.
fn connect(server: &Server) -> TcpStream {
    let client = TcpStream::connect(server.main_address()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    client
}

/// All of them ask, and all of them are answered.
fn ask(clients: &mut [TcpStream]) {
    for client in clients.iter_mut() {
        client.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    }
    for client in clients {
        let mut answer = Vec::new();
        while !answer.ends_with(b"ok\n") {
            let mut part = [0; 512];
            let length = client.read(&mut part).unwrap();
            assert!(length > 0, "closed after {answer:?}");
            answer.extend_from_slice(&part[..length]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    }
}

#[test]
fn ten_thousand_idle_connections_beside_load() {
    let count = allowed();
    let folder = tempfile::tempdir().unwrap();
    let server = Server::configured(folder.path(), "[server]\nmax_connections = 12000", &[]);
    let embed = || {
        let body = json!({"model": "all-minilm-l6-v2", "input": "a small lamp"});
        let (status, answer) = post(&server.url("/v1/embeddings"), &body);
        assert_eq!(status, 200, "{answer}");
    };
    (0..20).for_each(|_| embed());
    let before = resident(server.id());
    let (over, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let more = |count: usize| {
        let so_far = served.load(Ordering::Relaxed);
        server.wait_until("served", Duration::from_secs(60), || {
            served.load(Ordering::Relaxed) >= so_far + count
        });
    };
    std::thread::scope(|scope| {
        let end = SetOnDrop(&over);
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    embed();
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut idle: Vec<TcpStream> = (0..count).map(|_| connect(&server)).collect();
        ask(&mut idle);
        more(50);
        assert_eq!(get(&server.admin_url("/metrics")).0, 200);
        let each = (resident(server.id()) - before) / count as f64;
        eprintln!("{count} idle connections: {each:.1} KiB of resident memory each");
        assert!(each < KIB_EACH_MAX, "{each} KiB each");
        // Each of them still works, and the load does when they are gone.
        ask(&mut idle);
        drop(idle);
        more(10);
        drop(end);
    });
}
