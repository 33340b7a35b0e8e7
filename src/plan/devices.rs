//! Chips, MIG profiles, instance types, prices and assumptions: the built-in table, and files that
//! extend it. Knows no models.

use std::path::Path;

use super::{Fault, PlanError};
use crate::config::values::nearest;

const BUILT_IN: &str = include_str!("devices.toml");

/// The whole table.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    #[serde(default, rename = "chip")]
    chips: Vec<Chip>,
    #[serde(default, rename = "mig")]
    migs: Vec<Mig>,
    #[serde(default, rename = "instance")]
    instances: Vec<Instance>,
    #[serde(default)]
    assumptions: toml::Table,
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    Gpu,
    Cpu,
}

#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Chip {
    name: String,
    kind: Kind,
    memory_mib: u64,
    bandwidth_gb_s: f64,
    tflops: f64,
    /// With quantised weights, where that is another rate.
    #[serde(default)]
    tflops_quantised: Option<f64>,
}

#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Mig {
    chip: String,
    profiles: Vec<Profile>,
}

#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    profile: String,
    memory_gib: f64,
    sevenths: u32,
    eighths: u32,
    count: u32,
}

/// A machine that can be rented.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Instance {
    pub(super) name: String,
    chip: String,
    /// GPUs of it; 1 for a CPU.
    count: u32,
    /// Allocatable.
    pub(super) cpu_m: u32,
    pub(super) memory_mib: u64,
    pub(super) storage_gib: u64,
    pub(super) usd_per_hour: f64,
    /// Nobody's guess: set in a file or by a flag.
    #[serde(default)]
    pub(super) spot_usd_per_hour: Option<f64>,
    pub(super) as_of: String,
}

/// What the arithmetic takes for granted. `devices.toml` explains each.
#[derive(Debug, Clone, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Assumptions {
    pub(super) context_mib: u64,
    pub(super) bandwidth_efficiency: f64,
    pub(super) flops_efficiency: f64,
    pub(super) step_overhead_us: f64,
    pub(super) load_target: f64,
    pub(super) p95_generate: f64,
    pub(super) p95_encode: f64,
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
    pub(super) context_tokens: u32,
    pub(super) host_mib: u64,
    pub(super) host_cuda_mib: u64,
    pub(super) host_model_mib: u64,
    pub(super) scratch_mib: u64,
    pub(super) hours: f64,
    pub(super) node_seconds: f64,
    pub(super) image_mib: u64,
    pub(super) pull_mib_s: f64,
    pub(super) fetch_mib_s: f64,
    pub(super) disk_mib_s: f64,
    pub(super) copy_mib_s: f64,
    pub(super) warm_seconds: f64,
}

/// What one pod gets: a GPU, a slice of one, or a machine's processors; and the machine around it.
#[derive(Debug, Clone)]
pub(super) struct Device {
    /// As it was asked for: `l4`, `l4/4`, `mig:1g.10gb@a100-80`, `cpu`.
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Bytes that can be used; 0 on a CPU, where the pod's memory counts.
    pub(super) memory: u64,
    /// Peak bytes and operations a second.
    pub(super) bandwidth: f64,
    pub(super) flops: f64,
    /// With quantised weights.
    pub(super) flops_quantised: f64,
    /// Its part of a whole GPU's price.
    pub(super) share: f64,
    /// How many of it a node has.
    pub(super) per_node: u32,
    /// What a pod asks for: `nvidia.com/gpu`, `nvidia.com/mig-1g.10gb`, or nothing.
    pub(super) resource: Option<String>,
    /// Pods that take turns on one GPU.
    pub(super) replicas: u32,
    pub(super) instance: Instance,
}

impl Device {
    /// Dollars an hour, spot or not; none where no spot price is known.
    pub(super) fn hourly(&self, spot: bool) -> Option<f64> {
        let node = match spot {
            false => self.instance.usd_per_hour,
            true => self.instance.spot_usd_per_hour?,
        };
        Some(node / f64::from(self.instance.count.max(1)) * self.share)
    }

    /// GPUs of its machine; 1 for a CPU.
    pub(super) fn gpus(&self) -> u32 {
        self.instance.count
    }

    /// What is counted and paid for, for people: GPUs and their parts, or whole machines.
    pub(super) fn rented(&self) -> &str {
        if self.kind == Kind::Cpu { &self.instance.name } else { &self.name }
    }

    /// Name and machine, for people.
    pub(super) fn label(&self) -> String {
        format!("{} ({})", self.name, self.instance.name)
    }
}

impl Table {
    /// The built-in table, extended by `files` and by a discount for spot, where one is given.
    ///
    /// # Errors
    /// A file that cannot be read, or does not look like the built-in one.
    pub(super) fn read(files: &[std::path::PathBuf], spot: Option<f64>) -> Result<Self, PlanError> {
        let mut table: Self = toml::from_str(BUILT_IN).expect("the built-in table is sound");
        for path in files {
            table.extend(path)?;
        }
        if let Some(discount) = spot {
            for instance in &mut table.instances {
                instance.spot_usd_per_hour.get_or_insert(instance.usd_per_hour * (1.0 - discount));
            }
        }
        table.check()?;
        Ok(table)
    }

