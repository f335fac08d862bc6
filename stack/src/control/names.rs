//! Names of pods: which pod of which node has which address, from the records that nodes publish.
//!
//! `POD` alone has the addresses of all pods of that name, `POD.NODE` those on one node. Where a
//! name can be read in both ways, because names of pods and nodes may have dots, the node counts.
//!
//! Nobody vouches for a record but who may write into the store. What is checked is that it counts
//! only while its subnet is leased, that it names addresses of that subnet's pods only, each once,
//! and that it is no larger than a node of ours makes it. So a node can give its own pods any name,
//! and nobody else's pod another address.

mod record;
mod sharing;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
pub use record::{
    InvalidNodeRecord, MAX_RECORD, NodeRecord, PodRecord, named_subnet, names_key, names_prefix,
};
pub use sharing::{NameChange, Sharer, SharerSettings, Trouble};

use crate::addresses::Nets;
use crate::control::ipam::PodName;

/// Names that hosts look for by themselves, in whatever domains they search, and trust: a proxy's
/// settings, a tunnel's end, the host itself. No pod answers for them.
const RESERVED: [&str; 3] = ["isatap", "localhost", "wpad"];

/// Whether a pod must not have a name, since it begins as a reserved one.
#[must_use]
pub fn is_reserved(name: &PodName) -> bool {
    let first = name.as_str().split('.').next();
    first.is_some_and(|first| RESERVED.contains(&first))
}

/// What a name below the zone stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Pods with these addresses, in order.
    Addresses(Vec<IpAddr>),
    /// Nothing, but there are names below it.
    Parent,
    /// Nothing.
    Nothing,
}

/// The pods of all nodes by their names.
#[derive(Debug, Clone, Default)]
pub struct Names {
    records: BTreeMap<IpNet, NodeRecord>,
    leased: BTreeSet<IpNet>,
    /// By `POD`, of the records that count.
    pods: HashMap<String, Vec<IpAddr>>,
    /// By `POD.NODE`.
    on_nodes: HashMap<String, Vec<IpAddr>>,
    /// How many names there are below a name that need not stand for anything itself.
    parents: HashMap<String, usize>,
    /// `POD.NODE` by address.
    by_address: HashMap<IpAddr, String>,
}

impl Names {
    /// A subnet is leased.
    pub fn lease(&mut self, subnet: impl Into<IpNet>) {
        let subnet = subnet.into();
        if self.leased.insert(subnet) {
            self.index(subnet);
        }
    }

    /// A subnet's lease has ended. Its record may last longer, and counts for nothing.
    pub fn release(&mut self, subnet: impl Into<IpNet>) {
        let subnet = subnet.into();
        self.forget_index(subnet);
        self.leased.remove(&subnet);
    }

    /// A node's record is new or has changed. The addresses in each of its subnets count while that is
    /// leased.
    pub fn set(&mut self, record: NodeRecord) {
        for subnet in record.subnet.iter::<IpNet>() {
            self.forget(subnet);
            self.records.insert(subnet, record.clone());
            self.index(subnet);
        }
    }

    /// The record of the node with this lease is gone. One of another lease with one of these subnets
    /// stays: a node may have got the other subnet since.
    pub fn remove(&mut self, lease: Nets) {
        for subnet in lease.iter::<IpNet>() {
            if self
                .records
                .get(&subnet)
                .is_some_and(|it| it.subnet == lease)
            {
                self.forget(subnet);
            }
        }
    }

    fn forget(&mut self, subnet: IpNet) {
        self.forget_index(subnet);
        self.records.remove(&subnet);
    }

    /// What the node with this lease publishes, if it does.
    #[must_use]
    pub fn record(&self, subnet: impl Into<IpNet>) -> Option<&NodeRecord> {
        self.records.get(&subnet.into())
    }

    /// What a name stands for, given without the zone and in any case.
    #[must_use]
    pub fn find(&self, name: &str) -> Found {
        let name = name.to_ascii_lowercase();
        let addresses = self.on_nodes.get(&name).or_else(|| self.pods.get(&name));
        match addresses {
            Some(addresses) => Found::Addresses(addresses.clone()),
            None if self.parents.contains_key(&name) => Found::Parent,
            None => Found::Nothing,
        }
    }

