//! API keys on the real binary: a file that has to be there, and that is followed as Kubernetes
//! changes it.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::server::Server;

const FIRST: &str = "the-first-key-of-this-test";
const SECOND: &str = "the-second-key-of-this-test";

fn keys(key: &str) -> String {
    format!("[[key]]\nname = \"test\"\nkey = \"{key}\"\n")
}

/// The status of a request with this key.
fn ask(server: &Server, key: &str) -> u16 {
    let config = ureq::Agent::config_builder().http_status_as_error(false).build();
    let agent: ureq::Agent = config.into();
    let request = agent.get(server.url("/v1/models"));
    let answer = request.header("authorization", format!("Bearer {key}")).call();
    answer.map_or(0, |response| response.status().as_u16())
}

#[test]
fn a_missing_or_empty_file_of_keys_refuses_to_start() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    for (file, code, says) in
        [(folder.path().join("missing"), 66, "no such file"), (empty, 78, "no key in it")]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_sconce"))
            .args(["serve", "--port", "0", "--admin-port", "0"])
            .env("SCONCE_KEYS_FILE", &file)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{told}");
        assert!(told.contains(says) && told.contains("auth.keys_file"), "{told}");
    }
}

/// A Secret's mount: the file is a link through `..data`, which is swapped as a whole.
#[test]
fn keys_are_followed_and_a_bad_file_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let publish = |version: &str, text: &str| {
        std::fs::create_dir(at(version)).unwrap();
        std::fs::write(at(version).join("keys.toml"), text).unwrap();
        let _ = std::fs::remove_file(at("..tmp"));
        symlink(version, at("..tmp")).unwrap();
        std::fs::rename(at("..tmp"), at("..data")).unwrap();
    };
    publish("..1", &keys(FIRST));
    symlink(Path::new("..data/keys.toml"), at("keys.toml")).unwrap();
    let toml = format!("[auth]\nkeys_file = \"{}\"", at("keys.toml").display());
    let server = Server::configured(folder.path(), &toml, &[]);
    assert_eq!((ask(&server, FIRST), ask(&server, SECOND)), (200, 401));
    let limit = Duration::from_secs(30);
    publish("..2", &keys(SECOND));
    server.wait_until("reloaded", limit, || ask(&server, SECOND) == 200);
    assert_eq!(ask(&server, FIRST), 401);
    for (version, text) in [("..3", ""), ("..4", "[[key]]\nname = \"x\"\nkey = \"short\"")] {
        let told = server.log().matches("the api keys stay as they were").count();
        publish(version, text);
        server.wait_until("told", limit, || {
            server.log().matches("the api keys stay as they were").count() > told
        });
        assert_eq!((ask(&server, FIRST), ask(&server, SECOND)), (401, 200));
    }
    assert!(!server.log().contains(FIRST) && !server.log().contains(SECOND), "keys in the log");
}
