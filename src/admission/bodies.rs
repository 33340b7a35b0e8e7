//! Memory for requests' bodies: all that are being read, parsed or tokenised share one budget, as
//! nothing but the number of connections bounds them before they may wait in the queue; those of
//! rankings also until they are answered. Knows no HTTP.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::queue::full;
use crate::error::Error;

/// How many bodies of `server.max_body_bytes` there may be at once.
const LARGEST: usize = 32;

/// How soon there may be room again: parsing and tokenising take milliseconds.
const SOON: Duration = Duration::from_secs(1);

/// The budget; a permit is a byte.
#[derive(Debug)]
pub(super) struct Bodies {
    free: Arc<Semaphore>,
    most: usize,
}

/// What one request takes of it; given back when dropped.
pub(super) type Held = OwnedSemaphorePermit;

impl Bodies {
    /// For bodies of at most `largest` bytes.
    pub(super) fn new(largest: usize) -> Self {
        let most = largest.saturating_mul(LARGEST).min(Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(most)), most }
    }

    /// Takes `bytes` more for a request that has `held`.
    ///
    /// # Errors
    /// `QueueFull` when so much is not left.
    pub(super) fn take(&self, held: &mut Option<Held>, bytes: usize) -> Result<(), Error> {
        let wanted = u32::try_from(bytes).unwrap_or(u32::MAX);
        let more = Arc::clone(&self.free).try_acquire_many_owned(wanted).map_err(|_| {
            let taken = self.most - self.free.available_permits();
            let message = format!(
                "bodies of {taken} bytes are being read and tokenised, the limit is {} ({LARGEST} \
                 times server.max_body_bytes)",
                self.most
            );
            full(message, SOON)
        })?;
        match held {
            Some(held) => held.merge(more),
            None => *held = Some(more),
        }
        Ok(())
    }
}
