//! A bounded reader for GGUF headers (versions 2 and 3): metadata and tensor table. Trusts
//! nothing in the file; every length is checked against what is left before it is believed.

mod source;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use self::source::Source;
use super::HeaderError;

/// Most bytes of metadata and tensor table together. The largest vocabularies in use (262,144
/// tokens with scores, types and merges) take about 25 MiB.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Longest string; chat templates are the longest in use, some tens of KiB.
pub const STRING_BYTES_MAX: u64 = 4 << 20;
/// Longest metadata key and tensor name; ggml itself stops at 64 for names.
pub const NAME_BYTES_MAX: u64 = 256;
/// Longest array. Arrays of arrays are refused, as ggml does.
pub const ARRAY_LENGTH_MAX: u64 = 1 << 21;
/// Most array elements in all of the metadata: bounds what a header costs in memory.
pub const ELEMENTS_MAX: u64 = 1 << 22;
/// Most metadata keys.
pub const METADATA_MAX: u64 = 1 << 16;
/// Most tensors.
pub const TENSORS_MAX: u64 = 1 << 16;
/// Most dimensions of a tensor.
pub const DIMENSIONS_MAX: u32 = 4;
/// Largest alignment of tensor data; a power of two.
pub const ALIGNMENT_MAX: u64 = 1 << 20;

const ALIGNMENT_KEY: &str = "general.alignment";
const ALIGNMENT_DEFAULT: u64 = 32;

/// A metadata value. Integers of every width are `Int` or `Uint`.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Unsigned of any width.
    Uint(u64),
    /// Signed of any width.
    Int(i64),
    /// f32 or f64.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text (invalid bytes are an error).
    String(String),
    /// Homogeneous list of numbers or strings.
    Array(Vec<Value>),
}

/// GGML tensor types that headers may name; `Other` is refused where it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field's own names")]
#[expect(non_camel_case_types, reason = "the field's own names")]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Other(u32),
}

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Sizes, outermost first (rows, columns): GGUF's own order reversed.
    pub shape: Vec<usize>,
    /// Element format.
    pub kind: GgmlType,
    /// Absolute offset in the file, checked to be inside it.
    pub offset: u64,
    /// Bytes of data, checked to be inside the file; 0 for `Other`, whose size is not known.
    pub bytes: u64,
}

/// What a GGUF file says about itself.
#[derive(Debug, Clone, Default)]
pub struct Header {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Reads and checks the header of the file at `path`.
///
/// # Errors
/// What is wrong with the file, with the value and the limit.
pub fn read(path: &Path) -> Result<Header, HeaderError> {
    let file = File::open(path)?;
    let file_bytes = file.metadata()?.len();
    parse(BufReader::with_capacity(1 << 16, file), file_bytes)
}

impl GgmlType {
    /// The type that a tensor table names by number.
    pub fn from_id(id: u32) -> Self {
        match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            other => Self::Other(other),
        }
    }

    /// Elements in a block and bytes of a block; `None` where that is not known.
    pub fn block(self) -> Option<(u64, u64)> {
        Some(match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2_K => (256, 84),
            Self::Q3_K => (256, 110),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
            Self::Other(_) => return None,
        })
    }
}

impl Header {
    /// The metadata value at `key`.
    ///
    /// # Errors
    /// It is missing. The same holds for every getter below; each also names the key when the
    /// value is of another kind or out of range.
    pub fn value(&self, key: &str) -> Result<&Value, HeaderError> {
        self.metadata.get(key).ok_or_else(|| invalid(format!("metadata key {key} is missing")))
    }

    /// Whether `key` is there.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// A non-negative integer.
    pub fn u64(&self, key: &str) -> Result<u64, HeaderError> {
        match self.value(key)? {
            Value::Uint(value) => Ok(*value),
            Value::Int(value) => u64::try_from(*value)
                .map_err(|_| invalid(format!("metadata key {key} is {value}, less than 0"))),
            other => Err(wrong(key, "an integer", other)),
        }
    }

    /// A non-negative integer below 2³².
    pub fn u32(&self, key: &str) -> Result<u32, HeaderError> {
        let value = self.u64(key)?;
        u32::try_from(value)
            .map_err(|_| invalid(format!("metadata key {key} is {value}, above {}", u32::MAX)))
    }

    /// A number; integers are converted.
    pub fn f32(&self, key: &str) -> Result<f32, HeaderError> {
        match self.value(key)? {
            Value::Float(value) => Ok(*value as f32),
            Value::Uint(value) => Ok(*value as f32),
            Value::Int(value) => Ok(*value as f32),
            other => Err(wrong(key, "a number", other)),
        }
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<bool, HeaderError> {
        match self.value(key)? {
            Value::Bool(value) => Ok(*value),
            other => Err(wrong(key, "a boolean", other)),
        }
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str, HeaderError> {
        match self.value(key)? {
            Value::String(value) => Ok(value),
            other => Err(wrong(key, "a string", other)),
        }
    }

    /// A list of strings.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>, HeaderError> {
        self.array(key)?
            .iter()
            .map(|value| match value {
                Value::String(text) => Ok(text.as_str()),
                other => Err(wrong(key, "a list of strings", other)),
            })
            .collect()
    }

    /// A list of integers.
    pub fn integers(&self, key: &str) -> Result<Vec<i64>, HeaderError> {
        let number = |value: &Value| match value {
            Value::Int(number) => Ok(*number),
            Value::Uint(number) => i64::try_from(*number)
                .map_err(|_| invalid(format!("metadata key {key} holds {number}, too large"))),
            other => Err(wrong(key, "a list of integers", other)),
        };
        self.array(key)?.iter().map(number).collect()
    }

    /// A list of numbers.
    pub fn floats(&self, key: &str) -> Result<Vec<f32>, HeaderError> {
        let number = |value: &Value| match value {
            Value::Float(number) => Ok(*number as f32),
            other => Err(wrong(key, "a list of floats", other)),
        };
        self.array(key)?.iter().map(number).collect()
    }

    /// A list.
    pub fn array(&self, key: &str) -> Result<&[Value], HeaderError> {
        match self.value(key)? {
            Value::Array(values) => Ok(values),
            other => Err(wrong(key, "a list", other)),
        }
    }

    /// The tensor named `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, HeaderError> {
        self.tensors.get(name).ok_or_else(|| invalid(format!("tensor {name} is missing")))
    }
}

