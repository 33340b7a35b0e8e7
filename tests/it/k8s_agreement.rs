//! What is said twice in `k8s/` is the same, and what it says of the server is true: the server's
//! own configuration, ports and paths are asked.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use sconce::config::Config;
use sconce::config::flags::Flags;
use sconce::config::load::{Environment, load};
use serde_json::Value;

use crate::k8s_tools::{all, one, rendered, root};
use crate::server::{Server, get};

const MIB: u64 = 1 << 20;

/// Allocatable cores (thousandths) and MiB of instance types, as their providers publish them
/// (2026-11): first the smallest that a pool may give, then those that plans name.
const NODES: [(&str, u64, u64); 7] = [
    ("g5.xlarge", 3920, 14162),
    ("g6.xlarge", 3920, 14162),
    ("g2-standard-4", 3920, 13000),
    ("Standard_NC24ads_A100_v4", 23_660, 213_084),
    ("g6.2xlarge", 7910, 29317),
    ("c7i.xlarge", 3920, 6584),
    ("p4de.24xlarge", 95690, 1_082_712),
];
/// What DaemonSets take of them: cores, MiB. A plan says its own (`--daemonset-cpu`).
const DAEMON_SETS: (u64, u64) = (500, 1024);
const DAEMON_SETS_PLANNED: (u64, u64) = (200, 512);

struct Pod<'a> {
    place: &'a str,
    spec: &'a Value,
    annotations: &'a Value,
}

impl Pod<'_> {
    fn container(&self) -> &Value {
        let containers = self.spec["containers"].as_array().unwrap();
        assert_eq!(containers.len(), 1, "{}", self.place);
        &containers[0]
    }

    fn env(&self, name: &str) -> Option<&str> {
        let env = self.container()["env"].as_array().unwrap();
        env.iter().find(|entry| entry["name"] == name)?["value"].as_str()
    }

    fn resource(&self, side: &str, name: &str) -> Option<u64> {
        self.container()["resources"][side].get(name).map(quantity)
    }
}

/// Every Deployment's pods.
fn pods() -> Vec<Pod<'static>> {
    let mut found = Vec::new();
    for (place, objects) in rendered() {
        for deployment in all(objects, "Deployment") {
            let template = &deployment["spec"]["template"];
            let (spec, annotations) = (&template["spec"], &template["metadata"]["annotations"]);
            found.push(Pod { place, spec, annotations });
        }
    }
    assert!(found.len() > 20);
    found
}

/// A quantity in its base unit; cores in thousandths.
fn quantity(value: &Value) -> u64 {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let number = |text: &str| text.parse::<u64>().unwrap_or_else(|_| panic!("quantity {text}"));
    match text.as_str() {
        t if t.ends_with("Gi") => number(&t[..t.len() - 2]) << 30,
        t if t.ends_with("Mi") => number(&t[..t.len() - 2]) << 20,
        t if t.ends_with('m') => number(&t[..t.len() - 1]),
        t => number(t),
    }
}

fn cores(pod: &Pod<'_>) -> u64 {
    let value = &pod.container()["resources"]["requests"]["cpu"];
    let text = value.as_str().unwrap();
    if text.ends_with('m') { quantity(value) } else { quantity(value) * 1000 }
}

#[test]
fn one_grace_everywhere() {
    for pod in pods() {
        let grace = pod.spec["terminationGracePeriodSeconds"].as_u64().unwrap();
        let told = pod.env("SCONCE_GRACE_SECONDS").unwrap();
        assert_eq!(told, grace.to_string(), "{}", pod.place);
        assert!(pod.container().get("lifecycle").is_none(), "{}: a hook", pod.place);
        if let Some(proxy) = pod.annotations["proxy.istio.io/config"].as_str() {
            assert_eq!(proxy, format!("terminationDrainDuration: {grace}s"), "{}", pod.place);
            let excluded = &pod.annotations["traffic.sidecar.istio.io/excludeInboundPorts"];
            assert_eq!(excluded, "9464", "{}", pod.place);
        }
        for pool in all(&rendered()["cluster/karpenter"], "NodePool") {
            if let Some(limit) = pool["spec"]["template"]["spec"]["terminationGracePeriod"].as_str()
            {
                assert!(minutes(limit) * 60 > grace, "{} cuts {grace} s", pool["metadata"]["name"]);
            }
        }
    }
    for (name, seconds) in [("spot-15", 15), ("spot-30", 30), ("spot-110", 110)] {
        let deployment = one(&rendered()[&format!("components/{name}")], "Deployment", "sconce");
        let spec = &deployment["spec"]["template"]["spec"];
        assert_eq!(spec["terminationGracePeriodSeconds"], seconds);
    }
}

