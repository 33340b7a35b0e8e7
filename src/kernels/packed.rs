//! Weight matrices in panel form: made once at load, shared by every row count. Knows where rows
//! come from only as bytes, and nothing of what they are multiplied with.
//!
//! A panel holds 16 outputs side by side, so that one vector register has one value of each, and
//! is a whole number of cache lines:
//! - f32: `[k][16]` values.
//! - 4-bit: for each group of 32 inputs 16 f16 scales, 16 f16 minimums and four vectors of 64
//!   bytes. Byte `4 × output + i` of vector `j` holds input `8j + i` in its low half and
//!   `8j + 4 + i` in its high half.
//! - 8-bit: for each two groups a cache line with 16 f16 scales of each, and for each of the two
//!   eight vectors of 64 bytes. Byte `4 × output + i` of vector `j` is input `4j + i`, plus 128.
//! - 8-bit, low: the same, plus 90.
//! - 8-bit with minimums: for each group 16 f16 scales, 16 f16 minimums, and values as above.
//! - 4-bit and 8-bit in large blocks: see `large.rs`.
//! - bf16: `[k / 2][16][2]` values.
//!
//! So a matrix is one stream of memory, which the processor reads ahead.

mod blocks;
mod float;
pub(super) mod large;
mod mixed;
pub(super) mod quants;

use half::{bf16, f16};

use crate::device::arena::Region;

use self::blocks::{LARGE, Large, Small};
use self::large::LargeLayout;
use super::ops::QuantBuf;

/// bf16 values smaller than this in size are zero: [`HalfBuf`](super::ops::HalfBuf) says why.
pub(super) const HALF_LEAST: f32 = 1.0 / (1u64 << 50) as f32;

/// Outputs in a panel.
pub const PANEL: usize = 16;

/// Inputs that share a scale.
pub const GROUP: usize = 32;

/// Bytes of a 4-bit group in a panel: scales, minimums, values.
pub(super) const Q4_GROUP_BYTES: usize = 64 + 256;

/// Bytes of two 8-bit groups in a panel: scales, values. An odd last group is
/// [`Q8_LAST_BYTES`] long.
const Q8_PAIR_BYTES: usize = 64 + 2 * 512;

/// Bytes of an 8-bit group that has no second one.
const Q8_LAST_BYTES: usize = 64 + 512;

/// Bytes of an 8-bit group with minimums in a panel: scales, minimums, values.
pub(super) const Q8_MINIMUM_GROUP_BYTES: usize = 64 + 512;

/// How a packed matrix stores its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PackedFormat {
    /// f32.
    F32,
    /// 4-bit values with an f16 scale and an f16 minimum for each group of 32 (GGUF Q4_1; Q4_0
    /// with minimum = -8 × scale).
    Q4,
    /// 8-bit values with an f16 scale for each group of 32 (GGUF Q8_0, Q5_0).
    Q8,
    /// 8-bit values of at most [`QuantBuf::LOW`](super::ops::QuantBuf::LOW) with an f16 scale for
    /// each group of 32 (floats, for processors that cut sums of byte products to 16 bits).
    Q8Low,
    /// 8-bit values with an f16 scale and an f16 minimum for each group of 32 (GGUF Q5_1, and
    /// mixtures of all formats with groups of 32).
    Q8Minimum,
    /// 4-bit values in large blocks, a factor and a shift for each group of 32 (GGUF Q4_K).
    K4,
    /// 4-bit values in large blocks, a factor and a shift for each 16 (GGUF Q2_K, Q3_K).
    K4Halves,
    /// 8-bit values in large blocks, a factor and a shift for each group of 32 (GGUF Q5_K).
    K8,
    /// 8-bit values in large blocks, a factor and a shift for each 16 (GGUF Q6_K, and mixtures of
    /// all formats with large blocks).
    K8Halves,
    /// bf16, rounded as [`round_half`] does.
    Bf16,
}

