//! What deployments need of the cluster around them, and what it would refuse or do otherwise in
//! silence: names, the mesh, a scrape, a claim, the kind of GPU, the namespace's profile.

use serde_json::{Value, json};

use crate::k8s_tools::{all, one, rendered};

/// Every deployment's place, objects and pod.
fn deployed() -> impl Iterator<Item = (&'static str, &'static [Value], &'static Value)> {
    rendered().iter().flat_map(|(place, objects)| {
        let pod = |deployment: &'static Value| &deployment["spec"]["template"]["spec"];
        let found = all(objects, "Deployment").into_iter();
        found.map(move |deployment| (place.as_str(), objects.as_slice(), pod(deployment)))
    })
}

fn env<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    let mut entries = container["env"].as_array()?.iter();
    entries.find(|entry| entry["name"] == name)?["value"].as_str()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// An image without kernels, or a driver that is too old, must not fall back on the processor.
#[test]
fn pods_say_what_computes() {
    let mut seen = [0, 0];
    for (place, _, pod) in deployed() {
        let server = &pod["containers"][0];
        let limits = server["resources"]["limits"].as_object().unwrap();
        let gpu = limits.keys().any(|name| name.starts_with("nvidia.com/"));
        let kind = env(server, "SCONCE_DEVICE");
        assert_eq!(kind, Some(if gpu { "cuda" } else { "cpu" }), "{place}");
        seen[usize::from(gpu)] += 1;
    }
    assert!(seen[0] >= 3 && seen[1] >= 20, "{seen:?}");
}

/// The kernels need compute capability 8.0: no older GPU in any pool, and each pool has two
/// families to choose from.
#[test]
fn pools_give_gpus_that_the_kernels_run_on() {
    let new_enough = ["a10g", "l4", "l40s", "a100", "h100", "h200"];
    let mut seen = 0;
    for pool in all(&rendered()["cluster/karpenter"], "NodePool") {
        let requirements = list(&pool["spec"]["template"]["spec"]["requirements"]);
        let of = |key: &str| {
            let key = format!("karpenter.k8s.aws/{key}");
            requirements.iter().find(|requirement| requirement["key"] == key.as_str())
        };
        let Some(gpus) = of("instance-gpu-name") else { continue };
        for gpu in list(&gpus["values"]) {
            assert!(new_enough.contains(&gpu.as_str().unwrap()), "{gpu}");
        }
        let families = of("instance-family").unwrap();
        assert!(list(&families["values"]).len() >= 2, "{families}");
        // Plans bind pods to instance types, which may be of one family.
        if pool["spec"]["template"]["metadata"]["labels"]["sconce/pool"] == "gpu-inference" {
            assert!(
                requirements.iter().all(|it| it.get("minValues").is_none()),
                "{requirements:?}"
            );
        }
        seen += 1;
    }
    assert_eq!(seen, 3);
}

/// Karpenter takes a preference for spot as a requirement: where a floor is on-demand, none is.
#[test]
fn an_on_demand_floor_gets_its_pods() {
    let prefers_spot = |place: &str| {
        let deployment = one(&rendered()[place], "Deployment", "sconce");
        let affinity = &deployment["spec"]["template"]["spec"]["affinity"]["nodeAffinity"];
        let terms = list(&affinity["preferredDuringSchedulingIgnoredDuringExecution"]);
        assert!(terms.len() >= 2, "{place}");
        terms.iter().any(|term| term.to_string().contains("karpenter.sh/capacity-type"))
    };
    assert!(!prefers_spot("overlays/eks-karpenter"));
    assert!(prefers_spot("overlays/plan-l4-spot") && prefers_spot("overlays/scale-to-zero"));
}

/// What the policy of a deployment lets out to `port` at a peer.
fn lets_out(objects: &[Value], port: u64, protocol: &str, peer: &Value) -> bool {
    let policy = one(objects, "NetworkPolicy", "sconce");
    list(&policy["spec"]["egress"]).iter().any(|rule| {
        let wanted = json!({"port": port, "protocol": protocol});
        list(&rule["ports"]).contains(&wanted) && list(&rule["to"]).contains(peer)
    })
}

