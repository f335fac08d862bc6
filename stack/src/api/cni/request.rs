//! What a plugin asks of a node for one pod, by all that its runtime says.

use std::net::IpAddr;

use super::config::{Config, MAX_ADDRESSES};
use super::environment::Environment;
use super::error::Error;
use super::{Key, NetworkNamespace, Reserve};

/// The place that a pod is to have: with the addresses of a delegate if there is one, else those
/// that the runtime wants.
///
/// # Errors
/// If the runtime wants two different things.
pub fn reserve(
    environment: &Environment,
    config: &Config,
    netns: NetworkNamespace,
    delegated: &[IpAddr],
) -> Result<Reserve, Error> {
    let arguments = &environment.arguments;
    let wanted = &config.wanted;
    let mut addresses = delegated.to_vec();
    if addresses.is_empty() {
        let all = arguments.addresses.iter().chain(&wanted.addresses);
        for address in all {
            if !addresses.contains(address) {
                addresses.push(*address);
            }
        }
    }
    if addresses.len() > MAX_ADDRESSES {
        return Err(Error::Variable {
            name: "CNI_ARGS",
            problem: format!("IP: a pod has at most {MAX_ADDRESSES} addresses"),
        });
    }
    let key = config.key(&environment.container, &environment.interface);
    let mut reserve = Reserve::new(key, netns);
    reserve.pod = arguments.pod.clone();
    reserve.addresses = addresses;
    reserve.mac = wanted.mac.clone().or_else(|| arguments.mac.clone());
    reserve.publish = wanted.publish.clone();
    reserve.ingress = wanted.ingress;
    reserve.egress = wanted.egress;
    reserve.aliases = wanted.aliases.clone();
    Ok(reserve)
}

/// Parts of a list of attachments, each of which fits one message: at most `most` bytes of keys.
pub fn parts(keys: Vec<Key>, most: usize) -> Vec<Vec<Key>> {
    let mut parts = vec![Vec::new()];
    let mut len = 0;
    for key in keys {
        // Identifiers and names are in JSON what they are; three names of fields beside them.
        let of_key = key.network.len() + key.container.len() + 6 * key.interface.len() + 50;
        if len + of_key > most && len > 0 {
            parts.push(Vec::new());
            len = 0;
        }
        len += of_key;
        if let Some(part) = parts.last_mut() {
            part.push(key);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::cni::environment::Command;

    #[test]
    fn a_place_is_what_all_say_together() {
        let variable = |name: &str| {
            let value = match name {
                "CNI_COMMAND" => "ADD",
                "CNI_ARGS" => "IP=10.1.0.3;MAC=02:00:5e:00:53:01;K8S_POD_NAME=web",
                "CNI_IFNAME" => "eth0",
                _ => "x",
            };
            Some(value.as_bytes().to_vec())
        };
        let environment = Environment::read(variable).unwrap().unwrap();
        let config = |mac: Option<&str>| {
            let config = json!({
                "cniVersion": "1.0.0",
                "name": "muslin",
                "runtimeConfig": {"ips": ["10.1.0.3/24", "10.1.0.4"], "mac": mac},
            });
            Config::read(config.to_string().as_bytes(), Command::Add).unwrap()
        };
        let netns = NetworkNamespace {
            path: "x".to_owned(),
            device: 4,
            inode: 7,
        };
        let both = config(None);
        let reserve_of = |config: &Config, delegated: &[IpAddr]| {
            reserve(&environment, config, netns.clone(), delegated).unwrap()
        };
        let place = reserve_of(&both, &[]);
        let addresses = ["10.1.0.3", "10.1.0.4"].map(|it| it.parse::<IpAddr>().unwrap());
        assert_eq!(place.addresses, addresses);
        assert_eq!(place.mac.as_deref(), Some("02:00:5e:00:53:01"));
        assert_eq!(place.pod.clone().unwrap().name, "web");
        let other = config(Some("02:00:5e:00:53:02"));
        let place = reserve_of(&other, &addresses[1..]);
        assert_eq!(place.addresses, addresses[1..]);
        assert_eq!(place.mac.as_deref(), Some("02:00:5e:00:53:02"));
    }

    #[test]
    fn a_long_list_goes_in_parts() {
        let key = |i: usize| Key::new("muslin", format!("{i:064}"), "\u{1}\"eth0");
        let keys: Vec<_> = (0..1000).map(key).collect();
        let parts = parts(keys.clone(), 10_000);
        assert!(parts.len() > 5);
        for part in &parts {
            assert!(json!(part).to_string().len() <= 11_000);
        }
        assert_eq!(parts.concat(), keys);
        assert_eq!(super::parts(Vec::new(), 1), [vec![]]);
    }
}
