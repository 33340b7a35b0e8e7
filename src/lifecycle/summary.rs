//! What a drain did, as one line of JSON: the last scrape may have come before the end, a log
//! line always arrives. Knows no phase machine.

use std::collections::BTreeMap;

use serde::Serialize;

/// What happened from the notice to the end.
#[derive(Debug, Clone, Serialize)]
pub struct DrainSummary {
    /// Who said first that the process has to go; `engine_failed` if the engine died.
    pub reason: &'static str,
    /// Seconds spent in each phase that was entered.
    pub phase_seconds: BTreeMap<&'static str, f64>,
    /// Requests in flight when the notice came.
    pub in_flight_at_notice: usize,
    /// Requests that ended on their own after the notice.
    pub finished: u64,
    /// Requests handed over to another pod.
    pub handed_over: u64,
    /// Requests put aside, to go on elsewhere.
    pub checkpointed: u64,
    /// Requests that got no full answer.
    pub cut: u64,
    /// Requests refused because they came too late.
    pub rejected_late: u64,
    /// Seconds from the notice to the deadline, as it was in the end.
    pub deadline_s: f64,
    /// Seconds from the notice until all was over.
    pub elapsed_s: f64,
    /// What the process should exit with: 0; 3 if something was cut; 4 if the engine died.
    pub exit_code: u8,
}

impl DrainSummary {
    /// One line, without a line end.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain numbers and strings")
    }
}
