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
//!     Action, Answer, Change, Entry, Identity, Manager, Op, OwnChange, ManagerSettings, WantedConfig,
//! };
//!
//! let identity = Identity {
//!     public_ip: [192, 168, 0, 11].into(),
//!     public_ipv6: None,
//!     vtep_mac: VtepMac::from_random([1, 2, 3, 4, 5, 6]),
//!     public_key: None,
//! };
//! let prefix = "/coreos.com/network".to_owned();
//! let seed = 7; // Random, in earnest: nodes that begin together must not choose alike.
//! let mut manager = Manager::new(ManagerSettings::new(identity, prefix, WantedConfig::Any, seed));
//! // A store that has a network's configuration and no lease.
//! let now = Instant::ZERO;
//! let mut written = Vec::new();
//! while let Action::Store(op) = manager.poll(now) {
//!     let answer = match op {
//!         Op::Get(key) => Answer::Value(Some(Entry {
//!             key,
//!             value: r#"{"Network": "10.244.0.0/16"}"#.to_owned(),
//!             revision: 1,
//!             created: 0,
//!             ttl: None,
//!         })),
//!         Op::List(_) => Answer::Snapshot { revision: 1, entries: Vec::new() },
//!         Op::Claim { key, .. } => {
//!             written.push(key);
//!             Answer::Done(2)
//!         }
//!         other => panic!("nothing is to be replaced: {other}"),
//!     };
//!     manager.answer(now, answer);
//! }
//! let acquired = manager.changes().find_map(|change| match change {
//!     Change::Own(OwnChange::Acquired(key)) => Some(key),
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
mod settings;
mod shares;
mod standing;
mod text;

pub use change::{Change, ConfigFault, Contested, Loss, OwnChange};
pub use config::{
    Backend, Ipv6Range, NetworkConfig, NetworkConfigError, TunnelPorts, VxlanOptions,
    WireGuardMode, WireGuardOptions,
};
pub use key::{InvalidSubnetKey, SubnetKey, overlap};
pub use manager::Manager;
pub use reader::{NoLease, check_peer, ipv6_fault, lease_prefix, read_entry, read_peer};
pub use record::{InvalidRecord, LeaseRecord, TunnelEnd, WireGuardData};
pub use settings::{
    Identity, LEASE_TTL, ManagerSettings, RENEW_MARGIN, WantedConfig, is_public_ipv6, vtep_mac_v6,
};
pub use shares::Shares;
pub use standing::{Signs, Standing};

pub use crate::control::kv::{Action, Answer, Entry, Op, Revision, WatchEvent};
