//! Real clients, unchanged, from packages of the test's own.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::server::Server;

pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed:\n{text}\n{told}");
    text
}

/// A folder with the clients' packages, filled on first use and kept in the target folder under
/// the requirements' own name.
pub(crate) fn packages(requirements: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let requirements = root.join("tests/clients").join(requirements);
    let pinned = std::fs::read_to_string(&requirements).unwrap();
    let name = pinned.trim().replace(['=', '\n', ' ', '[', ']'], "-");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("packages-{name}"));
    let done = folder.join("done");
    if !done.exists() {
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        let mut install = Command::new("python3");
        run(install.args(pip).arg("--target").arg(&folder).arg("-r").arg(&requirements));
        std::fs::write(done, "").unwrap();
    }
    folder
}

#[test]
fn the_openai_sdk_works_unchanged() {
    let server = Server::start(&[]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/openai_sdk.py");
    let told = run(Command::new("python3")
        .env("PYTHONPATH", packages("requirements.txt"))
        .arg(script)
        .arg(server.url("/v1")));
    assert_eq!(told.trim(), "all is well");
}
