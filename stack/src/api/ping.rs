//! What `muslin ping` tells at its end.

use std::net::IpAddr;

use serde::Serialize;

/// What pings told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PingReport {
    /// The name of the node of the pod that pinged.
    pub node: String,
    /// The pod that pinged.
    pub from: String,
    /// What was pinged, as it was named.
    pub target: String,
    /// Its address.
    pub address: IpAddr,
    /// The hops on the way, the last of which is the target.
    pub way: Vec<PingedHop>,
    /// The longest packet that is answered, if that was looked for.
    pub path_mtu: Option<PathMtu>,
}

/// What pings told of one hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PingedHop {
    /// Who it is, in words.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// Echo requests that were sent there.
    pub sent: u64,
    /// How many of them were answered.
    pub answered: u64,
    /// The shortest round trip in microseconds, if one was answered.
    pub min_us: Option<u64>,
    /// The mean of the round trips in microseconds.
    pub mean_us: Option<u64>,
    /// The longest round trip in microseconds.
    pub max_us: Option<u64>,
    /// The standard deviation of the round trips in microseconds.
    pub deviation_us: Option<u64>,
}

/// The longest packet that gets through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PathMtu {
    /// The length of that IP packet in bytes.
    pub mtu_bytes: u16,
    /// Who limits it, in one sentence.
    pub limit: String,
}
