//! Rotary positions: the angles of every position, as the kernels want them.

use crate::kernels::ops::Vector;

/// Cosines, then sines, of each position's rotation angles: `[context][head_dim]`, the first half
/// of a row cosines, the second half sines. Angles are taken in f64: at position 8,000 an f32
/// product is already off by 5e-4.
pub(super) fn rope_table(context: usize, head_dim: usize, base: f64, dims: usize) -> Vector {
    let half = head_dim / 2;
    let mut table = vec![0f32; context * head_dim];
    for (position, row) in table.chunks_exact_mut(head_dim).enumerate() {
        for i in 0..half {
            let turn = if 2 * i < dims { base.powf(-2.0 * i as f64 / dims as f64) } else { 0.0 };
            let angle = position as f64 * turn;
            row[i] = angle.cos() as f32;
            row[half + i] = angle.sin() as f32;
        }
    }
    table.into()
}
