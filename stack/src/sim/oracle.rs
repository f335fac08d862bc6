//! What must be true of every frame that a device gets, and of every subnet that a node has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use muslin_encap::ip::v6;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetProtocol, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv6Packet, UdpPacket,
};

use super::constants::PREFIX;
use super::device::{Identity, Report};
use super::due::Who;
use super::machine::Plugged;
use super::outcome::{Figures, Violation};
use super::outside::Server;
use super::packet::{self, quoted_source};
use crate::addresses::Addresses;
use crate::control::lease::{SubnetKey, lease_prefix};
use crate::datapath::frame;
use crate::datapath::port::PortId;

/// Which way a ping's packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Request,
    Answer,
}

/// What became of a TCP flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Open,
    Done,
    Failed(&'static str),
}

/// A TCP connection that a pod has begun to a server outside.
#[derive(Debug, Clone, Copy)]
pub(super) struct Errand {
    pub(super) who: Who,
    pub(super) port: PortId,
    pub(super) address: IpAddr,
    pub(super) server: Server,
    pub(super) since: Instant,
    /// How crowded egress was before.
    pub(super) crowded: u64,
    /// When all was back.
    pub(super) done: Option<Instant>,
}

/// What is known of everything that was sent.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    /// Devices by the number that their pings have, and the addresses that each was given.
    senders: BTreeMap<u64, Addresses>,
    flows: BTreeMap<u64, Flow>,
    /// Those of them that go to servers outside.
    pub(super) errands: BTreeMap<u64, Errand>,
    pings: u64,
    answered: BTreeSet<u64>,
    seen: BTreeSet<(u64, Way)>,
    /// Those that went on to a server outside.
    out: BTreeSet<u64>,
    /// Pings that a link has doubled.
    doubled: BTreeSet<u64>,
    /// Subnets whose record was taken from the machine that had written it.
    excused: BTreeSet<(SubnetKey, usize)>,
}

impl Oracle {
    pub(super) fn new_sender(&mut self, addresses: Addresses) -> u64 {
        let sender = self.senders.len() as u64 + 1;
        self.senders.insert(sender, addresses);
        sender
    }

    pub(super) fn new_flow(&mut self) -> u64 {
        let flow = self.flows.len() as u64 + 1;
        self.flows.insert(flow, Flow::Open);
        flow
    }

    pub(super) fn new_ping(&mut self) -> u64 {
        self.pings += 1;
        self.pings
    }

    pub(super) fn flow(&self, flow: u64) -> Flow {
        self.flows.get(&flow).copied().unwrap_or(Flow::Open)
    }

    /// Whether a device was given an address.
    pub(super) fn has(&self, sender: u64, address: IpAddr) -> bool {
        let addresses = self.senders.get(&sender);
        addresses.is_some_and(|addresses| addresses.iter().any(|it: IpAddr| it == address))
    }

    /// Who talks to which server in a flow.
    pub(super) fn client_of(&self, flow: u64) -> Option<(IpAddr, Option<Server>)> {
        let errand = self.errands.get(&flow);
        errand.map(|errand| (errand.address, Some(errand.server)))
    }

    /// A datagram or echo request goes on to a server outside; false if it has before.
    pub(super) fn goes_out(&mut self, identity: Identity) -> bool {
        self.out.insert(identity.ping)
    }

    pub(super) fn is_answered(&self, ping: u64) -> bool {
        self.answered.contains(&ping)
    }

    /// A link has doubled a datagram.
    pub(super) fn allow_again(&mut self, identity: Option<Identity>) {
        self.doubled.extend(identity.map(|identity| identity.ping));
    }

    /// A machine has lost a record to others, or to time.
    pub(super) fn excuse(&mut self, key: &str, writer: usize) {
        let prefix = lease_prefix(PREFIX);
        let subnet = key.strip_prefix(&prefix);
        let subnet = subnet.and_then(|key| key.strip_prefix('/')?.parse().ok());
        self.excused.extend(subnet.map(|subnet| (subnet, writer)));
    }

