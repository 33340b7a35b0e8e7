//! One model as data: `models/*.toml`. Knows what a manifest may say, not how files are fetched.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::model::{Dtype, ModelTask};

use super::document::{self, Step};
use super::error::{ConfigError, Fault};
use super::load::read_text;
use super::values::join;

/// In use where there is no folder of manifests, so that an installed binary works anywhere.
const BUILT_IN: [(&str, &str); 2] = [
    ("all-minilm-l6-v2.toml", include_str!("../../models/all-minilm-l6-v2.toml")),
    ("smollm2-135m-instruct.toml", include_str!("../../models/smollm2-135m-instruct.toml")),
];

const NAME_LENGTH_MAX: usize = 96;
const MANIFESTS_MAX: usize = 1024;
/// A tokenizer or a shard; more is a mistake in the manifest.
const FILE_BYTES_MAX: u64 = 1 << 42;
/// What can be an objective.
pub(crate) const LATENCY_SECONDS: RangeInclusive<f64> = 0.001..=86_400.0;

/// A model manifest: sources, pinned content, task and limits.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Metric label and API id: lower case letters, digits, `.`, `_`, `-`, `/`.
    pub name: String,
    /// Other names that requests may use.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// What it is for.
    pub task: ModelTask,
    /// How float weights are kept and multiplied: `auto`, `f32`, `bf16` or `int8`.
    #[serde(default)]
    pub dtype: Dtype,
    /// SPDX expression of the weights.
    pub license: String,
    /// Named in `/v1/models`.
    #[serde(default)]
    pub owned_by: Option<String>,
    /// Its files.
    pub files: Vec<ManifestFile>,
    /// Limits, each at most what the model's own header allows.
    #[serde(default)]
    pub limits: ManifestLimits,
    /// What its answers are measured by.
    #[serde(default)]
    pub objective: ManifestObjective,
    /// The first values of its vectors are vectors too (Matryoshka representation learning), so
    /// that requests may ask for fewer `dimensions`.
    #[serde(default)]
    pub matryoshka: bool,
    /// Share of the device relative to others with work.
    #[serde(default = "one")]
    pub weight: f64,
    /// Load before the server says it is ready.
    #[serde(default = "yes")]
    pub preload: bool,
}

/// One file of a model.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// What it is called here: `model.gguf`, `model.safetensors`, `config.json`, `tokenizer.json`,
    /// `pooling.json`.
    pub file: String,
    /// Lower-case hexadecimal.
    pub sha256: String,
    /// Exact size.
    pub bytes: u64,
    /// Tried in order: `hub:OWNER/NAME@COMMIT/PATH`, `https://HOST/PATH`,
    /// `package:NAME==VERSION/MEMBER` or `file:PATH`. A loaded manifest's paths are relative to
    /// the working directory; as written, they are relative to the manifest.
    pub sources: Vec<String>,
}

/// Limits of a model.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestLimits {
    /// Longest sequence in tokens.
    pub context: Option<u32>,
    /// Most sequences running at once.
    pub seats: Option<u32>,
}

/// What counts as answered well.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestObjective {
    /// A request's whole time, from its first byte to its last; none: any answer counts.
    pub latency_seconds: Option<f64>,
}

/// A place that a file can come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileSource {
    /// A member of a Python package's wheel.
    Package {
        /// `NAME==VERSION`.
        requirement: String,
        /// Path inside the wheel.
        member: String,
    },
    /// A file of a model hub's repository.
    Hub {
        /// `OWNER/NAME`.
        repo: String,
        /// The commit: a branch or tag may move.
        revision: String,
        /// Path inside the repository.
        path: String,
    },
    /// A file at an address.
    Https(String),
    /// A file on this machine, used where it lies.
    File(PathBuf),
}

/// What is wrong with a manifest, and where in it.
struct Wrong {
    path: Vec<Step>,
    message: String,
}

impl Manifest {
    /// Bytes of all its files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// How long one of its requests may take.
    pub fn objective(&self) -> Option<Duration> {
        self.objective.latency_seconds.map(Duration::from_secs_f64)
    }
}

impl FileSource {
    /// Reads one entry of `sources`.
    ///
    /// # Errors
    /// What a source looks like.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("file:").filter(|path| !path.is_empty()) {
            return Ok(Self::File(path.into()));
        }
        if let Some(rest) = text.strip_prefix("hub:") {
            let form = "hub:OWNER/NAME@COMMIT/PATH, the COMMIT as 40 hexadecimal digits";
            return hub(rest).ok_or_else(|| form.into());
        }
        if let Some(rest) = text.strip_prefix("https://") {
            let plain = |c: char| c.is_ascii_graphic() && !"\"<>\\^`{|}".contains(c);
            let host = rest.split('/').next().unwrap_or_default();
            // A password in a manifest would end up in logs.
            let valid = rest.chars().all(plain) && !host.is_empty() && !host.contains('@');
            let valid = valid && rest.len() > host.len() + 1;
            return if valid {
                Ok(Self::Https(text.to_owned()))
            } else {
                Err("https://HOST/PATH, without a user or password".into())
            };
        }
        let package = text.strip_prefix("package:").and_then(|rest| rest.split_once('/'));
        match package {
            Some((requirement, member)) if requirement_is_exact(requirement) => {
                let member = Some(member).filter(|member| !member.is_empty());
                let member = member.ok_or("package:NAME==VERSION/MEMBER, with the MEMBER")?;
                Ok(Self::Package { requirement: requirement.into(), member: member.into() })
            }
            _ => Err("hub:OWNER/NAME@COMMIT/PATH, https://HOST/PATH, \
                      package:NAME==VERSION/MEMBER or file:PATH"
                .into()),
        }
    }
}

