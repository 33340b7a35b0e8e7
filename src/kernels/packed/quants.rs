//! Groups of quantised rows as whole numbers and scales, for a device that keeps them in an order
//! of its own. Knows no device.

use half::f16;

use super::large::LargeLayout;
use super::{
    GROUP, PANEL, Packed, PackedFormat, Q4_GROUP_BYTES, Q8_MINIMUM_GROUP_BYTES, offset, q8_places,
};

/// What 32 quantised values are multiplied with: for each half scale and minimum, so that a value
/// is `scale × q + minimum`.
pub(in crate::kernels) type Scales = [[f32; 2]; 2];

impl Packed {
    /// Puts one group of a quantised row into `out`.
    ///
    /// # Panics
    /// If there is no such group, or the matrix is not quantised.
    pub(in crate::kernels) fn quants(
        &self,
        n: usize,
        group: usize,
        out: &mut [i16; GROUP],
    ) -> Scales {
        let (panel, lane) = (self.panel(n / PANEL), n % PANEL);
        let half = |at: usize| f16::from_le_bytes([panel[at + lane * 2], panel[at + lane * 2 + 1]]);
        match self.format {
            PackedFormat::Q4 => {
                let start = group * Q4_GROUP_BYTES;
                for (i, value) in out.iter_mut().enumerate() {
                    let byte = panel[start + 64 + i / 8 * 64 + lane * 4 + i % 4];
                    *value = i16::from(if i % 8 < 4 { byte & 15 } else { byte >> 4 });
                }
                [[half(start).to_f32(), half(start + 32).to_f32()]; 2]
            }
            PackedFormat::Q8 | PackedFormat::Q8Low => {
                let (scales, start) = q8_places(group);
                signed(&panel[start..], offset(self.format), lane, out);
                [[half(scales).to_f32(), 0.0]; 2]
            }
            PackedFormat::Q8Minimum => {
                let start = group * Q8_MINIMUM_GROUP_BYTES;
                signed(&panel[start + 64..], 128, lane, out);
                [[half(start).to_f32(), half(start + 32).to_f32()]; 2]
            }
            format => {
                let layout = LargeLayout::of(format);
                let layout = layout.unwrap_or_else(|| panic!("{format:?} has no groups"));
                layout.group(panel, lane, group, out)
            }
        }
    }
}

/// Values that are stored `offset` too large.
fn signed(from: &[u8], offset: u8, lane: usize, out: &mut [i16; GROUP]) {
    for (i, value) in out.iter_mut().enumerate() {
        *value = i16::from(from[i / 4 * 64 + lane * 4 + i % 4]) - i16::from(offset);
    }
}
