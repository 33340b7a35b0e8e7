//! Float rows into panels of fewer bits. Knows how panels lie, not who reads them.

use half::{bf16, f16};

use super::blocks::Small;
use super::{Encoding, GROUP, HALF_LEAST, PANEL, Packed, PackedFormat, round_half};

impl Packed {
    /// Writes row `n` of a bf16 matrix as little-endian bf16 into `out`, two bytes a value.
    ///
    /// # Panics
    /// If there is no such row, the matrix is not bf16, or `out` is too short.
    pub(in crate::kernels) fn read_halves(&self, n: usize, out: &mut [u8]) {
        assert!(n < self.n && self.format == PackedFormat::Bf16);
        let pairs = pairs(self.panel(n / PANEL), n % PANEL);
        for (to, pair) in out[..2 * self.k].as_chunks_mut().0.iter_mut().zip(pairs) {
            let [[a, b], [c, d]] = pair.map(u16::to_le_bytes);
            *to = [a, b, c, d];
        }
    }
}

/// [`round_half`] of a value that is bf16 already.
pub(super) fn keep_half(bits: u16) -> u16 {
    let least = const { (HALF_LEAST.to_bits() >> 16) as u16 };
    match bits & 0x7FFF {
        0x7F81.. => 0x7FC0,
        size if size < least => 0,
        _ => bits,
    }
}

/// Writes a row into its place in a bf16 panel.
pub(super) fn pack_bf16(encoding: Encoding, row: &[u8], panel: &mut [u8], lane: usize) {
    if encoding == Encoding::Bf16 {
        let halves = |&[a, b, c, d]: &[u8; 4]| [[a, b], [c, d]].map(u16::from_le_bytes);
        let pairs = row.as_chunks().0.iter().map(halves);
        put_pairs(pairs.map(|pair| pair.map(keep_half)), panel, lane);
    } else {
        let values: Vec<f32> = values(encoding, row).collect();
        put_pairs(values.as_chunks().0.iter().map(|pair| pair.map(round_half)), panel, lane);
    }
}

fn put_pairs(pairs: impl Iterator<Item = [u16; 2]>, panel: &mut [u8], lane: usize) {
    for (pair, line) in pairs.zip(panel.chunks_exact_mut(PANEL * 4)) {
        let [[a, b], [c, d]] = pair.map(u16::to_ne_bytes);
        line[lane * 4..lane * 4 + 4].copy_from_slice(&[a, b, c, d]);
    }
}

/// The values of a row of a bf16 panel.
fn pairs(panel: &[u8], lane: usize) -> impl Iterator<Item = [u16; 2]> {
    panel.chunks_exact(PANEL * 4).map(move |line| {
        let at = lane * 4;
        [[line[at], line[at + 1]], [line[at + 2], line[at + 3]]].map(u16::from_ne_bytes)
    })
}

/// Reads a row of a bf16 panel back.
pub(super) fn read_bf16(panel: &[u8], lane: usize, out: &mut [f32]) {
    for (to, pair) in out.as_chunks_mut().0.iter_mut().zip(pairs(panel, lane)) {
        *to = pair.map(|bits| bf16::from_bits(bits).to_f32());
    }
}

/// A row in groups of 32 signed values, the largest of each `largest`, with an f16 scale.
pub(super) fn quantise_row(encoding: Encoding, row: &[u8], largest: i8) -> Vec<Small> {
    let largest = f32::from(largest);
    let values: Vec<f32> = values(encoding, row).collect();
    let block = |group: &[f32]| {
        let peak = group.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
        let scale = f16::from_f32(peak / largest);
        let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        // The rounded scale may be a little small: no value leaves the range for it.
        let value = |x: f32| (x * inverse).round_ties_even().clamp(-largest, largest) as i8;
        let values = std::array::from_fn(|i| value(group[i]));
        Small { scale: scale.to_le_bytes(), minimum: [0; 2], values }
    };
    values.chunks_exact(GROUP).map(block).collect()
}

/// The values of a row of floats.
fn values(encoding: Encoding, row: &[u8]) -> impl Iterator<Item = f32> {
    let width = if encoding == Encoding::F32 { 4 } else { 2 };
    row.chunks_exact(width).map(move |bytes| match encoding {
        Encoding::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        Encoding::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        _ => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    })
}
