//! Reading a store's entries: which are leases, which are not, and why.

use super::config::{NetworkConfig, misfit};
use super::key::SubnetKey;
use super::record::LeaseRecord;
use super::settings::is_public_ipv6;
use super::text::shorten;
use crate::control::kv::Entry;

/// The longest value that is read: flannel's are below 300 bytes.
pub(super) const MAX_VALUE: usize = 16 * 1024;

/// Why an entry is not a usable lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoLease {
    /// The subnet that its key names: it is not free, although it has no reachable node.
    pub subnet: Option<SubnetKey>,
    /// Why.
    pub reason: String,
}

/// What the keys of all leases below `prefix` begin with: flannel lists and watches without a
/// final slash.
#[must_use]
pub fn lease_prefix(prefix: &str) -> String {
    format!("{prefix}/subnets")
}

/// The key of a subnet's lease.
pub(super) fn lease_key(prefix: &str, key: SubnetKey) -> String {
    format!("{}/{key}", lease_prefix(prefix))
}

/// The subnet that a key below `prefix` names. Other ways to write the same subnet name nothing,
/// because two keys would be one lease.
#[must_use]
pub(super) fn subnet_key(prefix: &str, key: &str) -> Option<SubnetKey> {
    let text = key.strip_prefix(prefix)?.strip_prefix("/subnets/")?;
    let key: SubnetKey = text.parse().ok()?;
    (key.to_string() == text).then_some(key)
}

/// Reads an entry below `prefix` as a lease, without asking whether it fits a network.
///
/// # Errors
/// `NoLease` says why it is none.
pub fn read_entry(prefix: &str, entry: &Entry) -> Result<(SubnetKey, LeaseRecord), NoLease> {
    let Some(key) = subnet_key(prefix, &entry.key) else {
        return Err(NoLease {
            subnet: None,
            reason: "its name is not a subnet".to_owned(),
        });
    };
    if entry.value.len() > MAX_VALUE {
        let reason = format!("its value has more than {MAX_VALUE} bytes");
        return Err(no_lease(key, reason));
    }
    let record = LeaseRecord::parse(&entry.value);
    let record = record.map_err(|error| no_lease(key, shorten(&error)))?;
    Ok((key, record))
}

/// Reads an entry below `prefix` as the lease of another node in a network of this configuration, if
/// that is known.
///
/// # Errors
/// `NoLease` says why it is none.
pub fn read_peer(
    prefix: &str,
    entry: &Entry,
    config: Option<&NetworkConfig>,
) -> Result<(SubnetKey, LeaseRecord), NoLease> {
    let (key, record) = read_entry(prefix, entry)?;
    check_peer(key, &record, config)?;
    Ok((key, record))
}

/// Whether a record can be the lease of another node in a network of this configuration, if that is
/// known.
///
/// # Errors
/// `NoLease` says why it is none.
pub fn check_peer(
    key: SubnetKey,
    record: &LeaseRecord,
    config: Option<&NetworkConfig>,
) -> Result<(), NoLease> {
    let is_ipv4 = key.ipv4().is_some() && config.is_none_or(|config| config.enable_ipv4);
    let fault = if is_ipv4 {
        ipv4_fault(key, record, config)
    } else {
        ipv6_fault(key, record, config)
    };
    match fault {
        Some(reason) => Err(no_lease(key, reason)),
        None => Ok(()),
    }
}

/// Why the IPv4 half of a lease cannot be that of another node. A shorter prefix would let its holder
/// send from the addresses of others, a longer one would take theirs from them, and one outside the
/// network would get what is not for pods.
fn ipv4_fault(
    key: SubnetKey,
    record: &LeaseRecord,
    config: Option<&NetworkConfig>,
) -> Option<String> {
    let ip = record.public_ip;
    if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() {
        return Some(format!("no node can have the PublicIP {ip}"));
    }
    let (subnet, config) = key.ipv4().zip(config)?;
    let (min, max) = (config.subnet_min, config.subnet_max);
    let why = || {
        let network = config.network.into();
        misfit(subnet.into(), network, config.subnet_len, min, max, "")
    };
    (!config.allows(subnet)).then(why)
}

/// Why the IPv6 half of a lease is of no use, if that is so: each half counts by itself, so that nodes
/// with and without IPv6 are one network.
#[must_use]
pub fn ipv6_fault(
    key: SubnetKey,
    record: &LeaseRecord,
    config: Option<&NetworkConfig>,
) -> Option<String> {
    let Some(subnet) = key.ipv6() else {
        return Some("it has no IPv6 subnet".to_owned());
    };
    match record.public_ipv6 {
        Some(ip) if is_public_ipv6(ip) => {}
        Some(ip) => return Some(format!("no node can have the PublicIPv6 {ip}")),
        None => return Some("its lease has an IPv6 subnet and no PublicIPv6".to_owned()),
    }
    let Some(range) = config?.ipv6 else {
        return Some("the network has no IPv6".to_owned());
    };
    let (min, max) = (range.subnet_min, range.subnet_max);
    let why = || {
        let network = range.network.into();
        misfit(subnet.into(), network, range.subnet_len, min, max, "IPv6")
    };
    (!range.allows(subnet)).then(why)
}

