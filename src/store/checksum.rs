//! Checksums of what is read or fetched. Knows neither where it comes from nor where it goes.

use std::io::{ErrorKind, Read};

use sha2::{Digest, Sha256};

use super::error::Failure;
use super::progress::Meter;

const CHUNK_BYTES: usize = 1 << 20;

/// Reads `input`, which should have `bytes` bytes, through `sink`; its SHA-256 in hexadecimal.
pub(super) fn digest(
    input: &mut dyn Read,
    bytes: u64,
    meter: &mut Meter<'_>,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<String, Failure> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut left = bytes;
    loop {
        if meter.stopped() {
            return Err(Failure::Stopped);
        }
        let count = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(Failure::Absent(format!("damaged: {error}"))),
        };
        // Never write more than was promised, whatever a compressed stream unfolds to.
        left = left.checked_sub(count as u64).ok_or_else(|| {
            Failure::Wrong(format!("wrong size: expected {bytes} bytes, found more"))
        })?;
        hasher.update(&buffer[..count]);
        sink(&buffer[..count])?;
        meter.advance(count as u64);
    }
    if left > 0 {
        let found = bytes - left;
        return Err(Failure::Wrong(format!("wrong size: expected {bytes} bytes, found {found}")));
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Compares checksums.
pub(super) fn same(found: &str, expected: &str) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    Err(Failure::Wrong(format!("wrong checksum: expected sha256 {expected}, found {found}")))
}