/// How the bytes of a row that is to be packed encode its values. Little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// 4 bytes a value.
    F32,
    /// 2 bytes a value, becomes f32.
    F16,
    /// 2 bytes a value, becomes f32.
    Bf16,
    /// GGUF blocks of 32: f16 scale, 16 bytes of halves; a value is `scale × (q - 8)`.
    Q4Zero,
    /// GGUF blocks of 32: f16 scale, f16 minimum, 16 bytes of halves; `scale × q + minimum`.
    Q4One,
    /// GGUF blocks of 32: f16 scale, 32 fifth bits, 16 bytes of halves; `scale × (q - 16)`.
    Q5Zero,
    /// GGUF blocks of 32: f16 scale, f16 minimum, 32 fifth bits, 16 bytes of halves;
    /// `scale × q + minimum`.
    Q5One,
    /// GGUF blocks of 32: f16 scale, 32 signed bytes; `scale × q`.
    Q8Zero,
    /// GGUF blocks of 256: 16 halves of scale and minimum, 2-bit values.
    Q2K,
    /// GGUF blocks of 256: 16 signed 6-bit scales, 3-bit values.
    Q3K,
    /// GGUF blocks of 256: 8 pairs of 6-bit scale and minimum, 4-bit values.
    Q4K,
    /// GGUF blocks of 256: 8 pairs of 6-bit scale and minimum, 5-bit values.
    Q5K,
    /// GGUF blocks of 256: 16 signed 8-bit scales, 6-bit values.
    Q6K,
}

/// A matrix that cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Quantised rows come in groups of 32 or blocks of 256, bf16 rows in pairs.
    #[error("a row of {k} values is not a multiple of {block}")]
    Group {
        /// Values in a row.
        k: usize,
        /// What they must be a multiple of.
        block: usize,
    },
    /// No format keeps rows of both encodings.
    #[error("rows as {0:?} and as {1:?} in one quantised matrix")]
    Mixture(Encoding, Encoding),
    /// Only floats are rounded on the way.
    #[error("{0:?} values are not packed as {1:?}")]
    Format(Encoding, PackedFormat),
    /// A row has another length than its encoding says.
    #[error("row {row} has {found} bytes, {expected} expected")]
    RowBytes {
        /// Which row.
        row: usize,
        /// Its bytes.
        found: usize,
        /// What `k` values take.
        expected: usize,
    },
    /// The system refuses the memory.
    #[error("no memory for a packed matrix: {0}")]
    Memory(#[from] std::io::Error),
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
    panels: Region,
}

