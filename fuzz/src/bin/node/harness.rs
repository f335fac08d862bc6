//! The node with what must be true of it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use ipnet::{IpNet, Ipv4Net};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::transport::Transport;
use muslin_encap::ip::v4;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::split::Checksums;
use muslin_encap::offload::virtio::{self, Checksum, Header};
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use muslin_stack::addresses::Nets;
use muslin_stack::datapath::neighbour::State;
use muslin_stack::datapath::node::{Limits, Node, NodeConfig, Verdict};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::datapath::work::{self, CALL, STORM_BURST, STORM_RATE, TURN};
use muslin_stack::drops::DropReason;
use muslin_stack::{Duration, Instant};

use crate::event::{Event, GATEWAY_MAC, address, address_v6, mac};
use crate::ledger::Ledger;
use crate::packet::{
    self, Offload, SUBNET, check_sender, inner, ipv4, is_martian, is_own, is_own_arp,
};
use crate::v6;

const VTEP: u8 = 15;
/// That of IPv6.
const VTEP_V6: u8 = 14;
/// Packets of its own a node may hold.
const OUTPUT_LEN: usize = 256;
/// Ports and peers have identities below this.
const IDS: usize = 6;
/// Packets that may wait for a neighbour.
const WAITING_LEN: usize = 4;
/// What is outside of it is for egress.
const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);
/// The subnets of peers, as base and prefix length; behind them are those of IPv6.
const SUBNETS: [([u8; 4], u8); 8] = [
    ([10, 244, 2, 0], 24),
    ([10, 244, 3, 0], 24),
    ([10, 244, 2, 128], 25),
    ([10, 244, 2, 0], 25),
    ([10, 244, 0, 0], 16),
    ([10, 244, 1, 0], 24),
    ([10, 244, 1, 0], 25),
    ([0; 4], 0),
];

/// Where a packet came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    Port(PortId),
    Underlay(IpAddr),
    Egress,
}

/// A frame or the payload of a datagram on its way in.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'a> {
    pub bytes: &'a [u8],
    pub header: Header,
    /// How many of the bytes are not with the others.
    pub tail: usize,
}

/// What became of it.
#[derive(Debug)]
pub struct Outgoing {
    pub verdict: Verdict,
    pub bytes: Vec<u8>,
    header: Header,
    tail: usize,
}

#[derive(Debug)]
pub struct Port {
    attachment: Attachment,
    received: u64,
    sent: u64,
    /// Frames of the turn that it has.
    frames: u64,
    /// Work of its frames that were flooded, since it was attached.
    flooded: u64,
    since: Instant,
}

/// Packets that went through the node, as its callers count them.
#[derive(Debug, Default)]
struct Books {
    received: u64,
    originated: u64,
    delivered: u64,
    sent: u64,
    flooded: u64,
    consumed: u64,
    dropped: u64,
}

/// A node and a simple model of it.
pub struct Harness {
    node: Node,
    vxlan: bool,
    /// Whether it has IPv6, too.
    dual: bool,
    pub check_peers: bool,
    has_egress: bool,
    mtu: usize,
    limits: Limits,
    now: Instant,
    ports: [Option<Port>; IDS],
    peers: [Option<Peer>; IDS],
    ledger: Ledger,
    pub ledger_v6: v6::Ledger,
    /// Whether a pod sent something since the output was last polled to its end.
    pods_sent: bool,
    /// Whether an IP packet came since then.
    packets_came: bool,
    /// Whether a peer changed since then: what was queued for it before is in flight.
    peers_changed: bool,
    /// Whether the gateway's services sent something since then.
    gateway_sent: bool,
    /// Whether something of theirs ever waited for a neighbour.
    gateway_waits: bool,
    books: Books,
    /// Whether two ports ever had the same pod. No control plane does that, and the addresses go
    /// with whichever leaves.
    shared: bool,
    storage: Vec<u8>,
}

/// Where a frame's checksum is to be finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChecksumPlace {
    /// Nowhere, or outside of the frame.
    None,
    /// In front of what IP carries, which is refused.
    InFront,
    /// Where TCP and UDP have it.
    Usual,
    /// Anywhere else: the guard must see what it becomes.
    Odd,
}

fn checksum_place(frame: &[u8], header: Header) -> ChecksumPlace {
    let Checksum::Partial { start, offset } = header.checksum else {
        return ChecksumPlace::None;
    };
    if header.check(frame.len()).is_err() {
        return ChecksumPlace::None;
    }
    let start = usize::from(start);
    let field = start + usize::from(offset);
    let is_usual =
        Transport::parse(frame, 14).is_ok_and(|at| at.l4 == start && at.checksum_offset() == field);
    let network_end = match frame.get(12..14) {
        Some([0x08, 0x00]) => 14 + frame.get(14).map_or(0, |first| usize::from(first & 15) * 4),
        Some([0x86, 0xdd]) => 14 + 40,
        _ => 14,
    };
    match start {
        _ if is_usual => ChecksumPlace::Usual,
        start if start < network_end => ChecksumPlace::InFront,
        _ => ChecksumPlace::Odd,
    }
}

/// The frame with its checksum, as RFC 1071 has it.
fn finish(frame: &[u8], header: Header) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if let Checksum::Partial { start, offset } = header.checksum {
        let start = usize::from(start);
        let words = frame[start..].chunks(2);
        let sum = words.fold(0_u64, |sum, word| {
            sum + u64::from(word[0]) * 256 + word.get(1).map_or(0, |low| u64::from(*low))
        });
        let mut folded = sum;
        while folded > 0xffff {
            folded = (folded & 0xffff) + (folded >> 16);
        }
        // Zero would mean that there is none.
        let checksum = match !(folded as u16) {
            0 => 0xffff,
            checksum => checksum,
        };
        let field = start + usize::from(offset);
        frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    frame
}

