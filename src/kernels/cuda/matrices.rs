//! Weights on their way to device memory. A matrix becomes rows of 128-input pieces, padded with
//! zeros to whole pieces and to a multiple of 16 outputs:
//! - bf16: 128 values. Whatever is not quantised is stored so, f32 rounded.
//! - 4-bit: 64 bytes, of which word `4 t + j` has the eight values that lane `t` takes of group
//!   `j`: even ones in nibble `i / 2`, odd ones in nibble `4 + i / 2`.
//! - 8-bit: two times 64 bytes, 128 too large each; from byte `64 (j / 2) + 16 t + 8 (j % 2)` on
//!   the same eight values, of each four the second and third exchanged: so pairs are 16 bits from
//!   each other, as they are in a register of two bf16.
//!
//! A group is 32 inputs, and lane `t` takes those from `8 t` on; where halves of a group have
//! scales of their own, it takes four of each half, those from `4 t` and from `16 + 4 t` on.
//!
//! Beside quantised values stand f16 scales, each followed by a minimum where the format has them:
//! one for each 32 inputs, or for each 16. Large blocks, whose scales are products, are rounded to
//! that, which is finer than bf16 is.
//!
//! So a lane finds what it multiplies with one 16-byte load: of four groups, or of two.

use std::collections::HashMap;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread::ScopedJoinHandle;

use half::{bf16, f16};

use super::arguments::Matrix;
use crate::device::cuda::{Address, Gpu, fault::GpuError};
use crate::kernels::ops::Vector;
use crate::kernels::packed::quants::Scales;
use crate::kernels::packed::{GROUP, Packed, PackedFormat};

/// Inputs of a piece.
const SUPER: usize = 128;

/// Outputs are padded to a multiple of this.
const OUTPUTS: usize = 16;

/// Bytes that are converted and copied at a time: bounds what the host holds twice.
const CHUNK_BYTES: usize = 64 << 20;

/// Bytes for which another thread pays.
const THREAD_BYTES: usize = 1 << 20;

/// How a matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MatrixFormat {
    /// 16-bit floats.
    Bf16,
    /// 4-bit values and minimums.
    Q4,
    /// The same, for each 16.
    Q4Halves,
    /// 8-bit values.
    Q8,
    /// 8-bit values and minimums.
    Q8Minimum,
    /// The same, for each 16.
    Q8Halves,
}

/// What a program's weights became, each once however many ops name it.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    matrices: HashMap<*const Packed, Matrix>,
    vectors: HashMap<*const f32, Address>,
    /// Everything that was reserved.
    pub(super) reserved: Vec<Address>,
    /// Bytes of it.
    pub(super) bytes: usize,
}

// SAFETY: the pointers are keys; nobody follows them.
#[expect(unsafe_code, reason = "keys of a map")]
unsafe impl Send for Uploads {}

impl MatrixFormat {
    /// What a packed matrix is stored as.
    pub(super) fn of(format: PackedFormat) -> Self {
        match format {
            PackedFormat::F32 | PackedFormat::Bf16 => MatrixFormat::Bf16,
            PackedFormat::Q4 | PackedFormat::K4 => MatrixFormat::Q4,
            PackedFormat::K4Halves => MatrixFormat::Q4Halves,
            PackedFormat::Q8 | PackedFormat::Q8Low => MatrixFormat::Q8,
            PackedFormat::Q8Minimum | PackedFormat::K8 => MatrixFormat::Q8Minimum,
            PackedFormat::K8Halves => MatrixFormat::Q8Halves,
        }
    }

    /// Bits of a quantised value, whether there are minimums, and scales in a group.
    fn shape(self) -> (usize, bool, usize) {
        match self {
            MatrixFormat::Bf16 => (16, false, 0),
            MatrixFormat::Q4 => (4, true, 1),
            MatrixFormat::Q4Halves => (4, true, 2),
            MatrixFormat::Q8 => (8, false, 1),
            MatrixFormat::Q8Minimum => (8, true, 1),
            MatrixFormat::Q8Halves => (8, true, 2),
        }
    }

    /// As `common.cuh` has it.
    fn code(self) -> u32 {
        let (bits, minimum, parts) = self.shape();
        let values = match bits {
            4 => 1,
            8 => 2,
            _ => 0,
        };
        values | u32::from(minimum) << 2 | u32::from(parts == 2) << 3
    }

