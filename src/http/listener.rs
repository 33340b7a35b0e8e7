//! The listening sockets and the accept loop. `axum::serve` sets no timer and no connection cap,
//! so connections are accepted and bounded here.

use std::fs::Permissions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream};
use tokio::sync::watch;

use super::connection::{self, Peer};
use super::slots::{Slot, Slots};
use crate::lifecycle::Phase;

/// Connections that the system holds until they are accepted.
const BACKLOG: u32 = 1024;

/// Bytes that the system may hold for a client that does not read.
const SEND_BUFFER: u32 = 256 * 1024;

/// How often a port that the system chose may be taken on another address.
const PORT_TRIES: usize = 16;

/// Open files that are no connections of clients: models, logs, the admin side.
const FILES_BESIDES: u64 = 256;

/// Rest after a failed accept: most often there are no file descriptors left.
const ACCEPT_REST: Duration = Duration::from_millis(50);

/// What connections may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A connection above so many takes the place of the one that has been idle for longest; while
    /// all are busy, it waits.
    pub max_connections: usize,
    /// Idle keep-alive.
    pub keep_alive: Duration,
    /// A connection older than this (± 10 %) is closed after its answer.
    pub max_connection_age: Duration,
    /// A new connection may say nothing for this long: nobody's pool holds it yet.
    pub first_byte_time: Duration,
    /// From a request's first byte to the end of its headers.
    pub header_time: Duration,
    /// A client that takes nothing of its answer for this long is gone.
    pub write_time: Duration,
}

/// A listening socket.
#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _file: SocketFile },
}

/// The file of a Unix socket; goes with it.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "admin socket not removed");
        }
    }
}

/// Bound and not yet serving: the ports are known before anything is answered.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<Listener>,
    port: u16,
    limits: Limits,
}

impl Limits {
    /// As configured for the main listener.
    pub fn main(server: &crate::config::Server) -> Self {
        Self {
            max_connections: server.max_connections,
            keep_alive: server.keep_alive,
            max_connection_age: server.max_connection_age,
            first_byte_time: server.keep_alive.min(Duration::from_secs(60)),
            header_time: Duration::from_secs(10),
            write_time: server.write_timeout,
        }
    }

    /// For the admin listener: a few probes and scrapers, however busy the main one is.
    pub fn admin(server: &crate::config::Server) -> Self {
        Self { max_connections: 64, ..Self::main(server) }
    }
}

