//! The attached pods: who has which name, address and port.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use ipnet::Ipv4Net;
use muslin_encap::mac::{self, DisplayMac};
use muslin_stack::ipam::{AddressPool, IpamError, Memory, PodName};
use muslin_stack::names::is_reserved;
use muslin_stack::port::{Attachment, PortId};
use smoltcp::wire::EthernetAddress;

use crate::control::protocol::{Attach, Namespace};
use crate::error::{Error, Result};
use crate::publish::{MAX_PORTS, Published};

/// The pods of a node.
#[derive(Debug)]
pub(super) struct Pods {
    pool: AddressPool,
    attached: BTreeMap<PodName, Pod>,
    next_port: u32,
}

/// An attached pod.
#[derive(Debug, Clone)]
pub(super) struct Pod {
    pub(super) port: PortId,
    pub(super) address: Ipv4Addr,
    pub(super) mac: EthernetAddress,
    pub(super) persistent: bool,
    pub(super) published: Vec<Published>,
    pub(super) since: Instant,
    /// Where its commands run, with what the descriptors stand for.
    pub(super) namespaces: Option<(Vec<Namespace>, Arc<[OwnedFd]>)>,
}

impl Pod {
    /// What the data path is to know of it.
    pub(super) fn attachment(&self, guarded: bool) -> Attachment {
        Attachment {
            mac: self.mac,
            addresses: vec![IpAddr::V4(self.address)],
            guarded,
        }
    }
}

impl Pods {
    pub(super) fn new(subnet: Ipv4Net, memory: Option<Memory>) -> Self {
        let pool = match memory {
            Some(memory) => AddressPool::with_memory(subnet, memory),
            None => AddressPool::new(subnet),
        };
        Self {
            pool,
            attached: BTreeMap::new(),
            next_port: 0,
        }
    }

    /// Gives a pod a name, an address and a port, and a MAC address if its device has none.
    pub(super) fn attach(
        &mut self,
        request: &Attach,
        mac: Option<EthernetAddress>,
    ) -> Result<(PodName, Pod)> {
        let name = match &request.pod {
            Some(name) if self.attached.contains_key(name) => {
                return Err(Error::failed(format!(
                    "a pod named '{name}' is attached already: give this one another --name"
                )));
            }
            Some(name) if is_reserved(name) => {
                return Err(Error::usage(format!(
                    "hosts look for '{name}' by themselves and trust what has that name: give the pod \
                     another --name"
                )));
            }
            Some(name) => name.clone(),
            None => self.free_name()?,
        };
        mac.map_or(Ok(()), |mac| self.check_mac(mac))?;
        let address = self
            .pool
            .allocate(&name, request.address)
            .map_err(|error| match error {
                IpamError::OutOfSubnet(..) | IpamError::Reserved(..) => Error::usage(error),
                IpamError::Taken(..) | IpamError::Full(..) => Error::failed(error),
            })?;
        let made = mac::from_ipv4(address);
        if mac.is_none()
            && let Err(error) = self.check_mac(made)
        {
            self.pool.release(&name);
            return Err(error);
        }
        let pod = Pod {
            port: PortId(self.next_port),
            address,
            mac: mac.unwrap_or(made),
            persistent: request.persistent,
            published: Vec::new(),
            since: Instant::now(),
            namespaces: None,
        };
        self.next_port = self.next_port.wrapping_add(1);
        self.attached.insert(name.clone(), pod.clone());
        Ok((name, pod))
    }

    /// Refuses ports that are another pod's already, or twice among these.
    pub(super) fn check_ports(&self, all: &[Published]) -> Result<()> {
        if all.len() > MAX_PORTS.into() {
            return Err(Error::usage(format!(
                "a pod may have up to {MAX_PORTS} published ports"
            )));
        }
        for (at, one) in all.iter().enumerate() {
            let port = format!("port {}/{}", one.host_port, one.transport);
            if all[..at].iter().any(|other| other.overlaps(one)) {
                return Err(Error::usage(format!("{port} is to be published twice")));
            }
            let holds = |pod: &Pod| pod.published.iter().any(|other| other.overlaps(one));
            if let Some((name, _)) = self.attached.iter().find(|(_, pod)| holds(pod)) {
                return Err(Error::failed(format!(
                    "{port} is published by the pod '{name}' already: choose another port, or \
                     detach that pod"
                )));
            }
        }
        Ok(())
    }

    /// Notes the ports of an attached pod.
    pub(super) fn publish(&mut self, name: &PodName, published: Vec<Published>) {
        if let Some(pod) = self.attached.get_mut(name) {
            pod.published = published;
        }
    }

    pub(super) fn get(&self, name: &PodName) -> Result<&Pod> {
        self.attached.get(name).ok_or_else(|| not_attached(name))
    }

    /// Keeps the namespaces that a pod's commands run in.
    pub(super) fn keep_namespaces(
        &mut self,
        name: &PodName,
        kinds: Vec<Namespace>,
        namespaces: Vec<OwnedFd>,
    ) -> Result<()> {
        let pod = self.attached.get_mut(name);
        let pod = pod.ok_or_else(|| not_attached(name))?;
        pod.namespaces = Some((kinds, namespaces.into()));
        Ok(())
    }

