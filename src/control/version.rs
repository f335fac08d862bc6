//! The version that clients and nodes tell each other.

/// The version of this program.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");
