//! Small files, honest and not; knows the format, not what models put into it.

use super::*;

const HONEST: &str = r#"{"__metadata__":{"format":"pt"},
    "a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
    "b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},
    "ids":{"dtype":"I64","shape":[1,1],"data_offsets":[32,40]},
    "scalar":{"dtype":"F16","shape":[],"data_offsets":[40,42]},
    "odd":{"dtype":"F4","shape":[7],"data_offsets":[42,46]}}  "#;

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn parse_bytes(bytes: &[u8]) -> Result<BTreeMap<String, TensorInfo>, HeaderError> {
    parse(bytes, bytes.len() as u64)
}

fn refusal(header: &str) -> String {
    parse_bytes(&file(header, 64)).expect_err("must be refused").to_string()
}

#[test]
fn reads_the_table() {
    let bytes = file(HONEST, 46);
    let tensors = parse_bytes(&bytes).unwrap();
    let data = bytes.len() as u64 - 46;
    assert_eq!(tensors.len(), 5);
    let a = &tensors["a"];
    assert_eq!((a.shape.as_slice(), &a.dtype), ([2, 3].as_slice(), &DType::F32));
    assert_eq!((a.offset, a.bytes), (data, 24));
    assert_eq!((tensors["ids"].offset, tensors["ids"].dtype.clone()), (data + 32, DType::I64));
    assert_eq!(tensors["scalar"].bytes, 2);
    assert_eq!(tensors["odd"].dtype, DType::Other("F4".into()));

    let temporary = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(temporary.path(), &bytes).unwrap();
    assert_eq!(read(temporary.path()).unwrap(), tensors);
}

#[test]
fn lengths_are_not_believed() {
    for length in [47, HEADER_BYTES_MAX, HEADER_BYTES_MAX + 1, u64::MAX] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend([b'{'; 46]);
        assert!(parse_bytes(&bytes).unwrap_err().to_string().contains("a header of"), "{length}");
    }
    assert!(parse_bytes(&[1, 0, 0]).is_err());
    assert!(parse_bytes(&[0; 8]).unwrap_err().to_string().contains("start with {"));
}

#[test]
fn refuses_what_does_not_fit() {
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    assert!(parse_bytes(&file(&tensor("F32", "[2]", "[8,16]"), 64)).is_ok());
    assert!(refusal(&tensor("F32", "[2]", "[8,15]")).contains("has 7 bytes"));
    assert!(refusal(&tensor("I8", "[2]", "[0,1]")).contains("has 1 bytes"));
    assert!(refusal(&tensor("F32", "[2]", "[60,68]")).contains("of 64 bytes of data"));
    assert!(refusal(&tensor("F32", "[2]", "[16,8]")).contains("lies at 16..8"));
    assert!(refusal(&tensor("F32", "[4294967296,4294967296]", "[0,8]")).contains("has 8 bytes"));
    assert!(refusal(&tensor("F32", "[-1]", "[0,4]")).contains("cannot be read"));
    assert!(refusal(&tensor("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]")).contains("at most 8 sizes"));
    assert!(refusal(&tensor("F32", "[1.5]", "[0,4]")).contains("cannot be read"));
    assert!(refusal(r#"{"t":{"dtype":"F32"}}"#).contains("missing field"));
    assert!(refusal(r#"{"t":1}"#).contains("cannot be read"));
    assert!(refusal("[]").contains("start with {"));
    assert!(refusal("{} {}").contains("trailing"));
    let entry = r#""t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    assert!(refusal(&format!("{{{entry},{entry}}}")).contains("t appears twice"));
    let nested = format!(r#"{{"__metadata__":{}}}"#, "[".repeat(100_000));
    assert!(refusal(&nested).contains("cannot be read"));
    let long = format!(r#"{{"{}":{{}}}}"#, "n".repeat(2000));
    assert!(refusal(&long).contains("at most 1024 bytes"));
}

#[test]
fn every_truncation_is_refused() {
    let bytes = file(HONEST, 46);
    for length in 0..bytes.len() {
        assert!(parse_bytes(&bytes[..length]).is_err(), "{length}");
    }
}

#[test]
fn damage_never_panics() {
    let honest = file(HONEST, 46);
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut accepted = 0;
    for _ in 0..20_000 {
        let mut bytes = honest.clone();
        for _ in 0..=next() % 3 {
            let place = next() as usize % bytes.len();
            bytes[place] = if next() % 2 == 0 { next() as u8 } else { bytes[place] ^ 1 };
        }
        let Ok(tensors) = parse_bytes(&bytes) else { continue };
        accepted += 1;
        for tensor in tensors.values() {
            assert!(tensor.offset + tensor.bytes <= bytes.len() as u64);
        }
    }
    assert!(accepted > 1_000, "{accepted}");
}
