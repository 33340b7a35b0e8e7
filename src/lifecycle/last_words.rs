//! What a process leaves behind for whoever asks why it ended: a line in the container's
//! termination log, and a file that the next process in its place reads back and exports. Knows no
//! phase and no device.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use rustix::system::uname;
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// What Kubernetes reads of a termination log.
const LOG_BYTES_MAX: usize = 4096;

/// No file of ours is longer.
const FILE_BYTES_MAX: u64 = 16 << 10;

/// Names of pods are not used again: what they left in a shared folder goes after this long.
const KEPT: Duration = Duration::from_secs(30 * 86_400);

/// Why a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It was told to go, and everybody was answered.
    Drained,
    /// It was told to go, and had to cut answers off.
    Cut,
    /// The device cannot compute any more.
    Device,
    /// Work waited and no step finished.
    Hung,
    /// The engine panicked.
    Panic,
    /// It never came to serve.
    Start,
    /// It said nothing: killed, or out of memory.
    Killed,
}

/// How the process before this one ended; `none` where none is known of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastExit {
    /// Its exit code.
    pub code: String,
    /// A [`Reason`].
    pub reason: String,
}

/// The place for this process's last words. The first that are said count.
#[derive(Debug)]
pub struct LastWords {
    file: Option<PathBuf>,
    termination_log: PathBuf,
    said: AtomicBool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// None: it did not come to say so.
    code: Option<u8>,
    reason: String,
    message: String,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Reason; 7] = [
        Reason::Drained,
        Reason::Cut,
        Reason::Device,
        Reason::Hung,
        Reason::Panic,
        Reason::Start,
        Reason::Killed,
    ];

    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Drained => "drained",
            Reason::Cut => "cut",
            Reason::Device => "device",
            Reason::Hung => "hung",
            Reason::Panic => "panic",
            Reason::Start => "start",
            Reason::Killed => "killed",
        }
    }
}

impl LastWords {
    /// Reads what the last process in this place left, and notes that this one has begun: should
    /// it end without a word, the next one knows.
    pub fn open(config: &Config) -> (Self, LastExit) {
        let file = config.admin.last_exit_file.clone().or_else(|| default_file(config));
        let termination_log = config.admin.termination_log.clone();
        let words = Self { file, termination_log, said: AtomicBool::new(false) };
        let last = words.file.as_deref().and_then(read);
        let begun = Record {
            code: None,
            reason: Reason::Killed.as_str().to_owned(),
            message: "ended without a word".to_owned(),
        };
        words.keep(&begun);
        (words, last.unwrap_or_default())
    }

    /// Says why the process ends; only the first call has an effect. Waits for nothing but the
    /// file system, and never fails: there is nobody left to tell.
    pub fn say(&self, code: u8, reason: Reason, message: &str) {
        if self.said.swap(true, Ordering::SeqCst) {
            return;
        }
        let (reason, message) = (reason.as_str(), message.replace('\n', " "));
        if code != 0 {
            self.log(&format!("{reason}: {message}"));
        }
        self.keep(&Record { code: Some(code), reason: reason.to_owned(), message });
    }

    /// Writes to the termination log, which the container runtime made; without one there is
    /// nobody who reads it.
    fn log(&self, line: &str) {
        let cut = (0..=LOG_BYTES_MAX.min(line.len())).rev().find(|at| line.is_char_boundary(*at));
        let line = &line[..cut.unwrap_or(0)];
        let log = fs::OpenOptions::new().write(true).truncate(true).open(&self.termination_log);
        if let Err(error) = log.and_then(|mut log| log.write_all(line.as_bytes())) {
            tracing::debug!(path = %self.termination_log.display(), %error, "no termination log");
        }
    }

    /// Replaces the file as a whole, so that nobody reads half of it.
    fn keep(&self, record: &Record) {
        let Some(file) = &self.file else { return };
        let text = serde_json::to_string(record).expect("numbers and strings");
        let new = file.with_extension("new");
        let kept = file.parent().map_or(Ok(()), fs::create_dir_all);
        let kept = kept.and_then(|()| fs::write(&new, text)).and_then(|()| fs::rename(&new, file));
        if let Err(error) = kept {
            tracing::debug!(path = %file.display(), %error, "last words are not kept");
        }
    }
}

