//! Indexes from strangers: refused with what is wrong, or read.

use super::parse;

fn refusal(text: &str) -> String {
    parse(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn an_index_says_where_tensors_are() {
    let text = r#"{"metadata":{"total_size":8,"x":[{}]},"weight_map":{
        "a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    let files = parse(text.as_bytes()).unwrap();
    assert_eq!(files["a"], "model-00001-of-00002.safetensors");
    assert_eq!(files.len(), 2);
}

#[test]
fn what_is_wrong_is_said() {
    assert!(refusal("{}").contains("weight_map"));
    assert!(refusal("[]").contains("cannot be read"));
    assert!(refusal(r#"{"weight_map":{"a":1}}"#).contains("cannot be read"));
    assert!(
        refusal(r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#).contains("twice")
    );
    for name in
        ["../x.safetensors", "/x.safetensors", ".x.safetensors", "x.bin", "", "a b.safetensors"]
    {
        let text = serde_json::json!({ "weight_map": { "a": name } }).to_string();
        assert!(refusal(&text).contains("plain file name"), "{name}");
    }
    let many: serde_json::Map<_, _> =
        (0..1025).map(|i| (format!("t{i}"), format!("{i}.safetensors").into())).collect();
    let text = serde_json::json!({ "weight_map": many }).to_string();
    assert!(refusal(&text).contains("1025 files"));
    let long = "a".repeat(2000);
    let text = serde_json::json!({ "weight_map": { long: "x.safetensors" } }).to_string();
    assert!(refusal(&text).contains("at most 1024"));
}

/// Pieces of an index in any order do no harm.
#[test]
fn nonsense_is_refused_without_a_panic() {
    let parts = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"weight_map\"",
        "\"a\"",
        "\"x.safetensors\"",
        "1e999",
        "null",
        "\"\\ud800\"",
        "\u{0}",
    ];
    let mut seed = 9u64;
    for _ in 0..20_000 {
        let mut text = String::new();
        for _ in 0..12 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            text += parts[(seed >> 33) as usize % parts.len()];
        }
        let _ = parse(text.as_bytes());
    }
}
