//! Leases: which node has which subnet, in flannel's own records, and the rules of having one.
//!
//! [`Manager`] is a state machine: answers of a key-value store, its watch events and the time go
//! in; operations for the store and changes of the tables come out. The shell executes the
//! operations, and the store can be etcd, a local database or a simulation.
//!
//! ```
//! use muslin_encap::tunnel::vxlan::VtepMac;
//! use muslin_stack::Instant;
//! use muslin_stack::control::lease::{
//!     Action, Answer, Change, Entry, Identity, Manager, Op, Settings, WantedConfig,
//! };
//!
//! let identity = Identity {
//!     public_ip: [192, 168, 0, 11].into(),
//!     vtep_mac: VtepMac::from_random([1, 2, 3, 4, 5, 6]),
//! };
//! let prefix = "/coreos.com/network".to_owned();
//! let seed = 7; // Random, in earnest: nodes that begin together must not choose alike.
//! let mut manager = Manager::new(Settings::new(identity, prefix, WantedConfig::Any, seed));
//! // A store that has a network's configuration and no lease.
//! let now = Instant::ZERO;
//! let mut written = Vec::new();
//! while let Action::Store(op) = manager.poll(now) {
//!     let answer = match op {
//!         Op::Get(key) => Answer::Value(Some(Entry {
//!             key,
//!             value: r#"{"Network": "10.244.0.0/16"}"#.to_owned(),
//!             revision: 1,
//!             ttl: None,
//!         })),
//!         Op::List(_) => Answer::Snapshot { revision: 1, entries: Vec::new() },
//!         Op::Create { key, .. } => {
//!             written.push(key);
//!             Answer::Done(2)
//!         }
//!         other => panic!("nothing is to be replaced: {other}"),
//!     };
//!     manager.answer(now, answer);
//! }
//! let acquired = manager.changes().find_map(|change| match change {
//!     Change::Acquired(key) => Some(key),
//!     _ => None,
//! });
//! let key = acquired.expect("the store has room");
//! assert_eq!(written, [format!("/coreos.com/network/subnets/{key}")]);
//! ```

mod change;
mod config;
mod key;
mod manager;
mod reader;
mod record;
mod repetition;
mod shares;
mod standing;

use std::fmt;
use std::time::Duration;

pub use change::{Change, ConfigFault, Loss};
pub use config::{Backend, ConfigError, NetworkConfig, VxlanOptions};
pub use key::{InvalidSubnetKey, SubnetKey};
pub use manager::{
    Action, Identity, LEASE_TTL, Manager, RENEW_MARGIN, Settings, WantedConfig, overlap,
};
pub use reader::{NoLease, check_peer, lease_prefix, read_entry, read_peer};
pub use record::{InvalidRecord, LeaseRecord};
pub use shares::Shares;
pub use standing::{Signs, Standing};

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

/// The longest foreign text that a message repeats, in characters.
const MAX_SHOWN: usize = 120;

/// Foreign text for a message: a store's values can be megabytes.
fn shorten(text: &impl ToString) -> String {
    let text = text.to_string();
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
