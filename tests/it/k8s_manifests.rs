//! Every object of `k8s/` is what Kubernetes and its operators accept, to the letter: a field that
//! they do not know is an error, because a cluster drops it in silence.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::k8s_tools::{all, operators, problems, problems_of, rendered, root, type_check};

/// Which package knows a group's kinds.
const PACKAGES: [(&str, &str); 6] = [
    ("gateway.networking.k8s.io", "gateway-api"),
    ("karpenter.k8s.aws", "karpenter"),
    ("karpenter.sh", "karpenter"),
    ("keda.sh", "keda"),
    ("monitoring.coreos.com", "prometheus-operator"),
    ("networking.istio.io", "istio"),
];

/// Kinds that no package describes: every path that the definition has and we may use.
const OWN: [(&str, &[&str]); 2] = [
    (
        "InterceptorRoute",
        &[
            "spec.target.service",
            "spec.target.port",
            "spec.rules.hosts",
            "spec.scalingMetric.concurrency.targetValue",
            "spec.timeouts.readiness",
            "spec.timeouts.request",
        ],
    ),
    (
        "InferencePool",
        &[
            "spec.selector.matchLabels.app.kubernetes.io/name",
            "spec.targetPorts.number",
            "spec.appProtocol",
            "spec.endpointPickerRef.group",
            "spec.endpointPickerRef.kind",
            "spec.endpointPickerRef.name",
            "spec.endpointPickerRef.port.number",
            "spec.endpointPickerRef.failureMode",
        ],
    ),
];

/// Keys of the triggers' metadata, which every schema leaves free, and those that must be there.
const TRIGGERS: [(&str, &[&str], &[&str]); 4] = [
    (
        "prometheus",
        &["serverAddress", "query", "threshold"],
        &["activationThreshold", "ignoreNullValues", "timeout", "namespace", "unsafeSsl"],
    ),
    (
        "metrics-api",
        &["url", "valueLocation", "targetValue"],
        &[
            "format",
            "activationTargetValue",
            "aggregateFromKubeServiceEndpoints",
            "aggregationType",
        ],
    ),
    ("external-push", &["scalerAddress", "interceptorRoute"], &[]),
    ("cron", &["timezone", "start", "end", "desiredReplicas"], &[]),
];

/// Every different object of an operator's kind, with where it was found.
fn operator_objects() -> Vec<(String, &'static Value)> {
    let mut seen = BTreeMap::new();
    for (name, objects) in rendered() {
        for object in objects {
            let group = object["apiVersion"].as_str().unwrap();
            if group.contains('.') && !group.ends_with(".k8s.io/v1")
                || group.starts_with("gateway.")
                || group.starts_with("inference.")
            {
                seen.entry(object.to_string()).or_insert((name.clone(), object));
            }
        }
    }
    seen.into_values().collect()
}

/// `(package module, kind)` of an object that a package describes.
fn module(object: &Value) -> Option<(String, &str)> {
    let (group, version) = object["apiVersion"].as_str()?.split_once('/')?;
    let (_, package) = PACKAGES.iter().find(|(known, _)| *known == group)?;
    let kind = object["kind"].as_str()?;
    Some((format!("@kubernetes-models/{package}/{group}/{version}/{kind}"), kind))
}

/// A source text whose lines are typed constants, after its imports; the number of the first.
fn typed(objects: &[Value]) -> (String, usize) {
    let mut imports = BTreeMap::new();
    let mut lines = String::new();
    for (number, object) in objects.iter().enumerate() {
        let (module, kind) = module(object).unwrap();
        imports.insert(kind, format!("import type {{ I{kind} }} from \"{module}\";"));
        writeln!(lines, "export const o{number}: I{kind} = {object};").unwrap();
    }
    let head: Vec<String> = imports.into_values().collect();
    (format!("{}\n{lines}", head.join("\n")), head.len() + 1)
}

/// One copy of an object for each table in it, with a key more that does not exist.
fn with_unknown_keys(object: &Value) -> Vec<Value> {
    let mut pointers = Vec::new();
    tables(object, String::new(), &mut pointers);
    let spoil = |pointer: &String| {
        let mut copy = object.clone();
        copy.pointer_mut(pointer).unwrap()["noSuchField"] = json!([true]);
        copy
    };
    pointers.iter().map(spoil).collect()
}

