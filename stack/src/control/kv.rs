//! The key-value store of a cluster, as the machines of the control plane know it: etcd's semantics,
//! which a local database or a simulation can have as well.

use std::fmt;
use std::time::Duration;

use smoltcp::time::Instant;

/// A point in a store's history; every change makes a larger one.
pub type Revision = i64;

/// A key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The whole key.
    pub key: String,
    /// The value, JSON text.
    pub value: String,
    /// When it was last written.
    pub revision: Revision,
    /// When it was created; 0 where the store does not know.
    pub created: Revision,
    /// How long it lives still; `None` if it does not expire.
    pub ttl: Option<Duration>,
}

/// What a store is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Read one key. Answered by `Value`.
    Get(String),
    /// Read all keys that begin with a prefix. Answered by `Snapshot`.
    List(String),
    /// Write a key that does not exist. Answered by `Done` or `Conflict`.
    Create {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// How long it lives; `None` for ever.
        ttl: Option<Duration>,
    },
    /// Write a key that does not exist, if no key that begins with `prefix` was written behind the
    /// revision `seen`: what a list of that revision lacks is not there. A key that it replaces is
    /// deleted in the same step, before it is written. Answered by `Done` or `Conflict`.
    Claim {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// How long it lives; `None` for ever.
        ttl: Option<Duration>,
        /// What must not have changed.
        prefix: String,
        /// The last revision that is known of that.
        seen: Revision,
        /// A key that it replaces, and the revision that this must have.
        replaces: Option<(String, Revision)>,
    },
    /// Write a key that was last written at `expected`. Answered by `Done` or `Conflict`.
    CompareAndPut {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// The revision it must have.
        expected: Revision,
        /// How long it lives from now; `None` for ever.
        ttl: Option<Duration>,
    },
    /// Delete a key that was last written at `expected`. Answered by `Done` or `Conflict`.
    CompareAndDelete {
        /// The key.
        key: String,
        /// The revision it must have.
        expected: Revision,
    },
}

/// What a store answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The key, if it exists.
    Value(Option<Entry>),
    /// All keys, in order.
    Snapshot {
        /// The store's revision.
        revision: Revision,
        /// The keys.
        entries: Vec<Entry>,
    },
    /// It is done, and the store has this revision now.
    Done(Revision),
    /// The key was not as the operation required.
    Conflict,
}

impl fmt::Display for Op {
    /// What is done to which key, without the value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Get(key) => write!(f, "get {key}"),
            Self::List(prefix) => write!(f, "list {prefix}"),
            Self::Create { key, .. } => write!(f, "create {key}"),
            Self::Claim {
                key,
                replaces: Some((old, _)),
                ..
            } => write!(f, "create {key} in the place of {old}"),
            Self::Claim { key, seen, .. } => write!(f, "create {key} after revision {seen}"),
            Self::CompareAndPut { key, expected, .. } => {
                write!(f, "put {key} over revision {expected}")
            }
            Self::CompareAndDelete { key, expected } => {
                write!(f, "delete {key} at revision {expected}")
            }
        }
    }
}

impl fmt::Display for Answer {
    /// What came of an operation, without values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(Some(entry)) => write!(f, "it is of revision {}", entry.revision),
            Self::Value(None) => f.write_str("it is not there"),
            Self::Snapshot { revision, entries } => {
                write!(f, "{} of revision {revision}", entries.len())
            }
            Self::Done(revision) => write!(f, "done, revision {revision}"),
            Self::Conflict => f.write_str("it is not as expected"),
        }
    }
}

/// A change that a store reports to those who watch it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// A key was written.
    Put(Entry),
    /// A key was deleted or has expired.
    Delete {
        /// The key.
        key: String,
        /// When.
        revision: Revision,
    },
}

impl fmt::Display for WatchEvent {
    /// What happened to which key, without its value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put(entry) => write!(f, "{} is written, revision {}", entry.key, entry.revision),
            Self::Delete { key, revision } => write!(f, "{key} is gone, revision {revision}"),
        }
    }
}

/// What the caller is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Execute this on the store and give the answer, or the error. A watch may stay open
    /// meanwhile, but not during a list: after that it is reopened.
    Store(Op),
    /// Watch all keys below the prefix from this revision on, until it is due to poll
    /// again. A watch that is open goes on.
    Watch {
        /// The first revision not seen yet.
        from: Revision,
        /// When to poll again at the latest.
        until: Instant,
    },
    /// Wait before the next operation.
    Wait {
        /// Until when.
        until: Instant,
    },
    /// Nothing more will happen.
    Stop,
}
