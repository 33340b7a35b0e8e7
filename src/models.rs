//! `sconce models`: which models this server would serve, what their files say, what is missing.
//! Opens headers only; fetches nothing and needs no device.

use std::io::Write;

use serde::Serialize;

use crate::config::Config;
use crate::config::manifest::Manifest;
use crate::engine::residency;
use crate::model::ModelTask;
use crate::store::ModelFiles;
use crate::store::fetch::find;
use crate::table::Table;

/// What can be said of one model without loading it.
#[derive(Debug, Clone, Serialize)]
pub struct Survey {
    /// The manifest's name.
    pub name: String,
    /// What it is for.
    pub task: ModelTask,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Files that are not on this machine.
    pub missing: Vec<String>,
    /// Longest sequence in tokens that will be served; none as long as its header is not here.
    pub context: Option<u64>,
    /// Values of a vector, or tokens of the vocabulary.
    pub output_width: Option<u64>,
    /// Bytes of KV cache that a token takes; none for models without.
    pub kv_bytes_per_token: Option<u64>,
    /// Why it cannot be used, where its files are here.
    pub problem: Option<String>,
}

impl Survey {
    /// Looks at what is on this machine.
    pub fn of(manifest: &Manifest, config: &Config) -> Self {
        let mut files = ModelFiles::default();
        let mut missing = Vec::new();
        for (file, place) in find(manifest, &config.models) {
            match place {
                Some(path) => files.files.push((file, path)),
                None => missing.push(file),
            }
        }
        let mut survey = Self {
            name: manifest.name.clone(),
            task: manifest.task,
            bytes: manifest.bytes(),
            missing,
            context: None,
            output_width: None,
            kv_bytes_per_token: None,
            problem: None,
        };
        if survey.missing.is_empty() {
            survey.open(manifest, &files);
        }
        survey
    }

    fn open(&mut self, manifest: &Manifest, files: &ModelFiles) {
        let outline = match residency::open(files) {
            Ok(opened) => opened.outline,
            Err(error) => {
                self.problem = Some(error.to_string());
                return;
            }
        };
        if outline.task != manifest.task {
            let (asked, found) = (manifest.task.as_str(), outline.task.as_str());
            self.problem = Some(format!("task = {asked:?}, and its files are of a {found} model"));
        }
        let made_for = outline.context as u64;
        let limit = manifest.limits.context.map_or(made_for, u64::from);
        self.context = Some(made_for.min(limit));
        self.output_width = Some(outline.output_width as u64);
        self.kv_bytes_per_token = outline.kv.map(|kv| {
            let block = kv.layers * kv.block_bytes();
            (block / crate::scheduler::step::BLOCK_TOKENS) as u64
        });
    }

    /// In one word or two.
    fn state(&self) -> String {
        match (&self.problem, self.missing.as_slice()) {
            (Some(problem), _) => format!("unusable: {problem}"),
            (None, []) => "here".into(),
            (None, missing) => format!("to fetch: {}", missing.join(", ")),
        }
    }
}

/// Every model of `config`, in order of names.
pub fn survey(config: &Config) -> Vec<Survey> {
    config.manifests.iter().map(|manifest| Survey::of(manifest, config)).collect()
}

/// Writes the table of `models`.
///
/// # Errors
/// `out` does not take it.
pub fn print(models: &[Survey], out: &mut dyn Write) -> std::io::Result<()> {
    let mut table = Table::new(["MODEL", "TASK", ">MB", ">CONTEXT", ">KV/TOKEN", "FILES"]);
    let number = |number: Option<u64>| number.map(|n| n.to_string()).unwrap_or_default();
    for model in models {
        let megabytes = format!("{:.1}", model.bytes as f64 / 1e6);
        let (context, kv) = (number(model.context), number(model.kv_bytes_per_token));
        let task = model.task.as_str().to_owned();
        table.row([model.name.clone(), task, megabytes, context, kv, model.state()]);
    }
    write!(out, "{table}")
}