    fn extend(&mut self, path: &Path) -> Result<(), PlanError> {
        let shown = path.display();
        let text = std::fs::read_to_string(path)
            .map_err(|error| PlanError::new(Fault::Input, format!("{shown}: {error}")))?;
        let more: Self = toml::from_str(&text).map_err(|error| {
            PlanError::new(Fault::Data, format!("{shown}: {}", error.message()))
        })?;
        merge(&mut self.chips, more.chips, |chip| chip.name.clone());
        merge(&mut self.migs, more.migs, |mig| mig.chip.clone());
        merge(&mut self.instances, more.instances, |instance| instance.name.clone());
        for (key, value) in more.assumptions {
            let Some(known) = self.assumptions.get_mut(&key) else {
                let hint = nearest(&key, self.assumptions.keys().map(String::as_str));
                let hint = hint.map(|it| format!(": did you mean {it}?")).unwrap_or_default();
                let message = format!("{shown}: no assumption is called {key}{hint}");
                return Err(PlanError::new(Fault::Data, message));
            };
            *known = value;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), PlanError> {
        let wrong = |what: String| Err(PlanError::new(Fault::Data, what));
        // They come into manifests and tables as they are.
        let plain = |text: &str| {
            !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let profiles = self.migs.iter().flat_map(|mig| &mig.profiles);
        let names =
            self.chips.iter().map(|chip| &chip.name).chain(
                self.instances.iter().flat_map(|instance| [&instance.name, &instance.as_of]),
            );
        let names = names.chain(profiles.clone().map(|slice| &slice.profile));
        if let Some(odd) = names.into_iter().find(|name| !plain(name)) {
            return wrong(format!("{odd:?}: names and dates have letters, digits, '.', '_', '-'"));
        }
        if let Some(odd) = profiles.into_iter().find(|it| it.count == 0 || it.sevenths > 7) {
            return wrong(format!("profile {}: 1 or more a GPU, at most 7 sevenths", odd.profile));
        }
        for instance in &self.instances {
            let name = &instance.name;
            if !self.chips.iter().any(|chip| chip.name == instance.chip) {
                return wrong(format!("instance {name}: no chip is called {}", instance.chip));
            }
            let prices = [Some(instance.usd_per_hour), instance.spot_usd_per_hour];
            if prices.iter().flatten().any(|price| !(*price >= 0.0 && *price < 100_000.0)) {
                return wrong(format!("instance {name}: a price is from 0 to 100000 dollars"));
            }
            if instance.count == 0 || instance.cpu_m == 0 || instance.memory_mib == 0 {
                return wrong(format!("instance {name}: count, cpu_m and memory_mib are above 0"));
            }
        }
        for chip in &self.chips {
            let sound = chip.bandwidth_gb_s > 0.0 && chip.tflops > 0.0;
            if !sound || (chip.kind == Kind::Gpu && chip.memory_mib == 0) {
                return wrong(format!("chip {}: its sizes are above 0", chip.name));
            }
        }
        self.assumptions().map(drop)
    }

    /// What the arithmetic takes for granted.
    ///
    /// # Errors
    /// A value of another kind, or out of range.
    pub(super) fn assumptions(&self) -> Result<Assumptions, PlanError> {
        let wrong = |what: &str| PlanError::new(Fault::Data, format!("assumptions: {what}"));
        let all: Assumptions = toml::Value::Table(self.assumptions.clone())
            .try_into()
            .map_err(|error: toml::de::Error| wrong(error.message()))?;
        let shares = [all.bandwidth_efficiency, all.flops_efficiency, all.load_target];
        if shares.iter().any(|share| !(*share > 0.0 && *share <= 1.0)) {
            return Err(wrong("efficiencies and load_target are above 0 and at most 1"));
        }
        let above = [all.p95_generate, all.p95_encode, all.hours, all.pull_mib_s, all.fetch_mib_s];
        let above = above.iter().chain([&all.disk_mib_s, &all.copy_mib_s]);
        if above.into_iter().any(|value| value.is_nan() || *value <= 0.0) {
            return Err(wrong("factors, hours and speeds are above 0"));
        }
        if all.prompt_tokens == 0 || all.output_tokens == 0 || all.context_tokens == 0 {
            return Err(wrong("lengths are above 0"));
        }
        Ok(all)
    }

    /// Every device that the names mean, on every machine that has it; without names, every whole
    /// GPU and every CPU machine. `replicas` pods take turns on each whole GPU.
    ///
    /// # Errors
    /// A name that nothing has: the known ones and the nearest.
    pub(super) fn devices(
        &self,
        names: &[String],
        replicas: u32,
    ) -> Result<Vec<Device>, PlanError> {
        let mut found = Vec::new();
        if names.is_empty() {
            for instance in &self.instances {
                found.push(self.whole(&instance.chip, instance, replicas));
            }
        }
        for name in names {
            let before = found.len();
            if let Some(slice) = name.strip_prefix("mig:") {
                found.extend(self.slices(slice));
            } else {
                let meant = |it: &&Instance| it.name == *name || it.chip == *name;
                let instances = self.instances.iter().filter(meant);
                found.extend(instances.map(|it| self.whole(&it.chip, it, replicas)));
            }
            if found.len() == before {
                return Err(self.unknown(name));
            }
        }
        Ok(found)
    }

    /// Every MIG slice on every machine that can have it.
    pub(super) fn all_slices(&self) -> Vec<Device> {
        let names = self.migs.iter().flat_map(|mig| {
            mig.profiles.iter().map(|slice| format!("{}@{}", slice.profile, mig.chip))
        });
        names.flat_map(|name| self.slices(&name)).collect()
    }

    fn chip(&self, name: &str) -> &Chip {
        self.chips.iter().find(|chip| chip.name == name).expect("checked when read")
    }

    fn whole(&self, chip: &str, instance: &Instance, replicas: u32) -> Device {
        let chip = self.chip(chip);
        let gpu = chip.kind == Kind::Gpu;
        let replicas = if gpu { replicas.max(1) } else { 1 };
        let share = 1.0 / f64::from(replicas);
        // The rate of a CPU is that of its processors together.
        let scale = if gpu { share } else { f64::from(instance.cpu_m / 1000 + 1) };
        let name = match replicas {
            1 => chip.name.clone(),
            more => format!("{}/{more}", chip.name),
        };
        Device {
            name,
            kind: chip.kind,
            memory: (chip.memory_mib << 20) / u64::from(replicas),
            bandwidth: chip.bandwidth_gb_s * 1e9 * scale,
            flops: chip.tflops * 1e12 * scale,
            flops_quantised: chip.tflops_quantised.unwrap_or(chip.tflops) * 1e12 * scale,
            share,
            per_node: instance.count * replicas,
            resource: gpu.then(|| "nvidia.com/gpu".to_owned()),
            replicas,
            instance: instance.clone(),
        }
    }

    /// `1g.10gb@a100-80` on every machine with that chip; without a chip, on every chip.
    fn slices(&self, text: &str) -> Vec<Device> {
        let (profile, chip) = text.split_once('@').map_or((text, None), |(a, b)| (a, Some(b)));
        let mut found = Vec::new();
        let migs = self.migs.iter().filter(|mig| chip.is_none_or(|chip| chip == mig.chip));
        for mig in migs {
            let Some(slice) = mig.profiles.iter().find(|it| it.profile == profile) else {
                continue;
            };
            for instance in self.instances.iter().filter(|it| it.chip == mig.chip) {
                let whole = self.whole(&mig.chip, instance, 1);
                found.push(Device {
                    name: format!("mig:{profile}@{}", mig.chip),
                    memory: (slice.memory_gib * f64::from(1 << 30)) as u64,
                    bandwidth: whole.bandwidth * f64::from(slice.eighths) / 8.0,
                    flops: whole.flops * f64::from(slice.sevenths) / 7.0,
                    flops_quantised: whole.flops_quantised * f64::from(slice.sevenths) / 7.0,
                    share: 1.0 / f64::from(slice.count),
                    per_node: instance.count * slice.count,
                    resource: Some(format!("nvidia.com/mig-{profile}")),
                    ..whole
                });
            }
        }
        found
    }

    fn unknown(&self, name: &str) -> PlanError {
        let chips = self.chips.iter().map(|chip| chip.name.clone());
        let slices = self.migs.iter().flat_map(|mig| {
            mig.profiles.iter().map(|slice| format!("mig:{}@{}", slice.profile, mig.chip))
        });
        let instances = self.instances.iter().map(|instance| instance.name.clone());
        let known: Vec<String> = chips.chain(instances).chain(slices).collect();
        let lower = name.to_lowercase();
        let hint = nearest(&lower, known.iter().map(String::as_str))
            .map(|nearest| format!(" did you mean {nearest}?"))
            .unwrap_or_default();
        let known = known.join(", ");
        let message =
            format!("no device is called {name:?}:{hint} known are {known}; -f FILE adds");
        PlanError::new(Fault::Usage, message)
    }
}

/// Entries of `more` replace those of the same key.
fn merge<T>(all: &mut Vec<T>, more: Vec<T>, key: impl Fn(&T) -> String) {
    for entry in more {
        let name = key(&entry);
        match all.iter_mut().find(|known| key(known) == name) {
            Some(known) => *known = entry,
            None => all.push(entry),
        }
    }
}