fn tables(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                tables(inner, format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), found);
            }
            found.push(at);
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                tables(inner, format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

/// Paths to everything that is not a table or a list; positions in lists are left out.
fn leaves(value: &Value, at: &str, found: &mut Vec<String>) {
    let below = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, v)| leaves(v, &below(key), found)),
        Value::Array(items) => items.iter().for_each(|v| leaves(v, at, found)),
        _ => found.push(at.to_owned()),
    }
}

#[test]
fn kubernetes_knows_every_field() {
    assert!(problems().is_empty(), "{:#?}", problems());
    // The check sees what it should.
    let copy = tempfile::tempdir().unwrap();
    copy_folder(&root().join("k8s"), copy.path());
    for unneeded in ["overlays", "components"] {
        for entry in fs::read_dir(copy.path().join(unneeded)).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with("api-keys") {
                fs::remove_dir_all(path).unwrap();
            }
        }
    }
    let file = copy.path().join("base/deployment.yaml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("enableServiceLinks", "enableServiceLink")).unwrap();
    let found = problems_of(copy.path());
    assert!(found.iter().any(|problem| problem.contains("enableServiceLink")), "{found:#?}");
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

#[test]
fn operators_know_every_field() {
    let objects: Vec<Value> =
        operator_objects().into_iter().map(|(_, object)| object.clone()).collect();
    let described: Vec<Value> =
        objects.iter().filter(|object| module(object).is_some()).cloned().collect();
    assert!(described.len() > 10, "only {} objects", described.len());
    let (source, _) = typed(&described);
    let complaints = type_check("objects", &source);
    assert!(complaints.is_empty(), "{complaints:#?}");

    // Ranges, patterns and what is required, which types do not say.
    let asked: Vec<Value> = described
        .iter()
        .map(|object| {
            let (module, kind) = module(object).unwrap();
            json!([kind, module, object])
        })
        .collect();
    let told = operators(&Value::Array(asked));
    assert!(told.is_empty(), "{told}");

    // The type checker sees an unknown key wherever one can stand.
    let spoilt: Vec<Value> = described.iter().flat_map(with_unknown_keys).collect();
    let (source, first) = typed(&spoilt);
    let lines: Vec<usize> =
        type_check("spoilt", &source).into_iter().map(|(line, _)| line).collect();
    let missed: Vec<&Value> = spoilt
        .iter()
        .enumerate()
        .filter(|(number, _)| !lines.contains(&(first + number)))
        .map(|(_, object)| object)
        .collect();
    assert!(missed.is_empty(), "{} of {} not seen: {missed:#?}", missed.len(), spoilt.len());
}

#[test]
fn kinds_without_a_package_use_known_fields_only() {
    let mut seen = 0;
    for (place, object) in operator_objects() {
        if module(object).is_some() {
            continue;
        }
        let kind = object["kind"].as_str().unwrap();
        let known = OWN.iter().find(|(own, _)| *own == kind);
        let (_, known) = known.unwrap_or_else(|| panic!("{place}: nobody knows {kind}"));
        let mut found = Vec::new();
        leaves(&object["spec"], "spec", &mut found);
        for path in found {
            assert!(known.contains(&path.as_str()), "{place}: {kind}: unknown {path}");
        }
        seen += 1;
    }
    assert!(seen >= 2);
}

#[test]
fn triggers_have_the_keys_of_their_scaler_and_texts_only() {
    let mut seen = 0;
    for (place, objects) in rendered() {
        for object in all(objects, "ScaledObject") {
            for trigger in object["spec"]["triggers"].as_array().unwrap() {
                let kind = trigger["type"].as_str().unwrap();
                let known = TRIGGERS.iter().find(|(name, ..)| *name == kind);
                let (_, needed, allowed) =
                    known.unwrap_or_else(|| panic!("{place}: nobody knows {kind}"));
                let metadata = trigger["metadata"].as_object().unwrap();
                for (key, value) in metadata {
                    let known = needed.contains(&key.as_str()) || allowed.contains(&key.as_str());
                    assert!(known, "{place}: {kind} has no {key}");
                    assert!(value.is_string(), "{place}: {key} is not a text");
                }
                for key in *needed {
                    assert!(metadata.contains_key(*key), "{place}: {kind} needs {key}");
                }
                seen += 1;
            }
        }
    }
    assert!(seen >= 6, "only {seen} triggers");
}