    /// Bytes of values and of scales a piece.
    fn piece_bytes(self) -> (usize, usize) {
        let (bits, minimum, parts) = self.shape();
        let halves = if minimum { 2 } else { 1 };
        (SUPER * bits / 8, SUPER / GROUP * parts * halves * 2)
    }
}

impl Uploads {
    /// A matrix in device memory.
    ///
    /// # Errors
    /// There is no memory, or the device failed.
    pub(super) fn matrix(
        &mut self,
        gpu: &mut dyn Gpu,
        packed: &Arc<Packed>,
    ) -> Result<Matrix, GpuError> {
        let key = Arc::as_ptr(packed);
        if let Some(matrix) = self.matrices.get(&key) {
            return Ok(*matrix);
        }
        let format = MatrixFormat::of(packed.format);
        let (value_bytes, scale_bytes) = format.piece_bytes();
        let supers = packed.k.div_ceil(SUPER);
        let rows = packed.n.next_multiple_of(OUTPUTS);
        let values = self.reserve(gpu, rows * supers * value_bytes)?;
        let scales = match scale_bytes {
            0 => Address(0),
            bytes => self.reserve(gpu, rows * supers * bytes)?,
        };
        convert(packed, format, |first, pieces| {
            gpu.upload(values.plus(first * supers * value_bytes), &pieces.values)?;
            if scale_bytes > 0 {
                gpu.upload(scales.plus(first * supers * scale_bytes), &pieces.scales)?;
            }
            Ok(())
        })?;
        let matrix = Matrix {
            values: values.0,
            scales: scales.0,
            format: format.code(),
            outputs: packed.n as u32,
            inputs: packed.k as u32,
            supers: supers as u32,
        };
        self.matrices.insert(key, matrix);
        Ok(matrix)
    }

    /// A vector of f32 in device memory.
    ///
    /// # Errors
    /// As [`Uploads::matrix`].
    pub(super) fn vector(
        &mut self,
        gpu: &mut dyn Gpu,
        vector: &Vector,
    ) -> Result<Address, GpuError> {
        let key = vector.as_ptr();
        if let Some(address) = self.vectors.get(&key) {
            return Ok(*address);
        }
        let bytes: &[u8] = bytemuck::cast_slice(vector);
        let address = self.reserve(gpu, bytes.len())?;
        gpu.upload(address, bytes)?;
        self.vectors.insert(key, address);
        Ok(address)
    }

    /// Zeroed memory that goes when the program does.
    ///
    /// # Errors
    /// As [`Uploads::matrix`].
    pub(super) fn reserve(&mut self, gpu: &mut dyn Gpu, bytes: usize) -> Result<Address, GpuError> {
        let address = gpu.reserve(bytes)?;
        self.reserved.push(address);
        self.bytes += bytes;
        Ok(address)
    }
}

/// Gives all rows of a matrix in device form to `take`, some at a time and in order, with the
/// number of the first. Other threads convert those that come next meanwhile.
fn convert(
    packed: &Packed,
    format: MatrixFormat,
    mut take: impl FnMut(usize, Pieces) -> Result<(), GpuError>,
) -> Result<(), GpuError> {
    let (value_bytes, scale_bytes) = format.piece_bytes();
    let supers = packed.k.div_ceil(SUPER);
    let row_bytes = (supers * (value_bytes + scale_bytes)).max(1);
    let chunk = (CHUNK_BYTES / row_bytes).clamp(1, packed.n.max(1));
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let each = chunk.div_ceil(cores).max(THREAD_BYTES / row_bytes).max(1);
    let part = |first: usize, end: usize| {
        let mut pieces = Pieces::new(format, (end - first) * supers);
        (first..end).for_each(|row| pieces.put(packed, row, (row - first) * supers));
        (first, pieces)
    };
    std::thread::scope(|scope| {
        let part = &part;
        let begin = |first: usize| -> Vec<ScopedJoinHandle<'_, (usize, Pieces)>> {
            let end = packed.n.min(first + chunk);
            let starts = (first..end).step_by(each);
            starts.map(|at| scope.spawn(move || part(at, end.min(at + each)))).collect()
        };
        let mut chunks = (0..packed.n).step_by(chunk).map(begin);
        let mut now = chunks.next();
        while let Some(workers) = now {
            now = chunks.next();
            for worker in workers {
                let joined = worker.join();
                let (first, pieces) = joined.unwrap_or_else(|panic| resume_unwind(panic));
                take(first, pieces)?;
            }
        }
        Ok(())
    })
}

