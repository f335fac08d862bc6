//! The node's end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use muslin_stack::api::cni::Key;
use tokio::time::timeout;
use tokio_seqpacket::UnixSeqpacket;

use super::messages::{Answer, Demand};
use crate::control::Connection;
use crate::error::{Context, Error, Result};

/// How long a keeper may take for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Attachments with the queues of their devices.
type Devices = Vec<(Key, Vec<OwnedFd>)>;

/// A keeper, by its socket.
#[derive(Debug, Clone)]
pub(crate) struct Keeper(PathBuf);

impl Keeper {
    /// The one that listens there.
    pub(crate) fn new(socket: &Path) -> Self {
        Self(socket.to_owned())
    }

    /// Has a device held.
    ///
    /// # Errors
    /// If there is no keeper, or it has no room.
    pub(crate) async fn hold(&self, key: &Key, queues: &[OwnedFd]) -> Result<()> {
        self.ask(&Demand::Hold(key.clone()), queues)
            .await
            .map(|_| ())
    }

    /// Has a device closed that may be held.
    ///
    /// # Errors
    /// If there is no keeper.
    pub(crate) async fn close(&self, key: &Key) -> Result<()> {
        self.ask(&Demand::Close(key.clone()), &[]).await.map(|_| ())
    }

    /// All that is held.
    ///
    /// # Errors
    /// If there is no keeper.
    pub(crate) async fn give(&self) -> Result<Devices> {
        self.ask(&Demand::Give, &[]).await
    }

    /// A connection to it.
    ///
    /// # Errors
    /// If there is no keeper.
    pub(super) async fn connect(&self) -> Result<Kept> {
        let at = self.0.display();
        let connected = UnixSeqpacket::connect(&self.0).await;
        let connected = connected.context(format!("cannot connect to the keeper at {at}"))?;
        Ok(Kept {
            connection: Connection::new(connected),
            at: self.0.clone(),
        })
    }

    async fn ask(&self, demand: &Demand, queues: &[OwnedFd]) -> Result<Devices> {
        self.connect().await?.ask(demand, queues).await
    }
}

/// A connection to a keeper.
pub(super) struct Kept {
    connection: Connection,
    at: PathBuf,
}

impl Kept {
    /// All that is held.
    ///
    /// # Errors
    /// If what is connected is no keeper, or does not answer.
    pub(super) async fn give(&self) -> Result<Devices> {
        self.ask(&Demand::Give, &[]).await
    }

    async fn ask(&self, demand: &Demand, queues: &[OwnedFd]) -> Result<Devices> {
        let at = self.at.display();
        let asked = timeout(PATIENCE, self.converse(demand, queues)).await;
        match asked {
            Ok(Ok(Some(devices))) => Ok(devices),
            Ok(Ok(None)) => Err(Error::failed(format!("the keeper at {at} holds no more"))),
            Ok(Err(error)) => Err(error).context(format!("cannot speak to the keeper at {at}")),
            Err(_) => Err(Error::failed(format!("the keeper at {at} does not answer"))),
        }
    }

    /// The devices that come before the end of the answer; nothing if it is full.
    async fn converse(&self, demand: &Demand, queues: &[OwnedFd]) -> io::Result<Option<Devices>> {
        let beside: Vec<_> = queues.iter().map(AsFd::as_fd).collect();
        self.connection.send(demand, &beside).await?;
        let mut devices = Vec::new();
        while let Some((answer, beside)) = self.connection.receive::<Answer>().await? {
            match answer {
                Answer::Device(key) => devices.push((key, beside)),
                Answer::Done => return Ok(Some(devices)),
                Answer::Full => return Ok(None),
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