impl Harness {
    /// Every run begins with pods 2 and 3, guarded, at ports 0 and 1, pod 4 at port 2, guarded if
    /// the first byte says so, and peers 0 and 1. Other bits of it say whether there is egress, and
    /// whether there is IPv6, which not every MTU has room for; then peer 4 is one of that.
    pub fn new(choices: u8) -> Self {
        let vxlan = choices & 1 == 0;
        let check_peers = choices & 2 == 0;
        let mtu = [1450, 68, 576, 65_535][usize::from(choices >> 2 & 3)];
        let dual = choices & 128 != 0 && vxlan && mtu > 1280;
        let entries = if choices & 16 != 0 { 2 } else { 6 };
        let mut limits = Limits::default();
        (limits.fdb, limits.neighbours) = (entries, entries);
        let tunnel = if vxlan {
            Tunnel::Vxlan {
                vni: Vni::new(1).expect("it is small"),
                mac: vtep(VTEP),
                mac_v6: dual.then(|| vtep(VTEP_V6)),
            }
        } else {
            Tunnel::Udp
        };
        let inner = Mtu::new(mtu).expect("it is in range");
        let nets = Nets::with_ipv4(SUBNET, dual.then_some(v6::SUBNET));
        let mut config = NodeConfig::new(nets, GATEWAY_MAC, tunnel, inner, 7);
        if dual {
            config.mtu_v6 = Mtu::new(mtu - 20).expect("it is in range");
        }
        config.guard.peers = check_peers;
        config.limits = limits;
        let now = Instant::ZERO;
        let mut harness = Self {
            node: Node::new(config, now).expect("the subnet has room"),
            vxlan,
            dual,
            check_peers,
            has_egress: choices & 64 != 0,
            mtu: mtu as usize,
            limits,
            now,
            ports: Default::default(),
            peers: Default::default(),
            ledger: Ledger::default(),
            ledger_v6: v6::Ledger::default(),
            pods_sent: false,
            packets_came: false,
            peers_changed: false,
            gateway_sent: false,
            gateway_waits: false,
            books: Books::default(),
            shared: false,
            storage: vec![0; HEADROOM + 2000],
        };
        if harness.has_egress {
            let nets = Nets::with_ipv4(NETWORK, dual.then_some(v6::NETWORK));
            harness.node.set_egress(Some(nets));
        }
        for port in 0..3 {
            harness.apply(Event::Attach {
                port,
                pod: port + 2,
                guarded: port < 2 || choices & 32 == 0,
            });
        }
        for id in 0..2 {
            harness.apply(Event::SetPeer {
                id,
                subnet: id,
                host: id,
                vtep: true,
            });
        }
        if dual {
            harness.apply(Event::SetPeer {
                id: 4,
                subnet: 8,
                host: 0,
                vtep: true,
            });
        }
        harness
    }

    /// The MTU of the way to peers in IPv6.
    pub fn mtu_v6(&self) -> usize {
        self.mtu - 20
    }

    pub fn has_egress(&self) -> bool {
        self.has_egress
    }

    pub fn pods_sent(&self) -> bool {
        self.pods_sent
    }

    /// Whether just one pod has an address.
    pub fn is_attached(&self, address: IpAddr) -> bool {
        let mut ports = self.attached();
        let attached = ports.any(|(_, port)| port.attachment.addresses.contains(&address));
        attached && !self.shared
    }

    /// Gives the node a packet of egress.
    pub fn take_from_egress(&mut self, bytes: &[u8], header: Header) -> Outgoing {
        let incoming = Incoming {
            bytes,
            header,
            tail: 0,
        };
        let out = self.through(incoming, |node, now, packet| node.from_egress(now, packet));
        self.books.originated += 1;
        self.count(out.verdict);
        out
    }

    /// Egress has sent something, maybe for the gateway.
    pub fn note_gateway(&mut self, is_gateways: bool) {
        self.packets_came = true;
        self.pods_sent |= is_gateways;
        self.gateway_sent |= is_gateways;
    }

