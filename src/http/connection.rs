//! One connection: header and idle timeouts, its age, its end. Knows hyper, not the routes.
//!
//! hyper's own `header_read_timeout` also runs on idle keep-alive connections, so the time from a
//! request's first byte to the end of its headers is measured here, where bytes come in. Where
//! bytes go out, a client that does not take them is given up: its answer's body is dropped, and
//! with it the request.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderValue, Response, header};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, Sleep};
use tower::ServiceExt;

use super::listener::Limits;
use super::slots::Slot;
use crate::lifecycle::Phase;

/// Most bytes of one request's headers that are read at all, and of an answer that are held back
/// for a slow client. The router refuses fewer, and can say why.
const BUFFER_BYTES_MAX: usize = 128 * 1024;

/// Most headers of one request that are read at all.
const HEADERS_READ_MAX: usize = 256;

/// How much of a body that nobody reads is thrown away after the answer, and for how long: closing
/// at once would reset the connection, and the answer could be lost with it.
const DISCARDED_MAX: usize = 1 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(1);

/// How long answers may still be written once the process has stopped.
const FLUSH: Duration = Duration::from_secs(1);

/// Who is at the other end; in every request's extensions.
#[derive(Debug, Clone, Copy)]
pub(super) enum Peer {
    /// By network.
    Address(SocketAddr),
    /// By the admin socket.
    Socket,
}

impl Peer {
    /// Whether it is a process on this machine. Not all of 127/8: sidecar proxies hand over what
    /// came from elsewhere from addresses like 127.0.0.6.
    pub(super) fn is_local(self) -> bool {
        match self {
            Peer::Address(address) => {
                let ip = address.ip().to_canonical();
                ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST
            }
            Peer::Socket => true,
        }
    }
}

/// What connections are made of.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Makes the close that follows throw away what was not taken. The system would otherwise go
    /// on offering it for minutes to a client that does not read.
    fn give_up(&self);
}

impl Stream for TcpStream {
    fn give_up(&self) {
        if let Err(error) = self.set_zero_linger() {
            tracing::debug!(%error, "a stuck connection is closed slowly");
        }
    }
}

impl Stream for UnixStream {
    fn give_up(&self) {}
}

/// Serves one connection to its end.
pub(super) async fn serve<S: Stream>(
    stream: S,
    peer: Peer,
    router: Router,
    limits: Limits,
    slot: Slot,
    mut phase: watch::Receiver<Phase>,
) {
    let activity = Arc::new(Activity::default());
    let slot_wanted = slot.request();
    let io = TokioIo::new(Timed::new(stream, Arc::clone(&activity), limits, slot));
    let answered = Arc::clone(&activity);
    let expires = Instant::now() + limits.max_connection_age.mul_f64(spread());
    let service = service_fn(move |mut request: Request<Incoming>| {
        activity.busy.store(true, Ordering::Relaxed);
        let guard = Busy(Arc::clone(&activity));
        request.extensions_mut().insert(peer);
        activity.unread.store(false, Ordering::Relaxed);
        let received = |body| Received { body, activity: Arc::clone(&activity), ended: false };
        let answer = router.clone().oneshot(request.map(|body| Body::new(received(body))));
        let answered = Arc::clone(&activity);
        async move {
            let mut response = answer.await?;
            // What is left of a body that nobody wants is not worth the connection.
            if Instant::now() >= expires || answered.unread.load(Ordering::Relaxed) {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<Response<Tracked>, std::convert::Infallible>(
                response.map(|body| Tracked { body, _guard: guard }),
            )
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(BUFFER_BYTES_MAX)
        .max_headers(HEADERS_READ_MAX)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    // A new connection may ask once in any phase: only what comes later ends it.
    let mut stopped = *phase.borrow_and_update() == Phase::Stopped;
    while !stopped {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(?peer, %error, "connection ended");
                }
                return;
            }
            // Polls the connection again, so that it looks at its idle timer.
            () = answered.idle.notified() => {}
            // Again, to see whether it is still idle.
            () = slot_wanted.made() => {}
            changed = phase.changed() => {
                let now = *phase.borrow_and_update();
                if now > Phase::Draining {
                    connection.as_mut().graceful_shutdown();
                }
                stopped = now == Phase::Stopped || changed.is_err();
            }
        }
    }
    connection.as_mut().graceful_shutdown();
    if tokio::time::timeout(FLUSH, connection).await.is_err() {
        tracing::debug!(?peer, "connection cut");
    }
}

/// 0.9 to 1.1, so that connections that came together do not go together.
fn spread() -> f64 {
    0.9 + 0.2 * f64::from(uuid::Uuid::new_v4().as_u128() as u32) / f64::from(u32::MAX)
}

/// Whether a connection is between the end of a request's headers and the end of its answer.
#[derive(Default)]
struct Activity {
    busy: AtomicBool,
    /// The last request's body was not read to its end.
    unread: AtomicBool,
    /// An answer has ended.
    idle: Notify,
}

/// Says, when dropped, that the request is answered and the connection idle.
struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Relaxed);
        self.0.idle.notify_one();
    }
}

