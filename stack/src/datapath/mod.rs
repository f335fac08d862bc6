//! The data path of one worker: its node, its egress, and what it tells its siblings.
//!
//! Frames, datagrams, events of the host's sockets, messages of siblings and the time go in. What
//! becomes of the packet that went in is returned, and it stays in its buffer; everything else that
//! comes out waits until it is polled ([`Datapath::poll_output`]), which callers do after every call.
//! Sockets of the host are reached through [`Host`], and nothing else is.

pub mod capture;
pub mod egress;
pub mod exchange;
pub mod filter;
pub mod frame;
pub mod gateway;
pub mod guard;
pub mod hash;
pub mod host_interface;
pub mod icmp;
pub mod link_local;
pub mod multicast;
pub mod ndp;
pub mod neighbour;
pub mod node;
pub mod observe;
pub mod peer;
pub mod port;
pub mod published;
pub mod rate;
mod receive;
pub mod route;
pub mod switch;
pub mod trace;
pub mod tunnel;
pub mod uplink;
mod verdict;
#[cfg(feature = "wireguard")]
pub mod wireguard;
pub mod work;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use muslin_encap::buffer::{HEADROOM, OwnedPacket, PacketBuf};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio::Header;
pub use receive::Merging;
use smoltcp::time::Instant;

use crate::datapath::egress::{
    Egress, FlowId, FlowKey, Holder, Host, Output as FromEgress, Owners, Ready,
};
use crate::datapath::filter::{Filter, Unfiltered};
use crate::datapath::host_interface::HostInterface;
use crate::datapath::node::{Node, Sender};
use crate::datapath::observe::{Observer, Unobserved};
use crate::datapath::port::PortId;
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// Bytes of the longest frame, and room in front of it.
const ROOM: usize = HEADROOM + frame::MAX_LEN;

/// One worker's data path.
///
/// ```
/// use muslin_encap::buffer::{HEADROOM, PacketBuf};
/// use muslin_stack::addresses::Nets;
/// use muslin_stack::datapath::{Datapath, Output};
/// use muslin_stack::datapath::egress::{self, Egress, NoHost, Policy};
/// use muslin_stack::datapath::node::{NodeConfig, Node, Verdict};
/// use muslin_stack::datapath::port::{Attachment, PortId};
/// use muslin_stack::datapath::tunnel::Tunnel;
/// use muslin_stack::{EthernetAddress, Instant};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (now, mtu) = (Instant::ZERO, muslin_encap::mtu::Mtu::new(1450)?);
/// let gateway_mac = EthernetAddress([2, 0, 0, 0, 0, 1]); // of 10.244.1.1
/// let seed = 7; // Random, in earnest.
/// let config = NodeConfig::new("10.244.1.0/24".parse::<Nets>()?, gateway_mac, Tunnel::Udp, mtu, seed);
/// let egress = egress::EgressConfig::new(Policy::closed(), mtu, seed);
/// let mut path = Datapath::new(Node::new(config, now)?, Egress::new(egress, now));
/// for pod in [2, 3] {
///     // It may send from these addresses only.
///     let mac = EthernetAddress([2, 0, 0, 0, 0, pod]);
///     let attachment = Attachment::new(mac, vec![[10, 244, 1, pod].into()]);
///     path.node_mut().attach(PortId(pod.into()), attachment);
/// }
///
/// // The first pod pings the second, and the gateway, with the room in front that headers need.
/// for (to, expected) in [(3, Verdict::Port(PortId(3))), (1, Verdict::Consumed)] {
///     let mut bytes = vec![0; HEADROOM];
///     etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, to])
///         .ipv4([10, 244, 1, 2], [10, 244, 1, to], 64)
///         .icmpv4_echo_request(1, 1)
///         .write(&mut bytes, b"ping")?;
///     let len = bytes.len() - HEADROOM;
///     let mut packet = PacketBuf::new(&mut bytes, HEADROOM, len)?;
///     let verdict = path.from_port(now, PortId(2), &mut packet, &mut NoHost);
///     assert_eq!(verdict, expected); // What `packet` holds now goes there.
///     // Whatever else there is to send: here the gateway's reply.
///     let mut replies = 0;
///     while let Some(output) = path.poll_output(now) {
///         assert!(matches!(output, Output::Packet(Verdict::Port(PortId(2)), _)));
///         replies += 1;
///     }
///     assert_eq!(replies, i32::from(to == 1));
/// }
/// # Ok(())
/// # }
/// ```
pub struct Datapath<O = Unobserved, F = Unfiltered> {
    node: Node<O, F>,
    egress: Egress,
    /// Whether there are other workers.
    has_siblings: bool,
    messages: VecDeque<(Siblings, SiblingMessage)>,
    /// Where packets of the node's own are made.
    room: Box<[u8]>,
    /// A packet that came in pieces, in one.
    flat: Vec<u8>,
    /// Acknowledgements that came lately by the tunnel, and by the uplink; taken out while a batch is
    /// received.
    acks: Option<Box<receive::Acks>>,
}

