//! The command line from outside: help, mistakes and their exit codes, the environment that a
//! cluster injects.

use std::path::Path;
use std::process::{Command, Output};

fn sconce(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
    command.args(arguments).envs(environment.iter().copied());
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env("COLUMNS", "100");
    command.output().expect("the binary starts")
}

fn root(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Compares with a committed file, or writes it if `SCONCE_UPDATE_GOLDEN` is set.
fn same_as_committed(path: &str, text: &str) {
    if std::env::var_os("SCONCE_UPDATE_GOLDEN").is_some() {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join(path), text).unwrap();
    }
    assert!(text == root(path), "{path} differs; SCONCE_UPDATE_GOLDEN=1 rewrites it:\n{text}");
}

#[test]
fn the_help_is_what_was_agreed() {
    let output = sconce(&["--help"], &[]);
    assert!(output.status.success());
    same_as_committed("tests/golden/help.txt", &String::from_utf8(output.stdout).unwrap());
}

#[test]
fn mistakes_are_one_line_with_a_sysexits_code() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sconce.toml");
    std::fs::write(&file, "[server]\nprot = 80\n").unwrap();
    let file = file.to_str().unwrap();
    type Strings<'a> = &'a [&'a str];
    type Pairs<'a> = &'a [(&'a str, &'a str)];
    let cases: [(Strings<'_>, Pairs<'_>, i32, &str); 8] = [
        (&["serve", "--no-such-flag"], &[], 64, "--no-such-flag"),
        (&["--prot", "80"], &[], 64, "found; a similar argument exists: '--port'; see"),
        (&["completions"], &[], 64, "not provided: <SHELL>; see"),
        (&["serve", "--port", "70000"], &[], 64, "70000"),
        (&["serve", "--config", file], &[], 78, "prot"),
        (&["serve"], &[("SCONCE_ADMIN_PORT", "x")], 78, "SCONCE_ADMIN_PORT"),
        (&["serve", "--host", "0.0.0.0"], &[], 78, "no-auth"),
        (&["pull", "no-such-model"], &[], 64, "no-such-model"),
    ];
    for (arguments, environment, code, culprit) in cases {
        let output = sconce(arguments, environment);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains(culprit), "{arguments:?} {environment:?} says {told}");
        assert!(!told.contains("panicked"), "{told}");
        assert_eq!(output.status.code(), Some(code), "{arguments:?} {environment:?}: {told}");
    }
}

#[test]
fn a_service_of_the_same_name_is_no_configuration() {
    let injected = [
        ("SCONCE_PORT", "tcp://10.0.0.1:8080"),
        ("SCONCE_SERVICE_HOST", "10.0.0.1"),
        ("SCONCE_SERVICE_PORT", "8080"),
        ("SCONCE_SERVICE_PORT_HTTP", "8080"),
        ("SCONCE_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("SCONCE_PORT_8080_TCP_ADDR", "10.0.0.1"),
    ];
    // A pull of no model needs the whole configuration and nothing else.
    let output = sconce(&["pull", "no-such-model"], &injected);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{told}");
    assert!(!told.contains("SCONCE_"), "{told}");
}

#[test]
fn the_readme_lists_every_model() {
    let readme = root("README.md");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        let manifest: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        let [name, task, license] =
            ["name", "task", "license"].map(|key| manifest[key].as_str().unwrap());
        let row = readme.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("README.md has no row for {name}"));
        assert!(row.contains(&format!("| {task} |")), "{row}");
        assert!(row.ends_with(&format!("| {license} |")), "{row}");
    }
}