fn minutes(duration: &str) -> u64 {
    match duration.split_at(duration.len() - 1) {
        (number, "m") => number.parse().unwrap(),
        (number, "h") => number.parse::<u64>().unwrap() * 60,
        _ => panic!("duration {duration}"),
    }
}

/// Mounts the ConfigMaps and Secrets of `pod` as files under `folder`; gives mount path and place.
fn mount(objects: &[Value], pod: &Pod<'_>, folder: &Path) -> BTreeMap<String, String> {
    let mut places = BTreeMap::new();
    for volume in pod.spec["volumes"].as_array().unwrap() {
        let map = volume["configMap"]["name"].as_str();
        let data = match (map, volume["secret"]["secretName"].as_str()) {
            (Some(map), _) => &one(objects, "ConfigMap", map)["data"],
            (_, Some(name)) => &one(&rendered()["examples"], "Secret", name)["stringData"],
            _ => continue,
        };
        let name = volume["name"].as_str().unwrap();
        fs::create_dir_all(folder.join(name)).unwrap();
        for (file, text) in data.as_object().unwrap() {
            fs::write(folder.join(name).join(file), text.as_str().unwrap()).unwrap();
        }
        let mounts = pod.container()["volumeMounts"].as_array().unwrap();
        let mount = mounts.iter().find(|mount| mount["name"] == name).unwrap();
        let place = folder.join(name).display().to_string();
        places.insert(mount["mountPath"].as_str().unwrap().to_owned(), place);
    }
    places
}

/// The server's own reading of what a pod is given.
fn configuration(objects: &[Value], pod: &Pod<'_>) -> Result<Config, String> {
    let folder = tempfile::tempdir().unwrap();
    let places = mount(objects, pod, folder.path());
    let mut variables = vec![("KUBERNETES_SERVICE_HOST".to_owned(), "10.0.0.1".to_owned())];
    for entry in pod.container()["env"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap().to_owned();
        let value = entry["value"].as_str().map_or_else(
            || {
                let field = &entry["valueFrom"]["resourceFieldRef"];
                assert_eq!(
                    (&field["resource"], &field["divisor"]),
                    (&Value::from("requests.cpu"), &Value::from("1"))
                );
                cores(pod).div_ceil(1000).to_string()
            },
            |value| {
                let inside = places.iter().find(|(path, _)| {
                    value.strip_prefix(*path).is_some_and(|r| r.is_empty() || r.starts_with('/'))
                });
                inside.map_or(value.to_owned(), |(path, place)| value.replacen(path, place, 1))
            },
        );
        variables.push((name, value));
    }
    let variables: Vec<(&str, &str)> =
        variables.iter().map(|(name, value)| (&name[..], &value[..])).collect();
    load(&Flags::default(), &Environment::of(&variables)).map_err(|error| error.to_string())
}

#[test]
fn the_server_can_read_its_configuration() {
    for pod in pods() {
        let objects = &rendered()[pod.place];
        let config = configuration(objects, &pod);
        let config = config.unwrap_or_else(|error| panic!("{}: {error}", pod.place));
        let warnings: Vec<_> = config.notes.iter().filter(|note| note.warning).collect();
        assert!(warnings.is_empty(), "{}: {warnings:?}", pod.place);
        assert!(!config.manifests.is_empty(), "{}", pod.place);
        for (name, port) in [("http", config.server.port), ("admin", config.admin.port)] {
            let ports = pod.container()["ports"].as_array().unwrap();
            let found = ports.iter().find(|entry| entry["name"] == name).unwrap();
            assert_eq!(found["containerPort"], port, "{}: {name}", pod.place);
        }
        let grace = pod.spec["terminationGracePeriodSeconds"].as_f64().unwrap();
        assert_eq!(config.drain.grace.as_secs_f64(), grace, "{}", pod.place);
        for monitor in all(objects, "PodMonitor") {
            let interval = &monitor["spec"]["podMetricsEndpoints"][0]["interval"];
            let interval = interval.as_str().unwrap().trim_end_matches('s').parse().unwrap();
            let linger = config.drain.linger.as_secs();
            assert!(linger > interval, "{}: a last scrape comes too late", pod.place);
        }
        assert_eq!(config.cpu.threads, Some(cores(&pod).div_ceil(1000) as usize), "{}", pod.place);
    }
}

