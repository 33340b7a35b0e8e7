//! The plan as a kustomize overlay over `k8s/base`: exactly its resources, limits, configuration
//! and thresholds. Knows the names that the base and its components use.

use std::fmt::Write;
use std::path::Path;

use super::devices::{Device, Kind};
use super::model::Model;
use super::report::{Group, Report};
use super::{Fault, PlanError};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What the overlay needs beside the plan.
pub(super) struct Site<'a> {
    /// Way from the overlay to the base, as `../../base`; components lie beside it.
    pub(super) base: &'a str,
    /// More components by name.
    pub(super) components: &'a [String],
    /// Where the server's image is.
    pub(super) image: Option<&'a str>,
    /// The command that wrote this.
    pub(super) command: &'a str,
    pub(super) spot: bool,
    /// What else could carry the same pods.
    pub(super) devices: &'a [Device],
}

/// A file of the overlay: its path, and what is in it.
pub(super) type OverlayFile = (String, String);

/// The overlay's files.
///
/// # Errors
/// More than one deployment, a model without a manifest, or a grace that no spot node gives.
pub(super) fn render(
    report: &Report,
    models: &[Model],
    site: &Site<'_>,
) -> Result<Vec<OverlayFile>, PlanError> {
    let [group] = report.groups.as_slice() else {
        let message = "an overlay is one deployment: plan with --together, or for fewer models";
        return Err(PlanError::new(Fault::Usage, message));
    };
    let grace = group.pod.grace_seconds;
    if site.spot && ![15, 30, 110].contains(&grace) {
        let message = format!("--grace {grace}: spot nodes give 15, 30 or 110 seconds");
        return Err(PlanError::new(Fault::Usage, message));
    }
    let mut files = vec![("sconce.toml".to_owned(), configuration(group))];
    for (model, line) in models.iter().zip(&report.models) {
        let name = format!("models/{}.toml", model.name.replace('/', "_"));
        files.push((name, manifest(model, line.load.context)?));
    }
    let names: Vec<&str> = files[1..].iter().map(|(name, _)| name.as_str()).collect();
    let images = site.image.map(images).transpose()?.unwrap_or_default();
    let text = kustomization((report, group), site, &names, &images);
    files.insert(0, ("kustomization.yaml".to_owned(), text));
    Ok(files)
}

/// Writes the files below `folder`.
///
/// # Errors
/// A file that cannot be written.
pub(super) fn write(folder: &Path, files: &[OverlayFile]) -> Result<(), PlanError> {
    for (name, text) in files {
        let path = folder.join(name);
        let parent = path.parent().unwrap_or(folder);
        let written = std::fs::create_dir_all(parent).and_then(|()| std::fs::write(&path, text));
        written.map_err(|error| {
            PlanError::new(Fault::Unavailable, format!("{}: {error}", path.display()))
        })?;
    }
    Ok(())
}

/// The model's manifest, with the context that was planned for.
fn manifest(model: &Model, context: u32) -> Result<String, PlanError> {
    let name = &model.name;
    let Some(text) = &model.manifest else {
        let message = format!(
            "{name} has no manifest, so there is nothing to deploy: -o kustomize needs models by \
             their manifests"
        );
        return Err(PlanError::new(Fault::Usage, message));
    };
    let planned = model.context.map_or(model.shape.context, u64::from).min(model.shape.context);
    if u64::from(context) == planned {
        return Ok(text.clone());
    }
    let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        PlanError::new(Fault::Data, format!("{name}: {}", error.message()))
    })?;
    let limits = table.entry("limits").or_insert_with(|| toml::Table::new().into());
    if let Some(limits) = limits.as_table_mut() {
        limits.insert("context".into(), i64::from(context).into());
    }
    let text = toml::to_string(&table).expect("a table is TOML");
    Ok(format!("# limits.context is the plan's.\n{text}"))
}

