//! Device memory that all lanes share.

use super::details::SCORE_BYTES;
use super::executor::Options;
use super::launches::parts_bytes;
use crate::device::cuda::fault::GpuError;
use crate::device::cuda::{Address, Gpu, GpuInfo};
use crate::scheduler::step::MAX_SEATS;

/// Bytes of a step's tables: rows take some 40 bytes each, KV blocks 8, so this is room for half
/// a million blocks.
pub(super) const TABLE_BYTES: usize = 4 << 20;

/// Where it is, and how lanes compute.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared {
    /// The step's tables.
    pub(super) step: Address,
    /// The KV region.
    pub(super) kv: Address,
    /// Tokens by seat.
    pub(super) seats: Address,
    /// Chosen tokens.
    pub(super) tokens: Address,
    /// Log-probabilities.
    pub(super) scores: Address,
    /// Sums of product blocks that share a tile.
    pub(super) parts: Address,
    /// How many of these are done, by tile.
    pub(super) arrived: Address,
    /// Products of many rows by the same kernels as of few: slower, and a row's bits do not depend
    /// on its company.
    pub(super) deterministic: bool,
}

impl Shared {
    /// Reserves it.
    ///
    /// # Errors
    /// There is too little memory, or the device failed.
    pub(super) fn reserve(gpu: &mut dyn Gpu, options: Options) -> Result<Self, GpuError> {
        let processors = gpu.info().processors;
        Ok(Self {
            step: gpu.reserve(TABLE_BYTES)?,
            kv: gpu.reserve((options.pages as usize * options.page_bytes).max(256))?,
            seats: gpu.reserve(MAX_SEATS * 4)?,
            tokens: gpu.reserve(MAX_SEATS * 4)?,
            scores: gpu.reserve(MAX_SEATS * SCORE_BYTES)?,
            parts: gpu.reserve(parts_bytes(processors))?,
            arrived: gpu.reserve(processors as usize * 4)?,
            deterministic: options.deterministic,
        })
    }

    /// Bytes of it, the KV region apart.
    pub(super) fn bytes(info: &GpuInfo) -> usize {
        let processors = info.processors;
        TABLE_BYTES
            + MAX_SEATS * (8 + SCORE_BYTES)
            + parts_bytes(processors)
            + processors as usize * 4
    }
}
