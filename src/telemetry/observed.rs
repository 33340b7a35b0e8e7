//! What another server's `/metrics` says, read back by the names that this one writes. Knows the
//! text format, not where the text came from.

use std::collections::BTreeMap;

use super::metrics::{self, Family};

/// One scrape of a server.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// Bytes by use: `weights`, `kv`, `workspace`, `free`.
    pub memory: BTreeMap<String, f64>,
    /// Bytes that the server may use.
    pub memory_limit: f64,
    /// Share of the KV cache that running requests hold.
    pub kv_usage: f64,
    /// Requests that wait, and requests that are not fully answered.
    pub queue: f64,
    /// See `queue`.
    pub in_flight: f64,
    /// Seconds since the start in which the device was busy, loading or idle.
    pub wall_seconds: f64,
    /// Seconds of full steps that the computed rows would have needed; its rate is the load.
    pub work_seconds: f64,
    /// Requests that were sent back to wait, since the start.
    pub preemptions: f64,
    /// Requests refused since the start.
    pub rejections: f64,
    /// By model.
    pub models: BTreeMap<String, ObservedModel>,
}

/// One model's counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ObservedModel {
    /// Requests that ended well.
    pub requests: f64,
    /// Tokens of finished requests.
    pub prompt_tokens: f64,
    /// Tokens of finished requests.
    pub generated_tokens: f64,
}

/// One line of the text format.
struct Sample<'a> {
    name: &'a str,
    labels: Vec<(&'a str, String)>,
    value: f64,
}

impl Sample<'_> {
    fn is(&self, family: &Family) -> bool {
        self.name == family.name
    }

    fn label(&self, key: &str) -> &str {
        let found = self.labels.iter().find(|(known, _)| *known == key);
        found.map_or("", |(_, value)| value.as_str())
    }
}

impl Observed {
    /// Reads a scrape; lines of other families are passed over.
    ///
    /// # Errors
    /// A text that has none of this server's families.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut this = Self::default();
        let mut known = false;
        for sample in text.lines().filter_map(sample) {
            known |= sample.is(&metrics::PHASE);
            this.take(&sample);
        }
        if !known {
            return Err(format!("no {} in it: not this server's metrics", metrics::PHASE.name));
        }
        Ok(this)
    }

    fn take(&mut self, sample: &Sample<'_>) {
        let value = sample.value;
        let sums = [
            (&metrics::MEMORY_LIMIT, &mut self.memory_limit),
            (&metrics::KV_USAGE, &mut self.kv_usage),
            (&metrics::QUEUE_DEPTH, &mut self.queue),
            (&metrics::IN_FLIGHT, &mut self.in_flight),
            (&metrics::DEVICE_BUSY, &mut self.wall_seconds),
            (&metrics::DEVICE_WORK, &mut self.work_seconds),
            (&metrics::PREEMPTIONS, &mut self.preemptions),
            (&metrics::REJECTED, &mut self.rejections),
        ];
        for (family, sum) in sums {
            if sample.is(family) {
                *sum += value;
            }
        }
        if sample.is(&metrics::DEVICE_LOAD) || sample.is(&metrics::DEVICE_IDLE) {
            self.wall_seconds += value;
        }
        if sample.is(&metrics::MEMORY_USED) {
            self.memory.insert(sample.label("use").to_owned(), value);
        }
        let name = sample.label("model");
        let ended_well = sample.is(&metrics::REQUESTS) && sample.label("outcome") == "ok";
        let prompts = sample.is(&metrics::PROMPT_TOKENS);
        let generated = sample.is(&metrics::GENERATED_TOKENS);
        if name.is_empty() || name == metrics::UNKNOWN || !(ended_well || prompts || generated) {
            return;
        }
        let model = self.models.entry(name.to_owned()).or_default();
        for (is, sum) in [
            (ended_well, &mut model.requests),
            (prompts, &mut model.prompt_tokens),
            (generated, &mut model.generated_tokens),
        ] {
            *sum += if is { value } else { 0.0 };
        }
    }
}

/// `name{key="value",…} 1.5`; none for comments and what is malformed.
fn sample(line: &str) -> Option<Sample<'_>> {
    if line.starts_with('#') {
        return None;
    }
    let (series, value) = line.trim_end().rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, labels)) = series.split_once('{') else {
        return Some(Sample { name: series, labels: Vec::new(), value });
    };
    let mut rest = labels.strip_suffix('}')?;
    let mut labels = Vec::new();
    while let Some((key, after)) = rest.split_once("=\"") {
        let mut text = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => text.push(characters.next()?.1),
                (_, other) => text.push(other),
            }
        };
        labels.push((key.trim_start_matches(','), text));
        rest = &after[end + 1..];
    }
    Some(Sample { name, labels, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_is_read_back_by_name() {
        let line = |family: &Family, labels: &str, value: &str| {
            format!("{}{labels} {value}\n", family.name)
        };
        let model = r#"{model="a\"b",task="generate",outcome="ok"}"#;
        let text = [
            "# HELP x y\n".to_owned(),
            line(&metrics::PHASE, r#"{phase="ready"}"#, "1"),
            line(&metrics::MEMORY_USED, r#"{use="kv"}"#, "1e6"),
            line(&metrics::REQUESTS, model, "7"),
            line(&metrics::REQUESTS, r#"{model="a\"b",task="generate",outcome="error"}"#, "9"),
            line(&metrics::DEVICE_BUSY, r#"{model="a"}"#, "2.5"),
            line(&metrics::DEVICE_IDLE, "", "7.5"),
            line(&metrics::KV_USAGE, "", "0.25"),
            "broken{a= 1\nhalf".to_owned(),
        ];
        let seen = Observed::parse(&text.concat()).expect("this server's");
        assert_eq!(seen.memory["kv"], 1e6);
        assert_eq!(seen.models["a\"b"].requests, 7.0);
        assert_eq!((seen.wall_seconds, seen.kv_usage), (10.0, 0.25));
        assert!(Observed::parse("up 1\n").is_err());
    }
}
