//! Spans by OTLP over HTTP, received by a collector of our own on loopback. Built with the feature
//! `otlp` only.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde_json::{Value, json};

use crate::server::{Server, chat, get};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// One export.
struct Export {
    /// Request line and headers, in lower case.
    head: String,
    body: Vec<u8>,
}

/// Answers everything with 200; gives its address.
fn collector() -> (String, Receiver<Export>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (sender, exports) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(100) {
            let sender = sender.clone();
            std::thread::spawn(move || receive(stream.unwrap(), &sender));
        }
    });
    (address, exports)
}

/// Every request of one connection.
fn receive(stream: TcpStream, exports: &Sender<Export>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let head = head.to_lowercase();
        let length = head.split("content-length: ").nth(1).expect("a length");
        let length: usize = length.lines().next().unwrap().trim().parse().unwrap();
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let json = head.contains("content-type: application/json");
        let (kind, answer) = if json { ("json", "{}") } else { ("x-protobuf", "") };
        let length = answer.len();
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/{kind}\r\ncontent-length: {length}\r\n\
             \r\n{answer}"
        );
        (&stream).write_all(answer.as_bytes()).unwrap();
        if exports.send(Export { head, body }).is_err() {
            return;
        }
    }
}

/// Sends a chat as part of a sampled trace; the answer's `traceparent`.
fn ask(server: &Server, body: &Value) -> (u16, String) {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    let agent: ureq::Agent = config.build().into();
    let request = agent
        .post(server.url("/v1/chat/completions"))
        .header("content-type", "application/json")
        .header("traceparent", format!("00-{TRACE}-{PARENT}-01"));
    let mut answer = request.send(body.to_string()).expect("an answer");
    let _ = answer.body_mut().read_to_string();
    let parent = answer.headers()["traceparent"].to_str().unwrap().to_owned();
    (answer.status().as_u16(), parent)
}

fn attribute<'a>(of: &'a Value, key: &str) -> &'a Value {
    let all = of["attributes"].as_array().unwrap();
    let found = all.iter().find(|one| one["key"] == key);
    &found.unwrap_or_else(|| panic!("no {key} in {of}"))["value"]
}

#[test]
fn a_request_is_a_span_of_its_callers_trace() {
    let (endpoint, exports) = collector();
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
    ];
    let mut server = Server::launch_with(&environment);
    server.wait_ready();
    let (status, told) = ask(&server, &chat("What is a quibblewort?", 8));
    assert_eq!(status, 200);
    assert_eq!(get(&server.admin_url("/metrics")).0, 200);
    server.signal("INT");
    assert_eq!(server.wait_exit(Duration::from_secs(30)).0.code(), Some(0));

    let mut spans = Vec::new();
    while let Ok(export) = exports.recv_timeout(Duration::from_secs(1)) {
        assert!(export.head.starts_with("post /v1/traces http/1.1"), "{}", export.head);
        let body: Value = serde_json::from_slice(&export.body).unwrap();
        assert!(!body.to_string().contains("quibblewort"), "{body}");
        for resource in body["resourceSpans"].as_array().unwrap() {
            let name = attribute(&resource["resource"], "service.name");
            assert_eq!(name, &json!({"stringValue": "sconce"}));
            for scope in resource["scopeSpans"].as_array().unwrap() {
                spans.extend(scope["spans"].as_array().unwrap().clone());
            }
        }
    }
    let named = |name: &str| {
        let mut found = spans.iter().filter(|span| span["name"] == name);
        let first = found.next().unwrap_or_else(|| panic!("no span {name} in {spans:#?}"));
        assert!(found.next().is_none(), "{name} comes twice");
        first
    };
    let request = named("POST /v1/chat/completions");
    assert_eq!(spans.len(), 4, "probes and scrapes are no spans: {spans:#?}");
    assert!(spans.iter().all(|span| span["traceId"] == TRACE), "{spans:#?}");
    assert_eq!((&request["parentSpanId"], &request["kind"]), (&json!(PARENT), &json!(2)));
    assert_eq!(told, format!("00-{TRACE}-{}-01", request["spanId"].as_str().unwrap()));
    assert_eq!(attribute(request, "gen_ai.request.model")["stringValue"], "smollm2-135m-instruct");
    assert_eq!(attribute(request, "sconce.outcome")["stringValue"], "ok");
    assert_eq!(attribute(request, "http.response.status_code")["intValue"], "200");
    let time = |span: &Value, key: &str| -> u64 { span[key].as_str().unwrap().parse().unwrap() };
    let mut at = time(request, "startTimeUnixNano");
    for part in ["queue", "prefill", "decode"].map(named) {
        assert_eq!(part["parentSpanId"], request["spanId"]);
        let (start, end) = (time(part, "startTimeUnixNano"), time(part, "endTimeUnixNano"));
        // The clocks of spans and of times between are two: a millisecond is no disagreement.
        assert!(start + 1_000_000 >= at && end >= start, "{part} begins before {at}");
        at = end;
    }
    assert!(at <= time(request, "endTimeUnixNano") + 1_000_000);
}

#[test]
fn the_standard_environment_holds() {
    let (endpoint, exports) = collector();
    let place = format!("{endpoint}/else/where");
    let environment = [
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", place.as_str()),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-collector-key=abc"),
        ("OTEL_SERVICE_NAME", "lamps"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ];
    let mut server = Server::launch_with(&environment);
    server.wait_ready();
    assert_eq!(ask(&server, &json!({"model": "nobody", "messages": []})).0, 400);
    let export = exports.recv_timeout(Duration::from_secs(20)).expect("an export");
    assert!(export.head.starts_with("post /else/where http/1.1"), "{}", export.head);
    for header in ["content-type: application/x-protobuf", "x-collector-key: abc"] {
        assert!(export.head.contains(header), "no {header} in {}", export.head);
    }
    let holds = |part: &[u8]| export.body.windows(part.len()).any(|found| found == part);
    let trace: Vec<u8> =
        (0..32).step_by(2).map(|at| u8::from_str_radix(&TRACE[at..at + 2], 16).unwrap()).collect();
    for part in [&b"POST /v1/chat/completions"[..], b"lamps", b"invalid_request", &trace] {
        assert!(holds(part), "no {:?}", String::from_utf8_lossy(part));
    }
    drop(server);

    // Without a collector there are no spans: a caller's trace goes on as it came.
    let server = Server::launch_with(&[("OTEL_SDK_DISABLED", "true"), environment[0]]);
    let (_, told) = ask(&server, &json!({}));
    assert_eq!(told, format!("00-{TRACE}-{PARENT}-01"));
    assert!(exports.recv_timeout(Duration::from_millis(300)).is_err());
}
