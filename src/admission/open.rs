//! The requests that the engine has, as ways to tell them that it is gone: should it hang, it can
//! tell nobody itself. Knows no more of them.

use std::sync::{Mutex, PoisonError};

use crate::error::Error;
use crate::request::WeakSink;

/// Fewer than this are never looked through.
const SOME: usize = 64;

/// Every request that may still be open.
#[derive(Debug, Default)]
pub(super) struct OpenRequests(Mutex<Vec<WeakSink>>);

impl OpenRequests {
    /// Takes a request in. Those that are over are forgotten now and then, when they may be half of
    /// all: so this costs the same however many there are.
    pub(super) fn add(&self, sink: WeakSink) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= SOME && open.len() == open.capacity() {
            open.retain(WeakSink::is_open);
            // Doubles where most are open, or else the next look would come too soon.
            let room = open.len().max(SOME);
            open.reserve(room);
        }
        open.push(sink);
    }

    /// Ends every open request with `error`.
    pub(super) fn fail_all(&self, error: &Error) {
        let open = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        open.iter().for_each(|sink| sink.fail(error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::request::{Encode, Event, Sink, Task, Text, Yield};

    #[test]
    fn what_is_over_is_forgotten_and_what_is_open_is_told() {
        let task =
            Task::Encode(Encode { inputs: vec![Text::single(vec![1])], yields: Yield::Answer });
        let open = OpenRequests::default();
        let (sink, mut events) = Sink::for_task(&task);
        open.add(sink.weak());
        for _ in 0..10_000 {
            open.add(Sink::for_task(&task).0.weak());
        }
        assert!(open.0.lock().unwrap().len() <= 4 * SOME);
        open.fail_all(&Error::new(ErrorKind::DeviceFailed, "gone"));
        let told = events.try_recv();
        assert!(
            matches!(told, Ok(Event::Failed(error)) if error.kind() == ErrorKind::DeviceFailed)
        );
        // The engine may come to itself and go on: its words fit in, and nobody reads them.
        sink.send(Event::Vector { index: 0, values: vec![] });
        sink.send(Event::Failed(Error::new(ErrorKind::Cut, "cut")));
    }
}
