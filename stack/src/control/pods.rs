//! The attached pods: who has which name, address, MAC address and port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use muslin_encap::mac::{self, DisplayMac};
use smoltcp::wire::EthernetAddress;
use thiserror::Error;

use crate::Instant;
use crate::addresses::{Addresses, Nets};
use crate::control::ipam::{AddressPool, IpamError, Memory, PodName};
use crate::control::names::{PodRecord, is_reserved};
use crate::datapath::port::{Attachment, PortId, Rates};

/// The pods of a node, each with what else is known of it.
#[derive(Debug)]
pub struct Pods<T> {
    pool: AddressPool,
    attached: BTreeMap<PodName, Pod<T>>,
    next_port: u32,
}

/// An attached pod.
#[derive(Debug, Clone)]
pub struct Pod<T> {
    /// Its port at the data path; no other pod of this process has had it.
    pub port: PortId,
    /// Its address in each of the node's subnets.
    pub address: Addresses,
    /// The MAC address of its interface.
    pub mac: EthernetAddress,
    /// Further names that it is found by.
    pub aliases: Vec<PodName>,
    /// What the caller knows of it.
    pub details: T,
}

/// What a pod is to have, where that matters to who attaches it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Its name; the first free one of `pod-1`, `pod-2` and so on if there is none.
    pub name: Option<PodName>,
    /// Its address of either IP version or both; the one that it had before, or a free one, of a version
    /// without.
    pub address: Option<Addresses>,
    /// The MAC address that its device has; one is made of its address if there is none.
    pub mac: Option<EthernetAddress>,
    /// Further names that it is to be found by, where no pod has them as its own.
    pub aliases: Vec<PodName>,
    /// Whether an address must have rested for 30 seconds since another pod had it.
    pub has_rested: bool,
}

/// Why a pod cannot be attached.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AttachError {
    /// Another pod has this name.
    #[error("a pod named '{0}' is already attached")]
    NameTaken(PodName),
    /// Hosts look for this name by themselves, and trust what has it.
    #[error("hosts look up '{0}' automatically and trust the answer")]
    NameReserved(PodName),
    /// Pods have all names that would be chosen.
    #[error("no name is free for the pod")]
    NoName,
    /// Another pod has this MAC address.
    #[error("the pod '{0}' has the MAC address {mac} too", mac = DisplayMac(*.1))]
    MacTaken(PodName, EthernetAddress),
    /// There is no such address for it.
    #[error("{0}")]
    Address(#[from] IpamError),
}

impl<T> Pod<T> {
    /// What the data path is to know of it.
    #[must_use]
    pub fn attachment(&self, guarded: bool) -> Attachment {
        Attachment {
            mac: self.mac,
            addresses: self.address.iter().collect(),
            guarded,
            rates: Rates::default(),
        }
    }
}

impl<T> Pods<T> {
    /// No pods in these subnets yet; those of an earlier process get the addresses that are remembered.
    #[must_use]
    pub fn new(subnets: Nets, memory: Option<Memory>) -> Self {
        let pool = match memory {
            Some(memory) => AddressPool::with_memory(subnets, memory),
            None => AddressPool::new(subnets),
        };
        Self {
            pool,
            attached: BTreeMap::new(),
            next_port: 0,
        }
    }

    /// It is this time now: addresses of pods that were just detached rest.
    pub fn set_time(&mut self, now: Instant) {
        self.pool.set_time(now);
    }

