//! Decisions of the data path in words.

use std::net::IpAddr;

use muslin_encap::ip::v6;
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::Vni;
use muslin_stack::api::trace::{Outcome, Step, Summary, Verdict};
use muslin_stack::datapath::egress::{Holder, Protocol};
use muslin_stack::datapath::filter::Direction;
use muslin_stack::datapath::frame;
use muslin_stack::datapath::icmp::IcmpError;
use muslin_stack::datapath::node::{self, NextHop};
use muslin_stack::datapath::peer::{Path, PeerId};
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::trace::{Entrance, Holding, Known, Switched, Trace, TraceStep};
use muslin_stack::datapath::tunnel::Tunnel;
use smoltcp::wire::{
    ArpOperation, ArpRepr, EthernetAddress, EthernetProtocol, Icmpv4Message, Icmpv4Packet,
    Icmpv6Message, Icmpv6Packet, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};

use super::super::running::{RunningNode, endpoint_words};
use super::mac;

/// The words of a node, which knows the names of pods and peers.
pub(super) struct Words<'a> {
    running: &'a RunningNode,
    tunnel: Tunnel,
}

impl<'a> Words<'a> {
    pub(super) fn new(running: &'a RunningNode) -> Self {
        Self {
            running,
            tunnel: running.plan().tunnel,
        }
    }

    pub(super) fn node(&self) -> &str {
        &self.running.facts.settings.name
    }

    /// What a packet is that comes in there; nothing if it is no IP packet.
    pub(super) fn summary_of(&self, entrance: Entrance, bytes: &[u8]) -> Option<Summary> {
        let packet = match entrance {
            Entrance::Port(_) | Entrance::Uplink => of_frame(bytes)?,
            Entrance::Underlay(_) => match self.tunnel {
                Tunnel::Vxlan { .. } => of_frame(bytes.get(VXLAN_LEN..)?)?,
                Tunnel::Ipip => Ipv4Packet::new_checked(bytes).ok()?.payload(),
                _ => bytes,
            },
            Entrance::Host | Entrance::Egress => bytes,
        };
        summary(packet)
    }

