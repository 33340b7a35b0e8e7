//! The file that `cost.price_file` names: what an hour of the device costs, of which day that is,
//! and who says so. Knows its form, not what is billed.

use std::ops::RangeInclusive;
use std::path::Path;

use serde::Deserialize;
use toml::value::Datetime;

use super::document::{self, Step, line_at};
use super::error::{ConfigError, Fault};
use super::load::read_text;

/// Longest source, in characters: it becomes a label.
const SOURCE_CHARACTERS_MAX: usize = 120;

/// What an hour of a device may cost.
pub(super) const USD: RangeInclusive<f64> = 0.0001..=100_000.0;

/// A dated price with its source.
#[derive(Debug, Clone, PartialEq)]
pub struct PriceTag {
    /// Of the whole device.
    pub device_hourly_usd: f64,
    /// The day that it is of, as 2026-07-20.
    pub as_of: String,
    /// Who says so, for people.
    pub source: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    device_hourly_usd: f64,
    as_of: Datetime,
    source: String,
}

/// Reads and checks the file at `path`.
///
/// # Errors
/// The file and line, and what is allowed there.
pub fn load(path: &Path) -> Result<PriceTag, ConfigError> {
    let text = read_text(path).map_err(|reason| {
        let message = format!("{}: cannot be read (cost.price_file): {reason}", path.display());
        ConfigError::new(Fault::NoInput, message)
    })?;
    parse(&text).map_err(|(line, what)| {
        let message = format!("{}:{line}: {what} (cost.price_file)", path.display());
        ConfigError::new(Fault::Config, message)
    })
}

/// The price, or the line and what is wrong there.
fn parse(text: &str) -> Result<PriceTag, (usize, String)> {
    let wrong = |key: &'static str, what: String| Err((line_at(text, &[Step::Key(key)]), what));
    let document: Document = toml::from_str(text).map_err(|error| document::fault(text, &error))?;
    let Document { device_hourly_usd, as_of, source } = document;
    if !USD.contains(&device_hourly_usd) {
        let (from, to) = (USD.start(), USD.end());
        let what = format!("device_hourly_usd = {device_hourly_usd}: must be {from} to {to}");
        return wrong("device_hourly_usd", what);
    }
    let Datetime { date: Some(date), time: None, .. } = as_of else {
        return wrong("as_of", format!("as_of = {as_of}: must be a day, as 2026-07-20"));
    };
    let characters = source.chars().count();
    let printable = source.chars().all(|c| !c.is_control());
    if !(1..=SOURCE_CHARACTERS_MAX).contains(&characters) || !printable {
        let what = format!("source must be one line of 1 to {SOURCE_CHARACTERS_MAX} characters");
        return wrong("source", what);
    }
    Ok(PriceTag { device_hourly_usd, as_of: date.to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# An L4.\ndevice_hourly_usd = 0.8048\nas_of = 2026-07-20\n\
                        source = \"on demand, us-east-1, g6.xlarge\"\n";

    #[test]
    fn a_price_has_a_day_and_a_source() {
        let tag = parse(GOOD).expect("good");
        assert_eq!((tag.device_hourly_usd, tag.as_of.as_str()), (0.8048, "2026-07-20"));
        assert_eq!(tag.source, "on demand, us-east-1, g6.xlarge");
        for (old, new, line, says) in [
            ("0.8048", "0", 2, "0: must be 0.0001 to 100000"),
            ("0.8048", "\"0.8\"", 2, "expected f64"),
            ("0.8048", "nan", 2, "must be"),
            ("2026-07-20", "2026-07-20T10:00:00Z", 3, "must be a day"),
            ("2026-07-20", "07:32:00", 3, "must be a day"),
            ("2026-07-20", "2026-13-20", 3, ""),
            ("as_of = 2026-07-20\n", "", 1, "missing field `as_of`"),
            ("\"on demand, us-east-1, g6.xlarge\"", "\"\"", 4, "1 to 120"),
            ("on demand", "a\\nb", 4, "one line"),
            ("source", "sources", 4, "expected one of"),
        ] {
            assert!(GOOD.contains(old), "{old}");
            let (at, what) = parse(&GOOD.replace(old, new)).expect_err(new);
            assert!(what.contains(says), "{new}: {what}");
            assert_eq!(at, line, "{new}: {what}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = load(Path::new("/nonexistent/price.toml")).expect_err("nothing there");
        assert_eq!(error.exit_code(), 66);
        assert!(error.to_string().contains("/nonexistent/price.toml"), "{error}");
    }
}
