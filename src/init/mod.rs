//! The first process of a pod's PID namespace, and its parent, which keeps the pod attached and tells
//! it what to do. All processes of a pod end with the first, and that with its parent.

mod inside;
mod messages;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;

pub(crate) use messages::InitSettings;
use messages::{Order, Report, connect};
use muslin_stack::api::control::{Attached, Namespace};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::control::Connection;
use crate::error::{Context, Error, Result};
use crate::netns::{self, Child};
use crate::terminal::job::{Change, Job};

/// What of a pod's first process others can enter, in an order in which they can. The user namespace
/// around it comes before.
const NAMESPACES: [Namespace; 5] = [
    Namespace::Pid,
    Namespace::User,
    Namespace::Net,
    Namespace::Uts,
    Namespace::Mount,
];

/// A first process that is making its namespaces.
#[derive(Debug)]
pub(crate) struct Starting {
    child: Child,
    socket: OwnedFd,
    program: OsString,
}

/// Starts the first process of a pod, and moves this one into the user namespace around the pod's.
/// This process must have one thread, and cannot have another one from then on; and it must not have
/// had a runtime, whose pipe for signals both would share.
///
/// # Errors
/// If that is forbidden: by what, and what to do.
pub(crate) fn start(settings: InitSettings) -> Result<Starting> {
    let limits = netns::enter_outer()?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (ours, theirs) = pair.context("cannot make a socket")?;
    let program = settings.command.first().cloned().unwrap_or_default();
    let run = |parent: &_| inside::run(settings, &limits, theirs, parent);
    let (child, socket) = Child::fork(ours, run)?;
    Ok(Starting {
        child,
        socket,
        program,
    })
}

impl Starting {
    /// Waits for the namespaces, and moves this process into the pod's network.
    ///
    /// # Errors
    /// If they are not to be had: what forbids it, and what to do.
    pub(crate) async fn ready(self) -> Result<(Init, Vec<(Namespace, OwnedFd)>)> {
        let init = Init {
            connection: connect(self.socket)?,
            child: self.child,
            program: self.program,
        };
        init.heard().await?;
        let mut namespaces = netns::of("self", &[Namespace::User])?;
        let first = init.child.pid().to_string();
        namespaces.extend(netns::of(&first, &NAMESPACES)?);
        let network = namespaces.iter().find(|(kind, _)| *kind == Namespace::Net);
        if let Some((_, network)) = network {
            setns(network, CloneFlags::CLONE_NEWNET).context("cannot enter the pod's network")?;
        }
        Ok((init, namespaces))
    }
}

/// The first process of a pod, as its parent has it.
#[derive(Debug)]
pub(crate) struct Init {
    child: Child,
    connection: Connection,
    program: OsString,
}

impl Init {
    /// Has the command start, in the pod that was attached so.
    ///
    /// # Errors
    /// If it cannot.
    pub(crate) async fn begin(&self, attached: &Attached) -> Result<()> {
        self.send(&Order::Begin(Box::new(attached.clone()))).await?;
        self.heard().await
    }

    /// Ends all of the pod at once.
    pub(crate) fn kill(&self) {
        self.child.kill();
    }

    async fn send(&self, order: &Order) -> Result<()> {
        let sent = self.connection.send(order, &[]).await;
        sent.context("cannot send to the pod's first process")
    }

    async fn heard(&self) -> Result<()> {
        let report = self.connection.receive::<Report>().await;
        match report.context("cannot receive from the pod's first process")? {
            Some((Report::Done, _)) => Ok(()),
            Some((Report::NoCommand(number), _)) => Err(Error::Start {
                program: self.program.display().to_string(),
                error: io::Error::from_raw_os_error(number),
            }),
            Some((Report::Failed(why), _)) => Err(Error::Failed(why)),
            Some((Report::Stopped(_), _)) | None => {
                Err(Error::failed("the pod's first process has ended"))
            }
        }
    }
}

/// The command. Its end is that of the first process, and of all that it has started.
impl Job for Init {
    async fn changed(&self) -> Result<Change> {
        tokio::select! {
            change = self.child.changed() => change,
            Ok(Some((Report::Stopped(number), _))) = self.connection.receive() => {
                let signal = Signal::try_from(number);
                signal.map(Change::Stopped).context("a strange signal")
            }
        }
    }

    async fn signal(&self, signal: Signal) {
        // It may have ended this moment.
        let _ = self.send(&Order::Signal(signal as i32)).await;
    }

    async fn go_on(&self, has_terminal: bool) {
        let _ = self.send(&Order::GoOn { has_terminal }).await;
    }
}
