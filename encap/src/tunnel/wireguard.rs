//! WireGuard's messages: what is in front of and behind a packet, and public keys as text. Whoever
//! encrypts is elsewhere: here is only what everybody can see (the WireGuard paper, section 5.4).

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use thiserror::Error;

/// The default UDP port of flannel's `wireguard` backend.
pub const PORT: u16 = 51820;
/// The same of its second device, which carries IPv6.
pub const PORT_V6: u16 = 51821;

/// Bytes in front of what a data message carries: type, receiver and counter.
pub const HEADER_LEN: usize = 16;
/// Bytes behind it: the tag that authenticates it.
pub const TAG_LEN: usize = 16;
/// What is encrypted is padded to a multiple of this.
pub const PADDING: usize = 16;

/// Length in bytes of the data message that carries a packet of `len` bytes.
#[must_use]
pub const fn message_len(len: usize) -> usize {
    HEADER_LEN + len.next_multiple_of(PADDING) + TAG_LEN
}

/// What a datagram of WireGuard is, as far as its first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// The first message of a handshake.
    Initiation,
    /// The answer to it.
    Response,
    /// The answer of a node under load, which wants to know that the sender is where it says it is.
    CookieReply,
    /// An encrypted packet, or nothing encrypted: a keepalive.
    Data,
}

impl MessageKind {
    /// Reads the type of a message, whose length must be right for it; nothing if it is none.
    #[must_use]
    pub const fn of(datagram: &[u8]) -> Option<Self> {
        let [kind, 0, 0, 0, ..] = datagram else {
            return None;
        };
        match (*kind, datagram.len()) {
            (1, 148) => Some(Self::Initiation),
            (2, 92) => Some(Self::Response),
            (3, 64) => Some(Self::CookieReply),
            (4, HEADER_TAG_LEN..) => Some(Self::Data),
            _ => None,
        }
    }
}

const HEADER_TAG_LEN: usize = HEADER_LEN + TAG_LEN;

/// A node's public key: a point on Curve25519 (RFC 7748 section 6.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// A text is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a WireGuard key is 32 bytes in base64, 44 characters")]
pub struct InvalidKey;

impl FromStr for PublicKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        decode_key(text).map(Self)
    }
}

/// Reads any key of WireGuard's, which are all 32 bytes in base64.
///
/// # Errors
/// `InvalidKey` for what `wg` would not take either.
pub fn decode_key(text: &str) -> Result<[u8; 32], InvalidKey> {
    let mut key = [0; 32];
    // A decoder wants room for what 44 characters may stand for.
    let mut bytes = [0; 33];
    match BASE64_STANDARD.decode_slice(text, &mut bytes) {
        Ok(32) => key.copy_from_slice(&bytes[..32]),
        Ok(_) | Err(_) => return Err(InvalidKey),
    }
    bytes.fill(0);
    Ok(key)
}

/// The text of a key.
#[must_use]
pub fn encode_key(key: &[u8; 32]) -> String {
    BASE64_STANDARD.encode(key)
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&encode_key(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_by_type_and_length() {
        let message = |kind, len| {
            let mut bytes = vec![0; len];
            bytes[0] = kind;
            MessageKind::of(&bytes)
        };
        assert_eq!(message(1, 148), Some(MessageKind::Initiation));
        assert_eq!(message(2, 92), Some(MessageKind::Response));
        assert_eq!(message(3, 64), Some(MessageKind::CookieReply));
        assert_eq!(message(4, 32), Some(MessageKind::Data));
        assert_eq!(message(4, 1452), Some(MessageKind::Data));
        for (kind, len) in [(1, 147), (2, 148), (3, 65), (4, 31), (0, 32), (5, 32)] {
            assert_eq!(message(kind, len), None, "{kind} {len}");
        }
        // The bytes behind the type are reserved.
        assert_eq!(MessageKind::of(&[[4, 1], [0, 0]].concat().repeat(8)), None);
        assert_eq!(MessageKind::of(&[4, 0, 0]), None);
    }

    #[test]
    fn packets_are_padded() {
        assert_eq!([0, 1, 16, 1408].map(message_len), [32, 48, 48, 1440]);
    }

    #[test]
    fn keys_are_text_as_wg_writes_it() {
        let text = "mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc=";
        let key: PublicKey = text.parse().unwrap();
        assert_eq!(
            (key.to_string(), format!("{key:?}")),
            (text.into(), text.into())
        );
        assert_eq!(key.0[..2], [0x98, 0x39]);
        for wrong in [
            "",
            "mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc",
            "mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc= ",
            "mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDy==",
            "mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDycA",
            "mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyeAmDnq",
            "%DnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc=",
        ] {
            assert_eq!(wrong.parse::<PublicKey>(), Err(InvalidKey), "{wrong}");
        }
    }
}