/// Who a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Siblings {
    /// All other workers.
    All,
    /// The worker of this number.
    One(u8),
    /// The process that was the node before this one (see [`Egress::succeed`]).
    Predecessor,
}

/// What a worker tells another.
#[derive(Debug, Clone)]
pub enum SiblingMessage {
    /// A frame with ARP, neighbour discovery or a report of a group's member from a port or, without one, from the uplink. An
    /// answer need not come to the worker that asked.
    Neighbour(Option<PortId>, Vec<u8>),
    /// An IPv4 packet of a pod whose flow that worker has, or that process.
    Stray(OwnedPacket),
    /// The same from the process that is the node now, for whichever worker has its flow.
    FromSuccessor(OwnedPacket),
}

/// What is to be done besides what calls return.
#[derive(Debug)]
pub enum Output<'a> {
    /// A packet of the node's own, or for a pod from egress, and what is to be done with it.
    Packet(Verdict, PacketBuf<'a>),
    /// Something to tell other workers, which take it by [`Datapath::from_sibling`].
    Message(Siblings, SiblingMessage),
}

/// Where a packet is in a buffer, and what is still to be done to it.
#[derive(Debug, Clone, Copy)]
struct Place {
    headroom: usize,
    len: usize,
    offload: Header,
}

impl<O: Observer, F: Filter> Datapath<O, F> {
    /// A data path without siblings. What its node hands to egress [`Node::set_egress`] says.
    #[must_use]
    pub fn new(node: Node<O, F>, egress: Egress) -> Self {
        Self {
            node,
            egress,
            has_siblings: false,
            messages: VecDeque::new(),
            room: vec![0; ROOM].into_boxed_slice(),
            flat: Vec::new(),
            acks: Some(Box::default()),
        }
    }

    /// Says that this is the data path of that worker, of a node that has several.
    pub fn share(&mut self, owners: Arc<Owners>, worker: u8) {
        self.has_siblings = true;
        self.egress.share(owners, worker);
    }

    /// Its node.
    #[must_use]
    pub const fn node(&self) -> &Node<O, F> {
        &self.node
    }

    /// The same, to be told what the control plane knows.
    pub const fn node_mut(&mut self) -> &mut Node<O, F> {
        &mut self.node
    }

    /// Its egress.
    #[must_use]
    pub const fn egress(&self) -> &Egress {
        &self.egress
    }

    /// Takes an Ethernet frame from a port.
    pub fn from_port(
        &mut self,
        now: Instant,
        port: PortId,
        packet: &mut PacketBuf<'_>,
        host: &mut impl Host,
    ) -> Verdict {
        let bytes = packet.as_slice();
        if self.has_siblings && (frame::is_arp(bytes) || frame::is_neighbour_discovery(bytes)) {
            self.tell_all(SiblingMessage::Neighbour(Some(port), bytes.to_vec()));
        }
        let verdict = self.node.from_port(now, port, packet);
        self.leave(now, verdict, packet, host)
    }

    /// Takes the payload of a tunnel's datagram that came from `source`.
    pub fn from_underlay(
        &mut self,
        now: Instant,
        source: SocketAddr,
        packet: &mut PacketBuf<'_>,
        host: &mut impl Host,
    ) -> Verdict {
        let sender = self.node.sender(source);
        self.take_datagram(now, sender, packet, host)
    }

    fn take_datagram(
        &mut self,
        now: Instant,
        sender: Sender,
        packet: &mut PacketBuf<'_>,
        host: &mut impl Host,
    ) -> Verdict {
        let verdict = self.node.from_sender(now, sender, packet);
        self.leave(now, verdict, packet, host)
    }

