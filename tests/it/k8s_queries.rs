//! Every query of the rules, the dashboard and the scalers is PromQL, and names only metrics,
//! labels and label values that the running server exports, or that a named other program does.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use crate::k8s_tools::{all, one, python, rendered, root, type_check};
use crate::server::{Server, get};

/// What other programs export: kube-state-metrics, KEDA, Karpenter, OpenCost, Prometheus itself.
const OTHERS: [(&str, &[&str]); 9] = [
    ("karpenter_interruption_received_messages_total", &["message_type"]),
    ("keda_scaler_detail_errors_total", &["exported_namespace", "scaledObject"]),
    ("kube_horizontalpodautoscaler_spec_max_replicas", &["horizontalpodautoscaler"]),
    ("kube_horizontalpodautoscaler_spec_min_replicas", &["horizontalpodautoscaler"]),
    ("kube_horizontalpodautoscaler_status_current_replicas", &["horizontalpodautoscaler"]),
    ("kube_horizontalpodautoscaler_status_desired_replicas", &["horizontalpodautoscaler"]),
    ("kube_pod_info", &["node"]),
    ("node_gpu_hourly_cost", &["node"]),
    ("up", &[]),
];

/// What the scrape adds to every series.
const TARGET: [&str; 3] = ["namespace", "job", "pod"];

/// A query and where it stands.
pub(crate) struct Query {
    pub(crate) place: String,
    pub(crate) text: String,
    /// The name it is recorded under.
    pub(crate) record: Option<String>,
}

/// Labels of a metric, each with the values seen; no values where they are not known.
type Labels = BTreeMap<String, BTreeSet<String>>;

fn dashboard() -> Value {
    let objects = &rendered()["components/monitoring"];
    let text = &one(objects, "ConfigMap", "sconce-dashboard")["data"]["sconce.json"];
    serde_json::from_str(text.as_str().unwrap()).unwrap()
}

fn panels(dashboard: &Value) -> Vec<&Value> {
    let panels = dashboard["panels"].as_array().unwrap().iter();
    panels.filter(|panel| panel["type"] != "row").collect()
}

/// All queries of rules, panels, variables and scalers.
pub(crate) fn queries() -> Vec<Query> {
    let mut found = Vec::new();
    let mut add = |place: String, text: &Value, record: Option<&str>| {
        let text = text.as_str().unwrap_or_else(|| panic!("{place}: no query"));
        // What Grafana fills in.
        let text = text.replace("$__rate_interval", "5m");
        found.push(Query { place, text, record: record.map(str::to_owned) });
    };
    for rule in all(&rendered()["components/monitoring"], "PrometheusRule") {
        for group in rule["spec"]["groups"].as_array().unwrap() {
            for rule in group["rules"].as_array().unwrap() {
                let record = rule["record"].as_str();
                let name = record.or(rule["alert"].as_str()).unwrap();
                add(format!("rule {name}"), &rule["expr"], record);
            }
        }
    }
    let board = dashboard();
    for panel in panels(&board) {
        for target in panel["targets"].as_array().unwrap() {
            add(format!("panel {}", panel["title"]), &target["expr"], None);
        }
    }
    for variable in board["templating"]["list"].as_array().unwrap() {
        if variable["type"] == "query" {
            let query = variable["query"]["query"].as_str().unwrap();
            let inner = query.strip_prefix("label_values(").and_then(|q| q.strip_suffix(')'));
            let (selector, label) = inner.unwrap().rsplit_once(", ").unwrap();
            let text = Value::from(format!("count by ({label}) ({selector})"));
            add(format!("variable {}", variable["name"]), &text, None);
        }
    }
    for (place, objects) in rendered() {
        for scaler in all(objects, "ScaledObject") {
            for trigger in scaler["spec"]["triggers"].as_array().unwrap() {
                if trigger["type"] == "prometheus" {
                    add(format!("scaler of {place}"), &trigger["metadata"]["query"], None);
                }
            }
        }
    }
    found
}