    /// The subnets of the node with this name, of those for which its record counts.
    #[must_use]
    pub fn subnets_of(&self, node: &str) -> Option<Nets> {
        let is_its = |record: &NodeRecord| record.node.as_str() == node;
        let records = self.records.iter().filter(|(_, record)| is_its(record));
        let subnets = records.map(|(subnet, _)| *subnet);
        let (mut ipv4, mut ipv6) = (None, None);
        for subnet in subnets.filter(|subnet| self.leased.contains(subnet)) {
            match subnet {
                IpNet::V4(subnet) => ipv4 = ipv4.or(Some(subnet)),
                IpNet::V6(subnet) => ipv6 = ipv6.or(Some(subnet)),
            }
        }
        Nets::new(ipv4, ipv6)
    }

    /// All pods and nodes by their names, in order: what somebody may have meant by another one.
    #[must_use]
    pub fn all(&self) -> BTreeSet<&str> {
        let nodes = self.records.values().map(|record| record.node.as_str());
        self.pods.keys().map(String::as_str).chain(nodes).collect()
    }

    /// The name of the pod that has an address, `POD.NODE`.
    #[must_use]
    pub fn name_of(&self, address: IpAddr) -> Option<&str> {
        self.by_address.get(&address).map(String::as_str)
    }

    /// What the record of a subnet says of that, if it counts.
    fn counting(&self, subnet: IpNet) -> Vec<(String, String, IpAddr)> {
        let record = self.records.get(&subnet);
        let record = record.filter(|_| self.leased.contains(&subnet));
        let names = record.into_iter().flat_map(|record| {
            let node = &record.node;
            let pods = record.pods.iter().filter(|pod| !is_reserved(&pod.name));
            pods.flat_map(move |pod| {
                let names = move |address| {
                    let on_node = format!("{}.{node}", pod.name);
                    (pod.name.to_string(), on_node, address)
                };
                let its = pod.address.iter::<IpAddr>();
                its.filter(move |address| subnet.contains(address))
                    .map(names)
            })
        });
        names.collect()
    }

    fn index(&mut self, subnet: IpNet) {
        for (pod, on_node, address) in self.counting(subnet) {
            for parent in parents(&pod).chain(parents(&on_node)) {
                *self.parents.entry(parent.to_owned()).or_default() += 1;
            }
            add(&mut self.pods, pod, address);
            self.by_address.insert(address, on_node.clone());
            add(&mut self.on_nodes, on_node, address);
        }
    }

    fn forget_index(&mut self, subnet: IpNet) {
        for (pod, on_node, address) in self.counting(subnet) {
            for parent in parents(&pod).chain(parents(&on_node)) {
                if let Some(count) = self.parents.get_mut(parent) {
                    *count -= 1;
                    if *count == 0 {
                        self.parents.remove(parent);
                    }
                }
            }
            take(&mut self.pods, &pod, address);
            take(&mut self.on_nodes, &on_node, address);
            self.by_address.remove(&address);
        }
    }
}

/// The names above a name.
fn parents(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').map(|(dot, _)| &name[dot + 1..])
}

fn add(names: &mut HashMap<String, Vec<IpAddr>>, name: String, address: IpAddr) {
    let addresses = names.entry(name).or_default();
    if let Err(place) = addresses.binary_search(&address) {
        addresses.insert(place, address);
    }
}

