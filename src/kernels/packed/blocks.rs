//! GGUF's quantised blocks taken apart, and put into their place in a panel. Blocks of 32 values
//! have a scale and perhaps a minimum; blocks of 256 have one of each for all, and small integers
//! that multiply them for each 16 or 32 values. Knows no file and no arithmetic on panels.

use half::f16;

use super::{Encoding, GROUP, PackedFormat, Q8_MINIMUM_GROUP_BYTES, offset, q8_places};

/// Values in a large block.
pub(super) const LARGE: usize = 256;

/// A block of 32: a value is `scale × q + minimum`.
pub(super) struct Small {
    /// f16.
    pub(super) scale: [u8; 2],
    /// f16.
    pub(super) minimum: [u8; 2],
    pub(super) values: [i8; GROUP],
}

/// A block of 256: a value of sixteenth `h` is `(scale × factors[h]) × q + minimum × shifts[h]`.
pub(super) struct Large {
    pub(super) scale: f32,
    pub(super) minimum: f32,
    pub(super) factors: [i8; 16],
    pub(super) shifts: [i8; 16],
    pub(super) values: [u8; LARGE],
}

impl Small {
    /// # Panics
    /// If `block` is not one of this encoding.
    pub(super) fn read(encoding: Encoding, block: &[u8]) -> Self {
        let pair = |at: usize| [block[at], block[at + 1]];
        // Low halves are values 0..16, high halves 16..32; fifth bits stand in a word before.
        let halves = |at: usize, fifth: Option<usize>, offset: i8| {
            let bits = fifth.map_or(0, |at| {
                u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"))
            });
            std::array::from_fn(|i| {
                let half = block[at + i % 16] >> (i / 16 * 4) & 15;
                (half | ((bits >> i & 1) as u8 * 16)) as i8 - offset
            })
        };
        let (minimum, values) = match encoding {
            Encoding::Q4Zero => ([0; 2], halves(2, None, 8)),
            Encoding::Q4One => (pair(2), halves(4, None, 0)),
            Encoding::Q5Zero => ([0; 2], halves(6, Some(2), 16)),
            Encoding::Q5One => (pair(2), halves(8, Some(4), 0)),
            Encoding::Q8Zero => ([0; 2], std::array::from_fn(|i| block[2 + i] as i8)),
            other => unreachable!("{other:?} has no blocks of 32"),
        };
        Self { scale: pair(0), minimum, values }
    }

    /// Writes the block into its group of a panel of 8-bit values with minimums.
    pub(super) fn pack(&self, to: &mut [u8], lane: usize) {
        to[lane * 2..lane * 2 + 2].copy_from_slice(&self.scale);
        to[32 + lane * 2..34 + lane * 2].copy_from_slice(&self.minimum);
        put_signed(&self.values, 128, &mut to[64..], lane);
    }
}

/// Row `lane` of a panel of 8-bit values with minimums: `fma(q, scale, minimum)`.
pub(super) fn read_minimum(panel: &[u8], lane: usize, out: &mut [f32]) {
    let groups = panel.chunks_exact(Q8_MINIMUM_GROUP_BYTES);
    for (from, group) in groups.zip(out.chunks_exact_mut(GROUP)) {
        let [scale, minimum] = [0, 32].map(|at| half_at(from, at + lane * 2));
        for (i, value) in group.iter_mut().enumerate() {
            *value = signed_at(&from[64..], 128, lane, i).mul_add(scale, minimum);
        }
    }
}

/// Writes a row of 8-bit values into its place in a panel.
pub(super) fn pack_bytes(
    row: impl Iterator<Item = Small>,
    format: PackedFormat,
    panel: &mut [u8],
    lane: usize,
) {
    for (g, Small { scale, values, .. }) in row.enumerate() {
        let (scales, start) = q8_places(g);
        panel[scales + lane * 2..scales + lane * 2 + 2].copy_from_slice(&scale);
        put_signed(&values, offset(format), &mut panel[start..start + 512], lane);
    }
}

