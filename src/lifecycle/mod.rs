//! The life of the process: phases, the deadline, who is in flight. The transition function is
//! pure; `signal.rs` turns signals into events. Knows no HTTP and no device.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::telemetry::Telemetry;

/// Where the process is in its life; forward only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Models are on their way.
    Loading,
    /// Serving.
    Ready,
    /// Told to go, still admitting: endpoints and proxies need seconds to learn.
    LameDuck,
    /// Finishing what can finish; nothing new.
    Draining,
    /// Nothing in flight, waiting for SIGTERM or the deadline.
    Drained,
    /// Cutting what is left.
    Closing,
    /// All threads joined, all said.
    Stopped,
}

/// One server's life, shared by everybody.
#[derive(Debug)]
pub struct Lifecycle {
    phase: tokio::sync::watch::Sender<Phase>,
}

/// Counts one accepted request until it is fully answered.
#[derive(Debug)]
pub struct InFlight {}

#[expect(unused_variables, clippy::unused_self, reason = "skeleton")]
impl Lifecycle {
    /// Starts in `Loading`.
    pub fn new(grace: Duration, telemetry: Arc<Telemetry>) -> Arc<Self> {
        Arc::new(Self { phase: tokio::sync::watch::Sender::new(Phase::Loading) })
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Follows the phase.
    pub fn watch(&self) -> tokio::sync::watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Lets a request in, or says why not: `Draining` or (while loading) `ModelLoading`.
    pub fn admit(&self) -> Result<InFlight> {
        Ok(InFlight {})
    }

    /// Whether responses should ask clients to close their connection.
    pub fn closing_connections(&self) -> bool {
        self.phase() >= Phase::LameDuck
    }
}
