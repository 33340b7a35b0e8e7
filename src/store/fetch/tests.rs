//! The cache against everything that can go wrong with it, with a wheel made here and a stand-in
//! for pip. No network.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;

use super::{Fetch, Pip, ensure_timed, places, stranded};
use crate::config::manifest::{Manifest, ManifestFile, ManifestLimits};
use crate::config::{Models, Verify};
use crate::model::ModelTask;
use crate::store::ModelFiles;
use crate::store::error::StoreError;
use crate::store::progress::{Progress, Stage};

const WEIGHTS: &str = "pkg/model.bin";

/// A cache, a wheel, a stand-in for pip that copies the wheel and counts its calls.
struct Bench {
    dir: tempfile::TempDir,
    models: Models,
    manifest: Manifest,
}

fn weights() -> Vec<u8> {
    (0..3_000_000_u32).flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()).collect()
}

fn file(name: &str, content: &[u8], sources: &[&str]) -> ManifestFile {
    let sha256 = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    let sources = sources.iter().map(|source| (*source).to_owned()).collect();
    ManifestFile { file: name.into(), sha256, bytes: content.len() as u64, sources }
}

fn wheel(path: &Path, members: &[(&str, &[u8])]) {
    let mut wheel = zip::ZipWriter::new(File::create(path).expect("a file"));
    for (name, content) in members {
        wheel.start_file(*name, SimpleFileOptions::default()).expect("a member");
        wheel.write_all(content).expect("its content");
    }
    wheel.finish().expect("a wheel");
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let models =
            Models { cache_dir: dir.path().join("cache"), roots: vec![], ..Models::default() };
        let files = vec![
            file("model.bin", &weights(), &["package:pkg==1.0/pkg/model.bin"]),
            file("config.json", b"{}\n", &["package:pkg==1.0/pkg/config.json"]),
        ];
        let manifest = Manifest {
            name: "org/a-model".into(),
            aliases: vec![],
            task: ModelTask::Embed,
            dtype: Default::default(),
            license: "MIT".into(),
            owned_by: None,
            files,
            limits: ManifestLimits::default(),
            objective: Default::default(),
            matryoshka: false,
            weight: 1.0,
            preload: true,
        };
        let bench = Self { dir, models, manifest };
        wheel(&bench.at("source.whl"), &[(WEIGHTS, &weights()), ("pkg/config.json", b"{}\n")]);
        bench.script(
            "pip",
            "echo $WANT >> \"$ROOT/calls\"\ncp \"$ROOT/source.whl\" \"$DEST/pkg-1.0.whl\"",
        );
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A shell script that knows `$ROOT` (the bench) and `$DEST` (pip's --dest).
    fn script(&self, name: &str, body: &str) {
        let root = self.dir.path().display();
        let dest = "while [ $# -gt 0 ]; do [ \"$1\" = --dest ] && DEST=$2; WANT=$1; shift; done";
        let path = self.at(name);
        fs::write(&path, format!("#!/bin/sh\nROOT={root}\n{dest}\n{body}\n")).expect("a script");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("permissions");
    }

    fn calls(&self) -> usize {
        fs::read_to_string(self.at("calls")).map_or(0, |calls| calls.lines().count())
    }

    fn ensure(&self, progress: &Progress) -> Result<ModelFiles, StoreError> {
        let pip = Pip::of(&[&self.at("no-such-python"), &self.at("pip")]);
        Fetch::new(&self.manifest, &self.models, progress, pip).run()
    }

    fn ready(&self) -> ModelFiles {
        self.ensure(&Progress::silent()).expect("ready")
    }

    fn refused(&self) -> StoreError {
        let error = self.ensure(&Progress::silent()).expect_err("must fail");
        assert_eq!(self.half_files(), Vec::<String>::new(), "{error}");
        error
    }

    /// The stages that one call goes through.
    fn stages(&self) -> Vec<Stage> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let observer = Box::new(move |stage, _: &str, _| log.lock().expect("no panic").push(stage));
        self.ensure(&Progress::silent().observed(observer)).expect("ready");
        seen.lock().expect("no panic").clone()
    }

    /// Everything in the cache that is neither a whole file, its stamp nor the lock.
    fn half_files(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.folder()) else { return Vec::new() };
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let names = names.map(|name| name.to_string_lossy().into_owned());
        let whole = |name: &String| {
            let path = self.folder().join(name);
            let pinned = self.manifest.files.iter().find(|file| name.ends_with(&file.file));
            name == ".lock"
                || name.ends_with(".ok")
                || pinned.is_some_and(|file| {
                    let content = fs::read(path).expect("readable");
                    let sha = Sha256::digest(content);
                    sha.iter().map(|byte| format!("{byte:02x}")).collect::<String>() == file.sha256
                })
        };
        names.filter(|name| !whole(name)).collect()
    }

    fn folder(&self) -> PathBuf {
        self.models.cache_dir.join("models/org/a-model")
    }
}