fn take(names: &mut HashMap<String, Vec<IpAddr>>, name: &str, address: IpAddr) {
    if let Some(addresses) = names.get_mut(name) {
        addresses.retain(|other| *other != address);
        if addresses.is_empty() {
            names.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::control::kv::Entry;
    use ipnet::Ipv4Net;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn record(node: &str, subnet: &str, pods: &[(&str, [u8; 4])]) -> NodeRecord {
        let pods = pods.iter().map(|(name, address)| PodRecord {
            name: name.parse().unwrap(),
            address: Ipv4Addr::from(*address).into(),
        });
        NodeRecord {
            node: node.parse().unwrap(),
            subnet: subnet.parse().unwrap(),
            pods: pods.collect(),
            stopped: false,
        }
    }

    fn addresses(all: &[[u8; 4]]) -> Found {
        Found::Addresses(all.iter().map(|it| (*it).into()).collect())
    }

    fn two_nodes() -> Names {
        let mut names = Names::default();
        names.lease(net("10.1.1.0/24"));
        names.lease(net("10.1.2.0/24"));
        let pods = [("web", [10, 1, 1, 2]), ("db.main", [10, 1, 1, 3])];
        names.set(record("n1", "10.1.1.0/24", &pods));
        names.set(record("n2", "10.1.2.0/24", &[("web", [10, 1, 2, 9])]));
        names
    }

    #[test]
    fn a_name_has_the_addresses_of_all_its_pods() {
        let names = two_nodes();
        let both = addresses(&[[10, 1, 1, 2], [10, 1, 2, 9]]);
        assert_eq!(names.find("web"), both);
        assert_eq!(names.find("WEB"), both);
        assert_eq!(names.find("web.n2"), addresses(&[[10, 1, 2, 9]]));
        assert_eq!(names.find("db.main.n1"), addresses(&[[10, 1, 1, 3]]));
        assert_eq!(names.find("db.main"), addresses(&[[10, 1, 1, 3]]));
        for parent in ["n1", "n2", "main", "main.n1"] {
            assert_eq!(names.find(parent), Found::Parent, "{parent}");
        }
        for nothing in ["db", "web.n3", "x.web", "eb", "web.", ""] {
            assert_eq!(names.find(nothing), Found::Nothing, "{nothing}");
        }
        assert_eq!(
            names.name_of(IpAddr::from([10, 1, 1, 3])),
            Some("db.main.n1")
        );
        assert_eq!(names.name_of(IpAddr::from([10, 1, 1, 4])), None);
    }

    #[test]
    fn no_pod_answers_for_a_name_that_hosts_look_for_by_themselves() {
        let mut names = two_nodes();
        names.lease(net("10.1.3.0/24"));
        let pods = [
            ("wpad", [10, 1, 3, 2]),
            ("wpad.corp", [10, 1, 3, 3]),
            ("isatap", [10, 1, 3, 4]),
            ("localhost", [10, 1, 3, 5]),
            ("wpad2", [10, 1, 3, 6]),
            ("my.wpad", [10, 1, 3, 7]),
        ];
        names.set(record("n3", "10.1.3.0/24", &pods));
        for refused in ["wpad", "wpad.n3", "wpad.corp", "isatap", "localhost"] {
            let found = names.find(refused);
            assert!(!matches!(found, Found::Addresses(_)), "{refused}");
        }
        assert_eq!(names.name_of(IpAddr::from([10, 1, 3, 2])), None);
        assert_eq!(names.find("wpad2"), addresses(&[[10, 1, 3, 6]]));
        assert_eq!(names.find("my.wpad"), addresses(&[[10, 1, 3, 7]]));
        names.remove(net("10.1.3.0/24").into());
        assert_eq!(names.find("my"), Found::Nothing);
    }

    #[test]
    fn a_pod_cannot_take_the_name_of_a_pod_on_a_node() {
        let mut names = two_nodes();
        names.lease(net("10.1.3.0/24"));
        let pods = [("web.n1", [10, 1, 3, 2])];
        names.set(record("n3", "10.1.3.0/24", &pods));
        assert_eq!(names.find("web.n1"), addresses(&[[10, 1, 1, 2]]));
        assert_eq!(names.find("web.n1.n3"), addresses(&[[10, 1, 3, 2]]));
    }

    #[test]
    fn what_goes_leaves_nothing_behind() {
        let mut names = two_nodes();
        names.set(record("n2", "10.1.2.0/24", &[("new", [10, 1, 2, 9])]));
        assert_eq!(names.find("web"), addresses(&[[10, 1, 1, 2]]));
        assert_eq!(names.name_of(IpAddr::from([10, 1, 2, 9])), Some("new.n2"));
        names.remove(net("10.1.2.0/24").into());
        names.remove(net("10.1.2.0/24").into());
        names.release(net("10.1.1.0/24"));
        for gone in ["web", "web.n1", "new", "n1", "n2", "main"] {
            assert_eq!(names.find(gone), Found::Nothing, "{gone}");
        }
        assert!(names.pods.is_empty() && names.on_nodes.is_empty());
        assert!(names.parents.is_empty() && names.by_address.is_empty());
    }

    #[test]
    fn a_record_counts_while_its_subnet_is_leased() {
        let mut names = Names::default();
        names.set(record("n1", "10.1.1.0/24", &[("web", [10, 1, 1, 2])]));
        assert_eq!(names.find("web"), Found::Nothing);
        names.lease(net("10.1.1.0/24"));
        assert_eq!(names.find("web"), addresses(&[[10, 1, 1, 2]]));
        names.release(net("10.1.1.0/24"));
        assert_eq!(names.find("web"), Found::Nothing);
        names.lease(net("10.1.1.0/24"));
        assert_eq!(names.find("web.n1"), addresses(&[[10, 1, 1, 2]]));
    }

    #[test]
    fn records_are_read_as_they_are_written_and_others_refused() {
        let good = record("n1", "10.1.1.0/24", &[("web", [10, 1, 1, 2])]);
        let (json, 0) = good.to_json() else { panic!() };
        assert_eq!(
            json,
            r#"{"node":"n1","subnet":"10.1.1.0/24","pods":[{"name":"web","address":"10.1.1.2"}]}"#
        );
        let read = |key: &str, value: &str| {
            let entry = Entry {
                key: key.to_owned(),
                value: value.to_owned(),
                revision: 1,
                created: 0,
                ttl: None,
            };
            NodeRecord::read("/p", &entry)
        };
        let key = names_key("/p", net("10.1.1.0/24"));
        assert_eq!(key, "/p/muslin/pods/10.1.1.0-24");
        let padded = format!("{json}{}", " ".repeat(MAX_RECORD - json.len()));
        for text in [&json, &padded] {
            assert_eq!(read(&key, text), Ok(good.clone()));
        }
        for bad in [
            "/p/muslin/pods/",
            "/p/muslin/pods/10.1.1.7-24",
            "/p/muslin/pods/10.1.1.0-24&fd00::1-56",
            "/p/subnets/10.1.1.0-24",
            "/p/muslin/pods/10.1.1.0-24/x",
        ] {
            assert_eq!(read(bad, &json), Err(InvalidNodeRecord::Key), "{bad}");
        }
        let refused = |value: &str| read(&key, value).unwrap_err().to_string();
        for (from, to, why) in [
            ("10.1.1.0/24", "10.1.2.0/24", "subnet 10.1.2.0/24"),
            ("1.2\"", "2.2\"", "10.1.2.2 is not an address"),
            ("1.2\"", "1.0\"", "10.1.1.0 is not an address"),
            ("1.2\"", "1.1\"", "10.1.1.1 is not an address"),
            ("1.2\"", "1.255\"", "10.1.1.255 is not an address"),
            ("10.1.1.2", "fd00::2", "fd00::2 is not an address"),
            ("10.1.1.2", "10.1.1.2,fd00::2", "is not an address"),
            ("0/24", "0/24,fd00::/64", "subnet 10.1.1.0/24,fd00::/64"),
            ("web", "We b", "not a pod name"),
            ("n1", "n_1", "not a pod name"),
            ("pods", "others", "missing field"),
            ("{", "[", "not a node's record"),
        ] {
            let refused = refused(&json.replacen(from, to, 1));
            assert!(refused.contains(why), "{refused}");
        }
        let pod = r#"{"name":"web","address":"10.1.1.2"}"#;
        let twice = json.replace(pod, &format!("{pod},{pod}"));
        assert!(refused(&twice).contains("10.1.1.2 twice"));
        assert!(refused(&" ".repeat(MAX_RECORD + 1)).contains("bytes"));
    }

    #[test]
    fn a_record_of_both_ip_versions_counts_for_what_is_leased() {
        let json = concat!(
            r#"{"node":"n1","subnet":"10.1.1.0/24,fd00:1::/64","#,
            r#""pods":[{"name":"web","address":"10.1.1.2,fd00:1::2"}]}"#
        );
        let subnet: Nets = "10.1.1.0/24,fd00:1::/64".parse().unwrap();
        let read = |json: &str| {
            let entry = Entry {
                key: "/p/muslin/pods/10.1.1.0-24&fd00:1::-64".to_owned(),
                value: json.to_owned(),
                revision: 1,
                created: 0,
                ttl: None,
            };
            NodeRecord::read("/p", &entry)
        };
        let record = read(json).unwrap();
        assert_eq!((record.subnet, record.to_json().0.as_str()), (subnet, json));
        for (from, to, why) in [
            ("fd00:1::2", "fd00:1::1", "is not an address"),
            ("fd00:1::2", "fd00:2::2", "is not an address"),
            (",fd00:1::/64", "", "about the subnet 10.1.1.0/24"),
        ] {
            let refused = read(&json.replace(from, to)).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
        let one = r#"{"name":"web","address":"10.1.1.2,fd00:1::2"}"#;
        let twice = json.replace(
            one,
            &format!(r#"{one},{{"name":"b","address":"fd00:1::2"}}"#),
        );
        assert!(matches!(read(&twice), Err(InvalidNodeRecord::Twice(_))));

        let mut names = Names::default();
        let ips = |texts: &[&str]| {
            Found::Addresses(texts.iter().map(|text| text.parse().unwrap()).collect())
        };
        names.lease(net("10.1.1.0/24"));
        names.set(record.clone());
        assert_eq!(names.find("web"), ips(&["10.1.1.2"]));
        names.lease(subnet.ipv6().unwrap());
        assert_eq!(names.find("web.n1"), ips(&["10.1.1.2", "fd00:1::2"]));
        assert_eq!(names.name_of("fd00:1::2".parse().unwrap()), Some("web.n1"));
        names.remove(net("10.1.1.0/24").into());
        assert_eq!(names.find("web"), ips(&["10.1.1.2", "fd00:1::2"]));
        names.remove(subnet);
        assert_eq!(names.find("web"), Found::Nothing);
        assert!(names.parents.is_empty() && names.by_address.is_empty());
    }

    #[test]
    fn a_record_has_as_many_pods_as_it_may() {
        let name = |i: u32| format!("{}{i:06}", "x".repeat(30));
        let pods = (0..8000).map(|i| PodRecord {
            name: name(i).parse().unwrap(),
            address: Ipv4Addr::from(0x0a01_0002 + i).into(),
        });
        let all = NodeRecord {
            pods: pods.collect(),
            ..record("n1", "10.1.0.0/16", &[])
        };
        let (json, left_out) = all.to_json();
        let lacking = MAX_RECORD - json.len();
        assert!(lacking < 80, "{lacking}");
        let mut read: NodeRecord = serde_json::from_str(&json).unwrap();
        assert_eq!(read.pods, all.pods[..8000 - left_out]);
        assert!((100..2000).contains(&left_out), "{left_out}");

        let longer = |name: &PodName, by: usize| format!("{name}{}", "x".repeat(by)).parse();
        read.node = longer(&read.node, lacking.min(60)).unwrap();
        let last = read.pods.last_mut().unwrap();
        last.name = longer(&last.name, lacking.saturating_sub(60)).unwrap();
        let (json, left_out) = read.to_json();
        assert_eq!((json.len(), left_out), (MAX_RECORD, 0));
        read.pods.push(all.pods[7999].clone());
        assert_eq!(read.to_json(), (json, 1));
        read.pods.pop();
        let last = read.pods.last_mut().unwrap();
        last.name = longer(&last.name, 1).unwrap();
        assert_eq!(read.to_json().1, 1);
    }
}