#[test]
fn copies_are_equal() {
    for entry in fs::read_dir(root().join("k8s/base/models")).unwrap() {
        let path = entry.unwrap().path();
        let original = root().join("models").join(path.file_name().unwrap());
        let [copy, original] = [&path, &original].map(|path| fs::read_to_string(path).unwrap());
        assert_eq!(copy, original, "{}: copy models/ here again", path.display());
    }
    // The gateway's settings are the base's and one more: a component cannot add to a file.
    let read = |path: &str| fs::read_to_string(root().join("k8s").join(path)).unwrap();
    let more = "# For the endpoint picker.\nmetrics_on_main = true\n";
    let gateway = read("components/inference-pool/sconce.toml");
    assert_eq!(gateway.replace(more, ""), read("base/sconce.toml"));
    assert!(gateway.contains(more));
}

#[test]
fn ports_and_paths_are_the_servers() {
    let server = Server::launch(&[]);
    let mut asked = 0;
    let mut ask = |path: &str, place: &str| {
        let (status, body) = get(&server.admin_url(path));
        assert!(status == 200 || status == 503, "{place}: {path} answers {status}: {body}");
        asked += 1;
        body
    };
    for pod in pods() {
        let names: Vec<&Value> =
            pod.container()["ports"].as_array().unwrap().iter().map(|p| &p["name"]).collect();
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let http = &pod.container()[probe]["httpGet"];
            assert_eq!(http["port"], "admin", "{}: {probe}", pod.place);
            ask(http["path"].as_str().unwrap(), pod.place);
        }
        assert_eq!(pod.container()["startupProbe"]["httpGet"]["path"], "/livez");
        let objects = &rendered()[pod.place];
        for service in all(objects, "Service") {
            for port in service["spec"]["ports"].as_array().unwrap() {
                assert!(names.contains(&&port["targetPort"]), "{}: {port}", pod.place);
            }
        }
        for scaler in all(objects, "ScaledObject") {
            for trigger in scaler["spec"]["triggers"].as_array().unwrap() {
                let metadata = &trigger["metadata"];
                let Some(url) = metadata["url"].as_str() else { continue };
                let path = url.strip_prefix("http://sconce-headless.sconce.svc:9464");
                let body = ask(path.unwrap_or_else(|| panic!("{url}")), pod.place);
                let mut value = &serde_json::from_str::<Value>(&body).unwrap();
                for step in metadata["valueLocation"].as_str().unwrap().split('.') {
                    value = &value[step];
                }
                assert!(value.is_u64(), "{}: {metadata} reads {value}", pod.place);
            }
        }
        for kind in ["PodMonitor", "ServiceMonitor"] {
            for monitor in all(objects, kind) {
                let spec = &monitor["spec"];
                let endpoints = spec.get("podMetricsEndpoints").or(spec.get("endpoints"));
                let endpoint = &endpoints.unwrap()[0];
                assert_eq!(endpoint["port"], "admin");
                ask(endpoint["path"].as_str().unwrap(), pod.place);
            }
        }
    }
    assert!(asked > 60);
}

/// What every pod must say, wherever it is deployed: a path and its value.
#[test]
fn pods_are_hardened_and_probed() {
    let expected = [
        ("/enableServiceLinks", Value::from(false)),
        ("/automountServiceAccountToken", false.into()),
        ("/securityContext/runAsNonRoot", true.into()),
        ("/securityContext/seccompProfile/type", "RuntimeDefault".into()),
        ("/containers/0/securityContext/readOnlyRootFilesystem", true.into()),
        ("/containers/0/securityContext/allowPrivilegeEscalation", false.into()),
        ("/containers/0/terminationMessagePath", "/dev/termination-log".into()),
        ("/containers/0/startupProbe/httpGet/path", "/livez".into()),
        ("/containers/0/livenessProbe/httpGet/path", "/livez".into()),
        ("/containers/0/readinessProbe/httpGet/path", "/readyz".into()),
        ("/containers/0/readinessProbe/periodSeconds", 2.into()),
        ("/containers/0/readinessProbe/failureThreshold", 2.into()),
        ("/topologySpreadConstraints/0/topologyKey", "kubernetes.io/hostname".into()),
    ];
    for pod in pods() {
        for (path, value) in &expected {
            assert_eq!(pod.spec.pointer(path), Some(value), "{}: {path}", pod.place);
        }
        for budget in all(&rendered()[pod.place], "PodDisruptionBudget") {
            assert_eq!(budget["spec"]["unhealthyPodEvictionPolicy"], "AlwaysAllow");
        }
        for deployment in all(&rendered()[pod.place], "Deployment") {
            // Only where nodes come on demand is there a GPU for a pod more; processors are there.
            let surge = deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 1;
            let pool = pod.spec["nodeSelector"]["sconce/pool"].is_string();
            let gpu = pod.resource("limits", "nvidia.com/gpu").is_some();
            assert!(!surge || pool || !gpu, "{}: waits for a GPU", pod.place);
            assert!(surge || !pool, "{}: no pod more", pod.place);
        }
    }
}

