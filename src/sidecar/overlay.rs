//! The overlay from within a process: connections and datagrams by a pod's own address, which no
//! interface has.
//!
//! A thread moves the pod's packets between its node, by a [`FrameSocket`], and sockets: one end of
//! a Unix pair for each connection that begins here, and a socket of the host for each that another
//! pod begins to an exposed port. What becomes of them [`muslin_stack::datapath::egress`] decides, for which
//! the rest of the overlay are the pods.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::task::{Context as Task, Poll, ready};
use std::thread::JoinHandle;
use std::time::Duration;

use muslin_stack::api::control::Attached;
use muslin_stack::datapath::egress::HostError;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::debug;

use super::command::{Command, Datagram, Exposed, Inbox};
use super::endpoint;
use super::room::{Room, Rooms};
use crate::device::FrameSocket;
use crate::error::{Context, Error, Result};

/// How long the node may take to say where its gateway is.
const GATEWAY: Duration = Duration::from_secs(10);

/// A pod's address. Its thread ends with it.
pub struct Overlay {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// Whether the gateway is known.
    ready: watch::Receiver<bool>,
    /// For datagrams that wait to be sent.
    outgoing: Rooms,
    /// For those that wait to be read.
    incoming: Rooms,
    /// Datagrams for which there was no room.
    lost: AtomicU64,
}

impl Overlay {
    /// The address of an attached pod whose node has the other end of `device`.
    ///
    /// # Errors
    /// If the kernel gives no thread or descriptors, or the node does not answer.
    pub async fn start(
        device: FrameSocket,
        attached: &Attached,
        exposed: &[Exposed],
    ) -> Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = EventFd::from_flags(flags).context("cannot start the pod")?;
        let wake = Arc::new(wake);
        let (commands, receiver) = std::sync::mpsc::channel();
        let (known, ready) = watch::channel(false);
        let inside = endpoint::Setup {
            device,
            place: attached.try_into()?,
            exposed: exposed.to_vec(),
            commands: receiver,
            wake: wake.clone(),
            known,
        };
        let thread = endpoint::start(inside).context("cannot start the pod")?;
        let mut overlay = Self {
            commands,
            wake,
            thread: Some(thread),
            ready,
            outgoing: Rooms::new(),
            incoming: Rooms::new(),
            lost: AtomicU64::new(0),
        };
        overlay.wait_ready().await?;
        Ok(overlay)
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let known = self.ready.wait_for(|known| *known);
        match tokio::time::timeout(GATEWAY, known).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::failed("the pod's thread has ended")),
            Err(_) => Err(Error::failed(
                "the node does not report its gateway: its process hangs or is stopped",
            )),
        }
    }

    /// Connects to a port of another pod, or of an address outside if the node lets its pods reach
    /// it.
    ///
    /// # Errors
    /// What the other end or the way to it says: refused, unreachable, timed out.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<Stream> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        let reset = Arc::new(AtomicBool::new(false));
        let (outcome_sender, outcome) = oneshot::channel();
        self.send(Command::Dial {
            to,
            socket: theirs.into(),
            reset: reset.clone(),
            outcome_sender,
        })?;
        outcome.await.map_err(ended)?.map_err(refusal)?;
        Ok(Stream {
            socket: UnixStream::from_std(ours)?,
            reset,
        })
    }

    /// Takes a UDP port of the pod's address.
    ///
    /// # Errors
    /// If none is free.
    pub async fn bind(self: &Arc<Self>) -> io::Result<DatagramSocket> {
        let (reader, inbox) = mpsc::unbounded_channel();
        let (outcome_sender, port) = oneshot::channel();
        let room = self.incoming.port();
        self.send(Command::Bind {
            inbox: Inbox { reader, room },
            outcome_sender,
        })?;
        let port = port.await.map_err(ended)?;
        Ok(DatagramSocket {
            overlay: self.clone(),
            port: port.ok_or(io::ErrorKind::AddrInUse)?,
            room: self.outgoing.port(),
            inbox: tokio::sync::Mutex::new(inbox),
        })
    }

    /// The node has given the pod this place, perhaps another than before: then its connections are
    /// over.
    ///
    /// # Errors
    /// If the thread has ended, or there is no address in it.
    pub fn move_to(&self, attached: &Attached) -> Result<()> {
        self.send(Command::Move(attached.try_into()?))
            .map_err(Error::failed)
    }

    fn send(&self, command: Command) -> io::Result<()> {
        self.commands.send(command).map_err(ended)?;
        // A full counter wakes the thread as well.
        let _ = self.wake.write(1);
        Ok(())
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ended<T>(_: T) -> io::Error {
    io::Error::other("the pod's thread has ended")
}

/// What a kernel would say of a connection that was not made.
fn refusal(error: HostError) -> io::Error {
    io::Error::new(
        match error {
            HostError::Refused => io::ErrorKind::ConnectionRefused,
            HostError::NetUnreachable => io::ErrorKind::NetworkUnreachable,
            HostError::HostUnreachable => io::ErrorKind::HostUnreachable,
            HostError::TimedOut => io::ErrorKind::TimedOut,
            HostError::Reset => io::ErrorKind::ConnectionReset,
            HostError::NotPermitted => io::ErrorKind::PermissionDenied,
            HostError::WouldBlock
            | HostError::TooLong
            | HostError::Exhausted
            | HostError::Failed => io::ErrorKind::Other,
        },
        error,
    )
}

/// A connection by the pod's address.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
    /// Whether it ended by a reset.
    reset: Arc<AtomicBool>,
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        task: &mut Task<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let room = buffer.remaining();
        ready!(Pin::new(&mut self.socket).poll_read(task, buffer))?;
        let is_end = buffer.filled().len() == before && room > 0;
        // A pair of Unix sockets knows no resets.
        if is_end && self.reset.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        task: &mut Task<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(task, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Task<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(task)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Task<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(task)
    }
}

/// A UDP port of the pod's address.
pub struct DatagramSocket {
    overlay: Arc<Overlay>,
    port: u16,
    room: Room,
    inbox: tokio::sync::Mutex<mpsc::UnboundedReceiver<Datagram>>,
}

impl DatagramSocket {
    /// Sends a datagram. Whether it arrives nobody tells; it is lost, and counted, where too many
    /// wait already.
    ///
    /// # Errors
    /// If the thread has ended.
    pub fn send(&self, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        let Some(room) = self.room.take(payload.len()) else {
            let lost = self.overlay.lost.fetch_add(1, Ordering::Relaxed) + 1;
            if lost.is_power_of_two() {
                debug!("datagrams lost, since too many wait for the node: {lost}");
            }
            return Ok(());
        };
        self.overlay.send(Command::Send {
            port: self.port,
            datagram: Datagram::new(to, payload, room),
        })
    }

    /// The next datagram from one that was sent to, and its sender.
    ///
    /// # Errors
    /// If the thread has ended.
    pub async fn receive(&self) -> io::Result<(SocketAddr, Vec<u8>)> {
        let received = self.inbox.lock().await.recv().await;
        let datagram = received.ok_or_else(|| ended(()))?;
        Ok((datagram.peer, datagram.payload))
    }
}

impl Drop for DatagramSocket {
    fn drop(&mut self) {
        let _ = self.overlay.send(Command::Unbind(self.port));
    }
}
