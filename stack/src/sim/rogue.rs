//! A pod that does what pods must not do.

use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv4Packet,
    Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr,
};

use super::constants::{METADATA, TUNNEL};
use super::device::{Assigned, Device, Identity, Order, Sent};
use super::forge;
use super::outside::Server;
use super::rogue_v6;
use crate::datapath::frame;

/// Where names are resolved.
const PORT: u16 = 53;
/// Frames of a flood: five turns, if each is copied to one other pod.
const FLOOD: usize = 300;
/// A MAC address that is not its own.
const FOREIGN: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0xff, 0xff]);

/// A pod that does not behave.
pub(super) struct Rogue {
    assigned: Assigned,
    frames: Vec<Sent>,
}

impl Rogue {
    /// Tricks that it knows.
    pub(super) const TRICKS: u8 = 18;
    /// The one that is about virtio-net headers.
    const LIES: u8 = 10;
    /// The first of those that are about addresses outside the overlay.
    pub(super) const OUTSIDE: u8 = 11;
    /// The last of all: more at once than a turn has room for.
    const FLOOD: u8 = 17;

    pub(super) fn new(assigned: &Assigned) -> Self {
        Self {
            assigned: *assigned,
            frames: Vec::new(),
        }
    }

    /// What a trick is, in words.
    pub(super) const fn describe(trick: u8) -> &'static str {
        match trick {
            0 => "pings with the victim's address as its own",
            1 => "pings all from a MAC address that is not its own",
            2 => "says that it is the gateway",
            3 => "says that it has the victim's address",
            4 => "hides a forged packet behind a VLAN tag",
            5 => "sends half a header",
            6 => "sends from the gateway's MAC address",
            7 => "pings from 127.0.0.1",
            8 => "pings with a time to live of 1",
            10 => "sends the victim packets whose virtio-net headers lie",
            11 => "begins many connections to a server outside, and says no more",
            12 => "asks a server outside with a wrong checksum",
            13 => "sends a server outside the first half of a question",
            14 => "sends to the tunnels of nodes by way of the host",
            15 => "tries ports of the gateway",
            16 => "asks 169.254.169.254 for the machine's secrets",
            17 => "sends many frames to all, as fast as it can",
            _ => "pings the victim with its own address, to no MAC address of anybody",
        }
    }

    /// Packets to addresses outside.
    fn trick_outside(&self, trick: u8, identity: Identity) -> Vec<Vec<u8>> {
        let server = Server::Good.address();
        let ask = |to| vec![forge::datagram(self.assigned.address, to, identity)];
        let packets = match trick {
            11 => forge::syns(self.assigned.address, server, identity),
            12 => ask(server).into_iter().map(forge::broken).collect(),
            13 => ask(server).into_iter().map(forge::half).collect(),
            14 => ask(TUNNEL),
            15 => {
                let port = SocketAddrV4::new(self.assigned.gateway, PORT);
                [
                    forge::syns(self.assigned.address, port, identity),
                    ask(port),
                ]
                .concat()
            }
            _ => ask(METADATA),
        };
        let mac = (self.assigned.mac, self.assigned.gateway_mac);
        let frames = packets.iter();
        let frames = frames.map(|it| ethernet(mac.0, mac.1, EthernetProtocol::Ipv4, it));
        frames.collect()
    }

    /// Datagrams to all, more than are taken in a turn.
    fn flood(&self, identity: Identity) -> Vec<Vec<u8>> {
        let to = SocketAddrV4::new(Ipv4Addr::BROADCAST, PORT);
        let datagram = forge::datagram(self.assigned.address, to, identity);
        let (own, all) = (self.assigned.mac, EthernetAddress::BROADCAST);
        let frame = ethernet(own, all, EthernetProtocol::Ipv4, &datagram);
        vec![frame; FLOOD]
    }

    /// Packets to the victim and to a server outside, each with headers that no kernel makes of it.
    fn lies(&self, victim: Ipv4Addr, identity: Identity) -> Vec<Sent> {
        let victim = SocketAddrV4::new(victim, PORT);
        let long = |to| forge::long_datagram(self.assigned.address, to, identity);
        let mut packets = forge::syns(self.assigned.address, victim, identity);
        packets.truncate(1);
        packets.push(long(victim));
        packets.push(ping((self.assigned.address, *victim.ip()), 64, identity));
        let lie = |packet: Vec<u8>| {
            let to = EthernetProtocol::Ipv4;
            let frame = ethernet(self.assigned.mac, self.assigned.gateway_mac, to, &packet);
            let headers = forge::headers(identity).into_iter();
            headers.map(move |header| Sent {
                frame: frame.clone(),
                header,
            })
        };
        let mut sent: Vec<_> = packets.into_iter().flat_map(lie).collect();
        // What is outside hears of each datagram once.
        let outside: Vec<_> = lie(long(Server::Good.address())).collect();
        let one = identity.ping as usize % outside.len().max(1);
        sent.extend(outside.into_iter().nth(one));
        sent
    }

    fn trick(&self, trick: u8, victim: Ipv4Addr, identity: Identity) -> Vec<u8> {
        let own = self.assigned.mac;
        let ping = |source, ttl| ping((source, victim), ttl, identity);
        let claim = |address| {
            frame::write_arp(
                ArpOperation::Reply,
                (own, address),
                (EthernetAddress::BROADCAST, address),
            )
            .to_vec()
        };
        let to_gateway = |source, packet: &[u8]| {
            ethernet(
                source,
                self.assigned.gateway_mac,
                EthernetProtocol::Ipv4,
                packet,
            )
        };
        match trick {
            0 => to_gateway(own, &ping(victim, 64)),
            1 => ethernet(
                FOREIGN,
                EthernetAddress::BROADCAST,
                EthernetProtocol::Ipv4,
                &ping(self.assigned.address, 64),
            ),
            2 => claim(self.assigned.gateway),
            3 => claim(victim),
            4 => {
                let tagged = [&[0, 0, 8, 0][..], &ping(victim, 64)].concat();
                let tag = EthernetProtocol::Unknown(0x8100);
                ethernet(own, EthernetAddress::BROADCAST, tag, &tagged)
            }
            5 => to_gateway(own, &ping(self.assigned.address, 64)[..11]),
            6 => to_gateway(self.assigned.gateway_mac, &ping(self.assigned.address, 64)),
            7 => to_gateway(own, &ping(Ipv4Addr::LOCALHOST, 64)),
            8 => to_gateway(own, &ping(self.assigned.address, 1)),
            _ => ethernet(
                own,
                FOREIGN,
                EthernetProtocol::Ipv4,
                &ping(self.assigned.address, 64),
            ),
        }
    }
}

