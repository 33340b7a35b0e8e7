//! The structs that kernels take, field by field as the `.cu` files have them.

use bytemuck::{Pod, Zeroable};

use crate::device::cuda::Address;

/// Rows of f32 or bf16 values in device memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct View {
    /// Null: there is no such buffer.
    pub(super) data: u64,
    /// Values from row to row.
    pub(super) stride: u32,
    /// 1 for bf16.
    pub(super) half: u32,
}

/// A weight matrix; `matrices.rs` says how formats look.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Matrix {
    pub(super) values: u64,
    pub(super) scales: u64,
    pub(super) format: u32,
    pub(super) outputs: u32,
    pub(super) inputs: u32,
    /// Inputs / 128, rounded up.
    pub(super) supers: u32,
}

/// KV blocks of a lane in one layer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct Cache {
    pub(super) region: u64,
    pub(super) pages: u64,
    pub(super) layers: u32,
    pub(super) layer: u32,
    pub(super) heads: u32,
    pub(super) head_dim: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Embed {
    pub(super) step: u64,
    pub(super) table: Matrix,
    pub(super) positions: u64,
    pub(super) types: u64,
    pub(super) seats: u64,
    pub(super) output: View,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Norm {
    pub(super) step: u64,
    pub(super) input: View,
    pub(super) weight: u64,
    pub(super) bias: u64,
    pub(super) output: View,
    pub(super) copy: View,
    pub(super) width: u32,
    pub(super) gathered: u32,
    pub(super) eps: f32,
    pub(super) unused: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct GatedSilu {
    pub(super) step: u64,
    pub(super) input: View,
    pub(super) output: View,
    pub(super) width: u32,
    pub(super) unused: u32,
}

/// Which rows a copy takes: all, those of the gather list, or as many as were gathered.
pub(super) const COPY_ALL: u32 = 0;
pub(super) const COPY_GATHER: u32 = 1;
pub(super) const COPY_GATHERED: u32 = 2;

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct CopyRows {
    pub(super) step: u64,
    pub(super) input: View,
    pub(super) output: View,
    pub(super) width: u32,
    pub(super) rows: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Pool {
    pub(super) step: u64,
    pub(super) input: View,
    pub(super) output: View,
    pub(super) width: u32,
    pub(super) kind: u32,
    pub(super) normalize: u32,
    pub(super) unused: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct TakeIn {
    pub(super) step: u64,
    pub(super) pages: u64,
    pub(super) page_bytes: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct CopyBlocks {
    pub(super) step: u64,
    pub(super) region: u64,
    pub(super) pages: u64,
    pub(super) layers: u32,
    pub(super) block_bytes: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Linear {
    pub(super) step: u64,
    pub(super) input: u64,
    pub(super) bias: u64,
    pub(super) weight: Matrix,
    pub(super) output: View,
    pub(super) stride: u32,
    pub(super) gathered: u32,
    pub(super) epilogue: u32,
    /// 0, or how many outputs there are of `silu(gate) × up`.
    pub(super) gated: u32,
    /// What the input is the norm of, for kernels that normalise.
    pub(super) full: u64,
    pub(super) scales: u64,
    pub(super) full_stride: u32,
    pub(super) eps: f32,
    /// Sums of blocks that share a tile, and how many of them are done.
    pub(super) parts: u64,
    pub(super) arrived: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Rope {
    pub(super) step: u64,
    pub(super) qkv: View,
    pub(super) cache: Cache,
    pub(super) table: u64,
    pub(super) query_norm: u64,
    pub(super) key_norm: u64,
    pub(super) heads: u32,
    pub(super) positions: u32,
    pub(super) eps: f32,
    pub(super) unused: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Attention {
    pub(super) step: u64,
    pub(super) qkv: View,
    pub(super) output: View,
    pub(super) cache: Cache,
    pub(super) parts: u64,
    pub(super) limits: u64,
    pub(super) heads: u32,
    pub(super) scale: f32,
    pub(super) causal: u32,
    pub(super) unused: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Sample {
    pub(super) step: u64,
    pub(super) logits: View,
    pub(super) weights: u64,
    pub(super) seats: u64,
    pub(super) tokens: u64,
    pub(super) vocabulary: u32,
    pub(super) unused: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Refine {
    pub(super) step: u64,
    pub(super) details: u64,
    pub(super) logits: View,
    pub(super) weights: u64,
    pub(super) seats: u64,
    pub(super) tokens: u64,
    pub(super) scores: u64,
    pub(super) vocabulary: u32,
    pub(super) unused: u32,
}

impl View {
    /// No buffer.
    pub(super) const NONE: Self = Self { data: 0, stride: 0, half: 0 };

    /// A buffer of f32 rows.
    pub(super) fn full(data: Address, stride: usize) -> Self {
        Self { data: data.0, stride: stride as u32, half: 0 }
    }
}
