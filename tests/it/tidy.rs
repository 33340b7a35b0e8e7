//! The rules of the code base that a machine can check: size, order, where dangerous things live.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const LINES_MAX: usize = 500;
const COLUMNS_MAX: usize = 100;

/// Modules that may see everything.
const ROOTS: &[&str] = &["main", "lib", "serve"];

/// A file of the tree, with its path relative to the repository's root.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The top-level module that it belongs to: `src/engine/mod.rs` is `engine`.
    fn module(&self) -> &str {
        let path = self.path.strip_prefix("src/").unwrap_or(&self.path);
        path.split('/').next().unwrap_or(path).trim_end_matches(".rs")
    }

    fn is_test(&self) -> bool {
        ["tests", "testing", "/sim/"].iter().any(|word| self.path.contains(word))
    }

    /// Lines of code with their numbers: comments are left out, and everything after the unit
    /// tests' module starts.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().take_while(|line| !line.starts_with("mod tests {"));
        let numbered = lines.enumerate().map(|(index, line)| (index + 1, line));
        numbered.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folders: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    for folder in folders {
        collect(&root().join(folder), &mut found);
    }
    assert!(!found.is_empty(), "no sources under {folders:?}");
    found
}

fn collect(folder: &Path, found: &mut Vec<Source>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let path = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
            found.push(Source { path, text });
        }
    }
}

fn report(what: &str, offences: &[String]) {
    assert!(offences.is_empty(), "{what}:\n  {}", offences.join("\n  "));
}

#[test]
fn files_are_short_and_say_what_they_are_for() {
    let mut offences = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        let lines = source.text.lines().count();
        if lines > LINES_MAX {
            offences.push(format!("{}: {lines} lines, at most {LINES_MAX}", source.path));
        }
        for (index, line) in source.text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX {
                offences.push(format!("{}:{}: {columns} columns", source.path, index + 1));
            }
        }
        if !source.text.starts_with("//!") {
            offences.push(format!("{}: does not open with `//!`", source.path));
        }
    }
    report("files that are too long, too wide or unexplained", &offences);
}

#[test]
fn modules_import_only_downward() {
    let order = module_order();
    let mut offences = Vec::new();
    for source in sources(&["src"]) {
        let module = source.module();
        if ROOTS.contains(&module) || source.is_test() {
            continue;
        }
        let own = order[module];
        for (number, line) in source.code() {
            for used in line.split("crate::").skip(1) {
                let name: String =
                    used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let Some(&other) = order.get(name.as_str()) else { continue };
                if other > own || crosses(module, &name) {
                    offences.push(format!("{}:{number}: {module} uses {name}", source.path));
                }
            }
        }
    }
    report("imports against the order of src/lib.rs", &offences);
}

/// Bands B (device) and C (front) never import each other.
fn crosses(from: &str, to: &str) -> bool {
    let device = ["device", "kernels", "weights", "head", "arch", "engine"];
    let front = ["admission", "http"];
    (device.contains(&from) && front.contains(&to))
        || (front.contains(&from) && device.contains(&to))
}

/// The modules as src/lib.rs declares them, numbered.
fn module_order() -> BTreeMap<String, usize> {
    let text = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let names = text.lines().filter_map(|line| line.strip_prefix("pub mod "));
    let names = names.map(|name| name.trim_end_matches(';').to_owned());
    names.enumerate().map(|(index, name)| (name, index)).collect()
}

#[test]
fn dangerous_things_live_where_they_may() {
    let under_device =
        |path: &str| path.starts_with("src/kernels/") || path.starts_with("src/device/");
    let mut offences = Vec::new();
    for source in sources(&["src"]) {
        for (number, line) in source.code() {
            let place = format!("{}:{number}: {}", source.path, line.trim());
            let is_unsafe = line.contains("unsafe ") && !line.contains("unsafe_");
            let low_level = ["cudarc", "std::arch", "core::arch", "cfg(feature = \"cuda\")"];
            if !under_device(&source.path)
                && (is_unsafe || low_level.iter().any(|word| line.contains(word)))
            {
                offences.push(place.clone());
            }
            if line.contains("static mut") {
                offences.push(place);
            }
        }
    }
    report("unsafe, SIMD or CUDA outside src/kernels and src/device", &offences);
}

#[test]
fn metric_names_stand_in_one_file() {
    let mut offences = Vec::new();
    for source in sources(&["src"]) {
        if source.path.starts_with("src/telemetry/metrics") || source.is_test() {
            continue;
        }
        for (number, line) in source.code() {
            if line.contains("\"sconce_") {
                offences.push(format!("{}:{number}: {}", source.path, line.trim()));
            }
        }
    }
    report("metric names outside src/telemetry/metrics.rs", &offences);
}

#[test]
fn nothing_prints_or_exits_on_the_side() {
    // Commands talk to a person; everything else logs.
    let commands = ["src/main.rs", "src/pull.rs"];
    let words = ["println!", "print!(", "eprint", "dbg!", "process::exit"];
    let mut offences = Vec::new();
    for source in sources(&["src"]) {
        if commands.contains(&source.path.as_str()) || source.is_test() {
            continue;
        }
        for (number, line) in source.code() {
            if words.iter().any(|word| line.contains(word)) {
                offences.push(format!("{}:{number}: {}", source.path, line.trim()));
            }
        }
    }
    report("printing or exiting outside the commands", &offences);
}

#[test]
fn the_project_speaks_only_of_itself() {
    // Paths of somebody's machine, and reminders. Put together here, or this file would offend.
    let words = ["root/", "home/", "work/"].map(|path| format!("/{path}"));
    let reminders = ["TO", "FIX", "XX"].iter().zip(["DO(", "ME", "X"]);
    let reminders = reminders.map(|(start, end)| format!("{start}{end}"));
    let words: Vec<String> = words.into_iter().chain(reminders).collect();
    let mut offences = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        for (index, line) in source.text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word.as_str())) {
                offences.push(format!("{}:{}: {}", source.path, index + 1, line.trim()));
            }
        }
    }
    report("leftovers", &offences);
}