    /// Gives a pod a name, an address, a MAC address and a port.
    ///
    /// # Errors
    /// `AttachError` if another pod has what this one is to have, or nothing is left; nothing has
    /// changed then.
    pub fn attach(
        &mut self,
        request: Request,
        details: T,
    ) -> Result<(PodName, &mut Pod<T>), AttachError> {
        let name = match request.name {
            Some(name) if self.attached.contains_key(&name) => {
                return Err(AttachError::NameTaken(name));
            }
            Some(name) if is_reserved(&name) => return Err(AttachError::NameReserved(name)),
            Some(name) => name,
            None => self.free_name()?,
        };
        if let Some(mac) = request.mac {
            self.check_mac(mac)?;
        }
        let address = self
            .pool
            .allocate_rested(&name, request.address, request.has_rested)?;
        let made = mac_of(address);
        if request.mac.is_none()
            && let Err(error) = self.check_mac(made)
        {
            self.pool.release(&name);
            return Err(error);
        }
        let pod = Pod {
            port: PortId(self.next_port),
            address,
            mac: request.mac.unwrap_or(made),
            aliases: request.aliases,
            details,
        };
        self.next_port = self.next_port.wrapping_add(1);
        // Nobody has the name, as was seen above.
        let pod = self.attached.entry(name.clone()).or_insert(pod);
        Ok((name, pod))
    }

    /// Takes a pod's address back, which stays remembered; `None` if there is no such pod.
    pub fn detach(&mut self, name: &PodName) -> Option<Pod<T>> {
        let pod = self.attached.remove(name)?;
        self.pool.release(name);
        Some(pod)
    }

    /// An attached pod.
    #[must_use]
    pub fn get(&self, name: &PodName) -> Option<&Pod<T>> {
        self.attached.get(name)
    }

    /// What the caller knows of an attached pod.
    pub fn details_mut(&mut self, name: &PodName) -> Option<&mut T> {
        let pod = self.attached.get_mut(name)?;
        Some(&mut pod.details)
    }

    /// The name of the pod at a port.
    #[must_use]
    pub fn name_of(&self, port: PortId) -> Option<&PodName> {
        let mut pods = self.attached.iter();
        pods.find(|(_, pod)| pod.port == port).map(|(name, _)| name)
    }

    /// All attached pods by their names.
    pub fn iter(&self) -> impl Iterator<Item = (&PodName, &Pod<T>)> {
        self.attached.iter()
    }

    /// How many are attached.
    #[must_use]
    pub fn len(&self) -> usize {
        self.attached.len()
    }

    /// Whether none is attached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.attached.is_empty()
    }

    /// What is to be remembered between processes.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.pool.memory()
    }

    /// The records of the pods for other nodes.
    #[must_use]
    pub fn records(&self) -> Vec<PodRecord> {
        let record = |name: &PodName, pod: &Pod<T>| PodRecord {
            name: name.clone(),
            address: pod.address,
        };
        let own = self.attached.iter();
        let mut records: Vec<_> = own.map(|(name, pod)| record(name, pod)).collect();
        let mut known: BTreeSet<_> = self.attached.keys().collect();
        for pod in self.attached.values() {
            let aliases = pod.aliases.iter();
            let free = aliases.filter(|alias| !is_reserved(alias) && known.insert(*alias));
            records.extend(free.map(|alias| record(alias, pod)));
        }
        records
    }

    /// Whether an address is free for another pod.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.pool.has_room()
    }

    /// Whether no pod has a MAC address yet.
    fn check_mac(&self, mac: EthernetAddress) -> Result<(), AttachError> {
        match self.attached.iter().find(|(_, pod)| pod.mac == mac) {
            Some((other, _)) => Err(AttachError::MacTaken(other.clone(), mac)),
            None => Ok(()),
        }
    }

    fn free_name(&self) -> Result<PodName, AttachError> {
        let mut names =
            (1..=self.attached.len() + 1).filter_map(|i| format!("pod-{i}").parse().ok());
        let free = names.find(|name| !self.attached.contains_key(name));
        free.ok_or(AttachError::NoName)
    }
}