    /// Takes an Ethernet frame from the uplink.
    pub fn from_uplink(
        &mut self,
        now: Instant,
        packet: &mut PacketBuf<'_>,
        host: &mut impl Host,
    ) -> Verdict {
        let bytes = packet.as_slice();
        let tells_hosts = frame::is_arp(bytes) || frame::is_neighbour_discovery(bytes);
        if self.has_siblings && tells_hosts {
            self.tell_all(SiblingMessage::Neighbour(None, packet.as_slice().to_vec()));
        }
        let verdict = self.node.from_uplink(now, packet);
        // Packets of one flow come to one worker. The others send to where the host was until they
        // have looked into it, too.
        if let Some(claim) = self.node.take_claim()
            && self.has_siblings
            && !tells_hosts
        {
            self.tell_all(SiblingMessage::Neighbour(None, claim));
        }
        self.leave(now, verdict, packet, host)
    }

    /// Takes an IPv4 packet from the host interface.
    pub fn from_host(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Verdict {
        self.node.from_host(now, packet)
    }

    /// The host interface is there, or is another one, or is gone.
    pub fn set_host(&mut self, host: Option<HostInterface>) {
        self.node.set_host(host, self.egress.policy());
    }

    /// Takes what another worker has to say.
    pub fn from_sibling(&mut self, now: Instant, message: SiblingMessage, host: &mut impl Host) {
        match message {
            SiblingMessage::Neighbour(Some(port), frame) => {
                self.node.learn_from_sibling(now, port, &frame)
            }
            SiblingMessage::Neighbour(None, frame) => {
                self.node.learn_from_sibling_uplink(now, &frame)
            }
            SiblingMessage::Stray(mut packet) => {
                let taken = self.egress.from_sibling(now, &packet.packet(), host);
                self.count_taken(taken);
            }
            SiblingMessage::FromSuccessor(mut packet) => {
                let taken = self.egress.from_pod(now, &packet.packet(), host);
                self.count_taken(taken);
            }
        }
    }

    fn count_taken(&mut self, taken: Result<(), DropReason>) {
        if let Err(reason) = taken {
            self.node.count_drops(reason, 1);
        }
    }

    /// Says which flows the process before this one has (see [`Egress::succeed`]).
    pub fn succeed(&mut self, flows: impl IntoIterator<Item = FlowKey>) {
        self.egress.succeed(flows);
    }

    /// Says which of them have ended; all, if that process has.
    pub fn forget_predecessors(&mut self, flows: Option<&[FlowKey]>) {
        match flows {
            Some(flows) => self.egress.forget_predecessors(flows),
            None => self.egress.end_predecessor(),
        }
    }

    /// Takes an event of a flow's socket.
    pub fn ready(&mut self, now: Instant, flow: FlowId, ready: Ready, host: &mut impl Host) {
        self.egress.ready(now, flow, ready, host);
    }

    /// Says that UDP flows with this port of a pod may begin on the host's side (see
    /// [`Egress::expect_datagrams`]).
    ///
    /// # Errors
    /// `EgressFamily`.
    pub fn expect_datagrams(&mut self, pod: SocketAddr) -> Result<(), DropReason> {
        self.egress.expect_datagrams(pod)
    }

    /// The store is here now: pods do not get there outside.
    pub fn set_stores(&mut self, stores: Vec<SocketAddr>) {
        self.node.set_stores(&stores);
        self.egress.set_stores(stores);
    }

    /// Pods have another MTU, in bytes of IP packets.
    pub fn set_mtu(&mut self, mtu: Mtu, now: Instant) {
        self.node.set_mtu(mtu);
        self.egress.set_mtu(mtu, now);
    }

    /// The same of IPv6, which never has less than 1,280 bytes.
    pub fn set_mtu_v6(&mut self, mtu: Mtu) {
        self.node.set_mtu_v6(mtu);
    }

    /// Detaches a port, and ends the flows of its pod; false if there was none.
    pub fn detach(&mut self, port: PortId, host: &mut impl Host) -> bool {
        let attached = self.node.ports().find(|(id, _)| *id == port);
        let addresses: Vec<IpAddr> =
            attached.map_or_else(Vec::new, |(_, port)| port.attachment.addresses.clone());
        for address in addresses {
            self.egress.forget_pod(address, host);
        }
        self.node.detach(port)
    }

    /// When [`Self::handle_timeout`] is next needed.
    #[must_use]
    pub fn poll_at(&self) -> Instant {
        let (node, egress) = (self.node.poll_at(), self.egress.poll_at());
        egress.map_or(node, |egress| egress.min(node))
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant, host: &mut impl Host) {
        if now >= self.node.poll_at() {
            self.node.handle_timeout(now);
        }
        if self.egress.poll_at().is_some_and(|due| now >= due) {
            self.egress.handle_timeout(now, host);
        }
    }

    /// What else is to be done. To be called after every other call until nothing is left.
    pub fn poll_output(&mut self, now: Instant) -> Option<Output<'_>> {
        loop {
            if let Some((to, message)) = self.messages.pop_front() {
                return Some(Output::Message(to, message));
            }
            if self.node.has_output() {
                if let Some((port, frame)) = self.node.take_report_for_siblings() {
                    if self.has_siblings {
                        self.tell_all(SiblingMessage::Neighbour(Some(port), frame));
                    }
                    continue;
                }
                let mut packet = PacketBuf::new(&mut self.room, HEADROOM, 0).ok()?;
                let verdict = self.node.poll_output(&mut packet)?;
                return Some(Output::Packet(verdict, packet));
            }
            match self.route_output(now)? {
                (Verdict::Consumed | Verdict::Drop(_), _) => {}
                (verdict, place) => {
                    let packet = PacketBuf::new(self.egress.polled(), place.headroom, place.len);
                    return Some(Output::Packet(
                        verdict,
                        packet.ok()?.with_offload(place.offload),
                    ));
                }
            }
        }
    }

