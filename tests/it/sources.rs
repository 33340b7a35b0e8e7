//! Models over HTTPS from a server with its own certificate, directly and through a proxy; and the
//! commands that look without fetching.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Serves the working directory over TLS with `cert.pem`; says its port.
const SERVER: &str = "
import http.server, ssl, sys
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('cert.pem', 'key.pem')
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
";

const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

struct Https {
    python: Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl Drop for Https {
    fn drop(&mut self) {
        let _ = self.python.kill();
        let _ = self.python.wait();
    }
}

impl Https {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
            .args(["-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", "key.pem"])
            .args(["-addext", "subjectAltName=DNS:localhost", "-out", "cert.pem"])
            .args(["-addext", "basicConstraints=critical,CA:false"])
            .current_dir(dir.path())
            .output()
            .expect("openssl makes a certificate");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        std::fs::write(dir.path().join("abc.json"), "abc").unwrap();
        let mut python = Command::new("python3")
            .args(["-c", SERVER])
            .current_dir(dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3 serves");
        let mut line = String::new();
        BufReader::new(python.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().parse().expect("a port");
        Self { python, dir, port }
    }

    /// Runs `sconce` on a model whose only file is this server's.
    fn sconce(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
        let models = self.dir.path().join("models");
        std::fs::create_dir_all(&models).unwrap();
        let manifest = format!(
            "name = \"m\"\ntask = \"embed\"\nlicense = \"MIT\"\n[[files]]\nfile = \"config.json\"\n\
             sha256 = \"{ABC}\"\nbytes = 3\nsources = [\"https://localhost:{}/abc.json\"]\n",
            self.port
        );
        std::fs::write(models.join("m.toml"), manifest).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
        command.args(arguments).env("SCONCE_MODELS_DIR", &models);
        command.env("SCONCE_CACHE_DIR", self.dir.path().join("cache"));
        command.env_remove("SSL_CERT_FILE").current_dir(self.dir.path());
        command.envs(environment.iter().copied()).output().expect("the binary starts")
    }

    fn certificate(&self) -> String {
        self.dir.path().join("cert.pem").display().to_string()
    }
}

/// A proxy that tunnels what it is asked to, and counts.
fn proxy() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let tunnels = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tunnels);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let counted = Arc::clone(&counted);
            std::thread::spawn(move || tunnel(stream.unwrap(), &counted));
        }
    });
    (port, tunnels)
}

fn tunnel(mut client: TcpStream, tunnels: &AtomicUsize) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let target = head.strip_prefix("CONNECT ").expect("a tunnel").split(' ').next().unwrap();
    let port: u16 = target.rsplit(':').next().unwrap().parse().unwrap();
    let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
    tunnels.fetch_add(1, Ordering::Relaxed);
    let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    let _ = std::io::copy(&mut &server, &mut client);
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_file_over_https_needs_a_certificate_that_is_trusted() {
    let server = Https::start();
    let refused = server.sconce(&["pull"], &[]);
    assert_eq!(refused.status.code(), Some(69), "{}", told(&refused));
    assert!(told(&refused).contains("certificate"), "{}", told(&refused));
    let certificate = server.certificate();
    let pulled = server.sconce(&["pull"], &[("SSL_CERT_FILE", &certificate)]);
    assert!(pulled.status.success(), "{}", told(&pulled));
    let again = server.sconce(&["pull"], &[("SCONCE_OFFLINE", "true")]);
    assert!(again.status.success(), "{}", told(&again));
}

#[test]
fn a_proxy_is_used_where_the_environment_says_so() {
    let server = Https::start();
    let (port, tunnels) = proxy();
    let (address, certificate) = (format!("http://127.0.0.1:{port}"), server.certificate());
    let variables = [("HTTPS_PROXY", address.as_str()), ("SSL_CERT_FILE", &certificate)];
    let pulled = server.sconce(&["pull"], &variables);
    assert!(pulled.status.success(), "{}", told(&pulled));
    assert_eq!(tunnels.load(Ordering::Relaxed), 1);
}

#[test]
fn looking_fetches_nothing() {
    let server = Https::start();
    let json = |arguments: &[&str], environment: &[(&str, &str)]| {
        let output = server.sconce(arguments, environment);
        let parsed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), parsed)
    };
    let (code, models) = json(&["models", "-o", "json"], &[]);
    assert_eq!(code, Some(0));
    assert_eq!(models[0]["missing"], serde_json::json!(["config.json"]), "{models}");

    let (code, report) = json(&["check", "-o", "json"], &[("HF_TOKEN", "s3cret")]);
    assert_eq!(code, Some(0), "{report}");
    assert!(!report.to_string().contains("s3cret"));
    let warned = report["warnings"].to_string();
    assert!(warned.contains("config.json will be fetched"), "{warned}");
    let setting = |key: &str| {
        let settings = report["settings"].as_array().unwrap();
        settings.iter().find(|one| one["key"] == key).unwrap().clone()
    };
    assert_eq!(setting("models.hub_token")["value"], "(set)");
    assert_eq!(setting("models.hub_token")["source"], "environment HF_TOKEN");

    let (code, report) = json(&["check", "-o", "json"], &[("HF_HUB_OFFLINE", "YES")]);
    assert_eq!(code, Some(78), "{report}");
    assert!(report["problems"][0].as_str().unwrap().contains("models.offline"), "{report}");
    let text = server.sconce(&["check"], &[]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("SETTING") && text.contains("\ncan serve, configuration "), "{text}");
}

