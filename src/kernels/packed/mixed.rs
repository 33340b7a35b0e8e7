//! Matrices whose rows are encoded in different ways: files mix formats within what is one matrix
//! here (q, k and v). Knows no file.

use super::blocks::LARGE;
use super::{Encoding, GROUP, PackError, Packed, PackedFormat};

impl Packed {
    /// As [`Packed::from_rows`] with rows of several encodings, in a format that keeps all of them
    /// exactly: `row(r)` gives also the encoding of row `r`.
    ///
    /// # Errors
    /// As [`Packed::from_rows`], or there is no such format.
    pub fn from_mixed_rows<'r>(
        n: usize,
        k: usize,
        row: impl Fn(usize) -> (Encoding, &'r [u8]),
    ) -> Result<Self, PackError> {
        let first = if n == 0 { Encoding::F32 } else { row(0).0 };
        let mut format = first.packed();
        for r in 1..n {
            let encoding = row(r).0;
            let both = format.common(encoding.packed());
            format = both.ok_or(PackError::Mixture(first, encoding))?;
        }
        Self::pack(n, k, format, row)
    }

    /// As [`Packed::from_rows_as`] with rows of several encodings of floats.
    ///
    /// # Errors
    /// As [`Packed::from_rows_as`].
    pub fn from_mixed_rows_as<'r>(
        n: usize,
        k: usize,
        format: PackedFormat,
        row: impl Fn(usize) -> (Encoding, &'r [u8]),
    ) -> Result<Self, PackError> {
        let quantised = |r: &usize| row(*r).0.packed() != PackedFormat::F32;
        if let Some(r) = (0..n).find(quantised) {
            return Err(PackError::Format(row(r).0, format));
        }
        Self::pack(n, k, format, row)
    }
}

impl PackedFormat {
    /// The format that keeps what this one and `other` keep.
    pub fn common(self, other: Self) -> Option<Self> {
        match (self.block(), other.block()) {
            _ if self == other => Some(self),
            (GROUP, GROUP) => Some(PackedFormat::Q8Minimum),
            (LARGE, LARGE) => Some(PackedFormat::K8Halves),
            _ => None,
        }
    }
}
