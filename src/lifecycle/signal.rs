//! Turns SIGTERM and SIGINT into notices. Knows no phase.

use std::sync::Arc;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Lifecycle, Notice};

/// Installs the handlers, before the first model is loaded: from then on a signal is a notice
/// and kills nobody. A thread of its own waits for them, so that a busy runtime does not delay
/// them.
///
/// # Errors
/// The handlers cannot be installed or the thread cannot be started.
pub fn install(lifecycle: Arc<Lifecycle>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let wait = move || {
        for signal in signals.forever() {
            match signal {
                SIGINT => lifecycle.interrupt(),
                _ => lifecycle.notify(Notice { source: "sigterm", within: None, terminate: true }),
            }
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait)?;
    Ok(())
}