#[test]
fn packages_without_pip_are_a_problem_before_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = format!(
        "name = \"packed\"\ntask = \"embed\"\nlicense = \"MIT\"\n[[files]]\n\
         file = \"config.json\"\nsha256 = \"{ABC}\"\nbytes = 3\n\
         sources = [\"package:pkg==1.0/pkg/abc\"]\n"
    );
    std::fs::write(folder.path().join("packed.toml"), manifest).unwrap();
    let check = |path: Option<&str>| {
        let mut sconce = Command::new(env!("CARGO_BIN_EXE_sconce"));
        sconce.args(["check", "-o", "json", "--models-dir"]).arg(folder.path());
        sconce.env("SCONCE_CACHE_DIR", folder.path().join("cache"));
        if let Some(path) = path {
            sconce.env("PATH", path);
        }
        let output = sconce.output().expect("the binary starts");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), report)
    };
    let (code, report) = check(None);
    assert_eq!(code, Some(0), "{report}");
    // As in an image without Python.
    let (code, report) = check(Some("/nonexistent"));
    assert_eq!(code, Some(78), "{report}");
    let problem = report["problems"][0].as_str().unwrap();
    assert!(problem.contains("packed: config.json") && problem.contains("pip"), "{problem}");
}

#[test]
fn a_model_that_is_here_is_described_from_its_header() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("broken.gguf"), "not a model").unwrap();
    let manifest = "name = \"broken\"\ntask = \"generate\"\nlicense = \"MIT\"\n[[files]]\n\
                    file = \"model.gguf\"\nbytes = 11\nsources = [\"file:broken.gguf\"]\n";
    let manifest = format!("{manifest}sha256 = \"{ABC}\"\n");
    std::fs::write(folder.path().join("broken.toml"), manifest).unwrap();
    let models = |dir: &Path, command: &str| {
        let mut sconce = Command::new(env!("CARGO_BIN_EXE_sconce"));
        let output = sconce.args([command, "--output=json", "--models-dir"]).arg(dir).output();
        let output = output.expect("the binary starts");
        let parsed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), parsed)
    };
    let (code, found) = models(folder.path(), "models");
    assert_eq!(code, Some(0));
    assert!(found[0]["problem"].as_str().unwrap().contains("GGUF"), "{found}");
    assert_eq!(models(folder.path(), "check").0, Some(78));

    // The models of the other tests have been fetched, or are named as missing.
    let (_, found) = models(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models"), "models");
    let chat = &found[1];
    assert_eq!(chat["name"], "smollm2-135m-instruct");
    if chat["missing"].as_array().unwrap().is_empty() {
        assert_eq!(chat["kv_bytes_per_token"], 23_040);
        assert_eq!(chat["context"], 8192);
    }
}

#[test]
fn a_plan_reads_headers_where_the_weights_are() {
    let server = Https::start();
    let folder = server.dir.path();
    // 16 GB of zeros that nobody wants to transfer, and that take no room here.
    let bytes = 16_000_000_000_u64;
    let tensor = format!(r#"{{"dtype":"F32","shape":[4000,1000000],"data_offsets":[0,{bytes}]}}"#);
    let header = format!(r#"{{"encoder.layer.0.w":{tensor}}}"#);
    let whole = 8 + header.len() as u64 + bytes;
    let mut file = std::fs::File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(whole).unwrap();
    let config = "{\"model_type\":\"bert\",\"hidden_size\":384,\"intermediate_size\":1536,\
                  \"num_hidden_layers\":6,\"num_attention_heads\":12,\"vocab_size\":30522,\
                  \"max_position_embeddings\":512,\"type_vocab_size\":2}";
    std::fs::write(folder.join("config.json"), config).unwrap();
    let manifests = folder.join("manifests");
    std::fs::create_dir(&manifests).unwrap();
    let address = format!("https://localhost:{}", server.port);
    let entry = |name: &str, bytes: u64| {
        format!(
            "[[files]]\nfile = \"{name}\"\nsha256 = \"{ABC}\"\nbytes = {bytes}\nsources = \
             [\"package:none==1/{name}\", \"{address}/{name}\"]\n"
        )
    };
    let manifest = format!(
        "name = \"far\"\ntask = \"embed\"\nlicense = \"MIT\"\n{}{}",
        entry("model.safetensors", whole),
        entry("config.json", config.len() as u64)
    );
    std::fs::write(manifests.join("far.toml"), manifest).unwrap();
    let certificate = server.certificate();
    let plan = |model: &str, offline: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
        command.args(["plan", model, "-o", "json"]).env("SCONCE_MODELS_DIR", &manifests);
        command.env("SCONCE_CACHE_DIR", folder.join("cache")).env("SSL_CERT_FILE", &certificate);
        command.env("SCONCE_OFFLINE", offline).current_dir(folder).output().unwrap()
    };
    for model in ["far".to_owned(), format!("{address}/model.safetensors")] {
        let output = plan(&model, "false");
        assert!(output.status.success(), "{}", told(&output));
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(plan["models"][0]["weight_bytes"], bytes, "{model}");
    }
    let output = plan("far", "true");
    assert_eq!(output.status.code(), Some(66), "{}", told(&output));
    assert!(told(&output).contains("models.offline"), "{}", told(&output));
    let output = plan(&format!("{address}/none.gguf"), "false");
    assert_eq!(output.status.code(), Some(69), "{}", told(&output));
    assert!(told(&output).contains("404"), "{}", told(&output));
}

#[test]
fn shells_and_man_know_the_commands() {
    for arguments in [&["completions", "bash"][..], &["completions", "zsh"], &["man"]] {
        let sconce = Command::new(env!("CARGO_BIN_EXE_sconce")).args(arguments).output().unwrap();
        let text = String::from_utf8(sconce.stdout).unwrap();
        assert!(sconce.status.success() && text.contains("pull"), "{arguments:?}: {text}");
    }
}
