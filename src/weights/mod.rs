//! Tensors from files, repacked for kernels: read by position, within the bounds that the header
//! reader has checked. No memory map: a file truncated under a map kills the process.

mod dequantize;
mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::kernels::cpu::isa::SetKind;
use crate::kernels::ops::Vector;
use crate::kernels::packed::{Encoding, Packed, PackedFormat};
use crate::model::Dtype;
use crate::store::HeaderError;
use crate::store::gguf::{GgmlType, Header};
use crate::weights::table::{Found, Table};

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its header is unusable.
    #[error("{file}: {source}")]
    Header {
        /// Name of the file.
        file: String,
        /// What is wrong.
        source: HeaderError,
    },
    /// Its data cannot be read.
    #[error("cannot read tensor '{tensor}': {source}")]
    Read {
        /// Name in the file.
        tensor: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not what its architecture needs.
    #[error("{0}")]
    Shape(String),
}

/// A model's tensors, opened.
#[derive(Debug)]
pub struct Weights {
    table: Table,
    /// What float matrices are packed as.
    floats: PackedFormat,
    /// The same, where a little less exact will do.
    coarse: PackedFormat,
}

/// Some outputs of a matrix: whole tensors are stacked in the given order.
#[derive(Debug, Clone)]
pub struct Part {
    /// Tensor in the file.
    pub tensor: String,
    /// Outputs that it must have.
    pub rows: usize,
    /// How its rows are ordered.
    pub order: RowOrder,
}

/// The order of a tensor's rows in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// As kernels want them.
    Plain,
    /// Per head, the two halves of each rotation pair side by side (GGUF's Llama q and k).
    /// Kernels rotate `(i, i + head_dim / 2)`, so rows are put apart again.
    Interleaved {
        /// Rows a head.
        head_dim: usize,
    },
}

impl Part {
    /// A tensor whose rows are in order.
    pub fn plain(tensor: impl Into<String>, rows: usize) -> Self {
        Self { tensor: tensor.into(), rows, order: RowOrder::Plain }
    }
}