/// Reads a header from the first bytes of a file of `file_bytes`, wherever they come from.
///
/// # Errors
/// As [`read`].
pub fn parse(reader: impl Read, file_bytes: u64) -> Result<Header, HeaderError> {
    let mut source = Source::new(reader, file_bytes.min(HEADER_BYTES_MAX));
    if source.array::<4>("the magic number")? != *b"GGUF" {
        return Err(invalid("not a GGUF file: the magic number is missing"));
    }
    match source.u32("the version")? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => {
            return Err(invalid("a big-endian GGUF file: only little-endian ones are read"));
        }
        version => return Err(invalid(format!("GGUF version {version}: only 2 and 3 are read"))),
    }
    // A tensor takes at least 24 bytes of the table, a key at least 13.
    let tensors = source.count("tensors", TENSORS_MAX, 24)?;
    let keys = source.count("metadata keys", METADATA_MAX, 13)?;

    let mut header = Header::default();
    let mut elements = 0;
    for _ in 0..keys {
        let key = source.string("a metadata key", NAME_BYTES_MAX)?;
        let value = source.value(&key, &mut elements)?;
        match header.metadata.entry(key) {
            Entry::Occupied(entry) => {
                return Err(invalid(format!("metadata key {} appears twice", entry.key())));
            }
            Entry::Vacant(entry) => drop(entry.insert(value)),
        }
    }

    let alignment = alignment(&header)?;
    for _ in 0..tensors {
        let tensor = source.tensor(alignment)?;
        if let Some(first) = header.tensors.insert(tensor.name.clone(), tensor) {
            return Err(invalid(format!("tensor {} appears twice", first.name)));
        }
    }
    let data = source.position().next_multiple_of(alignment);
    for tensor in header.tensors.values_mut() {
        place(tensor, data, file_bytes)?;
    }
    Ok(header)
}

fn alignment(header: &Header) -> Result<u64, HeaderError> {
    if !header.has(ALIGNMENT_KEY) {
        return Ok(ALIGNMENT_DEFAULT);
    }
    let alignment = header.u64(ALIGNMENT_KEY)?;
    if !alignment.is_power_of_two() || alignment > ALIGNMENT_MAX {
        return Err(invalid(format!(
            "{ALIGNMENT_KEY} is {alignment}, not a power of two up to {ALIGNMENT_MAX}"
        )));
    }
    Ok(alignment)
}

/// Makes the offset absolute and checks that the tensor lies inside the file.
fn place(tensor: &mut TensorInfo, data: u64, file_bytes: u64) -> Result<(), HeaderError> {
    let end = data
        .checked_add(tensor.offset)
        .and_then(|start| start.checked_add(tensor.bytes))
        .filter(|end| *end <= file_bytes);
    if end.is_none() {
        return Err(invalid(format!(
            "tensor {} has {} bytes at {} of the data, which starts at {data}: past the end of \
             the file at {file_bytes}",
            tensor.name, tensor.bytes, tensor.offset
        )));
    }
    tensor.offset += data;
    Ok(())
}

/// Bytes of a tensor of `shape` (outermost first).
fn data_bytes(name: &str, kind: GgmlType, shape: &[usize]) -> Result<u64, HeaderError> {
    let Some((block, block_bytes)) = kind.block() else { return Ok(0) };
    let columns = shape.last().map_or(1, |columns| *columns as u64);
    if !columns.is_multiple_of(block) {
        return Err(invalid(format!(
            "tensor {name} is {kind:?} with rows of {columns}, not a multiple of {block}"
        )));
    }
    shape
        .iter()
        .try_fold(1u64, |product, size| product.checked_mul(*size as u64))
        .and_then(|elements| (elements / block).checked_mul(block_bytes))
        .ok_or_else(|| invalid(format!("tensor {name} with shape {shape:?} is too large")))
}

fn invalid(message: impl Into<String>) -> HeaderError {
    HeaderError::Invalid(message.into())
}

fn wrong(key: &str, wanted: &str, value: &Value) -> HeaderError {
    let found = match value {
        Value::Uint(_) | Value::Int(_) => "an integer",
        Value::Float(_) => "a float",
        Value::Bool(_) => "a boolean",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
    };
    invalid(format!("metadata key {key} is {found}, not {wanted}"))
}

#[cfg(test)]
mod tests;
