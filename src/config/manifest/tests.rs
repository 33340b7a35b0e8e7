//! What a manifest may say, and how its errors point at the place.

use std::fs;
use std::path::Path;

use super::{FileSource, Manifest, load, parse};
use crate::model::ModelTask;

const GOOD: &str = r#"name = "a-model"
aliases = ["Org/A-Model"]
task = "generate"
license = "MIT"
weight = 2.5
[limits]
context = 128
[objective]
latency_seconds = 3.5
[[files]]
file = "model.gguf"
sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
bytes = 10
sources = ["file:weights/m.gguf", "package:some-pkg==1.0/pkg/m.gguf"]
"#;

fn read(text: &str) -> Result<Manifest, String> {
    parse(Path::new("dir/m.toml"), text).map_err(|error| {
        assert_eq!(error.exit_code(), 78);
        error.to_string()
    })
}

#[test]
fn a_good_one_is_read_whole() {
    let manifest = read(GOOD).expect("good");
    assert_eq!((manifest.name.as_str(), manifest.task), ("a-model", ModelTask::Generate));
    assert_eq!((manifest.weight, manifest.preload), (2.5, true));
    assert_eq!((manifest.limits.context, manifest.limits.seats), (Some(128), None));
    assert_eq!(manifest.objective.latency_seconds, Some(3.5));
    let sources = &manifest.files[0].sources;
    assert_eq!(sources[0], "file:dir/weights/m.gguf", "relative to the manifest");
    assert_eq!(sources[1], "package:some-pkg==1.0/pkg/m.gguf");
}

