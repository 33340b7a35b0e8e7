//! What memory models take on a device, by the engine's own ledger, and what that leaves for KV.
//! Knows nothing of time or money.

use super::devices::{Assumptions, Device, Kind};
use super::load::Load;
use super::model::Model;
use crate::arch::Outline;
use crate::engine::budget::{self, Ledger, Pages};
use crate::kernels::builder::Capacity;
use crate::scheduler::step::BLOCK_TOKENS;

const MIB: u64 = 1 << 20;

/// A model and what is asked of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) model: &'a Model,
    pub(super) load: Load,
}

/// What is there beside the models.
#[derive(Debug, Clone)]
pub(super) struct Room {
    pub(super) assumed: Assumptions,
    /// What daemonsets take of a node.
    pub(super) daemonset_cpu_m: u32,
    pub(super) daemonset_bytes: u64,
    /// Bytes of the KV region, where someone decided.
    pub(super) kv_bytes: Option<u64>,
    /// Bytes of a node's ephemeral storage, where it is not the default.
    pub(super) storage_bytes: Option<u64>,
}

/// Device memory by use, in bytes: `process + limit + headroom = usable`, and
/// `weights + workspace + kv + spare = limit`.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Fit {
    /// All that there is: of the device, or on a CPU of the node for one pod.
    pub(super) usable: u64,
    /// A CUDA context; on a CPU the process itself.
    pub(super) process: u64,
    /// Kept free: 10 % and what others may take.
    pub(super) headroom: u64,
    /// `device.memory_limit`.
    pub(super) limit: u64,
    pub(super) weights: u64,
    pub(super) workspace: u64,
    pub(super) kv: u64,
    /// Of `kv`: one request of the longest context for each generator.
    pub(super) kv_guaranteed: u64,
    /// Neither needed nor given to KV.
    pub(super) spare: u64,
    /// For each model.
    pub(super) parts: Vec<Part>,
    /// The largest tensor, on its way through host memory.
    pub(super) staging: u64,
    #[serde(skip)]
    pub(super) pages: Pages,
}

/// One model's part.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Part {
    pub(super) weights: u64,
    /// Models share the largest.
    pub(super) workspace: u64,
    pub(super) kv_bytes_per_token: u64,
    /// If it had the whole region.
    pub(super) kv_tokens: u64,
    /// Sequences of the planned length in these, at most as many as it has seats.
    pub(super) streams: u64,
}

/// What keeps models from a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Short {
    /// The least that they need of the limit, and what the limit is.
    pub(super) need: u64,
    pub(super) limit: u64,
}

/// Bytes of a model's weights on such a device.
pub(super) fn weight_bytes(model: &Model, kind: Kind) -> u64 {
    match kind {
        Kind::Gpu => model.weights.total,
        Kind::Cpu => model.weights.cpu + model.weights.coarse,
    }
}

/// Host memory that a process with these models needs beside weights, workspace and KV.
pub(super) fn host_bytes(models: usize, kind: Kind, assumed: &Assumptions) -> u64 {
    let cuda = if kind == Kind::Gpu { assumed.host_cuda_mib } else { 0 };
    (assumed.host_mib + cuda + assumed.host_model_mib * models as u64) * MIB
}

/// 30 % more.
pub(super) fn with_margin(bytes: u64) -> u64 {
    bytes + bytes * 3 / 10
}

