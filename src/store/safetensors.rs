//! A bounded reader for safetensors headers: the tensor table. Trusts nothing in the file.

pub mod index;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::HeaderError;

/// Longest header, as the format itself limits it.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most tensors.
pub const TENSORS_MAX: usize = 1 << 18;
/// Most dimensions of a tensor.
pub const DIMENSIONS_MAX: usize = 8;
/// Longest tensor name.
pub const NAME_BYTES_MAX: usize = 1024;

/// Element formats that headers may name; `Other` is refused where it is used.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// 64-bit integer (position ids and the like).
    I64,
    /// Anything else, by its name.
    Other(String),
}

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Element format.
    pub dtype: DType,
    /// Absolute offset in the file, checked to be inside it.
    pub offset: u64,
    /// Bytes of data, checked against shape and format.
    pub bytes: u64,
}

/// Reads and checks the header of the file at `path`; tensors by name.
///
/// # Errors
/// What is wrong with the file, with the value and the limit.
pub fn read(path: &Path) -> Result<BTreeMap<String, TensorInfo>, HeaderError> {
    let file = File::open(path)?;
    let file_bytes = file.metadata()?.len();
    parse(file, file_bytes)
}

impl DType {
    /// The format that a header names.
    pub fn from_name(name: &str) -> Self {
        match name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::BF16,
            "I64" => Self::I64,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Bytes of an element; `None` where that is not known.
    pub fn bytes(&self) -> Option<u64> {
        Some(match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::I64 => 8,
            Self::Other(name) => match name.as_str() {
                "F64" | "U64" | "C64" => 8,
                "I32" | "U32" => 4,
                "I16" | "U16" => 2,
                "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => 1,
                _ => return None,
            },
        })
    }
}

/// Reads a header from the first bytes of a file of `file_bytes`, wherever they come from.
///
/// # Errors
/// As [`read`].
pub fn parse(
    mut reader: impl Read,
    file_bytes: u64,
) -> Result<BTreeMap<String, TensorInfo>, HeaderError> {
    if file_bytes < 8 {
        return Err(invalid(format!("a safetensors file of {file_bytes} bytes: at least 8")));
    }
    let mut length = [0; 8];
    reader.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    let most = HEADER_BYTES_MAX.min(file_bytes - 8);
    if length > most {
        return Err(invalid(format!(
            "a header of {length} bytes; the limit is {HEADER_BYTES_MAX}, and the file has \
             {file_bytes}"
        )));
    }
    let mut text = vec![0; length as usize];
    reader.read_exact(&mut text)?;
    if text.first() != Some(&b'{') {
        return Err(invalid("the header does not start with {"));
    }
    let table: Table = serde_json::from_slice(&text)
        .map_err(|error| invalid(format!("the header cannot be read: {error}")))?;

    let data = length + 8;
    let mut tensors = BTreeMap::new();
    for (name, entry) in table.entries {
        let tensor = entry.check(name, data, file_bytes)?;
        tensors.insert(tensor.name.clone(), tensor);
    }
    Ok(tensors)
}

/// The header's JSON object, names not yet checked against the file.
struct Table {
    entries: BTreeMap<String, TableEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TableEntry {
    dtype: String,
    #[serde(deserialize_with = "bounded_shape")]
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl TableEntry {
    fn check(self, name: String, data: u64, file_bytes: u64) -> Result<TensorInfo, HeaderError> {
        let (start, end) = self.data_offsets;
        let most = file_bytes - data;
        if start > end || end > most {
            return Err(invalid(format!(
                "tensor {name} lies at {start}..{end} of {most} bytes of data"
            )));
        }
        let bytes = end - start;
        let dtype = DType::from_name(&self.dtype);
        if let Some(element_bytes) = dtype.bytes() {
            let needed = self
                .shape
                .iter()
                .try_fold(element_bytes, |product, size| product.checked_mul(*size as u64));
            if needed != Some(bytes) {
                return Err(invalid(format!(
                    "tensor {name} of {} with shape {:?} has {bytes} bytes",
                    self.dtype, self.shape
                )));
            }
        }
        Ok(TensorInfo { name, shape: self.shape, dtype, offset: data + start, bytes })
    }
}

/// Reads the object entry by entry, so that a name that appears twice is seen.
impl<'de> Deserialize<'de> for Table {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Table;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Table, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if name.len() > NAME_BYTES_MAX || entries.len() == TENSORS_MAX {
                        return Err(A::Error::custom(format!(
                            "names have at most {NAME_BYTES_MAX} bytes, and there are at most \
                             {TENSORS_MAX} of them"
                        )));
                    }
                    let entry = map.next_value()?;
                    if entries.insert(name.clone(), entry).is_some() {
                        return Err(A::Error::custom(format!("tensor {name} appears twice")));
                    }
                }
                Ok(Table { entries })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

fn bounded_shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct Shape;
    impl<'de> Visitor<'de> for Shape {
        type Value = Vec<usize>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {DIMENSIONS_MAX} sizes")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<usize>, A::Error> {
            let mut sizes = Vec::with_capacity(4);
            while let Some(size) = list.next_element()? {
                if sizes.len() == DIMENSIONS_MAX {
                    return Err(A::Error::invalid_length(DIMENSIONS_MAX + 1, &self));
                }
                sizes.push(size);
            }
            Ok(sizes)
        }
    }
    deserializer.deserialize_seq(Shape)
}

fn invalid(message: impl Into<String>) -> HeaderError {
    HeaderError::Invalid(message.into())
}

#[cfg(test)]
mod tests;