#[test]
fn selectors_find_the_pods() {
    for (place, objects) in rendered() {
        for deployment in all(objects, "Deployment") {
            assert!(deployment["spec"].get("replicas").is_none(), "{place}: replicas");
            let labels = &deployment["spec"]["template"]["metadata"]["labels"];
            let mut selectors = vec![&deployment["spec"]["selector"]["matchLabels"]];
            selectors.extend(all(objects, "Service").iter().map(|o| &o["spec"]["selector"]));
            for kind in ["PodDisruptionBudget", "PodMonitor", "InferencePool"] {
                let of = |o: &&'static Value| &o["spec"]["selector"]["matchLabels"];
                selectors.extend(all(objects, kind).iter().map(of));
            }
            let of = |o: &&'static Value| &o["spec"]["podSelector"]["matchLabels"];
            selectors.extend(all(objects, "NetworkPolicy").iter().map(of));
            for selector in selectors {
                for (key, value) in selector.as_object().unwrap() {
                    assert_eq!(&labels[key], value, "{place}: {selector}");
                }
            }
            // The job label that queries ask for.
            assert_eq!(labels["app.kubernetes.io/name"], "sconce");
        }
        for scaler in all(objects, "ScaledObject") {
            let target = scaler["spec"]["scaleTargetRef"]["name"].as_str().unwrap();
            one(objects, "Deployment", target);
        }
    }
}

/// The instance types that a pod is bound to; none where any of its pool will do.
fn instance_types<'a>(pod: &Pod<'a>) -> Vec<&'a str> {
    const LABEL: &str = "node.kubernetes.io/instance-type";
    let affinity = &pod.spec["affinity"]["nodeAffinity"];
    let terms = &affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"];
    let expressions = terms[0]["matchExpressions"].as_array().into_iter().flatten();
    let values = expressions.filter(|expression| expression["key"] == LABEL);
    let values = values.flat_map(|expression| expression["values"].as_array().unwrap());
    values.chain(pod.spec["nodeSelector"].get(LABEL)).map(|name| name.as_str().unwrap()).collect()
}

/// How many such pods a node of that type is for.
fn beside(pod: &Pod<'_>, node: &str) -> u64 {
    let gpus = if node.starts_with("p4") { 8 } else { 1 };
    let limits = pod.container()["resources"]["limits"].as_object().unwrap();
    let slices = if limits.contains_key("nvidia.com/mig-1g.10gb") { 7 } else { 1 };
    let sliced = pod.spec["nodeSelector"].get("nvidia.com/gpu.sharing-strategy").is_some();
    let turns = if sliced && pod.place.starts_with("overlays/plan-") { 4 } else { 1 };
    gpus * slices * turns
}

