//! Runs the real binary for a test: own ports, own folder, its log at hand, ended at the end.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a server may take to load the default models in an unoptimised test build, on a busy
/// machine, with a first download before it.
const START_MAX: Duration = Duration::from_secs(300);

/// A running `sconce`.
pub(crate) struct Server {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    stdout: Mutex<Receiver<String>>,
    main: String,
    admin: String,
}

impl Server {
    /// Starts the server and waits until it is ready.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let server = Self::launch(arguments);
        server.wait_ready();
        server
    }

    /// As `start`, with these lines besides the tests' usual sconce.toml; the folder holds them.
    pub(crate) fn configured(folder: &Path, toml: &str, arguments: &[&str]) -> Self {
        let usual = std::fs::read_to_string("tests/it/sconce.toml").unwrap();
        let file = folder.join("sconce.toml");
        std::fs::write(&file, format!("{usual}\n{toml}")).unwrap();
        let server = Self::run(&file, arguments, &[]);
        server.wait_ready();
        server
    }

    /// As `launch`, with these variables besides the test's own.
    #[cfg(feature = "otlp")]
    pub(crate) fn launch_with(environment: &[(&str, &str)]) -> Self {
        Self::run(Path::new("tests/it/sconce.toml"), &[], environment)
    }

    /// Starts the server and waits until it listens.
    pub(crate) fn launch(arguments: &[&str]) -> Self {
        Self::run(Path::new("tests/it/sconce.toml"), arguments, &[])
    }

    /// As `launch`, with a sconce.toml and environment of its own.
    pub(crate) fn run(config: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
        command.arg("serve").args(["--port", "0", "--admin-port", "0", "--log-format", "json"]);
        command.arg("--config").arg(config).envs(environment.iter().copied());
        command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                kept.lock().unwrap().push(line);
            }
        });
        let (sender, stdout) = channel();
        let mut pipe = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = pipe.read_to_string(&mut text);
            let _ = sender.send(text);
        });
        let none = String::new();
        let mut server =
            Self { child, log, stdout: Mutex::new(stdout), main: none.clone(), admin: none };
        server.main = server.address("server");
        server.admin = server.address("admin");
        server
    }

    /// URL of a path on the main port.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.main)
    }

    /// URL of a path on the admin port.
    pub(crate) fn admin_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }

    /// Address of the main port.
    pub(crate) fn main_address(&self) -> &str {
        &self.main
    }

    /// The process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Address of the admin port.
    pub(crate) fn admin_address(&self) -> &str {
        &self.admin
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Waits until the server answers that it is ready.
    pub(crate) fn wait_ready(&self) {
        let url = self.url("/readyz");
        self.wait_until("ready", START_MAX, || get(&url).0 == 200);
    }

    /// Waits until `done`, or fails with the log.
    pub(crate) fn wait_until(&self, what: &str, limit: Duration, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < limit, "not {what} after {limit:?}:\n{}", self.log());
            assert!(!self.has_ended(), "not {what}, the server has ended:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the process is over, and only waits for its parent to look.
    fn has_ended(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        // The state follows the program's name, which is in brackets.
        stat.is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
    }

    /// Sends a signal by name, as `kill` knows it.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        // The shell's own `kill`: not every machine has the program.
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {id}")]).status();
        assert!(status.expect("a shell").success());
    }

    /// Waits for the end; its exit status and what it printed.
    pub(crate) fn wait_exit(&mut self, limit: Duration) -> (ExitStatus, String) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let stdout = self.stdout.get_mut().unwrap();
                return (status, stdout.recv_timeout(Duration::from_secs(5)).unwrap_or_default());
            }
            assert!(start.elapsed() < limit, "still running after {limit:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Value of a metric series, written as in the exposition.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let (status, text) = get(&self.admin_url("/metrics"));
        assert_eq!(status, 200);
        let line = text
            .lines()
            .find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
        let value = line.unwrap_or_else(|| panic!("no series {series} in\n{text}"));
        value.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// The address that a listener logged.
    fn address(&self, listener: &str) -> String {
        let find = || {
            let log = self.log.lock().unwrap();
            let mut lines = log.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let found =
                lines.find(|line| line["message"] == "listening" && line["listener"] == listener);
            found.and_then(|line| line["address"].as_str().map(str::to_owned))
        };
        self.wait_until("listening", START_MAX, || find().is_some());
        find().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends what runs beside a check, also when the check fails.
pub(crate) struct SetOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(300)));
    config.build().into()
}

/// GET: status and body; status 0 if nobody answers.
pub(crate) fn get(url: &str) -> (u16, String) {
    match agent().get(url).call() {
        Ok(mut response) => {
            (response.status().as_u16(), response.body_mut().read_to_string().unwrap_or_default())
        }
        Err(error) => (0, error.to_string()),
    }
}

/// POST of JSON: status and JSON body; status 0 if nobody answers.
pub(crate) fn post(url: &str, body: &Value) -> (u16, Value) {
    let request = agent().post(url).header("content-type", "application/json");
    match request.send(body.to_string()) {
        Ok(mut response) => {
            let text = response.body_mut().read_to_string().unwrap_or_default();
            (response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::Null))
        }
        Err(error) => (0, Value::String(error.to_string())),
    }
}

/// Opens a stream: its events come one by one, without the `data: ` before them.
pub(crate) fn stream(url: &str, body: &Value) -> impl Iterator<Item = String> + use<> {
    let request = agent().post(url).header("content-type", "application/json");
    let response = request.send(body.to_string()).expect("an answer");
    assert_eq!(response.status().as_u16(), 200);
    let lines = BufReader::new(response.into_body().into_reader()).lines().map_while(Result::ok);
    lines.filter_map(|line| line.strip_prefix("data: ").map(str::to_owned))
}

/// Opens `count` streams, each read by `read` on a thread of its own. Comes back when all have
/// begun: before its first event, a stream that fails has a status of its own instead.
pub(crate) fn open_streams<T: Send + 'static>(
    count: usize,
    url: &str,
    body: &Value,
    read: fn(&mut dyn Iterator<Item = String>) -> T,
) -> Vec<JoinHandle<T>> {
    let (begun, begins) = channel();
    let open = |_| {
        let (url, body, begun) = (url.to_owned(), body.clone(), begun.clone());
        std::thread::spawn(move || {
            let mut events = stream(&url, &body).peekable();
            events.peek();
            begun.send(()).unwrap();
            read(&mut events)
        })
    };
    let streams = (0..count).map(open).collect();
    for _ in 0..count {
        begins.recv_timeout(Duration::from_secs(60)).expect("a stream that begins");
    }
    streams
}

/// A chat request.
pub(crate) fn chat(content: &str, max_tokens: u32) -> Value {
    json!({
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
    })
}