    pub(super) fn is_excused(&self, key: SubnetKey, machine: usize) -> bool {
        self.excused.contains(&(key, machine))
    }

    /// Takes what a device tells.
    pub(super) fn take_report(
        &mut self,
        now: Instant,
        report: Report,
        figures: &mut Figures,
    ) -> Result<(), Violation> {
        match report {
            Report::Talked(flow) => {
                figures.talks += 1;
                self.flows.insert(flow, Flow::Done);
                if let Some(errand) = self.errands.get_mut(&flow) {
                    if !errand.server.accepts() {
                        let server = errand.server;
                        return Err(Violation(format!("flow {flow} comes back from {server}")));
                    }
                    errand.done = Some(now);
                }
            }
            Report::Failed { flow, why } => {
                self.flows.insert(flow, Flow::Failed(why));
            }
            Report::Answered(ping) => {
                figures.answers += 1;
                self.answered.insert(ping);
            }
            Report::Wrong(what) => return Err(Violation(what)),
        }
        Ok(())
    }

    /// Checks a frame that a node delivers to a device: it is for this device, from where it says,
    /// and was not delivered before.
    pub(super) fn check_frame(&mut self, to: &Plugged, bytes: &[u8]) -> Result<(), Violation> {
        let wrong = |what: String| {
            let (name, address) = (&to.name, to.address);
            Err(Violation(format!(
                "{name} at {address} gets a frame {what}"
            )))
        };
        let Ok(view) = frame::parse(bytes) else {
            return wrong("without a header".to_owned());
        };
        let destination = view.dst_addr();
        if destination != to.mac && !destination.is_multicast() {
            return wrong(format!("for {destination}"));
        }
        if view.ethertype() == EthernetProtocol::Ipv6 && !destination.is_multicast() {
            let checked = self.check_packet_v6(to, view.payload());
            return checked.or_else(wrong);
        }
        if view.ethertype() != EthernetProtocol::Ipv4 || destination.is_multicast() {
            return Ok(());
        }
        // A broken header is for the receiver to see, if the switch has passed it on.
        let Ok(ip) = Ipv4Packet::new_checked(view.payload()) else {
            return Ok(());
        };
        if ip.dst_addr() != to.address {
            return wrong(format!("for {}", ip.dst_addr()));
        }
        if ip.more_frags() || ip.frag_offset() != 0 {
            return Ok(());
        }
        if ip.next_header() == IpProtocol::Udp {
            let datagram = UdpPacket::new_checked(ip.payload());
            if let Ok(datagram) = datagram {
                let checked = self.check_datagram(to, ip.src_addr().into(), datagram.payload());
                return checked.or_else(wrong);
            }
        }
        if let Some(source) = quoted_source(&ip)
            && source != to.address
        {
            return wrong(format!("that quotes a packet of {source}"));
        }
        if ip.next_header() != IpProtocol::Icmp {
            return Ok(());
        }
        let icmp = Icmpv4Packet::new_checked(ip.payload());
        let Some((way, data)) = icmp.ok().and_then(|icmp| {
            match Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::default()) {
                Ok(Icmpv4Repr::EchoRequest { data, .. }) => Some((Way::Request, data)),
                Ok(Icmpv4Repr::EchoReply { data, .. }) => Some((Way::Answer, data)),
                Ok(_) | Err(_) => None,
            }
        }) else {
            return Ok(());
        };
        let Some(identity) = Identity::read(data) else {
            return Ok(());
        };
        let ends = (ip.src_addr().into(), to.address.into());
        let checked = self.check_ping(to, ends, way, identity);
        checked.or_else(wrong)
    }

    /// A ping is its sender's, an answer for who asked, and each comes once.
    fn check_ping(
        &mut self,
        to: &Plugged,
        (from, own): (IpAddr, IpAddr),
        way: Way,
        Identity { ping, sender }: Identity,
    ) -> Result<(), String> {
        if way == Way::Request && !self.has(sender, from) {
            let says = "and says it is from";
            return Err(format!(
                "that is ping {ping} of device {sender} {says} {from}"
            ));
        }
        if way == Way::Answer && !self.has(sender, own) {
            return Err(format!("that answers ping {ping} of device {sender}"));
        }
        if Server::at(from).is_some() && sender != to.sender {
            return Err(format!("that answers ping {ping} of another"));
        }
        let is_new = self.seen.insert((ping, way));
        if !is_new && !self.doubled.contains(&ping) {
            return Err(format!("of ping {ping} for the second time"));
        }
        Ok(())
    }

    /// A datagram is its sender's; one from outside answers its receiver's, and comes once.
    fn check_datagram(&mut self, to: &Plugged, from: IpAddr, payload: &[u8]) -> Result<(), String> {
        let Some(Identity { ping, sender }) = Identity::read(payload) else {
            return Ok(());
        };
        if self.is_ours(from) {
            let says = "and says it is from";
            return match self.has(sender, from) {
                true => Ok(()),
                false => Err(format!(
                    "that is datagram {ping} of device {sender} {says} {from}"
                )),
            };
        }
        if sender != to.sender || !self.seen.insert((ping, Way::Answer)) {
            return Err(format!("that answers datagram {ping} of device {sender}"));
        }
        Ok(())
    }

    /// Whether an address is that of a device that was ever attached.
    fn is_ours(&self, address: IpAddr) -> bool {
        let mut all = self.senders.values();
        all.any(|addresses| addresses.iter().any(|it: IpAddr| it == address))
    }

    /// The same of an IPv6 packet for this device alone; what is wrong with it, if anything is.
    fn check_packet_v6(&mut self, to: &Plugged, packet: &[u8]) -> Result<(), String> {
        let Ok(ip) = Ipv6Packet::new_checked(packet) else {
            return Ok(());
        };
        let (from, destination) = (ip.src_addr(), ip.dst_addr());
        // Every pod has another link-local address, too.
        if Some(destination) != to.address_v6 && !destination.is_unicast_link_local() {
            return Err(format!("for {destination}"));
        }
        // Nothing of IPv6 is damaged on its way, but rogues have wrong checksums completed.
        packet::check_v6(packet, false).map_err(|wrong| format!("in which {wrong}"))?;
        let Ok(upper) = v6::upper_layer(packet) else {
            return Err("whose extension headers hide what it is about".to_owned());
        };
        let message = packet.get(upper.offset..).unwrap_or_default();
        let (way, data) = match (IpProtocol::from(upper.protocol), message) {
            _ if upper.fragment.is_some() => return Ok(()),
            (IpProtocol::Udp, [_, _, _, _, _, _, _, _, payload @ ..]) => {
                return self.check_datagram(to, from.into(), payload);
            }
            (IpProtocol::Icmpv6, [1..=4, _, _, _, _, _, _, _, quoted @ ..]) => {
                return check_quoted(to, quoted);
            }
            (IpProtocol::Icmpv6, [128, _, _, _, _, _, _, _, data @ ..]) => (Way::Request, data),
            (IpProtocol::Icmpv6, [129, _, _, _, _, _, _, _, data @ ..]) => (Way::Answer, data),
            _ => return Ok(()),
        };
        match Identity::read(data) {
            Some(identity) => self.check_ping(to, (from.into(), destination.into()), way, identity),
            None => Ok(()),
        }
    }
}

/// An ICMPv6 error is about what its receiver has sent.
fn check_quoted(to: &Plugged, quoted: &[u8]) -> Result<(), String> {
    if quoted.len() < v6::HEADER_LEN {
        return Ok(());
    }
    let source = Ipv6Packet::new_unchecked(quoted).src_addr();
    if Some(source) == to.address_v6 || source.is_unicast_link_local() {
        return Ok(());
    }
    Err(format!("that quotes a packet of {source}"))
}
