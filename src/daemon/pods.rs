//! What a node knows of its attached pods, and what it says to who wants to attach one.

use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use muslin_stack::api::cni::Key;
use muslin_stack::api::control::{Attach, Code, Namespace};
use muslin_stack::api::published::{MAX_PORTS, PortMapping};
use muslin_stack::control::ipam::{IpamError, PodName};
use muslin_stack::control::pods::{self, AttachError, Request};
use muslin_stack::datapath::port::Rates;
use smoltcp::wire::EthernetAddress;

use crate::device::PodDevice;
use crate::error::{Error, Result};
use crate::terminal::suggest::hint;

/// The pods of a node.
pub(super) type Pods = pods::Pods<Details>;
/// An attached pod.
pub(super) type Pod = pods::Pod<Details>;

/// What a node knows of a pod besides its place in the network.
#[derive(Debug, Clone)]
pub(super) struct Details {
    pub(super) persistent: bool,
    pub(super) published: Vec<PortMapping>,
    /// The attachment of a container runtime that it is, if it is one.
    pub(super) attachment: Option<Key>,
    /// Its device, where that is to stay without the node.
    pub(super) device: Option<Arc<PodDevice>>,
    /// How fast it may send and receive.
    pub(super) rates: Rates,
    pub(super) since: Instant,
    /// Where its commands run, with what the descriptors stand for.
    pub(super) namespaces: Option<(Vec<Namespace>, Arc<[OwnedFd]>)>,
}

impl Details {
    /// Those of a pod that stays without its client, of which nothing else is known yet.
    pub(super) fn persistent() -> Self {
        Self {
            persistent: true,
            published: Vec::new(),
            attachment: None,
            device: None,
            rates: Rates::default(),
            since: Instant::now(),
            namespaces: None,
        }
    }
}

/// Gives a pod a name, an address and a port, and a MAC address if its device has none.
pub(super) fn attach<'p>(
    pods: &'p mut Pods,
    request: &Attach,
    mac: Option<EthernetAddress>,
    published: Vec<PortMapping>,
) -> Result<(PodName, &'p Pod)> {
    let details = Details {
        persistent: request.persistent,
        published,
        ..Details::persistent()
    };
    let request = Request {
        name: request.pod.clone(),
        address: request.address,
        mac,
        aliases: Vec::new(),
        has_rested: false,
    };
    let (name, pod) = pods
        .attach(request, details)
        .map_err(|error| refusal(&error))?;
    Ok((name, pod))
}

/// Why a pod is not attached, and what to do.
pub(super) fn refusal(error: &AttachError) -> Error {
    match error {
        AttachError::NameTaken(_) => {
            let message = format!("{error}: give this one another --name");
            Error::refused(Code::NameTaken, message)
        }
        AttachError::NameReserved(_) => {
            let message = format!("{error}: give the pod another --name");
            Error::refused(Code::NameReserved, message)
        }
        AttachError::NoName => {
            Error::refused(Code::NameTaken, format!("{error}: give it a --name"))
        }
        AttachError::Address(IpamError::OutOfSubnet(..) | IpamError::Reserved(..)) => {
            Error::refused(Code::AddressNotAvailable, error)
        }
        AttachError::Address(IpamError::Taken(..)) => Error::refused(Code::AddressTaken, error),
        AttachError::Address(IpamError::Full(..)) => Error::refused(Code::NoAddressLeft, error),
        AttachError::MacTaken(..) => Error::refused(Code::MacTaken, error),
    }
}

/// Refuses ports that are another pod's already, or twice among these.
pub(super) fn check_ports(pods: &Pods, all: &[PortMapping]) -> Result<()> {
    if all.len() > MAX_PORTS.into() {
        return Err(Error::usage(format!(
            "a pod may have up to {MAX_PORTS} published ports"
        )));
    }
    for (at, one) in all.iter().enumerate() {
        let port = format!("port {}/{}", one.host_port, one.transport);
        if all[..at].iter().any(|other| other.overlaps(one)) {
            return Err(Error::usage(format!("{port} is published twice")));
        }
        let holds = |pod: &Pod| {
            let mut published = pod.details.published.iter();
            published.any(|other| other.overlaps(one))
        };
        if let Some((name, _)) = pods.iter().find(|(_, pod)| holds(pod)) {
            let message = format!(
                "{port} is already published by the pod '{name}': choose another port, or \
                 detach that pod"
            );
            return Err(Error::refused(Code::PortTaken, message));
        }
    }
    Ok(())
}

/// What is said of a pod that is not there.
pub(super) fn not_attached(pods: &Pods, name: impl Display) -> Error {
    let name = name.to_string();
    let hint = hint(&name, pods.iter().map(|(name, _)| name.as_str()));
    Error::refused(
        Code::NoSuchPod,
        format!("no pod named '{name}' is attached{hint}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asks_for_what_no_pod_can_have_has_used_it_wrongly() {
        let mut pods = Pods::new("10.244.1.0/24".parse().unwrap(), None);
        let mut refused = |pod: &str, address: &str| {
            let request = Attach::new(pod.parse().ok(), address.parse().ok());
            let attached = attach(&mut pods, &request, None, Vec::new());
            attached.map(|_| ())
        };
        refused("a", "10.244.1.2").unwrap();
        for (pod, address, code, words) in [
            (
                "wpad",
                "",
                Code::NameReserved,
                "give the pod another --name",
            ),
            (
                "b",
                "10.9.9.9",
                Code::AddressNotAvailable,
                "not in this node's subnet",
            ),
            (
                "b",
                "10.244.1.1",
                Code::AddressNotAvailable,
                "the node's own",
            ),
            (
                "b",
                "fd00::2",
                Code::AddressNotAvailable,
                "is not in this node's subnet",
            ),
            (
                "b",
                "10.244.1.2",
                Code::AddressTaken,
                "taken by the pod 'a'",
            ),
            (
                "a",
                "",
                Code::NameTaken,
                "already attached: give this one another --name",
            ),
        ] {
            let error = refused(pod, address).unwrap_err();
            let text = error.to_string();
            let is_coded = matches!(error, Error::Refused { code: it, .. } if it == code);
            assert!(is_coded && text.contains(words), "{text}");
            assert_eq!(error.exit_code() == 2, code.is_usage(), "{text}");
        }
    }
}
