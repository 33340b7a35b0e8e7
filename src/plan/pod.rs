//! What a pod asks Kubernetes for, how it scales and stops, and how long it takes to come. Warns
//! where a request is a known mistake.

use super::devices::{Device, Kind};
use super::fit::{Fit, Room, Wanted, with_margin};
use super::speed::{Point, Speed};
use crate::lifecycle::phase::Budget;
use crate::request::Micros;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Graces that nodes really give: GKE's default, others' least, what a two-minute notice leaves.
const GRACES: [u32; 3] = [15, 30, 110];

/// What was decided by hand.
#[derive(Debug, Clone, Default)]
pub(super) struct ByHand {
    pub(super) cpu_m: Option<u32>,
    pub(super) memory: Option<u64>,
    /// Ephemeral storage; 0: neither request nor limit.
    pub(super) storage: Option<u64>,
    pub(super) grace_seconds: Option<u32>,
    /// Concurrency that keeps the objective, as measured on a running server.
    pub(super) concurrency: Option<f64>,
    pub(super) replicas_max: Option<u32>,
}

/// One replica's pod, and how it scales.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Pod {
    pub(super) cpu_m: u32,
    /// Request and limit, bytes.
    pub(super) memory: u64,
    /// What `memory` is made of, without the 30 %.
    pub(super) memory_need: u64,
    /// Request and limit, bytes; 0 for none.
    pub(super) storage: u64,
    /// Of `storage`: the model cache's size limit.
    pub(super) cache: u64,
    pub(super) resource: Option<String>,
    pub(super) device_memory_limit: u64,
    pub(super) kv_bytes: u64,
    pub(super) device_share: f64,
    pub(super) grace_seconds: u32,
    pub(super) queue_threshold: u32,
    pub(super) in_flight_threshold: f64,
    /// Requests in flight that a replica carries.
    pub(super) concurrency: f64,
    /// `measured` or `guessed`.
    pub(super) thresholds: &'static str,
    pub(super) replicas_max: u32,
    pub(super) cold_start: ColdStart,
}

/// Seconds from "one more" to "ready".
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(super) struct ColdStart {
    pub(super) node: f64,
    pub(super) image: f64,
    /// Over the network into the cache.
    pub(super) fetch: f64,
    /// From local disk to the device.
    pub(super) load: f64,
    pub(super) warm: f64,
}

