//! Where clients of a proxy come in.

use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tracing::{debug, warn};

use super::relay;
use crate::clients::{Clients, Place};
use crate::error::{Error, Result};

/// Clients of one listener at a time. If all of them have said what they want, the kernel lets others
/// wait.
const CLIENTS: usize = 1024;
/// How long to leave a system alone that has no descriptors left.
const REST: Duration = Duration::from_millis(100);

/// An address to listen on, on the command line `[ADDR:]PORT`: the loopback address if it names
/// none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen(pub SocketAddr);

/// A text that is not an address to listen on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is not an address to listen on: write [ADDR:]PORT, such as 1080 or 127.0.0.1:1080")]
pub struct NotListen(String);

impl FromStr for Listen {
    type Err = NotListen;

    fn from_str(text: &str) -> std::result::Result<Self, NotListen> {
        let port = text.parse::<u16>().ok();
        let address = match port {
            Some(port) => Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)),
            None => text.parse().ok(),
        };
        address.map(Self).ok_or_else(|| NotListen(text.to_owned()))
    }
}

impl Listen {
    /// Takes the address for what `flag` asks.
    ///
    /// # Errors
    /// If it is not this machine's alone and `is_public` does not say that this is meant, or cannot
    /// be had.
    pub(super) async fn bind(self, flag: &str, is_public: bool) -> Result<TcpListener> {
        let Self(address) = self;
        if !is_public && !self.is_loopback() {
            return Err(Error::usage(format!(
                "{flag} {address}: anyone who reaches that address could use it to reach the pod \
                 network: add --allow-public-proxy to allow that"
            )));
        }
        let bound = TcpListener::bind(address).await;
        bound.map_err(|error| Error::failed(format!("{flag} {address}: {error}")))
    }

    /// Whether only this machine gets there.
    pub(super) fn is_loopback(self) -> bool {
        self.0.ip().to_canonical().is_loopback()
    }
}

/// Has `serve` serve each client, for ever. Who does not say what it wants has to go when others
/// come.
pub(super) async fn accept<F>(
    listener: TcpListener,
    name: &'static str,
    serve: impl Fn(TcpStream, Place) -> F,
) where
    F: Future<Output = std::result::Result<(), String>> + Send + 'static,
{
    let mut clients = Clients::new(CLIENTS);
    let mut warned = false;
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                if let Err(error) = relay::prepare(&stream) {
                    debug!("{name}, client {client}: {error}");
                    continue;
                }
                let room = match clients.make_room().await {
                    Some(room) => room,
                    None => clients.wait().await,
                };
                clients.serve(room, |place| {
                    let served = serve(stream, place);
                    async move {
                        if let Err(why) = served.await {
                            debug!("{name}, client {client}: {why}");
                        }
                    }
                });
            }
            Err(error) => {
                if !std::mem::replace(&mut warned, true) {
                    warn!("{name} cannot accept clients now: {error}");
                }
                sleep(REST).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_on_the_loopback_address() {
        let read = |text: &str| text.parse::<Listen>().map(|listen| listen.0.to_string());
        assert_eq!(read("1080").as_deref(), Ok("127.0.0.1:1080"));
        assert_eq!(read("0.0.0.0:80").as_deref(), Ok("0.0.0.0:80"));
        assert_eq!(read("[::1]:80").as_deref(), Ok("[::1]:80"));
        for bad in ["", "x", "1.2.3.4", ":80", "65536", "localhost:80"] {
            assert!(read(bad).unwrap_err().to_string().contains("[ADDR:]PORT"));
        }
    }

    #[tokio::test]
    async fn what_others_reach_has_to_be_meant() {
        for address in ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"] {
            let listen: Listen = address.parse().unwrap();
            let refused = listen.bind("--socks5", false).await.unwrap_err();
            let text = refused.to_string();
            assert!(matches!(refused, Error::Usage(_)), "{text}");
            assert!(text.contains("--allow-public-proxy"), "{text}");
        }
        let listen: Listen = "0.0.0.0:0".parse().unwrap();
        assert!(listen.bind("--socks5", true).await.is_ok());
        let listen: Listen = "0".parse().unwrap();
        assert!(listen.bind("--socks5", false).await.is_ok());
    }
}