impl Packed {
    /// Packs `n` rows of `k` values; `row(r)` gives the bytes of row `r` in `encoding`. Rows may
    /// come from several tensors (q, k and v in one matrix) and in any order (rope pairs).
    ///
    /// # Errors
    /// `k` does not suit the encoding, a row has the wrong length, or there is no memory.
    pub fn from_rows<'r>(
        n: usize,
        k: usize,
        encoding: Encoding,
        row: impl Fn(usize) -> &'r [u8],
    ) -> Result<Self, PackError> {
        Self::from_rows_as(n, k, (encoding, encoding.packed()), row)
    }

    /// As [`Packed::from_rows`], in a format of choice: floats can be rounded to bf16, or to 8
    /// bits in groups of 32 (`scale = max|x| / 127`, or `/ 90`, as f16).
    ///
    /// # Errors
    /// As [`Packed::from_rows`], and values that are quantised already.
    pub fn from_rows_as<'r>(
        n: usize,
        k: usize,
        (encoding, format): (Encoding, PackedFormat),
        row: impl Fn(usize) -> &'r [u8],
    ) -> Result<Self, PackError> {
        if format != encoding.packed() && encoding.packed() != PackedFormat::F32 {
            return Err(PackError::Format(encoding, format));
        }
        Self::pack(n, k, format, |r| (encoding, row(r)))
    }

    fn pack<'r>(
        n: usize,
        k: usize,
        format: PackedFormat,
        row: impl Fn(usize) -> (Encoding, &'r [u8]),
    ) -> Result<Self, PackError> {
        let block = format.block();
        if !k.is_multiple_of(block) {
            return Err(PackError::Group { k, block });
        }
        let bytes = panel_bytes(format, k);
        let mut panels = Region::new(format.bytes(n, k))?;
        for r in 0..n {
            let (encoding, source) = row(r);
            let expected = encoding.row_bytes(k);
            if source.len() != expected {
                return Err(PackError::RowBytes { row: r, found: source.len(), expected });
            }
            let start = r / PANEL * bytes;
            let panel = &mut panels.as_bytes_mut()[start..start + bytes];
            encoding.pack(format, source, panel, r % PANEL);
        }
        Ok(Self { n, k, format, panels })
    }

    /// Packs row-major f32 values, `n × k` of them.
    ///
    /// # Errors
    /// `values` is not `n × k` long, or there is no memory.
    pub fn from_f32(n: usize, k: usize, values: &[f32]) -> Result<Self, PackError> {
        let (found, expected) = (values.len() * 4, n * k * 4);
        if found != expected {
            return Err(PackError::RowBytes { row: 0, found, expected });
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::from_rows(n, k, Encoding::F32, |row| &bytes[row * k * 4..(row + 1) * k * 4])
    }

    /// Packs row-major bytes: all rows, one after the other, in `encoding`.
    ///
    /// # Errors
    /// As [`Packed::from_rows`].
    pub fn from_bytes(
        n: usize,
        k: usize,
        encoding: Encoding,
        bytes: &[u8],
    ) -> Result<Self, PackError> {
        let row_bytes = encoding.row_bytes(k);
        if bytes.len() != n * row_bytes {
            let (found, expected) = (bytes.len(), n * row_bytes);
            return Err(PackError::RowBytes { row: 0, found, expected });
        }
        Self::from_rows(n, k, encoding, |row| &bytes[row * row_bytes..(row + 1) * row_bytes])
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.panels.len()
    }

    /// Number of panels.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Panel `index`, cache-line aligned.
    pub(super) fn panel(&self, index: usize) -> &[u8] {
        let bytes = panel_bytes(self.format, self.k);
        &self.panels.as_bytes()[index * bytes..(index + 1) * bytes]
    }

    /// Writes row `n` as f32 values into `out` (`k` of them): for 4-bit values
    /// `fma(q, scale, minimum)`, for 8-bit ones `q × scale` or the same, and in large blocks
    /// `fma(scale × factor, q, minimum × shift)`.
    ///
    /// # Panics
    /// If there is no row `n`, or `out` is not `k` long.
    pub fn read_row(&self, n: usize, out: &mut [f32]) {
        assert!(n < self.n, "row {n} of a matrix of {} rows", self.n);
        assert_eq!(out.len(), self.k);
        let (panel, lane) = (self.panel(n / PANEL), n % PANEL);
        let half = |at: usize| f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
        match self.format {
            PackedFormat::F32 => {
                for (value, bytes) in out.iter_mut().zip(panel.chunks_exact(PANEL * 4)) {
                    *value = f32_at(bytes, lane);
                }
            }
            PackedFormat::Bf16 => float::read_bf16(panel, lane, out),
            PackedFormat::Q4 => {
                for (g, group) in out.chunks_exact_mut(GROUP).enumerate() {
                    let start = g * Q4_GROUP_BYTES;
                    let scale = half(start + lane * 2);
                    let minimum = half(start + 32 + lane * 2);
                    for (i, value) in group.iter_mut().enumerate() {
                        let byte = panel[start + 64 + i / 8 * 64 + lane * 4 + i % 4];
                        let q = if i % 8 < 4 { byte & 15 } else { byte >> 4 };
                        *value = f32::from(q).mul_add(scale, minimum);
                    }
                }
            }
            PackedFormat::Q8 | PackedFormat::Q8Low => {
                let offset = offset(self.format);
                for (g, group) in out.chunks_exact_mut(GROUP).enumerate() {
                    let (scales, start) = q8_places(g);
                    let scale = half(scales + lane * 2);
                    for (i, value) in group.iter_mut().enumerate() {
                        *value = blocks::signed_at(&panel[start..], offset, lane, i) * scale;
                    }
                }
            }
            PackedFormat::Q8Minimum => blocks::read_minimum(panel, lane, out),
            large => LargeLayout::of(large).expect("the only others").read(panel, lane, out),
        }
    }
}

