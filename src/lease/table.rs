//! What a store has, as rows for people.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use muslin_stack::addresses::Addresses;
use muslin_stack::api::control::Lease;
use muslin_stack::control::lease::{
    Entry, LeaseRecord, NetworkConfig, NoLease, Shares, Signs, Standing, SubnetKey, check_peer,
    lease_prefix, read_entry,
};
use muslin_stack::control::peers::{Here, peer_of_ipv6, peer_of_lease};
use muslin_stack::datapath::peer::PeerId;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::store::Store;
use crate::terminal::text::plain;

/// How long a store may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whose eyes see the table.
#[derive(Clone, Copy)]
pub struct Viewer<'a> {
    /// Where the store has flannel's keys.
    pub prefix: &'a str,
    /// The node's network.
    pub config: &'a NetworkConfig,
    /// The node's name.
    pub node: &'a str,
    /// The node's own lease.
    pub own: SubnetKey,
    /// Where the node's tunnel ends.
    pub public: Addresses,
    /// What it knows of itself.
    pub here: Here,
    /// What it knows of the node that has another lease.
    pub known: &'a (dyn Fn(IpNet) -> Known + Sync),
}

impl Viewer<'_> {
    /// Whether a record names the node's own address.
    fn is_here(&self, record: &LeaseRecord) -> bool {
        match record.node_address() {
            IpAddr::V4(address) => self.public.ipv4() == Some(address),
            IpAddr::V6(address) => self.public.ipv6() == Some(address),
        }
    }
}

/// What a node knows of another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Its name.
    pub node: Option<String>,
    /// Signs of its life; `None` if it is not a peer.
    pub signs: Option<Signs>,
}

/// Reads all keys below the leases' prefix as they are now.
///
/// # Errors
/// If the store does not answer.
pub async fn survey(store: &dyn Store, prefix: &str) -> Result<Vec<Entry>> {
    let prefix = lease_prefix(prefix);
    let reason = match timeout(PATIENCE, store.survey(&prefix)).await {
        Ok(Ok(entries)) => return Ok(entries),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
    };
    let store = store.describe();
    Err(Error::failed(format!(
        "the lease store {store} is unreachable: {reason}"
    )))
}

/// One row for each key below the leases' prefix, whether it is a lease or not.
#[must_use]
pub fn rows(entries: &[Entry], viewer: Viewer<'_>) -> Vec<Lease> {
    let mut shares = Shares::default();
    let read = |entry| (entry, read_entry(viewer.prefix, entry));
    let read: Vec<(&Entry, _)> = entries.iter().map(read).collect();
    let peers = read.iter().filter_map(|(_, read)| {
        let (key, record) = read.as_ref().ok()?;
        check_peer(*key, record, Some(viewer.config)).ok()?;
        let address = record.node_address();
        (!viewer.is_here(record)).then_some((address, *key))
    });
    let peers: Vec<_> = peers.collect();
    for (address, key) in &peers {
        shares.add(*address, *key);
    }
    let excess = peers
        .iter()
        .filter(|(address, key)| !shares.counts(*address, *key));
    let excess: HashMap<_, _> = excess
        .map(|(address, key)| (key.nets(), *address))
        .collect();
    let rows = read
        .into_iter()
        .map(|(entry, read)| row(entry, read, viewer));
    let mut rows: Vec<_> = rows.collect();
    for row in &mut rows {
        let address = row.subnet.and_then(|subnet| excess.get(&subnet));
        let is_its = |address: &IpAddr| {
            let mut all = row.public_ip.iter().flat_map(Addresses::iter::<IpAddr>);
            all.any(|it| it == *address)
        };
        if let Some(address) = address.filter(|address| is_its(address)) {
            row.state = Shares::excess(*address);
        }
    }
    rows
}

pub(super) fn row(
    entry: &Entry,
    read: std::result::Result<(SubnetKey, LeaseRecord), NoLease>,
    viewer: Viewer<'_>,
) -> Lease {
    let mut row = Lease {
        key: key_text(&entry.key, viewer.prefix),
        subnet: None,
        node: None,
        public_ip: None,
        backend: None,
        vtep_mac: None,
        public_key: None,
        owner: "nobody".to_owned(),
        seconds_left: entry.ttl.map(|ttl| ttl.as_secs()),
        heard_seconds: None,
        state: String::new(),
    };
    match read {
        Err(reason) => {
            row.subnet = reason.subnet.map(|key| key.nets());
            row.state = reason.reason;
        }
        Ok((key, record)) => {
            row.subnet = Some(key.nets());
            row.owner = owner(key, &record, entry.ttl.is_none(), viewer).to_owned();
            row.public_ip = Some(record.addresses());
            row.backend = Some(record.backend().to_owned());
            row.vtep_mac = record.first_vtep_mac().map(|mac| mac.to_string());
            row.public_key = record.public_keys().next().map(|key| key.to_string());
            if key == viewer.own && viewer.is_here(&record) {
                row.node = Some(viewer.node.to_owned());
                row.state = Standing::Alive.to_string();
            } else {
                let known = (viewer.known)(key.first());
                let signs = known.signs.unwrap_or_default();
                row.node = known.node;
                row.heard_seconds = signs.heard.map(|age| age.as_secs());
                row.state = match unusable(key, &record, viewer) {
                    Some(reason) => reason,
                    None => standing(entry, signs).to_string(),
                };
            }
        }
    }
    row
}

