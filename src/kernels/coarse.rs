//! A coarse copy of the matrix that a generator ends with. Where only the largest logit of a row is
//! wanted, all are computed from the copy, which is half as long, and those that could be the
//! largest once more from the matrix itself. Knows no instruction set.

use std::sync::Arc;

use half::f16;

use super::ops::{Linear, Op, Program, Vector};
use super::packed::{Encoding, GROUP, PANEL, PackError, Packed, PackedFormat};

/// What takes the place of a program's last op if of each row only the largest output is wanted:
/// the outputs that it leaves have the same largest, with the same bits, and are no larger
/// elsewhere.
#[derive(Debug, Clone)]
pub struct Coarse {
    /// Comes first: the last op with 4-bit weights.
    pub linear: Linear,
    /// The last op.
    pub exact: Linear,
    /// For each panel of 16 outputs by how much a copied weight is off: the root of the mean
    /// square over a group of 32, the largest of all groups.
    pub errors: Vector,
}

impl Coarse {
    /// That of a program that ends with a matrix of more than 4 bits a weight; none for others.
    ///
    /// # Errors
    /// No memory.
    pub fn of(program: &Program) -> Result<Option<Self>, PackError> {
        let Some(Op::Linear(exact)) = program.ops.last() else { return Ok(None) };
        let known = matches!(
            exact.weight.format,
            PackedFormat::Q8 | PackedFormat::Q8Minimum | PackedFormat::K8 | PackedFormat::K8Halves
        );
        if !known || !exact.weight.n.is_multiple_of(PANEL) {
            return Ok(None);
        }
        let (weight, errors) = copy(&exact.weight)?;
        let linear = Linear { weight: Arc::new(weight), ..exact.clone() };
        Ok(Some(Self { linear, exact: exact.clone(), errors }))
    }

    /// Bytes of memory that it takes besides the program's own.
    pub fn bytes(&self) -> usize {
        self.linear.weight.bytes()
    }
}

/// A 4-bit copy, and how far each panel of it is off.
fn copy(exact: &Packed) -> Result<(Packed, Vector), PackError> {
    let (n, k) = (exact.n, exact.k);
    let row_bytes = Encoding::Q4One.row_bytes(k);
    let (mut bytes, mut errors) = (vec![0; n * row_bytes], vec![0.0; n / PANEL]);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let panels = errors.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let parts = bytes.chunks_mut(panels * PANEL * row_bytes).zip(errors.chunks_mut(panels));
        for (part, (bytes, errors)) in parts.enumerate() {
            scope.spawn(move || {
                let mut row = vec![0.0; k];
                for (r, to) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                    exact.read_row(part * panels * PANEL + r, &mut row);
                    let error = halve(&row, to);
                    errors[r / PANEL] = error.max(errors[r / PANEL]);
                }
            });
        }
    });
    Ok((Packed::from_bytes(n, k, Encoding::Q4One, &bytes)?, errors.into()))
}

/// Writes a row as [`Encoding::Q4One`] blocks; the largest root mean square error of a group.
fn halve(row: &[f32], to: &mut [u8]) -> f32 {
    let mut worst = 0.0_f32;
    for (group, block) in row.as_chunks::<GROUP>().0.iter().zip(to.as_chunks_mut::<20>().0) {
        let least = group.iter().copied().fold(f32::INFINITY, f32::min);
        let most = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (scale, minimum) = (f16::from_f32((most - least) / 15.0), f16::from_f32(least));
        block[..2].copy_from_slice(&scale.to_le_bytes());
        block[2..4].copy_from_slice(&minimum.to_le_bytes());
        let (scale, minimum) = (scale.to_f32(), minimum.to_f32());
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let mut squares = 0.0;
        for (i, value) in group.iter().enumerate() {
            // Saturates; NaN becomes 0.
            let q = ((value - minimum) * inverse).round().min(15.0) as u8;
            block[4 + i % 16] |= q << (i / 16 * 4);
            let error = value - f32::from(q).mul_add(scale, minimum);
            squares += error * error;
        }
        // Of numbers that are none nothing is known.
        let error =
            if squares.is_finite() { (squares / GROUP as f32).sqrt() } else { f32::INFINITY };
        worst = worst.max(error);
    }
    worst
}
