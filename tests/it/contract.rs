//! The server against its own OpenAPI document, by requests that schemathesis makes up: sound ones
//! and unsound ones, the same in every run.

use std::path::Path;
use std::process::Command;

use crate::clients::{python_packages, run};
use crate::server::{Server, get};

/// Requests that are made up for each operation, beside those at the edges of its schema.
const EXAMPLES: &str = "12";

/// Asks the listener at `url` about what it is documented to have.
fn check(server: &Server, url: &str, filters: &[&str]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let packages = python_packages("contract.txt");
    let path = std::env::join_paths([packages.as_path(), folder.as_path()]).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", path).env("SCHEMATHESIS_HOOKS", "contract_hooks");
    command.args(["-m", "schemathesis.cli", "--config-file"]).arg(folder.join("contract.toml"));
    command.args(["run", "--no-color", "--phases", "examples,coverage,fuzzing"]);
    command.args(["--max-examples", EXAMPLES, "--url", url]).args(filters);
    command.arg(server.url("/openapi.json")).current_dir(scratch.path());
    let told = run(&mut command);
    eprintln!("{told}");
    assert!(told.contains("No issues found"), "{told}");
}

#[test]
#[ignore = "takes a minute"]
fn the_server_keeps_to_its_document() {
    let server = Server::start(&[]);
    check(&server, &server.url(""), &["--exclude-tag", "admin"]);
    let drain = ["--exclude-operation-id", "post_drain"];
    let admin = ["--include-tag", "admin", "--include-tag", "probes"];
    let admin_only = ["--exclude-path", "/health", "--exclude-path-regex", "^/v2"];
    let all = [&admin[..], &admin_only[..], &drain[..]].concat();
    check(&server, &server.admin_url(""), &all);
    // The last one begins a drain: what is refused then is documented too.
    check(&server, &server.admin_url(""), &["--include-operation-id", "post_drain"]);
    server.wait_until("draining", std::time::Duration::from_secs(30), || {
        get(&server.admin_url("/drain")).1.contains("drain")
    });
    check(&server, &server.url(""), &["--include-tag", "openai", "--include-tag", "probes"]);
}
