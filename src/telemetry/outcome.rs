//! Sorts the ways in which a request can end into the few that a dashboard tells apart. Knows no
//! metric.

use super::Ended;
use crate::error::{ErrorKind, Fault};

/// How a request ended, as a metric label; an index of `metrics::OUTCOMES`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Ok,
    ClientError,
    Cancelled,
    Timeout,
    Rejected,
    Cut,
    Error,
}

impl Ended {
    /// As in metrics.
    pub fn as_str(self) -> &'static str {
        super::metrics::OUTCOMES[self.outcome() as usize]
    }

    /// The label for it.
    pub(super) fn outcome(self) -> Outcome {
        let kind = match self {
            Ended::Ok => return Outcome::Ok,
            Ended::Cancelled => return Outcome::Cancelled,
            Ended::Failed(kind) => kind,
        };
        match kind {
            _ if kind.fault() == Fault::Caller => Outcome::ClientError,
            ErrorKind::DeadlineExceeded => Outcome::Timeout,
            ErrorKind::Cut => Outcome::Cut,
            ErrorKind::QueueFull
            | ErrorKind::RateLimited
            | ErrorKind::Draining
            | ErrorKind::ModelLoading => Outcome::Rejected,
            _ => Outcome::Error,
        }
    }
}

impl Outcome {
    /// Whether its duration says something about the service: refusals take no time, and a
    /// cancelled request took as long as its client liked.
    pub(super) fn was_worked_on(self) -> bool {
        matches!(self, Outcome::Ok | Outcome::Timeout | Outcome::Cut | Outcome::Error)
    }
}