impl Weights {
    /// Opens a file by its name's ending: `.gguf` or `.safetensors`.
    ///
    /// # Errors
    /// An unusable header.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        Table::open(path).map(Self::of)
    }

    /// Opens the safetensors files that an index names; `find` says where each lies.
    ///
    /// # Errors
    /// An unusable index or header, a file that is missing, or an index that contradicts them.
    pub fn open_index(
        path: &Path,
        find: impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self, LoadError> {
        Table::open_index(path, find).map(Self::of)
    }

    fn of(table: Table) -> Self {
        let floats = PackedFormat::F32;
        Self { table, floats, coarse: floats }.with_dtype(Dtype::Auto, Some(SetKind::detect()))
    }

    /// Chooses what float matrices become when they are packed, for a processor's instructions or
    /// for a GPU.
    pub fn with_dtype(mut self, dtype: Dtype, set: Option<SetKind>) -> Self {
        let bf16 = set.is_some_and(SetKind::has_bf16);
        self.floats = match dtype {
            Dtype::Auto if self.gguf().is_none() && bf16 => PackedFormat::Bf16,
            Dtype::Auto | Dtype::F32 => PackedFormat::F32,
            Dtype::Bf16 => PackedFormat::Bf16,
            Dtype::Int8 => PackedFormat::Q8,
        };
        self.coarse = match (self.floats, set) {
            (PackedFormat::Q8, Some(set)) => set.fastest_bytes(),
            (floats, _) => floats,
        };
        self
    }

    /// The GGUF header, if this is a GGUF file.
    pub fn gguf(&self) -> Option<&Header> {
        self.table.gguf()
    }

    /// Whether the file has this tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.table.has(tensor)
    }

    /// Rows and columns of a tensor.
    ///
    /// # Errors
    /// A missing tensor.
    pub fn size(&self, tensor: &str) -> Result<(usize, usize), LoadError> {
        self.table.find(tensor).map(|found| (found.rows, found.columns))
    }

    /// Bytes of memory that all tensors take, each packed in its own format.
    pub fn bytes(&self) -> u64 {
        let packed = |(rows, columns, kind): (usize, usize, GgmlType)| match rows {
            1 => 4 * columns as u64,
            _ => self.packed_as(kind, columns).bytes(rows, columns) as u64,
        };
        self.table.shapes().into_iter().map(packed).sum()
    }

    /// The format, rows and columns of a matrix that is packed alone; none if there is none.
    pub fn packed(&self, tensor: &str) -> Option<(PackedFormat, usize, usize)> {
        let Found { rows, columns, kind, .. } = self.table.find(tensor).ok()?;
        Some((self.packed_as(kind, columns), rows, columns))
    }

    fn packed_as(&self, kind: GgmlType, columns: usize) -> PackedFormat {
        match packed_format(kind) {
            PackedFormat::F32 => suited(self.floats, columns),
            format => format,
        }
    }

    /// A matrix of the stacked `parts`, each `rows × columns`, packed in its own format; parts of
    /// different formats in one that keeps both, or in f32 if none does.
    ///
    /// # Errors
    /// A missing tensor, another shape, or data that cannot be read.
    pub fn matrix(&self, parts: &[Part], columns: usize) -> Result<Arc<Packed>, LoadError> {
        self.matrix_as(self.floats, parts, columns)
    }

    /// As [`Weights::matrix`], for vectors that are compared by their angles: where the processor
    /// multiplies small bytes faster, 8 bits have no value above 90.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn coarse_matrix(&self, parts: &[Part], columns: usize) -> Result<Arc<Packed>, LoadError> {
        self.matrix_as(self.coarse, parts, columns)
    }

    fn matrix_as(
        &self,
        floats: PackedFormat,
        parts: &[Part],
        columns: usize,
    ) -> Result<Arc<Packed>, LoadError> {
        let found = self.find_parts(parts, columns)?;
        let rows = found.iter().map(|tensor| tensor.rows).sum();
        let encodings: Option<Vec<Encoding>> =
            found.iter().map(|tensor| encoding(tensor.kind)).collect();
        let encodings = encodings.filter(|encodings| one_format(encodings));
        let packed = match encodings {
            Some(encodings) => {
                let data = self.read_parts(parts, &found)?;
                let slices = in_order(parts, &found, &data)?;
                let counts = found.iter().zip(encodings);
                let of: Vec<Encoding> =
                    counts.flat_map(|(tensor, of)| std::iter::repeat_n(of, tensor.rows)).collect();
                let row = |row: usize| (of[row], slices[row]);
                match of.first() {
                    Some(&first) if first.packed() == PackedFormat::F32 => {
                        Packed::from_mixed_rows_as(rows, columns, suited(floats, columns), row)
                    }
                    _ => Packed::from_mixed_rows(rows, columns, row),
                }
            }
            None => Packed::from_f32(rows, columns, &self.stack_f32(parts, &found)?),
        };
        packed.map(Arc::new).map_err(|error| {
            LoadError::Shape(format!("tensor '{}' cannot be packed: {error}", parts[0].tensor))
        })
    }

    /// A matrix as plain f32 rows.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn rows(&self, part: &Part, columns: usize) -> Result<Vec<f32>, LoadError> {
        let found = self.find_parts(std::slice::from_ref(part), columns)?;
        self.stack_f32(std::slice::from_ref(part), &found)
    }

    /// The stacked vectors `tensors`, `len` values in all.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn vector(&self, tensors: &[String], len: usize) -> Result<Vector, LoadError> {
        let mut values = Vec::with_capacity(len);
        for name in tensors {
            let tensor = self.table.find(name)?;
            let data = self.table.read(name, &tensor)?;
            values.extend(dequantize::to_f32(name, tensor.kind, &data)?);
        }
        if values.len() != len {
            let names = tensors.join(", ");
            let have = values.len();
            return Err(LoadError::Shape(format!("{names}: {have} values, {len} expected")));
        }
        Ok(values.into())
    }

    /// The stacked biases of `parts`, in the order of their rows.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn bias(&self, parts: &[Part]) -> Result<Vector, LoadError> {
        let mut values = Vec::new();
        for part in parts {
            let stored = self.vector(std::slice::from_ref(&part.tensor), part.rows)?;
            for row in 0..part.rows {
                values.push(stored[part.order.stored(row, part.rows)?]);
            }
        }
        Ok(values.into())
    }

    fn stack_f32(&self, parts: &[Part], found: &[Found]) -> Result<Vec<f32>, LoadError> {
        let data = self.read_parts(parts, found)?;
        let mut slices = in_order(parts, found, &data)?.into_iter();
        let mut values = Vec::new();
        for (part, tensor) in parts.iter().zip(found) {
            let rows: Vec<&[u8]> = slices.by_ref().take(tensor.rows).collect();
            values.extend(dequantize::to_f32(&part.tensor, tensor.kind, &rows.concat())?);
        }
        Ok(values)
    }

    fn read_parts(&self, parts: &[Part], found: &[Found]) -> Result<Vec<Vec<u8>>, LoadError> {
        parts
            .iter()
            .zip(found)
            .map(|(part, tensor)| self.table.read(&part.tensor, tensor))
            .collect()
    }

    fn find_parts(&self, parts: &[Part], columns: usize) -> Result<Vec<Found>, LoadError> {
        let mut found = Vec::with_capacity(parts.len());
        for part in parts {
            let tensor = self.table.find(&part.tensor)?;
            if (tensor.rows, tensor.columns) != (part.rows, columns) {
                return Err(LoadError::Shape(format!(
                    "tensor '{}' is {} × {}, {} × {columns} expected",
                    part.tensor, tensor.rows, tensor.columns, part.rows
                )));
            }
            found.push(tensor);
        }
        Ok(found)
    }
}

