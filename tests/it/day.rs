//! A day of traffic in real Prometheus blocks: the scaler's queries, the recording rules, the
//! alerts and the money, over 24 hours. Needs Debian's `prometheus` package: `cargo test --
//! --ignored`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::fleet::{DAY, Day, MIDNIGHT, OBJECTIVE, PRICE};
use crate::hpa::Hpa;
use crate::k8s_alerts::write_rules;
use crate::k8s_tools::{all, one, rendered, run};
use crate::prometheus::{Prometheus, alone, encoded};
use crate::server::get;

const HOUR: usize = 3600;
/// Seconds between two evaluations of the alerts.
const EVALUATION: usize = 60;

/// Values of one series by seconds since midnight.
type Range = BTreeMap<usize, f64>;

fn promtool(arguments: &[&str], folder: &Path) {
    let mut command = Command::new("promtool");
    run(command.args(arguments).current_dir(folder), "");
}

/// A Prometheus on the data of the folder.
fn start(folder: &Path) -> Prometheus {
    let data = folder.join("data");
    let prometheus = Prometheus::start("global: {}\n", Some(&data));
    prometheus.wait("vector(1)", |value| value == 1.0);
    prometheus
}

/// Every series of a query over the day, by its labels.
fn range(prometheus: &Prometheus, query: &str, step: usize) -> BTreeMap<String, Range> {
    let (from, to) = (MIDNIGHT, MIDNIGHT + DAY - 1);
    let path = format!("/api/v1/query_range?query={}&start={from}&end={to}", encoded(query));
    let (status, text) = get(&prometheus.url(&format!("{path}&step={step}")));
    assert_eq!(status, 200, "{query}: {text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    let point = |point: &Value| {
        let time = point[0].as_f64().unwrap() as usize - MIDNIGHT;
        (time, point[1].as_str().unwrap().parse().unwrap())
    };
    let series = answer["data"]["result"].as_array().unwrap().iter().map(|series| {
        let points = series["values"].as_array().unwrap().iter().map(point);
        (series["metric"].to_string(), points.collect())
    });
    series.collect()
}

/// The one series of a query.
fn line(prometheus: &Prometheus, query: &str, step: usize) -> Range {
    let found = range(prometheus, query, step);
    assert!(found.len() <= 1, "{query}: {} series", found.len());
    found.into_values().next().unwrap_or_default()
}

/// Alerts by name: from when to when each fired, by its own expression and its own `for`.
fn alerts(prometheus: &Prometheus) -> BTreeMap<String, Vec<(usize, usize)>> {
    let mut found = BTreeMap::new();
    for object in all(&rendered()["components/monitoring"], "PrometheusRule") {
        for group in object["spec"]["groups"].as_array().unwrap() {
            for rule in group["rules"].as_array().unwrap() {
                let Some(name) = rule["alert"].as_str() else { continue };
                let wait = rule["for"].as_str().map_or(0, seconds);
                let mut fired = Vec::new();
                let query = rule["expr"].as_str().unwrap();
                for series in range(prometheus, query, EVALUATION).into_values() {
                    let mut active: Option<(usize, usize)> = None;
                    for at in series.into_keys() {
                        active = match active {
                            Some((since, last)) if at == last + EVALUATION => Some((since, at)),
                            _ => Some((at, at)),
                        };
                        let (since, _) = active.unwrap();
                        if at - since >= wait {
                            let from = since + wait;
                            fired.retain(|(other, _)| *other != from);
                            fired.push((from, at));
                        }
                    }
                }
                found.insert(name.to_owned(), fired);
            }
        }
    }
    found
}

fn seconds(duration: &str) -> usize {
    let (number, unit) = duration.split_at(duration.len() - 1);
    let scale = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => panic!("duration {duration}"),
    };
    number.parse::<usize>().unwrap() * scale
}

/// The value at a time or the last one before it.
fn at(range: &Range, time: usize) -> f64 {
    range.range(..=time).next_back().map_or(0.0, |(_, value)| *value)
}

