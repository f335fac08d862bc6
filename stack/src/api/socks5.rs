//! SOCKS5's messages (RFC 1928, RFC 1929), as bytes.
//!
//! Each is read from the beginning of what has come so far: a message and its length, nothing yet,
//! or what is wrong with it. None is longer than [`MAX_LEN`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use thiserror::Error;

/// The longest message in bytes: a user's name and password.
pub const MAX_LEN: usize = 3 + 255 + 255;

const VERSION: u8 = 5;
/// Of the negotiation of name and password.
const AUTH_VERSION: u8 = 1;
/// No authentication.
pub const NO_AUTH: u8 = 0;
/// Name and password (RFC 1929).
pub const PASSWORD: u8 = 2;
/// None of the methods is acceptable.
pub const NO_METHOD: u8 = 0xff;

/// What is wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Fault {
    /// Another protocol, or version 4.
    #[error("it is version {0}, not SOCKS5")]
    Version(u8),
    /// No methods, or an empty name.
    #[error("a length of zero")]
    Empty,
    /// What must be zero.
    #[error("a reserved byte that is not zero")]
    Reserved,
    /// None of RFC 1928.
    #[error("the unknown command {0}")]
    Command(u8),
    /// None of RFC 1928.
    #[error("the unknown address type {0}")]
    AddressType(u8),
    /// No host name.
    #[error("an invalid host name")]
    Name,
    /// A part of a datagram.
    #[error("a fragment of a datagram")]
    Fragment,
}

/// A message and its length in bytes, or nothing as long as it is not all here.
pub type Parsed<T> = Result<Option<(T, usize)>, Fault>;

/// What a client wants to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// An address.
    Ip(IpAddr),
    /// A name, of letters, digits, dots, hyphens and underscores.
    Name(String),
}

/// A host and a port there.
pub type Target = (Host, u16);

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// A connection.
    Connect,
    /// A port to be connected to.
    Bind,
    /// A relay for datagrams.
    UdpAssociate,
}

/// How a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Reply {
    /// It is done.
    Succeeded = 0,
    /// Something else is wrong.
    Failure = 1,
    /// A rule forbids it.
    NotAllowed = 2,
    /// There is no way there.
    NetworkUnreachable = 3,
    /// The host does not answer, or there is none of that name.
    HostUnreachable = 4,
    /// Nobody listens there.
    Refused = 5,
    /// Nobody answers.
    TtlExpired = 6,
    /// No such command here.
    CommandNotSupported = 7,
    /// No such addresses here.
    AddressNotSupported = 8,
}

/// Reads the methods that a client offers.
///
/// # Errors
/// What is wrong.
pub fn greeting(bytes: &[u8]) -> Parsed<&[u8]> {
    let Some(&version) = bytes.first() else {
        return Ok(None);
    };
    if version != VERSION {
        return Err(Fault::Version(version));
    }
    let Some(&count) = bytes.get(1) else {
        return Ok(None);
    };
    if count == 0 {
        return Err(Fault::Empty);
    }
    let end = 2 + usize::from(count);
    Ok(bytes.get(2..end).map(|methods| (methods, end)))
}

/// Reads a name and a password.
///
/// # Errors
/// What is wrong.
pub fn credentials(bytes: &[u8]) -> Parsed<(&[u8], &[u8])> {
    let Some(&version) = bytes.first() else {
        return Ok(None);
    };
    if version != AUTH_VERSION {
        return Err(Fault::Version(version));
    }
    let part = |at: usize| -> Result<Option<(&[u8], usize)>, Fault> {
        let Some(&len) = bytes.get(at) else {
            return Ok(None);
        };
        if len == 0 {
            return Err(Fault::Empty);
        }
        let end = at + 1 + usize::from(len);
        Ok(bytes.get(at + 1..end).map(|part| (part, end)))
    };
    let Some((name, end)) = part(1)? else {
        return Ok(None);
    };
    Ok(part(end)?.map(|(password, end)| ((name, password), end)))
}

