//! Egress: a worker's sockets on the host, by which pods' traffic to addresses outside the overlay
//! goes on. What belongs to which socket, and what becomes of it, [`muslin_stack::datapath::egress`] decides.

pub(crate) mod address;
mod clock;
mod endpoints;
mod error_queue;
pub(crate) mod option;
pub(crate) mod publish;
mod sockets;
mod token;

use std::net::IpAddr;

pub use clock::Clock;
pub(crate) use endpoints::Endpoints;
use ipnet::IpNet;
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::datapath::egress::{Limits, Nat64Prefix, Ready};
use muslin_stack::datapath::guard;
use nix::sys::epoll::EpollFlags;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
pub(crate) use sockets::Sockets;
pub(crate) use token::Token;
use tracing::warn;

use crate::error::{Error, Result};

/// What a user asks of egress.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EgressSettings {
    /// What pods may reach; all, if that is nothing.
    pub allow: Vec<IpNet>,
    /// What they may not.
    pub deny: Vec<IpNet>,
    /// The addresses by which they reach the host's 127.0.0.1 and ::1.
    pub host_loopback: Option<Addresses>,
    /// The prefix by which those with IPv6 reach IPv4.
    pub nat64: Option<Nat64Prefix>,
}

impl EgressSettings {
    /// Whether they make sense beside an overlay.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self, network: impl Into<Nets>) -> Result<()> {
        let network = network.into();
        let networks: Vec<IpNet> = network.iter().collect();
        if let Some(nat64) = self.nat64 {
            let prefix = IpNet::V6(nat64.net());
            let overlap = |net: &IpNet| net.contains(&prefix) || prefix.contains(net);
            if let Some(net) = networks.iter().find(|net| overlap(net)) {
                return Err(Error::usage(format!(
                    "--nat64: {nat64} overlaps the pod network {net}: choose another prefix, such as \
                     64:ff9b::/96"
                )));
            }
        }
        let addresses: Vec<IpAddr> = match &self.host_loopback {
            Some(addresses) => addresses.iter().collect(),
            None => return Ok(()),
        };
        for address in addresses {
            let fault = if let Some(net) = networks.iter().find(|net| net.contains(&address)) {
                format!("lies in the pod network {net}")
            } else if !is_usable(address) {
                "is not an address that a pod could send to".to_owned()
            } else {
                continue;
            };
            let advice = match address {
                IpAddr::V4(_) => "choose an unused one, such as 192.0.2.1",
                IpAddr::V6(_) => "choose an unused one, such as 2001:db8::1",
            };
            return Err(Error::usage(format!(
                "--host-loopback: {address} {fault}: {advice}"
            )));
        }
        Ok(())
    }
}

/// Whether a pod could send to an address outside.
fn is_usable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !guard::is_martian(address),
        IpAddr::V6(address) => {
            !guard::is_martian_v6(address)
                && !address.is_unspecified()
                && !address.is_unicast_link_local()
        }
    }
}

/// Descriptors not for flows: pods' devices, the tunnel, the store, control and its clients.
const RESERVE: u64 = 192;

/// Lets the process have as many descriptors as it may, and says how many flows there are then: each
/// needs one, and pods come and are asked after while all flows are taken.
pub(crate) fn limits() -> Limits {
    let limits = Limits::default();
    match raise_descriptor_limit() {
        Ok(descriptors) => {
            let sockets = usize::try_from(descriptors.saturating_sub(RESERVE));
            let within = limits.within(sockets.unwrap_or(usize::MAX));
            if within.flows < limits.flows {
                warn!(
                    "this process may have {descriptors} descriptors (ulimit -n), which leaves room \
                     for {} flows to and from addresses outside",
                    within.flows
                );
            }
            within
        }
        Err(error) => {
            warn!("cannot raise the limit of descriptors for egress: {error}");
            limits
        }
    }
}

fn raise_descriptor_limit() -> nix::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// What a flow's socket is ready for, by the flags of its event.
pub(crate) fn ready_of(flags: EpollFlags) -> Ready {
    // Errors are found by reading or writing.
    let failed = flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
    let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
    Ready {
        readable: failed || flags.intersects(readable),
        writable: failed || flags.contains(EpollFlags::EPOLLOUT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_says_what_a_socket_is_ready_for() {
        for (flags, readable, writable) in [
            (EpollFlags::EPOLLIN, true, false),
            (EpollFlags::EPOLLRDHUP, true, false),
            (EpollFlags::EPOLLOUT, false, true),
            (EpollFlags::EPOLLERR, true, true),
            (EpollFlags::EPOLLHUP, true, true),
        ] {
            let ready = ready_of(flags);
            assert_eq!(
                (ready.readable, ready.writable),
                (readable, writable),
                "{flags:?}"
            );
        }
    }

    #[test]
    fn the_hosts_loopback_has_an_address_of_its_own() {
        let network: Nets = "10.244.0.0/16,fd00:10::/48".parse().unwrap();
        let with = |address: &str| EgressSettings {
            host_loopback: Some(address.parse().unwrap()),
            ..EgressSettings::default()
        };
        assert!(with("192.0.2.1").check(network).is_ok());
        assert!(with("192.0.2.1,2001:db8::1").check(network).is_ok());
        assert!(with("2001:db8::1").check(network).is_ok());
        assert!(EgressSettings::default().check(network).is_ok());
        for bad in [
            "10.244.3.4",
            "127.0.0.1",
            "224.0.0.1",
            "0.0.0.0",
            "fd00:10::7",
            "::1",
            "ff02::1",
            "fe80::7",
        ] {
            let error = with(bad).check(network).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }

    #[test]
    fn a_prefix_for_ipv4_is_none_of_pods() {
        let network: Nets = "10.244.0.0/16,fd00:10::/48".parse().unwrap();
        let with = |prefix: &str| EgressSettings {
            nat64: Some(prefix.parse().unwrap()),
            ..EgressSettings::default()
        };
        assert!(with("64:ff9b::/96").check(network).is_ok());
        for bad in ["fd00:10::/96", "fd00:10::/32"] {
            let error = with(bad).check(network).unwrap_err().to_string();
            assert!(
                error.contains(bad) && error.contains("fd00:10::/48"),
                "{error}"
            );
        }
    }
}
