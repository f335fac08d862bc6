//! Egress: a worker's sockets on the host, by which pods' traffic to addresses outside the overlay
//! goes on. What belongs to which socket, and what becomes of it, [`muslin_stack::datapath::egress`] decides.

mod clock;
mod endpoints;
mod error_queue;
pub(crate) mod option;
pub(crate) mod publish;
mod sockets;
mod token;

use std::net::Ipv4Addr;

pub use clock::Clock;
pub(crate) use endpoints::Endpoints;
use ipnet::Ipv4Net;
use muslin_stack::datapath::egress::{Limits, Ready};
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
    pub allow: Vec<Ipv4Net>,
    /// What they may not.
    pub deny: Vec<Ipv4Net>,
    /// The address by which they reach the host's 127.0.0.1.
    pub host_loopback: Option<Ipv4Addr>,
}

impl EgressSettings {
    /// Whether they make sense beside an overlay.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self, network: Ipv4Net) -> Result<()> {
        let Some(address) = self.host_loopback else {
            return Ok(());
        };
        let fault = if network.contains(&address) {
            format!("lies in the pod network {network}")
        } else if guard::is_martian(address) {
            "is not an address that a pod could send to".to_owned()
        } else {
            return Ok(());
        };
        let advice = "choose an unused one, such as 192.0.2.1";
        Err(Error::usage(format!(
            "--host-loopback: {address} {fault}: {advice}"
        )))
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
        let network = "10.244.0.0/16".parse().unwrap();
        let with = |address: &str| EgressSettings {
            host_loopback: Some(address.parse().unwrap()),
            ..EgressSettings::default()
        };
        assert!(with("192.0.2.1").check(network).is_ok());
        assert!(EgressSettings::default().check(network).is_ok());
        for bad in ["10.244.3.4", "127.0.0.1", "224.0.0.1", "0.0.0.0"] {
            let error = with(bad).check(network).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }
}
