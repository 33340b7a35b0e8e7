//! A coarse copy of the matrix that a generator ends with. Where only the largest logit of a row is
//! wanted, all are computed from the copy, which is half as long, and those that could be the
//! largest once more from the matrix itself: with few rows a head is as fast as it can be read, and
//! it is the largest matrix of a small model. Knows no instruction set.

use std::sync::Arc;

use half::f16;

use crate::device::arena::Region;

use super::ops::{Epilogue, Linear, Op, Program, Vector};
use super::packed::{Encoding, GROUP, PANEL, PackError, Packed, PackedFormat};

/// What takes the place of a program's last op if of each row only the largest output is wanted.
/// The outputs that it leaves have the same largest one, with the same bits: not by proof, but with
/// odds of less than one in a hundred million (see `cpu/rescore.rs`).
#[derive(Debug, Clone)]
pub struct Coarse {
    /// Comes first: the last op with 4-bit weights.
    pub linear: Linear,
    /// The last op.
    pub exact: Linear,
    /// For each panel of 16 outputs, and in it each group of 32 inputs, how far copied weights are
    /// off: the mean square over the group, that of the worst output.
    pub errors: Vector,
    /// The same for each [`BLOCK`] panels.
    pub block_errors: Vector,
}

/// Panels that are looked at together first: most have nothing to offer.
pub const BLOCK: usize = 16;

/// Groups in a row at most.
pub const GROUPS_MAX: usize = 512;

impl Coarse {
    /// That of a program that ends with a matrix of more than 4 bits a weight; none for others.
    ///
    /// # Errors
    /// No memory.
    pub fn of(program: &Program) -> Result<Option<Self>, PackError> {
        let Some(Op::Linear(exact)) = program.ops.last() else { return Ok(None) };
        let (format, n, k) = (exact.weight.format, exact.weight.n, exact.weight.k);
        let stores = exact.epilogue == Epilogue::Store && program.output == Some(exact.output);
        if !stores || Self::bytes(format, n, k) == 0 {
            return Ok(None);
        }
        let (weight, squares) = copy(&exact.weight)?;
        let linear = Linear { weight: Arc::new(weight), ..exact.clone() };
        let errors = worst(&squares, k / GROUP, PANEL);
        let block_errors = worst(&errors, k / GROUP, BLOCK);
        Ok(Some(Self { linear, exact: exact.clone(), errors, block_errors }))
    }

    /// Bytes of the copy of an `n × k` matrix; 0 where there is none.
    pub fn bytes(format: PackedFormat, n: usize, k: usize) -> usize {
        let large = matches!(
            format,
            PackedFormat::Q8 | PackedFormat::Q8Minimum | PackedFormat::K8 | PackedFormat::K8Halves
        );
        let fits = n.is_multiple_of(PANEL) && k <= GROUPS_MAX * GROUP;
        if large && fits { PackedFormat::Q4.bytes(n, k) } else { 0 }
    }
}

/// A 4-bit copy, and for each group of each row the mean square of what it is wrong by.
fn copy(exact: &Packed) -> Result<(Packed, Vec<f32>), PackError> {
    let (n, k) = (exact.n, exact.k);
    let (row_bytes, groups) = (Encoding::Q4One.row_bytes(k), k / GROUP);
    // Mapped, so that the system has it back afterwards.
    let (mut bytes, mut squares) = (Region::new(n * row_bytes)?, vec![0.0; n * groups]);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = n.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let bytes = bytes.as_bytes_mut().chunks_mut(rows * row_bytes);
        let parts = bytes.zip(squares.chunks_mut(rows * groups));
        for (part, (bytes, squares)) in parts.enumerate() {
            scope.spawn(move || {
                let mut row = vec![0.0; k];
                let places =
                    bytes.chunks_exact_mut(row_bytes).zip(squares.chunks_exact_mut(groups));
                for (r, (bytes, squares)) in places.enumerate() {
                    exact.read_row(part * rows + r, &mut row);
                    let blocks = row.as_chunks().0.iter().zip(bytes.as_chunks_mut().0);
                    for ((group, block), square) in blocks.zip(squares) {
                        *square = coarsened(group, block);
                    }
                }
            });
        }
    });
    Ok((Packed::from_bytes(n, k, Encoding::Q4One, bytes.as_bytes())?, squares))
}

/// Writes a group as an [`Encoding::Q4One`] block; the mean square error.
fn coarsened(group: &[f32; GROUP], block: &mut [u8; 20]) -> f32 {
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
    squares / GROUP as f32
}

/// The worst of each `count` rows, group by group. Of values that are no numbers nothing is known.
fn worst(squares: &[f32], groups: usize, count: usize) -> Vector {
    let mut worst = vec![0.0_f32; squares.len().div_ceil(groups * count) * groups];
    let rows = squares.chunks(groups * count).zip(worst.chunks_exact_mut(groups));
    for (rows, worst) in rows {
        for row in rows.chunks_exact(groups) {
            for (square, worst) in row.iter().zip(&mut *worst) {
                let known = if square.is_finite() { *square } else { f32::INFINITY };
                *worst = worst.max(known);
            }
        }
    }
    worst.into()
}