    pub(super) fn step(&self, step: &TraceStep) -> Step {
        let (kind, text) = match *step {
            TraceStep::Guard { port, guarded } => {
                let pod = self.pod(port);
                let text = match guarded {
                    true => format!("{pod} sends from its own MAC and IP addresses"),
                    false => format!("{pod} may send from any address"),
                };
                ("guard", text)
            }
            TraceStep::Switch { mac, to } => ("switch", self.switched(mac, to)),
            TraceStep::Sender { address, peer } => {
                let address = endpoint_words(address);
                let text = match peer {
                    Some(peer) => format!("{address} is {}", self.peer(peer)),
                    None => format!("{address} is no node that is known here"),
                };
                ("sender", text)
            }
            TraceStep::Decapsulated => (
                "decapsulate",
                format!("{} of this network", self.tunnel_words()),
            ),
            TraceStep::Uplink { mac: source } => {
                ("uplink", format!("a frame from {}", mac(source)))
            }
            TraceStep::Source { address, holder } => {
                let text = match holder {
                    Holding::Pod(port) => format!("{address} is {}'s", self.pod(port)),
                    Holding::Peer(Some(peer)) => {
                        format!("{address} is in the lease of {}", self.peer(peer))
                    }
                    Holding::Peer(None) => format!("{address} is in the lease of its sender"),
                    Holding::Host => format!("{address} is this machine's"),
                };
                ("source", text)
            }
            TraceStep::Gateway { address } => {
                ("gateway", format!("{address} is this node's own address"))
            }
            TraceStep::Host { address } => ("host", format!("{address} is this machine's")),
            TraceStep::Route { destination, route } => {
                let text = match route {
                    Some((prefix, NextHop::Local)) => format!("{prefix} is this node's own subnet"),
                    Some((prefix, NextHop::Peer(id))) => {
                        format!("{prefix} by {}", self.peer(id))
                    }
                    None => format!("none to {destination}"),
                };
                ("route", text)
            }
            TraceStep::Outside { network } => {
                ("outside", format!("not in the pod network {network}"))
            }
            TraceStep::Permitted { direction, port } => {
                let pod = self.pod(port);
                let text = match direction {
                    Direction::FromPod | Direction::ToAll => format!("{pod} may send this"),
                    Direction::ToPod => format!("{pod} may receive this"),
                };
                ("policy", text)
            }
            TraceStep::Ttl { left } => ("ttl", format!("{left} left")),
            TraceStep::Mtu {
                mtu,
                len,
                dont_fragment,
            } => {
                let text = match (len <= mtu.into(), dont_fragment) {
                    (true, _) => format!("{len} of {mtu} bytes"),
                    (false, true) => {
                        format!("{len} bytes are more than {mtu}, and must not be fragmented")
                    }
                    (false, false) => format!("{len} bytes are more than {mtu}"),
                };
                ("mtu", text)
            }
            TraceStep::InPieces { segments } => {
                let text = if segments {
                    "in segments"
                } else {
                    "in fragments; the first:"
                };
                ("pieces", text.to_owned())
            }
            TraceStep::Way {
                peer: id,
                address,
                path,
            } => {
                let peer = self.peer(id);
                let text = match path {
                    Path::Tunnel => format!("to {peer} by the tunnel"),
                    Path::Uplink => format!("to {peer}, bare: {address} is on this node's link"),
                    Path::Unreachable => {
                        format!("none to {peer}: {address} is not on this node's link")
                    }
                };
                ("way", text)
            }
            TraceStep::Neighbour {
                address,
                port,
                known,
            } => ("neighbour", self.neighbour(address, port, known)),
            TraceStep::Encapsulated {
                macs, checksums, ..
            } => {
                let mut text = self.tunnel_words();
                if let Some((from, to)) = macs {
                    text.push_str(&format!(", inner frame {} to {}", mac(from), mac(to)));
                }
                if checksums == Checksums::Partial {
                    text.push_str(", inner checksum as it is, even if partial");
                }
                ("encapsulate", text)
            }
            TraceStep::Translated { is_source, to } => {
                let end = if is_source { "source" } else { "destination" };
                ("translate", format!("the {end} becomes {to}"))
            }
            TraceStep::Error { error } => ("icmp", error_words(error)),
            TraceStep::Flow { flow, is_known } => {
                let protocol = protocol(flow.protocol);
                let known = if is_known { "open" } else { "new" };
                let remote = match flow.remote.ip().is_unspecified() {
                    true => "any address".to_owned(),
                    false => flow.remote.to_string(),
                };
                (
                    "flow",
                    format!("{known}: {protocol} {} to {remote}", flow.pod),
                )
            }
            TraceStep::Reassembled => ("reassembly", "waits for the other fragments".to_owned()),
            TraceStep::HandedOver { to } => {
                let text = match to {
                    Holder::Worker(number) => format!("worker {number} has its flow"),
                    Holder::Predecessor => "the process before this one has its flow".to_owned(),
                };
                ("hand-over", text)
            }
            TraceStep::Service { port } => (
                "service",
                format!("port {port} of the gateway, if it has one"),
            ),
            TraceStep::Rule { prefix, allows } => {
                let allows = if allows { "allowed" } else { "denied" };
                ("rule", format!("{prefix} is {allows}"))
            }
            TraceStep::Socket { to } => {
                ("egress", format!("a socket of this machine sends to {to}"))
            }
            _ => (
                "other",
                "a decision that this version has no words for".to_owned(),
            ),
        };
        Step {
            kind: kind.to_owned(),
            text,
        }
    }

    pub(super) fn outcome(&self, trace: &Trace) -> Outcome {
        let (verdict, text) = match trace.verdict {
            node::Verdict::Port(port) => (
                Verdict::Delivered,
                format!("Delivered to {}.", self.pod(port)),
            ),
            node::Verdict::Flood { .. } => {
                (Verdict::Flooded, "Copied to all other pods.".to_owned())
            }
            node::Verdict::Host => (
                Verdict::Delivered,
                "Delivered to this machine by the host interface.".to_owned(),
            ),
            node::Verdict::Peer {
                id, destination, ..
            } => {
                let (peer, len) = (self.peer(id), trace.packet.len());
                let at = endpoint_words(destination);
                (
                    Verdict::Sent,
                    format!("Sent to {peer} at {at} in a datagram with {len} bytes."),
                )
            }
            node::Verdict::Uplink { id: Some(id) } => {
                let peer = self.peer(id);
                (Verdict::Sent, format!("Sent to {peer} by the uplink."))
            }
            node::Verdict::Uplink { id: None } => (Verdict::Sent, "Sent by the uplink.".to_owned()),
            node::Verdict::Egress => {
                let (verdict, text) = left(trace);
                (verdict, text.to_owned())
            }
            node::Verdict::Consumed => (Verdict::Consumed, consumed(trace).to_owned()),
            node::Verdict::Drop(reason) => return Outcome::dropped(reason),
        };
        Outcome {
            verdict,
            reason: None,
            text,
        }
    }