#[test]
fn a_package_is_fetched_once_and_every_member_checked() {
    let bench = Bench::new();
    let files = bench.ready();
    assert_eq!(fs::read(files.path("model.bin").expect("there")).expect("readable"), weights());
    assert_eq!(fs::read(files.path("config.json").expect("there")).expect("readable"), b"{}\n");
    assert_eq!(bench.calls(), 1, "one download for both files");
    assert_eq!(fs::read_to_string(bench.at("calls")).expect("calls"), "pkg==1.0\n");
    assert_eq!(bench.half_files(), Vec::<String>::new());
    assert_eq!(bench.ready().files, files.files);
    assert_eq!(bench.calls(), 1, "nothing to fetch");
}

#[test]
fn a_stamp_spares_the_second_reading_until_the_file_changes() {
    let bench = Bench::new();
    assert_eq!(bench.stages(), [Stage::Download, Stage::Extract, Stage::Extract]);
    assert_eq!(bench.stages(), []);
    let path = bench.ready().path("model.bin").expect("there").clone();
    let touched = std::time::SystemTime::now() + Duration::from_secs(5);
    File::options().write(true).open(&path).expect("open").set_modified(touched).expect("touch");
    assert_eq!(bench.stages(), [Stage::Verify], "same content, new time");
    assert_eq!(bench.stages(), []);

    // Same size, other content.
    let mut other = weights();
    other[12_345] ^= 1;
    fs::write(&path, other).expect("written");
    assert_eq!(bench.stages(), [Stage::Verify, Stage::Download, Stage::Extract]);
    assert_eq!(fs::read(&path).expect("readable"), weights());
    // Other size: not even read.
    fs::write(&path, b"short").expect("written");
    assert_eq!(bench.stages(), [Stage::Download, Stage::Extract]);

    let mut bench = bench;
    bench.models.verify = Verify::Always;
    assert_eq!(bench.stages(), [Stage::Verify, Stage::Verify]);
}

#[test]
fn a_moved_cache_keeps_its_stamps() {
    let mut bench = Bench::new();
    bench.ready();
    fs::rename(bench.at("cache"), bench.at("moved")).expect("moved");
    bench.models.cache_dir = bench.at("moved");
    assert_eq!(bench.stages(), []);
}

#[test]
fn a_wrong_checksum_is_told_and_nothing_kept() {
    let mut bench = Bench::new();
    let right = bench.manifest.files[0].sha256.clone();
    bench.manifest.files[0].sha256 = "0".repeat(64);
    let error = bench.refused();
    let message = error.to_string();
    assert!(
        message.contains(&format!("expected sha256 {}, found {right}", "0".repeat(64))),
        "{message}"
    );
    assert!(message.starts_with("org/a-model: cannot get model.bin; tried (1) "), "{message}");
    assert_eq!(error.exit_code(), 65);
    assert!(
        fs::read_dir(bench.folder())
            .expect("a folder")
            .all(|entry| { entry.expect("an entry").file_name() == ".lock" })
    );

    bench.manifest.files[0].sha256 = right;
    bench.manifest.files[0].bytes -= 1;
    let error = bench.refused();
    assert!(
        error.to_string().contains("wrong size: expected 11999999 bytes, found 12000000"),
        "{error}"
    );
    assert_eq!(error.exit_code(), 65);
}

