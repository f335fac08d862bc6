//! The LAN: frames between machines on one link, and the machines' kernels, which own their
//! addresses and answer ARP and neighbour discovery for them whether a node runs or not.

use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::offload::virtio::Header;
use smoltcp::wire::{ArpOperation, ArpRepr, EthernetAddress, EthernetProtocol};

use super::Cluster;
use crate::addresses::Nets;
use crate::control::lease::Backend;
use crate::datapath::frame;
use crate::datapath::ndp::{self, Flags, Held, Message};
use crate::datapath::trace::Entrance;
use crate::datapath::uplink::Uplink;
use crate::sim::constants::PUBLIC_IPV6;
use crate::sim::device::Identity;
use crate::sim::due::{Due, Who};
use crate::sim::link::Fate;
use crate::sim::machine::Machine;
use crate::sim::outcome::Violation;
use crate::sim::plan::Setup;

/// A host on every link that belongs to no node.
const LIAR: EthernetAddress = EthernetAddress([2, 0x1a, 0xff, 0, 0, 1]);

impl Setup {
    /// The link that an address is on, where packets go bare: with host-gw all are on one.
    fn link(&self, address: Ipv4Addr) -> Option<Ipv4Net> {
        let len = match &self.config.backend {
            Backend::HostGw => 12,
            backend if backend.is_direct() => 30,
            _ => return None,
        };
        Ipv4Net::new(address, len).ok().map(|net| net.trunc())
    }

    /// Whether packets of IPv6 go bare, too: with host-gw, where all machines are on one link.
    fn has_link_v6(&self) -> bool {
        matches!(self.config.backend, Backend::HostGw)
    }
}

impl Machine {
    /// The MAC address of its interface, which is a new one with each card.
    fn link_mac(&self, number: usize) -> EthernetAddress {
        let [high, low] = (number as u16).to_be_bytes();
        EthernetAddress([2, 0x1a, 0, self.cards, high, low])
    }

    /// What its kernel says to who looks for its public IPv6 address.
    fn advertisement(&self, number: usize, bytes: &[u8]) -> Option<[u8; ndp::FRAME_LEN]> {
        let view = frame::parse(bytes).ok()?;
        if view.ethertype() != EthernetProtocol::Ipv6 {
            return None;
        }
        let Ok(Some(Message::Solicitation(asked))) = Message::parse(view.payload()) else {
            return None;
        };
        let held = Held {
            address: self.public_ipv6?,
            router: false,
            anycast: false,
        };
        ndp::answer(&asked, view.src_addr(), &[held], self.link_mac(number))
    }
}

impl Cluster {
    /// Tells a machine's node what it is on its link.
    pub(super) fn tell_link(&mut self, number: usize) {
        let machine = &mut self.machines[number];
        let ipv6 = self.setup.has_link_v6().then_some(machine.public_ipv6);
        let ipv6 = ipv6.flatten().and_then(|address| {
            let prefix_len = PUBLIC_IPV6.prefix_len();
            Ipv6Net::new(address, prefix_len).ok()
        });
        let uplink = self.setup.link(machine.public_ip).map(|prefix| {
            let ipv4 = Ipv4Net::new_assert(machine.public_ip, prefix.prefix_len());
            Uplink {
                mac: machine.link_mac(number),
                nets: Nets::with_ipv4(ipv4, ipv6),
                mtu: machine.mtu,
                answers: false,
            }
        });
        let process = machine.process.as_mut();
        if let Some(running) = process.and_then(|process| process.running.as_mut()) {
            running.each_node(|node| node.set_uplink(uplink));
        }
    }

    /// A machine gets another network card.
    pub(super) fn change_card(&mut self, number: usize) {
        let machine = &mut self.machines[number];
        machine.cards = machine.cards.wrapping_add(1);
        self.tell_link(number);
    }

    /// Somebody claims to have a machine's addresses.
    pub(super) fn lie(&mut self, victim: usize) -> Result<(), Violation> {
        let address = self.machines[victim].public_ip;
        let all = (EthernetAddress::BROADCAST, address);
        let lie = frame::write_arp(ArpOperation::Request, (LIAR, address), all);
        let lie_v6 = self.machines[victim].public_ipv6.map(|address| {
            let all = (ndp::multicast_mac(ndp::ALL_NODES), ndp::ALL_NODES);
            let flags = Flags {
                override_: true,
                ..Flags::default()
            };
            ndp::write_advertisement((LIAR, address), address, all, flags)
        });
        for to in self.on_link(victim) {
            let now = self.queue.now();
            self.queue.schedule(now, Due::Frame(to, lie.to_vec()));
            if let Some(lie) = lie_v6 {
                self.queue.schedule(now, Due::Frame(to, lie.to_vec()));
            }
        }
        Ok(())
    }

