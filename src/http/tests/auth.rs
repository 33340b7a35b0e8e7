//! Who is let in, and by which tricks nobody is.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request};
use serde_json::json;
use tokio::net::TcpSocket;

use super::edge::{LIMITS, LOOPBACK, Site, read_to_end, write};
use super::openapi::documented;
use super::{App, Reply, drive, post};
use crate::admission::testing::{done, metric, say};
use crate::config::Config;
use crate::http::admin_router;
use crate::http::connection::Peer;
use crate::http::listener::{Limits, Server};
use crate::request::{Finish, Submission, TenantId};

pub(super) const KEY: &str = "an-ordinary-key-for-tests";
const ADMIN: &str = "an-admin-key-for-the-tests";
const GATEWAY: &str = "a-gateway-key-for-the-tests";

/// What answers without a key.
const OPEN: [&str; 5] = ["/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"];
const OPEN_TO_ADMIN: [&str; 2] = ["/livez", "/readyz"];

/// A configuration with three keys; the folder holds the file.
pub(super) fn guarded(extra: &str) -> (Config, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let key = |name: &str, key: &str, rest: &str| {
        format!("[[key]]\nname = \"{name}\"\nkey = \"{key}\"\n{rest}\n")
    };
    let text = key("ci", KEY, &format!("tenant = \"team\"\n{extra}"))
        + &key("ops", ADMIN, "admin = true")
        + &key("gateway", GATEWAY, "");
    std::fs::write(&file, text).unwrap();
    let mut config = Config::default();
    config.auth.keys_file = Some(file);
    config.auth.tenant_header = Some("x-tenant".into());
    (config, folder)
}

pub(super) fn bearer(mut request: Request<Body>, key: &str) -> Request<Body> {
    let value = HeaderValue::from_str(&format!("Bearer {key}")).unwrap();
    request.headers_mut().insert("authorization", value);
    request
}

fn from(mut request: Request<Body>, peer: &str) -> Request<Body> {
    request.extensions_mut().insert(Peer::Address(peer.parse().unwrap()));
    request
}