impl Server {
    /// Binds every address to the same port; 0 lets the system choose one. An address that this
    /// machine does not have is only a warning when another one is bound, and `::` falls back to
    /// 0.0.0.0. Needs a tokio runtime.
    ///
    /// # Errors
    /// The system's, naming the address.
    pub fn bind(hosts: &[IpAddr], port: u16, limits: Limits) -> io::Result<Self> {
        let mut tries = 0;
        loop {
            match bind_all(hosts, port) {
                Ok((listeners, port)) => {
                    let listeners = listeners.into_iter().map(Listener::Tcp).collect();
                    return Ok(Self { listeners, port, limits });
                }
                Err(error)
                    if port == 0
                        && error.kind() == io::ErrorKind::AddrInUse
                        && tries < PORT_TRIES =>
                {
                    tries += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Also listens on a Unix socket, for this user alone. A socket that nobody answers on any
    /// longer is replaced.
    ///
    /// # Errors
    /// The system's, naming the path.
    pub fn bind_socket(&mut self, path: &Path) -> io::Result<()> {
        let naming =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let left_behind = path.metadata().is_ok_and(|file| file.file_type().is_socket())
            && std::os::unix::net::UnixStream::connect(path).is_err();
        if left_behind {
            std::fs::remove_file(path).map_err(naming)?;
        }
        let socket = UnixSocket::new_stream()?;
        socket.bind(path).map_err(naming)?;
        let file = SocketFile(path.to_owned());
        // Before anybody can connect.
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(naming)?;
        let listener = socket.listen(BACKLOG).map_err(naming)?;
        self.listeners.push(Listener::Unix { listener, _file: file });
        Ok(())
    }

    /// The port, also when the system chose it.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Every bound address.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let address = |listener: &Listener| match listener {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix { .. } => None,
        };
        self.listeners.iter().filter_map(address).collect()
    }

    /// Answers with `router`. After `Draining`, idle connections are closed and the others end
    /// with their answer; new ones are accepted until `Stopped` (a closed port becomes a 502 at a
    /// proxy). Returns when `Stopped` has come, or its sender is gone, and every connection has
    /// ended or was cut a second later.
    pub async fn serve(self, router: Router, phase: watch::Receiver<Phase>) {
        let slots = Slots::new(self.limits.max_connections);
        let accepting: Vec<_> = self
            .listeners
            .into_iter()
            .map(|listener| {
                let (router, phase) = (router.clone(), phase.clone());
                tokio::spawn(accept_all(listener, router, self.limits, phase, Arc::clone(&slots)))
            })
            .collect();
        for task in accepting {
            if let Err(error) = task.await {
                tracing::error!(%error, "an accept loop failed");
            }
        }
        // Every connection holds its slot to its end.
        slots.all_free().await;
    }
}

/// Raises this process's limit on open files, where the system lets it, to hold so many
/// connections: the usual limit of 1,024 is for programs that poll with `select`.
pub fn allow_connections(most: usize) {
    let wanted = most as u64 + FILES_BESIDES;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|now| now >= wanted) {
        return;
    }
    let granted = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    let raised =
        setrlimit(Resource::Nofile, Rlimit { current: Some(granted), maximum: limit.maximum });
    if raised.is_err() || granted < wanted {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(0);
        tracing::warn!(
            open_files = limit,
            max_connections = most,
            "fewer open files are allowed than server.max_connections asks for"
        );
    }
}

fn bind_all(hosts: &[IpAddr], port: u16) -> io::Result<(Vec<TcpListener>, u16)> {
    let mut listeners = Vec::new();
    let mut port = port;
    let mut missing = None;
    for &host in hosts {
        let bound = match listen(host, port) {
            Err(error) if host == Ipv6Addr::UNSPECIFIED && is_missing(&error) => {
                listen(Ipv4Addr::UNSPECIFIED.into(), port)
            }
            bound => bound,
        };
        match bound {
            Ok(listener) => {
                port = listener.local_addr()?.port();
                listeners.push(listener);
            }
            Err(error) if is_missing(&error) => {
                tracing::warn!(%host, port, %error, "address not on this machine, left out");
                missing = Some(error);
            }
            Err(error) => return Err(naming(error, host, port)),
        }
    }
    if listeners.is_empty() {
        let none = || io::Error::new(io::ErrorKind::InvalidInput, "no address to bind");
        return Err(missing.unwrap_or_else(none));
    }
    Ok((listeners, port))
}

fn listen(host: IpAddr, port: u16) -> io::Result<TcpListener> {
    let socket = if host.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    // Accepted connections inherit it. Without, the system takes in megabytes for a client that
    // does not read, and nobody notices.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(SocketAddr::new(host, port))?;
    socket.listen(BACKLOG)
}

/// Whether the machine has no such address, or no such address family at all.
fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

fn naming(error: io::Error, host: IpAddr, port: u16) -> io::Error {
    io::Error::new(error.kind(), format!("{} port {port}: {error}", host))
}

async fn accept_all(
    listener: Listener,
    router: Router,
    limits: Limits,
    phase: watch::Receiver<Phase>,
    slots: Arc<Slots>,
) {
    let mut stopped = phase.clone();
    let mut stopped = std::pin::pin!(stopped.wait_for(|phase| *phase == Phase::Stopped));
    loop {
        // The slot comes second: a listener that nobody connects to must not hold one.
        let accepted = async {
            let accepted = listener.accept().await;
            (accepted, slots.take().await)
        };
        let (accepted, slot) = tokio::select! {
            accepted = accepted => accepted,
            _ = &mut stopped => return,
        };
        match accepted {
            Ok(accepted) => {
                tokio::spawn(accepted.serve(router.clone(), limits, slot, phase.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// A connection that is not served yet.
enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Listener::Tcp(listener) => {
                listener.accept().await.map(|(stream, peer)| Accepted::Tcp(stream, peer))
            }
            Listener::Unix { listener, .. } => {
                listener.accept().await.map(|(stream, _)| Accepted::Unix(stream))
            }
        }
    }
}

impl Accepted {
    async fn serve(
        self,
        router: Router,
        limits: Limits,
        slot: Slot,
        phase: watch::Receiver<Phase>,
    ) {
        match self {
            Accepted::Tcp(stream, peer) => {
                // Tokens are small writes; waiting to fill a packet is what a client notices.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%peer, %error, "no delay-free socket");
                }
                connection::serve(stream, Peer::Address(peer), router, limits, slot, phase).await;
            }
            Accepted::Unix(stream) => {
                connection::serve(stream, Peer::Socket, router, limits, slot, phase).await;
            }
        }
    }
}
