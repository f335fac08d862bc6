//! A SOCKS5 proxy into the overlay.

mod associate;
mod lookups;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use associate::Relay;
use muslin_stack::api::credentials::Credentials;
use muslin_stack::api::socks5::{self as wire, Command, Fault, Parsed, Reply, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::dial::{DialError, Dialler};
use super::relay;
use crate::clients::Place;

/// How long a client may take for all it says before its request is whole.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a client is not served.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("SOCKS5: {0}")]
    Fault(#[from] Fault),
    #[error("SOCKS5: the client did not authenticate itself")]
    Unauthenticated,
    #[error("SOCKS5: no complete request within {} seconds", PATIENCE.as_secs())]
    Slow,
    #[error("SOCKS5: BIND is not supported")]
    Bind,
    #[error("SOCKS5: {0}")]
    Dial(#[from] DialError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves one client to its end.
pub(super) async fn serve(
    client: TcpStream,
    place: &Place,
    dialler: &Arc<Dialler>,
    credentials: Option<&Credentials>,
) -> Result<(), Refusal> {
    let mut client = Client {
        stream: client,
        said: Vec::new(),
    };
    let negotiated = timeout(PATIENCE, client.negotiate(credentials)).await;
    let (command, target) = match negotiated.map_err(|_| Refusal::Slow)? {
        Ok(request) => request,
        Err(Refusal::Fault(fault)) => {
            let reply = match fault {
                Fault::Command(_) => Reply::CommandNotSupported,
                Fault::AddressType(_) => Reply::AddressNotSupported,
                _ => Reply::Failure,
            };
            client.answer(reply, None).await?;
            return Err(fault.into());
        }
        Err(other) => return Err(other),
    };
    place.keep();
    match command {
        Command::Connect => client.connect(dialler, &target).await,
        Command::UdpAssociate => client.associate(dialler).await,
        Command::Bind => {
            client.answer(Reply::CommandNotSupported, None).await?;
            Err(Refusal::Bind)
        }
    }
}

/// A client and what it has said that was not read yet.
struct Client {
    stream: TcpStream,
    said: Vec<u8>,
}

impl Client {
    async fn negotiate(
        &mut self,
        credentials: Option<&Credentials>,
    ) -> Result<(Command, Target), Refusal> {
        let wanted = match credentials {
            Some(_) => wire::PASSWORD,
            None => wire::NO_AUTH,
        };
        let offered = self.hear(|bytes| {
            let parsed = wire::greeting(bytes)?;
            Ok(parsed.map(|(methods, len)| (methods.contains(&wanted), len)))
        });
        if !offered.await? {
            let none = wire::method(wire::NO_METHOD);
            self.stream.write_all(&none).await?;
            return Err(Refusal::Unauthenticated);
        }
        self.stream.write_all(&wire::method(wanted)).await?;
        if let Some(credentials) = credentials {
            let right = self.hear(|bytes| {
                let parsed = wire::credentials(bytes)?;
                Ok(parsed.map(|((user, password), len)| (credentials.are(user, password), len)))
            });
            let right = right.await?;
            self.stream.write_all(&wire::authenticated(right)).await?;
            if !right {
                return Err(Refusal::Unauthenticated);
            }
        }
        self.hear(wire::request).await
    }

    /// Reads one message.
    async fn hear<T>(&mut self, parse: impl Fn(&[u8]) -> Parsed<T>) -> Result<T, Refusal> {
        loop {
            if let Some((message, len)) = parse(&self.said)? {
                self.said.drain(..len);
                return Ok(message);
            }
            // No message is longer, so what is longer was parsed or refused above.
            let room = (wire::MAX_LEN + 1).saturating_sub(self.said.len()).max(1);
            let mut part = vec![0; room];
            let len = self.stream.read(&mut part).await?;
            if len == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.said.extend_from_slice(&part[..len]);
        }
    }

    async fn answer(&mut self, reply: Reply, by: Option<SocketAddr>) -> io::Result<()> {
        let by = by.unwrap_or((Ipv4Addr::UNSPECIFIED, 0).into());
        self.stream.write_all(&wire::reply(reply, by)).await
    }

    async fn associate(mut self, dialler: &Dialler) -> Result<(), Refusal> {
        let opened = Relay::open(&self.stream, dialler).await;
        let address = opened.and_then(|relay| Ok((relay.address()?, relay)));
        match address {
            Ok((address, relay)) => {
                self.answer(Reply::Succeeded, Some(address)).await?;
                Ok(relay.run(&mut self.stream, dialler).await?)
            }
            Err(error) => {
                self.answer(Reply::Failure, None).await?;
                Err(error.into())
            }
        }
    }

    async fn connect(mut self, dialler: &Dialler, target: &Target) -> Result<(), Refusal> {
        let (mut stream, by) = match dialler.connect(target).await {
            Ok(connected) => connected,
            Err(error) => {
                self.answer(reply_to(&error), None).await?;
                return Err(error.into());
            }
        };
        let by = SocketAddr::new(by, 0);
        self.answer(Reply::Succeeded, Some(by)).await?;
        stream.write_all(&self.said).await?;
        relay::relay(self.stream, stream).await?;
        Ok(())
    }
}

/// The reply to a client whose connection failed.
fn reply_to(error: &DialError) -> Reply {
    match error {
        DialError::Resolve(_) => Reply::HostUnreachable,
        DialError::Version(_) => Reply::AddressNotSupported,
        DialError::Connect(_, error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Reply::Refused,
            io::ErrorKind::NetworkUnreachable => Reply::NetworkUnreachable,
            io::ErrorKind::HostUnreachable => Reply::HostUnreachable,
            io::ErrorKind::TimedOut => Reply::TtlExpired,
            io::ErrorKind::PermissionDenied => Reply::NotAllowed,
            _ => Reply::Failure,
        },
    }
}
