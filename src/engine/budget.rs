//! The memory ledger: what weights, workspace and KV pages take of the device's limit, decided
//! once at start. Afterwards memory is a scheduling matter, never a failed allocation.

use crate::arch::Outline;
use crate::config::MemoryLimit;
use crate::engine::warmup::TRIAL_BLOCKS;
use crate::kernels::builder::Capacity;
use crate::kernels::ops::KvShape;
use crate::request::Micros;
use crate::scheduler::step::{BLOCK_TOKENS, TRIAL_SEAT};
use crate::scheduler::{LaneConfig, LaneKind};

/// Rows (token positions) in the largest step on a CPU: enough to amortise the weights many
/// times over, small enough to keep activations in the second-level cache.
const ROWS_MAX: usize = 512;

/// Sequences of a lane that can run at once unless its manifest says otherwise.
const SEATS_DEFAULT: u32 = 64;

/// A loan of pages is a group: one super-page for each layer. It should stay below this.
const GROUP_BYTES: usize = 4 << 20;

/// What the driver may still want, by default.
const DRIVER_BYTES: u64 = 512 << 20;

/// KV memory beyond the guarantees that a CPU gives by default. Pages are touched only when used.
const KV_BYTES_DEFAULT: u64 = 512 << 20;

/// What the manifest says about a lane.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Share of the device.
    pub weight: f64,
    /// Longest sequence; none: what the model was made for.
    pub context: Option<u32>,
    /// Sequences running at once.
    pub seats: Option<u32>,
    /// Bytes of its weights.
    pub weight_bytes: u64,
}

/// Memory by use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ledger {
    /// All models' weights.
    pub weights: u64,
    /// The KV region.
    pub kv: u64,
    /// The largest model's workspace.
    pub workspace: u64,
    /// All of it must stay below this.
    pub limit: u64,
    /// What others hold of the device, and the driver.
    pub others: u64,
}

/// A device's memory before this process reserves any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// All of it.
    pub total: u64,
    /// What can still be had.
    pub free: u64,
    /// Whether memory that is not free cannot be had in any way: a GPU's, not a machine's.
    pub strict: bool,
}

/// How the KV region is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Bytes of a super-page, the same for all lanes.
    pub page_bytes: usize,
    /// Super-pages for requests.
    pub count: u32,
    /// Super-pages behind these, for steps that try a model.
    pub scratch: u32,
}

/// What one lane may use.
#[derive(Debug, Clone)]
pub struct LanePlan {
    /// For the program.
    pub capacity: Capacity,
    /// For the scheduler.
    pub config: LaneConfig,
}

/// The sizes that a lane's workspace must have.
pub fn capacity(outline: &Outline, wish: &Wish) -> Capacity {
    let context = wish.context.map_or(outline.context, |limit| outline.context.min(limit as usize));
    match outline.kv {
        Some(_) => {
            let seats = wish.seats.unwrap_or(SEATS_DEFAULT).min(TRIAL_SEAT.0) as usize;
            Capacity { rows: ROWS_MAX.max(seats), yields: seats, context }
        }
        None => {
            let rows = ROWS_MAX.max(context);
            Capacity { rows, yields: rows, context }
        }
    }
}

/// The same on a GPU, which thousands of rows fill: a matrix of 1,024 outputs is eight tiles wide,
/// and there are more than a hundred multiprocessors.
pub fn capacity_on_gpu(outline: &Outline, wish: &Wish) -> Capacity {
    let Capacity { rows, yields, context } = capacity(outline, wish);
    match outline.kv {
        Some(_) => Capacity { rows: rows.max(2048), yields, context },
        None => {
            let rows = rows.max(4096);
            Capacity { rows, yields: rows, context }
        }
    }
}

/// The size of a super-page: the largest power of two that keeps every lane's group below the
/// bound, and at least a block of every lane.
pub fn page_bytes(kvs: &[KvShape]) -> usize {
    let block = kvs.iter().map(KvShape::block_bytes).max().unwrap_or(1);
    let layers = kvs.iter().map(|kv| kv.layers).max().unwrap_or(1);
    let mut page = block.next_power_of_two();
    while page * 2 * layers <= GROUP_BYTES {
        page *= 2;
    }
    page
}

/// The limit of a device with `total` bytes of which `free` can still be had, unless it is set.
pub fn default_limit(total: u64, free: u64) -> u64 {
    (total / 10 * 9).min(free.saturating_sub(DRIVER_BYTES))
}

