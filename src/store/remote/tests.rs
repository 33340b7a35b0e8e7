//! Downloads from a small HTTP server made here, which misbehaves on request.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::{Address, Client, Failure};
use crate::config::Models;
use crate::config::manifest::Manifest;
use crate::store::fetch::ensure;
use crate::store::progress::{Progress, Stage};

/// What the server does with its n-th request; the last stays.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// Ranges are honoured.
    Serve,
    /// The whole file, whatever range is asked for.
    Whole,
    /// So many bytes, then the connection is cut.
    Cut(usize),
    /// This status, and nothing else.
    Refuse(u16),
    /// A redirect to the other server.
    Elsewhere(u16),
}

/// A server on loopback, and what it was asked.
struct Hub {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

fn content() -> Vec<u8> {
    (0..700_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

impl Hub {
    fn start(acts: &[Act]) -> Self {
        Self::at("127.0.0.1:0", acts)
    }

    fn at(address: &str, acts: &[Act]) -> Self {
        let listener = TcpListener::bind(address).expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (seen, acts) = (Arc::clone(&heads), acts.to_vec());
        std::thread::spawn(move || {
            for (index, stream) in listener.incoming().enumerate() {
                let act = acts[index.min(acts.len() - 1)];
                let stream = stream.expect("a connection");
                let head = head(&stream);
                // Before the answer: who has that may look at once.
                seen.lock().expect("no panic").push(head.clone());
                answer(stream, &head, act);
            }
        });
        Self { port, heads }
    }

    fn models(&self) -> Models {
        let hub_endpoint = format!("http://127.0.0.1:{}/hub", self.port);
        Models { hub_endpoint, hub_token: Some("s3cret".into()), ..Models::default() }
    }

    fn asked(&self) -> Vec<String> {
        self.heads.lock().expect("no panic").clone()
    }
}

/// A request's head in lower case.
fn head(stream: &TcpStream) -> String {
    let mut head = String::new();
    let mut lines = BufReader::new(stream);
    while lines.read_line(&mut head).expect("a line") > 2 {}
    head.to_lowercase()
}

/// The answer to it, the only one of its connection.
fn answer(mut stream: TcpStream, head: &str, act: Act) {
    let content = content();
    let range = head.split("range: bytes=").nth(1).and_then(|rest| rest.split('-').next());
    let from: usize = range.map_or(0, |text| text.parse().expect("a number"));
    let ok = format!("HTTP/1.1 200 OK\r\nContent-Length: {}", content.len());
    let close = "\r\nConnection: close\r\n\r\n";
    let (status, body) = match act {
        Act::Serve if from > 0 => {
            let left = content.len() - from;
            let status = format!("HTTP/1.1 206 Partial Content\r\nContent-Length: {left}");
            (status, &content[from..])
        }
        Act::Serve | Act::Whole => (ok, &content[..]),
        Act::Cut(bytes) => (ok, &content[..bytes]),
        Act::Refuse(code) => (format!("HTTP/1.1 {code} No\r\nContent-Length: 0"), &content[..0]),
        Act::Elsewhere(port) => {
            let to = format!("http://127.0.0.2:{port}/file");
            (format!("HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {to}"), &content[..0])
        }
    };
    // A client that has heard enough hangs up.
    let _ = stream.write_all(format!("{status}{close}").as_bytes());
    let _ = stream.write_all(body);
}

/// A place for one download.
struct Target {
    _dir: tempfile::TempDir,
    partial: PathBuf,
}

impl Target {
    fn new(there: &[u8]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let partial = dir.path().join("part");
        std::fs::write(&partial, there).expect("written");
        Self { _dir: dir, partial }
    }

    fn bring(&self, hub: &Hub, bytes: usize) -> Result<Vec<u8>, Failure> {
        let models = hub.models();
        let address = Address::on_hub(&models, "org/model", &"a".repeat(40), "sub/file.bin");
        let progress = Progress::silent();
        let mut meter = progress.begin(Stage::Download, "model", "file.bin", None);
        let client = Client::new(&models)?;
        client.download(&address, &self.partial, bytes as u64, &mut meter)?;
        Ok(std::fs::read(&self.partial).expect("there"))
    }
}

fn reason(failure: Failure) -> String {
    match failure {
        Failure::Absent(reason) | Failure::Wrong(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_comes_whole_with_the_hubs_address_and_token() {
    let hub = Hub::start(&[Act::Serve]);
    let brought = Target::new(b"").bring(&hub, content().len()).expect("brought");
    assert!(brought == content());
    let asked = hub.asked();
    let path = format!("get /hub/org/model/resolve/{}/sub/file.bin http/1.1", "a".repeat(40));
    assert!(asked[0].starts_with(&path), "{}", asked[0]);
    assert!(asked[0].contains("authorization: bearer s3cret"), "{}", asked[0]);
}

#[test]
fn what_is_there_is_gone_on_with() {
    let hub = Hub::start(&[Act::Serve]);
    let brought = Target::new(&content()[..5000]).bring(&hub, content().len()).expect("brought");
    assert!(brought == content());
    assert!(hub.asked()[0].contains("range: bytes=5000-"), "{:?}", hub.asked());

    let hub = Hub::start(&[Act::Whole]);
    let brought = Target::new(&[7; 5000]).bring(&hub, content().len()).expect("brought");
    assert!(brought == content(), "a server without ranges starts over");
}

#[test]
fn a_cut_connection_costs_only_what_was_not_received() {
    let hub = Hub::start(&[Act::Cut(300_000), Act::Refuse(503), Act::Serve]);
    let brought = Target::new(b"").bring(&hub, content().len()).expect("brought");
    assert!(brought == content());
    let asked = hub.asked();
    assert!(asked.len() == 3 && asked[2].contains("range: bytes="), "{asked:?}");
}

#[test]
fn refusals_are_told_and_not_repeated() {
    for (code, word) in [(404, "404"), (401, "HF_TOKEN"), (403, "HF_TOKEN"), (410, "410")] {
        let hub = Hub::start(&[Act::Refuse(code)]);
        let failure = Target::new(b"").bring(&hub, 10).expect_err("refused");
        let told = reason(failure);
        assert!(told.contains(word), "{told}");
        assert_eq!(hub.asked().len(), 1, "{code}");
    }
}

#[test]
fn a_file_of_another_size_is_not_even_received() {
    let hub = Hub::start(&[Act::Serve]);
    let told = reason(Target::new(b"").bring(&hub, 10).expect_err("wrong"));
    assert_eq!(told, "wrong size: expected 10 bytes, found 700000");
    // What is there is longer than the file: it is not of this file.
    let hub = Hub::start(&[Act::Serve]);
    let target = Target::new(&[7; 800_000]);
    assert!(target.bring(&hub, content().len()).expect("brought") == content());
}

#[test]
fn the_token_stays_with_the_hub() {
    let storage = Hub::at("127.0.0.2:0", &[Act::Serve]);
    let hub = Hub::start(&[Act::Elsewhere(storage.port)]);
    let brought = Target::new(b"").bring(&hub, content().len()).expect("brought");
    assert!(brought == content());
    assert!(hub.asked()[0].contains("s3cret"));
    let asked = storage.asked();
    assert!(asked.len() == 1 && !asked[0].contains("s3cret"), "{asked:?}");
}

#[test]
fn an_unusable_certificate_file_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("ca.pem");
    for content in [None, Some("no certificate")] {
        if let Some(text) = content {
            std::fs::write(&file, text).expect("written");
        }
        let models = Models { ca_file: Some(file.clone()), ..Models::default() };
        let told = reason(Client::new(&models).expect_err("refused"));
        assert!(told.contains("models.ca_file") && told.contains("ca.pem"), "{told}");
    }
}

/// A cache, and a manifest of one file on `hub`.
fn manifest(hub: &Hub, dir: &std::path::Path) -> (Manifest, Models) {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let sha256: String = Sha256::digest(content()).iter().map(|b| format!("{b:02x}")).collect();
    let text = format!(
        "name = \"m\"\ntask = \"embed\"\nlicense = \"MIT\"\n[[files]]\nfile = \"model.bin\"\n\
         sha256 = \"{sha256}\"\nbytes = {}\nsources = [\"hub:org/model@{commit}/model.bin\"]\n",
        content().len()
    );
    let models = Models { cache_dir: dir.to_owned(), roots: vec![], ..hub.models() };
    (toml::from_str(&text).expect("a manifest"), models)
}

#[test]
fn a_download_that_went_wrong_before_is_brought_from_its_beginning() {
    let dir = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&[Act::Serve]);
    let (manifest, models) = manifest(&hub, dir.path());
    let folder = dir.path().join("models/m");
    std::fs::create_dir_all(&folder).expect("a folder");
    let sha = &manifest.files[0].sha256[..16];
    std::fs::write(folder.join(format!(".part-{sha}-model.bin")), [9; 5000]).expect("written");
    std::fs::write(folder.join(".part-ffffffffffffffff-old.bin"), [9; 10]).expect("written");
    let files = ensure(&manifest, &models, &Progress::silent()).expect("ready");
    let path = files.path("model.bin").expect("there");
    assert!(std::fs::read(path).expect("readable") == content());
    let asked = hub.asked();
    assert!(asked[0].contains("range: bytes=5000-"), "{asked:?}");
    assert!(!asked[1].contains("range:"), "{asked:?}");
    let hidden = std::fs::read_dir(&folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    let parts: Vec<String> = hidden.filter(|name| name.starts_with(".part")).collect();
    assert!(parts.is_empty(), "{parts:?}");
    ensure(&manifest, &models, &Progress::silent()).expect("ready");
    assert_eq!(hub.asked().len(), 2, "nothing to fetch");
}

#[test]
fn the_hubs_own_cache_is_used_in_place_and_offline_too() {
    let dir = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(&[Act::Refuse(500)]);
    let (manifest, mut models) = manifest(&hub, &dir.path().join("cache"));
    models.offline = true;
    models.hub_cache = Some(dir.path().join("hub"));
    let error = ensure(&manifest, &models, &Progress::silent()).expect_err("offline").to_string();
    assert!(error.contains("models.offline is set"), "{error}");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let folder = dir.path().join("hub/models--org--model/snapshots").join(commit);
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("model.bin"), content()).expect("written");
    let files = ensure(&manifest, &models, &Progress::silent()).expect("ready");
    assert_eq!(files.path("model.bin"), Some(&folder.join("model.bin")));
    assert!(hub.asked().is_empty());
}