    /// A packet of the node's own, and where it goes.
    pub(super) fn own(&self, (verdict, bytes): &(node::Verdict, Vec<u8>)) -> String {
        let (to, packet) = match *verdict {
            node::Verdict::Port(port) => (format!("to {}", self.pod(port)), frame_words(bytes)),
            node::Verdict::Flood { .. } => ("to all pods".to_owned(), frame_words(bytes)),
            node::Verdict::Uplink { .. } => ("by the uplink".to_owned(), frame_words(bytes)),
            node::Verdict::Host => ("to this machine".to_owned(), packet_words(bytes)),
            node::Verdict::Peer { id, .. } => {
                let inner = match self.tunnel {
                    Tunnel::Vxlan { .. } => frame_words(bytes.get(VXLAN_LEN..).unwrap_or_default()),
                    _ => packet_words(bytes),
                };
                (format!("to {}", self.peer(id)), inner)
            }
            node::Verdict::Egress | node::Verdict::Consumed => (String::new(), packet_words(bytes)),
            node::Verdict::Drop(reason) => {
                (format!("lost: {}", reason.name()), packet_words(bytes))
            }
        };
        match to.is_empty() {
            true => packet,
            false => format!("{to}: {packet}"),
        }
    }

    fn switched(&self, address: EthernetAddress, to: Switched) -> String {
        let address = mac(address);
        match to {
            Switched::Gateway => format!("{address} is the gateway's: to the router"),
            Switched::Port(port) => format!("{address} is {}'s", self.pod(port)),
            Switched::Others(count) => {
                format!("{address} is a group's, or nobody's that is known: to {count} other ports")
            }
        }
    }

    fn neighbour(&self, address: IpAddr, port: Option<PortId>, known: Known) -> String {
        let whose = port.map(|port| format!(", {}'s", self.pod(port)));
        let whose = whose.unwrap_or_default();
        match known {
            Known::At(place) => format!("{address} is at {}{whose}", mac(place)),
            Known::Stale(place) => {
                format!(
                    "{address} was at {}{whose}, and is asked whether it still is",
                    mac(place)
                )
            }
            Known::Sought => {
                let by = match address {
                    IpAddr::V4(_) => "ARP",
                    IpAddr::V6(_) => "neighbour discovery",
                };
                format!("{address} is asked for by {by}, and the packet waits")
            }
            Known::Awaited => {
                format!(
                    "{address} was a pod's before this node began anew: the packet waits for it"
                )
            }
            Known::Nobody => format!("nobody has {address}"),
        }
    }

    fn tunnel_words(&self) -> String {
        match self.tunnel {
            Tunnel::Vxlan { vni, .. } => format!("VXLAN with VNI {}", Vni::get(vni)),
            Tunnel::Udp => "flannel's UDP".to_owned(),
            Tunnel::Ipip => "IPv4 in IPv4".to_owned(),
            Tunnel::WireGuard => "WireGuard".to_owned(),
            _ => "no tunnel".to_owned(),
        }
    }

    fn pod(&self, port: PortId) -> String {
        self.running.pod_words(port)
    }

    fn peer(&self, id: PeerId) -> String {
        self.running.peer_words(id)
    }
}

/// Bytes of a VXLAN header (RFC 7348 section 5).
const VXLAN_LEN: usize = 8;

fn of_frame(bytes: &[u8]) -> Option<&[u8]> {
    let view = frame::parse(bytes).ok()?;
    let is_ip = matches!(
        view.ethertype(),
        EthernetProtocol::Ipv4 | EthernetProtocol::Ipv6
    );
    is_ip.then(|| &bytes[frame::HEADER_LEN..])
}

