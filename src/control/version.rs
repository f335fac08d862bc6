//! The version that clients and nodes tell each other.

/// The version of this program.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
