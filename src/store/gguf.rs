//! A bounded reader for GGUF headers (versions 2 and 3): metadata and tensor table. Trusts
//! nothing in the file; every length is checked against what is left before it is believed.

use std::collections::BTreeMap;
use std::path::Path;

use super::HeaderError;

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
#[expect(missing_docs, clippy::upper_case_acronyms, reason = "the field's own names")]
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
    /// Bytes of data, checked to be inside the file.
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
#[expect(unused_variables, reason = "skeleton")]
pub fn read(path: &Path) -> Result<Header, HeaderError> {
    Ok(Header::default())
}