/// What an IP packet is, in words and with its addresses.
struct Read {
    source: IpAddr,
    destination: IpAddr,
    /// What it carries.
    content: String,
    /// The hops that are left, and whether it must not be fragmented.
    hops: String,
}

fn read(packet: &[u8]) -> Option<Read> {
    if packet.first()? >> 4 == 6 {
        return read_v6(packet);
    }
    let view = Ipv4Packet::new_checked(packet).ok()?;
    let content = match view.frag_offset() {
        0 => transport(view.next_header(), view.payload()),
        _ => "a fragment".to_owned(),
    };
    let cut = if view.dont_frag() {
        ", not to be fragmented"
    } else {
        ""
    };
    Some(Read {
        source: view.src_addr().into(),
        destination: view.dst_addr().into(),
        content,
        hops: format!("TTL {}{cut}", view.hop_limit()),
    })
}

fn read_v6(packet: &[u8]) -> Option<Read> {
    v6::check(packet).ok()?;
    let view = Ipv6Packet::new_unchecked(packet);
    let content = match v6::upper_layer(packet) {
        Ok(upper) if upper.is_later_fragment() => "a fragment".to_owned(),
        Ok(upper) => {
            let payload = packet.get(upper.offset..).unwrap_or_default();
            transport(upper.protocol.into(), payload)
        }
        Err(error) => error.to_string(),
    };
    Some(Read {
        source: view.src_addr().into(),
        destination: view.dst_addr().into(),
        content,
        hops: format!("hop limit {}", view.hop_limit()),
    })
}

fn summary(packet: &[u8]) -> Option<Summary> {
    let Read {
        source,
        destination,
        content,
        hops,
    } = read(packet)?;
    Some(Summary {
        source,
        destination,
        text: format!("{content}, {} bytes, {hops}", packet.len()),
    })
}

fn transport(protocol: IpProtocol, payload: &[u8]) -> String {
    match protocol {
        IpProtocol::Tcp => match TcpPacket::new_checked(payload) {
            Ok(it) => format!("TCP from port {} to {}", it.src_port(), it.dst_port()),
            Err(_) => "TCP".to_owned(),
        },
        // Of a fragment there is not all of the datagram.
        IpProtocol::Udp => match payload.first_chunk::<8>() {
            Some(header) => {
                let it = UdpPacket::new_unchecked(header);
                format!("UDP from port {} to {}", it.src_port(), it.dst_port())
            }
            None => "UDP".to_owned(),
        },
        IpProtocol::Icmp => match Icmpv4Packet::new_checked(payload) {
            Ok(it) => icmp(&it).to_owned(),
            Err(_) => "ICMP".to_owned(),
        },
        IpProtocol::Icmpv6 => match Icmpv6Packet::new_checked(payload) {
            Ok(it) => icmp_v6(&it).to_owned(),
            Err(_) => "ICMPv6".to_owned(),
        },
        other => format!("{other}"),
    }
}

fn icmp_v6(message: &Icmpv6Packet<&[u8]>) -> &'static str {
    match (message.msg_type(), message.msg_code()) {
        (Icmpv6Message::EchoRequest, _) => "ICMPv6 echo request",
        (Icmpv6Message::EchoReply, _) => "ICMPv6 echo reply",
        (Icmpv6Message::TimeExceeded, _) => "ICMPv6 time exceeded",
        (Icmpv6Message::PktTooBig, _) => "ICMPv6 packet too big",
        (Icmpv6Message::DstUnreachable, 0) => "ICMPv6 no route to destination",
        (Icmpv6Message::DstUnreachable, 1) => "ICMPv6 prohibited",
        (Icmpv6Message::DstUnreachable, 3) => "ICMPv6 address unreachable",
        (Icmpv6Message::DstUnreachable, 4) => "ICMPv6 port unreachable",
        (Icmpv6Message::DstUnreachable, _) => "ICMPv6 destination unreachable",
        (Icmpv6Message::NeighborSolicit, _) => "neighbour solicitation",
        (Icmpv6Message::NeighborAdvert, _) => "neighbour advertisement",
        _ => "ICMPv6",
    }
}

