//! The container image without a container engine: what the Dockerfile's last stage lays out, run
//! in a sandbox with a read-only root, no home, an arbitrary user, and the server as process 1.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

/// The instructions of the stage `name`, continued lines joined.
fn stage(name: &str) -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("Dockerfile");
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<&str> =
        text.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    let joined = lines.join("\n").replace("\\\n", " ");
    let mut found = Vec::new();
    let mut inside = false;
    for line in joined.lines().filter(|line| !line.trim().is_empty()) {
        let (instruction, rest) = line.split_once(' ').unwrap();
        if instruction == "FROM" {
            inside = rest.ends_with(&format!(" AS {name}"));
        } else if inside {
            found.push((instruction.to_owned(), rest.trim().to_owned()));
        }
    }
    assert!(!found.is_empty(), "the Dockerfile has no stage {name}");
    found
}

fn instruction(stage: &[(String, String)], name: &str) -> String {
    let found = stage.iter().find(|(instruction, _)| instruction == name);
    found.unwrap_or_else(|| panic!("no {name}")).1.clone()
}

/// A root file system with the binary, the libraries that it names, and the models.
fn layout(root: &Path) {
    let binary = root.join("usr/local/bin/sconce");
    std::fs::create_dir_all(binary.parent().unwrap()).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_sconce"), &binary).unwrap();
    let ldd = Command::new("ldd").arg(&binary).output().expect("ldd");
    for line in String::from_utf8(ldd.stdout).unwrap().lines() {
        let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) else {
            continue;
        };
        let target = root.join(&path[1..]);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(path, target).unwrap();
    }
    for empty in ["dev", "proc", "tmp"] {
        std::fs::create_dir_all(root.join(empty)).unwrap();
    }
    let pulled = Command::new(env!("CARGO_BIN_EXE_sconce"))
        .args(["pull", "--models-dir", "models", "--to"])
        .arg(root.join("models"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(pulled.status.success(), "{}", String::from_utf8_lossy(&pulled.stderr));
}

struct Sandbox(Child);

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the image as `user` and returns it with the addresses of API and administration.
fn start(root: &Path, user: &str) -> (Sandbox, [String; 2], PathBuf) {
    let image = stage("cpu");
    let entry: Vec<String> = serde_json::from_str(&instruction(&image, "ENTRYPOINT")).unwrap();
    let command: Vec<String> = serde_json::from_str(&instruction(&image, "CMD")).unwrap();
    let mut bwrap = Command::new("bwrap");
    bwrap.args(["--ro-bind"]).arg(root).args(["/", "--tmpfs", "/tmp", "--proc", "/proc"]);
    bwrap.args(["--dev", "/dev", "--unshare-user", "--unshare-pid", "--as-pid-1"]);
    bwrap.args(["--uid", user, "--gid", "0", "--clearenv", "--die-with-parent"]);
    for pair in instruction(&image, "ENV").split_whitespace() {
        let (name, value) = pair.split_once('=').unwrap();
        bwrap.args(["--setenv", name, value]);
    }
    let settings = [("NO_AUTH", "true"), ("PORT", "0"), ("ADMIN_PORT", "0")];
    for (name, value) in settings.into_iter().chain([("OFFLINE", "true"), ("GRACE_SECONDS", "5")]) {
        bwrap.args(["--setenv", &format!("SCONCE_{name}"), value]);
    }
    let log = root.with_extension(format!("{user}.log"));
    let errors = std::fs::File::create(&log).unwrap();
    let child = bwrap.args(entry).args(command).stdout(Stdio::piped()).stderr(errors).spawn();
    let sandbox = Sandbox(child.expect("bubblewrap runs"));
    let mut addresses = Vec::new();
    for _ in 0..600 {
        let text = std::fs::read_to_string(&log).unwrap();
        let lines = || text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if lines().any(|line| line["message"] == "ready") {
            let listening = lines().filter(|line| line["message"] == "listening");
            addresses = listening
                .map(|line| {
                    let address = line["address"].as_str().unwrap();
                    let port = address.rsplit(':').next().unwrap();
                    format!("http://127.0.0.1:{port}")
                })
                .collect();
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let addresses = addresses.try_into().unwrap_or_else(|_| {
        panic!("not ready in time: {}", std::fs::read_to_string(&log).unwrap())
    });
    (sandbox, addresses, log)
}

fn post(url: &str, body: &str) -> Value {
    let request = ureq::post(url).header("content-type", "application/json");
    let mut response = request.send(body).unwrap();
    serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap()
}

#[test]
#[ignore = "needs Debian's package bubblewrap"]
fn the_image_serves_without_a_home_a_name_or_a_place_to_write() {
    let image = stage("cpu");
    let user = instruction(&image, "USER");
    let user = user.split(':').next().unwrap();
    assert!(user.parse::<u32>().is_ok_and(|user| user != 0), "USER {user}");
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    layout(&root);
    for user in [user, "1000710000"] {
        let (mut sandbox, [api, admin], _log) = start(&root, user);
        let answer = post(
            &format!("{api}/v1/chat/completions"),
            r#"{"model": "smollm2-135m-instruct", "max_tokens": 4,
                "messages": [{"role": "user", "content": "hi"}]}"#,
        );
        assert!(answer["choices"][0]["message"]["content"].is_string(), "{answer}");
        let ready = ureq::get(format!("{admin}/readyz")).call().unwrap();
        assert_eq!(ready.status(), 200);
        // bwrap forwards nothing; its only child is the server, as process 1 of its own world.
        let children = format!("/proc/{0}/task/{0}/children", sandbox.0.id());
        let child = std::fs::read_to_string(children).unwrap();
        let killed = Command::new("kill").args(["-TERM", child.trim()]).status().unwrap();
        assert!(killed.success());
        let mut summary = String::new();
        let stdout = sandbox.0.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut summary).unwrap();
        let summary: Value = serde_json::from_str(&summary).expect("a drain summary");
        assert_eq!(summary["exit_code"], 0, "{summary}");
        assert!(sandbox.0.wait().unwrap().success());
    }
}