/// `OWNER/NAME@COMMIT/PATH`, each part such that an address can be made of it.
fn hub(text: &str) -> Option<FileSource> {
    let (repo, rest) = text.split_once('@')?;
    let (revision, path) = rest.split_once('/')?;
    let (owner, name) = repo.split_once('/')?;
    let commit = revision.len() == 40 && revision.chars().all(|c| c.is_ascii_hexdigit());
    let valid = commit && file_name(owner) && file_name(name) && path.split('/').all(file_name);
    let [repo, revision, path] = [repo, revision, path].map(str::to_owned);
    valid.then_some(FileSource::Hub { repo, revision, path })
}

/// A package and one version of it, in a form that cannot be taken for an option.
fn requirement_is_exact(text: &str) -> bool {
    let plain = |part: &str, extra: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c))
    };
    text.split_once("==")
        .is_some_and(|(name, version)| plain(name, "._-") && plain(version, "._-+!"))
}

/// The manifests of the folder `dir`, sorted by name. Without such a folder, or without a manifest
/// in it, those built in, unless the folder was `chosen` by someone.
///
/// # Errors
/// The first thing that is wrong, with file and line.
pub(super) fn load(dir: &Path, chosen: bool) -> Result<Vec<Manifest>, ConfigError> {
    let paths = match manifest_paths(dir) {
        Ok(paths) => paths,
        Err(reason) if chosen => {
            let message = format!("models.dir {}: cannot be read: {reason}", dir.display());
            return Err(ConfigError::new(Fault::NoInput, message));
        }
        Err(_) => Vec::new(),
    };
    if paths.is_empty() && chosen {
        let message = format!("models.dir {}: no manifest (*.toml) in it", dir.display());
        return Err(ConfigError::new(Fault::NoInput, message));
    }
    if paths.len() > MANIFESTS_MAX {
        let (dir, count) = (dir.display(), paths.len());
        let message = format!("models.dir {dir}: {count} manifests; at most {MANIFESTS_MAX}");
        return Err(ConfigError::new(Fault::Config, message));
    }
    let mut manifests = Vec::new();
    for path in &paths {
        let text = read_text(path).map_err(|reason| {
            let message = format!("{}: cannot be read: {reason}", path.display());
            ConfigError::new(Fault::NoInput, message)
        })?;
        manifests.push((path.clone(), parse(path, &text)?));
    }
    if paths.is_empty() {
        for (name, text) in BUILT_IN {
            let path = Path::new("built-in").join(name);
            manifests.push((path.clone(), parse(&path, text)?));
        }
    }
    check_names(&manifests)?;
    let mut manifests: Vec<Manifest> =
        manifests.into_iter().map(|(_, manifest)| manifest).collect();
    manifests.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(manifests)
}

/// The text of the manifest called `name`: in the folder `dir`, or built in.
pub fn text(dir: &Path, name: &str) -> Option<String> {
    let named = |text: &String| toml::from_str::<Manifest>(text).is_ok_and(|it| it.name == name);
    let paths = manifest_paths(dir).unwrap_or_default();
    let built_in = BUILT_IN.iter().map(|(_, text)| (*text).to_owned());
    paths.iter().filter_map(|path| read_text(path).ok()).chain(built_in).find(named)
}

/// Hidden entries are skipped: a mounted ConfigMap keeps its versions in them.
fn manifest_paths(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".toml") && !name.starts_with('.') && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// One checked manifest, its `file:` paths made relative to the working directory.
pub(super) fn parse(path: &Path, text: &str) -> Result<Manifest, ConfigError> {
    let at = |line: usize, message: &str| {
        ConfigError::new(Fault::Config, format!("{}:{line}: {message}", path.display()))
    };
    let parsed = toml::from_str(text).map_err(|error| document::fault(text, &error));
    let mut manifest: Manifest = parsed.map_err(|(line, message)| at(line, &message))?;
    check(&manifest).map_err(|wrong| at(document::line_at(text, &wrong.path), &wrong.message))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    for source in manifest.files.iter_mut().flat_map(|file| &mut file.sources) {
        if let Ok(FileSource::File(file)) = FileSource::parse(source) {
            *source = format!("file:{}", folder.join(file).display());
        }
    }
    Ok(manifest)
}