fn mean(range: &Range, from: usize, to: usize) -> f64 {
    let values: Vec<f64> = range.range(from..to).map(|(_, value)| *value).collect();
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn highest(range: &Range, from: usize, to: usize) -> f64 {
    range.range(from..to).map(|(_, value)| *value).fold(0.0, f64::max)
}

struct Told {
    rate: Range,
    pods: Range,
    queue: Range,
    load: Range,
    p99: Range,
    spent: Range,
    cost: Range,
    fired: BTreeMap<String, Vec<(usize, usize)>>,
}

impl Told {
    fn ask(prometheus: &Prometheus, queue: &str) -> Self {
        let line = |query: &str| line(prometheus, query, EVALUATION);
        Self {
            rate: line("sum(rate(sconce_requests_total[5m]))"),
            pods: line("sconce:pods:count"),
            queue: line(queue),
            load: line("sconce:load:ratio5m"),
            p99: line("sconce:request_duration_seconds:p99_5m"),
            spent: line("sum(sconce:cost_usd_per_hour:rate5m)"),
            cost: line("sconce:loaded_cost_per_inference_usd:ratio1h"),
            fired: alerts(prometheus),
        }
    }

    fn table(&self) -> String {
        let mut text =
            "hour  req/s   pods  queue  load   p99 s  USD/h  USD/1000  alerts\n".to_owned();
        for hour in 0..24 {
            let (from, to) = (hour * HOUR, (hour + 1) * HOUR);
            let firing = |(_, spans): &(&String, &Vec<(usize, usize)>)| {
                spans.iter().any(|(since, until)| *since < to && *until >= from)
            };
            let names: Vec<&str> =
                self.fired.iter().filter(firing).map(|(name, _)| name.as_str()).collect();
            writeln!(
                text,
                "{hour:4}  {:5.2}  {:5.2}  {:5.0}  {:4.0}%  {:6.1}  {:5.2}  {:8.3}  {}",
                mean(&self.rate, from, to),
                mean(&self.pods, from, to),
                highest(&self.queue, from, to),
                100.0 * mean(&self.load, from, to),
                highest(&self.p99, from, to),
                mean(&self.spent, from, to),
                1000.0 * at(&self.cost, to - 1),
                names.join(" ")
            )
            .unwrap();
        }
        text
    }

    /// Whether an alert fired in some of these hours.
    fn fired(&self, name: &str, from: usize, to: usize) -> bool {
        let mut spans = self.fired[name].iter();
        spans.any(|(since, until)| *since < to * HOUR && *until >= from * HOUR)
    }
}

#[test]
#[ignore = "needs Debian's package prometheus"]
#[allow(clippy::print_stdout, reason = "the table is what the run is for")]
fn a_day_scales_alerts_and_costs_as_it_should() {
    let _alone = alone();
    let scaler = one(&rendered()["components/keda-prometheus"], "ScaledObject", "sconce");
    let triggers = scaler["spec"]["triggers"].as_array().unwrap();
    let text = |trigger: usize, key: &str| triggers[trigger]["metadata"][key].as_str().unwrap();
    let thresholds = [0, 1].map(|trigger| text(trigger, "threshold").parse().unwrap());
    let mut hpa = Hpa::new(scaler, 1.0);
    let most = hpa.max;
    let day = Day::run(&mut hpa, thresholds);

    // Into blocks, then the rules' own results into more: once for those that read the server's
    // series, once more for those that read other rules' results.
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("day.om"), day.open_metrics()).unwrap();
    let blocks = ["tsdb", "create-blocks-from"];
    promtool(&[&blocks[..], &["openmetrics", "day.om", "data"]].concat(), folder.path());
    let rules = write_rules(folder.path());
    for _ in 0..2 {
        let prometheus = start(folder.path());
        let (url, from) = (format!("--url={}", prometheus.url("")), format!("--start={MIDNIGHT}"));
        let to = format!("--end={}", MIDNIGHT + DAY);
        let asked = ["rules", &url, &from, &to, "--output-dir=data", &rules];
        promtool(&[&blocks[..], &asked].concat(), folder.path());
    }
    let prometheus = start(folder.path());

    // Prometheus gives the scaler the numbers that it decided on in the run.
    let queries = [text(0, "query"), text(1, "query")];
    for (query, of) in queries.iter().zip([0, 1]) {
        let told = line(&prometheus, query, 15);
        for decision in &day.decisions {
            let decided = [decision.queue, decision.in_flight][of];
            let told = at(&told, decision.at);
            assert!((told - decided).abs() < 1e-6, "{query}: {told}, not {decided}: {decision:?}");
        }
    }

    let told = Told::ask(&prometheus, queries[0]);
    let total = |query: &str| at(&line(&prometheus, query, EVALUATION), DAY - 1);
    let spent = total("sum(last_over_time(sconce_cost_usd_total[1d]))");
    let billed = day.pod_seconds * PRICE / 3600.0;
    let answered = total("sum(last_over_time(sconce_requests_total[1d]))");
    let within = "sum(increase(sconce_requests_within_objective_total[14h]))";
    let within =
        line(&prometheus, &format!("{within} / sum(increase(sconce_requests_total[14h]))"), 60);
    let within = at(&within, 14 * HOUR - 60);
    println!("until the crowd came, {:.2} % within {OBJECTIVE} s", 100.0 * within);
    let asked = |from: usize, to: usize| {
        let inside = day.decisions.iter().filter(|d| (from * HOUR..to * HOUR).contains(&d.at));
        inside.map(|decision| decision.asked).max().unwrap()
    };
    let highest = asked(0, 24);
    let fixed = f64::from(highest) * 24.0 * PRICE;
    println!("{}", told.table());
    println!(
        "{} requests, {} more refused; {spent:.2} USD, {:.3} a thousand; {highest} pods all day \
         would be {fixed:.2} USD",
        day.admitted,
        day.refused,
        1000.0 * spent / answered,
    );

    // Money is time, to the last scrapes; nothing is lost when pods go.
    assert!((spent / billed - 1.0).abs() < 0.01, "{spent} USD of {billed}");
    assert!(spent < 0.6 * fixed, "{spent} USD, fixed {fixed}");
    assert!(answered <= day.admitted as f64 && answered + 60.0 > day.admitted as f64);
    // One pod at night, more by day, most for the crowd, never more than allowed.
    assert_eq!(asked(1, 6), 1);
    assert!(asked(9, 12) >= 3 && asked(14, 15) > asked(9, 12) && highest <= most);
    assert_eq!(day.decisions.last().unwrap().asked, 1);
    assert!(day.decisions.iter().all(|decision| decision.asked >= 1));
    assert!(within > 0.98, "{within}");
    // The crowd is the only thing to call somebody for, and it is over an hour later.
    for name in ["SconceLoadHigh", "SconceObjectiveBurnsFast", "SconceAtMaximum"] {
        assert!(told.fired(name, 14, 15), "{name}");
        assert!(!told.fired(name, 0, 14) && !told.fired(name, 16, 24), "{:?}", told.fired[name]);
    }
    for name in ["SconceAbsent", "SconceLoadLow", "SconceMemoryHigh", "SconceDrainCut"] {
        assert!(told.fired[name].is_empty(), "{name}: {:?}", told.fired[name]);
    }
    // At night a floor of one pod is shared by few requests: the budget says so.
    assert!(told.fired("SconceCostOverBudget", 1, 6) && !told.fired("SconceCostOverBudget", 9, 12));
}