/// The server's series as it exports them before its first request. What an `_info` says is that of
/// this machine or of an earlier run: other values are as good.
fn exported() -> BTreeMap<String, Labels> {
    let server = Server::launch(&["--device-hourly-usd", "1"]);
    let (status, page) = get(&server.admin_url("/metrics"));
    assert_eq!(status, 200);
    let mut found: BTreeMap<String, Labels> = BTreeMap::new();
    for line in page.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let series = line.rsplit_once(' ').unwrap().0;
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let known = found.entry(name.to_owned()).or_default();
        for pair in labels.trim_end_matches('}').split("\",").filter(|pair| !pair.is_empty()) {
            let (label, value) = pair.split_once("=\"").unwrap();
            let values = known.entry(label.to_owned()).or_default();
            if !name.ends_with("_info") {
                values.insert(value.trim_end_matches('"').to_owned());
            }
        }
    }
    found
}

fn unvalued(labels: &[&str]) -> Labels {
    labels.iter().map(|label| ((*label).to_owned(), BTreeSet::new())).collect()
}

/// What each query names, or what is wrong with it.
pub(crate) fn parse(queries: &[Query]) -> Vec<Value> {
    let asked: Vec<Value> =
        queries.iter().map(|query| json!({"name": query.place, "query": query.text})).collect();
    let answer = python("queries.py", &[] as &[&Path], &Value::from(asked).to_string());
    serde_json::from_str(&answer).unwrap()
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|item| item.as_str().unwrap()).collect()
}

/// What is wrong with a matcher of a metric with `labels`.
fn wrong(matcher: &Value, labels: &Labels) -> Option<String> {
    let [label, operation, value] = [0, 1, 2].map(|at| matcher[at].as_str().unwrap());
    if TARGET.contains(&label) {
        return None;
    }
    let Some(values) = labels.get(label) else { return Some(format!("has no label {label}")) };
    // Models, tenants and what Grafana fills in are not known here.
    if values.is_empty() || value.starts_with('$') || ["model", "tenant"].contains(&label) {
        return None;
    }
    let alternatives: Vec<&str> = match operation {
        "MatchOp.Re" => value.split('|').collect(),
        _ => vec![value],
    };
    let missing = alternatives.iter().find(|value| !values.contains(**value))?;
    Some(format!("has no {label}={missing:?}, only {values:?}"))
}

#[test]
fn queries_name_what_is_exported() {
    let queries = queries();
    assert!(queries.len() > 80, "only {} queries", queries.len());
    let parsed = parse(&queries);
    let mut known = exported();
    for (name, labels) in OTHERS {
        known.insert(name.to_owned(), unvalued(labels));
    }
    for (query, answer) in queries.iter().zip(&parsed) {
        assert_eq!(answer.get("error"), None, "{}: {}", query.place, query.text);
        if let Some(record) = &query.record {
            known.insert(record.clone(), unvalued(&texts(&answer["labels"])));
        }
    }
    let mut used = BTreeSet::new();
    let mut offences = Vec::new();
    for (query, answer) in queries.iter().zip(&parsed) {
        let mut labels: BTreeSet<&str> = TARGET.into_iter().collect();
        for selector in answer["selectors"].as_array().unwrap() {
            let metric = selector["metric"].as_str().unwrap();
            used.insert(metric.to_owned());
            let Some(family) = known.get(metric) else {
                offences.push(format!("{}: nobody exports {metric}", query.place));
                continue;
            };
            labels.extend(family.keys().map(String::as_str));
            for matcher in selector["matchers"].as_array().unwrap() {
                if let Some(wrong) = wrong(matcher, family) {
                    offences.push(format!("{}: {metric} {wrong}", query.place));
                }
            }
        }
        for label in texts(&answer["labels"]) {
            if !labels.contains(label) {
                offences.push(format!("{}: groups by {label}", query.place));
            }
        }
    }
    assert!(offences.is_empty(), "{offences:#?}");
    for (name, _) in &OTHERS {
        assert!(used.contains(*name), "no query uses {name}");
    }
}