/// Reads a request.
///
/// # Errors
/// What is wrong.
pub fn request(bytes: &[u8]) -> Parsed<(Command, Target)> {
    let Some(&version) = bytes.first() else {
        return Ok(None);
    };
    if version != VERSION {
        return Err(Fault::Version(version));
    }
    let Some(&[_, command, reserved]) = bytes.first_chunk() else {
        return Ok(None);
    };
    let command = match command {
        1 => Command::Connect,
        2 => Command::Bind,
        3 => Command::UdpAssociate,
        other => return Err(Fault::Command(other)),
    };
    if reserved != 0 {
        return Err(Fault::Reserved);
    }
    let target = target(bytes, 3)?;
    Ok(target.map(|(target, end)| ((command, target), end)))
}

/// Reads the header of a datagram, which is all here.
///
/// # Errors
/// What is wrong.
pub fn datagram(bytes: &[u8]) -> Parsed<Target> {
    let Some(&[one, other, fragment]) = bytes.first_chunk() else {
        return Ok(None);
    };
    if (one, other) != (0, 0) {
        return Err(Fault::Reserved);
    }
    if fragment != 0 {
        return Err(Fault::Fragment);
    }
    target(bytes, 3)
}

/// The answer to a greeting: the chosen method.
#[must_use]
pub const fn method(chosen: u8) -> [u8; 2] {
    [VERSION, chosen]
}

/// The answer to a name and a password.
#[must_use]
pub const fn authenticated(is_right: bool) -> [u8; 2] {
    [AUTH_VERSION, !is_right as u8]
}

/// The answer to a request, with the address it is done by.
#[must_use]
pub fn reply(reply: Reply, by: SocketAddr) -> Vec<u8> {
    addressed([VERSION, reply as u8, 0], by)
}

/// What is in front of a datagram that came from `from`.
#[must_use]
pub fn datagram_header(from: SocketAddr) -> Vec<u8> {
    addressed([0; 3], from)
}

fn addressed(head: [u8; 3], address: SocketAddr) -> Vec<u8> {
    let mut bytes = head.to_vec();
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes.push(1);
            bytes.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes.push(4);
            bytes.extend(ip.octets());
        }
    }
    bytes.extend(address.port().to_be_bytes());
    bytes
}

/// Reads a host and a port that begin at `at`.
fn target(bytes: &[u8], at: usize) -> Parsed<Target> {
    let Some((&kind, rest)) = bytes.get(at..).and_then(<[u8]>::split_first) else {
        return Ok(None);
    };
    let (host, len) = match kind {
        1 => match rest.first_chunk::<4>() {
            Some(&address) => (Host::Ip(Ipv4Addr::from(address).into()), 4),
            None => return Ok(None),
        },
        4 => match rest.first_chunk::<16>() {
            Some(&address) => (Host::Ip(Ipv6Addr::from(address).into()), 16),
            None => return Ok(None),
        },
        3 => {
            let Some((&len, name)) = rest.split_first() else {
                return Ok(None);
            };
            if len == 0 {
                return Err(Fault::Empty);
            }
            match name.get(..len.into()) {
                Some(name) => (host_name(name)?, 1 + usize::from(len)),
                None => return Ok(None),
            }
        }
        other => return Err(Fault::AddressType(other)),
    };
    let port = rest.get(len..).and_then(<[u8]>::first_chunk::<2>);
    Ok(port.map(|port| ((host, u16::from_be_bytes(*port)), at + 1 + len + 2)))
}

