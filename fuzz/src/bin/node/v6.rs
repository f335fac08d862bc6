//! The same of IPv6: what the oracle knows of its packets, and what must be true of those that a node lets
//! through.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use muslin_encap::offload::virtio::Header;
use muslin_stack::datapath::node::Verdict;
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::Attachment;
use muslin_stack::drops::DropReason;

use crate::event::GATEWAY_MAC;
use crate::harness::{From, Harness, Incoming, Outgoing};

/// The node's lease.
pub const SUBNET: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 0), 64);
/// What is outside of it is for egress.
pub const NETWORK: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0), 32);
/// The subnets of peers.
const SUBNETS: [&str; 5] = [
    "fd00:0:0:2::/64",
    "fd00:0:0:3::/64",
    "fd00:0:0:2:8000::/65",
    "fd00::/32",
    "fd00:0:0:1::/64",
];
/// Bytes of an IPv6 header.
const HEADER_LEN: usize = 40;
const ICMP: u8 = 58;

/// The subnet of a peer by its number.
pub fn subnet(index: usize) -> IpNet {
    let text = SUBNETS[index % SUBNETS.len()];
    IpNet::V6(text.parse().expect("it is a subnet"))
}

/// Where the tunnel of a host ends.
pub fn underlay(host: u8) -> IpAddr {
    Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, u16::from(2 + host % 4)).into()
}

/// Whether a frame has an IPv6 packet.
pub fn is_frame(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x86, 0xdd])
}

/// The IPv6 packet in a frame, if it has one's header.
pub fn inner(frame: &[u8]) -> Option<&[u8]> {
    let packet = frame.get(14..).filter(|_| is_frame(frame))?;
    is_packet(packet).then_some(packet)
}

/// Whether bytes begin as an IPv6 packet does.
pub fn is_packet(bytes: &[u8]) -> bool {
    bytes.len() >= HEADER_LEN && bytes[0] >> 4 == 6
}

/// The source and the destination of a packet.
pub fn ends(packet: &[u8]) -> (Ipv6Addr, Ipv6Addr) {
    (address(&packet[8..]), address(&packet[24..]))
}

fn address(bytes: &[u8]) -> Ipv6Addr {
    let octets: [u8; 16] = bytes[..16].try_into().expect("there are as many");
    octets.into()
}

/// Whether an address is the gateway's.
pub fn is_own(address: Ipv6Addr) -> bool {
    let own = ["fd00:0:0:1::", "fd00:0:0:1::1", "fe80::1"];
    own.iter().any(|own| own.parse() == Ok(address))
}

/// Whether no host can have an address.
pub fn is_martian(address: Ipv6Addr) -> bool {
    let is_ipv4 = address.to_ipv4_mapped().is_some() || address.to_bits() >> 32 == 0;
    address.is_multicast() || address.is_unspecified() || is_ipv4
}

/// A whole packet, without what is behind it.
fn whole(packet: &[u8]) -> Option<&[u8]> {
    let len = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    packet.get(..HEADER_LEN + len)
}

/// The type of an ICMPv6 message right behind the header.
fn icmp_type(packet: &[u8]) -> Option<u8> {
    packet
        .get(HEADER_LEN)
        .copied()
        .filter(|_| packet[6] == ICMP)
}

/// Whether a packet is of neighbour discovery.
fn is_discovery(packet: &[u8]) -> bool {
    matches!(icmp_type(packet), Some(133..=137))
}

/// Whether a frame is one that the gateway makes about neighbours.
pub fn is_own_discovery(frame: &[u8]) -> bool {
    frame[6..12] == GATEWAY_MAC.0 && inner(frame).is_some_and(is_discovery)
}

/// Whether a frame answers a solicitation for an address of the gateway's.
pub fn is_answer(frame: &[u8]) -> bool {
    let packet = inner(frame).filter(|packet| icmp_type(packet) == Some(136));
    packet.is_some_and(|packet| is_own(address(&packet[HEADER_LEN + 8..])))
}

