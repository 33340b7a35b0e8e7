//! `sconce check`: the effective configuration with the source of each value, the models, and what
//! would keep the server from serving them. Fetches nothing and needs no device, so it can run as
//! an init container or before a rollout.

use std::io::Write;

use serde::Serialize;

use crate::config::{Config, Cost, MemoryLimit, keys, price};
use crate::models::{self, Survey};
use crate::store::fetch::{out_of_reach, places};
use crate::table::Table;

/// All that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Of this shape.
    schema: u32,
    /// As in `sconce_config_info`.
    config_hash: String,
    settings: Vec<Value>,
    models: Vec<Survey>,
    /// What will not be as somebody may expect.
    warnings: Vec<String>,
    /// What must be put right before the server can serve.
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Value {
    key: &'static str,
    value: String,
    source: String,
}

impl Report {
    /// Looks at everything.
    pub fn of(config: &Config) -> Self {
        let settings = config.values.iter().map(|value| Value {
            key: value.key,
            value: value.value.clone(),
            source: value.source.to_string(),
        });
        let models = models::survey(config);
        let warnings = config.notes.iter().filter(|note| note.warning);
        let mut report = Self {
            schema: 1,
            config_hash: config.hash(),
            settings: settings.collect(),
            warnings: warnings.map(|note| note.text.clone()).collect(),
            problems: Vec::new(),
            models,
        };
        if !config.cost.has_price() {
            report.warnings.push(format!("no price, no cost metrics: {}", Cost::ADVICE));
        }
        report.judge(config);
        report.judge_files(config);
        report
    }

    fn judge(&mut self, config: &Config) {
        for model in &self.models {
            let (name, missing) = (&model.name, model.missing.join(", "));
            if let Some(problem) = &model.problem {
                self.problems.push(format!("{name}: {problem}"));
            } else if !missing.is_empty() && config.models.offline {
                let looked = looked(config, model);
                let text = format!(
                    "{name}: {missing} not here, and models.offline is set; looked at {looked}"
                );
                self.problems.push(text);
            } else if !missing.is_empty() {
                match lost(config, model) {
                    Some(text) => self.problems.push(text),
                    None => {
                        let text = format!("{name}: {missing} will be fetched at the first start");
                        self.warnings.push(text);
                    }
                }
            }
        }
        let weights: u64 = self.models.iter().map(|model| model.bytes).sum();
        let limit = match config.device.memory_limit {
            Some(MemoryLimit::Bytes(bytes)) => Some(bytes),
            // Of which device is not known here.
            Some(MemoryLimit::Part(_)) | None => None,
        };
        if let Some(limit) = limit.filter(|limit| weights >= *limit) {
            let text = format!(
                "the models' files have {weights} bytes and device.memory_limit is {limit}: \
                 raise it, or serve fewer models"
            );
            self.problems.push(text);
        }
    }

    /// What else must be there before the server can listen.
    fn judge_files(&mut self, config: &Config) {
        if let Some(Err(error)) = config.auth.keys_file.as_deref().map(keys::load) {
            self.problems.push(error.to_string());
        }
        if let Some(Err(error)) = config.cost.price_file.as_deref().map(price::load) {
            self.warnings.push(format!("{error}: no price comes from it"));
        }
    }

    /// Whether the server can serve.
    pub fn is_good(&self) -> bool {
        self.problems.is_empty()
    }

    /// Writes it for people.
    ///
    /// # Errors
    /// `out` does not take it.
    pub fn print(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let mut table = Table::new(["SETTING", "VALUE", "FROM"]);
        for Value { key, value, source } in &self.settings {
            let value = if value.is_empty() { "-" } else { value };
            table.row([(*key).to_owned(), value.to_owned(), source.clone()]);
        }
        writeln!(out, "{table}")?;
        models::print(&self.models, out)?;
        for (word, lines) in [("warning", &self.warnings), ("problem", &self.problems)] {
            for line in lines {
                writeln!(out, "{word}: {line}")?;
            }
        }
        let verdict = if self.is_good() { "can serve" } else { "cannot serve" };
        writeln!(out, "{verdict}, configuration {}", self.config_hash)
    }
}

/// What is wrong where nothing can bring a missing file here.
fn lost(config: &Config, model: &Survey) -> Option<String> {
    let manifest = config.manifests.iter().find(|manifest| manifest.name == model.name)?;
    let files = out_of_reach(manifest, &model.missing).join(", ");
    let advice = "each source is a package, and there is no Python with pip here, or a file that \
                  is not there; lay it out in a folder of models.roots (sconce pull --to), or \
                  name a hub: or https:// source";
    (!files.is_empty()).then(|| format!("{}: {files} cannot be fetched: {advice}", model.name))
}

/// Every place in which a model's missing files could have been.
fn looked(config: &Config, model: &Survey) -> String {
    let manifest = config.manifests.iter().find(|manifest| manifest.name == model.name);
    let places = manifest.map(|manifest| places(manifest, &config.models)).unwrap_or_default();
    let missing = places.iter().filter(|(file, _)| model.missing.contains(file));
    let paths: Vec<String> =
        missing.flat_map(|(_, paths)| paths).map(|path| path.display().to_string()).collect();
    paths.join(", ")
}