fn get(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

const REMOTE: &str = "10.0.0.7:999";

/// A model's name where a path has one, and its version.
fn routes() -> BTreeSet<String> {
    let named = |path: &String| path.replace("{model}", "tiny").replace("{version}", "1");
    documented().keys().map(named).collect()
}

fn tricks(path: &str) -> Vec<String> {
    let tail = &path[1..];
    let last = path.rfind('/').unwrap();
    let mut tricks = vec![
        path.to_owned(),
        format!("/{path}"),
        format!("{path}/"),
        format!("{path}//"),
        format!("/.{path}"),
        format!("/%2e{path}"),
        format!("/%2F{tail}"),
        format!("/livez/..{path}"),
        format!("/livez/%2e%2e{path}"),
        format!("/livez/..%2f{tail}"),
        format!("/livez{path}"),
        format!("{path}?x=/livez"),
        format!("{path}?/livez"),
        format!("{path};/livez"),
        format!("{path}%3F/livez"),
        format!("{path}%23/livez"),
        format!("{path}%00"),
        format!("{path}/../livez"),
        format!("{}/{}", path[..last].to_owned() + "/", &path[last + 1..]),
        path.to_uppercase(),
        format!("http://localhost{path}"),
        format!("http://livez/{path}"),
    ];
    if let Some(first) = tail.chars().next() {
        tricks.push(format!("/%{:02x}{}", first as u32, &tail[1..]));
    }
    tricks
}

/// Whether a path means one of the open ones, however it is written.
fn is_open(path: &str, open: &[&str]) -> bool {
    let path = path.split('?').next().unwrap();
    open.contains(&path.strip_prefix("http://localhost").unwrap_or(path))
}

const HOSTS: [&str; 6] = ["localhost", "localhost/v1/models?", "x/livez?", "/livez", "livez#", ""];
const KEYS: [&str; 6] = ["", "Bearer", "Bearer ", "Bearer wrong", "Basic eDp5", ADMIN];

#[tokio::test]
async fn nothing_answers_without_a_key() {
    let (mut config, _folder) = guarded("");
    config.admin.metrics_on_main = true;
    let (app, _inbox) = App::new(config);
    let hosts = HOSTS.map(|host| (host, ""));
    let tries = hosts.into_iter().chain(KEYS.map(|key| ("localhost", key)));
    let tries: Vec<_> = tries.collect();
    let mut asked = 0;
    for path in routes().iter().flat_map(|route| tricks(route)) {
        for method in [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS, Method::PUT] {
            for (host, key) in &tries {
                let request = || {
                    let request = Request::builder().method(&method).uri(&path);
                    let request = request.header("host", *host).header("authorization", *key);
                    request.body(Body::from("{}"))
                };
                let (Ok(to_main), Ok(to_admin)) = (request(), request()) else { continue };
                if !is_open(&path, &OPEN) {
                    let on_main = app.send(to_main).await.status.as_u16();
                    assert!([401, 404, 405].contains(&on_main), "{method} {path}: {on_main}");
                }
                if !is_open(&path, &OPEN_TO_ADMIN) {
                    let on_admin = app.admin(from(to_admin, REMOTE)).await.status.as_u16();
                    assert!([401, 404, 405].contains(&on_admin), "{method} {path}: {on_admin}");
                }
                asked += 1;
            }
        }
    }
    assert!(asked > 40_000, "{asked}");
    let refused = app.get("/v1/models").await;
    assert_eq!(refused.header("www-authenticate"), "Bearer");
    let error = &refused.json()["error"];
    assert_eq!(error["code"], "invalid_api_key");
    assert_eq!((&error["type"], &error["param"]), (&json!("invalid_request_error"), &json!(null)));
    // No hint whether a path, a model or a key is there.
    let same = |reply: &Reply| reply.json()["error"]["code"] == "invalid_api_key";
    assert!(same(&app.get("/v1/models/nothing").await) && same(&app.get("/nothing").await));
    assert!(same(&app.send(bearer(get("/v1/models"), "not-a-key-that-we-know")).await));
    for path in OPEN {
        // Ready or not is said to everybody.
        let status = app.get(path).await.status.as_u16();
        assert!([200, 503].contains(&status), "{path}: {status}");
    }
}

/// The same over sockets, where a request line need not be a sound URI.
#[tokio::test]
async fn nothing_answers_on_the_wire() {
    let (config, _folder) = guarded("");
    let limits = Limits { max_connections: 64, ..LIMITS };
    let site = Site::configured(limits, config);
    let admin = Server::bind(&[LOOPBACK], 0, Limits::admin(&site.front.config.server)).unwrap();
    let admin_port = admin.port();
    tokio::spawn(admin.serve(admin_router(site.front.clone()), site.front.lifecycle.watch()));
    let whole = ["*", "livez", "http://livez/v1/models", "/v1/models?", "/v1/%6dodels"];
    let whole = whole.into_iter().map(str::to_owned);
    let of = |path: &String| {
        [path.clone(), format!("/{path}"), format!("/livez/..{path}"), format!("/%2e{path}")]
    };
    for line in whole.chain(routes().iter().flat_map(of)) {
        for host in ["localhost", "localhost/v1/models?", "localhost/livez?", "/livez", "a b"] {
            let request =
                format!("GET {line} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            // A sidecar's address: on the admin side it is nobody's own.
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.6:0".parse().unwrap()).unwrap();
            let stranger = socket.connect((Ipv4Addr::LOCALHOST, admin_port).into()).await.unwrap();
            for (mut client, open) in
                [(site.connect().await, &OPEN[..]), (stranger, &OPEN_TO_ADMIN[..])]
            {
                if is_open(&line, open) {
                    continue;
                }
                write(&mut client, &request).await;
                let answer = read_to_end(&mut client).await;
                let status = answer.split(' ').nth(1).unwrap_or("400");
                let refused = ["400", "401", "404", "405"].contains(&status);
                assert!(refused, "{line} {host}: {answer}");
            }
        }
    }
}

#[tokio::test]
async fn a_key_lets_in_and_names_the_tenant() {
    let (config, _folder) = guarded("");
    let (app, inbox) = App::new(config);
    let (seen, mut tenants) = tokio::sync::mpsc::unbounded_channel();
    drive(&app.front, inbox, move |Submission { request, sink }| {
        seen.send(request.tenant).unwrap();
        say(&sink, "a");
        done(&sink, Finish::Stop, 3, 1);
    });
    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    let mut ask = async |key: &str, tenant: Option<&'static str>| {
        let mut request = bearer(post("/v1/chat/completions", chat.to_string()), key);
        if let Some(tenant) = tenant {
            request.headers_mut().insert("x-tenant", HeaderValue::from_static(tenant));
        }
        let reply = app.send(request).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        tenants.recv().await.unwrap()
    };
    let team = ask(KEY, None).await;
    assert_ne!(team, TenantId::default());
    assert_eq!(ask(KEY, Some("other")).await, team, "a key with a tenant speaks for no other");
    let own = ask(GATEWAY, None).await;
    let other = ask(GATEWAY, Some("other")).await;
    assert!(own != team && other != own && other != team);
    assert_eq!(ask(GATEWAY, Some("team")).await, team);
    for (tenant, requests) in [("team", 3.0), ("other", 1.0), ("gateway", 1.0)] {
        let labels = [("tenant", tenant), ("outcome", "ok")];
        assert_eq!(
            metric(&app.front, "sconce_tenant_requests_total", &labels),
            requests,
            "{tenant}"
        );
    }
    let labels = [("tenant", "team"), ("kind", "generated")];
    assert_eq!(metric(&app.front, "sconce_tenant_tokens_total", &labels), 3.0);
    let mut odd = bearer(get("/v1/models"), GATEWAY);
    odd.headers_mut().insert("x-tenant", HeaderValue::from_static("a b\"c"));
    assert_eq!(app.send(odd).await.status, 400);
    let lower = {
        let mut request = get("/v1/models");
        let value = HeaderValue::from_str(&format!("bearer  {KEY} ")).unwrap();
        request.headers_mut().insert("authorization", value);
        request
    };
    assert_eq!(app.send(lower).await.status, 200, "the scheme's case does not matter");
}

#[tokio::test]
async fn without_keys_the_header_names_the_tenant() {
    let mut config = Config::default();
    config.auth.tenant_header = Some("x-tenant".into());
    let (app, _inbox) = App::new(config);
    let mut request = post("/v1/embeddings", "{}");
    request.headers_mut().insert("x-tenant", HeaderValue::from_static("blue"));
    assert_eq!(app.send(request).await.status, 400);
    let labels = [("tenant", "blue"), ("outcome", "client_error")];
    assert_eq!(metric(&app.front, "sconce_tenant_requests_total", &labels), 1.0);
}

#[tokio::test]
async fn limits_of_a_key_are_429_until_the_window_ends() {
    let (config, _folder) = guarded("requests_per_minute = 2");
    let (app, inbox) = App::new(config);
    drive(&app.front, inbox, |Submission { sink, .. }| done(&sink, Finish::Stop, 1, 0));
    let body = json!({"model": "tiny", "prompt": "a"}).to_string();
    let ask = async |key| app.send(bearer(post("/v1/completions", body.clone()), key)).await;
    for _ in 0..2 {
        assert_eq!(ask(KEY).await.status, 200);
    }
    let refused = ask(KEY).await;
    assert_eq!(refused.status, 429);
    let error = &refused.json()["error"];
    assert_eq!(error["code"], "rate_limit_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("2 requests") && message.contains("requests_per_minute"), "{message}");
    let wait: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    // Refused before its body is read: nobody knows yet which model it is for.
    let labels = [("model", "unknown"), ("reason", "tenant")];
    assert_eq!(metric(&app.front, "sconce_rejections_total", &labels), 1.0);
    assert_eq!(ask(GATEWAY).await.status, 200, "another key has its own limits");
}

#[tokio::test]
async fn the_admin_side_is_for_this_machine_and_admin_keys() {
    let (config, _folder) = guarded("");
    let (app, _inbox) = App::new(config.clone());
    for path in ["/metrics", "/stats", "/config", "/drain"] {
        let status = async |request| app.admin(request).await.status.as_u16();
        assert_eq!(status(get(path)).await, 401);
        assert_eq!(status(from(get(path), REMOTE)).await, 401);
        assert_eq!(status(from(get(path), "127.0.0.6:9")).await, 401, "a sidecar's address");
        assert_eq!(status(from(get(path), "127.0.0.1:9")).await, 200);
        assert_eq!(status(from(get(path), "[::1]:9")).await, 200);
        assert_eq!(status(bearer(from(get(path), REMOTE), KEY)).await, 403);
        assert_eq!(status(bearer(from(get(path), REMOTE), ADMIN)).await, 200);
    }
    assert_eq!(app.admin(from(get("/readyz"), REMOTE)).await.status, 200);
    let drain = || from(Request::post("/drain").body(Body::empty()).unwrap(), REMOTE);
    assert_eq!(app.admin(drain()).await.status, 401);
    assert_eq!(app.admin(bearer(drain(), KEY)).await.status, 403);
    assert_eq!(app.admin(bearer(drain(), ADMIN)).await.status, 202);

    let mut config = config;
    config.auth.open_metrics = true;
    config.admin.metrics_on_main = true;
    let (app, _inbox) = App::new(config);
    assert_eq!(app.admin(from(get("/metrics"), REMOTE)).await.status, 200);
    assert_eq!(app.get("/metrics").await.status, 200);
    assert_eq!(app.admin(from(get("/stats"), REMOTE)).await.status, 401);
}
