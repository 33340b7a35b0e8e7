//! Small files, honest and not; knows the format, not what models put into it.

use super::*;

/// Builds small GGUF files, honest or not.
struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn new(version: u32, tensors: u64, keys: u64) -> Self {
        let mut writer = Self { bytes: b"GGUF".to_vec() };
        writer.u32(version).u64(tensors).u64(keys);
        writer
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn string(&mut self, text: &str) -> &mut Self {
        self.u64(text.len() as u64);
        self.bytes.extend(text.as_bytes());
        self
    }

    fn key(&mut self, key: &str, kind: u32) -> &mut Self {
        self.string(key).u32(kind)
    }

    fn list(&mut self, key: &str, kind: u32, count: u64) -> &mut Self {
        self.key(key, 9).u32(kind).u64(count)
    }

    fn tensor(&mut self, name: &str, sizes: &[u64], kind: u32, offset: u64) -> &mut Self {
        self.string(name).u32(sizes.len() as u32);
        for size in sizes {
            self.u64(*size);
        }
        self.u32(kind).u64(offset)
    }

    fn data(&mut self, alignment: usize, bytes: usize) -> Vec<u8> {
        let start = self.bytes.len().next_multiple_of(alignment);
        self.bytes.resize(start + bytes, 7);
        std::mem::take(&mut self.bytes)
    }
}

fn parse_bytes(bytes: &[u8]) -> Result<Header, HeaderError> {
    parse(bytes, bytes.len() as u64)
}

fn refusal(bytes: &[u8]) -> String {
    parse_bytes(bytes).expect_err("must be refused").to_string()
}

/// One key of every type, two tensors.
fn sample() -> Vec<u8> {
    let mut file = Writer::new(3, 2, 15);
    file.key("u8", 0).bytes.push(200);
    file.key("i8", 1).bytes.push(0xff);
    file.key("u16", 2).bytes.extend(60_000u16.to_le_bytes());
    file.key("i16", 3).bytes.extend((-2i16).to_le_bytes());
    file.key("u32", 4).u32(4_000_000_000);
    file.key("i32", 5).u32((-3i32) as u32);
    file.key("f32", 6).u32(1e-5f32.to_bits());
    file.key("bool", 7).bytes.push(1);
    file.key("str", 8).string("héllo");
    file.key("u64", 10).u64(1 << 40);
    file.key("i64", 11).u64((-4i64) as u64);
    file.key("f64", 12).u64(0.25f64.to_bits());
    file.list("strings", 8, 2).string("Ġa").string("");
    file.list("numbers", 5, 2).u32(3).u32(1);
    file.key("general.alignment", 4).u32(64);
    file.tensor("a.weight", &[64, 3], 3, 0); // Q4_1: 6 blocks of 20 bytes
    file.tensor("b.weight", &[5], 0, 128);
    file.data(64, 148)
}

#[test]
fn reads_every_type() {
    let bytes = sample();
    let header = parse_bytes(&bytes).unwrap();
    assert_eq!(header.u32("u8").unwrap(), 200);
    assert_eq!(header.metadata["i8"], Value::Int(-1));
    assert_eq!(header.u32("u16").unwrap(), 60_000);
    assert_eq!(header.metadata["i16"], Value::Int(-2));
    assert_eq!(header.u32("u32").unwrap(), 4_000_000_000);
    assert_eq!(header.metadata["i32"], Value::Int(-3));
    assert_eq!(header.f32("f32").unwrap(), 1e-5);
    assert!(header.bool("bool").unwrap());
    assert_eq!(header.str("str").unwrap(), "héllo");
    assert_eq!(header.u64("u64").unwrap(), 1 << 40);
    assert_eq!(header.metadata["i64"], Value::Int(-4));
    assert_eq!(header.f32("f64").unwrap(), 0.25);
    assert_eq!(header.strings("strings").unwrap(), ["Ġa", ""]);
    assert_eq!(header.integers("numbers").unwrap(), [3, 1]);

    let start = bytes.len() as u64 - 148;
    assert_eq!(start % 64, 0);
    let a = header.tensor("a.weight").unwrap();
    assert_eq!((a.shape.as_slice(), a.kind), ([3, 64].as_slice(), GgmlType::Q4_1));
    assert_eq!((a.offset, a.bytes), (start, 120));
    let b = header.tensor("b.weight").unwrap();
    assert_eq!((b.offset, b.bytes), (start + 128, 20));
}

