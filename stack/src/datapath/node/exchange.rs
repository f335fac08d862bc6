//! Messages of other nodes' gateways, and those for them.

use std::net::IpAddr;

use muslin_encap::buffer::PacketBuf;
use smoltcp::time::Instant;
use smoltcp::wire::{Ipv4Packet, Ipv6Packet};

use super::router::Origin;
use super::{NextHop, Node};
use crate::datapath::exchange::{self, Mailbox, Message};
use crate::datapath::filter::Filter;
use crate::datapath::observe::Observer;
use crate::drops::DropReason;

impl<O: Observer, F: Filter> Node<O, F> {
    /// Takes messages of other nodes from now on, or no more.
    pub fn set_exchange(&mut self, now: Instant, takes: bool) {
        self.exchange = takes.then(|| Mailbox::new(now));
    }

    /// The next message that has come.
    pub fn poll_exchange(&mut self) -> Option<Message> {
        self.exchange.as_mut()?.next()
    }

    /// Sends a message to another node's gateway. It waits in the queue of what the node says itself.
    ///
    /// # Errors
    /// If it is too long, or there is no such node.
    pub fn send_exchange(
        &mut self,
        now: Instant,
        to: IpAddr,
        message: &[u8],
    ) -> Result<(), DropReason> {
        self.begin(now);
        if !self.is_peers_gateway(to) {
            return Err(DropReason::NoRoute);
        }
        let packet = match to {
            IpAddr::V4(to) => exchange::packet(self.gateway_ipv4(), to, message),
            IpAddr::V6(to) => {
                let home = self.home_v6.ok_or(DropReason::NoRoute)?;
                self.ident = self.ident.wrapping_add(1);
                exchange::packet_v6(home.gateway, to, self.ident.into(), message)
            }
        };
        self.route_own(now, &packet.ok_or(DropReason::FragmentationNeeded)?);
        Ok(())
    }

    /// Whether a packet to the gateway, whose source is checked, is a message of another node's gateway,
    /// and messages are taken.
    pub(super) fn is_exchange(&self, origin: Origin, packet: &PacketBuf<'_>) -> bool {
        let view = Ipv4Packet::new_unchecked(packet.as_slice());
        self.exchange.is_some()
            && matches!(origin, Origin::Peer(_) | Origin::Uplink(_))
            && view.dst_addr() == self.gateway_ipv4()
            && exchange::is_message(packet)
            && self.is_peers_gateway(view.src_addr().into())
    }

    /// The same of a packet of IPv6.
    pub(super) fn is_exchange_v6(&self, origin: Origin, packet: &PacketBuf<'_>) -> bool {
        let view = Ipv6Packet::new_unchecked(packet.as_slice());
        self.exchange.is_some()
            && matches!(origin, Origin::Peer(_) | Origin::Uplink(_))
            && self
                .home_v6
                .is_some_and(|home| home.gateway == view.dst_addr())
            && exchange::is_message_v6(packet)
            && self.is_peers_gateway(view.src_addr().into())
    }

    /// Keeps such a packet's message.
    pub(super) fn take_exchange(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        let mailbox = self.exchange.as_mut().ok_or(DropReason::GatewayPort)?;
        mailbox.take(now, packet.as_slice())
    }

    /// Keeps the message of one of IPv6.
    pub(super) fn take_exchange_v6(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        let mailbox = self.exchange.as_mut().ok_or(DropReason::GatewayPort)?;
        mailbox.take_v6(now, packet.as_slice())
    }

    fn is_peers_gateway(&self, address: IpAddr) -> bool {
        let route = self.routes.entry(address);
        route.is_some_and(|(lease, next)| {
            matches!(next, NextHop::Peer(_)) && exchange::is_gateway(address, lease)
        })
    }
}