    /// The frame that goes to a peer of IPv6, after a look at what is around it.
    pub fn check_tunnel_v6<'a>(
        &self,
        id: PeerId,
        destination: SocketAddr,
        out: &'a [u8],
    ) -> Option<&'a [u8]> {
        let peer = self.peer(id);
        assert!(destination == peer.address || self.peers_changed);
        assert!(destination.is_ipv6(), "inner IPv6 goes over IPv4");
        assert_eq!(out[..8], [8, 0, 0, 0, 0, 0, 1, 0]);
        let frame = &out[8..];
        let theirs = peer.vtep_mac.map(|mac| mac.get().0);
        assert!(theirs.is_some_and(|mac| frame[..6] == mac) || self.peers_changed);
        (frame[6..12] == vtep(VTEP_V6).get().0).then_some(frame)
    }

    /// The node's MTU.
    pub fn mtu(&self) -> usize {
        self.mtu
    }

    /// Does what the event says, and checks what the node answers at once.
    ///
    /// # Panics
    /// If that is wrong.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Frame { port, bytes } => {
                self.frame(PortId(port.into()), &bytes, Header::default());
            }
            Event::Superpacket {
                port,
                header,
                bytes,
            } => self.superpacket(PortId(port.into()), &header, &bytes),
            Event::Datagram { host, bytes } => self.datagram(host, &bytes, Header::default(), 0),
            Event::Merged {
                host,
                header,
                bytes,
                tail,
            } => {
                // A merger has looked at all of it.
                if let Ok(header) = Header::parse(&header)
                    && header.check(bytes.len() - tail).is_ok()
                {
                    self.datagram(host, &bytes, header, tail);
                }
            }
            Event::FromEgress { header, bytes } => {
                let header = Header::parse(&header).unwrap_or_default();
                if header.check(bytes.len()).is_ok() {
                    self.packet_of_egress(&bytes, header);
                }
            }
            Event::Attach { port, pod, guarded } => self.attach(PortId(port.into()), pod, guarded),
            Event::Detach(port) => {
                let was = self.ports[usize::from(port)].take().is_some();
                assert_eq!(self.node.detach(PortId(port.into())), was);
            }
            Event::SetPeer {
                id,
                subnet,
                host,
                vtep: has_vtep,
            } => {
                let subnet = self::subnet(subnet);
                let address = match subnet {
                    IpNet::V4(_) => underlay(host).into(),
                    IpNet::V6(_) => SocketAddr::new(v6::underlay(host), 8472),
                };
                let mut peer = Peer::new(PeerId(id.into()), subnet, address);
                peer.vtep_mac = has_vtep.then(|| vtep(8 + id));
                // Nodes of both kinds are in one network.
                if id % 2 == 1 {
                    peer.checksums = Checksums::Partial;
                }
                self.node.set_peer(peer.clone());
                self.peers[usize::from(id)] = Some(peer);
                self.change_peers();
            }
            Event::RemovePeer(id) => {
                let was = self.peers[usize::from(id)].take().is_some();
                assert_eq!(self.node.remove_peer(PeerId(id.into())), was);
                self.change_peers();
            }
            Event::Wait(millis) => {
                self.now += Duration::from_millis(millis);
                self.node.handle_timeout(self.now);
                assert!(self.node.poll_at() > self.now, "a timer spins");
            }
            Event::Hold(_) => {}
        }
    }

    fn attach(&mut self, port: PortId, pod: u8, guarded: bool) {
        // No control plane gives a pod the node's own address.
        if pod < 2 {
            return;
        }
        let mut addresses = vec![address(pod).into()];
        if self.dual {
            addresses.push(address_v6(pod).into());
        }
        let mut attachment = Attachment::new(mac(pod), addresses);
        attachment.guarded = guarded;
        self.node.attach(port, attachment.clone());
        let mac = attachment.mac;
        self.ports[port.0 as usize] = Some(Port {
            attachment,
            received: 0,
            sent: 0,
            frames: 0,
            flooded: 0,
            since: self.now,
        });
        let same = self
            .attached()
            .filter(|(_, other)| other.attachment.mac == mac);
        self.shared |= same.count() > 1;
    }

    fn attached(&self) -> impl Iterator<Item = (PortId, &Port)> {
        let ids = (0..).map(PortId);
        ids.zip(&self.ports)
            .filter_map(|(id, port)| Some((id, port.as_ref()?)))
    }

    pub fn port(&self, id: PortId) -> Option<&Port> {
        self.ports[id.0 as usize].as_ref()
    }

    pub fn peers(&self) -> impl Iterator<Item = &Peer> {
        self.peers.iter().flatten()
    }

    fn peer(&self, id: PeerId) -> &Peer {
        self.peers[id.0 as usize]
            .as_ref()
            .expect("there is such a peer")
    }

    fn superpacket(&mut self, port: PortId, header: &[u8; virtio::LEN], bytes: &[u8]) {
        match Header::parse(header) {
            Ok(header) => self.frame(port, bytes, header),
            Err(_) => {
                let reason = DropReason::VirtioHeader;
                let before = self.node.counters().dropped_for(reason);
                self.node.refuse_frame(port, bytes.len());
                assert_eq!(self.node.counters().dropped_for(reason), before + 1);
                self.count_from(Some(port), Verdict::Drop(reason));
            }
        }
    }

    /// Counts a packet that has come in, and what has become of it.
    fn count_from(&mut self, port: Option<PortId>, verdict: Verdict) {
        self.books.received += 1;
        if let Some(port) = port.and_then(|port| self.ports[port.0 as usize].as_mut()) {
            port.received += 1;
        }
        self.count(verdict);
    }

    fn count(&mut self, verdict: Verdict) {
        let books = &mut self.books;
        *match verdict {
            Verdict::Port(_) | Verdict::Host => &mut books.delivered,
            Verdict::Peer { .. } | Verdict::Uplink { .. } => &mut books.sent,
            Verdict::Flood { .. } => &mut books.flooded,
            Verdict::Egress | Verdict::Consumed => &mut books.consumed,
            Verdict::Drop(_) => &mut books.dropped,
        } += 1;
        if let Verdict::Port(port) = verdict
            && let Some(port) = self.ports[port.0 as usize].as_mut()
        {
            port.sent += 1;
        }
    }

    /// Runs bytes through a call.
    fn through(
        &mut self,
        incoming: Incoming<'_>,
        call: impl FnOnce(&mut Node, Instant, &mut PacketBuf<'_>) -> Verdict,
    ) -> Outgoing {
        let Incoming {
            bytes,
            header,
            tail,
        } = incoming;
        let room = HEADROOM + bytes.len() + 100;
        if self.storage.len() < room {
            self.storage.resize(room, 0);
        }
        self.storage[HEADROOM..HEADROOM + bytes.len()].copy_from_slice(bytes);
        let head = bytes.len() - tail;
        let packet = PacketBuf::new(&mut self.storage, HEADROOM, head);
        let tail = [&bytes[head..]];
        let mut packet = packet.expect("it fits").with_tail(&tail);
        if header != Header::default() {
            packet = packet.with_offload(header);
        }
        let verdict = call(&mut self.node, self.now, &mut packet);
        Outgoing {
            verdict,
            bytes: packet.as_slice().to_vec(),
            header: packet.offload(),
            tail: packet.total_len() - packet.len(),
        }
    }

    fn come(&mut self, packet: &[u8], header: Header, from_egress: bool) {
        let packets = header
            .gso
            .map_or(1, |gso| packet.len() / usize::from(gso.size) + 1);
        self.ledger.come(packet, packets as u16, from_egress);
        self.packets_came = true;
    }

    fn frame(&mut self, port: PortId, bytes: &[u8], header: Header) {
        let raw = Incoming {
            bytes,
            header,
            tail: 0,
        };
        let place = checksum_place(bytes, header);
        let (finished, header) = match place {
            ChecksumPlace::Odd if header.gso.is_none() => {
                (finish(bytes, header), Header::default())
            }
            _ => (bytes.to_vec(), header),
        };
        let bytes = &finished[..];
        if let Some(packet) = inner(bytes) {
            self.come(packet, header, false);
        }
        if let Some(packet) = v6::inner(bytes) {
            self.come_v6(packet, header, false);
            self.packets_came = true;
        }
        let incoming = Incoming {
            bytes,
            header,
            tail: 0,
        };
        self.take_turn(port);
        let out = self.through(raw, |node, now, packet| node.from_port(now, port, packet));
        self.count_from(Some(port), out.verdict);
        self.check_flooded(port, bytes.len(), out.verdict);
        self.pods_sent = true;
        let Some(Port { attachment, .. }) = self.port(port) else {
            assert_eq!(out.verdict, Verdict::Drop(DropReason::UnknownPort));
            return;
        };
        if header.check(bytes.len()).is_err() || place == ChecksumPlace::InFront {
            assert_eq!(out.verdict, Verdict::Drop(DropReason::VirtioHeader));
            return;
        }
        self.check_not_lost(port, incoming, out.verdict);
        if self.dual && header == Header::default() {
            self.check_not_lost_v6(attachment, bytes, out.verdict);
        }
        if matches!(out.verdict, Verdict::Drop(_)) {
            return;
        }
        check_sender(bytes, attachment);
        let to_gateway = bytes[..6] == GATEWAY_MAC.0;
        match out.verdict {
            Verdict::Port(to) if !to_gateway => {
                assert!(self.port(to).is_some(), "{to} is not attached");
                assert_ne!(to, port, "a frame goes back");
                self.check_switched(incoming, &out);
            }
            Verdict::Flood { except } => {
                assert_eq!(except, Some(port));
                assert!(!to_gateway);
                let reserved = matches!(bytes[..6], [0x01, 0x80, 0xc2, 0, 0, 0..16]);
                assert!(!reserved, "a reserved group address is flooded");
                self.check_switched(incoming, &out);
            }
            Verdict::Port(_) | Verdict::Peer { .. } => {
                self.check_routed(From::Port(port), incoming, 14, &out);
            }
            Verdict::Egress => {
                assert!(to_gateway, "a frame of another leaves the overlay");
                self.check_egress(incoming, 14, &out);
            }
            Verdict::Uplink { .. } => panic!("there is no uplink"),
            Verdict::Host => panic!("there is no host interface"),
            Verdict::Consumed | Verdict::Drop(_) => {}
        }
    }

    /// Begins as many turns as a port has had work for too much, which are few, and counts a frame.
    fn take_turn(&mut self, id: PortId) {
        if self.port(id).is_none() {
            return;
        }
        let goes_on = self.node.goes_on(id);
        let mut waits = 0;
        while !self.node.goes_on(id) {
            self.node.begin_turn(id);
            waits += 1;
            assert!(waits < 10, "a frame costs {waits} turns");
        }
        let port = self.ports[id.0 as usize].as_mut().expect("it is there");
        port.frames = if goes_on { port.frames + 1 } else { 1 };
        assert!(port.frames <= TURN / CALL, "a turn has no end");
    }

    /// What a port has flooded is its share, and all of it.
    fn check_flooded(&mut self, id: PortId, len: usize, verdict: Verdict) {
        let others = self.attached().count().saturating_sub(1);
        let work = work::of_packets(others, len);
        let elapsed = self.port(id).map(|port| self.now - port.since);
        let Some(port) = self.ports[id.0 as usize].as_mut() else {
            return;
        };
        match verdict {
            Verdict::Flood { except: Some(_) } => {
                port.flooded += work;
                let millis = elapsed.map_or(0, |elapsed| elapsed.total_millis());
                let share = u64::from(STORM_BURST) + u64::from(STORM_RATE) / 1000 * millis;
                assert!(port.flooded <= share + work, "a storm");
            }
            Verdict::Drop(DropReason::Storm) => {
                assert!(port.flooded + work > STORM_BURST.into(), "no storm");
            }
            _ => {}
        }
    }

    /// Takes a packet from egress, which has only what is for pods of this node, or from the
    /// gateway.
    fn packet_of_egress(&mut self, bytes: &[u8], header: Header) {
        if v6::is_packet(bytes) {
            return self.packet_of_egress_v6(bytes, header);
        }
        let (Some(source), Some(destination)) = (bytes.get(12..16), bytes.get(16..20)) else {
            return;
        };
        let (source, destination) = (ipv4(source), ipv4(destination));
        let is_forged = self.has_egress && NETWORK.contains(&source) && !is_own(source);
        if is_martian(source) || !is_forged && SUBNET.contains(&source) && !is_own(source) {
            return;
        }
        let is_mixed = is_martian(destination) || is_own(destination);
        if is_mixed || destination == SUBNET.broadcast() {
            return;
        }
        self.come(bytes, header, true);
        let incoming = Incoming {
            bytes,
            header,
            tail: 0,
        };
        let out = self.through(incoming, |node, now, packet| node.from_egress(now, packet));
        self.books.originated += 1;
        self.count(out.verdict);
        if is_forged {
            assert!(
                matches!(out.verdict, Verdict::Drop(_)),
                "somebody outside poses as a pod: {:?}",
                out.verdict
            );
            return;
        }
        self.pods_sent |= is_own(source);
        self.gateway_sent |= is_own(source);
        self.gateway_waits |= is_own(source) && out.verdict == Verdict::Consumed;
        let route = self.route(destination);
        if let (Ok(total), Some(offload)) = (v4::check(bytes), self.offload(incoming, 0)) {
            let fits = total.min(offload.longest) <= self.mtu;
            match route {
                Route::Peers(_) if is_own(source) => {
                    self.check_sent_at_once(destination, fits, out.verdict);
                }
                Route::Local => self.check_sent_at_once(destination, fits, out.verdict),
                Route::Peers(_) | Route::None => {
                    assert_eq!(out.verdict, Verdict::Drop(DropReason::NoRoute));
                }
            }
        }
        match out.verdict {
            Verdict::Port(_) | Verdict::Peer { .. } => {
                self.check_routed(From::Egress, incoming, 0, &out);
            }
            Verdict::Flood { .. } | Verdict::Uplink { .. } | Verdict::Host | Verdict::Egress => {
                panic!("a packet from egress goes astray")
            }
            Verdict::Consumed | Verdict::Drop(_) => {}
        }
    }

    /// What fits goes on at once, if it is known where to.
    fn check_sent_at_once(&self, destination: Ipv4Addr, fits: bool, verdict: Verdict) {
        if !fits {
            return;
        }
        match self.route(destination) {
            Route::None => {}
            Route::Peers(_) => {
                let is_sent = matches!(verdict, Verdict::Peer { .. });
                let no_vtep = verdict == Verdict::Drop(DropReason::NoVtepMac);
                assert!(is_sent || no_vtep, "to a peer: {verdict:?}");
            }
            Route::Local => {
                let address = IpAddr::V4(destination);
                let mut ports = self.attached();
                let attached =
                    ports.any(|(_, other)| other.attachment.addresses.contains(&address));
                let is_delivered = matches!(verdict, Verdict::Port(_));
                assert!(
                    !attached || self.shared || is_delivered,
                    "lost: {verdict:?}"
                );
            }
        }
    }

    /// A packet for egress is as it came, and leaves the overlay or is for a service of the gateway.
    fn check_egress(&self, incoming: Incoming<'_>, network: usize, out: &Outgoing) {
        assert!(self.has_egress, "there is no egress");
        let packet = &incoming.bytes[network..];
        if v6::is_packet(packet) {
            return self.check_egress_v6(incoming, network, out);
        }
        let total = v4::check(packet).expect("only whole packets are for egress");
        let here = total.min(packet.len() - incoming.tail);
        assert_eq!(out.bytes, packet[..here], "egress has what the pod sent");
        let moved = incoming.header.moved(network, 0).unwrap_or_default();
        assert_eq!(out.header.gso, moved.gso);
        assert_eq!(out.header.checksum, moved.checksum);
        let destination = ipv4(&packet[16..]);
        if is_own(destination) {
            assert!(matches!(packet[9], 1 | 6 | 17), "the gateway answers");
            return;
        }
        assert!(!is_martian(destination) && !NETWORK.contains(&destination));
        assert_eq!(self.route(destination), Route::None);
    }

    fn check_switched(&mut self, incoming: Incoming<'_>, out: &Outgoing) {
        assert_eq!(out.bytes, incoming.bytes, "a switch changes nothing");
        assert_eq!(out.header, incoming.header, "a switch changes nothing");
        if let Some(packet) = inner(&out.bytes) {
            self.ledger.leave(packet, 0);
        }
        self.leave_switched_v6(&out.bytes);
    }

    fn datagram(&mut self, host: u8, frame: &[u8], header: Header, tail: usize) {
        let mut source = SocketAddr::V4(underlay(host));
        // One host sends each IP version over the other.
        if self.dual && v6::is_frame(frame) != (host == 5) {
            source = SocketAddr::new(v6::underlay(host), 8472);
        }
        // The last one is another process of the first host.
        let is_foreign = host == 4;
        if is_foreign {
            source.set_port(source.port() + 1);
        }
        let (bytes, network, moved) = if self.vxlan {
            let bytes = [&[8, 0, 0, 0, 0, 0, 1, 0], frame].concat();
            (bytes, 22, header.moved(0, 8))
        } else {
            let bytes = frame.get(14..).unwrap_or_default().to_vec();
            (bytes, 0, header.moved(14, 0))
        };
        match bytes.get(network..) {
            Some(packet) if v6::is_frame(frame) => {
                if v6::is_packet(packet) {
                    self.come_v6(packet, header, false);
                }
                self.packets_came = true;
            }
            Some(packet) => self.come(packet, header, false),
            None => {}
        }
        let incoming = Incoming {
            bytes: &bytes,
            header: moved.unwrap_or_default(),
            tail,
        };
        let out = self.through(incoming, |node, now, packet| {
            node.from_underlay(now, source, packet)
        });
        self.count_from(None, out.verdict);
        let known = self.peers().any(|peer| peer.address.ip() == source.ip());
        if !known && self.check_peers {
            assert_eq!(out.verdict, Verdict::Drop(DropReason::UnknownPeer));
        }
        if known && is_foreign && !self.vxlan && self.check_peers {
            assert_eq!(out.verdict, Verdict::Drop(DropReason::TunnelPort));
        }
        match out.verdict {
            // Only ARP and solicitations for the gateway are answered straight away.
            Verdict::Peer {
                id, destination, ..
            } => {
                let out = &out.bytes;
                assert_eq!(self.peer(id).address.ip(), source.ip());
                assert_eq!(destination, self.peer(id).address);
                if v6::is_frame(frame) {
                    assert!(v6::is_answer(&out[8..]), "not for the gateway");
                    return;
                }
                assert!(self.vxlan && frame[12..14] == [8, 6]);
                assert_eq!(out.len(), 8 + 42);
                assert_eq!(out[8 + 20..8 + 22], [0, 2]);
                assert!(is_own(ipv4(&out[8 + 28..])));
            }
            Verdict::Port(_) => {
                self.check_routed(From::Underlay(source.ip()), incoming, network, &out);
            }
            Verdict::Egress => {
                let is_gateways = match bytes.get(network..) {
                    Some(packet) if v6::is_packet(packet) => v6::is_own(v6::ends(packet).1),
                    packet => packet.is_some_and(|packet| is_own(ipv4(&packet[16..]))),
                };
                assert!(is_gateways, "tunnel to egress");
                self.check_egress(incoming, network, &out);
            }
            Verdict::Flood { .. } | Verdict::Uplink { .. } | Verdict::Host => {
                panic!("a datagram goes astray")
            }
            Verdict::Consumed | Verdict::Drop(_) => {}
        }
    }

    /// Checks a packet that went through the router straight away; its IP header was at `network`.
    fn check_routed(&mut self, from: From, incoming: Incoming<'_>, network: usize, out: &Outgoing) {
        let packet = &incoming.bytes[network..];
        if v6::is_packet(packet) {
            return self.check_routed_v6(from, incoming, network, out);
        }
        let total = v4::check(packet).expect("only whole packets are routed");
        let packet = &packet[..total.min(packet.len() - incoming.tail)];
        let (source, destination) = (ipv4(&packet[12..]), ipv4(&packet[16..]));
        let left = self.strip(out.verdict, &out.bytes);
        assert_eq!(
            v4::check_head(left, left.len() + out.tail),
            Ok(total),
            "what leaves is malformed"
        );
        assert!(packet[8] > 1 || from == From::Egress);
        self.check_changes(incoming, network, packet, left, out);
        let is_gateways = from == From::Egress && is_own(source);
        self.ledger.leave(left, 1);
        assert!(!is_own(destination) && (!is_own(source) || is_gateways));
        let broadcast = SUBNET.broadcast();
        for address in [source, destination] {
            assert!(!is_martian(address) && address != broadcast);
        }
        let expected = self.route(destination);
        match out.verdict {
            Verdict::Port(_) => assert_eq!(expected, Route::Local),
            Verdict::Peer { id, .. } => {
                assert!(matches!(expected, Route::Peers(ids) if ids.contains(&id)));
                assert!(
                    matches!(from, From::Port(_)) || is_gateways,
                    "tunnel to tunnel"
                );
            }
            Verdict::Flood { .. }
            | Verdict::Uplink { .. }
            | Verdict::Host
            | Verdict::Egress
            | Verdict::Consumed
            | Verdict::Drop(_) => unreachable!(),
        }
        if let From::Underlay(outer) = from {
            self.check_peers_source(outer, source);
        }
    }

    fn check_peers_source(&self, outer: IpAddr, source: Ipv4Addr) {
        assert!(!SUBNET.contains(&source), "a peer poses as a pod");
        let mut sharing = self.peers().filter(|peer| peer.address.ip() == outer);
        // Of leases within each other the longest prefix decides.
        let owners = self.route(source);
        let is_owner = |id| matches!(&owners, Route::Peers(ids) if ids.contains(&id));
        let in_lease = sharing.any(|peer| is_owner(peer.id));
        assert!(
            in_lease || !self.check_peers,
            "a peer sends from another's lease"
        );
    }

    /// A routed packet has a hop less, and a finished checksum if it goes to a wire and to who takes no
    /// other; all else is as it was, and what its header says of it is right still.
    fn check_changes(
        &self,
        incoming: Incoming<'_>,
        network: usize,
        packet: &[u8],
        left: &[u8],
        out: &Outgoing,
    ) {
        assert_eq!(left.len(), packet.len());
        assert_eq!((&left[..8], left[9]), (&packet[..8], packet[9]));
        let header_len = usize::from(packet[0] & 0x0f) * 4;
        assert_eq!(left[12..header_len], packet[12..header_len]);
        let to_wire = matches!(
            out.verdict,
            Verdict::Peer {
                checksums: Checksums::Complete,
                ..
            }
        );
        let single = incoming.header.gso.is_none();
        let Some(offload) = self.offload(incoming, network) else {
            return;
        };
        let mut expected = packet[header_len..].to_vec();
        if let Some((start, field)) = offload.unfinished
            && to_wire
            && single
        {
            packet::finish(&mut expected, (start - header_len, field));
        }
        assert_eq!(left[header_len..], expected, "the payload changes");
        if incoming.tail == 0 {
            assert!(offload.longest.min(left.len()) <= self.mtu);
        }
        let before = incoming.header;
        let after = out.bytes.len() - left.len();
        let moved = match before.moved(network, after) {
            Some(moved) if !to_wire || !single => moved,
            _ => Header::default(),
        };
        assert_eq!(
            (out.header.checksum, out.header.gso),
            (moved.checksum, moved.gso)
        );
    }

    /// What the header of a packet says of it, if it says the truth.
    fn offload(&self, incoming: Incoming<'_>, network: usize) -> Option<Offload> {
        if network == 14 {
            return Offload::read(incoming.bytes, incoming.header, incoming.tail);
        }
        let frame = [&[0; 12][..], &[8, 0], &incoming.bytes[network..]].concat();
        let header = incoming.header.moved(network, 14)?;
        Offload::read(&frame, header, incoming.tail)
    }

    /// The IPv4 packet that leaves, after a look at what is around it.
    fn strip<'a>(&self, verdict: Verdict, out: &'a [u8]) -> &'a [u8] {
        match verdict {
            Verdict::Port(port) => {
                assert!(self.port(port).is_some(), "{port} is not attached");
                assert_eq!(out[6..12], GATEWAY_MAC.0);
                assert_eq!(out[0] & 1, 0, "an IP packet goes to a group");
                assert_eq!(out[12..14], [8, 0]);
                &out[14..]
            }
            Verdict::Peer {
                id, destination, ..
            } => {
                let peer = self.peer(id);
                assert!(destination == peer.address || self.peers_changed);
                if !self.vxlan {
                    return out;
                }
                assert_eq!(out[..8], [8, 0, 0, 0, 0, 0, 1, 0]);
                let theirs = peer.vtep_mac.map(|mac| mac.get().0);
                assert!(theirs.is_some_and(|mac| out[8..14] == mac) || self.peers_changed);
                assert_eq!(out[14..20], vtep(VTEP).get().0);
                assert_eq!(out[20..22], [8, 0]);
                &out[22..]
            }
            Verdict::Flood { .. }
            | Verdict::Uplink { .. }
            | Verdict::Host
            | Verdict::Egress
            | Verdict::Consumed
            | Verdict::Drop(_) => unreachable!(),
        }
    }

    /// A plain packet or superpacket of a guarded pod, for an address with a route, must get there,
    /// and at once if it is known where that is.
    fn check_not_lost(&self, port: PortId, incoming: Incoming<'_>, verdict: Verdict) {
        let attachment = &self.port(port).expect("it sent").attachment;
        let bytes = incoming.bytes;
        let Some(packet) = inner(bytes)
            .filter(|_| bytes[..6] == GATEWAY_MAC.0 && bytes[6..12] == attachment.mac.0)
        else {
            return;
        };
        let (Ok(total), Some(offload)) = (v4::check(packet), self.offload(incoming, 14)) else {
            return;
        };
        let (source, destination) = (ipv4(&packet[12..]), ipv4(&packet[16..]));
        if !attachment.addresses.contains(&IpAddr::V4(source))
            || packet[8] <= 1
            || total.min(offload.longest) > self.mtu
            || is_martian(destination)
        {
            return;
        }
        if is_own(destination) || destination == SUBNET.broadcast() {
            return;
        }
        match self.route(destination) {
            Route::None if self.has_egress && !NETWORK.contains(&destination) => {
                assert_eq!(verdict, Verdict::Egress);
            }
            Route::None => assert_eq!(verdict, Verdict::Drop(DropReason::NoRoute)),
            Route::Peers(_) | Route::Local => self.check_sent_at_once(destination, true, verdict),
        }
    }

    fn route(&self, destination: Ipv4Addr) -> Route {
        if SUBNET.contains(&destination) {
            return Route::Local;
        }
        let holding = |peer: &&Peer| {
            let inside = matches!(peer.subnet, IpNet::V4(net) if SUBNET.contains(&net));
            !inside && peer.subnet.contains(&IpAddr::V4(destination))
        };
        let longest = self.peers().filter(holding);
        let Some(longest) = longest.map(|peer| peer.subnet.prefix_len()).max() else {
            return Route::None;
        };
        let peers = self.peers().filter(holding);
        let peers = peers.filter(|peer| peer.subnet.prefix_len() == longest);
        Route::Peers(peers.map(|peer| peer.id).collect())
    }

    /// Polls all output and checks each packet.
    ///
    /// # Panics
    /// If something is wrong.
    pub fn poll(&mut self) {
        let mut storage = std::mem::take(&mut self.storage);
        let mut count = 0;
        let mut released = BTreeMap::new();
        let mut packet = PacketBuf::new(&mut storage, 0, 0).expect("it is empty");
        while let Some(verdict) = self.node.poll_output(&mut packet) {
            count += 1;
            self.books.originated += 1;
            self.count(verdict);
            assert_eq!(packet.offload(), Header::default());
            if let Some(destination) = self.check_output(verdict, packet.as_slice()) {
                *released.entry(destination).or_insert(0) += 1;
            }
        }
        self.storage = storage;
        assert!(count <= OUTPUT_LEN, "{count} packets were queued");
        if !self.packets_came {
            let most = released.values().max();
            assert!(most <= Some(&WAITING_LEN), "more waited than may");
        }
        self.pods_sent = false;
        self.packets_came = false;
        self.peers_changed = false;
        self.gateway_sent = false;
    }

    /// Polls the last output, and checks that the counters add up.
    ///
    /// # Panics
    /// If something is wrong.
    pub fn finish(mut self) {
        self.poll();
        self.check_books();
    }

    /// Checks that the node has counted every packet, as what it has become.
    ///
    /// # Panics
    /// If something is wrong.
    pub fn check_books(&self) {
        let (books, counters) = (&self.books, self.node.counters());
        assert_eq!(counters.came(), counters.went(), "{counters:?}");
        let theirs = [
            counters.received,
            counters.delivered,
            counters.sent,
            counters.flooded,
        ];
        let ours = [books.received, books.delivered, books.sent, books.flooded];
        assert_eq!(theirs, ours, "{counters:?}");
        // The node itself also begins packets that wait or are dropped inside.
        assert!(counters.originated >= books.originated);
        assert!(counters.consumed >= books.consumed);
        assert!(counters.dropped() >= books.dropped);
    }

    /// Checks a packet of the output; where it goes if it is a pod's.
    fn check_output(&mut self, verdict: Verdict, out: &[u8]) -> Option<Ipv4Addr> {
        if is_of_v6(verdict, out) {
            self.check_output_v6(verdict, out);
            return None;
        }
        match verdict {
            Verdict::Port(port) if is_own_arp(out) => {
                assert!(self.port(port).is_some(), "{port} is not attached");
                assert!(is_own(ipv4(&out[28..])), "the gateway answers for another");
            }
            Verdict::Flood { except } => {
                assert_eq!(except, None);
                assert!(is_own_arp(out) && is_own(ipv4(&out[28..])));
            }
            Verdict::Port(_) | Verdict::Peer { .. } => {
                let packet = self.strip(verdict, out);
                assert_eq!(v4::check(packet), Ok(packet.len()), "malformed");
                assert!(packet.len() <= self.mtu, "{} bytes", packet.len());
                let (source, destination) = (ipv4(&packet[12..]), ipv4(&packet[16..]));
                assert!(!is_martian(source) && !is_martian(destination));
                if is_own(source) {
                    let tcp = packet.get(usize::from(packet[0] & 0x0f) * 4 + 13);
                    let is_reset = packet[9] == 6 && tcp.is_some_and(|flags| flags & 4 != 0);
                    let is_own = packet[9] == 1 || is_reset;
                    let has_sent = self.gateway_sent || self.gateway_waits;
                    assert!(is_own || has_sent, "the gateway has no service");
                    return None;
                }
                let to_peer = matches!(verdict, Verdict::Peer { .. });
                assert!(!to_peer || self.pods_sent, "tunnel to tunnel");
                self.ledger.leave(packet, 1);
                return Some(destination);
            }
            Verdict::Drop(reason) => {
                assert!(matches!(
                    reason,
                    DropReason::PortGone | DropReason::PeerGone
                ));
            }
            Verdict::Uplink { .. } | Verdict::Host | Verdict::Egress => panic!("output goes out"),
            Verdict::Consumed => panic!("output that is consumed"),
        }
        None
    }

    /// Checks that tables keep their bounds, and that nothing of a port that has gone is in them.
    ///
    /// # Panics
    /// If something is wrong.
    pub fn check_tables(&self) {
        let gone = |port: PortId| self.port(port).is_none();
        let mut learned = 0;
        for (_, entry) in self.node.fdb() {
            learned += usize::from(entry.seen.is_some());
            assert!(!gone(entry.port));
        }
        assert!(learned <= self.limits.fdb);
        let mut others = 0;
        for (_, place, state) in self.node.neighbours() {
            others += usize::from(state != State::Permanent);
            assert!(!place.is_some_and(|place| gone(place.port)));
        }
        assert!(others <= self.limits.neighbours);
        let ports = self.node.ports();
        let counts = ports.map(|(id, port)| (id, port.received.packets, port.sent.packets));
        let ours = self.attached();
        assert!(counts.eq(ours.map(|(id, port)| (id, port.received, port.sent))));
    }

    /// Checks that routes are those of the peers.
    fn change_peers(&mut self) {
        self.peers_changed = true;
        let dual = self.dual;
        let own = |net: &IpNet| match net {
            IpNet::V4(net) => SUBNET.contains(net),
            IpNet::V6(net) => dual && v6::SUBNET.contains(net),
        };
        let subnets = || self.peers().map(|peer| peer.subnet.trunc());
        let mut distinct = 1 + usize::from(dual);
        for (at, subnet) in subnets().enumerate() {
            let again = subnets().take(at).any(|other| other == subnet);
            distinct += usize::from(!again && !own(&subnet));
        }
        let mut routes = 0;
        for (prefix, _) in self.node.routes() {
            routes += 1;
            let of_peer = subnets().any(|subnet| subnet == prefix) && !own(&prefix);
            let is_own = prefix == IpNet::V4(SUBNET) || prefix == IpNet::V6(v6::SUBNET);
            assert!(of_peer || is_own);
        }
        assert_eq!(routes, distinct);
        assert_eq!(self.node.peers().count(), self.peers().count());
    }
}

/// Whether output is of IPv6.
fn is_of_v6(verdict: Verdict, out: &[u8]) -> bool {
    match verdict {
        Verdict::Peer { destination, .. } => destination.is_ipv6(),
        Verdict::Port(_) | Verdict::Flood { .. } => v6::is_frame(out),
        _ => false,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Route {
    None,
    Local,
    Peers(Vec<PeerId>),
}

fn subnet(index: u8) -> IpNet {
    match SUBNETS.get(usize::from(index)) {
        Some((base, len)) => Ipv4Net::new_assert((*base).into(), *len).into(),
        None => v6::subnet(usize::from(index) - SUBNETS.len()),
    }
}

fn vtep(byte: u8) -> VtepMac {
    VtepMac::from_random(mac(8 + byte % 8).0)
}

fn underlay(host: u8) -> SocketAddrV4 {
    SocketAddrV4::new([192, 168, 0, 2 + host % 4].into(), 8472)
}
