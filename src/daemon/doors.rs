//! What clients of a node come in by: the control sockets, and the ports of health checks, metrics and the page.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use tokio::net::TcpListener;
use tokio_seqpacket::UnixSeqpacketListener;
use tracing::{info, warn};

use super::settings::NodeSettings;
use crate::control::{self, Level};
use crate::error::{Context, Result};
use crate::http;
use crate::page::{self, Nodes, Page};
use crate::state::{self, StateDir};
use crate::takeover::{Estate, FrontDoor};

/// The socket that can only be read.
const STATUS: &str = "status.sock";
/// Sockets for clients who may not do everything, by their names.
const LESSER: [(&str, Level); 2] = [("attach.sock", Level::Attach), (STATUS, Level::Status)];

/// The listeners of a node.
pub(super) struct Doors {
    pub(super) control: Vec<(PathBuf, Level, UnixSeqpacketListener)>,
    pub(super) health: Option<TcpListener>,
    pub(super) metrics: Option<TcpListener>,
    pub(super) page: Option<(Page, TcpListener)>,
}

impl Doors {
    /// Opens those of a node, or goes on with those of a process before this one.
    ///
    /// # Errors
    /// If one cannot be had that is needed.
    pub(super) async fn open(
        settings: &NodeSettings,
        state: &StateDir,
        mut former: Option<&mut Estate>,
    ) -> Result<Self> {
        let path = settings.socket.clone();
        let path = path.unwrap_or_else(|| state.socket_named("control.sock"));
        let mut take = |door| former.as_mut().and_then(|estate| estate.take(door));
        let listener = listen(&path, take(FrontDoor::Control(Level::Full)))?;
        let mut control = vec![(path, Level::Full, listener)];
        for (name, level) in LESSER {
            let path = state.socket_named(name);
            match listen(&path, take(FrontDoor::Control(level))) {
                Ok(listener) => control.push((path, level, listener)),
                // A node can do without.
                Err(error) => warn!("cannot listen on {name}: {error}"),
            }
        }
        let health = served(
            settings.health,
            take(FrontDoor::Health),
            http::health::listen,
        )
        .await?;
        if let Some((address, _)) = &health {
            info!("health is served at http://{address}/healthz and /readyz");
        }
        let metrics = take(FrontDoor::Metrics);
        let metrics = served(settings.metrics, metrics, http::metrics::listen).await?;
        if let Some((address, _)) = &metrics {
            info!("metrics are served at http://{address}/metrics");
        }
        let listen_for_page = |address| page::listen(address, "--admin");
        let page = served(settings.admin, take(FrontDoor::Page), listen_for_page).await?;
        let page = match page {
            Some((address, listener)) => {
                let page = Page::new(Nodes::At(state.socket_named(STATUS)), address)?;
                info!("the page is served at {}", page.url());
                Some((page, listener))
            }
            None => None,
        };
        Ok(Self {
            control,
            health: health.map(|(_, listener)| listener),
            metrics: metrics.map(|(_, listener)| listener),
            page,
        })
    }

    /// Where clients find the control sockets.
    pub(super) fn paths(&self) -> Vec<(PathBuf, Level)> {
        let control = self.control.iter();
        control
            .map(|(path, level, _)| (path.clone(), *level))
            .collect()
    }

    /// Copies of them, and of the lock, for another process.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub(super) fn copy(&self, state: &StateDir) -> io::Result<Estate> {
        let mut doors = Vec::new();
        for (_, level, listener) in &self.control {
            let copy = listener.as_fd().try_clone_to_owned()?;
            doors.push((FrontDoor::Control(*level), copy));
        }
        let pages = [
            (FrontDoor::Health, self.health.as_ref()),
            (FrontDoor::Metrics, self.metrics.as_ref()),
            (
                FrontDoor::Page,
                self.page.as_ref().map(|(_, listener)| listener),
            ),
        ];
        for (door, listener) in pages {
            if let Some(listener) = listener {
                doors.push((door, listener.as_fd().try_clone_to_owned()?));
            }
        }
        Ok(Estate {
            lock: Some(state.copy_lock()?),
            doors,
        })
    }
}

fn listen(path: &std::path::Path, former: Option<OwnedFd>) -> Result<UnixSeqpacketListener> {
    match former {
        Some(listener) => UnixSeqpacketListener::try_from(listener)
            .context(format!("cannot go on to listen at {}", path.display())),
        None => {
            state::vacate(path)?;
            control::listen(path)
        }
    }
}

/// A listener at that address, if there is to be one: that of a process before this one, if it has the
/// same address.
async fn served<F: Future<Output = Result<TcpListener>>>(
    address: Option<SocketAddr>,
    former: Option<OwnedFd>,
    listen: impl FnOnce(SocketAddr) -> F,
) -> Result<Option<(SocketAddr, TcpListener)>> {
    let Some(address) = address else {
        return Ok(None);
    };
    let former = former.map(std::net::TcpListener::from);
    let former = former.filter(|it| it.local_addr().is_ok_and(|it| it == address));
    let former = former.map(TcpListener::from_std).transpose();
    let listener = match former.context(format!("cannot go on to listen at {address}"))? {
        Some(listener) => listener,
        None => listen(address).await?,
    };
    Ok(Some((address, listener)))
}