impl PackedFormat {
    /// What `k` must be a multiple of.
    pub fn block(self) -> usize {
        match self {
            PackedFormat::F32 => 1,
            PackedFormat::Bf16 => 2,
            PackedFormat::Q4 | PackedFormat::Q8 | PackedFormat::Q8Low | PackedFormat::Q8Minimum => {
                GROUP
            }
            PackedFormat::K4
            | PackedFormat::K4Halves
            | PackedFormat::K8
            | PackedFormat::K8Halves => LARGE,
        }
    }

    /// Bytes of an `n × k` matrix in this form; `k` is a whole number of groups.
    pub fn bytes(self, n: usize, k: usize) -> usize {
        n.div_ceil(PANEL) * panel_bytes(self, k)
    }
}

impl Encoding {
    /// What it is packed as.
    pub fn packed(self) -> PackedFormat {
        match self {
            Encoding::F32 | Encoding::F16 | Encoding::Bf16 => PackedFormat::F32,
            Encoding::Q4Zero | Encoding::Q4One => PackedFormat::Q4,
            Encoding::Q8Zero | Encoding::Q5Zero => PackedFormat::Q8,
            Encoding::Q5One => PackedFormat::Q8Minimum,
            Encoding::Q4K => PackedFormat::K4,
            Encoding::Q2K | Encoding::Q3K => PackedFormat::K4Halves,
            Encoding::Q5K => PackedFormat::K8,
            Encoding::Q6K => PackedFormat::K8Halves,
        }
    }

    /// Bytes of a row of `k` values.
    pub fn row_bytes(self, k: usize) -> usize {
        let (block, bytes) = self.block();
        k / block * bytes
    }

    /// Values and bytes of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Encoding::F32 => (1, 4),
            Encoding::F16 | Encoding::Bf16 => (1, 2),
            Encoding::Q4Zero => (GROUP, 18),
            Encoding::Q4One => (GROUP, 20),
            Encoding::Q5Zero => (GROUP, 22),
            Encoding::Q5One => (GROUP, 24),
            Encoding::Q8Zero => (GROUP, 34),
            Encoding::Q2K => (LARGE, 84),
            Encoding::Q3K => (LARGE, 110),
            Encoding::Q4K => (LARGE, 144),
            Encoding::Q5K => (LARGE, 176),
            Encoding::Q6K => (LARGE, 210),
        }
    }

    /// Writes a row into its place in a panel.
    fn pack(self, format: PackedFormat, row: &[u8], panel: &mut [u8], lane: usize) {
        let blocks = row.chunks_exact(self.block().1);
        if let Some(layout) = LargeLayout::of(format) {
            let places = panel.chunks_exact_mut(layout.bytes());
            blocks.zip(places).for_each(|(b, to)| layout.pack(&Large::read(self, b), to, lane));
            return;
        }
        match (self, format) {
            (_, PackedFormat::Bf16) => float::pack_bf16(self, row, panel, lane),
            (
                Encoding::F32 | Encoding::F16 | Encoding::Bf16,
                PackedFormat::Q8 | PackedFormat::Q8Low,
            ) => {
                let low = format == PackedFormat::Q8Low;
                let largest = if low { QuantBuf::LOW } else { i8::MAX };
                let row = float::quantise_row(self, row, largest).into_iter();
                blocks::pack_bytes(row, format, panel, lane);
            }
            (Encoding::F32, _) => pack_f32(row.as_chunks().0, panel, lane, f32::from_le_bytes),
            (Encoding::F16, _) => {
                pack_f32(row.as_chunks().0, panel, lane, |b| f16::from_le_bytes(b).to_f32());
            }
            (Encoding::Bf16, _) => {
                pack_f32(row.as_chunks().0, panel, lane, |b| bf16::from_le_bytes(b).to_f32());
            }
            (_, PackedFormat::Q8Minimum) => {
                let places = panel.chunks_exact_mut(Q8_MINIMUM_GROUP_BYTES);
                blocks.zip(places).for_each(|(b, to)| Small::read(self, b).pack(to, lane));
            }
            (Encoding::Q4Zero, _) => {
                pack_q4(row.as_chunks::<18>().0, panel, lane, |block| {
                    // Exact: a smaller exponent than f16's largest, the same mantissa.
                    let scale = f16::from_le_bytes([block[0], block[1]]);
                    f16::from_f32(-8.0 * scale.to_f32()).to_le_bytes()
                });
            }
            (Encoding::Q4One, _) => {
                pack_q4(row.as_chunks::<20>().0, panel, lane, |block| [block[2], block[3]]);
            }
            _ => {
                let blocks = blocks.map(|block| Small::read(self, block));
                blocks::pack_bytes(blocks, format, panel, lane);
            }
        }
    }
}

