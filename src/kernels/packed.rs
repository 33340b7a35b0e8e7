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
//!
//! So a matrix is one stream of memory, which the processor reads ahead.

use half::{bf16, f16};

use crate::device::arena::Region;

/// Outputs in a panel.
pub const PANEL: usize = 16;

/// Inputs that share a scale.
pub const GROUP: usize = 32;

/// Bytes of a 4-bit group in a panel: scales, minimums, values.
pub(super) const Q4_GROUP_BYTES: usize = 64 + 256;

/// Bytes of two 8-bit groups in a panel: scales, values. An odd last group is
/// [`Q8_LAST_BYTES`] long.
pub(super) const Q8_PAIR_BYTES: usize = 64 + 2 * 512;

/// Bytes of an 8-bit group that has no second one.
pub(super) const Q8_LAST_BYTES: usize = 64 + 512;

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
    /// GGUF blocks of 32: f16 scale, 32 signed bytes; `scale × q`.
    Q8Zero,
}

/// A matrix that cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Quantised rows come in groups of 32.
    #[error("a quantised row of {0} values is not a multiple of {GROUP}")]
    Group(usize),
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
        let format = encoding.packed();
        if format != PackedFormat::F32 && !k.is_multiple_of(GROUP) {
            return Err(PackError::Group(k));
        }
        let expected = encoding.row_bytes(k);
        let bytes = panel_bytes(format, k);
        let mut panels = Region::new(n.div_ceil(PANEL) * bytes)?;
        for r in 0..n {
            let source = row(r);
            if source.len() != expected {
                return Err(PackError::RowBytes { row: r, found: source.len(), expected });
            }
            let start = r / PANEL * bytes;
            let panel = &mut panels.as_bytes_mut()[start..start + bytes];
            encoding.pack(source, panel, r % PANEL);
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

    /// One group of a quantised row as it is stored: 4-bit values as they are, 8-bit ones 128 too
    /// large. Returns its scale and its minimum, f16, little-endian; 8-bit groups have none.
    ///
    /// # Panics
    /// If there is no such group, or the matrix is not quantised.
    pub(super) fn quants(&self, n: usize, group: usize, out: &mut [u8; GROUP]) -> [[u8; 2]; 2] {
        let (panel, lane) = (self.panel(n / PANEL), n % PANEL);
        let half = |at: usize| [panel[at + lane * 2], panel[at + lane * 2 + 1]];
        match self.format {
            PackedFormat::F32 => panic!("an f32 matrix has no groups"),
            PackedFormat::Q4 => {
                let start = group * Q4_GROUP_BYTES;
                for (i, value) in out.iter_mut().enumerate() {
                    let byte = panel[start + 64 + i / 8 * 64 + lane * 4 + i % 4];
                    *value = if i % 8 < 4 { byte & 15 } else { byte >> 4 };
                }
                [half(start), half(start + 32)]
            }
            PackedFormat::Q8 => {
                let (scales, start) = q8_places(group);
                for (i, value) in out.iter_mut().enumerate() {
                    *value = panel[start + i / 4 * 64 + lane * 4 + i % 4];
                }
                [half(scales), [0; 2]]
            }
        }
    }

    /// Writes row `n` as f32 values into `out` (`k` of them): for 4-bit values
    /// `fma(q, scale, minimum)`, for 8-bit ones `q × scale`.
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
            PackedFormat::Q8 => {
                for (g, group) in out.chunks_exact_mut(GROUP).enumerate() {
                    let (scales, start) = q8_places(g);
                    let scale = half(scales + lane * 2);
                    for (i, value) in group.iter_mut().enumerate() {
                        let byte = panel[start + i / 4 * 64 + lane * 4 + i % 4];
                        *value = f32::from((byte ^ 0x80) as i8) * scale;
                    }
                }
            }
        }
    }
}

impl Encoding {
    /// What it is packed as.
    pub fn packed(self) -> PackedFormat {
        match self {
            Encoding::F32 | Encoding::F16 | Encoding::Bf16 => PackedFormat::F32,
            Encoding::Q4Zero | Encoding::Q4One => PackedFormat::Q4,
            Encoding::Q8Zero => PackedFormat::Q8,
        }
    }

    /// Bytes of a row of `k` values.
    pub fn row_bytes(self, k: usize) -> usize {
        match self {
            Encoding::F32 => 4 * k,
            Encoding::F16 | Encoding::Bf16 => 2 * k,
            Encoding::Q4Zero => k / GROUP * 18,
            Encoding::Q4One => k / GROUP * 20,
            Encoding::Q8Zero => k / GROUP * 34,
        }
    }

    /// Writes a row into its place in a panel.
    fn pack(self, row: &[u8], panel: &mut [u8], lane: usize) {
        match self {
            Encoding::F32 => pack_f32(row.as_chunks().0, panel, lane, f32::from_le_bytes),
            Encoding::F16 => {
                pack_f32(row.as_chunks().0, panel, lane, |b| f16::from_le_bytes(b).to_f32());
            }
            Encoding::Bf16 => {
                pack_f32(row.as_chunks().0, panel, lane, |b| bf16::from_le_bytes(b).to_f32());
            }
            Encoding::Q4Zero => {
                pack_q4(row.as_chunks::<18>().0, panel, lane, |block| {
                    // Exact: a smaller exponent than f16's largest, the same mantissa.
                    let scale = f16::from_le_bytes([block[0], block[1]]);
                    f16::from_f32(-8.0 * scale.to_f32()).to_le_bytes()
                });
            }
            Encoding::Q4One => {
                pack_q4(row.as_chunks::<20>().0, panel, lane, |block| [block[2], block[3]]);
            }
            Encoding::Q8Zero => pack_q8(row.as_chunks::<34>().0, panel, lane),
        }
    }
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

fn pack_q8(row: &[[u8; 34]], panel: &mut [u8], lane: usize) {
    for (g, block) in row.iter().enumerate() {
        let (scales, start) = q8_places(g);
        panel[scales + lane * 2..scales + lane * 2 + 2].copy_from_slice(&block[..2]);
        let values = &mut panel[start..start + 512];
        for (j, quad) in block[2..].chunks_exact(4).enumerate() {
            for (i, byte) in quad.iter().enumerate() {
                values[j * 64 + lane * 4 + i] = byte ^ 0x80;
            }
        }
    }
}

/// Where an 8-bit group's scales and values start.
fn q8_places(group: usize) -> (usize, usize) {
    let pair = group / 2 * Q8_PAIR_BYTES;
    (pair + group % 2 * 32, pair + 64 + group % 2 * 512)
}

fn panel_bytes(format: PackedFormat, k: usize) -> usize {
    let groups = k / GROUP;
    match format {
        PackedFormat::F32 => k * PANEL * 4,
        PackedFormat::Q4 => groups * Q4_GROUP_BYTES,
        PackedFormat::Q8 => groups / 2 * Q8_PAIR_BYTES + groups % 2 * Q8_LAST_BYTES,
    }
}

fn f32_at(bytes: &[u8], index: usize) -> f32 {
    let bytes = bytes[index * 4..index * 4 + 4].try_into().expect("four bytes");
    f32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests;