    fn on_link(&self, number: usize) -> Vec<usize> {
        let link = |number: usize| self.setup.link(self.machines[number].public_ip);
        let own = link(number);
        (0..self.machines.len())
            .filter(|other| *other != number && own.is_some() && link(*other) == own)
            .collect()
    }

    /// Sends a frame of a machine to whom it is for.
    pub(super) fn send_frame(&mut self, from: usize, bytes: &[u8]) -> Result<(), Violation> {
        let machine = &self.machines[from];
        let len = bytes.len().saturating_sub(frame::HEADER_LEN);
        if len > machine.mtu.get().into() {
            return Err(Violation(format!(
                "machine {from} sends {len} bytes on a link with an MTU of {}",
                machine.mtu.get()
            )));
        }
        let destination = match frame::parse(bytes) {
            Ok(view) if view.src_addr() == machine.link_mac(from) => view.dst_addr(),
            _ => {
                return Err(Violation(format!(
                    "machine {from} sends a frame that is not its own"
                )));
            }
        };
        self.figures.datagrams += 1;
        for to in self.on_link(from) {
            let mac = self.machines[to].link_mac(to);
            if destination.is_multicast() || destination == mac {
                self.carry_frame((from, to), bytes);
            }
        }
        Ok(())
    }

    /// What is damaged on its way is not taken by the receiver's card.
    fn carry_frame(&mut self, (from, to): (usize, usize), bytes: &[u8]) {
        let now = self.queue.now();
        let len = bytes.len() - frame::HEADER_LEN;
        let fate = match len > self.machines[to].mtu.get().into() {
            true => Fate::Lost("too large for the receiver"),
            false => self.underlay.carry(now, (from, to), bytes.len(), len),
        };
        match fate {
            Fate::Lost(why) => self.log.note(now, || {
                format!("a frame from machine {from} to machine {to} is lost: {why}")
            }),
            Fate::Arrives {
                corrupted: Some(_), ..
            } => self.log.note(now, || {
                format!("a frame from machine {from} to machine {to} is damaged")
            }),
            Fate::Arrives { at, again, .. } => {
                if let Some(at) = again {
                    self.oracle.allow_again(Identity::find(bytes));
                    self.queue.schedule(at, Due::Frame(to, bytes.to_vec()));
                }
                self.queue.schedule(at, Due::Frame(to, bytes.to_vec()));
            }
        }
    }

    /// A frame arrives at a machine: its kernel answers ARP, and its node has its share.
    pub(super) fn take_link_frame(&mut self, to: usize, bytes: &[u8]) -> Result<(), Violation> {
        let machine = &self.machines[to];
        let mac = machine.link_mac(to);
        let payload = bytes.get(frame::HEADER_LEN..).unwrap_or_default();
        let destination = frame::parse(bytes).map(|view| view.dst_addr());
        if destination.is_ok_and(|it| it != mac && !it.is_multicast()) {
            // It was for another card.
            return Ok(());
        }
        if frame::is_arp(bytes)
            && let Some(ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Request,
                source_hardware_addr,
                source_protocol_addr,
                target_protocol_addr,
                ..
            }) = frame::arp(payload)
            && target_protocol_addr == machine.public_ip
            && source_protocol_addr != machine.public_ip
        {
            let answer = frame::write_arp(
                ArpOperation::Reply,
                (mac, target_protocol_addr),
                (source_hardware_addr, source_protocol_addr),
            );
            self.send_frame(to, &answer)?;
        }
        if let Some(answer) = self.machines[to].advertisement(to, bytes) {
            self.send_frame(to, &answer)?;
        }
        match self.who(to) {
            Some(who) => self.give_frame(who, bytes),
            None => Ok(()),
        }
    }

    fn give_frame(&mut self, who: Who, bytes: &[u8]) -> Result<(), Violation> {
        let bare = (bytes, Header::default());
        let worker = self.worker_of_frame(who, bytes);
        self.through((who, worker), Entrance::Uplink, bare)
            .map(drop)
    }
}