    /// Takes a pod's address back; it stays remembered.
    pub(super) fn detach(&mut self, name: &PodName) -> Result<Pod> {
        let pod = self.attached.remove(name);
        let pod = pod.ok_or_else(|| not_attached(name))?;
        self.pool.release(name);
        Ok(pod)
    }

    pub(super) fn name_of(&self, port: PortId) -> Option<PodName> {
        let mut pods = self.attached.iter();
        pods.find(|(_, pod)| pod.port == port)
            .map(|(name, _)| name.clone())
    }

    pub(super) fn memory(&self) -> Memory {
        self.pool.memory()
    }

    pub(super) fn len(&self) -> usize {
        self.attached.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&PodName, &Pod)> {
        self.attached.iter()
    }

    /// Whether no pod has a MAC address yet.
    fn check_mac(&self, mac: EthernetAddress) -> Result<()> {
        match self.attached.iter().find(|(_, pod)| pod.mac == mac) {
            Some((other, _)) => Err(Error::failed(format!(
                "the pod '{other}' has the MAC address {} too",
                DisplayMac(mac)
            ))),
            None => Ok(()),
        }
    }

    fn free_name(&self) -> Result<PodName> {
        let mut names =
            (1..=self.attached.len() + 1).filter_map(|i| format!("pod-{i}").parse().ok());
        names
            .find(|name| !self.attached.contains_key(name))
            .ok_or_else(|| Error::failed("there is no free name for the pod: give it a --name"))
    }
}

fn not_attached(name: &PodName) -> Error {
    Error::failed(format!("no pod named '{name}' is attached"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(pod: Option<&str>, address: Option<[u8; 4]>) -> Attach {
        Attach {
            pod: pod.map(|name| name.parse().unwrap()),
            address: address.map(Ipv4Addr::from),
            persistent: false,
            publish: Vec::new(),
        }
    }

    fn mac(last: u8) -> Option<EthernetAddress> {
        Some(EthernetAddress([2, 0, 0, 0, 0, last]))
    }

    #[test]
    fn names_addresses_and_macs_belong_to_one_pod() {
        let mut pods = Pods::new("10.244.1.0/24".parse().unwrap(), None);
        let (first, pod) = pods.attach(&request(None, None), mac(1)).unwrap();
        assert_eq!(
            (first.as_str(), pod.address),
            ("pod-1", Ipv4Addr::new(10, 244, 1, 2))
        );
        let (second, _) = pods.attach(&request(None, None), mac(2)).unwrap();
        assert_eq!(second.as_str(), "pod-2");
        let refused = |pods: &mut Pods, request: &Attach, mac| {
            pods.attach(request, mac).unwrap_err().to_string()
        };
        let text = refused(&mut pods, &request(Some("pod-1"), None), mac(3));
        assert!(text.contains("attached already"), "{text}");
        let text = refused(&mut pods, &request(Some("a"), None), mac(1));
        assert!(text.contains("'pod-1' has the MAC address"), "{text}");
        let text = refused(
            &mut pods,
            &request(Some("a"), Some([10, 244, 1, 2])),
            mac(3),
        );
        assert!(text.contains("taken by the pod 'pod-1'"), "{text}");
        pods.detach(&first).unwrap();
        pods.detach(&first).unwrap_err();
        let (again, pod) = pods.attach(&request(None, None), mac(3)).unwrap();
        assert_eq!((again, pod.address), (first, Ipv4Addr::new(10, 244, 1, 2)));
    }

    #[test]
    fn a_name_that_hosts_trust_is_refused() {
        let mut pods = Pods::new("10.244.1.0/24".parse().unwrap(), None);
        for name in ["wpad", "wpad.corp", "localhost"] {
            let error = pods.attach(&request(Some(name), None), mac(1)).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{name}");
        }
        pods.attach(&request(Some("wpad-1"), None), mac(1)).unwrap();
    }

    #[test]
    fn a_pod_without_a_device_gets_a_mac_of_its_own() {
        let mut pods = Pods::new("10.244.1.0/24".parse().unwrap(), None);
        let (name, pod) = pods.attach(&request(None, None), None).unwrap();
        let made = EthernetAddress([0x0a, 0x58, 10, 244, 1, 2]);
        assert_eq!((pod.address, pod.mac), (Ipv4Addr::new(10, 244, 1, 2), made));
        pods.detach(&name).unwrap();
        // Whoever has taken that MAC address already keeps it.
        pods.attach(&request(None, Some([10, 244, 1, 9])), Some(made))
            .unwrap();
        for _ in 0..2 {
            let refused = pods.attach(&request(Some("a"), Some([10, 244, 1, 2])), None);
            let text = refused.unwrap_err().to_string();
            assert!(text.contains("has the MAC address 0a:58"), "{text}");
        }
    }
}
