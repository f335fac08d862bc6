//! WireGuard: keys and sessions of peers, beside a data path whose tunnel is one.

use muslin_encap::tunnel::wireguard::PublicKey;
use sanstun::StaticSecret;
use zeroize::Zeroizing;

use crate::secret::Secret;

/// The public key of a private one (RFC 7748 section 6.1).
#[must_use]
pub fn public_key(private: &Secret) -> PublicKey {
    PublicKey(sanstun::PublicKey::from(&secret(private)).to_bytes())
}

fn secret(private: &Secret) -> StaticSecret {
    StaticSecret::from(Zeroizing::new(*private.bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of RFC 7748 section 6.1, in base64.
    #[test]
    fn a_private_key_has_one_public_key() {
        let private = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        let public = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        assert_eq!(
            public_key(&private.parse().unwrap()),
            public.parse().unwrap()
        );
    }
}
