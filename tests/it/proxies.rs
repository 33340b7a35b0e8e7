//! Two servers behind a proxy that keeps connections open, and one of them is told to go: no client
//! sees anything of it. Needs Debian's `nginx` and `haproxy` packages: `cargo test -- --ignored`.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::server::{Server, SetOnDrop, chat, get};

/// A running proxy; gone when dropped.
struct Proxy {
    child: Child,
    port: u16,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// nginx has no health checks of its own: it goes by what answers say.
fn nginx(folder: &Path, servers: [&str; 2]) -> Proxy {
    let port = free_port();
    let here = folder.display();
    let [one, two] = servers;
    let config = format!(
        "worker_processes 1; pid {here}/pid; error_log {here}/error.log;
         events {{ worker_connections 512; }}
         http {{
           access_log off;
           client_body_temp_path {here}/body; proxy_temp_path {here}/proxy;
           fastcgi_temp_path {here}/f; uwsgi_temp_path {here}/u; scgi_temp_path {here}/s;
           upstream sconce {{ server {one}; server {two}; keepalive 32; }}
           server {{
             listen 127.0.0.1:{port};
             location / {{
               proxy_pass http://sconce; proxy_http_version 1.1;
               proxy_set_header Connection \"\";
               proxy_next_upstream error timeout http_503 non_idempotent;
             }}
           }}
         }}"
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new("nginx");
    // As one process: ending it ends all of it.
    command.args(["-g", "daemon off; master_process off;", "-c"]).arg(&file).arg("-p").arg(folder);
    run(command, port)
}

/// haproxy asks for readiness, and tries another server where one says 503.
fn haproxy(folder: &Path, servers: [&str; 2]) -> Proxy {
    let port = free_port();
    let [one, two] = servers;
    let config = format!(
        "global
           maxconn 512
         defaults
           mode http
           timeout connect 2s
           timeout client 60s
           timeout server 60s
           option redispatch
           retries 3
           retry-on conn-failure empty-response response-timeout 503
           option httpchk GET /readyz
           default-server check inter 500ms fall 1 rise 1
         frontend clients
           bind 127.0.0.1:{port}
           default_backend sconce
         backend sconce
           balance roundrobin
           http-reuse always
           server one {one}
           server two {two}
        "
    );
    let file = folder.join("haproxy.cfg");
    // It takes a file whose last line does not end for a truncated one.
    std::fs::write(&file, config.trim_end().to_owned() + "\n").unwrap();
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&file);
    run(command, port)
}

fn run(mut command: Command, port: u16) -> Proxy {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().expect("Debian's packages nginx and haproxy are installed");
    Proxy { child, port }
}

/// What one client saw in the end, if it was not what it asked for.
fn ask(agent: &ureq::Agent, base: &str, stream: bool) -> Result<(), String> {
    let (path, body) = if stream {
        let mut body = chat("Count.", 8);
        body["stream"] = json!(true);
        ("/v1/chat/completions", body)
    } else {
        ("/v1/embeddings", json!({"model": "all-minilm-l6-v2", "input": "a small lamp"}))
    };
    let request = agent.post(format!("{base}{path}")).header("content-type", "application/json");
    let mut response = request.send(body.to_string()).map_err(|error| error.to_string())?;
    let status = response.status().as_u16();
    let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
    let whole = if stream { text.ends_with("data: [DONE]\n\n") } else { text.ends_with('}') };
    if status == 200 && whole { Ok(()) } else { Err(format!("{status}: {text}")) }
}

fn nobody_notices(proxy: impl Fn(&Path, [&str; 2]) -> Proxy) {
    let folder = tempfile::tempdir().unwrap();
    let mut going = Server::start(&["--grace-seconds", "15"]);
    let staying = Server::start(&[]);
    let proxy = proxy(folder.path(), [going.main_address(), staying.main_address()]);
    let base = format!("http://127.0.0.1:{}", proxy.port);
    let ready = format!("{base}/readyz");
    staying.wait_until("proxied", Duration::from_secs(20), || get(&ready).0 == 200);
    let over = AtomicBool::new(false);
    let asked = AtomicUsize::new(0);
    let reach = |count: usize| {
        let so_far = asked.load(Ordering::Relaxed);
        staying.wait_until("asked", Duration::from_secs(120), || {
            asked.load(Ordering::Relaxed) >= so_far + count
        });
    };
    let of = |server: &Server| {
        server.metric(
            "sconce_requests_total{model=\"all-minilm-l6-v2\",task=\"embed\",outcome=\"ok\"}",
        )
    };
    let failures = std::thread::scope(|scope| {
        let end = SetOnDrop(&over);
        let clients: Vec<_> = (0..6)
            .map(|client| {
                let (over, asked, base) = (&over, &asked, &base);
                scope.spawn(move || {
                    let config = ureq::Agent::config_builder()
                        .http_status_as_error(false)
                        .timeout_global(Some(Duration::from_secs(60)));
                    let agent: ureq::Agent = config.build().into();
                    let mut failures = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        failures.extend(ask(&agent, base, client == 0).err());
                        asked.fetch_add(1, Ordering::Relaxed);
                    }
                    failures
                })
            })
            .collect();
        reach(60);
        assert!(of(&going) > 5.0 && of(&staying) > 5.0, "both serve");
        going.signal("TERM");
        let (status, _) = going.wait_exit(Duration::from_secs(30));
        assert_eq!(status.code(), Some(0), "{}", going.log());
        reach(60);
        drop(end);
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    let asked = asked.load(Ordering::Relaxed);
    let log = std::fs::read_to_string(folder.path().join("error.log")).unwrap_or_default();
    assert!(failures.is_empty(), "{} of {asked}: {failures:?}\n{log}", failures.len());
}

#[test]
#[ignore = "needs Debian's nginx"]
fn a_drain_behind_nginx_is_not_seen() {
    nobody_notices(nginx);
}

#[test]
#[ignore = "needs Debian's haproxy"]
fn a_drain_behind_haproxy_is_not_seen() {
    nobody_notices(haproxy);
}
