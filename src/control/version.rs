//! The version that clients and nodes tell each other.

use std::fmt::Display;

use muslin_stack::api::control::{PROTOCOL, Welcome};

/// The version of this program.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Why the node that listens `at` a socket and this program, by its name, do not understand each other.
pub(crate) fn mismatch(at: impl Display, node: &Welcome, this: &str) -> String {
    format!(
        "the node at {at} is muslin {} (control protocol {}), and this is {this} {VERSION} (control \
         protocol {PROTOCOL})",
        node.version, node.protocol
    )
}