#[test]
fn reads_from_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), sample()).unwrap();
    assert_eq!(read(file.path()).unwrap().tensors.len(), 2);
    assert!(matches!(read(Path::new("/nowhere/at/all")), Err(HeaderError::Io(_))));
}

#[test]
fn getters_name_the_key() {
    let header = parse_bytes(&sample()).unwrap();
    let error = |result: Result<u32, HeaderError>| result.unwrap_err().to_string();
    assert_eq!(error(header.u32("llama.block_count")), "metadata key llama.block_count is missing");
    assert_eq!(error(header.u32("str")), "metadata key str is a string, not an integer");
    assert_eq!(error(header.u32("i8")), "metadata key i8 is -1, less than 0");
    assert!(error(header.u32("u64")).contains("metadata key u64 is 1099511627776, above"));
    assert!(header.strings("numbers").unwrap_err().to_string().contains("numbers"));
    assert!(header.integers("strings").unwrap_err().to_string().contains("strings"));
    assert!(header.f32("bool").is_err() && header.bool("u8").is_err() && header.str("u8").is_err());
}

#[test]
fn version_two_is_the_same_layout() {
    let mut bytes = sample();
    bytes[4] = 2;
    assert_eq!(parse_bytes(&bytes).unwrap().tensors.len(), 2);
    bytes[4] = 1;
    assert!(refusal(&bytes).contains("version 1"));
    bytes[4] = 4;
    assert!(refusal(&bytes).contains("version 4"));
    bytes[4..8].copy_from_slice(&[0, 0, 0, 3]);
    assert!(refusal(&bytes).contains("big-endian"));
    assert!(refusal(b"GGML\x03\0\0\0").contains("magic"));
}

#[test]
fn counts_are_not_believed() {
    assert!(refusal(&Writer::new(3, u64::MAX, 0).data(1, 0)).contains("tensors"));
    assert!(refusal(&Writer::new(3, 0, u64::MAX).data(1, 0)).contains("metadata keys"));
    for count in [3, ARRAY_LENGTH_MAX, u64::MAX / 8, u64::MAX] {
        let bytes = Writer::new(3, 0, 1).list("k", 8, count).data(1, 16);
        assert!(refusal(&bytes).contains("elements of k"), "{count}");
    }
    for length in [17, STRING_BYTES_MAX, STRING_BYTES_MAX + 1, u64::MAX] {
        let bytes = Writer::new(3, 0, 1).key("k", 8).u64(length).data(1, 16);
        assert!(refusal(&bytes).contains("k of"), "{length}");
    }
    let bytes = Writer::new(3, 0, 1).string(&"k".repeat(300)).data(1, 64);
    assert!(refusal(&bytes).contains("limit is 256"));
}

#[test]
fn lists_are_bounded_together() {
    let each = ARRAY_LENGTH_MAX;
    let mut file = Writer::new(3, 0, 3);
    for key in ["a", "b", "c"] {
        file.list(key, 0, each);
        let length = file.bytes.len() + each as usize;
        file.bytes.resize(length, 0);
    }
    assert!(refusal(&file.bytes).contains("list elements at c"));
}

#[test]
fn a_header_is_bounded_whatever_the_file() {
    let bytes = sample();
    let mut source = Source::new(bytes.as_slice(), 20);
    source.array::<4>("magic").unwrap();
    assert!(source.array::<17>("more").unwrap_err().to_string().contains("16 are left"));
    // The file got shorter while it was read.
    assert!(parse(&bytes[..60], bytes.len() as u64).is_err());
}