impl Device {
    /// What others hold of it, and the driver.
    pub fn others(&self) -> u64 {
        self.total.saturating_sub(self.free)
    }

    /// What this process may use: what is asked for, else nearly all that is free.
    ///
    /// # Errors
    /// More is asked for than others leave.
    pub fn limit(&self, asked: Option<MemoryLimit>) -> Result<u64, String> {
        let Device { total, free, strict } = *self;
        let Some(asked) = asked else {
            return Ok(default_limit(total, free));
        };
        let limit = asked.bytes(total);
        if strict && limit > free {
            return Err(format!(
                "device.memory_limit is {}, and {} of the device's {} are free: other processes \
                 and the driver hold {}. Lower it, or let them go",
                mib(limit),
                mib(free),
                mib(total),
                mib(self.others())
            ));
        }
        Ok(limit)
    }
}

/// KV memory of a GPU unless it is set: what is left, but for an eighth, where models that are
/// loaded later have their workspace. Its memory is for nothing else.
pub fn kv_of_a_gpu(ledger: Ledger) -> u64 {
    let left = ledger.limit.saturating_sub(ledger.weights).saturating_sub(ledger.workspace);
    left - left / 8
}

/// Cuts the KV region: every lane's guarantee (one request of its longest context), and what is
/// asked for or affordable beyond.
///
/// # Errors
/// The limit cannot hold weights, workspace and guarantees: what is short and by how much.
pub fn pages(
    lanes: &[(Outline, Capacity)],
    asked: Option<u64>,
    ledger: Ledger,
) -> Result<Pages, String> {
    let kvs: Vec<KvShape> = lanes.iter().filter_map(|(outline, _)| outline.kv).collect();
    let page_bytes = page_bytes(&kvs);
    let guaranteed: u64 = lanes
        .iter()
        .filter_map(|(outline, capacity)| {
            let kv = outline.kv?;
            Some(u64::from(groups_for(capacity.context, &kv, page_bytes)) * kv.layers as u64)
        })
        .sum();
    let blocks = |kv: &KvShape| TRIAL_BLOCKS.div_ceil((page_bytes / kv.block_bytes()).max(1));
    let scratch = kvs.iter().map(|kv| (kv.layers * blocks(kv)) as u32).max().unwrap_or(0);
    let scratch_bytes = u64::from(scratch) * page_bytes as u64;
    let guaranteed_bytes = guaranteed * page_bytes as u64 + scratch_bytes;
    let taken = ledger.weights + ledger.workspace;
    let left = ledger.limit.saturating_sub(taken);
    if left < guaranteed_bytes {
        return Err(format!(
            "the models need {} for weights, {} for workspace and {} of KV cache for one request \
             of the longest context each; device.memory_limit is {}: {} short ({} of the device \
             are held by other processes and the driver). Raise it, lower limits.context in a \
             manifest, or serve fewer models",
            mib(ledger.weights),
            mib(ledger.workspace),
            mib(guaranteed_bytes),
            mib(ledger.limit),
            mib(guaranteed_bytes - left),
            mib(ledger.others)
        ));
    }
    if kvs.is_empty() {
        return Ok(Pages { page_bytes, count: 0, scratch });
    }
    let wanted = asked.unwrap_or(KV_BYTES_DEFAULT).clamp(guaranteed_bytes, left);
    let count = ((wanted - scratch_bytes) / page_bytes as u64).max(guaranteed);
    Ok(Pages { page_bytes, count: u32::try_from(count).unwrap_or(u32::MAX), scratch })
}

/// The lane's configuration for the scheduler; `cost` is what warm-up measured.
pub fn lane_config(
    (outline, capacity): &(Outline, Capacity),
    wish: &Wish,
    page_bytes: usize,
    cost: (Micros, Micros),
) -> LaneConfig {
    let kind = match outline.kv {
        Some(kv) => LaneKind::Generate {
            context: capacity.context as u32,
            layers: kv.layers as u32,
            blocks_per_page: (page_bytes / kv.block_bytes()) as u32,
            guaranteed_groups: groups_for(capacity.context, &kv, page_bytes),
            seats: capacity.yields as u32,
        },
        None => LaneKind::Encode,
    };
    LaneConfig { weight: wish.weight, kind, rows_max: capacity.rows as u32, cost }
}

