//! Float rows into panels of fewer bits. Knows how panels lie, not who reads them.

use half::{bf16, f16};

use super::{Encoding, GROUP, PANEL, round_half};

/// Writes a row into its place in a bf16 panel.
pub(super) fn pack_bf16(encoding: Encoding, row: &[u8], panel: &mut [u8], lane: usize) {
    let lines = panel.chunks_exact_mut(PANEL * 4);
    for (pair, line) in values(encoding, row).collect::<Vec<_>>().chunks_exact(2).zip(lines) {
        for (i, value) in pair.iter().enumerate() {
            let at = lane * 4 + i * 2;
            line[at..at + 2].copy_from_slice(&round_half(*value).to_ne_bytes());
        }
    }
}

/// Reads a row of a bf16 panel back.
pub(super) fn read_bf16(panel: &[u8], lane: usize, out: &mut [f32]) {
    for (pair, line) in out.chunks_exact_mut(2).zip(panel.chunks_exact(PANEL * 4)) {
        for (i, value) in pair.iter_mut().enumerate() {
            let at = lane * 4 + i * 2;
            *value = bf16::from_ne_bytes([line[at], line[at + 1]]).to_f32();
        }
    }
}

/// A row as GGUF's 8-bit blocks: an f16 scale of the largest value by 127, then 32 signed bytes.
pub(super) fn quantise_row(encoding: Encoding, row: &[u8]) -> Vec<[u8; 34]> {
    let values: Vec<f32> = values(encoding, row).collect();
    let block = |group: &[f32]| {
        let peak = group.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
        let scale = f16::from_f32(peak / 127.0);
        let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        let mut bytes = [0; 34];
        bytes[..2].copy_from_slice(&scale.to_le_bytes());
        for (byte, x) in bytes[2..].iter_mut().zip(group) {
            // The rounded scale may be a little small: no value leaves the range for it.
            *byte = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
        }
        bytes
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