impl Device for Rogue {
    fn receive(&mut self, _: Instant, _: &[u8]) {}

    fn order(&mut self, _: Instant, order: Order) {
        if let Order::Misbehave {
            victim,
            victim_v6,
            identity,
            trick,
        } = order
        {
            let in_v6 = victim_v6.map(|it| rogue_v6::trick(&self.assigned, trick, it, identity));
            self.frames.extend(in_v6.into_iter().flatten());
            let frames = match trick {
                Self::LIES => return self.frames.extend(self.lies(victim, identity)),
                Self::FLOOD => self.flood(identity),
                Self::OUTSIDE..Self::FLOOD => self.trick_outside(trick, identity),
                _ => vec![self.trick(trick, victim, identity)],
            };
            self.frames.extend(frames.into_iter().map(Sent::from));
        }
    }

    fn poll(&mut self, _: Instant) -> Vec<Sent> {
        std::mem::take(&mut self.frames)
    }

    fn poll_at(&mut self, _: Instant) -> Option<Instant> {
        None
    }
}

fn ethernet(
    source: EthernetAddress,
    destination: EthernetAddress,
    ethertype: EthernetProtocol,
    payload: &[u8],
) -> Vec<u8> {
    let repr = EthernetRepr {
        src_addr: source,
        dst_addr: destination,
        ethertype,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut EthernetFrame::new_unchecked(&mut bytes));
    bytes.extend(payload);
    bytes
}

fn ping((source, destination): (Ipv4Addr, Ipv4Addr), ttl: u8, identity: Identity) -> Vec<u8> {
    let checksums = ChecksumCapabilities::default();
    let data = identity.payload(Identity::LEN);
    let icmp = Icmpv4Repr::EchoRequest {
        ident: 7,
        seq_no: 1,
        data: &data,
    };
    let ip = Ipv4Repr {
        src_addr: source,
        dst_addr: destination,
        next_header: IpProtocol::Icmp,
        payload_len: icmp.buffer_len(),
        hop_limit: ttl,
    };
    let mut bytes = vec![0; ip.buffer_len() + icmp.buffer_len()];
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes);
    ip.emit(&mut packet, &checksums);
    icmp.emit(
        &mut Icmpv4Packet::new_unchecked(packet.payload_mut()),
        &checksums,
    );
    bytes
}