/// Writes a group of signed values, `offset` larger each.
fn put_signed(values: &[i8; GROUP], offset: u8, to: &mut [u8], lane: usize) {
    for (i, value) in values.iter().enumerate() {
        to[i / 4 * 64 + lane * 4 + i % 4] = offset.wrapping_add_signed(*value);
    }
}

/// Value `i` of a group of signed values.
pub(super) fn signed_at(group: &[u8], offset: u8, lane: usize, i: usize) -> f32 {
    f32::from(group[i / 4 * 64 + lane * 4 + i % 4].wrapping_sub(offset) as i8)
}

impl Large {
    /// # Panics
    /// If `block` is not one of this encoding.
    pub(super) fn read(encoding: Encoding, block: &[u8]) -> Self {
        match encoding {
            Encoding::Q2K => q2(block),
            Encoding::Q3K => q3(block),
            Encoding::Q4K => q45(block, &block[16..], None),
            Encoding::Q5K => q45(block, &block[48..], Some(&block[16..48])),
            Encoding::Q6K => q6(block),
            other => unreachable!("{other:?} has no blocks of 256"),
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Two bits of value `i`: four values a byte, 32 apart.
fn two_bits(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

fn q2(block: &[u8]) -> Large {
    let (scales, values) = (&block[..16], &block[16..80]);
    Large {
        scale: half_at(block, 80),
        minimum: -half_at(block, 82),
        factors: std::array::from_fn(|h| (scales[h] & 15) as i8),
        shifts: std::array::from_fn(|h| (scales[h] >> 4) as i8),
        values: std::array::from_fn(|i| two_bits(values, i)),
    }
}

fn q3(block: &[u8]) -> Large {
    let (high, low, scales) = (&block[..32], &block[32..96], &block[96..108]);
    // Four bits of a factor, then two more bits from the last four bytes; less 32.
    let factors = std::array::from_fn(|h| {
        let four = scales[h % 8] >> (h / 8 * 4) & 15;
        let two = scales[8 + h % 4] >> (h / 4 * 2) & 3;
        (four | two << 4) as i8 - 32
    });
    let scale = half_at(block, 108);
    let values = std::array::from_fn(|i| two_bits(low, i) | (high[i % 32] >> (i / 32) & 1) << 2);
    // Values are by 4 too large.
    Large { scale, minimum: -4.0 * scale, factors, shifts: factors, values }
}

/// Q4_K, and Q5_K with its fifth bits.
fn q45(block: &[u8], values: &[u8], fifth: Option<&[u8]>) -> Large {
    let scales = &block[4..16];
    // The first four pairs have six bits in one byte each; of the others four bits are in the last
    // four bytes, and two above the first ones.
    let pair = |g: usize| match g {
        0..4 => (scales[g] & 63, scales[g + 4] & 63),
        _ => {
            let low = scales[g + 4];
            (low & 15 | scales[g - 4] >> 6 << 4, low >> 4 | scales[g] >> 6 << 4)
        }
    };
    let value = |i: usize| {
        let half = values[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15;
        half | fifth.map_or(0, |bits| (bits[i % 32] >> (i / 32) & 1) << 4)
    };
    Large {
        scale: half_at(block, 0),
        minimum: -half_at(block, 2),
        factors: std::array::from_fn(|h| pair(h / 2).0 as i8),
        shifts: std::array::from_fn(|h| pair(h / 2).1 as i8),
        values: std::array::from_fn(value),
    }
}

fn q6(block: &[u8]) -> Large {
    let (low, high) = (&block[..128], &block[128..192]);
    let value = |i: usize| {
        let (part, within) = (i % 128 / 32, i % 32);
        let four = low[i / 128 * 64 + part % 2 * 32 + within] >> (part / 2 * 4) & 15;
        four | (high[i / 128 * 32 + within] >> (part * 2) & 3) << 4
    };
    let scale = half_at(block, 208);
    let factors = std::array::from_fn(|h| block[192 + h] as i8);
    // Values are by 32 too large.
    Large {
        scale,
        minimum: -32.0 * scale,
        factors,
        shifts: factors,
        values: std::array::from_fn(value),
    }
}
