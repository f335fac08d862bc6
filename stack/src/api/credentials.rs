//! What clients of the proxies have to tell.

/// Name and password that clients have to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The name.
    pub user: String,
    /// The password.
    pub password: String,
}

impl Credentials {
    /// Whether a client told these, in a time that does not tell how much of them is right.
    #[must_use]
    pub fn are(&self, user: &[u8], password: &[u8]) -> bool {
        is_same(self.user.as_bytes(), user) & is_same(self.password.as_bytes(), password)
    }
}

/// Whether a client told a secret, in a time that does not tell how much of it is right.
#[must_use]
pub fn is_same(ours: &[u8], theirs: &[u8]) -> bool {
    let differs = ours.iter().zip(theirs).fold(0, |all, (a, b)| all | (a ^ b));
    ours.len() == theirs.len() && differs == 0
}