#[test]
fn refuses_malformed_metadata() {
    let bytes = Writer::new(3, 0, 1).key("k", 13).data(1, 64);
    assert!(refusal(&bytes).contains("unknown type 13"));
    let bytes = Writer::new(3, 0, 1).list("k", 9, 1).data(1, 64);
    assert!(refusal(&bytes).contains("or of lists"));
    let bytes = Writer::new(3, 0, 1).key("k", 7).data(1, 64);
    assert!(refusal(&bytes).contains("boolean 7"));
    let mut file = Writer::new(3, 0, 2);
    file.key("k", 4).u32(1).key("k", 4).u32(2);
    assert!(refusal(&file.bytes).contains("k appears twice"));
    let mut file = Writer::new(3, 0, 1);
    file.key("k", 8).u64(2).bytes.extend([0xc3, 0x28]);
    assert!(refusal(&file.bytes).contains("utf-8"));
}

#[test]
fn refuses_malformed_tensors() {
    let one = |sizes: &[u64], kind, offset| {
        Writer::new(3, 1, 0).tensor("t", sizes, kind, offset).data(32, 64)
    };
    assert!(parse_bytes(&one(&[16], 0, 0)).is_ok());
    assert!(refusal(&one(&[17], 0, 0)).contains("past the end"));
    assert!(refusal(&one(&[16], 0, 32)).contains("past the end"));
    assert!(refusal(&one(&[1], 0, u64::MAX - 31)).contains("past the end"));
    assert!(refusal(&one(&[1], 0, 8)).contains("not aligned"));
    assert!(refusal(&one(&[0, 4], 0, 0)).contains("out of range"));
    assert!(refusal(&one(&[16, 2], 2, 0)).contains("not a multiple of 32"));
    assert!(refusal(&one(&[1 << 32, 1 << 32], 0, 0)).contains("too large"));
    assert!(refusal(&one(&[1 << 62, 1], 0, 0)).contains("too large"));
    assert!(refusal(&one(&[1; 5], 0, 0)).contains("5 dimensions"));
    let unknown = parse_bytes(&one(&[16], 99, 32)).unwrap();
    assert_eq!(unknown.tensors["t"].kind, GgmlType::Other(99));

    let mut file = Writer::new(3, 2, 0);
    let bytes = file.tensor("t", &[1], 0, 0).tensor("t", &[1], 0, 0).data(32, 64);
    assert!(refusal(&bytes).contains("t appears twice"));
    for alignment in [0, 3, 48, 1 << 30] {
        let mut file = Writer::new(3, 0, 1);
        let bytes = file.key("general.alignment", 4).u32(alignment).data(1, 64);
        assert!(refusal(&bytes).contains("not a power of two"), "{alignment}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sample();
    for length in 0..bytes.len() {
        assert!(parse_bytes(&bytes[..length]).is_err(), "{length} of {}", bytes.len());
    }
}

/// Whatever is read stays inside the file and within what the bytes can justify.
#[test]
fn damage_never_panics() {
    let honest = sample();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut accepted = 0;
    for _ in 0..20_000 {
        let mut bytes = honest.clone();
        for _ in 0..=next() % 4 {
            let place = next() as usize % bytes.len();
            match next() % 3 {
                0 => bytes[place] ^= 1 << (next() % 8),
                1 => bytes[place] = next() as u8,
                _ => {
                    let end = (place + 8).min(bytes.len());
                    bytes[place..end].fill(if next() % 2 == 0 { 0xff } else { 0 });
                }
            }
        }
        let Ok(header) = parse_bytes(&bytes) else { continue };
        accepted += 1;
        for tensor in header.tensors.values() {
            assert!(tensor.offset + tensor.bytes <= bytes.len() as u64);
        }
        for value in header.metadata.values() {
            if let Value::Array(values) = value {
                assert!(values.capacity() <= bytes.len());
            }
        }
    }
    // Damage in the values themselves is not visible: the rest of the file must still be read.
    assert!(accepted > 1_000, "{accepted}");
}
