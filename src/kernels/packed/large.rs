//! Panels of large blocks: 256 inputs that share a scale and a minimum, and small integers that
//! multiply them. Keeps every K-quant of GGUF exactly. Knows no file and no arithmetic.
//!
//! For each 256 inputs a panel has 16 f32 scales, 16 f32 minimums, for each of the eight groups the
//! factors and shifts of its 16 outputs as signed bytes (one each a group, or two, for its halves),
//! and the values of the eight groups, as 4-bit or 8-bit panels have them.

use super::blocks::{LARGE, Large};
use super::quants::Scales;
use super::{GROUP, PANEL, PackedFormat};

/// Groups in a large block.
pub(in crate::kernels) const LARGE_GROUPS: usize = LARGE / GROUP;

/// Where things stand in the part of a panel that belongs to a large block.
#[derive(Debug, Clone, Copy)]
pub(in crate::kernels) struct LargeLayout {
    /// Factors, and shifts, of a group: 1, or 2 for its halves.
    pub(in crate::kernels) parts: usize,
    /// Bytes of a group's values.
    pub(in crate::kernels) value_bytes: usize,
    /// What is added to 8-bit values.
    offset: u8,
}

impl LargeLayout {
    /// Of `format`; none for panels of other kinds.
    pub(in crate::kernels) const fn of(format: PackedFormat) -> Option<Self> {
        let (parts, value_bytes, offset) = match format {
            PackedFormat::K4 => (1, 256, 0),
            PackedFormat::K4Halves => (2, 256, 0),
            PackedFormat::K8 => (1, 512, 128),
            PackedFormat::K8Halves => (2, 512, 0),
            _ => return None,
        };
        Some(Self { parts, value_bytes, offset })
    }

    /// Where the factors of group `g` start; its shifts follow.
    pub(in crate::kernels) const fn factors(self, g: usize) -> usize {
        128 + g * self.parts * 2 * PANEL
    }

    /// Where the values of group `g` start.
    pub(in crate::kernels) const fn values(self, g: usize) -> usize {
        self.factors(LARGE_GROUPS) + g * self.value_bytes
    }

    /// Bytes of the whole.
    pub(in crate::kernels) const fn bytes(self) -> usize {
        self.values(LARGE_GROUPS)
    }

    /// Where input `i` of a group stands among its values, and by how much it is shifted there.
    fn place(self, lane: usize, i: usize) -> (usize, usize) {
        match self.value_bytes {
            256 => (i / 8 * 64 + lane * 4 + i % 4, i % 8 / 4 * 4),
            _ => (i / 4 * 64 + lane * 4 + i % 4, 0),
        }
    }

    /// Writes a block of output `lane`.
    pub(super) fn pack(self, block: &Large, to: &mut [u8], lane: usize) {
        to[lane * 4..lane * 4 + 4].copy_from_slice(&block.scale.to_ne_bytes());
        to[64 + lane * 4..68 + lane * 4].copy_from_slice(&block.minimum.to_ne_bytes());
        for g in 0..LARGE_GROUPS {
            let start = self.factors(g) + lane;
            for part in 0..self.parts {
                let half = 2 * g + part;
                to[start + part * PANEL] = block.factors[half] as u8;
                to[start + (self.parts + part) * PANEL] = block.shifts[half] as u8;
            }
            let values = &mut to[self.values(g)..self.values(g + 1)];
            for (i, value) in block.values[g * GROUP..(g + 1) * GROUP].iter().enumerate() {
                let (at, shift) = self.place(lane, i);
                values[at] |= (value + self.offset) << shift;
            }
        }
    }

    /// Row `lane` of a panel: `fma(scale × factor, q, minimum × shift)`.
    pub(super) fn read(self, panel: &[u8], lane: usize, out: &mut [f32]) {
        let blocks = panel.chunks_exact(self.bytes());
        for (from, out) in blocks.zip(out.chunks_exact_mut(LARGE)) {
            let (scale, minimum) = (super::f32_at(from, lane), super::f32_at(&from[64..], lane));
            for (i, out) in out.iter_mut().enumerate() {
                let (g, i) = (i / GROUP, i % GROUP);
                let part = i * self.parts / GROUP;
                let small =
                    |part: usize| f32::from(from[self.factors(g) + part * PANEL + lane] as i8);
                let (at, shift) = self.place(lane, i);
                let mask = if self.value_bytes == 256 { 15 } else { 255 };
                let q = f32::from((from[self.values(g) + at] >> shift & mask) - self.offset);
                *out = (scale * small(part)).mul_add(q, minimum * small(self.parts + part));
            }
        }
    }

    /// Group `group` of row `lane`, and its scales.
    pub(super) fn group(
        self,
        panel: &[u8],
        lane: usize,
        group: usize,
        out: &mut [i16; GROUP],
    ) -> Scales {
        let from = &panel[group / LARGE_GROUPS * self.bytes()..][..self.bytes()];
        let g = group % LARGE_GROUPS;
        let (scale, minimum) = (super::f32_at(from, lane), super::f32_at(&from[64..], lane));
        let mask = if self.value_bytes == 256 { 15 } else { 255 };
        for (i, out) in out.iter_mut().enumerate() {
            let (at, shift) = self.place(lane, i);
            let stored = from[self.values(g) + at] >> shift & mask;
            *out = i16::from(stored) - i16::from(self.offset);
        }
        std::array::from_fn(|half| {
            let part = half * self.parts / 2;
            let small = |part: usize| f32::from(from[self.factors(g) + part * PANEL + lane] as i8);
            [scale * small(part), minimum * small(self.parts + part)]
        })
    }
}