    /// Has the node route what egress has.
    fn route_output(&mut self, now: Instant) -> Option<(Verdict, Place)> {
        let mut place = Place {
            headroom: 0,
            len: 0,
            offload: Header::default(),
        };
        let verdict = match self.egress.poll_output()? {
            FromEgress::Packet(mut packet) => {
                let verdict = self.node.from_egress(now, &mut packet);
                place = Place {
                    headroom: packet.headroom(),
                    len: packet.len(),
                    offload: packet.offload(),
                };
                verdict
            }
            FromEgress::Error(error, offender) => {
                self.node.send_icmp_error(now, error, offender);
                Verdict::Consumed
            }
            FromEgress::Relayed(from, error, offender) => {
                self.node.forward_icmp_error(now, from, error, offender);
                Verdict::Consumed
            }
            FromEgress::Lost(reason, packets) => {
                self.node.count_drops(reason, packets);
                Verdict::Consumed
            }
            FromEgress::HandOver(holder, packet) => {
                let to = match holder {
                    Holder::Worker(worker) => Siblings::One(worker),
                    Holder::Predecessor => Siblings::Predecessor,
                };
                let stray = SiblingMessage::Stray(packet);
                self.messages.push_back((to, stray));
                Verdict::Consumed
            }
        };
        if let Verdict::Drop(reason) = verdict {
            self.egress.undelivered(now, reason);
        }
        Some((verdict, place))
    }

    /// Gives a packet that leaves the overlay to egress.
    fn leave(
        &mut self,
        now: Instant,
        verdict: Verdict,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
    ) -> Verdict {
        if verdict != Verdict::Egress {
            return verdict;
        }
        let taken = if packet.tail().is_empty() {
            self.egress.from_pod(now, packet, host)
        } else {
            self.flat.clear();
            self.flat.extend_from_slice(packet.as_slice());
            for piece in packet.tail() {
                self.flat.extend_from_slice(piece);
            }
            let len = self.flat.len();
            let whole = PacketBuf::new(&mut self.flat, 0, len);
            let whole = whole.map_err(|_| DropReason::HeadroomExceeded);
            whole.and_then(|whole| {
                let whole = whole.with_offload(packet.offload());
                self.egress.from_pod(now, &whole, host)
            })
        };
        match taken {
            Ok(()) => Verdict::Consumed,
            Err(reason) => {
                self.node.lose_in_egress(reason, packet);
                Verdict::Drop(reason)
            }
        }
    }

    fn tell_all(&mut self, message: SiblingMessage) {
        self.messages.push_back((Siblings::All, message));
    }
}