impl Default for LastExit {
    fn default() -> Self {
        Self { code: "none".to_owned(), reason: "none".to_owned() }
    }
}

/// In the cache, which outlives a container's restart; by host and port, because pods may share a
/// cache and servers a machine. None for a port that the system chooses: nobody comes back to it.
fn default_file(config: &Config) -> Option<PathBuf> {
    let (folder, port) = (config.models.cache_dir.join("last-exit"), config.server.port);
    if port == 0 {
        return None;
    }
    forget_old(&folder);
    let host = uname().nodename().to_string_lossy().replace('/', "_");
    Some(folder.join(format!("{host}-{port}.json")))
}

fn forget_old(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let changed = entry.metadata().and_then(|file| file.modified());
        let age = changed.ok().and_then(|at| SystemTime::now().duration_since(at).ok());
        if age.is_some_and(|age| age > KEPT) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// What a file says, if it is one of ours. Labels come of it, so only known words are let in.
fn read(file: &Path) -> Option<LastExit> {
    if fs::metadata(file).ok()?.len() > FILE_BYTES_MAX {
        return None;
    }
    let record: Record = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    let known = Reason::ALL.into_iter().find(|reason| reason.as_str() == record.reason)?;
    let code = record.code.map_or_else(|| "unknown".to_owned(), |code| code.to_string());
    Some(LastExit { code, reason: known.as_str().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path) -> Config {
        let mut config = Config::default();
        config.admin.termination_log = folder.join("termination-log");
        config.models.cache_dir = folder.join("cache");
        config.server.port = 8080;
        config
    }

    fn exit(code: &str, reason: &str) -> LastExit {
        LastExit { code: code.into(), reason: reason.into() }
    }

    #[test]
    fn the_next_process_reads_what_the_last_one_said() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let (words, before) = LastWords::open(&config);
        assert_eq!(before, LastExit::default());
        words.say(4, Reason::Device, "an illegal address\nin a kernel");
        words.say(0, Reason::Drained, "too late");
        // As after a container's restart: the same folder, the same host.
        assert_eq!(LastWords::open(&config).1, exit("4", "device"));
        // That one never said anything.
        assert_eq!(LastWords::open(&config).1, exit("unknown", "killed"));
        let mut other = config.clone();
        other.server.port = 8081;
        assert_eq!(LastWords::open(&other).1, LastExit::default());
        other.server.port = 0;
        assert_eq!(LastWords::open(&other).0.file, None);
    }

    #[test]
    fn a_termination_log_gets_one_line_and_is_never_made() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let log = &config.admin.termination_log;
        LastWords::open(&config).0.say(4, Reason::Hung, "nobody reads this");
        assert!(!log.exists());
        fs::write(log, "what a runtime may have put there").unwrap();
        LastWords::open(&config).0.say(0, Reason::Drained, "a clean end says nothing");
        assert!(fs::read_to_string(log).unwrap().starts_with("what a runtime"));
        LastWords::open(&config).0.say(4, Reason::Hung, "no step\nfinished");
        assert_eq!(fs::read_to_string(log).unwrap(), "hung: no step finished");
        LastWords::open(&config).0.say(70, Reason::Start, &"é".repeat(5000));
        assert!((4094..=4096).contains(&fs::metadata(log).unwrap().len()));
    }

    #[test]
    fn what_is_not_ours_is_not_exported() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        let file = folder.path().join("last-exit.json");
        config.admin.last_exit_file = Some(file.clone());
        for text in ["", "{}", r#"{"code":4,"reason":"a label by somebody","message":""}"#] {
            fs::write(&file, text).unwrap();
            assert_eq!(LastWords::open(&config).1, LastExit::default(), "{text}");
        }
        // A folder that cannot be written to costs the words, not the process.
        config.admin.last_exit_file = Some("/proc/nowhere/last-exit.json".into());
        LastWords::open(&config).0.say(3, Reason::Cut, "2 requests were cut off");
    }
}
