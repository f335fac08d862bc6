//! Reading a store's entries: which are leases, which are not, and why.

use super::config::NetworkConfig;
use super::key::SubnetKey;
use super::record::LeaseRecord;
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
    let ip = record.public_ip;
    if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() {
        let reason = format!("no node can have the PublicIP {ip}");
        return Err(no_lease(key, reason));
    }
    match config.and_then(|config| misfit(config, key)) {
        Some(reason) => Err(no_lease(key, reason)),
        None => Ok(()),
    }
}

/// Why no node of a network can have a subnet. A shorter prefix would let its holder send from the
/// addresses of others, a longer one would take theirs from them, and one outside the network would
/// get what is not for pods.
fn misfit(config: &NetworkConfig, key: SubnetKey) -> Option<String> {
    let NetworkConfig {
        network,
        subnet_len,
        subnet_min,
        subnet_max,
        ..
    } = config;
    if config.allows(key.ipv4) {
        None
    } else if !network.contains(&key.ipv4) {
        Some(format!("it is not in the network {network}"))
    } else if key.ipv4.prefix_len() != *subnet_len {
        Some(format!("the network's SubnetLen is {subnet_len}"))
    } else {
        Some(format!(
            "it is not between SubnetMin {subnet_min} and SubnetMax {subnet_max}"
        ))
    }
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
    fn values_are_read_up_to_a_length_that_no_record_has() {
        let record = LeaseRecord::udp([192, 168, 0, 9].into());
        let read = |len: usize| {
            let json = record.to_json();
            let value = " ".repeat(len - json.len()) + &json;
            let entry = Entry {
                key: "/p/subnets/10.3.9.0-24".to_owned(),
                value,
                revision: 1,
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