fn configuration(group: &Group) -> String {
    let pod = &group.pod;
    let mut text = String::from(
        "# The plan's numbers. A key that does not exist stops the server.\n\n\
         [server]\nport = 8080\n\n[admin]\nport = 9464\n\n[drain]\nlinger_seconds = 20\n\n\
         [models]\nroots = [\"/models\", \"/mnt/models\"]\n\n",
    );
    if pod.kv_bytes > 0 {
        let _ = writeln!(text, "[scheduler]\nkv_bytes = \"{}MiB\"", pod.kv_bytes / MIB);
    }
    text
}

fn kustomization(
    (report, group): (&Report, &Group),
    site: &Site<'_>,
    models: &[&str],
    images: &str,
) -> String {
    let mut text = format!(
        "# Written by: {}\n# Write it again instead of editing it.\n#\n# {}\n",
        site.command, report.headline
    );
    for warning in &report.warnings {
        let _ = writeln!(text, "# Warning: {warning}");
    }
    let components = site.base.rsplit_once('/').map_or("..", |(folder, _)| folder);
    let spot = site.spot.then(|| format!("spot-{}", group.pod.grace_seconds));
    // The scaler reads what Prometheus scrapes.
    let scaling = ["keda-prometheus", "monitoring"];
    let more = site.components.iter().map(String::as_str).filter(|name| !scaling.contains(name));
    let names = spot.as_deref().into_iter().chain(scaling).chain(more);
    let list: String = names.map(|name| format!("- {components}/components/{name}\n")).collect();
    let files: Vec<String> = models.iter().map(|name| (*name).to_owned()).collect();
    let _ = write!(
        text,
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n\nresources:\n- {}\n\n\
         components:\n{list}\n{images}configMapGenerator:\n- name: sconce-config\n  \
         behavior: replace\n  files: [sconce.toml]\n- name: sconce-models\n  \
         behavior: replace\n  files: [{}]\n\npatches:\n",
        site.base,
        files.join(", ")
    );
    deployment(group, site, &mut text);
    scaled_object(group, &mut text);
    text
}

/// The base's image replaced by `NAME:TAG` or `NAME@DIGEST`. A registry's port is no tag.
fn images(image: &str) -> Result<String, PlanError> {
    let tagged = || image.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'));
    let found = match image.split_once('@') {
        Some((name, digest)) => Some((name, "digest", digest)),
        None => tagged().map(|(name, tag)| (name, "newTag", tag)),
    };
    let plain = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "./:_-".contains(c))
    };
    let sound = found.filter(|(name, _, version)| plain(name) && plain(version));
    let (name, key, version) = sound.ok_or_else(|| {
        let message = format!("--image {image:?}: must be NAME:TAG or NAME@sha256:DIGEST");
        PlanError::new(Fault::Usage, message)
    })?;
    Ok(format!("images:\n- {{name: sconce, newName: {name:?}, {key}: {version:?}}}\n\n"))
}

fn deployment(group: &Group, site: &Site<'_>, text: &mut String) {
    let pod = &group.pod;
    let memory = format!("{}Mi", pod.memory.div_ceil(MIB));
    let gibs = |bytes: u64| format!("{}Gi", bytes.div_ceil(GIB));
    let mut requests = vec![format!("cpu: {}m", pod.cpu_m), format!("memory: {memory}")];
    let mut limits = vec![format!("memory: {memory}")];
    if pod.storage > 0 {
        let storage = format!("ephemeral-storage: {}", gibs(pod.storage));
        requests.push(storage.clone());
        limits.push(storage);
    }
    // The base asks for a whole GPU: null takes that away.
    let whole = "nvidia.com/gpu";
    let resource = pod.resource.as_deref();
    let mut gpu = vec![format!("{whole}: {}", if resource == Some(whole) { "1" } else { "null" })];
    gpu.extend(resource.filter(|it| *it != whole).map(|it| format!("{it}: 1")));
    let lines = |items: &[String]| -> String {
        items.iter().map(|item| format!("                {item}\n")).collect()
    };
    let instance = &group.placed.device.instance;
    let node = if site.spot { instance.spot_usd_per_hour } else { Some(instance.usd_per_hour) };
    let gpus = group.placed.device.gpus();
    let hourly = node.unwrap_or(instance.usd_per_hour) / f64::from(gpus);
    let _ = write!(
        text,
        r#"- target: {{kind: Deployment, name: sconce}}
  patch: |
    apiVersion: apps/v1
    kind: Deployment
    metadata:
      name: sconce
    spec:
      template:
        spec:
{placement}          terminationGracePeriodSeconds: {grace}
          containers:
          - name: server
            env:
            - {{name: SCONCE_GRACE_SECONDS, value: "{grace}"}}
            - {{name: SCONCE_DEVICE, value: {kind}}}
            # Here and not in sconce.toml: a component may have said something else.
            - {{name: SCONCE_DEVICE_MEMORY_LIMIT, value: {limit}MiB}}
            - {{name: SCONCE_DEVICE_SHARE, value: "{share:.4}"}}
            # {name} of {as_of}, one device.
            - {{name: SCONCE_DEVICE_HOURLY_USD, value: "{hourly:.4}"}}
            resources:
              requests:
{requests}{gpu}              limits:
{limits}{gpu}          volumes:
          - name: cache
            emptyDir: {{sizeLimit: {cache}}}
"#,
        placement = placement(group, site),
        grace = pod.grace_seconds,
        kind = if group.placed.device.kind == Kind::Gpu { "cuda" } else { "cpu" },
        limit = pod.device_memory_limit / MIB,
        share = pod.device_share,
        name = instance.name,
        as_of = instance.as_of,
        requests = lines(&requests),
        limits = lines(&limits),
        gpu = lines(&gpu),
        cache = gibs(pod.cache),
    );
}

