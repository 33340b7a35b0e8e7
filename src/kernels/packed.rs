//! Weight matrices in panel form: made once at load, shared by every row count.

/// How a packed matrix stores its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PackedFormat {
    /// f32.
    F32,
    /// 4-bit values with an f16 scale and an f16 minimum for each group of 32 (GGUF Q4_1; Q4_0
    /// with minimum = -8 × scale).
    Q4,
    /// 8-bit values with an f16 scale for each group of 32 (GGUF Q8_0).
    Q8,
}

/// An `n × k` matrix (n outputs, k inputs) in panels of 16 outputs. The layout is private to
/// `kernels/`.
#[derive(Debug)]
pub struct Packed {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Storage.
    pub format: PackedFormat,
}