#[test]
fn names_are_found_and_nothing_else_of_the_node() {
    for (place, objects, _) in deployed() {
        for cidr in ["169.254.20.10/32", "169.254.169.254/32"] {
            let peer = json!({"ipBlock": {"cidr": cidr}});
            for protocol in ["UDP", "TCP"] {
                assert!(lets_out(objects, 53, protocol, &peer), "{place}: names from {cidr}");
            }
            for port in [80, 443] {
                assert!(!lets_out(objects, port, "TCP", &peer), "{place}: {cidr} at {port}");
            }
        }
        let policy = one(objects, "NetworkPolicy", "sconce").to_string();
        assert!(policy.contains(r#"["kube-dns","node-local-dns"]"#), "{place}: {policy}");
    }
}

#[test]
fn a_mesh_reaches_its_control_plane() {
    let peer = json!({
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "istio-system"}},
        "podSelector": {"matchLabels": {"app": "istiod"}},
    });
    for (place, objects, _) in deployed() {
        let mesh = !all(objects, "DestinationRule").is_empty();
        assert_eq!(lets_out(objects, 15012, "TCP", &peer), mesh, "{place}");
    }
}

/// A scaler that asks Prometheus gets nothing where nothing is scraped.
#[test]
fn scalers_by_prometheus_come_with_a_scrape() {
    let mut seen = 0;
    for (place, objects) in rendered().iter().filter(|(place, _)| place.starts_with("overlays/")) {
        let scalers = all(objects, "ScaledObject");
        let mut triggers = scalers.iter().flat_map(|scaler| list(&scaler["spec"]["triggers"]));
        if triggers.any(|trigger| trigger["type"] == "prometheus") {
            let monitors = [all(objects, "PodMonitor"), all(objects, "ServiceMonitor")].concat();
            assert_eq!(monitors.len(), 1, "{place}");
            seen += 1;
        }
    }
    assert!(seen >= 8, "{seen}");
}

/// The namespace's profile and a quota ask it of every container, and `sconce check` of the same
/// settings as the server's.
#[test]
fn containers_before_the_server_are_let_in() {
    let examples = all(&rendered()["examples"], "Pod").into_iter().map(|pod| ("examples", pod));
    let pods = deployed().map(|(place, _, pod)| (place, pod));
    let mut seen = 0;
    for (place, pod) in pods.chain(examples.map(|(place, pod)| (place, &pod["spec"]))) {
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{place}");
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{place}");
        let containers = [list(&pod["initContainers"]), list(&pod["containers"])].concat();
        for container in &containers {
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false, "{place}");
            assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}), "{place}");
            for asked in ["requests/cpu", "requests/memory", "limits/memory"] {
                let asked = container["resources"].pointer(&format!("/{asked}"));
                assert!(asked.is_some_and(Value::is_string), "{place}: {container}");
            }
        }
        for check in list(&pod["initContainers"]) {
            assert_eq!(check["args"], json!(["check"]), "{place}");
            let server = &pod["containers"][0];
            for same in ["image", "env", "volumeMounts"] {
                assert_eq!(check[same], server[same], "{place}: {same}");
            }
            seen += 1;
        }
    }
    assert!(seen >= 1);
}

#[test]
fn claims_that_pods_mount_have_an_example() {
    let examples = &rendered()["examples"];
    let mut seen = 0;
    let pods = all(examples, "Pod").into_iter().map(|pod| &pod["spec"]);
    for pod in deployed().map(|(_, _, pod)| pod).chain(pods) {
        for volume in list(&pod["volumes"]) {
            if let Some(claim) = volume["persistentVolumeClaim"]["claimName"].as_str() {
                let claim = one(examples, "PersistentVolumeClaim", claim);
                assert_eq!(claim["spec"]["accessModes"], json!(["ReadWriteMany"]));
                seen += 1;
            }
        }
    }
    assert!(seen >= 2);
}
