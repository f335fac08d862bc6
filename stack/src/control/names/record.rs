//! The records by which nodes publish the names of their pods.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::addresses::{Addresses, Nets};
use crate::control::ipam::{self, PodName};
use crate::control::kv::Entry;
use crate::control::lease::SubnetKey;

/// The longest record in bytes. Stores have limits too; etcd takes a request of 1.5 MiB.
pub const MAX_RECORD: usize = 512 * 1024;

/// What a node publishes: its pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The node's name.
    pub node: PodName,
    /// Its lease.
    pub subnet: Nets,
    /// Its pods.
    pub pods: Vec<PodRecord>,
    /// Whether it has stopped, and its lease waits for its return.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
}

/// A pod in a node's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Its name.
    pub name: PodName,
    /// Its addresses.
    pub address: Addresses,
}

/// Why a store's entry is not a node's record.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidNodeRecord {
    /// Its key does not name a subnet.
    #[error("its name is not a subnet")]
    Key,
    /// It is too long.
    #[error("its value has more than {MAX_RECORD} bytes")]
    TooLong,
    /// It is not a record.
    #[error("it is not a node's record: {0}")]
    Json(String),
    /// It is about another subnet than its key.
    #[error("it is about the subnet {0}")]
    OtherSubnet(Nets),
    /// It names an address that its node cannot give to a pod.
    #[error("{0} is not an address of a pod in its subnet")]
    Address(Addresses),
    /// It names an address twice.
    #[error("it lists the address {0} twice")]
    Twice(Addresses),
}

/// Where nodes publish their pods: beside flannel's keys, which begin with `PREFIX/subnets` and
/// `PREFIX/config`. With its final slash.
#[must_use]
pub fn names_prefix(prefix: &str) -> String {
    format!("{prefix}/muslin/pods/")
}

/// The key of the node that has a subnet.
#[must_use]
pub fn names_key(prefix: &str, subnet: impl Into<SubnetKey>) -> String {
    format!("{}{}", names_prefix(prefix), subnet.into())
}

/// The lease that a key names, if it is one of [`names_key`].
#[must_use]
pub fn named_subnet(prefix: &str, key: &str) -> Option<SubnetKey> {
    let text = key.strip_prefix(&names_prefix(prefix))?;
    let subnet = text.parse::<SubnetKey>().ok()?;
    // Two keys would be one node otherwise.
    let is_only = subnet.to_string() == text;
    is_only.then_some(subnet)
}

impl NodeRecord {
    /// Reads what a store has below [`names_prefix`].
    ///
    /// # Errors
    /// Why it counts for nothing.
    pub fn read(prefix: &str, entry: &Entry) -> Result<Self, InvalidNodeRecord> {
        let subnet = named_subnet(prefix, &entry.key).ok_or(InvalidNodeRecord::Key)?;
        if entry.value.len() > MAX_RECORD {
            return Err(InvalidNodeRecord::TooLong);
        }
        let record: Self = serde_json::from_str(&entry.value)
            .map_err(|error| InvalidNodeRecord::Json(error.to_string()))?;
        if record.subnet != subnet.nets() {
            return Err(InvalidNodeRecord::OtherSubnet(record.subnet));
        }
        let mut seen = BTreeSet::new();
        for PodRecord { address, .. } in &record.pods {
            if !is_pods(record.subnet, *address) {
                return Err(InvalidNodeRecord::Address(*address));
            }
            let mut all = address.iter::<IpAddr>();
            if !all.all(|address| seen.insert(address)) {
                return Err(InvalidNodeRecord::Twice(*address));
            }
        }
        Ok(record)
    }

    /// The record as JSON, and how many pods had to be left out for it to be short enough.
    #[must_use]
    pub fn to_json(&self) -> (String, usize) {
        let json = |record: &Self| serde_json::to_string(record).unwrap_or_default();
        let whole = json(self);
        if whole.len() <= MAX_RECORD {
            return (whole, 0);
        }
        let mut shorter = Self {
            pods: Vec::new(),
            ..self.clone()
        };
        let mut len = json(&shorter).len();
        for pod in &self.pods {
            let comma = usize::from(!shorter.pods.is_empty());
            len += serde_json::to_string(pod).unwrap_or_default().len() + comma;
            if len > MAX_RECORD {
                break;
            }
            shorter.pods.push(pod.clone());
        }
        let left_out = self.pods.len() - shorter.pods.len();
        (json(&shorter), left_out)
    }
}

/// Whether a node with this lease can give these addresses to a pod.
fn is_pods(lease: Nets, addresses: Addresses) -> bool {
    let mut all = addresses.iter::<IpAddr>();
    all.all(|address| ipam::is_pods(lease, address))
}
