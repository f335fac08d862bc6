//! A tunnel over ordinary UDP sockets: two nodes, each a thread with a [`Datapath`], one pod and one
//! socket on loopback, exchange VXLAN datagrams, through which pod 1 pings pod 2.
//!
//! ```text
//! cargo run -p muslin-stack --example tunnel_over_udp
//! ```

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::{thread, time};

use etherparse::{Icmpv4Type, PacketBuilder, SlicedPacket, TransportSlice};
use muslin_encap::IpVersion;
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::Format;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use muslin_stack::addresses::Nets;
use muslin_stack::datapath::egress::{self, Egress, NoHost, Policy};
use muslin_stack::datapath::node::{Node, NodeConfig, Verdict};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::datapath::{Datapath, Output};
use muslin_stack::drops::DropReason;
use muslin_stack::{EthernetAddress, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The port of either node's only pod.
const POD: PortId = PortId(1);
/// How long the socket waits, since somebody else may have had the answer meanwhile.
const WAIT: time::Duration = time::Duration::from_millis(20);

/// Node 1 or 2 with its pod, and the other as its peer; nothing leaves the overlay.
fn data_path(now: Instant, number: u8, peer: SocketAddrV4) -> Result<Datapath> {
    let other = 3 - number;
    // What VXLAN's headers leave of a link's MTU: 1,450 bytes.
    let mtu = Format::Vxlan.inner_mtu(Mtu::ETHERNET, IpVersion::Ipv4)?;
    let vtep_mac = |node| VtepMac::from_random([2, 0, 0, 1, node, 0]);
    let (vni, mac) = (Vni::new(1)?, vtep_mac(number));
    let subnet = format!("10.244.{number}.0/24").parse::<Nets>()?;
    let gateway_mac = EthernetAddress(gateway_mac(number));
    let mac_v6 = None;
    let tunnel = Tunnel::Vxlan { vni, mac, mac_v6 };
    // In earnest the seed is random: nobody may know how tables are hashed.
    let config = NodeConfig::new(subnet, gateway_mac, tunnel, mtu, 7);
    let mut node = Node::new(config, now)?;
    // It may send from these addresses only.
    let pod = Attachment::new(EthernetAddress(pod_mac(number)), vec![pod(number).into()]);
    node.attach(POD, pod);
    // An index of tables: the second peer is 1, and who goes leaves its number.
    let id = PeerId(0);
    let peer = Peer::new(id, format!("10.244.{other}.0/24").parse()?, peer.into());
    node.set_peer(peer.with_vtep(vtep_mac(other)));
    let config = egress::EgressConfig::new(Policy::closed(), mtu, 7);
    Ok(Datapath::new(node, Egress::new(config, now)))
}

/// Both ends of a node: its socket, and what its pod has got, in place of a TAP device.
struct Ends {
    socket: UdpSocket,
    inbox: Vec<Vec<u8>>,
}

impl Ends {
    /// Does what a verdict says of the packet that the buffer holds now.
    ///
    /// # Errors
    /// Why it was lost after all: the node has counted it as gone, and is to be told.
    fn carry_out(
        &mut self,
        verdict: Verdict,
        packet: &mut PacketBuf<'_>,
    ) -> std::result::Result<(), DropReason> {
        // No device finishes checksums behind us. Superpackets, which `offload::split` takes apart,
        // come out only where some go in.
        packet.complete_checksum();
        let bytes = packet.as_slice();
        match verdict {
            Verdict::Peer { destination, .. } => {
                println!("{} bytes of payload go to {destination}", bytes.len());
                let sent = self.socket.send_to(bytes, destination);
                return sent.map(drop).map_err(|_| DropReason::UnderlayFailed);
            }
            Verdict::Port(POD) => self.inbox.push(bytes.to_vec()),
            Verdict::Drop(reason) => println!("a packet is lost: {}", reason.describe()),
            // There are no other ports and no uplink, and a data path keeps what is for egress.
            Verdict::Port(_) | Verdict::Flood { .. } | Verdict::Uplink { .. } | Verdict::Host => {}
            Verdict::Egress | Verdict::Consumed => {}
        }
        Ok(())
    }

    /// Does what is to be done after every call of the data path: what it says of the packet, if
    /// there was one, and of all that it sends of its own accord.
    fn finish(
        &mut self,
        path: &mut Datapath,
        now: Instant,
        packet: Option<(Verdict, PacketBuf<'_>)>,
    ) {
        let packet = packet.map(|(verdict, mut packet)| self.carry_out(verdict, &mut packet));
        let mut lost = packet.and_then(std::result::Result::err);
        loop {
            if let Some(reason) = lost.take() {
                path.node_mut().count_drops(reason, 1);
            }
            match path.poll_output(now) {
                Some(Output::Packet(verdict, mut packet)) => {
                    lost = self.carry_out(verdict, &mut packet).err();
                }
                // For sibling workers; this one has none.
                Some(Output::Message(..)) => {}
                None => break,
            }
        }
    }
}

/// A node's thread, which ends once pod 1 has its answer.
fn run(number: u8, socket: UdpSocket, peer: SocketAddrV4, is_answered: &AtomicBool) -> Result<()> {
    socket.set_read_timeout(Some(WAIT))?;
    // A data path has no clock. Time begins anywhere, and must not go back.
    let start = time::Instant::now();
    let now = || Instant::from_micros(start.elapsed().as_micros() as i64);
    let mut path = data_path(now(), number, peer)?;
    let mut ends = Ends {
        socket,
        inbox: Vec::new(),
    };
    // One buffer for all packets, with room in front for headers that the node puts there.
    let mut storage = vec![0; HEADROOM + 65_535];
    let mut pings = 0;
    while !is_answered.load(Ordering::Relaxed) {
        // What the pod sends: answers, and from pod 1 a ping each second.
        let mut frames = Vec::new();
        for frame in ends.inbox.drain(..) {
            frames.extend(receive(number, &frame, is_answered)?);
        }
        if number == 1 && now() >= Instant::from_secs(pings) {
            pings += 1;
            frames.push(echo(1, false)?);
        }
        for frame in frames {
            storage[HEADROOM..HEADROOM + frame.len()].copy_from_slice(&frame);
            let mut packet = PacketBuf::new(&mut storage, HEADROOM, frame.len())?;
            let verdict = path.from_port(now(), POD, &mut packet, &mut NoHost);
            ends.finish(&mut path, now(), Some((verdict, packet)));
        }
        // What the peer sends. Any error will do for there being nothing.
        if let Ok((len, source)) = ends.socket.recv_from(&mut storage[HEADROOM..]) {
            let mut packet = PacketBuf::new(&mut storage, HEADROOM, len)?;
            let verdict = path.from_underlay(now(), source, &mut packet, &mut NoHost);
            ends.finish(&mut path, now(), Some((verdict, packet)));
        }
        if now() >= path.poll_at() {
            path.handle_timeout(now(), &mut NoHost);
            ends.finish(&mut path, now(), None);
        }
        if now() > Instant::from_secs(10) {
            return Err("no answer in 10 s".into());
        }
    }
    // Every packet that came in or began here has ended in exactly one way.
    let counters = path.node().counters();
    assert_eq!(counters.came(), counters.went());
    let (sent, delivered) = (counters.sent, counters.delivered);
    println!("node {number} has sent {sent} packets, and delivered {delivered}");
    Ok(())
}

/// What is of node 1 or 2.
fn pod(node: u8) -> Ipv4Addr {
    [10, 244, node, 2].into()
}

fn pod_mac(node: u8) -> [u8; 6] {
    [2, 0, 0, 0, node, 2]
}

fn gateway_mac(node: u8) -> [u8; 6] {
    [2, 0, 0, 0, node, 1]
}

/// A pod's echo request to the other pod, or its reply, by way of its gateway.
fn echo(from: u8, is_reply: bool) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(pod_mac(from), gateway_mac(from));
    let builder = builder.ipv4(pod(from).octets(), pod(3 - from).octets(), 64);
    let builder = match is_reply {
        true => builder.icmpv4_echo_reply(1, 1),
        false => builder.icmpv4_echo_request(1, 1),
    };
    let mut frame = Vec::new();
    builder.write(&mut frame, b"hello")?;
    Ok(frame)
}

/// What a pod says to a frame.
fn receive(number: u8, frame: &[u8], is_answered: &AtomicBool) -> Result<Option<Vec<u8>>> {
    let Some(TransportSlice::Icmpv4(icmp)) = SlicedPacket::from_ethernet(frame)?.transport else {
        return Ok(None);
    };
    match icmp.icmp_type() {
        Icmpv4Type::EchoRequest(_) => {
            println!("pod {number} is pinged");
            return echo(number, true).map(Some);
        }
        Icmpv4Type::EchoReply(_) => {
            println!("pod {number} has its answer");
            is_answered.store(true, Ordering::Relaxed);
        }
        other => println!("pod {number} gets {other:?}"),
    }
    Ok(None)
}

fn main() -> Result<()> {
    let (one, two) = (
        UdpSocket::bind("127.0.0.1:0")?,
        UdpSocket::bind("127.0.0.1:0")?,
    );
    let address = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let first = address(one.local_addr()?.port());
    let second = address(two.local_addr()?.port());
    let is_answered = &AtomicBool::new(false);
    thread::scope(|scope| {
        let one = scope.spawn(move || run(1, one, second, is_answered));
        let two = scope.spawn(move || run(2, two, first, is_answered));
        for node in [one, two] {
            node.join().map_err(|_| "a node has panicked")??;
        }
        Ok(())
    })
}