#[test]
fn scalers_ask_for_their_own_namespace() {
    for (place, objects) in rendered() {
        for scaler in all(objects, "ScaledObject") {
            let namespace = scaler["metadata"]["namespace"].as_str().unwrap();
            assert_eq!(scaler["metadata"]["name"], "sconce", "{place}");
            for trigger in scaler["spec"]["triggers"].as_array().unwrap() {
                let Some(query) = trigger["metadata"]["query"].as_str() else { continue };
                let matcher = format!(r#"{{namespace="{namespace}",job="sconce"}}"#);
                assert!(query.contains(&matcher), "{place}: {query}");
                // An aggregate of all pods: KEDA refuses an answer of several elements.
                assert!(query.starts_with("sum("), "{place}: {query}");
            }
        }
        for kind in ["PodMonitor", "ServiceMonitor"] {
            for monitor in all(objects, kind) {
                assert_eq!(monitor["spec"]["jobLabel"], "app.kubernetes.io/name", "{place}");
            }
        }
        // Both would scrape every pod twice, and every sum would double.
        assert!(all(objects, "PodMonitor").len() + all(objects, "ServiceMonitor").len() <= 1);
    }
}

/// As plain JSON has it: the names of an enumeration instead of the enumeration.
const PLAIN: &str = "type Plain<T> = T extends string ? `${T}` : \
    T extends number | boolean | null | undefined ? T : \
    T extends (infer U)[] ? Plain<U>[] : { [K in keyof T]: Plain<T[K]> };";

#[test]
fn the_dashboard_is_one() {
    let board = dashboard();
    let head = format!("import type {{ Dashboard }} from \"@grafana/schema\";\n{PLAIN}\n");
    let source = format!("{head}export const board: Plain<Dashboard> = {board};\n");
    let complaints = type_check("dashboard", &source);
    assert!(complaints.is_empty(), "{complaints:#?}");
    let spoilt = source.replacen("\"templating\"", "\"noSuchField\":1,\"templating\"", 1);
    assert_eq!(type_check("dashboard-spoilt", &spoilt).len(), 1);

    let mut ids = BTreeSet::new();
    let mut cells = BTreeSet::new();
    for panel in board["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "twice: id {}", panel["id"]);
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        assert!(x + w <= 24, "{} is too wide", panel["title"]);
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(cells.insert(cell), "{} covers another panel", panel["title"]);
        }
    }
    let titles: Vec<&str> = panels(&board).iter().map(|p| p["title"].as_str().unwrap()).collect();
    assert!(titles.len() > 25);
    for panel in panels(&board) {
        let title = &panel["title"];
        assert!(panel["description"].as_str().is_some_and(|text| text.ends_with('.')), "{title}");
        let unit = &panel["fieldConfig"]["defaults"]["unit"];
        assert!(unit.as_str().is_some_and(|unit| !unit.is_empty()), "{title} has no unit");
        let references: BTreeSet<&str> = panel["targets"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["refId"].as_str().unwrap())
            .collect();
        assert_eq!(references.len(), panel["targets"].as_array().unwrap().len(), "{title}");
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            assert!(target["legendFormat"].as_str().is_some_and(|text| !text.is_empty()));
        }
    }
    let words = ["Idle", "Saved", "Queue", "band", "Memory", "Refused", "Wasted", "Prefix"];
    for word in words.into_iter().chain(["Cold start", "Drain margin", "Spot"]) {
        assert!(titles.iter().any(|title| title.contains(word)), "no panel about {word}");
    }
}

#[test]
fn nothing_names_a_registry() {
    // Where images come from is the user's to say.
    let mut images = BTreeSet::new();
    for objects in rendered().values() {
        for deployment in all(objects, "Deployment") {
            let container = &deployment["spec"]["template"]["spec"]["containers"][0];
            images.insert(container["image"].as_str().unwrap());
        }
    }
    assert!(images.iter().all(|image| !image.contains('/')), "{images:?}");
    assert!(root().join("k8s/README.md").exists());
}
