//! Every alert fires when it should and not when it should not, by promtool's own unit tests. Needs
//! Debian's `prometheus` package: `cargo test -- --ignored`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::k8s_tools::{all, helper, rendered, run};

/// Writes the rules as Prometheus reads them (JSON is YAML) and gives the file's name.
pub(crate) fn write_rules(folder: &Path) -> String {
    let rules = all(&rendered()["components/monitoring"], "PrometheusRule");
    let groups = rules.iter().flat_map(|rule| rule["spec"]["groups"].as_array().unwrap());
    let mut groups: Vec<Value> = groups.cloned().collect();
    // The runbook is the longest and has nothing to test; repeating it would be all there is.
    for rule in groups.iter_mut().flat_map(|group| group["rules"].as_array_mut().unwrap()) {
        if let Some(annotations) = rule.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove("runbook");
        }
    }
    fs::write(folder.join("rules.json"), json!({ "groups": groups }).to_string()).unwrap();
    "rules.json".to_owned()
}

#[test]
#[ignore = "needs Debian's package prometheus"]
fn alerts_fire_when_they_should() {
    let folder = tempfile::tempdir().unwrap();
    let rules = write_rules(folder.path());
    let promtool = |arguments: &[&str]| {
        let mut command = Command::new("promtool");
        run(command.args(arguments).current_dir(folder.path()), "")
    };
    promtool(&["check", "rules", &rules]);
    let text = fs::read_to_string(helper("alerts.yaml")).unwrap();
    fs::write(folder.path().join("alerts.yaml"), &text).unwrap();
    promtool(&["test", "rules", "alerts.yaml"]);

    // Each alert is tested both ways.
    let mut tested: BTreeMap<&str, [bool; 2]> = BTreeMap::new();
    let mut alert = "";
    for line in text.lines().map(str::trim) {
        if let Some((_, name)) = line.split_once("alertname:") {
            alert = name.trim();
        } else if let Some(expected) = line.strip_prefix("exp_alerts:") {
            tested.entry(alert).or_default()[usize::from(expected.trim() != "[]")] = true;
        }
    }
    for rule in all(&rendered()["components/monitoring"], "PrometheusRule") {
        for group in rule["spec"]["groups"].as_array().unwrap() {
            for rule in group["rules"].as_array().unwrap() {
                let Some(name) = rule["alert"].as_str() else { continue };
                assert_eq!(tested.get(name), Some(&[true, true]), "{name}: silent, firing");
                let annotations = &rule["annotations"];
                assert!(annotations["summary"].is_string() && annotations["runbook"].is_string());
                assert!(["page", "ticket"].contains(&rule["labels"]["severity"].as_str().unwrap()));
            }
        }
    }
}