fn no_lease(key: SubnetKey, reason: String) -> NoLease {
    NoLease {
        subnet: Some(key),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_subnets_that_the_network_leases_are_peers() {
        let config = r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.4.0","SubnetMax":"10.3.9.0"}"#;
        let config = NetworkConfig::parse(config).unwrap();
        let read = |key: &str| {
            let entry = Entry {
                key: format!("/p/subnets/{key}"),
                value: LeaseRecord::udp([192, 168, 0, 9].into()).to_json(),
                revision: 1,
                created: 0,
                ttl: None,
            };
            assert!(read_peer("/p", &entry, None).is_ok(), "{key}");
            read_peer("/p", &entry, Some(&config)).map_err(|none| none.reason)
        };
        for good in ["10.3.4.0-24", "10.3.9.0-24", "10.3.5.0-24&fd00::-64"] {
            assert!(read(good).is_ok(), "{good}");
        }
        for (bad, why) in [
            ("10.3.0.0-16", "SubnetLen is 24"),
            ("10.3.4.0-23", "SubnetLen is 24"),
            ("10.3.5.128-25", "SubnetLen is 24"),
            ("10.3.3.0-24", "SubnetMin 10.3.4.0"),
            ("10.3.10.0-24", "SubnetMax 10.3.9.0"),
            ("10.0.0.0-8", "not in the network"),
            ("10.4.5.0-24", "not in the network"),
        ] {
            let reason = read(bad).unwrap_err();
            assert!(reason.contains(why), "{bad}: {reason}");
        }
    }

    #[test]
    fn each_half_of_a_lease_counts_by_itself() {
        let config = |text: &str| NetworkConfig::parse(text).unwrap();
        let dual = config(
            r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48",
                "Backend":{"Type":"host-gw"}}"#,
        );
        let plain = config(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"host-gw"}}"#);
        let both = r#"{"PublicIP":"192.168.0.9","PublicIPv6":"fd01::9","BackendType":"host-gw"}"#;
        let ipv4 = r#"{"PublicIP":"192.168.0.9","PublicIPv6":null,"BackendType":"host-gw"}"#;
        let ipv6 = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd01::9","BackendType":"host-gw"}"#;
        let local = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fe80::9","BackendType":"host-gw"}"#;
        for (key, record, config, is_peer, has_ipv6) in [
            ("10.3.4.0-24&fd00:0:0:4::-64", both, &dual, true, true),
            ("10.3.4.0-24&fd00:0:0:4::-64", both, &plain, true, false),
            ("10.3.4.0-24&fd00:0:0:4::-64", ipv4, &dual, true, false),
            ("10.3.4.0-24&fd00:0:0:4::-65", both, &dual, true, false),
            ("10.3.4.0-24", both, &dual, true, false),
            ("10.4.4.0-24&fd00:0:0:4::-64", both, &dual, false, true),
            ("0.0.0.0-0&fd00:0:0:4::-64", ipv6, &dual, true, true),
            ("0.0.0.0-0&fd00:0:0:4::-64", ipv6, &plain, false, false),
            ("0.0.0.0-0&fd00:0:1:4::-64", ipv6, &dual, false, false),
            ("0.0.0.0-0&fd00:0:0:4::-64", local, &dual, false, false),
            ("0.0.0.0-0", both, &dual, false, false),
        ] {
            let (key, record) = (key.parse().unwrap(), LeaseRecord::parse(record).unwrap());
            let is = (
                check_peer(key, &record, Some(config)).is_ok(),
                ipv6_fault(key, &record, Some(config)).is_none(),
            );
            assert_eq!(is, (is_peer, has_ipv6), "{key} {record:?}");
        }
    }

    #[test]
    fn values_are_read_up_to_a_length_that_no_record_has() {
        let record = LeaseRecord::udp([192, 168, 0, 9].into());
        let read = |len: usize| {
            let json = record.to_json();
            let value = " ".repeat(len - json.len()) + &json;
            let entry = Entry {
                key: "/p/subnets/10.3.9.0-24".to_owned(),
                value,
                revision: 1,
                created: 0,
                ttl: None,
            };
            read_entry("/p", &entry).map(|(_, record)| record)
        };
        for len in [100, 10_000, MAX_VALUE] {
            assert_eq!(read(len).as_ref(), Ok(&record));
        }
        for len in [MAX_VALUE + 1, 1 << 20] {
            assert!(read(len).unwrap_err().reason.contains("bytes"));
        }
    }
}
