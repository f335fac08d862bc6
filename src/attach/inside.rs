//! The process that enters a pod's namespaces for `muslin attach`.
//!
//! Who is user 0 there can do something to all that is inside. So it is another process that goes in:
//! it makes the interface, hands its device out and sets it up, and has nothing else. The one that
//! speaks to the node stays outside.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use muslin_stack::api::control::{Attached, Namespace};
use nix::unistd::dup;
use tokio::process::{Child, Command};
use tokio_seqpacket::UnixSeqpacket;

use super::command::exit_code;
use super::device::assignment;
use crate::confine::{self, Capability};
use crate::control::Connection;
use crate::device::{OpenError, Tap};
use crate::error::{Context, Error, Result};
use crate::netns::{self, Target};

/// What `muslin exec` enters.
const NAMESPACES: [Namespace; 2] = [Namespace::User, Namespace::Net];
const GONE: &str = "the process in the pod's namespaces is gone";
const GONE_OUTSIDE: &str = "the process outside the pod's namespaces is gone";

/// The process, for the one outside.
pub(crate) struct InsideProcess {
    process: Child,
    connection: Connection,
}

/// What it has made.
pub(crate) struct Made {
    /// The device's queues.
    pub(crate) queues: Vec<OwnedFd>,
    /// The pod's namespaces.
    pub(crate) namespaces: Vec<(Namespace, OwnedFd)>,
}

impl InsideProcess {
    /// Starts it with the words of a command that calls [`serve`].
    ///
    /// # Errors
    /// If it fails; it has said why.
    pub(crate) async fn start(words: Vec<OsString>) -> Result<(Self, Made)> {
        let (connection, theirs) = UnixSeqpacket::pair().context("cannot make a socket")?;
        // Re-executes this program by its inode: the path may name another one by now.
        let process = Command::new("/proc/self/exe")
            .args(words)
            .stdin(OwnedFd::from(theirs))
            .kill_on_drop(true)
            .spawn()
            .context("cannot start a process for the pod's namespaces")?;
        let mut inside = Self {
            process,
            connection: Connection::new(connection),
        };
        let received = async {
            let connection = &inside.connection;
            let Some(((), queues)) = connection.receive::<()>().await? else {
                return Ok(None);
            };
            let namespaces = connection.receive::<Vec<Namespace>>().await?;
            Ok(namespaces.map(|(kinds, beside)| Made {
                queues,
                namespaces: kinds.into_iter().zip(beside).collect(),
            }))
        };
        let received: io::Result<_> = received.await;
        match received.context("cannot receive the device")? {
            Some(made) => Ok((inside, made)),
            None => {
                inside.ends().await?;
                Err(Error::failed(GONE))
            }
        }
    }

    /// Has it set up the interface as the node said.
    ///
    /// # Errors
    /// If it fails; it has said why.
    pub(crate) async fn configure(mut self, attached: &Attached) -> Result<()> {
        let sent = self.connection.send(attached, &[]).await;
        sent.context(GONE)?;
        self.ends().await
    }

    async fn ends(&mut self) -> Result<()> {
        let status = self.process.wait().await.context(GONE)?;
        match status.code() {
            Some(_) => exit_code(status),
            None => Err(Error::failed(GONE)),
        }
    }
}

/// Enters the namespaces, makes the interface `name` there and hands out its device by the socket that
/// is stdin; then sets the interface up.
///
/// # Errors
/// What is in the way.
pub(crate) async fn serve(
    target: &Target,
    name: &str,
    offloads: bool,
    queues: usize,
) -> Result<()> {
    let socket = dup(io::stdin()).context("no socket")?;
    let connection = Connection::new(UnixSeqpacket::try_from(socket).context("no socket")?);
    // Who is user 0 there must not take anything out of this process.
    confine::keep_to_itself()?;
    confine::try_all(&[confine::leave_no_core]);
    netns::enter(target)?;
    let tap = Tap::create(name, offloads, queues).map_err(|error| match error {
        OpenError::Exists(name) => Error::failed(format!(
            "that network namespace already has an interface '{name}': choose another name with \
             --ifname"
        )),
        error => Error::failed(error),
    })?;
    confine::try_all(&[|| confine::keep_only(&[Capability::CAP_NET_ADMIN])]);
    let beside: Vec<_> = tap.iter().map(AsFd::as_fd).collect();
    connection.send(&(), &beside).await.context(GONE_OUTSIDE)?;
    // Whoever has it now decides when the interface goes.
    drop(tap);
    let namespaces = netns::of("self", &NAMESPACES)?;
    let beside: Vec<_> = namespaces.iter().map(|(_, fd)| fd.as_fd()).collect();
    let sent = connection.send(&NAMESPACES, &beside).await;
    sent.context(GONE_OUTSIDE)?;
    drop(namespaces);
    match connection
        .receive::<Attached>()
        .await
        .context(GONE_OUTSIDE)?
    {
        Some((attached, _)) => netns::configure(name, &assignment(&attached)).await,
        // The node has refused.
        None => Ok(()),
    }
}
