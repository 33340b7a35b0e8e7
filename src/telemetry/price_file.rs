//! Follows the file that `cost.price_file` names. A new price holds from the moment it is seen; a
//! file that is wrong or gone changes nothing and is told once.

use std::path::{Path, PathBuf};

use super::Telemetry;
use crate::config::price::{self, PriceTag};

/// The file, and how the last look at it went.
#[derive(Debug)]
pub struct PriceFile {
    path: PathBuf,
    seen: Option<Result<PriceTag, String>>,
}

impl PriceFile {
    /// Not looked at yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), seen: None }
    }

    /// Looks at it now. Reads a file, so it may wait.
    pub fn look(&mut self, telemetry: &Telemetry) {
        let now = price::load(&self.path).map_err(|error| error.to_string());
        if self.seen.as_ref() == Some(&now) {
            return;
        }
        match &now {
            Ok(tag) => {
                telemetry.price(tag);
                let PriceTag { device_hourly_usd, as_of, source } = tag;
                tracing::info!(device_hourly_usd, as_of, source, "device price read");
            }
            Err(error) => tracing::warn!(error, "the device price stays as it was"),
        }
        self.seen = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Setup;

    #[test]
    fn cost_begins_with_a_price_and_a_bad_file_changes_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("price.toml");
        let telemetry = Telemetry::new(Setup::default());
        let mut file = PriceFile::new(&path);
        let mut shown = || {
            file.look(&telemetry);
            let page = telemetry.render();
            let value = |name: &str| {
                let lines = page.lines().filter(|line| line.starts_with(name));
                lines.map(str::to_owned).collect::<Vec<_>>()
            };
            let cost = value("sconce_cost_usd_total{");
            (value("sconce_device_price_usd_per_hour "), value("sconce_device_price_info{"), cost)
        };
        let (price, info, cost) = shown();
        assert!(price.is_empty() && info.is_empty() && cost.is_empty(), "nothing is there yet");

        let tag = |usd: &str| {
            let text = format!("device_hourly_usd = {usd}\nas_of = 2026-07-20\nsource = \"s\"\n");
            std::fs::write(&path, text).expect("a file");
        };
        tag("3600");
        let (price, info, cost) = shown();
        assert_eq!(price, ["sconce_device_price_usd_per_hour 3600"]);
        assert_eq!(info, ["sconce_device_price_info{as_of=\"2026-07-20\",source=\"s\"} 1"]);
        assert_eq!(cost.len(), 1, "idle; no model, no more: {cost:?}");
        tag("-1");
        assert_eq!(shown().0, price);
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(shown().0, price);
        tag("7200");
        let (price, _, later) = shown();
        assert_eq!(price, ["sconce_device_price_usd_per_hour 7200"]);
        let usd = |lines: &[String]| -> f64 {
            lines[0].rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
        };
        assert!(usd(&later) >= usd(&cost), "{later:?} after {cost:?}");
    }
}
