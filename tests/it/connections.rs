//! Ten thousand idle connections, held beside load.

use std::io::{Read, Write};
use std::net::TcpStream;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use crate::server::{Server, get, post};

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

#[test]
fn ten_thousand_idle_connections_beside_load() {
    let count = allowed();
    let folder = tempfile::tempdir().unwrap();
    let server = Server::configured(folder.path(), "[server]\nmax_connections = 12000", &[]);
    let embed = || {
        let body = json!({"model": "all-minilm-l6-v2", "input": "a small lamp"});
        assert_eq!(post(&server.url("/v1/embeddings"), &body).0, 200);
    };
    (0..20).for_each(|_| embed());
    let before = resident(server.id());
    let mut idle: Vec<TcpStream> = (0..count)
        .map(|_| {
            let mut client = TcpStream::connect(server.main_address()).unwrap();
            client.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
            client
        })
        .collect();
    let answered = |client: &mut TcpStream| {
        let mut answer = [0; 512];
        let length = client.read(&mut answer).unwrap();
        assert!(answer[..length].starts_with(b"HTTP/1.1 200"), "not answered");
    };
    idle.iter_mut().for_each(answered);
    (0..50).for_each(|_| embed());
    assert_eq!(get(&server.admin_url("/metrics")).0, 200);
    let each = (resident(server.id()) - before) / count as f64;
    eprintln!("{count} idle connections: {each:.1} KiB of resident memory each");
    assert!(each < KIB_EACH_MAX, "{each} KiB each");
    // Each of them still works.
    for client in &mut idle {
        client.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    }
    idle.iter_mut().for_each(answered);
    drop(idle);
    embed();
}
