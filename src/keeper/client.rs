//! The node's end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use muslin_stack::api::cni::Key;
use tokio::time::timeout;
use tokio_seqpacket::UnixSeqpacket;

use super::messages::{Demand, Held};
use crate::control::Connection;
use crate::error::{Context, Error, Result};

/// How long a keeper may take for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

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
    pub(crate) async fn give(&self) -> Result<Vec<(Key, Vec<OwnedFd>)>> {
        self.ask(&Demand::Give, &[]).await
    }

    async fn ask(&self, demand: &Demand, queues: &[OwnedFd]) -> Result<Vec<(Key, Vec<OwnedFd>)>> {
        let at = self.0.display();
        let asked = timeout(PATIENCE, self.converse(demand, queues)).await;
        match asked {
            Ok(Ok(Some(devices))) => Ok(devices),
            Ok(Ok(None)) => Err(Error::failed(format!("the keeper at {at} holds no more"))),
            Ok(Err(error)) => Err(error).context(format!("cannot speak to the keeper at {at}")),
            Err(_) => Err(Error::failed(format!("the keeper at {at} does not answer"))),
        }
    }

    /// The devices that come before the end of the answer; nothing if it is full.
    async fn converse(
        &self,
        demand: &Demand,
        queues: &[OwnedFd],
    ) -> io::Result<Option<Vec<(Key, Vec<OwnedFd>)>>> {
        let connection = Connection::new(UnixSeqpacket::connect(&self.0).await?);
        let beside: Vec<_> = queues.iter().map(AsFd::as_fd).collect();
        connection.send(demand, &beside).await?;
        let mut devices = Vec::new();
        while let Some((held, beside)) = connection.receive::<Held>().await? {
            match held {
                Held::Device(key) => devices.push((key, beside)),
                Held::Done => return Ok(Some(devices)),
                Held::Full => return Ok(None),
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
