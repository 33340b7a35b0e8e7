//! The container image without a container engine: what the Dockerfile's last stage lays out, run
//! in a sandbox with a read-only root, no home, an arbitrary user, and the server as process 1.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::clients::{python_packages, run};

/// The libraries that the binary may ask for: those of the image's packages libc6 and libgcc-s1.
const LIBRARIES: [&str; 7] = [
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
];

/// What a stage of the Dockerfile starts from, and its own instructions, continued lines joined.
struct Stage {
    from: String,
    name: String,
    instructions: Vec<(String, String)>,
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All stages, in order.
fn stages() -> Vec<Stage> {
    let text = std::fs::read_to_string(repository().join("Dockerfile")).unwrap();
    let lines: Vec<&str> =
        text.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    let joined = lines.join("\n").replace("\\\n", " ");
    let mut stages: Vec<Stage> = Vec::new();
    for line in joined.lines().filter(|line| !line.trim().is_empty()) {
        let (instruction, rest) = line.split_once(' ').unwrap();
        if instruction == "FROM" {
            let (from, name) = rest.split_once(" AS ").expect("every stage has a name");
            let (from, name) = (from.trim().to_owned(), name.trim().to_owned());
            stages.push(Stage { from, name, instructions: Vec::new() });
        } else {
            let stage = stages.last_mut().expect("FROM comes first");
            stage.instructions.push((instruction.to_owned(), rest.trim().to_owned()));
        }
    }
    stages
}

/// The instructions of the stage `name` and, before them, of the stages that it starts from.
fn stage(name: &str) -> Vec<(String, String)> {
    let stages = stages();
    let mut name = name;
    let mut found = Vec::new();
    while let Some(stage) = stages.iter().find(|stage| stage.name == name) {
        found.splice(0..0, stage.instructions.iter().cloned());
        name = &stage.from;
    }
    assert!(!found.is_empty(), "the Dockerfile has no stage {name}");
    found
}

/// The last such instruction: it is the one that holds.
fn instruction(stage: &[(String, String)], name: &str) -> String {
    let found = stage.iter().rfind(|(instruction, _)| instruction == name);
    found.unwrap_or_else(|| panic!("no {name}")).1.clone()
}

/// Every variable that the image sets.
fn variables(stage: &[(String, String)]) -> Vec<(String, String)> {
    let set = stage.iter().filter(|(instruction, _)| instruction == "ENV");
    let pairs = set.flat_map(|(_, pairs)| pairs.split_whitespace());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        })
        .collect()
}

#[test]
fn the_dockerfile_passes_its_linter() {
    let packages = python_packages("hadolint.txt");
    let mut linter = Command::new(packages.join("bin/hadolint"));
    run(linter.args(["--failure-threshold", "style"]).arg(repository().join("Dockerfile")));
}

/// Nobody is root, no shell is in between, and nothing but the binary and models is added.
#[test]
fn every_image_runs_the_server_itself_as_nobody() {
    for name in ["cpu", "cpu-models", "cuda", "cuda-models"] {
        let image = stage(name);
        let user = instruction(&image, "USER");
        let ids: Vec<u32> = user.split(':').map(|id| id.parse().expect("a number")).collect();
        assert!(ids.len() == 2 && ids.iter().all(|&id| id != 0), "{name}: USER {user}");
        for (what, words) in [("ENTRYPOINT", vec!["/usr/local/bin/sconce"]), ("CMD", vec!["serve"])]
        {
            let given: Vec<String> = serde_json::from_str(&instruction(&image, what))
                .unwrap_or_else(|_| panic!("{name}: {what} would start a shell"));
            assert_eq!(given, words, "{name}: {what}");
        }
        assert!(image.iter().all(|(instruction, _)| instruction != "RUN"), "{name}");
        let copies = image.iter().filter(|(instruction, _)| instruction == "COPY");
        for (_, copied) in copies {
            let ends = copied.ends_with(" /usr/local/bin/sconce") || copied.ends_with(" /models");
            assert!(copied.starts_with("--from=") && ends, "{name}: COPY {copied}");
        }
    }
}

/// What the images say of CUDA is what the build does and the program asks for.
#[test]
fn the_cuda_image_fits_the_build() {
    let read = |file: &str| std::fs::read_to_string(repository().join(file)).unwrap();
    let builder = stage("build-cuda");
    let (name, chips) = instruction(&builder, "ARG").split_once('=').map(own).unwrap();
    let build = read("build.rs");
    assert!(build.contains(&format!("const CHIPS: &str = \"{chips}\";")), "{chips}");
    let run = instruction(&builder, "RUN");
    let passed = format!("SCONCE_CUDA_CHIPS=\"${name}\" cargo build");
    assert!(run.contains(&passed) && build.contains("\"SCONCE_CUDA_CHIPS\""), "{run}");
    assert!(run.contains("--features cuda") && run.contains("--locked"), "{run}");

    // The compiler's release is the one that is checked elsewhere: drivers of another one may not
    // read what it writes.
    let stages = stages();
    let from = &stages.iter().find(|stage| stage.name == "build-cuda").unwrap().from;
    let release = from.strip_prefix("nvidia/cuda:").and_then(|tag| tag.split("-devel").next());
    let release: Vec<&str> = release.unwrap().splitn(3, '.').collect();
    let pinned = format!("nvidia-cuda-nvcc=={}.{}.", release[0], release[1]);
    assert!(read(".ci/cuda-toolchain").contains(&pinned), "{from}");

    let image = stage("cuda");
    let variables = variables(&image);
    let value = |name: &str| {
        let found = variables.iter().find(|(given, _)| given == name);
        found.unwrap_or_else(|| panic!("no {name}")).1.as_str()
    };
    assert_eq!(value("NVIDIA_VISIBLE_DEVICES"), "all");
    assert_eq!(value("NVIDIA_DRIVER_CAPABILITIES"), "compute,utility");
    assert_eq!(value("SCONCE_HOST"), "::");
    // The one place that can be written to.
    assert!(value("CUDA_CACHE_PATH").starts_with("/tmp/"));
    let gke = read("k8s/components/gke/patch.yaml");
    assert!(gke.contains(&format!("value: {}}}", value("LD_LIBRARY_PATH"))), "{gke}");
}

fn own((name, value): (&str, &str)) -> (String, String) {
    (name.to_owned(), value.to_owned())
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
        let library = path.rsplit('/').next().unwrap();
        assert!(LIBRARIES.contains(&library), "the image has no {library}");
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
    for (name, value) in variables(&image) {
        bwrap.args(["--setenv", &name, &value]);
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
    let user = instruction(&stage("cpu"), "USER");
    let user = user.split(':').next().unwrap();
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