#[test]
fn a_missing_member_and_a_damaged_wheel_are_told_apart() {
    let mut bench = Bench::new();
    bench.manifest.files[1].sources = vec!["package:pkg==1.0/pkg/other.json".into()];
    let error = bench.refused();
    assert!(error.to_string().contains("the wheel has no member pkg/other.json"), "{error}");
    assert_eq!(error.exit_code(), 69);

    let bench = Bench::new();
    let whole = fs::read(bench.at("source.whl")).expect("a wheel");
    for kept in [0, 10, whole.len() / 2, whole.len() - 10] {
        fs::write(bench.at("source.whl"), &whole[..kept]).expect("cut");
        let error = bench.refused();
        assert!(error.to_string().contains("the wheel is damaged"), "{kept}: {error}");
    }
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] ^= 0x10;
    fs::write(bench.at("source.whl"), &flipped).expect("flipped");
    let error = bench.refused().to_string();
    assert!(error.contains("damaged") || error.contains("wrong"), "{error}");
    fs::write(bench.at("source.whl"), &whole).expect("whole again");
    bench.ready();
}

#[test]
fn a_member_that_unfolds_to_more_than_it_says_is_cut_off() {
    let bench = Bench::new();
    wheel(
        &bench.at("source.whl"),
        &[(WEIGHTS, &vec![7; 20_000_000]), ("pkg/config.json", b"{}\n")],
    );
    // Both headers now claim the size that the manifest pins.
    let mut bytes = fs::read(bench.at("source.whl")).expect("a wheel");
    let (true_size, claimed) = (20_000_000_u32.to_le_bytes(), 12_000_000_u32.to_le_bytes());
    let places: Vec<usize> =
        (0..bytes.len() - 4).filter(|at| bytes[*at..*at + 4] == true_size).collect();
    assert_eq!(places.len(), 2);
    for at in places {
        bytes[at..at + 4].copy_from_slice(&claimed);
    }
    fs::write(bench.at("source.whl"), bytes).expect("written");
    let message = bench.refused().to_string();
    assert!(message.contains("damaged") || message.contains("wrong"), "{message}");
}

#[test]
fn every_source_that_failed_is_listed() {
    let mut bench = Bench::new();
    bench.models.roots = vec![bench.at("root")];
    let sources = ["package:pkg==9.9/pkg/model.bin", "file:/nonexistent/model.bin"];
    bench.manifest.files[0].sources = sources.map(str::to_owned).to_vec();
    bench.script(
        "pip",
        "echo noise\necho 'ERROR: No matching distribution found for pkg==9.9' >&2\nexit 1",
    );
    let message = bench.refused().to_string();
    let root = bench.at("root/org/a-model/model.bin");
    for part in [
        "(1) ".to_owned() + &bench.folder().display().to_string(),
        format!("(2) {}: not there", root.display()),
        "(3) package:pkg==9.9/pkg/model.bin: ".to_owned(),
        "ERROR: No matching distribution found for pkg==9.9".to_owned(),
        "(4) file:/nonexistent/model.bin: not there".to_owned(),
    ] {
        assert!(message.contains(&part), "{part} is not in {message}");
    }
    assert!(!message.contains('\n'), "{message}");
}