/// No two models answer to one name.
fn check_names(manifests: &[(PathBuf, Manifest)]) -> Result<(), ConfigError> {
    let mut owners = BTreeMap::new();
    for (path, manifest) in manifests {
        for name in manifest.aliases.iter().chain([&manifest.name]) {
            if let Some(other) = owners.insert(name, path) {
                let (path, other) = (path.display(), other.display());
                let message = format!("{path}: the name {name:?} is also used in {other}");
                return Err(ConfigError::new(Fault::Config, message));
            }
        }
    }
    Ok(())
}

fn check(manifest: &Manifest) -> Result<(), Wrong> {
    let top = |key: &'static str, message: String| wrong([Step::Key(key)], message);
    if !model_name(&manifest.name, false) {
        let message = name_rule("name", &manifest.name, "lower-case letters");
        return Err(top("name", message));
    }
    for (index, alias) in manifest.aliases.iter().enumerate() {
        if !model_name(alias, true) {
            let path = [Step::Key("aliases"), Step::Item(index)];
            return Err(wrong(path, name_rule("aliases", alias, "letters")));
        }
    }
    if !(manifest.weight > 0.0 && manifest.weight <= 1000.0) {
        let message = format!("weight = {}: must be above 0 and at most 1000", manifest.weight);
        return Err(top("weight", message));
    }
    if manifest.license.trim().is_empty() {
        return Err(top("license", "license is empty: an SPDX expression is needed".into()));
    }
    let limits = [("context", manifest.limits.context), ("seats", manifest.limits.seats)];
    if let Some((key, _)) = limits.iter().find(|(_, limit)| *limit == Some(0)) {
        let path = [Step::Key("limits"), Step::Key(key)];
        return Err(wrong(path, format!("limits.{key} = 0: must be at least 1")));
    }
    let latency = manifest.objective.latency_seconds;
    if let Some(seconds) = latency.filter(|seconds| !LATENCY_SECONDS.contains(seconds)) {
        let path = [Step::Key("objective"), Step::Key("latency_seconds")];
        let (from, to) = (LATENCY_SECONDS.start(), LATENCY_SECONDS.end());
        let message = format!("objective.latency_seconds = {seconds}: must be {from} to {to}");
        return Err(wrong(path, message));
    }
    if manifest.files.is_empty() {
        return Err(top("files", "files is empty: a model has at least one file".into()));
    }
    for (index, file) in manifest.files.iter().enumerate() {
        check_file(index, file)?;
        if manifest.files[..index].iter().any(|other| other.file == file.file) {
            let message = format!("files[{index}].file = {:?} is there twice", file.file);
            return Err(in_file(index, "file", message));
        }
    }
    Ok(())
}

fn check_file(index: usize, file: &ManifestFile) -> Result<(), Wrong> {
    let fail = |key: &'static str, value: String, rule: &str| {
        in_file(index, key, format!("files[{index}].{key} = {value}: must be {rule}"))
    };
    if !file_name(&file.file) {
        let rule = "1 to 96 letters, digits, '.', '_' or '-', starting with a letter or digit";
        return Err(fail("file", format!("{:?}", file.file), rule));
    }
    let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    if file.sha256.len() != 64 || !file.sha256.chars().all(hex) {
        let rule = "64 lower-case hexadecimal digits";
        return Err(fail("sha256", format!("{:?}", file.sha256), rule));
    }
    if file.bytes == 0 || file.bytes > FILE_BYTES_MAX {
        let rule = format!("the file's exact size, 1 to {FILE_BYTES_MAX}");
        return Err(fail("bytes", file.bytes.to_string(), &rule));
    }
    if file.sources.is_empty() {
        return Err(fail("sources", "[]".into(), "at least one source"));
    }
    for (at, source) in file.sources.iter().enumerate() {
        if let Err(rule) = FileSource::parse(source) {
            let message = format!("files[{index}].sources[{at}] = {source:?}: must be {rule}");
            return Err(in_file(index, "sources", message));
        }
    }
    Ok(())
}

fn wrong(path: impl Into<Vec<Step>>, message: String) -> Wrong {
    Wrong { path: path.into(), message }
}

fn in_file(index: usize, key: &'static str, message: String) -> Wrong {
    wrong([Step::Key("files"), Step::Item(index), Step::Key(key)], message)
}

fn name_rule(key: &str, name: &str, letters: &str) -> String {
    let rules = [
        format!("1 to {NAME_LENGTH_MAX} {letters}, digits, '.', '_', '-' or '/'"),
        "each part between slashes starting with a letter or digit".into(),
    ];
    format!("{key} = {name:?}: must be {}", join(&rules, ", "))
}

/// Names become metric labels and folders below the cache, so no part may climb out of it.
fn model_name(name: &str, upper: bool) -> bool {
    let case = |c: char| upper || !c.is_ascii_uppercase();
    name.len() <= NAME_LENGTH_MAX
        && name.split('/').all(|part| file_name(part) && part.chars().all(case))
}

fn file_name(name: &str) -> bool {
    name.len() <= NAME_LENGTH_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

fn one() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}