/// A request's body that tells when it is not read to its end.
struct Received {
    body: Incoming,
    activity: Arc<Activity>,
    ended: bool,
}

impl hyper::body::Body for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        self.ended |= frame.is_none();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if !self.ended && !hyper::body::Body::is_end_stream(self) {
            self.activity.unread.store(true, Ordering::Relaxed);
        }
    }
}

/// A response's body that keeps the connection busy for as long as it lasts.
struct Tracked {
    body: Body,
    _guard: Busy,
}

impl hyper::body::Body for Tracked {
    type Data = <Body as hyper::body::Body>::Data;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream that ends when it is idle for too long or its slot is wanted, when a request's headers
/// take too long, or when nothing of an answer is taken for too long.
struct Timed<S> {
    stream: S,
    activity: Arc<Activity>,
    was_busy: bool,
    /// Some of a request's headers are here.
    in_headers: bool,
    limits: Limits,
    slot: Slot,
    timer: Pin<Box<Sleep>>,
    /// Runs while the other end takes nothing; most never need one.
    stuck: Option<Pin<Box<Sleep>>>,
    /// Set once all is said to a client that is still sending: how much more of it is taken.
    discards: Option<usize>,
}

impl<S: Stream> Timed<S> {
    fn new(stream: S, activity: Arc<Activity>, limits: Limits, mut slot: Slot) -> Self {
        let timer = Box::pin(tokio::time::sleep(limits.first_byte_time));
        slot.rest();
        Self {
            stream,
            activity,
            was_busy: false,
            in_headers: false,
            limits,
            slot,
            timer,
            stuck: None,
            discards: None,
        }
    }

    /// Passes on how a write went, unless the other end has taken nothing for too long.
    fn unless_stuck<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stuck = None;
            return written;
        }
        let limit = self.limits.write_time;
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(stuck.as_mut().poll(context));
        self.stream.give_up();
        let message = "the client takes nothing of its answer";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }

    fn start_timer(&mut self, time: Duration) {
        self.timer.as_mut().reset(Instant::now() + time);
    }

    /// Throws away up to `left` bytes of what comes, until the other end or the timer ends it.
    fn discard(&mut self, context: &mut Context<'_>, mut left: usize) -> Poll<()> {
        let mut space = [0; 16 * 1024];
        while left > 0 && self.timer.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut space);
            let read = Pin::new(&mut self.stream).poll_read(context, &mut buffer);
            let length = buffer.filled().len();
            left = left.saturating_sub(length);
            self.discards = Some(left);
            let ended = ready!(read).is_err() || length == 0;
            if ended {
                break;
            }
        }
        Poll::Ready(())
    }

    /// Follows requests and answers: the idle timer starts when an answer ends.
    fn follow(&mut self) -> bool {
        let busy = self.activity.busy.load(Ordering::Relaxed);
        if busy {
            self.in_headers = false;
            self.slot.work();
        } else if self.was_busy {
            self.start_timer(self.limits.keep_alive);
            self.slot.rest();
        }
        self.was_busy = busy;
        busy
    }
}

impl<S: Stream> AsyncRead for Timed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let busy = self.follow();
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if busy {
            return read;
        }
        if read.is_ready() {
            if buffer.filled().len() > before && !self.in_headers {
                self.in_headers = true;
                self.slot.work();
                let time = self.limits.header_time;
                self.start_timer(time);
            }
            return read;
        }
        match self.timer.as_mut().poll(context) {
            // Makes room, as if the client had closed it; not before its last answer is out.
            Poll::Pending if self.slot.is_wanted() && self.stuck.is_none() => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) if self.in_headers => {
                let message = "the request's headers took too long";
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
            }
            // The end of an idle connection, as if the client had closed it.
            Poll::Ready(()) => Poll::Ready(Ok(())),
        }
    }
}

impl<S: Stream> AsyncWrite for Timed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.unless_stuck(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.unless_stuck(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let left = match self.discards {
            Some(left) => left,
            None => {
                ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
                if !self.activity.unread.load(Ordering::Relaxed) {
                    return Poll::Ready(Ok(()));
                }
                self.start_timer(DISCARD_TIME);
                DISCARDED_MAX
            }
        };
        self.discard(context, left).map(Ok)
    }
}