/// The MAC address of a pod whose device has none: the IPv4 address is in it, or the end of the IPv6
/// address.
fn mac_of(address: Addresses) -> EthernetAddress {
    let of_ipv6 = || mac::from_ipv6(address.ipv6().unwrap_or(Ipv6Addr::UNSPECIFIED));
    address.ipv4().map_or_else(of_ipv6, mac::from_ipv4)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn octets(address: Addresses) -> [u8; 4] {
        address.ipv4().unwrap().octets()
    }

    fn pods() -> Pods<()> {
        Pods::new("10.244.1.0/24".parse().unwrap(), None)
    }

    fn request(name: Option<&str>, address: Option<u8>, mac: Option<u8>) -> Request {
        Request {
            name: name.map(|name| name.parse().unwrap()),
            address: address.map(|last| Ipv4Addr::new(10, 244, 1, last).into()),
            mac: mac.map(|last| EthernetAddress([2, 0, 0, 0, 0, last])),
            aliases: Vec::new(),
            has_rested: false,
        }
    }

    fn attach(pods: &mut Pods<()>, request: Request) -> (String, [u8; 4]) {
        let (name, pod) = pods.attach(request, ()).unwrap();
        (name.to_string(), octets(pod.address))
    }

    #[test]
    fn names_addresses_and_macs_belong_to_one_pod() {
        let mut pods = pods();
        let first = attach(&mut pods, request(None, None, Some(1)));
        assert_eq!(first, ("pod-1".to_owned(), [10, 244, 1, 2]));
        let second = attach(&mut pods, request(None, None, Some(2)));
        assert_eq!(second.0, "pod-2");
        let mut refused = |request| pods.attach(request, ()).map(|_| ()).unwrap_err();
        let name: PodName = "pod-1".parse().unwrap();
        assert_eq!(
            refused(request(Some("pod-1"), None, Some(3))),
            AttachError::NameTaken(name.clone())
        );
        let mac = EthernetAddress([2, 0, 0, 0, 0, 1]);
        assert_eq!(
            refused(request(Some("a"), None, Some(1))),
            AttachError::MacTaken(name.clone(), mac)
        );
        let taken = IpamError::Taken(Ipv4Addr::new(10, 244, 1, 2).into(), name.clone());
        assert_eq!(
            refused(request(Some("a"), Some(2), Some(3))),
            AttachError::Address(taken)
        );
        let gone = pods.detach(&name).unwrap();
        assert!(pods.detach(&name).is_none());
        assert_eq!(attach(&mut pods, request(None, None, Some(3))), first);
        let again = pods.get(&name).unwrap();
        assert_ne!(again.port, gone.port);
        assert_eq!(pods.name_of(again.port), Some(&name));
        assert_eq!(pods.name_of(gone.port), None);
    }

    #[test]
    fn a_name_that_hosts_trust_is_refused() {
        let mut pods = pods();
        for name in ["wpad", "wpad.corp", "localhost"] {
            let refused = pods.attach(request(Some(name), None, Some(1)), ());
            let name = name.parse().unwrap();
            assert_eq!(refused.map(|_| ()), Err(AttachError::NameReserved(name)));
        }
        attach(&mut pods, request(Some("wpad-1"), None, Some(1)));
    }

    #[test]
    fn a_pod_without_a_device_gets_a_mac_of_its_own() {
        let mut pods = pods();
        let made = EthernetAddress([0x0a, 0x58, 10, 244, 1, 2]);
        let (name, pod) = pods.attach(request(None, None, None), ()).unwrap();
        assert_eq!((octets(pod.address), pod.mac), ([10, 244, 1, 2], made));
        pods.detach(&name).unwrap();
        // Whoever has taken that MAC address already keeps it.
        let other = Request {
            mac: Some(made),
            ..request(None, Some(9), None)
        };
        pods.attach(other, ()).unwrap();
        for _ in 0..2 {
            let refused = pods.attach(request(Some("a"), Some(2), None), ());
            let other = "pod-1".parse().unwrap();
            let expected = AttachError::MacTaken(other, made);
            assert_eq!(refused.map(|_| ()), Err(expected));
        }
    }

    #[test]
    fn a_pod_of_an_earlier_process_has_its_address_again() {
        let mut earlier = pods();
        attach(&mut earlier, request(Some("a"), None, None));
        let second = attach(&mut earlier, request(Some("b"), None, None));
        assert_eq!(earlier.records().len(), 2);
        let mut pods: Pods<()> =
            Pods::new("10.244.1.0/24".parse().unwrap(), Some(earlier.memory()));
        assert!(pods.is_empty());
        assert_eq!(attach(&mut pods, request(Some("b"), None, None)), second);
    }
}
