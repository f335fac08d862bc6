//! The other side as flannel sets it up with the kernel's devices: a host with a bridge `cni0`,
//! and a pod behind it.

use std::net::Ipv4Addr;

use super::{Host, Lab};

/// The pods of both sides.
pub const NETWORK: &str = "10.244.0.0/16";
/// Where the kernel's side is on the underlay.
pub const KERNEL_IP: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
/// Where the node is on the underlay.
pub const NODE_IP: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// The kernel's subnet.
pub const KERNEL_SUBNET: &str = "10.244.1.0/24";
/// The node's subnet.
pub const NODE_SUBNET: &str = "10.244.2.0/24";

/// An address of the kernel's subnet.
pub fn kernel(offset: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, offset)
}

/// An address of the node's subnet.
pub fn node(offset: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 2, offset)
}

/// A host with flannel's and CNI's devices but for the tunnel's.
pub struct Flannel {
    /// The host.
    pub host: Host,
    /// Its pod, at `.2`.
    pub pod: Host,
}

impl Flannel {
    /// Sets it up, with this MTU for the pod.
    pub fn new(lab: &Lab, mtu: u16) -> Self {
        Self::at(lab, ("kernel", KERNEL_IP), kernel, mtu)
    }

    /// The same on a host of this name and address, with a subnet's addresses.
    pub fn at(
        lab: &Lab,
        (name, address): (&str, Ipv4Addr),
        subnet: fn(u8) -> Ipv4Addr,
        mtu: u16,
    ) -> Self {
        let host = lab.host(name, address);
        let pod = lab.namespace(&format!("{name}'s pod"));
        lab.cable((&host, "veth0"), (&pod, "eth0"));
        host.sh(&format!(
            "echo 1 >/proc/sys/net/ipv4/ip_forward
             ip link add cni0 type bridge
             ip link set veth0 master cni0
             ip addr add {}/24 dev cni0
             ip link set cni0 up",
            subnet(1)
        ));
        pod.sh(&format!(
            "ip addr add {}/24 dev eth0
             ip route add default via {}",
            subnet(2),
            subnet(1)
        ));
        let flannel = Self { host, pod };
        flannel.set_mtu(mtu);
        flannel
    }

    /// Sets the MTU of the pod and of what is between it and the tunnel.
    pub fn set_mtu(&self, mtu: u16) {
        self.pod.sh(&format!("ip link set eth0 mtu {mtu}"));
        self.host.sh(&format!(
            "ip link set veth0 mtu {mtu}; ip link set cni0 mtu {mtu}"
        ));
    }
}

/// flannel's device on a host of this address, for a subnet with this base. Its MAC address, which is
/// returned, is the kernel's choice.
pub fn device(host: &Host, address: Ipv4Addr, base: Ipv4Addr, mtu: u16) -> String {
    host.sh(&format!(
        "ip link add flannel.1 type vxlan id 1 dstport 8472 nolearning local {address} dev eth0
         ip link set flannel.1 mtu {mtu} up
         ip addr add {base}/32 dev flannel.1"
    ));
    let text = host.run(&["ip", "-json", "link", "show", "flannel.1"]);
    let links: serde_json::Value = serde_json::from_str(&text).unwrap();
    links[0]["address"].as_str().unwrap().to_owned()
}

/// What flanneld sets up for another node's record, whose key ends in this subnet, like
/// `10.244.2.0-24`.
pub fn set_up(host: &Host, subnet: &str, public_ip: &str, mac: &str) {
    let (base, prefix) = parts(subnet);
    host.sh(&format!(
        "ip neigh replace {base} lladdr {mac} dev flannel.1 nud permanent
         bridge fdb replace {mac} dev flannel.1 dst {public_ip} self permanent
         ip route replace {prefix} via {base} dev flannel.1 onlink"
    ));
}

/// The base address and the prefix of a key's subnet.
pub fn parts(subnet: &str) -> (&str, String) {
    let (base, len) = subnet.split_once('-').unwrap();
    (base, format!("{base}/{len}"))
}

/// A VXLAN node's record as flannel writes it, as it was seen on a running cluster.
pub fn record(public_ip: Ipv4Addr, mac: &str) -> String {
    format!(
        r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    )
}

/// The same as a muslin node writes it: what flannel's have comes first, and what it adds they ignore.
pub fn muslin_record(public_ip: Ipv4Addr, mac: &str) -> String {
    let flannels = record(public_ip, mac);
    let flannels = flannels.strip_suffix('}').unwrap();
    format!(r#"{flannels},"Muslin":{{"PartialChecksums":true}}}}"#)
}

/// Writes a file of leases for both sides, and returns the store's URL.
pub fn store(lab: &Lab, backend: &str, more: &str, macs: Option<(&str, &str)>) -> String {
    let path = lab.directory().join("peers.toml");
    let mac = |mac: &str| format!("vtep-mac = \"{mac}\"\n");
    let (theirs, ours) =
        macs.map_or_else(Default::default, |(theirs, ours)| (mac(theirs), mac(ours)));
    let text = format!(
        "network = \"{NETWORK}\"\nbackend = \"{backend}\"\n{more}\n\
         [[node]]\npublic-ip = \"{KERNEL_IP}\"\nsubnet = \"{KERNEL_SUBNET}\"\n{theirs}\n\
         [[node]]\npublic-ip = \"{NODE_IP}\"\nsubnet = \"{NODE_SUBNET}\"\n{ours}"
    );
    std::fs::write(&path, text).unwrap();
    format!("file:{}", path.display())
}