/// How the node with this lease is doing.
pub(super) fn standing(entry: &Entry, signs: Signs) -> Standing {
    Standing::of(Signs {
        time_left: entry.ttl,
        ..signs
    })
}

fn owner(
    key: SubnetKey,
    record: &LeaseRecord,
    is_reservation: bool,
    viewer: Viewer<'_>,
) -> &'static str {
    let is_here = viewer.is_here(record);
    match (key == viewer.own && is_here, is_reservation) {
        (true, false) => "this node",
        (true, true) => "this node, reservation",
        (false, true) => "reservation",
        (false, false) if is_here => "this node's address",
        (false, false) => "another node",
    }
}

/// Why nothing can be sent to the node with a lease, if that is so.
pub(super) fn unusable(key: SubnetKey, record: &LeaseRecord, viewer: Viewer<'_>) -> Option<String> {
    if let Err(reason) = check_peer(key, record, Some(viewer.config)) {
        return Some(reason.reason);
    }
    // Either half counts, if this node has such a one.
    let peer = match (key.ipv4(), viewer.own.ipv6()) {
        (None, Some(_)) => peer_of_ipv6(PeerId(0), key, record, viewer.config, &viewer.here),
        _ => peer_of_lease(PeerId(0), key, record, viewer.config, &viewer.here),
    };
    peer.err().map(|unusable| unusable.to_string())
}

/// A key without the prefix that all have, and not longer than a line.
fn key_text(key: &str, prefix: &str) -> String {
    const MAX: usize = 80;
    let prefix = lease_prefix(prefix);
    let text = key.strip_prefix(&prefix).unwrap_or(key);
    let text = text.strip_prefix('/').unwrap_or(text);
    let plain = plain(text);
    match plain.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}...", &plain[..end]),
        None => plain.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn entry(key: &str, value: &str, ttl: Option<u64>) -> Entry {
        Entry {
            key: format!("/n/subnets{key}"),
            value: value.to_owned(),
            revision: 1,
            created: 0,
            ttl: ttl.map(Duration::from_secs),
        }
    }

    fn vxlan(ip: &str, mac: &str) -> String {
        format!(
            r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    }

    #[test]
    fn leases_that_do_not_count_say_so() {
        let config = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let config = NetworkConfig::parse(config).unwrap();
        let viewer = Viewer {
            prefix: "/n",
            config: &config,
            node: "n1",
            own: "10.3.1.0-24".parse().unwrap(),
            public: Ipv4Addr::new(192, 168, 0, 1).into(),
            here: Here::default(),
            known: &|_| Known::default(),
        };
        let greedy = vxlan("192.168.0.2", "02:00:00:00:00:02");
        let keys = (100..118).map(|third| format!("/10.3.{third}.0-24"));
        let mut entries: Vec<_> = keys.map(|key| entry(&key, &greedy, Some(86_000))).collect();
        entries.push(entry("/10.3.0.0-16", &greedy, Some(86_000)));
        let states: Vec<_> = rows(&entries, viewer)
            .into_iter()
            .map(|row| row.state)
            .collect();
        assert!(
            states[..16].iter().all(|state| state == "silent"),
            "{states:?}"
        );
        assert!(
            states[16..18]
                .iter()
                .all(|state| state.contains("16 leases"))
        );
        assert!(states[18].contains("SubnetLen is 24"), "{states:?}");
    }

    #[test]
    fn every_key_is_a_row_that_says_what_it_is() {
        let config = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let config = NetworkConfig::parse(config).unwrap();
        let known = |subnet: IpNet| {
            let signs = |heard, has_stopped| Signs {
                heard: Some(Duration::from_secs(heard)),
                has_stopped,
                ..Signs::default()
            };
            let IpNet::V4(subnet) = subnet else {
                return Known::default();
            };
            match subnet.network().octets()[2] {
                2 => Known {
                    node: Some("n2".to_owned()),
                    signs: Some(signs(1, false)),
                },
                3 => Known {
                    node: Some("n3".to_owned()),
                    signs: Some(signs(99, true)),
                },
                _ => Known::default(),
            }
        };
        let viewer = Viewer {
            prefix: "/n",
            config: &config,
            node: "n1",
            own: "10.3.1.0-24".parse().unwrap(),
            public: Ipv4Addr::new(192, 168, 0, 1).into(),
            here: Here::default(),
            known: &known,
        };
        let one = vxlan("192.168.0.1", "02:00:00:00:00:01");
        let two = vxlan("192.168.0.2", "02:00:00:00:00:02");
        let cases = [
            (
                entry("/10.3.1.0-24", &one, Some(86_000)),
                "this node",
                "alive",
            ),
            (
                entry("/10.3.2.0-24", &two, Some(7)),
                "another node",
                "alive",
            ),
            (entry("/10.3.3.0-24", &two, None), "reservation", "stopped"),
            (
                entry("/10.3.4.0-24", &one, Some(1)),
                "this node's address",
                "expiring",
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
        let names: Vec<_> = rows[..4].iter().map(|row| row.node.as_deref()).collect();
        assert_eq!(names, [Some("n1"), Some("n2"), Some("n3"), None]);
        let heard: Vec<_> = rows[..4].iter().map(|row| row.heard_seconds).collect();
        assert_eq!(heard, [None, Some(1), Some(99), None]);
        assert_eq!(rows[8].subnet, "10.3.9.0/24".parse().ok());
        assert!(!rows[9].key.contains('\u{1b}'), "{:?}", rows[9].key);
        assert_eq!(rows[10].key, "-and-more");
    }
}