/// Checks that a frame which was let through is one its pod may send.
///
/// # Panics
/// If it is not.
pub fn check_sender(frame: &[u8], attachment: &Attachment) {
    let Some(packet) = inner(frame) else {
        panic!("half a header gets through");
    };
    let (source, _) = ends(packet);
    let may_have = |address: Ipv6Addr| {
        let owned = attachment.addresses.contains(&IpAddr::V6(address));
        let free = address.is_unicast_link_local() || !attachment.guarded;
        // A node without IPv6 has no such addresses.
        let is_gateways = is_own(address) && attachment.addresses.iter().any(IpAddr::is_ipv6);
        !is_gateways && (owned || free)
    };
    if source.is_unspecified() {
        let kind = icmp_type(packet);
        let is_hidden = matches!(packet[6], 0 | 43 | 44 | 51 | 60);
        let asks = is_hidden || matches!(kind, Some(131 | 133 | 135 | 143));
        assert!(asks, "{kind:?} comes from nobody");
    } else {
        assert!(may_have(source), "{source} is forged");
        assert!(!is_martian(source), "{source} is no source");
    }
    let Some(packet) = whole(packet).filter(|packet| is_discovery(packet)) else {
        return;
    };
    assert_eq!(packet[7], 255, "neighbour discovery from afar");
    let kind = packet[HEADER_LEN];
    assert!(!matches!(kind, 134 | 137), "a router advertisement");
    let body = HEADER_LEN + if kind == 133 { 8 } else { 24 };
    if kind == 136 {
        let target = address(&packet[HEADER_LEN + 8..]);
        assert!(may_have(target), "{target} is claimed");
    }
    // The first option is a MAC address, if it is one.
    let wanted = if kind == 136 { 2 } else { 1 };
    if let Some([option, 1, mac @ ..]) = packet.get(body..body + 8)
        && *option == wanted
    {
        let is_forged = attachment.guarded && mac != attachment.mac.0;
        assert!(!is_forged, "another's MAC address");
    }
}

/// Where an address is.
#[derive(Debug, PartialEq, Eq)]
enum Route {
    None,
    Local,
    Peers(Vec<PeerId>),
}

impl Harness {
    fn route_v6(&self, destination: Ipv6Addr) -> Route {
        if SUBNET.contains(&destination) {
            return Route::Local;
        }
        let holding = |peer: &&Peer| {
            let inside = matches!(peer.subnet, IpNet::V6(net) if SUBNET.contains(&net));
            !inside && peer.subnet.contains(&IpAddr::V6(destination))
        };
        let longest = self.peers().filter(holding);
        let Some(longest) = longest.map(|peer| peer.subnet.prefix_len()).max() else {
            return Route::None;
        };
        let peers = self.peers().filter(holding);
        let peers = peers.filter(|peer| peer.subnet.prefix_len() == longest);
        Route::Peers(peers.map(|peer| peer.id).collect())
    }

    /// Checks a packet that went through the router straight away; its header was at `network`.
    pub fn check_routed_v6(
        &mut self,
        from: From,
        incoming: Incoming<'_>,
        network: usize,
        out: &Outgoing,
    ) {
        let packet = &incoming.bytes[network..];
        let packet = whole(packet).expect("only whole packets are routed");
        let (source, destination) = ends(packet);
        let left = self.strip_v6(out.verdict, &out.bytes);
        assert_eq!(whole(left), Some(left), "what leaves is malformed");
        let hops = u8::from(from != From::Egress);
        assert!(packet[7] > hops || from == From::Egress);
        assert_eq!(left[7].checked_add(hops), Some(packet[7]), "hops");
        assert_eq!(left.len(), packet.len());
        assert_eq!(left[..7], packet[..7], "the header changes");
        assert_eq!(left[8..HEADER_LEN], packet[8..HEADER_LEN]);
        if incoming.header == Header::default() {
            assert_eq!(
                left[HEADER_LEN..],
                packet[HEADER_LEN..],
                "the payload changes"
            );
            assert!(
                left.len() <= self.mtu_of(out.verdict),
                "{} bytes",
                left.len()
            );
        }
        self.ledger_v6.leave(label(left), left[7], hops);
        let is_gateways = from == From::Egress && is_own(source);
        assert!(!is_own(destination) && (!is_own(source) || is_gateways));
        assert!(!is_martian(source) && !is_martian(destination));
        let leaves_link = |address: Ipv6Addr| address.is_unicast_link_local();
        // What egress says from there it says to those of the link.
        let is_on_link = leaves_link(destination) && from == From::Egress;
        let is_scoped = leaves_link(destination) || leaves_link(source) && !is_gateways;
        assert!(is_on_link || !is_scoped, "beyond the link");
        match (out.verdict, self.route_v6(destination)) {
            (Verdict::Port(_), Route::Local) => {}
            (Verdict::Port(_), _) => assert!(is_on_link),
            (Verdict::Peer { id, .. }, Route::Peers(ids)) => {
                assert!(ids.contains(&id));
                assert!(
                    matches!(from, From::Port(_)) || is_gateways,
                    "tunnel to tunnel"
                );
            }
            (verdict, route) => panic!("{verdict:?} where {route:?} is"),
        }
        if let From::Underlay(outer) = from {
            assert!(!SUBNET.contains(&source), "a peer poses as a pod");
            let owners = self.route_v6(source);
            let is_owner = |id| matches!(&owners, Route::Peers(ids) if ids.contains(&id));
            let mut sharing = self.peers().filter(|peer| peer.address.ip() == outer);
            let in_lease = sharing.any(|peer| is_owner(peer.id));
            assert!(in_lease || !self.check_peers, "from another's lease");
        }
    }

