//! What `sconce plan` writes and prints, from outside: the committed overlays are its output, the
//! README's commands work, and its exit codes are what scripts can rely on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use crate::k8s_tools::root;
use crate::readme::commands;
use crate::server::Server;

/// The default models are here once this has run: plans read their headers.
static PULLED: LazyLock<()> = LazyLock::new(|| {
    let output = sconce(&["pull".to_owned()]);
    assert!(output.status.success(), "{}", told(&output));
});

fn sconce(arguments: &[String]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
    command.args(arguments).current_dir(root()).output().expect("the binary starts")
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The arguments of a `sconce …` command without quotes in it.
fn arguments(command: &str) -> Vec<String> {
    let words = command.split_whitespace().filter(|word| *word != "\\");
    words.skip(1).map(str::to_owned).collect()
}

/// Files below a folder, by their path in it.
fn files(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = PathBuf::from(path.file_name().unwrap());
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|(inner, text)| (name.join(inner), text)));
        } else {
            found.insert(name, fs::read_to_string(path).unwrap());
        }
    }
    found
}

#[test]
fn committed_plans_are_what_the_planner_writes() {
    let () = *PULLED;
    let mut seen = 0;
    for entry in fs::read_dir(root().join("k8s/overlays")).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("plan-") {
            continue;
        }
        let text = fs::read_to_string(folder.join("kustomization.yaml")).unwrap();
        let command = text.lines().next().and_then(|line| line.strip_prefix("# Written by: "));
        let mut command = arguments(command.unwrap_or_else(|| panic!("{name}: by whom?")));
        let scratch = tempfile::tempdir().unwrap();
        let update = std::env::var_os("SCONCE_UPDATE_GOLDEN").is_some();
        let out = if update { folder.as_path() } else { scratch.path() };
        command.extend(["--out".to_owned(), out.display().to_string()]);
        let output = sconce(&command);
        assert!(output.status.success(), "{name}: {}", told(&output));
        let (committed, written) = (files(&folder), files(out));
        assert!(
            committed == written,
            "{name} is not what `sconce {}` writes; SCONCE_UPDATE_GOLDEN=1 writes it again",
            command.join(" ")
        );
        seen += 1;
    }
    assert!(seen >= 4, "only {seen} plans");
}

#[test]
fn the_plans_of_the_readme_work() {
    let () = *PULLED;
    let server = Server::start(&[]);
    let out = tempfile::tempdir().unwrap();
    let commands = commands("sconce plan");
    assert!(commands.len() >= 5, "{commands:?}");
    for command in commands {
        let mut arguments = arguments(
            &command
                .replace("http://localhost:8080", &server.url(""))
                .replace("http://localhost:9464", &server.admin_url("")),
        );
        let written = arguments.iter_mut().find(|word| word.ends_with("overlays/mine"));
        if let Some(folder) = written {
            *folder = out.path().display().to_string();
        }
        // Long enough to see that it works.
        for (flag, limit) in [("--calibrate", "--calibrate-seconds=3"), ("--from", "--watch=1")] {
            if arguments.iter().any(|word| word == flag) {
                arguments.push(limit.to_owned());
            }
        }
        if command.contains("--calibrate") {
            // Whatever else this machine does: the flag is tried, not the objective.
            arguments.extend(["--load".into(), "smollm2-135m-instruct:latency=600".into()]);
        }
        let output = sconce(&arguments);
        assert!(output.status.success(), "{command}: {}", told(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let expected = if arguments.iter().any(|word| word == "kustomize") {
            "kustomization.yaml"
        } else if command.contains("--calibrate") {
            "measured"
        } else if command.contains("--from") {
            "The running server"
        } else {
            "USD a month"
        };
        assert!(text.contains(expected), "{command} says no {expected}:\n{text}");
    }
    let text = &files(out.path())[Path::new("kustomization.yaml")];
    assert!(text.contains(r#"newName: "REGISTRY/sconce", newTag: "0.1.0""#), "{text}");
}
