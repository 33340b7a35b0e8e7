//! Safetensors headers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sconce::store::safetensors::parse;

fuzz_target!(|data: &[u8]| {
    let file_bytes = data.len() as u64 + (1 << 20);
    let Ok(tensors) = parse(data, file_bytes) else { return };
    for tensor in tensors.values() {
        assert!(tensor.offset + tensor.bytes <= file_bytes, "{tensor:?} lies outside the file");
    }
});
