//! Lowers attention and what comes before it: norms of heads, rotary positions, KV blocks.

use super::{LowerError, Lowering, unsupported};
use crate::kernels::cuda::arguments as args;
use crate::kernels::cuda::launches::Grid;
use crate::kernels::cuda::places::Places;
use crate::kernels::cuda::tables::Tiling;
use crate::kernels::ops::{
    Buf, HeadNorm, KvShape, Op, PackedAttention, PagedAttention, Program, Rope, RopeStore, Vector,
};

const ROPE_THREADS: u32 = 128;
/// A sum for each warp.
const ROPE_SHARED: u32 = 16;
const SPLITS_MAX: usize = 16;

impl Lowering<'_> {
    fn cache(&self, kv: KvShape, layer: usize) -> args::Cache {
        args::Cache {
            region: self.shared.kv.0,
            pages: self.own.pages.0,
            layers: kv.layers as u32,
            layer: layer as u32,
            heads: kv.heads as u32,
            head_dim: kv.head_dim as u32,
        }
    }

    /// Done by the rotation of the same heads, which comes next.
    pub(super) fn head_norm(&mut self, op: &HeadNorm) -> Result<(), LowerError> {
        match self.head_norm.replace(op.clone()) {
            None => Ok(()),
            Some(_) => Err(unsupported("it normalises heads twice")),
        }
    }

    pub(super) fn rope_store(&mut self, op: &RopeStore) -> Result<(), LowerError> {
        let cache = self.cache(op.kv, op.layer);
        self.turn(&op.qkv, op.heads, cache, &op.table)
    }

    pub(super) fn rope(&mut self, op: &Rope) -> Result<(), LowerError> {
        let kv = KvShape { layers: 1, heads: op.kv_heads, head_dim: op.head_dim };
        let cache = args::Cache { region: 0, pages: 0, ..self.cache(kv, 0) };
        self.turn(&op.qkv, op.heads, cache, &op.table)
    }

    fn turn(
        &mut self,
        qkv: &Buf,
        heads: usize,
        cache: args::Cache,
        table: &Vector,
    ) -> Result<(), LowerError> {
        head_size(cache.head_dim as usize)?;
        let norm = self.head_norm.take();
        if norm.as_ref().is_some_and(|norm| norm.qkv != *qkv) {
            return Err(unsupported("it normalises other heads than it turns"));
        }
        let [query_norm, key_norm] = match &norm {
            Some(HeadNorm { weights: [query, key], .. }) => {
                [self.optional(Some(query))?, self.optional(Some(key))?]
            }
            None => [0; 2],
        };
        let arguments = args::Rope {
            step: self.shared.step.0,
            qkv: self.places.of(qkv).view,
            cache,
            table: self.uploads.vector(self.gpu, table)?.0,
            query_norm,
            key_norm,
            heads: heads as u32,
            positions: (table.len() / cache.head_dim as usize) as u32,
            eps: norm.map_or(0.0, |norm| norm.eps),
            unused: 0,
        };
        self.fresh.remove(&qkv.offset);
        let heads = heads as u32 + 2 * cache.heads;
        self.push(("rope", ROPE_THREADS, ROPE_SHARED), Grid::Heads { heads }, &arguments)
    }

    pub(super) fn paged(&mut self, op: &PagedAttention) -> Result<(), LowerError> {
        let size = head_size(op.kv.head_dim)?;
        let group = op.heads / op.kv.heads;
        // Split sums differ in their last bits from whole ones.
        let small_max = match self.shared.deterministic {
            true => 0,
            false => small_tiles(self.program, group),
        };
        self.tile(Tiling { group, paged: true, small_max })?;
        let (parts, limits) = match self.splits {
            Some(splits) => splits,
            None => {
                let [parts, limits] = split_bytes(small_max, op);
                let parts = self.uploads.reserve(self.gpu, parts)?;
                let limits = self.uploads.reserve(self.gpu, limits)?;
                *self.splits.insert((parts, limits))
            }
        };
        let arguments = args::Attention {
            step: self.shared.step.0,
            qkv: self.places.of(&op.qkv).view,
            output: self.places.of_activation(&op.output).view,
            cache: self.cache(op.kv, op.layer),
            parts: parts.0,
            limits: limits.0,
            heads: op.heads as u32,
            scale: op.scale,
            causal: 0,
            unused: 0,
        };
        self.fresh.remove(&Places::name(&op.output));
        let heads = op.kv.heads as u32;
        if small_max > 0 {
            self.push(size.small(), Grid::Small { heads }, &arguments)?;
            self.push(("attend_merge", 128, 0), Grid::Merge { heads }, &arguments)?;
        }
        self.push(size.large(), Grid::Large { heads }, &arguments)
    }

    pub(super) fn packed(&mut self, op: &PackedAttention) -> Result<(), LowerError> {
        let size = head_size(op.head_dim)?;
        let qkv = self.places.of(&op.qkv).view;
        if qkv.half == 0 {
            return Err(unsupported("attention over rows that something is added to"));
        }
        self.tile(Tiling { group: op.heads / op.kv_heads, paged: false, small_max: 0 })?;
        let kv = KvShape { layers: 1, heads: op.kv_heads, head_dim: op.head_dim };
        let arguments = args::Attention {
            step: self.shared.step.0,
            qkv,
            output: self.places.of_activation(&op.output).view,
            cache: args::Cache { region: 0, pages: 0, ..self.cache(kv, 0) },
            parts: 0,
            limits: 0,
            heads: op.heads as u32,
            scale: op.scale,
            causal: u32::from(op.causal),
            unused: 0,
        };
        self.fresh.remove(&Places::name(&op.output));
        self.push(size.packed(), Grid::Large { heads: op.kv_heads as u32 }, &arguments)
    }

    /// All attention of a program reads the same tiles.
    fn tile(&mut self, tiling: Tiling) -> Result<(), LowerError> {
        match self.tiling.replace(tiling) {
            Some(other) if other != tiling => {
                Err(unsupported("layers differ in how heads share keys"))
            }
            _ => Ok(()),
        }
    }
}