/// Groups that hold one sequence of `context` tokens.
fn groups_for(context: usize, kv: &KvShape, page_bytes: usize) -> u32 {
    let blocks = context.div_ceil(BLOCK_TOKENS);
    let blocks_per_group = (page_bytes / kv.block_bytes()).max(1);
    blocks.div_ceil(blocks_per_group) as u32
}

/// Bytes as MiB, for people.
pub fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelTask;

    const SMOLLM2: KvShape = KvShape { layers: 30, heads: 3, head_dim: 64 };

    fn lane(kv: Option<KvShape>, context: usize) -> (Outline, Capacity) {
        let task = if kv.is_some() { ModelTask::Generate } else { ModelTask::Embed };
        let outline = Outline { task, context, kv, output_width: 1 };
        (outline, Capacity { rows: 512, yields: 64, context })
    }

    #[test]
    fn a_group_of_a_small_model_stays_small() {
        assert_eq!(SMOLLM2.block_bytes(), 24 << 10);
        assert_eq!(page_bytes(&[SMOLLM2]), 128 << 10);
        let large = KvShape { layers: 32, heads: 8, head_dim: 128 };
        assert!(page_bytes(&[large]) >= large.block_bytes());
    }

    #[test]
    fn the_guarantee_is_one_request_of_the_longest_context() {
        let lane = lane(Some(SMOLLM2), 8192);
        let wish = Wish { weight: 1.0, context: None, seats: None, weight_bytes: 0 };
        let config = lane_config(&lane, &wish, 128 << 10, (Micros(1), Micros(1)));
        let LaneKind::Generate { blocks_per_page, guaranteed_groups, .. } = config.kind else {
            panic!("a generator");
        };
        assert_eq!(blocks_per_page, 5);
        assert_eq!(guaranteed_groups, 52, "256 blocks in groups of 5");
    }

    #[test]
    fn a_limit_that_is_too_small_says_what_is_short() {
        let (weights, workspace, limit) = (100 << 20, 50 << 20, 200 << 20);
        let ledger = Ledger { weights, workspace, limit, kv: 0, others: 3 << 30 };
        let error = pages(&[lane(Some(SMOLLM2), 8192)], None, ledger).unwrap_err();
        assert!(error.contains("short") && error.contains("device.memory_limit"), "{error}");
        assert!(error.contains("3072 MiB of the device are held"), "{error}");
        let roomy = Ledger { limit: 4 << 30, ..ledger };
        let cut = pages(&[lane(Some(SMOLLM2), 8192)], None, roomy).unwrap();
        let taken = |cut: Pages| u64::from(cut.count + cut.scratch) * cut.page_bytes as u64;
        assert_eq!(taken(cut), KV_BYTES_DEFAULT);
        assert_eq!(cut.scratch, 30, "a block in each layer, five fit in a page");
        let all = pages(&[lane(Some(SMOLLM2), 8192)], Some(kv_of_a_gpu(roomy)), roomy).unwrap();
        let kv = taken(all);
        assert!((3 << 30..roomy.limit - roomy.weights - roomy.workspace).contains(&kv), "{kv}");
        let encoders = pages(&[lane(None, 256)], None, roomy).unwrap();
        assert_eq!(encoders.count, 0);
    }

    #[test]
    fn pods_on_one_device_keep_to_their_parts() {
        // The second of two pods with half a GPU each: the first has taken its half.
        let device = |free| Device { total: 80 << 30, free, strict: true };
        let (half, bytes) = (MemoryLimit::Part(0.45), MemoryLimit::Bytes(36 << 30));
        for asked in [half, bytes] {
            assert_eq!(device(43 << 30).limit(Some(asked)), Ok(36 << 30));
            let error = device(20 << 30).limit(Some(asked)).unwrap_err();
            assert!(error.contains("is 36864 MiB, and 20480 MiB"), "{error}");
            assert!(error.contains("hold 61440 MiB"), "{error}");
        }
        assert_eq!(device(43 << 30).limit(None), Ok((43 << 30) - (512 << 20)));
        assert_eq!(device(80 << 30).limit(None), Ok(72 << 30));
        // A machine gives back what it cached, so what is free there is no limit.
        let machine = Device { strict: false, ..device(20 << 30) };
        assert_eq!(machine.limit(Some(half)), Ok(36 << 30));
    }
}