/// Some rows in device form.
struct Pieces {
    format: MatrixFormat,
    values: Vec<u8>,
    scales: Vec<u8>,
}

impl Pieces {
    fn new(format: MatrixFormat, pieces: usize) -> Self {
        let (values, scales) = format.piece_bytes();
        Self { format, values: vec![0; pieces * values], scales: vec![0; pieces * scales] }
    }

    /// Row `row` of `packed`, from piece `first` on.
    fn put(&mut self, packed: &Packed, row: usize, first: usize) {
        if packed.format == PackedFormat::Bf16 {
            return packed.read_halves(row, &mut self.values[first * 2 * SUPER..]);
        }
        if self.format == MatrixFormat::Bf16 {
            let mut values = vec![0.0; packed.k];
            packed.read_row(row, &mut values);
            let to = self.values[first * 2 * SUPER..].chunks_exact_mut(2);
            for (to, value) in to.zip(values) {
                to.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
            return;
        }
        let (bits, minimum, parts) = self.format.shape();
        let mut quants = [0; GROUP];
        for group in 0..packed.k / GROUP {
            let mut scales = packed.quants(row, group, &mut quants);
            let (piece, j) = (first + group / 4, group % 4);
            if LARGE.contains(&packed.format) && bits == 8 {
                centre(&mut scales, &mut quants);
            }
            let halves = scales[..parts].iter().flat_map(|of| &of[..if minimum { 2 } else { 1 }]);
            let width = parts * if minimum { 2 } else { 1 };
            let at = (piece * 4 + j) * width * 2;
            for (to, half) in self.scales[at..].chunks_exact_mut(2).zip(halves) {
                to.copy_from_slice(&f16::from_f32(*half).to_le_bytes());
            }
            for t in 0..4 {
                let quants = lane_values(&quants, t, parts);
                if bits == 4 {
                    let nibbles = (0..8).map(|i| {
                        let place = i / 2 + i % 2 * 4;
                        u32::from(quants[i] as u16) << (4 * place)
                    });
                    let word: u32 = nibbles.sum();
                    let at = piece * SUPER / 2 + (4 * t + j) * 4;
                    self.values[at..at + 4].copy_from_slice(&word.to_le_bytes());
                } else {
                    let at = piece * SUPER + 64 * (j / 2) + 16 * t + 8 * (j % 2);
                    for (i, to) in self.values[at..at + 8].iter_mut().enumerate() {
                        let from = i & 4 | (i & 1) << 1 | i >> 1 & 1;
                        *to = (quants[from] + 128) as u8;
                    }
                }
            }
        }
    }
}

/// What lane `t` takes of a group that has `parts` scales.
fn lane_values(group: &[i16; GROUP], t: usize, parts: usize) -> [i16; 8] {
    std::array::from_fn(|i| match parts {
        2 => group[16 * (i / 4) + 4 * t + i % 4],
        _ => group[8 * t + i],
    })
}

/// Formats whose scales are products, which f16 does not hold exactly.
const LARGE: [PackedFormat; 2] = [PackedFormat::K8, PackedFormat::K8Halves];

/// Takes whole scales from minimums over into values, so that what is rounded is small: of a
/// symmetric format nothing is left.
fn centre(scales: &mut Scales, quants: &mut [i16; GROUP]) {
    for ([scale, minimum], quants) in scales.iter_mut().zip(quants.chunks_exact_mut(GROUP / 2)) {
        let highest = quants.iter().copied().max().unwrap_or(0);
        let whole = (*minimum / *scale).round();
        if !whole.is_finite() {
            continue;
        }
        let whole = whole.clamp(-128.0, f32::from(127 - highest));
        *minimum = (-whole).mul_add(*scale, *minimum);
        quants.iter_mut().for_each(|q| *q += whole as i16);
    }
}