/// Tiles of the single rows that a step can have.
fn small_tiles(program: &Program, group: usize) -> usize {
    program.gathered_max * group.div_ceil(16)
}

/// Scratch of split attention: sums, and their limits.
fn split_bytes(small_tiles: usize, op: &PagedAttention) -> [usize; 2] {
    let group = op.heads / op.kv.heads;
    let cells = small_tiles * op.kv.heads * SPLITS_MAX * group.min(16);
    [cells * op.kv.head_dim * 4, cells * 2 * 4]
}

/// Bytes that a program's split attention takes.
pub(super) fn scratch_bytes(program: &Program) -> usize {
    let first = program.ops.iter().find_map(|op| match op {
        Op::PagedAttention(op) => Some(op),
        _ => None,
    });
    first.map_or(0, |op| {
        let tiles = small_tiles(program, op.heads / op.kv.heads);
        split_bytes(tiles, op).iter().sum()
    })
}

/// Attention kernels for heads of up to so many values.
#[derive(Debug, Clone, Copy)]
enum HeadSize {
    To32,
    To64,
    To128,
    To256,
}

fn head_size(head_dim: usize) -> Result<HeadSize, LowerError> {
    match head_dim {
        _ if !head_dim.is_multiple_of(16) => {}
        1..=32 => return Ok(HeadSize::To32),
        33..=64 => return Ok(HeadSize::To64),
        65..=128 => return Ok(HeadSize::To128),
        129..=256 => return Ok(HeadSize::To256),
        _ => {}
    }
    Err(unsupported(format!("head size {head_dim} is not a multiple of 16 up to 256")))
}

impl HeadSize {
    /// Name, threads and bytes of shared memory: a tile of keys and values for each warp.
    fn small(self) -> (&'static str, u32, u32) {
        match self {
            HeadSize::To32 => ("attend_small_32", 128, 4 * 32 * 128),
            HeadSize::To64 => ("attend_small_64", 128, 4 * 64 * 128),
            HeadSize::To128 => ("attend_small_128", 128, 4 * 128 * 128),
            HeadSize::To256 => ("attend_small_256", 64, 2 * 256 * 128),
        }
    }

    /// Two tiles of keys and values.
    fn large(self) -> (&'static str, u32, u32) {
        match self {
            HeadSize::To32 => ("attend_large_32", 128, 2 * 32 * 128),
            HeadSize::To64 => ("attend_large_64", 128, 2 * 64 * 128),
            HeadSize::To128 => ("attend_large_128", 128, 2 * 128 * 128),
            HeadSize::To256 => ("attend_large_256", 128, 2 * 256 * 128),
        }
    }

    fn packed(self) -> (&'static str, u32, u32) {
        match self {
            HeadSize::To32 => ("attend_packed_32", 128, 2 * 32 * 128),
            HeadSize::To64 => ("attend_packed_64", 128, 2 * 64 * 128),
            HeadSize::To128 => ("attend_packed_128", 128, 2 * 128 * 128),
            HeadSize::To256 => ("attend_packed_256", 128, 2 * 256 * 128),
        }
    }
}
