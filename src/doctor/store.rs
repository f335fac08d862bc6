//! Checks of the lease store: whether it answers, what network it has, and how many leases.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ipnet::{IpNet, Ipv4Net};
use muslin_encap::offload::split::Checksums;
use muslin_stack::api::control::{Lease, Table};
use muslin_stack::control::lease::{
    Answer, Backend, NetworkConfig, Op, SubnetKey, lease_prefix, read_entry,
};

use super::finding::{Finding, Verdict};
use super::subject::{DoctorOptions, NodeUnderTest, PATIENCE};
use crate::control::Client;
use crate::features::Feature;
use crate::state;
use crate::store::{self, Store};
use crate::terminal::quantity::count;

const AWAY: &str = "check that it runs and can be reached from here; running nodes keep their \
                    last known peers";

/// The network that the store has, and what was found.
pub(super) async fn examine(
    options: &DoctorOptions,
    tested: Option<&NodeUnderTest>,
) -> (Option<Ipv4Net>, Vec<Finding>) {
    let url = match (&options.store, tested) {
        (Some(url), _) => url.clone(),
        // It knows how to speak to its store, and how its store does.
        (None, Some(tested)) => return ask_node(tested).await,
        (None, None) => state::default_store(&options.state_dir),
    };
    if let Some(path) = url.as_bytes().strip_prefix(b"sqlite:")
        && Feature::Sqlite.is_built()
        && !Path::new(OsStr::from_bytes(path)).exists()
    {
        let detail = format!("{} is created by the first node", url.display());
        return (None, vec![Finding::fine("store", detail)]);
    }
    match store::open(&url, &options.etcd) {
        Ok(store) => ask(&*store, &options.prefix).await,
        Err(error) => (None, vec![Finding::wrong("store", error)]),
    }
}

async fn ask_node(tested: &NodeUnderTest) -> (Option<Ipv4Net>, Vec<Finding>) {
    let status = &tested.status;
    let leases = match Client::connect(&tested.socket).await {
        Ok(client) => client.report::<Lease>(Table::Leases).await,
        Err(error) => Err(error),
    };
    let mut halves = Vec::new();
    if let Ok(leases) = &leases {
        let keys = leases.iter().filter_map(|lease| {
            let key = lease.public_key.clone()?;
            Some((key, lease.public_ip?.to_string()))
        });
        halves.extend(shared_keys(keys));
        let known = leases.iter().filter_map(|lease| {
            let subnets = lease.subnet?;
            let key = SubnetKey::of(subnets.ipv4(), subnets.ipv6())?;
            Some((key, lease.public_ip?.to_string(), lease.node.is_some()))
        });
        let known: Vec<_> = known.collect();
        halves.extend(families(&known, status.network.ipv6().is_some()));
    }
    let found = match leases {
        Ok(leases) => Finding::fine(
            "store",
            format!(
                "{} answers and has {}",
                status.store,
                count(leases.len() as u64, "lease")
            ),
        ),
        Err(error) => Finding::wrong("store", error).advise(AWAY),
    };
    (status.network.ipv4(), [vec![found], halves].concat())
}

async fn ask(store: &dyn Store, prefix: &str) -> (Option<Ipv4Net>, Vec<Finding>) {
    let (name, key) = (store.describe(), format!("{prefix}/config"));
    let config = match execute(store, Op::Get(key.clone())).await {
        Ok(Answer::Value(entry)) => entry,
        Ok(other) => {
            return (
                None,
                vec![Finding::wrong("store", format!("{name}: {other:?}"))],
            );
        }
        Err(why) => {
            let finding = Finding::wrong("store", format!("{name} does not answer: {why}"));
            return (None, vec![finding.advise(AWAY)]);
        }
    };
    let mut findings = vec![Finding::fine("store", format!("{name} answers"))];
    let config = match config
        .as_ref()
        .map(|entry| NetworkConfig::parse(&entry.value))
    {
        None => {
            let detail = format!("{name} has no {key}");
            findings.push(Finding::new("network", Verdict::Warning, detail).advise(
                "the first node with --network writes it; in a flannel cluster its administrator \
                 does",
            ));
            None
        }
        Some(Err(error)) => {
            findings.push(Finding::wrong("network", format!("{key}: {error}")));
            None
        }
        Some(Ok(config)) => {
            findings.push(network(&config));
            Some(config)
        }
    };
    if let Some(config) = &config {
        findings.extend(leases(store, prefix, config).await);
    }
    (config.and_then(|config| config.networks().ipv4()), findings)
}