impl Fit {
    /// How `wanted` share `device`.
    ///
    /// # Errors
    /// What is short.
    pub(super) fn of(wanted: &[Wanted<'_>], device: &Device, room: &Room) -> Result<Self, Short> {
        let (usable, process, limit) = limits(wanted, device, room);
        let lanes = lanes(wanted);
        let quantised = |model: &Model| device.kind == Kind::Cpu && model.weights.quantised;
        let sizes = wanted.iter().zip(&lanes).map(|(one, (_, capacity))| {
            one.model.shape.workspace_bytes(*capacity, quantised(one.model))
        });
        let workspaces: Vec<u64> = sizes.collect();
        let weights: Vec<u64> =
            wanted.iter().map(|one| weight_bytes(one.model, device.kind)).collect();
        let mut ledger = Ledger {
            weights: weights.iter().sum(),
            kv: 0,
            workspace: workspaces.iter().copied().max().unwrap_or(0),
            limit,
            others: 0,
        };
        let guaranteed = region(&cut(&lanes, Some(0), Ledger { limit: u64::MAX, ..ledger }));
        let need = ledger.weights + ledger.workspace + guaranteed;
        if need > limit {
            return Err(Short { need, limit });
        }
        let asked = match (room.kv_bytes, device.kind) {
            (Some(bytes), _) => Some(bytes),
            (None, Kind::Gpu) => Some(limit - ledger.weights - ledger.workspace),
            // Pages of a CPU are the pod's memory: no more than the server takes by itself.
            (None, Kind::Cpu) => None,
        };
        let pages = cut(&lanes, asked, ledger);
        ledger.kv = region(&pages);
        let parts = wanted.iter().zip(&lanes).zip(weights.iter().zip(&workspaces));
        let parts = parts.map(|((one, lane), (weights, workspace))| Part {
            weights: *weights,
            workspace: *workspace,
            ..kv_part(one, lane, &pages)
        });
        let taken = ledger.weights + ledger.workspace + ledger.kv;
        Ok(Self {
            usable,
            process,
            headroom: usable.saturating_sub(process + limit),
            limit,
            weights: ledger.weights,
            workspace: ledger.workspace,
            kv: ledger.kv,
            kv_guaranteed: guaranteed,
            spare: limit.saturating_sub(taken),
            parts: parts.collect(),
            staging: wanted.iter().map(|one| one.model.weights.largest).max().unwrap_or(0),
            pages,
        })
    }

    /// Host memory that the process needs, without margin.
    pub(super) fn host_need(&self, kind: Kind, assumed: &Assumptions) -> u64 {
        let process = host_bytes(self.parts.len(), kind, assumed) + self.staging;
        let ledger = self.weights + self.workspace + self.kv;
        if kind == Kind::Cpu { process + ledger } else { process }
    }
}

/// Usable bytes, the process's, and the ledger's limit.
fn limits(wanted: &[Wanted<'_>], device: &Device, room: &Room) -> (u64, u64, u64) {
    match device.kind {
        Kind::Gpu => {
            let context = room.assumed.context_mib * MIB;
            let free = device.memory.saturating_sub(context);
            (device.memory, context, budget::default_limit(device.memory, free))
        }
        Kind::Cpu => {
            let node = device.instance.memory_mib * MIB;
            let pod = node.saturating_sub(room.daemonset_bytes);
            let staging = wanted.iter().map(|one| one.model.weights.largest).max().unwrap_or(0);
            let process = host_bytes(wanted.len(), Kind::Cpu, &room.assumed) + staging;
            // The request has 30 % on top of everything, in whole steps of 64 MiB.
            let pod = pod.saturating_sub(64 * MIB);
            (
                node.saturating_sub(room.daemonset_bytes),
                process,
                (pod / 13 * 10).saturating_sub(process),
            )
        }
    }
}

fn lanes(wanted: &[Wanted<'_>]) -> Vec<(Outline, Capacity)> {
    let lane = |one: &Wanted<'_>| (one.model.shape.outline(), one.model.capacity(one.load.context));
    wanted.iter().map(lane).collect()
}

fn cut(lanes: &[(Outline, Capacity)], asked: Option<u64>, ledger: Ledger) -> Pages {
    budget::pages(lanes, asked, ledger).expect("the caller has checked the limit")
}

fn region(pages: &Pages) -> u64 {
    u64::from(pages.count + pages.scratch) * pages.page_bytes as u64
}

fn kv_part(one: &Wanted<'_>, lane: &(Outline, Capacity), pages: &Pages) -> Part {
    let none = Part { weights: 0, workspace: 0, kv_bytes_per_token: 0, kv_tokens: 0, streams: 0 };
    let Some(kv) = lane.0.kv else { return none };
    let blocks = pages.page_bytes / kv.block_bytes();
    let groups = pages.count as usize / kv.layers;
    let tokens = (groups * blocks * BLOCK_TOKENS) as u64;
    // A sequence takes whole groups.
    let length = (one.load.prompt + one.load.output) as usize;
    let of_one = length.div_ceil(BLOCK_TOKENS).div_ceil(blocks.max(1)).max(1);
    let streams = (groups / of_one).min(lane.1.yields) as u64;
    Part { kv_bytes_per_token: kv.token_bytes() as u64, kv_tokens: tokens, streams, ..none }
}

/// Bytes of KV that one sequence of the planned length holds.
pub(super) fn sequence_bytes(one: &Wanted<'_>, page_bytes: usize) -> u64 {
    let Some(kv) = one.model.shape.kv() else { return 0 };
    let blocks = (page_bytes / kv.block_bytes()).max(1);
    let length = (one.load.prompt + one.load.output) as usize;
    let groups = length.div_ceil(BLOCK_TOKENS).div_ceil(blocks);
    (groups * kv.layers * page_bytes) as u64
}