#[test]
fn pods_fit_their_nodes() {
    for pod in pods() {
        let memory = pod.resource("requests", "memory").unwrap();
        assert_eq!(pod.resource("limits", "memory"), Some(memory), "{}", pod.place);
        assert!(pod.resource("limits", "cpu").is_none(), "{}: throttled", pod.place);
        let named = instance_types(&pod);
        let taken = if named.is_empty() { DAEMON_SETS } else { DAEMON_SETS_PLANNED };
        let known = |name: &&str| NODES.iter().any(|node| node.0 == *name);
        assert!(named.iter().all(known), "{}: {named:?}", pod.place);
        let meant = |name: &str| match named.is_empty() {
            true => NODES.iter().take(4).any(|node| node.0 == name),
            false => named.contains(&name),
        };
        for (name, millis, mib) in NODES.into_iter().filter(|(name, ..)| meant(name)) {
            let beside = if named.is_empty() { 1 } else { beside(&pod, name) };
            let (cpu, room) = (millis - taken.0, (mib - taken.1) * MIB);
            assert!(cores(&pod) * beside <= cpu, "{}: cores of {name}", pod.place);
            assert!(memory * beside <= room, "{}: memory of {name}", pod.place);
        }
        let storage = pod.resource("requests", "ephemeral-storage").unwrap();
        assert_eq!(pod.resource("limits", "ephemeral-storage"), Some(storage));
        let volumes = pod.spec["volumes"].as_array().unwrap();
        let sizes = volumes.iter().filter_map(|volume| volume["emptyDir"].get("sizeLimit"));
        assert!(sizes.map(quantity).sum::<u64>() < storage, "{}: volumes", pod.place);
        let gpus: Vec<(&String, &Value)> = pod.container()["resources"]["limits"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(name, _)| name.starts_with("nvidia.com/"))
            .collect();
        for (name, limit) in &gpus {
            assert_eq!(pod.container()["resources"]["requests"][*name], **limit, "{}", pod.place);
        }
        assert!(gpus.len() <= 1, "{}", pod.place);
    }
    // The pools' disks hold the pods' storage.
    for class in all(&rendered()["cluster/karpenter"], "EC2NodeClass") {
        let disk = quantity(&class["spec"]["blockDeviceMappings"][0]["ebs"]["volumeSize"]);
        let least = if class["metadata"]["name"] == "gpu" { 100 } else { 50 };
        assert!(disk >= least << 30);
    }
}

#[test]
fn scalers_stay_within_pools_and_quotas() {
    let pools = all(&rendered()["cluster/karpenter"], "NodePool");
    let ours = pools.iter().filter(|pool| {
        pool["spec"]["template"]["metadata"]["labels"]["sconce/pool"] == "gpu-inference"
    });
    let gpus: u64 = ours.map(|pool| quantity(&pool["spec"]["limits"]["nvidia.com/gpu"])).sum();
    for (place, objects) in rendered() {
        for scaler in all(objects, "ScaledObject") {
            let most = scaler["spec"]["maxReplicaCount"].as_u64().unwrap();
            assert!(most <= gpus, "{place}: {most} pods on {gpus} GPUs");
            for quota in all(objects, "ResourceQuota") {
                let hard = &quota["spec"]["hard"];
                let pods = quantity(&hard["pods"]).min(quantity(&hard["requests.nvidia.com/gpu"]));
                // One more for a rollout with a surge.
                assert!(most < pods, "{place}: {most} pods and {hard}");
                let pod = &one(objects, "Deployment", "sconce")["spec"]["template"]["spec"];
                let requests = &pod["containers"][0]["resources"]["requests"];
                for (key, name) in [
                    ("requests.memory", "memory"),
                    ("requests.ephemeral-storage", "ephemeral-storage"),
                    ("requests.cpu", "cpu"),
                ] {
                    let needed = (most + 1) * quantity(&requests[name]);
                    assert!(needed <= quantity(&hard[key]), "{place}: {key}");
                }
            }
        }
    }
}

#[test]
fn shares_of_a_device_add_up() {
    let sharing = &rendered()["cluster/gpu-sharing"];
    let plugin = &one(sharing, "ConfigMap", "sconce-device-plugin")["data"]["time-sliced-4"];
    assert!(plugin.as_str().unwrap().contains("replicas: 4"));
    let mig = &one(sharing, "ConfigMap", "sconce-mig-parted")["data"]["config.yaml"];
    assert!(mig.as_str().unwrap().contains("1g.10gb: 7"));
    for (component, parts) in [("time-slicing", 4.0), ("mig", 7.0)] {
        let objects = &rendered()[&format!("components/{component}")];
        let pod = pods().into_iter().find(|pod| std::ptr::eq(&rendered()[pod.place], objects));
        let config = configuration(objects, &pod.unwrap()).unwrap();
        assert!((config.device.share * parts - 1.0).abs() < 0.01, "{component}");
        if component == "time-slicing" {
            // An L4, less what each process's CUDA context takes.
            let (device, context) = (22_888 * MIB, 500 * MIB);
            let limit = config.device.memory_limit.unwrap().bytes(device);
            assert!(4 * (limit + context) <= device);
        }
    }
    let deployment = one(&rendered()["components/mig"], "Deployment", "sconce");
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    assert!(container["resources"]["limits"].get("nvidia.com/mig-1g.10gb").is_some());
}