impl ColdStart {
    fn of(wanted: &[Wanted<'_>], fit: &Fit, device: &Device, room: &Room) -> Self {
        let assumed = &room.assumed;
        let file: u64 = wanted.iter().map(|one| one.model.weights.total).sum();
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        let copy = match device.kind {
            Kind::Gpu => mib(fit.weights) / assumed.copy_mib_s,
            Kind::Cpu => 0.0,
        };
        Self {
            node: assumed.node_seconds,
            image: assumed.image_mib as f64 / assumed.pull_mib_s,
            fetch: mib(file) / assumed.fetch_mib_s,
            // Tensors are copied while the next ones are read.
            load: (mib(file) / assumed.disk_mib_s).max(copy),
            warm: assumed.warm_seconds,
        }
    }

    /// On a node that is there, has the image, and the weights on its disk.
    pub(super) fn warm_node(&self) -> f64 {
        self.load + self.warm
    }

    /// On a node that must come first.
    pub(super) fn cold(&self) -> f64 {
        self.node + self.image + self.fetch + self.load + self.warm
    }
}

/// What of a node one pod may take: CPU in thousandths, memory in bytes.
pub(super) fn part_of_node(device: &Device, room: &Room) -> (u32, u64) {
    let cpu = device.instance.cpu_m.saturating_sub(room.daemonset_cpu_m);
    let memory = (device.instance.memory_mib * MIB).saturating_sub(room.daemonset_bytes);
    (cpu / device.per_node, memory / u64::from(device.per_node))
}

impl Pod {
    /// The pod of `wanted` on `device`, of which `replicas` are planned.
    pub(super) fn of(
        (wanted, fit): (&[Wanted<'_>], &Fit),
        device: &Device,
        room: &Room,
        (point, replicas): (Option<&Point>, u32),
        by_hand: &ByHand,
    ) -> Self {
        let (cpu_most, _) = part_of_node(device, room);
        let memory_need = fit.host_need(device.kind, &room.assumed);
        let memory = with_margin(memory_need).next_multiple_of(64 * MIB);
        let file: u64 = wanted.iter().map(|one| one.model.weights.total).sum();
        // Tokenizers and what is being written lie beside the weights.
        let cache = (file + file / 10 + 256 * MIB).next_multiple_of(GIB);
        let storage = cache + (room.assumed.scratch_mib * MIB).next_multiple_of(GIB);
        let (concurrency, thresholds) = match by_hand.concurrency {
            Some(measured) => (measured, "measured"),
            None => (guess_concurrency(wanted, fit, point), "guessed"),
        };
        Self {
            cpu_m: by_hand.cpu_m.unwrap_or_else(|| cpu(wanted.len(), device.kind, cpu_most)),
            memory: by_hand.memory.unwrap_or(memory),
            memory_need,
            storage: by_hand.storage.unwrap_or(storage),
            cache,
            resource: device.resource.clone(),
            device_memory_limit: match device.kind {
                Kind::Gpu => fit.limit,
                // The pod's own memory: what the ledger needs, not all that the node has.
                Kind::Cpu => (fit.weights + fit.workspace + fit.kv).next_multiple_of(MIB),
            },
            kv_bytes: fit.kv,
            device_share: device.share,
            grace_seconds: by_hand.grace_seconds.unwrap_or_else(|| grace(longest(point))),
            queue_threshold: match by_hand.concurrency {
                // What was measured counts those that wait, and the other threshold takes the rest.
                Some(measured) => ((measured * 0.25) as u32).max(1),
                None => queue_threshold(wanted, point),
            },
            in_flight_threshold: (concurrency * 0.75 * 10.0).floor().max(10.0) / 10.0,
            concurrency,
            thresholds,
            replicas_max: by_hand.replicas_max.unwrap_or(replicas * 2),
            cold_start: ColdStart::of(wanted, fit, device, room),
        }
    }

    /// What is known to go wrong with such a pod.
    pub(super) fn warnings(
        &self,
        (wanted, fit): (&[Wanted<'_>], &Fit),
        device: &Device,
        room: &Room,
        (point, by_hand): (Option<&Point>, &ByHand),
    ) -> Vec<String> {
        let mut warnings = Vec::new();
        let instance = &device.instance.name;
        let (cpu_most, memory_most) = part_of_node(device, room);
        if device.kind == Kind::Gpu && self.cpu_m > 4000 {
            warnings.push(format!(
                "cpu {}m: a server whose work is on the GPU uses 2 to 4 cores; the rest is paid \
                 for and idle",
                self.cpu_m
            ));
        }
        if self.cpu_m > cpu_most {
            warnings.push(format!(
                "cpu {}m: {instance} has {}m allocatable, {}m for each pod after daemonsets: the \
                 pod would stay Pending for ever",
                self.cpu_m, device.instance.cpu_m, cpu_most
            ));
        } else if self.cpu_m < 1000 {
            warnings.push(format!(
                "cpu {}m: less than one core for HTTP, tokenizers and the device's thread; use a \
                 larger machine or fewer slices",
                self.cpu_m
            ));
        }
        if self.memory > memory_most {
            let (memory, most) = (gib(self.memory), gib(memory_most));
            warnings.push(format!(
                "memory {memory}: {instance} has {most} for each pod after daemonsets: the pod \
                 would stay Pending for ever"
            ));
        }
        if self.memory < self.memory_need {
            let (memory, need) = (gib(self.memory), gib(self.memory_need));
            warnings.push(format!("memory {memory}: the process needs {need}: it would be killed"));
        }
        if self.memory < fit.weights && by_hand.memory.is_some() {
            let (memory, weights) = (gib(self.memory), gib(fit.weights));
            let so = match device.kind {
                Kind::Cpu => "they do not fit",
                Kind::Gpu => {
                    "fine as they are streamed to the GPU, but no restart finds them all \
                              in the page cache"
                }
            };
            warnings.push(format!("memory {memory} is below the weights ({weights}): {so}"));
        }
        self.warn_of_storage(device, room, &mut warnings);
        self.warn_of_time(wanted, point, &mut warnings);
        warnings
    }

    fn warn_of_storage(&self, device: &Device, room: &Room, warnings: &mut Vec<String>) {
        let node = room.storage_bytes.unwrap_or(device.instance.storage_gib * GIB);
        let image = room.assumed.image_mib * MIB;
        if self.storage == 0 {
            warnings.push(
                "no ephemeral-storage request and limit: one full disk evicts every pod of the \
                 node"
                    .into(),
            );
        } else if self.storage + image > node {
            warnings.push(format!(
                "ephemeral storage: {} for the pod and {} for the image are more than the node's \
                 {}: give its root volume 100 GiB or more, or local disks as RAID0",
                gib(self.storage),
                gib(image),
                gib(node)
            ));
        }
        if device.kind == Kind::Gpu && device.per_node > device.replicas && device.share == 1.0 {
            warnings.push(format!(
                "{} comes with {} of them: the price here is one part of {:.2} USD an hour, true \
                 only if the others are used",
                device.instance.name, device.per_node, device.instance.usd_per_hour
            ));
        }
        if device.share < 1.0 {
            warnings.push(format!(
                "a slice is charged {:.1} % of its GPU, true only if the other slices are used",
                device.share * 100.0
            ));
        }
    }

    fn warn_of_time(
        &self,
        wanted: &[Wanted<'_>],
        point: Option<&Point>,
        warnings: &mut Vec<String>,
    ) {
        let drains = drain_seconds(self.grace_seconds);
        let Some(point) = point else { return };
        for (one, lane) in wanted.iter().zip(&point.lanes) {
            if lane.p95_seconds > drains {
                warnings.push(format!(
                    "{}: an answer takes {:.0} s at full load and a drain of {} s has {:.1} s for \
                     it: what does not finish is cut",
                    one.model.name, lane.p95_seconds, self.grace_seconds, drains
                ));
            }
        }
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB as f64)
}

/// Two cores and half of one for each further model, at most four, never more than there are. On a
/// CPU the cores are the device: all of them.
fn cpu(models: usize, kind: Kind, most: u32) -> u32 {
    let wanted = match kind {
        Kind::Gpu => (1500 + 500 * models as u32).clamp(2000, 4000),
        Kind::Cpu => u32::MAX,
    };
    (wanted.min(most) / 100 * 100).max(100)
}

/// Seconds that a grace leaves for draining.
fn drain_seconds(grace: u32) -> f64 {
    let budget = Budget::of(Micros(u64::from(grace) * 1_000_000));
    f64::from(grace) - (budget.lame_duck.0 + budget.margin.0) as f64 / 1e6
}

/// The shortest of the graces that lets an answer of this length finish; the longest if none does.
fn grace(longest: Option<f64>) -> u32 {
    let enough = |grace: &u32| drain_seconds(*grace) >= longest.unwrap_or(20.0);
    GRACES.into_iter().find(enough).unwrap_or(GRACES[2])
}

fn longest(point: Option<&Point>) -> Option<f64> {
    let lanes = point?.lanes.iter();
    lanes.map(|lane| lane.p95_seconds).max_by(f64::total_cmp)
}

/// What a replica has in flight when it carries all it can.
fn guess_concurrency(wanted: &[Wanted<'_>], fit: &Fit, point: Option<&Point>) -> f64 {
    if let Some(point) = point {
        return point.lanes.iter().map(|lane| lane.in_flight).sum();
    }
    // No load is known: seats or memory bound generators; of encoder requests a few overlap.
    let streams = fit.parts.iter().map(|part| part.streams).max().unwrap_or(0) as f64;
    let encoders = wanted.iter().filter(|one| !one.model.shape.decoder).count() as f64;
    streams + 4.0 * encoders
}

/// Waiting requests that the tightest objective tolerates: half of what is served in the time it
/// leaves; 4 where there is none.
fn queue_threshold(wanted: &[Wanted<'_>], point: Option<&Point>) -> u32 {
    let Some(point) = point else { return 4 };
    let rate: f64 = wanted.iter().map(|one| one.load.rps * point.scale).sum();
    let slack = wanted
        .iter()
        .zip(&point.lanes)
        .filter_map(|(one, lane)| Some(one.load.latency_seconds? - lane.mean_seconds));
    match slack.min_by(f64::total_cmp) {
        Some(slack) => (rate * slack / 2.0).clamp(1.0, 64.0) as u32,
        None => 4,
    }
}

impl Speed {
    /// Whether `wanted` meet their objectives on an idle device: what is too slow, if not.
    pub(super) fn too_slow(&self, wanted: &[Wanted<'_>], assumed: (f64, f64)) -> Option<String> {
        wanted.iter().find_map(|one| {
            let most = one.load.latency_seconds?;
            let alone = match one.model.shape.decoder {
                true => self.answer(one, 1.0) * assumed.0,
                false => self.prefill(one) * assumed.1,
            };
            let name = &one.model.name;
            (alone > most)
                .then(|| format!("{name} alone takes {alone:.1} s, its objective is {most} s"))
        })
    }
}
