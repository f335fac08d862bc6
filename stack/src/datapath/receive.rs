//! Batches of what the underlay received: packets are merged before the node takes them.
//!
//! Writing one superpacket into a pod costs about what writing one segment does (see
//! [`muslin_encap::offload::merge`]). Only what a peer sent is merged: whoever else sends something
//! costs no more than the look at its source address.

use std::net::SocketAddr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::merge::{self, Merged, Merger};
use muslin_encap::offload::virtio::{self, Checksum, Header};
use muslin_encap::tunnel::Format;
use smoltcp::time::Instant;

use super::Datapath;
use crate::datapath::egress::Host;
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::node::Sender;
use crate::datapath::observe::Observer;
use crate::datapath::verdict::Verdict;

/// Whether packets of a batch are merged. It is in vain for a single packet, or if no port takes
/// superpackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merging {
    /// They are.
    On,
    /// Each stays as it came.
    Off,
}

/// The header of an Ethernet frame.
type LinkHeader = [u8; frame::HEADER_LEN];

impl<O: Observer, F: Filter> Datapath<O, F> {
    /// Takes the payloads of the tunnel's datagrams, in the order they came, with their sources.
    /// `send` is given each packet with its verdict, and the pieces that belong behind it.
    pub fn from_underlay_batch<'a>(
        &mut self,
        now: Instant,
        datagrams: impl Iterator<Item = (SocketAddr, &'a mut [u8])>,
        merging: Merging,
        host: &mut impl Host,
        mut send: impl FnMut(Verdict, &mut PacketBuf<'_>, &[&[u8]]),
    ) {
        let network = self
            .node
            .format()
            .map_or(0, Format::received_network_offset);
        let settings = merge::MergeSettings {
            mtu: self.node.mtu(),
            udp: true,
        };
        let mut merger = (merging == Merging::On).then(|| Merger::new(settings));
        let mut sender: Option<Sender> = None;
        for (source, datagram) in datagrams {
            // The datagrams of a train have one source.
            let sender = match sender {
                Some(sender) if sender.address() == source => sender,
                _ => *sender.insert(self.node.sender(source)),
            };
            // What is no peer's is dropped.
            let merger = merger.as_mut();
            let merger = merger.filter(|_| self.node.may_send(sender, datagram));
            let mut deliver = |merged: Merged<'_, '_, Sender>| {
                self.deliver_datagram(now, network, merged, host, &mut send);
            };
            match merger {
                Some(merger) => merger.push(datagram, network, sender, &mut deliver),
                None => deliver(Merged {
                    key: sender,
                    virtio: merge::header_for_single(datagram, network, settings.mtu),
                    head: datagram,
                    tail: &[],
                }),
            }
        }
        if let Some(mut merger) = merger {
            merger.flush(&mut |merged| {
                self.deliver_datagram(now, network, merged, host, &mut send);
            });
        }
    }

    fn deliver_datagram(
        &mut self,
        now: Instant,
        network: usize,
        merged: Merged<'_, '_, Sender>,
        host: &mut impl Host,
        send: &mut impl FnMut(Verdict, &mut PacketBuf<'_>, &[&[u8]]),
    ) {
        let Merged {
            key: sender,
            virtio,
            head,
            tail,
        } = merged;
        let mut handle = |path: &mut Self, packet: PacketBuf<'_>| {
            let mut packet = packet.with_offload(virtio).with_tail(len_of(tail));
            let verdict = path.take_datagram(now, sender, &mut packet, tail, host);
            send(verdict, &mut packet, tail);
        };
        if network > 0 {
            let len = head.len();
            if let Ok(packet) = PacketBuf::new(head, 0, len) {
                handle(self, packet);
            }
            return;
        }
        // There is no room for an Ethernet header in front: that is another datagram.
        let mut room = std::mem::take(&mut self.room);
        if let Ok(mut packet) = PacketBuf::new(&mut room, 0, 0)
            && packet.replace(head).is_ok()
        {
            handle(self, packet);
        }
        self.room = room;
    }

    /// Takes Ethernet frames from the uplink, in the order they came, each with its virtio-net header.
    /// `send` is given each packet with its verdict, and the pieces that belong behind it.
    pub fn from_uplink_batch<'a>(
        &mut self,
        now: Instant,
        frames: impl Iterator<Item = ([u8; virtio::LEN], &'a mut [u8])>,
        merging: Merging,
        host: &mut impl Host,
        mut send: impl FnMut(Verdict, &mut PacketBuf<'_>, &[&[u8]]),
    ) {
        let settings = merge::MergeSettings {
            mtu: self
                .node
                .uplink()
                .map_or(Mtu::ETHERNET, |uplink| uplink.mtu),
            udp: true,
        };
        let mut merger = (merging == Merging::On).then(|| Merger::new(settings));
        for (header, frame) in frames {
            let Ok(virtio) = Header::parse(&header) else {
                self.node.refuse_uplink_frame();
                continue;
            };
            // Frames of two hosts never become one.
            let key: LinkHeader = frame.first_chunk().copied().unwrap_or_default();
            let is_plain =
                virtio.gso.is_none() && !matches!(virtio.checksum, Checksum::Partial { .. });
            let may_merge = is_plain && self.node.is_for_uplink(frame);
            let mut deliver = |merged: Merged<'_, '_, LinkHeader>| {
                self.deliver_frame(now, merged, host, &mut send);
            };
            match &mut merger {
                Some(merger) if may_merge => {
                    merger.push(frame, frame::HEADER_LEN, key, &mut deliver);
                    continue;
                }
                // The kernel has merged it already, and it stays behind what came before it.
                Some(merger) if !is_plain => merger.flush(&mut deliver),
                _ => {}
            }
            deliver(Merged {
                key,
                virtio,
                head: frame,
                tail: &[],
            });
        }
        if let Some(mut merger) = merger {
            merger.flush(&mut |merged| self.deliver_frame(now, merged, host, &mut send));
        }
    }

    fn deliver_frame(
        &mut self,
        now: Instant,
        merged: Merged<'_, '_, LinkHeader>,
        host: &mut impl Host,
        send: &mut impl FnMut(Verdict, &mut PacketBuf<'_>, &[&[u8]]),
    ) {
        let (offload, tail) = (merged.virtio, merged.tail);
        let len = merged.head.len();
        let Ok(packet) = PacketBuf::new(merged.head, 0, len) else {
            return;
        };
        let mut packet = packet.with_offload(offload).with_tail(len_of(tail));
        let verdict = self.from_uplink(now, &mut packet, tail, host);
        send(verdict, &mut packet, tail);
    }
}

/// Bytes of all these pieces.
fn len_of(tail: &[&[u8]]) -> usize {
    tail.iter().map(|piece| piece.len()).sum()
}
