//! The node's end.

use std::collections::BTreeMap;
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
use crate::underlay::Adopted;

/// How long a keeper may take for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the sockets of a worker are held as; no network's name has a space.
const TUNNEL: &str = "muslin node";

/// What an earlier process of a node has left.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// The sockets of its tunnel, of each worker.
    pub(crate) tunnel: Vec<Adopted>,
    /// The devices of pods.
    pub(crate) devices: BTreeMap<Key, Vec<OwnedFd>>,
}

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

    /// Has the sockets of a tunnel held, of each worker.
    ///
    /// # Errors
    /// If there is no keeper, or it has no room.
    pub(crate) async fn hold_tunnel(&self, workers: Vec<Adopted>) -> Result<()> {
        for (index, worker) in workers.into_iter().enumerate() {
            let key = Key::new(TUNNEL, index.to_string(), worker.queues.len().to_string());
            let sockets: Vec<_> = worker.queues.into_iter().chain(worker.others).collect();
            self.hold(&key, &sockets).await?;
        }
        Ok(())
    }

    /// Takes the sockets of a tunnel that are held, and copies of pods' devices.
    ///
    /// # Errors
    /// If there is no keeper.
    pub(crate) async fn take(&self) -> Result<Kept> {
        let mut kept = Kept::default();
        let mut workers = BTreeMap::new();
        for (key, mut queues) in self.give().await? {
            if !is_tunnel(&key) {
                kept.devices.insert(key, queues);
                continue;
            }
            self.close(&key).await?;
            if let (Ok(index), Ok(count)) = (
                key.container.parse::<usize>(),
                key.interface.parse::<usize>(),
            ) {
                let others = queues.split_off(count.min(queues.len()));
                workers.insert(index, Adopted { queues, others });
            }
        }
        kept.tunnel = workers.into_values().collect();
        Ok(kept)
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
    pub(super) async fn connect(&self) -> Result<Connected> {
        let at = self.0.display();
        let connected = UnixSeqpacket::connect(&self.0).await;
        let connected = connected.context(format!("cannot connect to the keeper at {at}"))?;
        Ok(Connected {
            connection: Connection::new(connected),
            at: self.0.clone(),
        })
    }

    async fn ask(&self, demand: &Demand, queues: &[OwnedFd]) -> Result<Devices> {
        self.connect().await?.ask(demand, queues).await
    }
}

/// Whether what is held are the sockets of a tunnel.
pub(crate) fn is_tunnel(key: &Key) -> bool {
    key.network == TUNNEL
}

/// A connection to a keeper.
pub(super) struct Connected {
    connection: Connection,
    at: PathBuf,
}

impl Connected {
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