#[test]
fn a_machine_without_pip_says_so() {
    let bench = Bench::new();
    bench.script("no-module", "echo \"$0: No module named pip\" >&2; exit 1");
    let pip = Pip::of(&[&bench.at("none"), &bench.at("no-module")]);
    let progress = Progress::silent();
    let error =
        Fetch::new(&bench.manifest, &bench.models, &progress, pip).run().expect_err("no pip");
    assert!(error.to_string().contains("no pip here"), "{error}");
    let pip = Pip::of(&[&bench.at("none"), &bench.at("no-module"), &bench.at("pip")]);
    Fetch::new(&bench.manifest, &bench.models, &progress, pip).run().expect("the third works");
}

#[test]
fn what_nothing_can_bring_is_known_without_trying() {
    let mut bench = Bench::new();
    bench.manifest.files[1].sources.push("https://localhost/config.json".into());
    let missing = ["model.bin", "config.json"].map(str::to_owned);
    let stranded = |pip: &str| stranded(&bench.manifest, &missing, &Pip::of(&[&bench.at(pip)]));
    assert_eq!(stranded("none"), ["model.bin"]);
    assert!(stranded("pip").is_empty());
}

#[test]
fn offline_lists_where_it_looked_and_fetches_nothing() {
    let mut bench = Bench::new();
    bench.models.offline = true;
    let error = bench.refused();
    let message = error.to_string();
    assert!(
        message.contains("models.offline is set") && message.contains("not there"),
        "{message}"
    );
    assert_eq!((bench.calls(), error.exit_code()), (0, 69));
    bench.models.offline = false;
    bench.ready();
    bench.models.offline = true;
    bench.ready();
    assert_eq!(bench.calls(), 1);
}

#[test]
fn offline_also_says_where_the_hub_keeps_files() {
    let mut bench = Bench::new();
    let (commit, source) = ("0123456789".repeat(4), "hub:org/repo");
    bench.models.offline = true;
    bench.models.hub_cache = Some(bench.at("hub"));
    bench.models.roots = vec![bench.at("root")];
    bench.manifest.files[0].sources.insert(0, format!("{source}@{commit}/a/model.bin"));
    let message = bench.refused().to_string();
    let snapshot = format!("hub/models--org--repo/snapshots/{commit}/a/model.bin");
    let [hub, root] = [&snapshot, "root/org/a-model/model.bin"].map(|path| bench.at(path));
    for place in [hub, root] {
        assert!(message.contains(&*place.to_string_lossy()), "{}: {message}", place.display());
    }
    assert!(message.contains(", and not fetched: models.offline is set"), "{message}");
    let looked = places(&bench.manifest, &bench.models);
    assert_eq!(looked[0].1[1..3], [bench.at("root/org/a-model/model.bin"), bench.at(&snapshot)]);
}

#[test]
fn checksums_take_time_of_their_own() {
    let mut bench = Bench::new();
    let root = bench.at("root/org/a-model");
    fs::create_dir_all(&root).expect("a folder");
    fs::write(root.join("model.bin"), weights()).expect("a file");
    fs::write(root.join("config.json"), b"{}\n").expect("a file");
    bench.models.roots = vec![bench.at("root")];
    let spent = || {
        let (_, spent) = ensure_timed(&bench.manifest, &bench.models, &Progress::silent())
            .expect("they are there");
        spent
    };
    assert!(spent() > Duration::ZERO);
    assert_eq!(spent(), Duration::ZERO, "stamped");
}

#[test]
fn files_that_already_lie_there_are_used_in_place() {
    let mut bench = Bench::new();
    let (root, lying) = (bench.at("root"), bench.at("lying.json"));
    fs::create_dir_all(root.join("org/a-model")).expect("a folder");
    fs::write(root.join("org/a-model/model.bin"), weights()).expect("a file");
    fs::write(&lying, b"{}\n").expect("a file");
    bench.models.roots = vec![bench.at("nothing"), root.clone()];
    bench.models.offline = true;
    bench.manifest.files[1].sources.insert(0, format!("file:{}", lying.display()));
    assert_eq!(bench.stages(), [Stage::Verify, Stage::Verify]);
    assert_eq!(bench.stages(), []);
    let files = bench.ready();
    assert_eq!(files.path("model.bin"), Some(&root.join("org/a-model/model.bin")));
    assert_eq!(files.path("config.json"), Some(&lying));
    // A wrong one in place is left alone, told, and passed over.
    fs::write(&lying, b"[]\n").expect("a file");
    let error = bench.refused();
    assert!(error.to_string().contains("wrong checksum"), "{error}");
    bench.models.offline = false;
    bench.ready();
    assert_eq!(fs::read(&lying).expect("still there"), b"[]\n");
}

