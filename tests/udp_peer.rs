//! A peer that speaks flannel's UDP format by a kernel TUN device, and a muslin node carry each
//! other's packets.
//!
//! The peer's proxy does what flannel's does: it decrements the time to live in both directions,
//! patches the checksum and knows nothing else.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::{Child, Stdio};
use std::sync::Arc;

use muslin::agent::Agent;
use muslin_lab::flannel::{self, Flannel, KERNEL_IP, NODE_IP};
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};

/// MTU of the underlay in bytes.
const UNDERLAY: u16 = 1500;
/// MTU of pods: less UDP and IP headers.
const MTU: u16 = UNDERLAY - 28;
/// Where proxies listen.
const PORT: u16 = 8285;
/// Tells the proxy that it is one.
const PROXY: &str = "MUSLIN_TEST_PROXY";

/// The proxy's process; it ends with its standard input.
struct Proxy(Child);

impl Proxy {
    fn start(host: &Host) -> Self {
        let mut command = host.command(std::env::current_exe().unwrap());
        let child = command
            .args(["--ignored", "--exact", "proxy"])
            .env(PROXY, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let proxy = Self(child.unwrap());
        poll_until(SOON, "flannel0", || {
            let output = host.output(&["ip", "link", "show", "flannel0"]);
            output.status.success().then_some(())
        });
        proxy
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "the proxy's process, which the other tests start in their labs"]
fn proxy() {
    if std::env::var_os(PROXY).is_none() {
        return;
    }
    let tun = tun_tap::Iface::without_packet_info("flannel0", tun_tap::Mode::Tun).unwrap();
    let tun = Arc::new(tun);
    let socket = Arc::new(UdpSocket::bind((KERNEL_IP, PORT)).unwrap());
    let peer = SocketAddrV4::new(NODE_IP, PORT);
    let (from, to) = (tun.clone(), socket.clone());
    std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok(len) = from.recv(&mut buffer) {
            if let Some(packet) = hop(&mut buffer[..len]) {
                let _ = to.send_to(packet, peer);
            }
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((len, _)) = socket.recv_from(&mut buffer) {
            if let Some(packet) = hop(&mut buffer[..len]) {
                let _ = tun.send(packet);
            }
        }
    });
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
}

/// Decrements the time to live as flannel's proxy does (RFC 1624), unless it ends here.
fn hop(packet: &mut [u8]) -> Option<&[u8]> {
    if packet.len() < 20 || packet[0] >> 4 != 4 || packet[8] <= 1 {
        return None;
    }
    packet[8] -= 1;
    let sum = u16::from_be_bytes([packet[10], packet[11]]);
    let (sum, carry) = sum.overflowing_add(0x100);
    let sum = sum + u16::from(carry);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    Some(packet)
}

/// A kernel with a pod, and a node with a pod, that reach each other.
struct Bed {
    /// An agent on the kernel's host: it sends from `.0`.
    host: Agent,
    theirs: Agent,
    ours: Agent,
    node: Node,
    _proxy: Proxy,
    _flannel: Flannel,
    _lab: Lab,
}

impl Bed {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        let flannel = Flannel::new(&lab, MTU);
        let proxy = Proxy::start(&flannel.host);
        flannel.host.sh(&format!(
            "ip addr add {base}/32 dev flannel0
             ip link set flannel0 mtu {MTU} up
             ip route add {network} dev flannel0",
            base = flannel::kernel(0),
            network = flannel::NETWORK,
        ));
        let host = lab.host("node", NODE_IP);
        let store = flannel::store(&lab, "udp", &format!("port = {PORT}"), None);
        let config = NodeConfig::new("n", NODE_IP, &store).with("--mtu", UNDERLAY);
        let node = config.start(&host);
        let address = flannel::node(2).to_string();
        Some(Self {
            host: flannel.host.agent(),
            theirs: flannel.pod.agent(),
            ours: node.pod_after("pod", &["--ip", &address], "ip link set eth0 mtu 1500"),
            node,
            _proxy: proxy,
            _flannel: flannel,
            _lab: lab,
        })
    }
}

#[test]
fn every_address_answers_pings_from_everywhere() {
    let Some(mut bed) = Bed::new() else { return };
    assert_eq!(bed.node.mtu(), MTU);
    for to in [flannel::kernel(2), flannel::kernel(1), flannel::kernel(0)] {
        traffic::ping(&mut bed.ours, to);
    }
    for to in [flannel::node(2), flannel::node(1), flannel::node(0)] {
        traffic::ping(&mut bed.theirs, to);
        traffic::ping(&mut bed.host, to);
    }
    assert_eq!(bed.node.losses(), Default::default());
}

#[test]
fn packets_of_the_mtu_pass_and_larger_ones_are_reported() {
    let Some(mut bed) = Bed::new() else { return };
    let (theirs, ours): (Ipv4Addr, _) = (flannel::kernel(2), flannel::node(2));
    traffic::fits(&mut bed.ours, theirs, MTU);
    traffic::fits(&mut bed.theirs, ours, MTU);
    traffic::exceeds(&mut bed.ours, theirs, MTU, flannel::node(1));
    let pinged = traffic::ping_of_size(&mut bed.ours, theirs, 4000, false);
    assert!(pinged.is_perfect(1), "{pinged:?}");
    let pinged = traffic::ping_of_size(&mut bed.theirs, ours, 4000, false);
    assert!(pinged.is_perfect(1), "{pinged:?}");
    traffic::expires(&mut bed.ours, theirs, 1, flannel::node(1));
    // The kernel's side decrements twice.
    traffic::expires(&mut bed.theirs, ours, 3, flannel::node(1));
}

#[test]
fn a_hundred_megabytes_arrive_in_both_directions() {
    let Some(mut bed) = Bed::new() else { return };
    let port = bed.theirs.listen(0).unwrap();
    traffic::transfer(&mut bed.ours, flannel::kernel(2), port, traffic::BULK);
    let port = bed.ours.listen(0).unwrap();
    traffic::transfer(&mut bed.theirs, flannel::node(2), port, traffic::BULK);
}