/// What float rows of `columns` values become: f32 where `format` does not suit them.
fn suited(format: PackedFormat, columns: usize) -> PackedFormat {
    if columns.is_multiple_of(format.block()) { format } else { PackedFormat::F32 }
}

/// Loads `count` parts of a model on all cores, in order.
///
/// # Errors
/// The first error of `load`.
pub fn in_parallel<T, F>(count: usize, load: F) -> Result<Vec<T>, LoadError>
where
    T: Send,
    F: Fn(usize) -> Result<T, LoadError> + Sync,
{
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(count.max(1));
    let chunk = count.div_ceil(threads).max(1);
    let load = &load;
    let parts: Result<Vec<Vec<T>>, LoadError> = std::thread::scope(|scope| {
        let starts = (0..count).step_by(chunk);
        let workers: Vec<_> = starts
            .map(|start| {
                let end = (start + chunk).min(count);
                scope.spawn(move || (start..end).map(load).collect::<Result<Vec<T>, _>>())
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    Ok(parts?.into_iter().flatten().collect())
}

/// The rows of all parts in the order that kernels want.
fn in_order<'d>(
    parts: &[Part],
    found: &[Found],
    data: &'d [Vec<u8>],
) -> Result<Vec<&'d [u8]>, LoadError> {
    let mut rows = Vec::with_capacity(found.iter().map(|tensor| tensor.rows).sum());
    for ((part, tensor), data) in parts.iter().zip(found).zip(data) {
        let stride = data.len() / tensor.rows;
        for row in 0..tensor.rows {
            let from = part.order.stored(row, tensor.rows)?;
            rows.push(&data[from * stride..(from + 1) * stride]);
        }
    }
    Ok(rows)
}

impl RowOrder {
    /// Where the file has row `row` of `rows`.
    fn stored(self, row: usize, rows: usize) -> Result<usize, LoadError> {
        let RowOrder::Interleaved { head_dim } = self else { return Ok(row) };
        if head_dim == 0 || !head_dim.is_multiple_of(2) || !rows.is_multiple_of(head_dim) {
            let message = format!("{rows} rows cannot be split into heads of {head_dim}");
            return Err(LoadError::Shape(message));
        }
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
        Ok(head * head_dim + 2 * pair + half)
    }
}

/// What a matrix of this format becomes in a CPU's memory.
pub fn packed_format(kind: GgmlType) -> PackedFormat {
    encoding(kind).map_or(PackedFormat::F32, Encoding::packed)
}

/// How the kernels' packer names a format; none for formats without a kernel.
fn encoding(kind: GgmlType) -> Option<Encoding> {
    match kind {
        GgmlType::F32 => Some(Encoding::F32),
        GgmlType::F16 => Some(Encoding::F16),
        GgmlType::BF16 => Some(Encoding::Bf16),
        GgmlType::Q4_0 => Some(Encoding::Q4Zero),
        GgmlType::Q4_1 => Some(Encoding::Q4One),
        GgmlType::Q5_0 => Some(Encoding::Q5Zero),
        GgmlType::Q5_1 => Some(Encoding::Q5One),
        GgmlType::Q8_0 => Some(Encoding::Q8Zero),
        GgmlType::Q2_K => Some(Encoding::Q2K),
        GgmlType::Q3_K => Some(Encoding::Q3K),
        GgmlType::Q4_K => Some(Encoding::Q4K),
        GgmlType::Q5_K => Some(Encoding::Q5K),
        GgmlType::Q6_K => Some(Encoding::Q6K),
        GgmlType::Other(_) => None,
    }
}

/// Whether one format of panels keeps all of these.
fn one_format(encodings: &[Encoding]) -> bool {
    let mut formats = encodings.iter().map(|encoding| encoding.packed());
    let first = formats.next();
    first.is_some_and(|first| formats.try_fold(first, PackedFormat::common).is_some())
}

fn missing(name: &str) -> LoadError {
    LoadError::Shape(format!("tensor '{name}' is missing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_put_apart() {
        // Two heads of four rows: the file holds the halves of each head side by side.
        let order = RowOrder::Interleaved { head_dim: 4 };
        let stored: Vec<usize> = (0..8).map(|row| order.stored(row, 8).unwrap()).collect();
        assert_eq!(stored, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert!(RowOrder::Interleaved { head_dim: 3 }.stored(0, 8).is_err());
        assert_eq!(RowOrder::Plain.stored(5, 8).unwrap(), 5);
    }

    #[test]
    fn parallel_loading_keeps_order_and_reports_the_error() {
        let squares = in_parallel(7, |i| Ok(i * i)).unwrap();
        assert_eq!(squares, [0, 1, 4, 9, 16, 25, 36]);
        let failed = in_parallel(7, |i| if i == 5 { Err(missing("x")) } else { Ok(i) });
        assert!(matches!(failed, Err(LoadError::Shape(_))));
        assert!(in_parallel(0, Ok).unwrap().is_empty());
    }
}
