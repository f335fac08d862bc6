//! What a store has, as rows for people.

use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;
use muslin_stack::lease::{
    Entry, LeaseRecord, NetworkConfig, SubnetKey, lease_prefix, read_entry, read_peer,
};
use muslin_stack::peer::{Peer, PeerId};
use tokio::time::timeout;

use super::store::Store;
use crate::control::protocol::Lease;
use crate::error::{Error, Result};

/// How long a store may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whose eyes see the table.
#[derive(Debug, Clone, Copy)]
pub struct Viewer<'a> {
    /// Where the store has flannel's keys.
    pub prefix: &'a str,
    /// The node's network.
    pub config: &'a NetworkConfig,
    /// The node's own lease.
    pub subnet: Ipv4Net,
    /// Where the node's tunnel ends.
    pub public_ip: Ipv4Addr,
}

/// Reads all leases as they are now.
///
/// # Errors
/// If the store does not answer.
pub async fn read(store: &dyn Store, viewer: Viewer<'_>) -> Result<Vec<Lease>> {
    let prefix = lease_prefix(viewer.prefix);
    let reason = match timeout(PATIENCE, store.survey(&prefix)).await {
        Ok(Ok(entries)) => return Ok(rows(&entries, viewer)),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
    };
    let store = store.describe();
    Err(Error::failed(format!(
        "the lease store {store} is away: {reason}"
    )))
}

/// One row for each key below the leases' prefix, whether it is a lease or not.
fn rows(entries: &[Entry], viewer: Viewer<'_>) -> Vec<Lease> {
    entries.iter().map(|entry| row(entry, viewer)).collect()
}

fn row(entry: &Entry, viewer: Viewer<'_>) -> Lease {
    let mut row = Lease {
        key: key_text(&entry.key, viewer.prefix),
        subnet: None,
        public_ip: None,
        backend: None,
        vtep_mac: None,
        owner: "nobody".to_owned(),
        seconds_left: entry.ttl.map(|ttl| ttl.as_secs()),
        state: String::new(),
    };
    match read_entry(viewer.prefix, entry) {
        Err(reason) => {
            row.subnet = reason.subnet.map(|key| key.ipv4);
            row.state = reason.reason;
        }
        Ok((key, record)) => {
            row.subnet = Some(key.ipv4);
            row.owner = owner(key, &record, entry.ttl.is_none(), viewer).to_owned();
            row.state = state(entry, key, &record, viewer);
            row.public_ip = Some(record.public_ip);
            row.backend = Some(record.backend().to_owned());
            row.vtep_mac = record.vtep_mac().map(|mac| mac.to_string());
        }
    }
    row
}

fn owner(
    key: SubnetKey,
    record: &LeaseRecord,
    is_reservation: bool,
    viewer: Viewer<'_>,
) -> &'static str {
    let is_here = record.public_ip == viewer.public_ip;
    match (key.ipv4 == viewer.subnet && is_here, is_reservation) {
        (true, false) => "this node",
        (true, true) => "this node, reservation",
        (false, true) => "reservation",
        (false, false) if is_here => "this node's address",
        (false, false) => "another node",
    }
}

/// `ok`, or why nothing can be sent there.
fn state(entry: &Entry, key: SubnetKey, record: &LeaseRecord, viewer: Viewer<'_>) -> String {
    if key.ipv4 == viewer.subnet && record.public_ip == viewer.public_ip {
        return "ok".to_owned();
    }
    let network = Some(viewer.config.network);
    if let Err(reason) = read_peer(viewer.prefix, entry, network) {
        return reason.reason;
    }
    match Peer::from_lease(PeerId(0), key, record, &viewer.config.backend) {
        Ok(_) => "ok".to_owned(),
        Err(unusable) => unusable.to_string(),
    }
}

/// A key without the prefix that all have, and not longer than a line.
fn key_text(key: &str, prefix: &str) -> String {
    const MAX: usize = 80;
    let prefix = lease_prefix(prefix);
    let text = key.strip_prefix(&prefix).unwrap_or(key);
    let text = text.strip_prefix('/').unwrap_or(text);
    let plain: String = text.chars().flat_map(char::escape_debug).collect();
    match plain.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}...", &plain[..end]),
        None => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str, ttl: Option<u64>) -> Entry {
        Entry {
            key: format!("/n/subnets{key}"),
            value: value.to_owned(),
            revision: 1,
            ttl: ttl.map(Duration::from_secs),
        }
    }

    fn vxlan(ip: &str, mac: &str) -> String {
        format!(
            r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    }

    #[test]
    fn every_key_is_a_row_that_says_what_it_is() {
        let config = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let config = NetworkConfig::parse(config).unwrap();
        let viewer = Viewer {
            prefix: "/n",
            config: &config,
            subnet: "10.3.1.0/24".parse().unwrap(),
            public_ip: [192, 168, 0, 1].into(),
        };
        let one = vxlan("192.168.0.1", "02:00:00:00:00:01");
        let two = vxlan("192.168.0.2", "02:00:00:00:00:02");
        let cases = [
            (entry("/10.3.1.0-24", &one, Some(86_000)), "this node", "ok"),
            (entry("/10.3.2.0-24", &two, Some(7)), "another node", "ok"),
            (entry("/10.3.3.0-24", &two, None), "reservation", "ok"),
            (
                entry("/10.3.4.0-24", &one, Some(1)),
                "this node's address",
                "ok",
            ),
            (
                entry("/10.3.5.0-24", r#"{"PublicIP":"192.168.0.5"}"#, Some(1)),
                "another node",
                "udp",
            ),
            (
                entry("/10.3.6.0-24", &vxlan("192.168.0.6", ""), Some(1)),
                "another node",
                "MAC",
            ),
            (
                entry("/10.9.7.0-24", &two, Some(1)),
                "another node",
                "not in the network",
            ),
            (
                entry("/10.3.8.0-24", r#"{"PublicIP":"0.0.0.0"}"#, Some(1)),
                "another node",
                "no node can have",
            ),
            (
                entry("/10.3.9.0-24", "rubbish", None),
                "nobody",
                "not a JSON object",
            ),
            (entry("/x\u{1b}[2Jy", "{}", None), "nobody", "not a subnet"),
            (entry("-and-more", "{}", None), "nobody", "not a subnet"),
        ];
        let entries: Vec<_> = cases.iter().map(|(entry, ..)| entry.clone()).collect();
        let rows = rows(&entries, viewer);
        for (row, (entry, owner, state)) in rows.iter().zip(&cases) {
            assert_eq!(row.owner, *owner, "{entry:?}");
            assert!(row.state.contains(state), "{row:?}");
            assert_eq!(row.seconds_left, entry.ttl.map(|ttl| ttl.as_secs()));
        }
        assert_eq!(rows.len(), cases.len());
        assert_eq!(rows[8].subnet, "10.3.9.0/24".parse().ok());
        assert!(!rows[9].key.contains('\u{1b}'), "{:?}", rows[9].key);
        assert_eq!(rows[10].key, "-and-more");
    }
}