/// A host's name, or its address written as one.
///
/// # Errors
/// `Name` if it is neither.
pub fn host_name(name: &[u8]) -> Result<Host, Fault> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b".-_".contains(byte);
    let text = std::str::from_utf8(name).map_err(|_| Fault::Name)?;
    if let Ok(address) = text.parse() {
        return Ok(Host::Ip(address));
    }
    // RFC 1035 section 2.3.4: names have up to 253 letters, their labels up to 63.
    let labels = text.strip_suffix('.').unwrap_or(text).split('.');
    let mut fits = labels.map(|label| (1..=63).contains(&label.len()));
    if name.iter().all(plain) && name.len() <= 254 && fits.all(|fits| fits) {
        Ok(Host::Name(text.to_ascii_lowercase()))
    } else {
        Err(Fault::Name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message is read when it is whole, not before, and whatever follows.
    #[track_caller]
    fn whole<T: PartialEq + std::fmt::Debug>(
        parse: impl Fn(&[u8]) -> Parsed<T>,
        message: &[u8],
        expected: &T,
    ) {
        for len in 0..message.len() {
            assert_eq!(parse(&message[..len]), Ok(None), "{len} bytes");
        }
        let more = [message, b"more"].concat();
        for bytes in [message, &more] {
            let (read, len) = parse(bytes).unwrap().unwrap();
            assert_eq!((&read, len), (expected, message.len()));
        }
    }

    #[test]
    fn messages_are_read_when_they_are_whole() {
        let greeted = greeting(&[5, 2, 0, 2, 9]).unwrap().unwrap();
        assert_eq!(greeted, (&[0, 2][..], 4));
        assert_eq!(greeting(&[5, 2, 0]), Ok(None));
        let told = credentials(b"\x01\x02me\x03owl!").unwrap().unwrap();
        assert_eq!(told, ((&b"me"[..], &b"owl"[..]), 8));
        assert_eq!(credentials(b"\x01\x02me\x03ow"), Ok(None));
        let address = Host::Ip(Ipv4Addr::new(10, 244, 1, 2).into());
        whole(
            request,
            &[5, 1, 0, 1, 10, 244, 1, 2, 0, 80],
            &(Command::Connect, (address.clone(), 80)),
        );
        let name = (Host::Name("web.muslin".to_owned()), 0x1234);
        whole(
            request,
            b"\x05\x03\x00\x03\x0aWeb.muslin\x12\x34",
            &(Command::UdpAssociate, name),
        );
        let six = [&[5, 2, 0, 4][..], &[0; 15], &[1, 0, 9]].concat();
        let local = Host::Ip(Ipv6Addr::LOCALHOST.into());
        whole(request, &six, &(Command::Bind, (local, 9)));
        whole(
            datagram,
            &[0, 0, 0, 1, 10, 244, 1, 2, 0, 53],
            &(address, 53),
        );
    }

    #[test]
    fn addresses_may_be_written_as_names() {
        assert_eq!(host_name(b"10.1.2.3"), Ok(Host::Ip([10, 1, 2, 3].into())));
        assert_eq!(host_name(b"A.b"), Ok(Host::Name("a.b".to_owned())));
        let long = [b'x'; 64];
        for bad in [&b""[..], b".", b"a..b", b"a b", b"a\0", b"\xff", &long] {
            assert_eq!(host_name(bad), Err(Fault::Name), "{bad:x?}");
        }
    }

    #[test]
    fn garbage_is_refused_with_a_reason() {
        for (bytes, fault) in [
            (&b"GET / HTTP/1.1"[..], Fault::Version(b'G')),
            (&[4, 1, 0, 80], Fault::Version(4)),
            (&[5, 0], Fault::Empty),
        ] {
            assert_eq!(greeting(bytes), Err(fault));
        }
        for (bytes, fault) in [
            (&[4, 1, 0][..], Fault::Version(4)),
            (&[5, 9, 0], Fault::Command(9)),
            (&[5, 1, 1], Fault::Reserved),
            (&[5, 1, 0, 2], Fault::AddressType(2)),
            (&[5, 1, 0, 3, 0], Fault::Empty),
            (&[5, 1, 0, 3, 1, b'/', 0, 80], Fault::Name),
        ] {
            assert_eq!(request(bytes), Err(fault));
        }
        assert_eq!(credentials(&[5, 1]), Err(Fault::Version(5)));
        assert_eq!(credentials(&[1, 0]), Err(Fault::Empty));
        assert_eq!(datagram(&[0, 0, 1, 1]), Err(Fault::Fragment));
        assert_eq!(datagram(&[0, 1, 0, 1]), Err(Fault::Reserved));
    }

    #[test]
    fn answers_are_as_the_protocol_has_them() {
        let by = SocketAddr::from(([1, 2, 3, 4], 0x506));
        let bytes = reply(Reply::Refused, by);
        assert_eq!(bytes, [5, 5, 0, 1, 1, 2, 3, 4, 5, 6]);
        let from = SocketAddr::from((Ipv6Addr::LOCALHOST, 0x506));
        let header = datagram_header(from);
        assert_eq!(header[..4], [0, 0, 0, 4]);
        let read = datagram(&header).unwrap();
        assert_eq!(read, Some(((Host::Ip(from.ip()), 0x506), header.len())));
        assert_eq!((method(NO_METHOD), authenticated(true)), ([5, 255], [1, 0]));
        assert_eq!(authenticated(false), [1, 1]);
    }
}