#[test]
fn of_many_callers_one_fetches() {
    let bench = Bench::new();
    let copy = "cp \"$ROOT/source.whl\" \"$DEST/pkg-1.0.whl\"";
    bench.script("pip", &format!("echo $WANT >> \"$ROOT/calls\"\nsleep 0.3\n{copy}"));
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..6).map(|_| scope.spawn(|| bench.ready())).collect();
        for caller in callers {
            assert_eq!(caller.join().expect("no panic").files.len(), 2);
        }
    });
    assert_eq!(bench.calls(), 1);
    assert_eq!(bench.half_files(), Vec::<String>::new());
}

#[test]
fn what_a_killed_fetch_left_is_swept() {
    let bench = Bench::new();
    let litter = |name: &str| {
        let path = bench.folder().join(name);
        fs::create_dir_all(&path).expect("a folder");
        fs::write(path.join("half"), b"half").expect("a file");
    };
    litter(".tmp-1-1");
    fs::write(bench.folder().join("x.ok-tmp-1"), b"half").expect("a file");
    bench.ready();
    assert_eq!(bench.half_files(), Vec::<String>::new());
    litter(".tmp-1-2");
    bench.ready();
    assert_eq!(bench.half_files(), Vec::<String>::new(), "also when nothing is to fetch");
    litter(".tmp-1-3");
    let lock = File::open(bench.folder().join(".lock")).expect("a lock file");
    lock.lock().expect("locked");
    bench.ready();
    assert_eq!(bench.half_files(), [".tmp-1-3"], "another fetch's scratch is left alone");
}

#[test]
fn a_stop_ends_the_download_and_the_wait() {
    let bench = Bench::new();
    bench.script("pip", "exec sleep 30");
    let progress = Progress::silent();
    let started = Instant::now();
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..2).map(|_| scope.spawn(|| bench.ensure(&progress))).collect();
        std::thread::sleep(Duration::from_millis(200));
        progress.stop();
        for caller in callers {
            let error = caller.join().expect("no panic").expect_err("stopped");
            assert!(matches!(error, StoreError::Stopped { .. }), "{error}");
        }
    });
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(bench.half_files(), Vec::<String>::new());
}

#[test]
fn a_cache_that_cannot_be_written_to_is_told_with_what_to_do() {
    let mut bench = Bench::new();
    bench.models.cache_dir = "/proc/none".into();
    let error = bench.ensure(&Progress::silent()).expect_err("no such place");
    assert_eq!(error.exit_code(), 73);
    assert!(error.to_string().contains("SCONCE_CACHE_DIR"), "{error}");
    // Files in place need no cache.
    let root = bench.at("root");
    fs::create_dir_all(root.join("org/a-model")).expect("a folder");
    fs::write(root.join("org/a-model/model.bin"), weights()).expect("a file");
    fs::write(root.join("org/a-model/config.json"), b"{}\n").expect("a file");
    bench.models.roots = vec![root];
    bench.ready();
}

#[test]
fn a_full_disk_is_told_plainly() {
    let bench = Bench::new();
    bench.script("pip", "echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1");
    let error = bench.refused();
    assert!(error.to_string().contains("the disk is full: no room for 12000000 bytes"), "{error}");
    assert_eq!(error.exit_code(), 73);
    let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    let failure = crate::store::error::Failure::writing("write", Path::new("x"), full);
    assert!(matches!(failure, crate::store::error::Failure::DiskFull));
}
