//! The interfaces that flannel's users and tools know: the subnet file for CNI plugins
//! and Docker, the health endpoints, and the notification of the service manager.

mod subnet_env;

use std::path::PathBuf;

use ipnet::{Ipv4Net, Ipv6Net};
pub use muslin_stack::api::subnet_env::SubnetEnv;
use muslin_stack::control::lease::{Backend, NetworkConfig};
use tracing::{info, warn};

use crate::condition::Condition;

/// A node's subnet file and health, as flannel's tools expect them.
#[derive(Debug)]
pub struct FlannelFiles {
    file: PathBuf,
    written: Option<SubnetEnv>,
    condition: Condition,
}

impl FlannelFiles {
    /// Those of a node that is not ready yet. The file is not touched.
    #[must_use]
    pub fn new(file: PathBuf, condition: Condition) -> Self {
        Self {
            file,
            written: None,
            condition,
        }
    }

    /// The subnet that an earlier node, or flannel's own, has left in the file.
    #[must_use]
    pub fn previous_subnet(&self) -> Option<Ipv4Net> {
        subnet_env::previous_subnet(&self.file)
    }

    /// The same of IPv6.
    #[must_use]
    pub fn previous_ipv6_subnet(&self) -> Option<Ipv6Net> {
        subnet_env::previous_ipv6_subnet(&self.file)
    }

    /// Announces that the data path runs. As flannel's, a node whose file cannot be written
    /// continues, but its health is never "ready".
    pub fn announce(&mut self, subnet: SubnetEnv, node: &str) {
        match subnet_env::write(&subnet, &self.file) {
            Ok(()) => {
                info!("the subnet file is {}", self.file.display());
                self.written = Some(subnet);
                self.condition.serve(node.to_owned(), true);
            }
            Err(error) => {
                warn!("{error}: /readyz will not report this node ready");
                let summary = format!("{node}, but without a subnet file");
                self.condition.serve(summary, false);
            }
        }
    }

    /// Pods have another MTU. A file that could not be written, or others have written since, stays
    /// as it is.
    pub fn set_mtu(&mut self, mtu: u16) {
        let Some(before) = self.written.as_mut() else {
            return;
        };
        let mut subnet = before.clone();
        subnet.mtu = mtu;
        match subnet_env::rewrite(&subnet, before, &self.file) {
            Ok(()) => *before = subnet,
            Err(error) => warn!("{error}"),
        }
    }

    /// The lease is given back, and so the file is wrong; one that others have written since stays.
    pub fn withdraw(&mut self) {
        self.condition.end();
        if let Some(subnet) = self.written.take()
            && let Err(error) = subnet_env::remove(&subnet, &self.file)
        {
            warn!("{error}");
        }
    }
}

/// What a node says about options of the network that it cannot follow, one line each.
#[must_use]
pub fn limits(config: &NetworkConfig) -> Vec<&'static str> {
    let Backend::Vxlan(options) = &config.backend else {
        return Vec::new();
    };
    let lines = [
        (
            options.learning,
            "the network has Learning, which this node ignores: it learns the addresses of other \
             nodes only from their leases",
        ),
        (
            options.gbp,
            "the network has GBP: this node accepts frames with a group, and sends frames without \
             one",
        ),
    ];
    let said = lines.into_iter().filter(|(is_on, _)| *is_on);
    said.map(|(_, line)| line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_followed_is_said_once_each() {
        let limits = |backend: &str| {
            let text = format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#);
            super::limits(&NetworkConfig::parse(&text).unwrap())
        };
        assert!(limits(r#"{"Type":"udp"}"#).is_empty());
        assert!(limits(r#"{"Type":"vxlan","Learning":false}"#).is_empty());
        let all = limits(r#"{"Type":"vxlan","Learning":true,"GBP":true,"DirectRouting":true}"#);
        for (line, word) in all.iter().zip(["Learning", "GBP"]) {
            assert!(line.contains(word), "{line}");
        }
        assert_eq!(all.len(), 2);
    }
}
