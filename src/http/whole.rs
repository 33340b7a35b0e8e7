//! An answer that is known in full and goes out in parts, so that its request counts as in flight
//! until a client that takes it slowly has most of it. Knows no API.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::response::Response;
use hyper::body::{Frame, SizeHint};

use super::generate::json_response;
use crate::admission::ticket::Ticket;
use crate::lifecycle::InFlight;
use crate::request::Usage;

/// Bytes of a part: a connection takes in a few of them ahead of its client.
const PART: usize = 64 * 1024;

/// Ends the ticket well; 200 with `json`, in flight until that is handed over.
pub(super) fn answered(mut ticket: Ticket, usage: Usage, json: Vec<u8>) -> Response {
    ticket.finish(usage);
    let in_flight = ticket.answers();
    // Counted and logged before its client can see the answer.
    drop(ticket);
    json_response(Body::new(Whole { rest: json.into(), _in_flight: in_flight }))
}

struct Whole {
    rest: Bytes,
    _in_flight: Option<InFlight>,
}

impl hyper::body::Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let length = self.rest.len().min(PART);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}