fn icmp(message: &Icmpv4Packet<&[u8]>) -> &'static str {
    match (message.msg_type(), message.msg_code()) {
        (Icmpv4Message::EchoRequest, _) => "ICMP echo request",
        (Icmpv4Message::EchoReply, _) => "ICMP echo reply",
        (Icmpv4Message::TimeExceeded, _) => "ICMP time exceeded",
        (Icmpv4Message::DstUnreachable, 0) => "ICMP network unreachable",
        (Icmpv4Message::DstUnreachable, 1) => "ICMP host unreachable",
        (Icmpv4Message::DstUnreachable, 3) => "ICMP port unreachable",
        (Icmpv4Message::DstUnreachable, 4) => "ICMP fragmentation needed",
        (Icmpv4Message::DstUnreachable, 13) => "ICMP prohibited",
        (Icmpv4Message::DstUnreachable, _) => "ICMP destination unreachable",
        _ => "ICMP",
    }
}

fn packet_words(bytes: &[u8]) -> String {
    match read(bytes) {
        Some(Read {
            source,
            destination,
            content,
            ..
        }) => format!(
            "{content}, {} bytes, from {source} to {destination}",
            bytes.len()
        ),
        None => format!("{} bytes", bytes.len()),
    }
}

fn frame_words(bytes: &[u8]) -> String {
    let payload = bytes.get(frame::HEADER_LEN..).unwrap_or_default();
    match (
        frame::parse(bytes).map(|view| view.ethertype()),
        frame::arp(payload),
    ) {
        (
            Ok(EthernetProtocol::Arp),
            Some(ArpRepr::EthernetIpv4 {
                operation,
                target_protocol_addr,
                source_protocol_addr,
                ..
            }),
        ) => match operation {
            ArpOperation::Request => format!("ARP request for {target_protocol_addr}"),
            _ => format!("ARP reply of {source_protocol_addr}"),
        },
        (Ok(EthernetProtocol::Ipv4 | EthernetProtocol::Ipv6), _) => packet_words(payload),
        _ => format!("a frame of {} bytes", bytes.len()),
    }
}

fn error_words(error: IcmpError) -> String {
    let error = match error {
        IcmpError::TimeExceeded | IcmpError::ReassemblyTimeExceeded => "time exceeded".to_owned(),
        IcmpError::NetUnreachable => "network unreachable".to_owned(),
        IcmpError::HostUnreachable => "host unreachable".to_owned(),
        IcmpError::ProtocolUnreachable => "protocol unreachable".to_owned(),
        IcmpError::PortUnreachable => "port unreachable".to_owned(),
        IcmpError::Prohibited => "prohibited".to_owned(),
        IcmpError::FragmentationNeeded(mtu) => format!("fragmentation needed, MTU {mtu}"),
        IcmpError::BeyondScope => "beyond the scope of the source address".to_owned(),
        IcmpError::ParameterProblem { code, pointer } => {
            format!("parameter problem {code} at byte {pointer}")
        }
    };
    format!("the sender is told: {error}")
}

const fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Ping => "echo",
    }
}

/// What has become of a packet that egress takes.
fn left(trace: &Trace) -> (Verdict, &'static str) {
    match trace.steps.last() {
        Some(TraceStep::Service { .. }) => (
            Verdict::Consumed,
            "A service of the gateway takes it, if there is one at this port.",
        ),
        Some(TraceStep::Reassembled) => (
            Verdict::Consumed,
            "It waits for the other fragments, and leaves with them.",
        ),
        Some(TraceStep::HandedOver { .. }) => {
            (Verdict::Egress, "It is for who has its flow to send it on.")
        }
        _ => (
            Verdict::Egress,
            "Leaves the pod network by a socket of this machine.",
        ),
    }
}

/// What has become of a packet that the node keeps.
fn consumed(trace: &Trace) -> &'static str {
    let is = |wanted: fn(&TraceStep) -> bool| trace.steps.iter().any(wanted);
    if is(|step| matches!(step, TraceStep::Gateway { .. })) {
        "The gateway takes it, and answers what it answers."
    } else if is(|step| matches!(step, TraceStep::InPieces { .. })) {
        "It goes on in pieces."
    } else {
        "It waits until the next hop is known."
    }
}
