//! The server against its own OpenAPI document, by requests that schemathesis makes up: sound ones
//! and unsound ones, the same in every run.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::clients::{python_packages, run};
use crate::server::{Server, get};

/// Requests that are made up for each operation, beside those at the edges of its schema.
const EXAMPLES: &str = "12";

/// What answers have to be.
const SHAPES: &str = "status_code_conformance,content_type_conformance,\
                      response_headers_conformance,response_schema_conformance";

/// What a server that is well does besides.
const WELL: &str = "not_a_server_error,negative_data_rejection";

/// Asks the listener at `url` about what it is documented to have.
fn check(server: &Server, url: &str, checks: &str, filters: &[&str]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let packages = python_packages("contract.txt");
    let path = std::env::join_paths([packages.as_path(), folder.as_path()]).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", path).env("SCHEMATHESIS_HOOKS", "contract_hooks");
    command.args(["-m", "schemathesis.cli", "--config-file"]).arg(folder.join("contract.toml"));
    command.args(["run", "--no-color", "--phases", "examples,coverage,fuzzing"]);
    command.args(["--max-examples", EXAMPLES, "--checks", checks, "--url", url]).args(filters);
    command.arg(server.url("/openapi.json")).current_dir(scratch.path());
    let told = run(&mut command);
    assert!(told.contains("No issues found"), "{told}");
}

#[test]
#[ignore = "takes a minute"]
fn the_server_keeps_to_its_document() {
    let server = Server::start(&[]);
    let (main, admin) = (server.url(""), server.admin_url(""));
    let all = format!("{SHAPES},{WELL}");
    check(&server, &main, &all, &["--exclude-tag", "admin"]);
    let tags = ["--include-tag", "admin", "--include-tag", "probes"];
    let not = ["--exclude-path", "/health", "--exclude-operation-id", "post_drain"];
    check(&server, &admin, &all, &[tags, not].concat());
    // From here on it drains, and what is refused then is documented too.
    check(&server, &admin, &all, &["--include-operation-id", "post_drain"]);
    server.wait_until("draining", Duration::from_secs(60), || {
        get(&server.admin_url("/drain")).1.contains("drain")
    });
    check(&server, &main, SHAPES, &["--exclude-tag", "admin", "--exclude-tag", "tei"]);
}