#[test]
fn each_mistake_is_named_with_its_line() {
    let long = format!("name = \"{}\"", "x".repeat(97));
    for (old, new, line, says) in [
        ("name = \"a-model\"", "name = \"A-Model\"", 1, "lower-case"),
        ("name = \"a-model\"", "name = \"a/../b\"", 1, "name = "),
        ("name = \"a-model\"", "name = \"\"", 1, "name = "),
        ("name = \"a-model\"", "name = \"/a\"", 1, "name = "),
        ("name = \"a-model\"", "name = \"a b\"", 1, "name = "),
        ("name = \"a-model\"", long.as_str(), 1, "1 to 96"),
        ("name = \"a-model\"\n", "", 1, "missing field `name`"),
        ("[\"Org/A-Model\"]", "[\"ok\", \"\"]", 2, "aliases = "),
        (
            "\"generate\"",
            "\"paint\"",
            3,
            "expected one of `generate`, `embed`, `rerank`, `classify`",
        ),
        ("\"MIT\"", "\" \"", 4, "license"),
        ("2.5", "0", 5, "weight = 0: must be above 0 and at most 1000"),
        ("2.5", "1000.5", 5, "weight"),
        ("2.5", "nan", 5, "weight"),
        ("context = 128", "context = 0", 7, "limits.context = 0"),
        ("context = 128", "contxt = 1", 7, "expected `context` or `seats`"),
        ("latency_seconds = 3.5", "latency_seconds = 0", 9, "0: must be 0.001 to 86400"),
        ("latency_seconds", "latency_secs", 9, "expected `latency_seconds`"),
        ("\"model.gguf\"", "\"../model.gguf\"", 11, "files[0].file"),
        ("\"model.gguf\"", "\".ok\"", 11, "files[0].file"),
        ("0123456789abcdef0123", "0123456789ABCDEF0123", 12, "files[0].sha256"),
        ("0123456789abcdef0123", "0123", 12, "64 lower-case"),
        ("bytes = 10", "bytes = 0", 13, "files[0].bytes = 0"),
        ("bytes = 10", "bytes = -1", 13, ""),
        ("package:some-pkg==1.0/pkg/m.gguf", "hub:org/name", 14, "files[0].sources[1]"),
        ("package:some-pkg==1.0/", "package:some-pkg>=1.0/", 14, "NAME==VERSION"),
        ("package:some-pkg==1.0/", "package:--index==1.0/", 14, "NAME==VERSION"),
        ("==1.0/pkg/m.gguf", "==1.0/", 14, "MEMBER"),
        (
            "[\"file:weights/m.gguf\", \"package:some-pkg==1.0/pkg/m.gguf\"]",
            "[]",
            14,
            "at least one",
        ),
    ] {
        assert!(GOOD.contains(old), "{old}");
        let error = read(&GOOD.replace(old, new)).expect_err(new);
        assert!(error.starts_with(&format!("dir/m.toml:{line}: ")), "{new}: {error}");
        assert!(error.contains(says), "{new}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let no_files = GOOD.split("[[files]]").next().expect("a head");
    assert!(read(no_files).expect_err("no files").contains("files"));
    let twice = format!("{GOOD}[[files]]{}", GOOD.split("[[files]]").nth(1).expect("a file"));
    let error = read(&twice).expect_err("twice");
    assert!(error.starts_with("dir/m.toml:16: ") && error.contains("there twice"), "{error}");
}

#[test]
fn sources_are_addresses_that_mean_one_file() {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let hub = FileSource::Hub {
        repo: "Org/a.Model".into(),
        revision: commit.into(),
        path: "onnx/model.safetensors".into(),
    };
    let text = format!("hub:Org/a.Model@{commit}/onnx/model.safetensors");
    assert_eq!(FileSource::parse(&text), Ok(hub));
    let url = "https://models.example/a/b.gguf?version=1";
    assert_eq!(FileSource::parse(url), Ok(FileSource::Https(url.into())));
    for wrong in [
        "hub:Org/Model@main/model.gguf".to_owned(),
        format!("hub:Model@{commit}/model.gguf"),
        format!("hub:Org/Model@{commit}/../model.gguf"),
        format!("hub:Org/Model@{commit}/a b"),
        format!("hub:Org/Mo?del@{commit}/a"),
        "http://models.example/a".into(),
        "https://models.example".into(),
        "https://models.example/".into(),
        "https://user:password@models.example/a".into(),
        "https://models.example/a b".into(),
    ] {
        assert!(FileSource::parse(&wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_folder_is_read_in_order_of_names() {
    let dir = tempfile::tempdir().expect("a folder");
    let write = |file: &str, text: &str| fs::write(dir.path().join(file), text).expect("a file");
    write("1.toml", &GOOD.replace("a-model", "b-model").replace("Org/A", "Org/B"));
    write("2.toml", GOOD);
    write("notes.txt", "not a manifest");
    write(".3.toml", "not looked at");
    let found = load(dir.path(), true).expect("two manifests");
    let names: Vec<&str> = found.iter().map(|manifest| manifest.name.as_str()).collect();
    assert_eq!(names, ["a-model", "b-model"]);
    write(
        "4.toml",
        &GOOD.replace("Org/A-Model", "x").replace("a-model", "Org/B-Model").to_lowercase(),
    );
    load(dir.path(), true).expect("upper case makes another name");
    write("5.toml", &GOOD.replace("a-model", "c-model").replace("Org/A-Model", "b-model"));
    let error = load(dir.path(), true).expect_err("b-model twice").to_string();
    assert!(error.contains("5.toml") && error.contains("\"b-model\" is also used in"), "{error}");
}

#[test]
fn without_a_folder_the_built_in_ones_serve() {
    let nowhere = Path::new("/nonexistent/models");
    let built_in = load(nowhere, false).expect("built in");
    let shipped = load(Path::new("models"), true).expect("the source's own");
    assert_eq!(format!("{built_in:?}"), format!("{shipped:?}"));
    assert_eq!(built_in.len(), 2);
    assert_eq!(load(nowhere, true).expect_err("asked for").exit_code(), 66);
    let empty = tempfile::tempdir().expect("a folder");
    let error = load(empty.path(), true).expect_err("asked for");
    assert!(error.to_string().contains("no manifest"), "{error}");
    assert_eq!(load(empty.path(), false).expect("built in").len(), 2);
}

#[test]
fn the_shipped_models_fit_what_their_files_say() {
    let shipped = load(Path::new("models"), true).expect("the source's own");
    let by_name = |name: &str| shipped.iter().find(|one| one.name == name).expect("shipped");
    let minilm = by_name("all-minilm-l6-v2");
    assert_eq!((minilm.task, minilm.limits.context), (ModelTask::Embed, Some(256)));
    let files: Vec<&str> = minilm.files.iter().map(|file| file.file.as_str()).collect();
    assert_eq!(files, ["model.safetensors", "config.json", "tokenizer.json", "pooling.json"]);
    let chat = by_name("smollm2-135m-instruct");
    assert_eq!((chat.task, chat.files.len()), (ModelTask::Generate, 1));
    for file in shipped.iter().flat_map(|model| &model.files) {
        let source = FileSource::parse(&file.sources[0]).expect("a source");
        assert!(matches!(source, FileSource::Package { .. }), "{source:?}");
    }
}
