//! Groups of quantised rows as they are stored, for a device that keeps them so. Knows no device.

use super::{GROUP, PANEL, Packed, PackedFormat, Q4_GROUP_BYTES, q8_places};

impl Packed {
    /// One group of a quantised row as it is stored: 4-bit values as they are, 8-bit ones 128 too
    /// large. Returns its scale and its minimum, f16, little-endian; 8-bit groups have none.
    ///
    /// # Panics
    /// If there is no such group, or the matrix is not quantised.
    pub(in crate::kernels) fn quants(
        &self,
        n: usize,
        group: usize,
        out: &mut [u8; GROUP],
    ) -> [[u8; 2]; 2] {
        let (panel, lane) = (self.panel(n / PANEL), n % PANEL);
        let half = |at: usize| [panel[at + lane * 2], panel[at + lane * 2 + 1]];
        match self.format {
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
            other => panic!("a matrix as {other:?} is not read by groups"),
        }
    }
}