/// By how much signed values are stored too large.
fn offset(format: PackedFormat) -> u8 {
    if format == PackedFormat::Q8Low { QuantBuf::LOW as u8 } else { 128 }
}

fn pack_f32<const B: usize>(
    row: &[[u8; B]],
    panel: &mut [u8],
    lane: usize,
    value: impl Fn([u8; B]) -> f32,
) {
    for (bytes, line) in row.iter().zip(panel.chunks_exact_mut(PANEL * 4)) {
        line[lane * 4..lane * 4 + 4].copy_from_slice(&value(*bytes).to_ne_bytes());
    }
}

fn pack_q4<const B: usize>(
    row: &[[u8; B]],
    panel: &mut [u8],
    lane: usize,
    minimum: impl Fn(&[u8; B]) -> [u8; 2],
) {
    for (block, group) in row.iter().zip(panel.chunks_exact_mut(Q4_GROUP_BYTES)) {
        let (header, values) = group.split_at_mut(64);
        header[lane * 2..lane * 2 + 2].copy_from_slice(&block[..2]);
        header[32 + lane * 2..34 + lane * 2].copy_from_slice(&minimum(block));
        // The block's own halves are inputs i and i + 16; ours are i and i + 4.
        let halves = &block[B - 16..];
        for j in 0..4 {
            let shift = j / 2 * 4;
            for i in 0..4 {
                let low = halves[j % 2 * 8 + i] >> shift & 15;
                let high = halves[j % 2 * 8 + 4 + i] >> shift & 15;
                values[j * 64 + lane * 4 + i] = low | high << 4;
            }
        }
    }
}

/// `x` to the nearest bf16, ties to even; what is smaller than 2^-50 becomes zero, a NaN the
/// quiet NaN.
pub fn round_half(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7FC0;
    }
    if x.abs() < HALF_LEAST {
        return 0;
    }
    bf16::from_f32(x).to_bits()
}

/// Where an 8-bit group's scales and values start.
pub(super) fn q8_places(group: usize) -> (usize, usize) {
    let pair = group / 2 * Q8_PAIR_BYTES;
    (pair + group % 2 * 32, pair + 64 + group % 2 * 512)
}

fn panel_bytes(format: PackedFormat, k: usize) -> usize {
    let groups = k / GROUP;
    match format {
        PackedFormat::F32 => k * PANEL * 4,
        PackedFormat::Bf16 => k * PANEL * 2,
        PackedFormat::Q4 => groups * Q4_GROUP_BYTES,
        PackedFormat::Q8 | PackedFormat::Q8Low => {
            groups / 2 * Q8_PAIR_BYTES + groups % 2 * Q8_LAST_BYTES
        }
        PackedFormat::Q8Minimum => groups * Q8_MINIMUM_GROUP_BYTES,
        large => k / LARGE * LargeLayout::of(large).map_or(0, LargeLayout::bytes),
    }
}

fn f32_at(bytes: &[u8], index: usize) -> f32 {
    let bytes = bytes[index * 4..index * 4 + 4].try_into().expect("four bytes");
    f32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests;
