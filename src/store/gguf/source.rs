//! The bytes of a GGUF header, read piece by piece: nothing is allocated for a length that the
//! rest of the file cannot hold. Knows the format's types, not what keys mean.

use std::io::{ErrorKind, Read};

use super::{
    ARRAY_LENGTH_MAX, DIMENSIONS_MAX, ELEMENTS_MAX, GgmlType, HEADER_BYTES_MAX, HeaderError,
    NAME_BYTES_MAX, STRING_BYTES_MAX, TensorInfo, Value, data_bytes, invalid,
};

/// A reader that knows how far it may go.
pub(super) struct Source<R> {
    reader: R,
    position: u64,
    end: u64,
}

impl<R: Read> Source<R> {
    /// Reads up to `end` bytes.
    pub(super) fn new(reader: R, end: u64) -> Self {
        Self { reader, position: 0, end }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    fn left(&self) -> u64 {
        self.end - self.position
    }

    /// Refuses to read more than is left.
    fn claim(&mut self, what: &str, bytes: u64) -> Result<(), HeaderError> {
        let left = self.left();
        if bytes > left {
            return Err(invalid(format!(
                "{what} takes {bytes} bytes at {}, and {left} are left of the file or of the \
                 {HEADER_BYTES_MAX} that a header may have",
                self.position
            )));
        }
        self.position += bytes;
        Ok(())
    }

    fn fill(&mut self, what: &str, buffer: &mut [u8]) -> Result<(), HeaderError> {
        self.claim(what, buffer.len() as u64)?;
        self.reader.read_exact(buffer).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => invalid(format!("the file ends inside {what}")),
            _ => HeaderError::Io(error),
        })
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], HeaderError> {
        let mut buffer = [0; N];
        self.fill(what, &mut buffer)?;
        Ok(buffer)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, HeaderError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, HeaderError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things of at least `least` bytes each.
    pub(super) fn count(&mut self, what: &str, limit: u64, least: u64) -> Result<u64, HeaderError> {
        let count = self.u64(what)?;
        let most = limit.min(self.left() / least);
        if count > most {
            return Err(invalid(format!(
                "the file claims {count} {what}; the limit is {limit}, and the bytes that are \
                 left hold at most {most}"
            )));
        }
        Ok(count)
    }

    pub(super) fn string(&mut self, what: &str, limit: u64) -> Result<String, HeaderError> {
        let length = self.u64(what)?;
        if length > limit {
            return Err(invalid(format!("{what} of {length} bytes; the limit is {limit}")));
        }
        if length > self.left() {
            return Err(invalid(format!("{what} of {length} bytes; {} are left", self.left())));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(what, &mut bytes)?;
        String::from_utf8(bytes).map_err(|error| {
            invalid(format!("{what}: {error}, {} bytes before the end", self.left()))
        })
    }

    pub(super) fn value(&mut self, key: &str, elements: &mut u64) -> Result<Value, HeaderError> {
        let kind = self.u32(key)?;
        if kind != 9 {
            return self.scalar(key, kind);
        }
        let kind = self.u32(key)?;
        let least = scalar_bytes(kind).ok_or_else(|| {
            invalid(format!("metadata key {key} is a list of unknown type {kind}, or of lists"))
        })?;
        let count = self.count(&format!("elements of {key}"), ARRAY_LENGTH_MAX, least)?;
        *elements += count;
        if *elements > ELEMENTS_MAX {
            return Err(invalid(format!("more than {ELEMENTS_MAX} list elements at {key}")));
        }
        let mut values = Vec::with_capacity(count as usize);
        for _ in 0..count {
            values.push(self.scalar(key, kind)?);
        }
        Ok(Value::Array(values))
    }

    fn scalar(&mut self, key: &str, kind: u32) -> Result<Value, HeaderError> {
        Ok(match kind {
            0 => Value::Uint(u64::from(u8::from_le_bytes(self.array(key)?))),
            1 => Value::Int(i64::from(i8::from_le_bytes(self.array(key)?))),
            2 => Value::Uint(u64::from(u16::from_le_bytes(self.array(key)?))),
            3 => Value::Int(i64::from(i16::from_le_bytes(self.array(key)?))),
            4 => Value::Uint(u64::from(self.u32(key)?)),
            5 => Value::Int(i64::from(i32::from_le_bytes(self.array(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            7 => match self.array(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(invalid(format!("metadata key {key} is boolean {other}"))),
            },
            8 => Value::String(self.string(key, STRING_BYTES_MAX)?),
            10 => Value::Uint(self.u64(key)?),
            11 => Value::Int(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(invalid(format!("metadata key {key} has unknown type {other}"))),
        })
    }

    /// One line of the tensor table; the offset is still relative to the data.
    pub(super) fn tensor(&mut self, alignment: u64) -> Result<TensorInfo, HeaderError> {
        let name = self.string("a tensor name", NAME_BYTES_MAX)?;
        let dimensions = self.u32(&name)?;
        if dimensions > DIMENSIONS_MAX {
            return Err(invalid(format!(
                "tensor {name} has {dimensions} dimensions; the limit is {DIMENSIONS_MAX}"
            )));
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            match usize::try_from(self.u64(&name)?) {
                Ok(size) if size > 0 => shape.push(size),
                _ => return Err(invalid(format!("tensor {name} has a dimension out of range"))),
            }
        }
        shape.reverse();
        let kind = GgmlType::from_id(self.u32(&name)?);
        let offset = self.u64(&name)?;
        if !offset.is_multiple_of(alignment) {
            return Err(invalid(format!(
                "tensor {name} at {offset} is not aligned to {alignment}"
            )));
        }
        let bytes = data_bytes(&name, kind, &shape)?;
        Ok(TensorInfo { name, shape, kind, offset, bytes })
    }
}

/// Fewest bytes of a value of type `kind`; `None` for lists and unknown types.
fn scalar_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        8 | 10..=12 => Some(8),
        _ => None,
    }
}
