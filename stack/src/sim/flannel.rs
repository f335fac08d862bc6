//! What a node of flannel's knows of others, and its watch.

use std::collections::BTreeMap;

use crate::control::lease::Revision;

/// A node of flannel's.
#[derive(Debug)]
pub(super) struct Flannel {
    /// The key of its own record. It ends without that.
    pub(super) key: String,
    /// The records that it knows, by their keys.
    pub(super) known: BTreeMap<String, String>,
    pub(super) watch: Watch,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Watch {
    #[default]
    Closed,
    /// The first revision that it tells, and whether it is about to.
    Open(Revision, bool),
}
