//! The sidecar: a pod of its own in a process, for where there may be no interface.
//!
//! Programs beside it reach the overlay by SOCKS5, by an HTTP proxy or by forwarded ports, and are
//! reached by exposed ones.

mod command;
mod dial;
mod endpoint;
mod forward;
mod http;
mod listen;
pub mod overlay;
mod relay;
mod resolve;
mod room;
pub mod socks5;

use std::net::SocketAddr;
use std::sync::Arc;

pub use command::Exposed;
use dial::Dialler;
pub use forward::{Expose, Forward};
pub use listen::Listen;
use muslin_stack::api::control::Attached;
pub use muslin_stack::api::credentials::Credentials;
use overlay::Overlay;
use tokio::net::TcpListener;
use tracing::warn;

use crate::error::{Context, Result};

/// The ways into the overlay and out of it.
#[derive(Debug, Clone, Default)]
pub struct SidecarSettings {
    /// Where SOCKS5 is spoken.
    pub socks5: Vec<Listen>,
    /// Where the HTTP proxy is.
    pub http: Vec<Listen>,
    /// Local ports that lead to a pod's.
    pub forwards: Vec<Forward>,
    /// Whether others than this machine may use all those.
    pub is_public: bool,
    /// The credentials that proxy clients must send.
    pub credentials: Option<Arc<Credentials>>,
}

impl SidecarSettings {
    /// Warns of proxies that others may use and that ask them for nothing.
    fn warn_of_guests(&self) {
        let proxies = self.socks5.iter().chain(&self.http);
        let mut open = proxies.filter(|it| self.is_public && !it.is_loopback());
        if let (Some(Listen(address)), None) = (open.next(), &self.credentials) {
            warn!(
                "anyone who reaches {address} can reach the pod network and whatever its pods \
                 reach: give a file with the USER:PASSWORD that clients must send with \
                 --proxy-auth-file"
            );
        }
    }
}

/// Listeners whose addresses are taken.
pub struct Proxies {
    socks5: Vec<TcpListener>,
    http: Vec<TcpListener>,
    forwards: Vec<(TcpListener, Forward)>,
    credentials: Option<Arc<Credentials>>,
}

impl Proxies {
    /// Takes all addresses.
    ///
    /// # Errors
    /// If one cannot be had, or is open to others without a word that this is meant.
    pub async fn bind(settings: &SidecarSettings) -> Result<Self> {
        let is_public = settings.is_public;
        settings.warn_of_guests();
        let mut bound = Self {
            socks5: Vec::new(),
            http: Vec::new(),
            forwards: Vec::new(),
            credentials: settings.credentials.clone(),
        };
        for listen in &settings.socks5 {
            bound.socks5.push(listen.bind("--socks5", is_public).await?);
        }
        for listen in &settings.http {
            bound
                .http
                .push(listen.bind("--http-proxy", is_public).await?);
        }
        for forward in &settings.forwards {
            let listener = forward.from.bind("--forward", is_public).await?;
            bound.forwards.push((listener, forward.clone()));
        }
        Ok(bound)
    }

    /// The first address where SOCKS5 is spoken.
    #[must_use]
    pub fn socks5(&self) -> Option<SocketAddr> {
        self.socks5.first()?.local_addr().ok()
    }

    /// The first address where the HTTP proxy is.
    #[must_use]
    pub fn http(&self) -> Option<SocketAddr> {
        self.http.first()?.local_addr().ok()
    }

    /// What each listener does, and where, a line each.
    ///
    /// # Errors
    /// If the system does not know a listener's address.
    pub fn describe(&self) -> Result<Vec<String>> {
        let at = |listener: &TcpListener| listener.local_addr().context("a listener's address");
        let mut lines = Vec::new();
        for listener in &self.socks5 {
            lines.push(format!("SOCKS5 at {}", at(listener)?));
        }
        for listener in &self.http {
            lines.push(format!("HTTP proxy at {}", at(listener)?));
        }
        for (listener, forward) in &self.forwards {
            lines.push(format!("{} leads to {forward}", at(listener)?));
        }
        Ok(lines)
    }

    /// Begins to serve clients by the address of an attached pod.
    ///
    /// # Errors
    /// If the pod has no address.
    pub fn serve(self, overlay: &Arc<Overlay>, attached: &Attached) -> Result<()> {
        let dialler = Arc::new(Dialler::new(overlay.clone(), attached)?);
        for listener in self.socks5 {
            let (dialler, credentials) = (dialler.clone(), self.credentials.clone());
            tokio::spawn(listen::accept(listener, "SOCKS5", move |client, place| {
                let (dialler, credentials) = (dialler.clone(), credentials.clone());
                async move {
                    let credentials = credentials.as_deref();
                    let served = socks5::serve(client, &place, &dialler, credentials).await;
                    served.map_err(|error| error.to_string())
                }
            }));
        }
        for listener in self.http {
            let (dialler, credentials) = (dialler.clone(), self.credentials.clone());
            tokio::spawn(listen::accept(
                listener,
                "HTTP proxy",
                move |client, place| {
                    let served = http::serve(client, place, dialler.clone(), credentials.clone());
                    async move { served.await.map_err(|error| error.to_string()) }
                },
            ));
        }
        for (listener, forward) in self.forwards {
            let dialler = dialler.clone();
            tokio::spawn(listen::accept(listener, "forward", move |client, place| {
                // It says nothing before it is connected.
                place.keep();
                let served = forward::serve(client, dialler.clone(), forward.to.clone());
                async move {
                    let _place = place;
                    served.await.map_err(|error| error.to_string())
                }
            }));
        }
        Ok(())
    }
}