    /// What goes that way at most.
    fn mtu_of(&self, verdict: Verdict) -> usize {
        match verdict {
            Verdict::Peer { .. } => self.mtu_v6(),
            _ => self.mtu(),
        }
    }

    /// The packet that leaves, after a look at what is around it.
    fn strip_v6<'a>(&self, verdict: Verdict, out: &'a [u8]) -> &'a [u8] {
        let frame = match verdict {
            Verdict::Port(port) => {
                assert!(self.port(port).is_some(), "{port} is not attached");
                assert_eq!(out[6..12], GATEWAY_MAC.0);
                out
            }
            Verdict::Peer {
                id, destination, ..
            } => {
                let frame = self.check_tunnel_v6(id, destination, out);
                assert!(frame.is_some(), "IPv6 to the VTEP of IPv4");
                frame.unwrap_or_default()
            }
            other => panic!("a packet is routed to {other:?}"),
        };
        assert_eq!(frame[0] & 1, 0, "a routed packet goes to a group");
        inner(frame).expect("it is a packet")
    }

    /// A packet for egress is as it came, and leaves the overlay or is for a service of the gateway.
    pub fn check_egress_v6(&self, incoming: Incoming<'_>, network: usize, out: &Outgoing) {
        let packet = whole(&incoming.bytes[network..]).expect("only whole packets are for egress");
        assert_eq!(out.bytes, packet, "egress has what the pod sent");
        let (_, destination) = ends(packet);
        if is_own(destination) {
            return;
        }
        assert!(!is_martian(destination) && !destination.is_unicast_link_local());
        assert!(!NETWORK.contains(&destination));
        assert_eq!(self.route_v6(destination), Route::None);
    }

    /// A plain packet of a guarded pod, for an address with a route, must get there, and at once if it is
    /// known where that is.
    pub fn check_not_lost_v6(&self, attachment: &Attachment, frame: &[u8], verdict: Verdict) {
        let Some(packet) = inner(frame).and_then(whole) else {
            return;
        };
        let (source, destination) = ends(packet);
        let is_plain = matches!((packet[6], icmp_type(packet)), (6, _) | (ICMP, Some(128)));
        let is_for_router = frame[..6] == GATEWAY_MAC.0 && frame[6..12] == attachment.mac.0;
        let is_scoped = destination.is_unicast_link_local() || is_martian(destination);
        let owned = attachment.addresses.contains(&IpAddr::V6(source));
        if !is_plain || !is_for_router || is_scoped || !owned || packet[7] <= 1 {
            return;
        }
        if is_own(destination) {
            return;
        }
        match self.route_v6(destination) {
            Route::None if self.has_egress() && !NETWORK.contains(&destination) => {
                assert_eq!(verdict, Verdict::Egress);
            }
            Route::None => assert_eq!(verdict, Verdict::Drop(DropReason::NoRoute)),
            route => self.check_sent_at_once_v6(destination, packet.len(), &route, verdict),
        }
    }

    fn check_sent_at_once_v6(
        &self,
        destination: Ipv6Addr,
        len: usize,
        route: &Route,
        verdict: Verdict,
    ) {
        let too_long = Verdict::Drop(DropReason::FragmentationNeeded);
        match route {
            Route::None => {}
            Route::Peers(_) if len > self.mtu_v6() => assert_eq!(verdict, too_long),
            Route::Local if len > self.mtu() => assert_eq!(verdict, too_long),
            Route::Peers(_) => {
                let is_sent = matches!(verdict, Verdict::Peer { .. });
                let no_vtep = verdict == Verdict::Drop(DropReason::NoVtepMac);
                assert!(is_sent || no_vtep, "to a peer: {verdict:?}");
            }
            Route::Local => {
                let attached = self.is_attached(destination.into());
                let is_delivered = matches!(verdict, Verdict::Port(_));
                assert!(!attached || is_delivered, "lost: {verdict:?}");
            }
        }
    }

    /// Checks a packet of the output.
    pub fn check_output_v6(&mut self, verdict: Verdict, out: &[u8]) {
        if let Verdict::Port(_) | Verdict::Flood { except: None } = verdict
            && is_own_discovery(out)
        {
            let (source, _) = ends(&out[14..]);
            assert!(is_own(source), "the gateway speaks for another");
            return;
        }
        let packet = self.strip_v6(verdict, out);
        assert_eq!(whole(packet), Some(packet), "malformed");
        assert!(
            packet.len() <= self.mtu_of(verdict),
            "{} bytes",
            packet.len()
        );
        let (source, destination) = ends(packet);
        assert!(!is_martian(source) && !is_martian(destination));
        if is_own(source) {
            return;
        }
        let to_peer = matches!(verdict, Verdict::Peer { .. });
        assert!(!to_peer || self.pods_sent(), "tunnel to tunnel");
        self.ledger_v6.leave(label(packet), packet[7], 1);
    }

    /// A packet comes that the ledger knows again.
    pub fn come_v6(&mut self, packet: &[u8], header: Header, from_egress: bool) {
        let hops = if from_egress { 0 } else { 1 };
        let packets = header
            .gso
            .map_or(1, |gso| packet.len() / usize::from(gso.size.max(1)) + 1);
        self.ledger_v6.come(label(packet), packet[7], hops, packets);
    }

    /// A frame is passed on as it came.
    pub fn leave_switched_v6(&mut self, frame: &[u8]) {
        if let Some(packet) = inner(frame) {
            self.ledger_v6.leave(label(packet), packet[7], 0);
        }
    }

    /// Takes a packet from egress, which has only what is for pods of this node, or from the gateway.
    pub fn packet_of_egress_v6(&mut self, bytes: &[u8], header: Header) {
        let (source, destination) = ends(bytes);
        let is_forged = self.has_egress() && NETWORK.contains(&source) && !is_own(source);
        self.come_v6(bytes, header, true);
        let out = self.take_from_egress(bytes, header);
        self.note_gateway(is_own(source));
        let is_let_through = !matches!(out.verdict, Verdict::Drop(_));
        assert!(
            !(is_forged && is_let_through),
            "somebody outside poses as a pod"
        );
        let incoming = Incoming {
            bytes,
            header,
            tail: 0,
        };
        match out.verdict {
            Verdict::Port(_) | Verdict::Peer { .. } => {
                self.check_routed_v6(From::Egress, incoming, 0, &out);
            }
            Verdict::Flood { .. } | Verdict::Uplink { .. } | Verdict::Host | Verdict::Egress => {
                panic!("a packet from egress goes astray")
            }
            Verdict::Consumed | Verdict::Drop(_) => {}
        }
        let fits = whole(bytes).is_some_and(|packet| packet.len() <= self.mtu());
        let is_plain = fits && bytes[6] == 6 && header == Header::default();
        if is_plain && !is_martian(source) && !is_forged && !source.is_unicast_link_local() {
            let attached = self.is_attached(destination.into()) && self.has_egress();
            let is_delivered = matches!(out.verdict, Verdict::Port(_));
            assert!(!attached || is_delivered, "lost: {:?}", out.verdict);
        }
    }
}

/// By what the ledger knows a packet: no two have the same flow label, unless an edit makes it so.
fn label(packet: &[u8]) -> u32 {
    u32::from_be_bytes([0, packet[1], packet[2], packet[3]])
}

/// Which packets came, and how often they may leave.
#[derive(Debug, Default)]
pub struct Ledger {
    came: Vec<(u32, u8, u8, usize)>,
}

impl Ledger {
    fn come(&mut self, label: u32, hop_limit: u8, hops: u8, packets: usize) {
        self.came.push((label, hop_limit, hops, packets));
    }

    /// # Panics
    /// If no packet of that flow label and hop limit has come that is left.
    fn leave(&mut self, label: u32, hop_limit: u8, hops: u8) {
        let mut came = self.came.iter_mut();
        let it = came.find(|(other, had, own, packets)| {
            let hops = hops.min(*own);
            *other == label && hop_limit.checked_add(hops) == Some(*had) && *packets > 0
        });
        let it = it.unwrap_or_else(|| panic!("packet {label} leaves again, or too late"));
        it.3 -= 1;
    }
}
