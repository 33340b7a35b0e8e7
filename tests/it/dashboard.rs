//! The dashboard as Grafana would fill it: every panel's query, asked of a real Prometheus that
//! evaluates the recording rules over a real server, draws something. Needs Debian's `prometheus`
//! package: `cargo test -- --ignored`.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::time::Duration;

use serde_json::{Value, json};

use crate::k8s_alerts::write_rules;
use crate::k8s_queries::{Query, queries};
use crate::prometheus::{Prometheus, alone, encoded};
use crate::server::{Server, chat, get, post};

/// What a cluster's other exporters say of a Sconce of one pod; `HPA` is its autoscaler's labels.
const OTHERS: &str = r#"karpenter_interruption_received_messages_total{message_type="spot"} 1
keda_scaler_detail_errors_total{exported_namespace="sconce",scaledObject="sconce"} 1
kube_horizontalpodautoscaler_spec_max_replicas{HPA} 8
kube_horizontalpodautoscaler_spec_min_replicas{HPA} 1
kube_horizontalpodautoscaler_status_current_replicas{HPA} 1
kube_horizontalpodautoscaler_status_desired_replicas{HPA} 1
kube_pod_info{namespace="sconce",pod="sconce-1",node="node-1"} 1
node_gpu_hourly_cost{node="node-1"} 0.8
"#;
const HPA: &str = r#"namespace="sconce",horizontalpodautoscaler="keda-hpa-sconce""#;

/// Serves a page of metrics; its address.
fn exporter(page: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close";
            let _ = write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{page}", page.len());
        }
    });
    address
}

/// The query with what Grafana fills in.
fn filled(text: &str) -> String {
    text.replace("$namespace", "sconce").replace("$model", ".*")
}

/// How many series a query gives now.
fn series(prometheus: &Prometheus, query: &str) -> usize {
    let url = prometheus.url(&format!("/api/v1/query?query={}", encoded(&filled(query))));
    let (status, text) = get(&url);
    assert_eq!(status, 200, "{query}: {text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    let result = answer["data"]["result"].as_array().unwrap();
    let number = |one: &&Value| one["value"][1].as_str().unwrap().parse::<f64>().unwrap();
    result.iter().filter(|one| number(one).is_finite()).count()
}

/// A little of everything that the dashboard counts.
fn use_it(server: &Server) {
    for turn in 0..4 {
        let (status, answer) =
            post(&server.url("/v1/chat/completions"), &chat(&format!("Tell me of {turn}."), 8));
        assert_eq!(status, 200, "{answer}");
        let texts = json!({"model": "all-minilm-l6-v2", "input": ["a lamp", "a wall"]});
        assert_eq!(post(&server.url("/v1/embeddings"), &texts).0, 200);
    }
}

#[test]
#[ignore = "needs Debian's package prometheus"]
fn every_panel_draws_something() {
    let _alone = alone();
    let server = Server::start(&["--device-hourly-usd", "0.8", "--grace-seconds", "60"]);
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join(write_rules(folder.path()));
    let config = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\n\
         scrape_configs:\n- job_name: sconce\n  static_configs:\n  - targets: ['{}']\n    \
         labels: {{namespace: sconce, pod: sconce-1}}\n- job_name: cluster\n  \
         honor_labels: true\n  static_configs:\n  - targets: ['{}']\n",
        rules.display(),
        server.admin_address(),
        exporter(OTHERS.replace("HPA", HPA))
    );
    // Rules are evaluated every second instead of every 30 or 60.
    let text = std::fs::read_to_string(&rules).unwrap();
    let often = ["30s", "1m"].iter().fold(text, |text, interval| {
        text.replace(&format!("\"interval\":\"{interval}\""), "\"interval\":\"1s\"")
    });
    std::fs::write(&rules, often).unwrap();
    let prometheus = Prometheus::start(&config, None);
    prometheus.wait("sum(up)", |up| up == 2.0);
    use_it(&server);
    prometheus.wait("count(sconce:pods:count)", |_| true);
    use_it(&server);

    let queries = queries();
    let panels: Vec<&Query> =
        queries.iter().filter(|query| query.place.starts_with("panel ")).collect();
    assert!(panels.len() > 40, "only {} queries", panels.len());
    // A deadline is there only while the server drains; the others must be seen before.
    let (draining, serving): (Vec<&Query>, Vec<&Query>) =
        panels.into_iter().partition(|query| query.text.contains("sconce_drain_deadline"));
    let empty = |panels: &[&Query]| -> Vec<String> {
        let none = |query: &&&Query| series(&prometheus, &query.text) == 0;
        panels.iter().filter(none).map(|q| format!("{}: {}", q.place, q.text)).collect()
    };
    // Rates need two scrapes, rules of rules a few evaluations.
    let filled_by = |panels: &[&Query]| {
        let mut last = Vec::new();
        for _ in 0..40 {
            last = empty(panels);
            if last.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        assert!(last.is_empty(), "nothing to see: {last:#?}");
    };
    filled_by(&serving);
    assert_eq!(post(&server.admin_url("/drain?deadline=50"), &Value::Null).0 / 100, 2);
    assert!(!draining.is_empty());
    filled_by(&draining);
}