/// Where pods may run: on the planned machine; on spot on any with the same device that holds the
/// pod, for one pool of spot machines dries up at once.
fn placement(group: &Group, site: &Site<'_>) -> String {
    let device = &group.placed.device;
    let sliced = match device.replicas {
        1 => String::new(),
        _ => "            nvidia.com/gpu.sharing-strategy: time-slicing\n".to_owned(),
    };
    if !site.spot {
        return format!(
            "          nodeSelector:\n            node.kubernetes.io/instance-type: {}\n{sliced}",
            device.instance.name
        );
    }
    let selector = match sliced.is_empty() {
        true => String::new(),
        false => format!("          nodeSelector:\n{sliced}"),
    };
    let holds = |other: &&Device| {
        let node = other.instance.memory_mib / u64::from(other.per_node) * MIB;
        let cpu = other.instance.cpu_m / other.per_node;
        other.name == device.name && node >= group.pod.memory && cpu >= group.pod.cpu_m
    };
    let types: Vec<&str> =
        site.devices.iter().filter(holds).map(|it| it.instance.name.as_str()).collect();
    format!(
        "{selector}          affinity:\n            nodeAffinity:\n              \
         requiredDuringSchedulingIgnoredDuringExecution:\n             \
         \x20  nodeSelectorTerms:\n                - matchExpressions:\n                  \
         - key: node.kubernetes.io/instance-type\n                    operator: In\n            \
         \x20       values: [{}]\n",
        types.join(", ")
    )
}

fn scaled_object(group: &Group, text: &mut String) {
    let pod = &group.pod;
    let mark = if pod.thresholds == "guessed" {
        " Guessed: `sconce plan --calibrate URL` measures it."
    } else {
        " Measured."
    };
    let metadata = |index: usize, name: &str, value: &str| {
        format!(
            "    - {{op: test, path: /spec/triggers/{index}/name, value: {name}}}\n    - {{op: \
             replace, path: /spec/triggers/{index}/metadata/threshold, value: \"{value}\"}}\n"
        )
    };
    let _ = write!(
        text,
        "- target: {{kind: ScaledObject, name: sconce}}\n  patch: |\n    - {{op: replace, path: \
         /spec/minReplicaCount, value: {}}}\n    - {{op: replace, path: /spec/maxReplicaCount, \
         value: {}}}\n{}    # 0.75 x {:.1} in flight.{mark}\n{}",
        group.replicas_paid,
        pod.replicas_max.max(group.replicas_paid),
        metadata(0, "queue", &pod.queue_threshold.to_string()),
        pod.concurrency,
        metadata(1, "in-flight", &pod.in_flight_threshold.to_string()),
    );
}
