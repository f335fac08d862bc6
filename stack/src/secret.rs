//! Keys that nobody may see: they are wiped when they are dropped, and no log shows them.

use std::fmt;
use std::str::FromStr;

use muslin_encap::tunnel::wireguard::{InvalidKey, decode_key, encode_key};
use zeroize::{Zeroize, Zeroizing};

/// 32 secret bytes: a private or a preshared key of WireGuard's.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The text that files and configurations have.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(encode_key(&self.0))
    }
}

impl From<[u8; 32]> for Secret {
    fn from(mut bytes: [u8; 32]) -> Self {
        let secret = Self(Zeroizing::new(bytes));
        bytes.zeroize();
        secret
    }
}

impl FromStr for Secret {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        decode_key(text).map(Self::from)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_text_only_where_that_is_asked_for() {
        let text = "YAnPbJtvTdgwXSCVnkHbAvVRzp0BvgzkVDZ7jNFhPFY=";
        let secret: Secret = text.parse().unwrap();
        assert_eq!(*secret.to_text(), text);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert!("YAnP".parse::<Secret>().is_err());
    }
}
