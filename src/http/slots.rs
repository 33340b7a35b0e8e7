//! Slots for connections: as many as may be open at once. When all are taken, the connection that
//! has been idle for longest is asked to make room, so that those who keep connections for later
//! do not lock out who has something to ask.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// After this long the next idle connection is asked: the last one had just become busy, or all
/// were busy.
const ASK_AGAIN: Duration = Duration::from_millis(20);

pub(super) struct Slots {
    free: Arc<Semaphore>,
    most: u32,
    idle: Mutex<Idle>,
}

/// Idle connections, by when they became idle.
#[derive(Default)]
struct Idle {
    next: u64,
    line: BTreeMap<u64, Arc<Request>>,
}

/// How an idle connection is asked to end.
#[derive(Default)]
pub(super) struct Request {
    made: AtomicBool,
    bell: Notify,
}

impl Request {
    /// Returns when the request may have been made.
    pub(super) async fn made(&self) {
        self.bell.notified().await;
    }
}

/// One connection's; free again when dropped.
pub(super) struct Slot {
    slots: Arc<Slots>,
    request: Arc<Request>,
    /// Its place in the line while it is idle.
    place: Option<u64>,
    _permit: OwnedSemaphorePermit,
}

impl Slots {
    /// At least one, at most what a semaphore can count.
    pub(super) fn new(most: usize) -> Arc<Self> {
        let most = most.clamp(1, Semaphore::MAX_PERMITS.min(1 << 30));
        let free = Arc::new(Semaphore::new(most));
        Arc::new(Self { free, most: most as u32, idle: Mutex::default() })
    }

    /// A slot, as soon as there is one.
    pub(super) async fn take(self: &Arc<Self>) -> Slot {
        loop {
            let free = Arc::clone(&self.free);
            let permit = match Arc::clone(&free).try_acquire_owned() {
                Ok(permit) => Some(permit),
                Err(_) => {
                    self.ask_longest_idle();
                    let waited = tokio::time::timeout(ASK_AGAIN, free.acquire_owned()).await;
                    waited.ok().and_then(Result::ok)
                }
            };
            if let Some(permit) = permit {
                let (slots, request) = (Arc::clone(self), Arc::default());
                return Slot { slots, request, place: None, _permit: permit };
            }
        }
    }

    /// Returns when every slot is free.
    pub(super) async fn all_free(&self) {
        let _all = self.free.acquire_many(self.most).await;
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask_longest_idle(&self) {
        if let Some((_, request)) = self.idle().line.pop_first() {
            request.made.store(true, Ordering::Relaxed);
            request.bell.notify_one();
        }
    }
}

impl Slot {
    pub(super) fn request(&self) -> Arc<Request> {
        Arc::clone(&self.request)
    }

    /// Whether the connection, still idle, is asked to end.
    pub(super) fn is_wanted(&self) -> bool {
        self.place.is_some() && self.request.made.load(Ordering::Relaxed)
    }

    /// From now on the connection is idle: last in the line.
    pub(super) fn rest(&mut self) {
        self.work();
        let mut idle = self.slots.idle();
        let place = idle.next;
        idle.next += 1;
        idle.line.insert(place, Arc::clone(&self.request));
        self.place = Some(place);
    }

    /// From now on the connection has something to do; a request to end has come too late.
    pub(super) fn work(&mut self) {
        if let Some(place) = self.place.take() {
            self.slots.idle().line.remove(&place);
            self.request.made.store(false, Ordering::Relaxed);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.work();
    }
}