async fn execute(store: &dyn Store, op: Op) -> std::result::Result<Answer, String> {
    match tokio::time::timeout(PATIENCE, store.execute(op)).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

fn network(config: &NetworkConfig) -> Finding {
    match &config.backend {
        Backend::Other(name) => Finding::wrong("network", config).advise(format!(
            "muslin has vxlan, udp, host-gw, ipip and wireguard, not {name}"
        )),
        _ => Finding::fine("network", config),
    }
}

async fn leases(store: &dyn Store, prefix: &str, config: &NetworkConfig) -> Vec<Finding> {
    let Ok(Answer::Snapshot { entries, .. }) = execute(store, Op::List(lease_prefix(prefix))).await
    else {
        return Vec::new();
    };
    let keys = entries.iter().filter_map(|entry| {
        let (_, record) = read_entry(prefix, entry).ok()?;
        let key = record.public_keys().next()?;
        Some((key.to_string(), record.addresses().to_string()))
    });
    let shared = shared_keys(keys);
    let known = entries.iter().filter_map(|entry| {
        let (key, record) = read_entry(prefix, entry).ok()?;
        let is_muslin = record.checksums() == Checksums::Partial;
        Some((key, record.addresses().to_string(), is_muslin))
    });
    let known: Vec<_> = known.collect();
    let mut findings = families(&known, config.enable_ipv4 && config.ipv6.is_some());
    findings.extend(shared);
    if !config.enable_ipv4 {
        return findings;
    }
    let (used, all) = (entries.len(), config.subnets().count());
    let are = if used == 1 { "is" } else { "are" };
    let detail = format!("{used} of {} {are} leased", count(all as u64, "subnet"));
    findings.push(if used < all {
        Finding::fine("leases", detail)
    } else {
        Finding::wrong("leases", detail).advise(
            "no node can join: nodes that are gone keep their lease for a day, or until 'muslin \
             leave'",
        )
    });
    findings
}

/// Public keys that more than one node has, of which each lease names one.
fn shared_keys(leases: impl IntoIterator<Item = (String, String)>) -> Vec<Finding> {
    let mut by_key = HashMap::<String, String>::new();
    let mut findings = Vec::new();
    for (key, node) in leases {
        match by_key.get(&key) {
            // A node may have left leases behind.
            Some(other) if *other == node => {}
            Some(other) => {
                let detail = format!("{other} and {node} both have the public key {key}");
                findings.push(Finding::wrong("keys", detail).advise(
                    "one key file is a copy of the other: remove that of the node that came later, and \
                     restart it",
                ));
            }
            None => {
                by_key.insert(key, node);
            }
        }
    }
    findings
}

/// What is wrong with the IP versions of leases, each with its node's address and whether that is
/// surely one of Muslin's.
fn families(leases: &[(SubnetKey, String, bool)], is_dual: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lacks_ipv6 = |(key, _, is_muslin): &&(SubnetKey, String, bool)| {
        is_dual && key.ipv6().is_none() && !is_muslin
    };
    let without: Vec<_> = leases.iter().filter(lacks_ipv6).collect();
    if !without.is_empty() {
        let nodes: Vec<_> = without.iter().map(|(_, node, _)| node.as_str()).collect();
        let detail = format!(
            "the network has EnableIPv6, and the lease of {} has no IPv6 subnet",
            nodes.join(", ")
        );
        findings.push(Finding::new("ipv6", Verdict::Warning, detail).advise(
            "a flanneld that was started before EnableIPv6 follows no lease any more once it has seen \
             one with an IPv6 subnet, and says nothing: restart it; a muslin node has none without a \
             public IPv6 address",
        ));
    }
    let mut by_subnet = HashMap::<IpNet, &str>::new();
    for (key, node, _) in leases {
        for subnet in key.nets().iter::<IpNet>() {
            let Some(other) = by_subnet.insert(subnet, node) else {
                continue;
            };
            let detail = format!("{other} and {node} both have the subnet {subnet}");
            findings.push(Finding::wrong("overlap", detail).advise(
                "restart the node that came later: flannel's nodes that start at once can draw the \
                 same subnet in a network with IPv6",
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_two_nodes_are_told() {
        let lease = |key: &str, node: &str| (key.to_owned(), node.to_owned());
        let leases = [
            lease("a", "192.168.0.1"),
            lease("b", "192.168.0.2"),
            lease("a", "192.168.0.1"),
            lease("b", "192.168.0.3"),
        ];
        let found = shared_keys(leases);
        let details: Vec<_> = found.iter().map(|it| it.detail.as_str()).collect();
        assert_eq!(
            details,
            ["192.168.0.2 and 192.168.0.3 both have the public key b"]
        );
    }

    #[test]
    fn leases_without_ipv6_and_those_that_overlap_are_told() {
        let lease =
            |key: &str, node: &str, is_muslin| (key.parse().unwrap(), node.to_owned(), is_muslin);
        let leases = [
            lease("10.5.1.0-24", "192.168.0.1", false),
            lease("10.5.2.0-24", "192.168.0.2", true),
            lease("10.5.3.0-24&fd00:5:0:3::-64", "192.168.0.3", false),
            lease("10.5.3.0-24&fd00:5:0:4::-64", "192.168.0.4", false),
            lease("10.5.5.0-24&fd00:5:0:4::-64", "192.168.0.5", false),
        ];
        let details = |is_dual| -> Vec<String> {
            let found = families(&leases, is_dual);
            found.into_iter().map(|finding| finding.detail).collect()
        };
        let overlaps = [
            "192.168.0.3 and 192.168.0.4 both have the subnet 10.5.3.0/24",
            "192.168.0.4 and 192.168.0.5 both have the subnet fd00:5:0:4::/64",
        ];
        assert_eq!(details(false), overlaps);
        let told = details(true);
        assert!(told[0].contains("of 192.168.0.1 has no IPv6"), "{told:?}");
        assert_eq!(told[1..], overlaps);
        assert!(families(&leases[1..3], true).is_empty());
    }
}
