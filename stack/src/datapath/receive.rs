//! Batches of what the underlay received: packets are merged before the node takes them.
//!
//! Writing one superpacket into a pod costs about what writing one segment does (see
//! [`muslin_encap::offload::merge`]). Only what a peer sent is merged: whoever else sends something
//! costs no more than the look at its source address.

use std::net::SocketAddr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::acknowledgement::AckTable;
use muslin_encap::offload::merge::{self, Merged, Merger};
use muslin_encap::offload::virtio::{self, Header};
use muslin_encap::tunnel::Format;
use smoltcp::time::Instant;

use super::Datapath;
use crate::datapath::egress::Host;
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::node::Sender;
use crate::datapath::observe::Observer;
use crate::datapath::peer::PeerId;
use crate::datapath::verdict::Verdict;

/// How many datagrams have their senders looked up before the first of them is decided about. Among many
/// peers each look-up waits for memory, and those of different senders wait at the same time.
const AHEAD: usize = 16;

/// Whether packets of a batch are merged. It is in vain for a single packet, or if no port takes
/// superpackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merging {
    /// They are.
    On,
    /// Each stays as it came.
    Off,
}

/// Whose a datagram is said to be.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// Of whichever peer has this address.
    Address(SocketAddr),
    /// Of this peer, as WireGuard has found, wherever it came from.
    Peer(PeerId, SocketAddr),
}

/// A datagram whose sender has been looked up.
struct Known<'a> {
    sender: Sender,
    /// Whether the sender may send it: what is no peer's is dropped.
    is_peers: bool,
    datagram: &'a mut [u8],
}

/// The header of an Ethernet frame.
type LinkHeader = [u8; frame::HEADER_LEN];

/// TCP acknowledgements that came lately.
#[derive(Default)]
pub(super) struct Acks {
    tunnel: AckTable<Sender>,
    uplink: AckTable<LinkHeader>,
}

impl<O: Observer, F: Filter> Datapath<O, F> {
    /// Takes the payloads of the tunnel's datagrams, in the order they came, with their sources.
    /// `send` is given each packet with its verdict.
    pub fn from_underlay_batch<'a>(
        &mut self,
        now: Instant,
        datagrams: impl Iterator<Item = (SocketAddr, &'a mut [u8])>,
        merging: Merging,
        host: &mut impl Host,
        send: impl FnMut(Verdict, &mut PacketBuf<'_>),
    ) {
        let datagrams = datagrams.map(|(source, datagram)| (Origin::Address(source), datagram));
        self.take_batch(now, datagrams, merging, host, send);
    }

    /// The same of packets that WireGuard has taken out of messages, with the peers that sealed them.
    pub fn from_wireguard_batch<'a>(
        &mut self,
        now: Instant,
        opened: impl Iterator<Item = (PeerId, SocketAddr, &'a mut [u8])>,
        merging: Merging,
        host: &mut impl Host,
        send: impl FnMut(Verdict, &mut PacketBuf<'_>),
    ) {
        let opened = opened.map(|(peer, source, message)| (Origin::Peer(peer, source), message));
        self.take_batch(now, opened, merging, host, send);
    }

    fn take_batch<'a>(
        &mut self,
        now: Instant,
        datagrams: impl Iterator<Item = (Origin, &'a mut [u8])>,
        merging: Merging,
        host: &mut impl Host,
        mut send: impl FnMut(Verdict, &mut PacketBuf<'_>),
    ) {
        let network = self
            .node
            .format()
            .map_or(0, Format::received_network_offset);
        let settings = merge::MergeSettings {
            mtu: self.node.mtu(),
            mtu_v6: self.node.mtu_v6(),
            udp: true,
        };
        let mut acks = self.acks.take().unwrap_or_default();
        let mut merger = match merging {
            Merging::On => Ok(Merger::new(settings).with_acks(&mut acks.tunnel)),
            Merging::Off => Err(&mut acks.tunnel),
        };
        let mut datagrams = datagrams.fuse();
        let (mut sender, mut ahead) = (None, [const { None }; AHEAD]);
        while self.look_up_senders(&mut datagrams, &mut sender, &mut ahead) {
            for known in ahead.iter_mut().map_while(Option::take) {
                let Known {
                    sender,
                    is_peers,
                    datagram,
                } = known;
                let mut deliver = |merged: Merged<'_, '_, Sender>| {
                    self.deliver_datagram(now, network, merged, host, &mut send);
                };
                match &mut merger {
                    Ok(merger) if is_peers => {
                        merger.push(datagram, network, sender, &mut deliver);
                        continue;
                    }
                    Err(acks) if is_peers => {
                        let _ = acks.offer(datagram, network, sender, 0);
                    }
                    Ok(_) | Err(_) => {}
                }
                deliver(Merged {
                    key: sender,
                    virtio: merge::header_for_single(datagram, network, settings),
                    head: datagram,
                    tail: &[],
                });
            }
        }
        if let Ok(mut merger) = merger {
            merger.flush(&mut |merged| {
                self.deliver_datagram(now, network, merged, host, &mut send);
            });
            self.node.count_superseded(merger.superseded() as u64);
        }
        self.acks = Some(acks);
    }

    /// Takes the next datagrams, as many as there is room for, and looks up who sent them. `last` is
    /// the sender of the one before them. False if there is none.
    fn look_up_senders<'a>(
        &self,
        datagrams: &mut impl Iterator<Item = (Origin, &'a mut [u8])>,
        last: &mut Option<Sender>,
        room: &mut [Option<Known<'a>>; AHEAD],
    ) -> bool {
        for (place, (origin, datagram)) in room.iter_mut().zip(datagrams) {
            let sender = match (origin, *last) {
                (Origin::Peer(peer, source), _) => Sender::of_peer(peer, source),
                // The datagrams of a train have one source.
                (Origin::Address(source), Some(sender)) if sender.address() == source => sender,
                (Origin::Address(source), _) => *last.insert(self.node.sender(source)),
            };
            *place = Some(Known {
                sender,
                is_peers: self.node.may_send(sender, datagram),
                datagram,
            });
        }
        room[0].is_some()
    }

    fn deliver_datagram(
        &mut self,
        now: Instant,
        network: usize,
        merged: Merged<'_, '_, Sender>,
        host: &mut impl Host,
        send: &mut impl FnMut(Verdict, &mut PacketBuf<'_>),
    ) {
        let Merged {
            key: sender,
            virtio,
            head,
            tail,
        } = merged;
        let mut handle = |path: &mut Self, packet: PacketBuf<'_>| {
            let mut packet = packet.with_offload(virtio).with_tail(tail);
            let verdict = path.take_datagram(now, sender, &mut packet, host);
            send(verdict, &mut packet);
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
    /// `send` is given each packet with its verdict.
    pub fn from_uplink_batch<'a>(
        &mut self,
        now: Instant,
        frames: impl Iterator<Item = ([u8; virtio::LEN], &'a mut [u8])>,
        merging: Merging,
        host: &mut impl Host,
        mut send: impl FnMut(Verdict, &mut PacketBuf<'_>),
    ) {
        let mtu = self.node.uplink().map_or(Mtu::ETHERNET, |it| it.mtu);
        let settings = merge::MergeSettings {
            mtu,
            mtu_v6: mtu,
            udp: true,
        };
        let mut acks = self.acks.take().unwrap_or_default();
        let mut merger = match merging {
            Merging::On => Ok(Merger::new(settings).with_acks(&mut acks.uplink)),
            Merging::Off => Err(&mut acks.uplink),
        };
        for (header, frame) in frames {
            let Ok(virtio) = Header::parse(&header) else {
                self.node.refuse_uplink_frame();
                continue;
            };
            // Frames of two hosts never become one.
            let key: LinkHeader = frame.first_chunk().copied().unwrap_or_default();
            let is_plain = merge::is_plain(&virtio, frame, frame::HEADER_LEN);
            let is_ours = self.node.is_for_uplink(frame);
            let mut deliver = |merged: Merged<'_, '_, LinkHeader>| {
                self.deliver_frame(now, merged, host, &mut send);
            };
            match &mut merger {
                Ok(merger) if is_ours && is_plain => {
                    merger.push(frame, frame::HEADER_LEN, key, &mut deliver);
                    continue;
                }
                // It is not taken apart, or finished, for others to join it, and it stays behind what
                // came before it.
                Ok(merger) if !is_plain => {
                    merger.make_way(frame, frame::HEADER_LEN, key, &mut deliver);
                }
                Err(acks) if is_ours => {
                    let _ = acks.offer(frame, frame::HEADER_LEN, key, 0);
                }
                Ok(_) | Err(_) => {}
            }
            deliver(Merged {
                key,
                virtio,
                head: frame,
                tail: &[],
            });
        }
        if let Ok(mut merger) = merger {
            merger.flush(&mut |merged| self.deliver_frame(now, merged, host, &mut send));
            self.node.count_superseded(merger.superseded() as u64);
        }
        self.acks = Some(acks);
    }

    fn deliver_frame(
        &mut self,
        now: Instant,
        merged: Merged<'_, '_, LinkHeader>,
        host: &mut impl Host,
        send: &mut impl FnMut(Verdict, &mut PacketBuf<'_>),
    ) {
        let len = merged.head.len();
        let Ok(packet) = PacketBuf::new(merged.head, 0, len) else {
            return;
        };
        let mut packet = packet.with_offload(merged.virtio).with_tail(merged.tail);
        let verdict = self.from_uplink(now, &mut packet, host);
        send(verdict, &mut packet);
    }
}

#[cfg(test)]
mod tests {
    use std::iter::once;
    use std::sync::Arc;

    use etherparse::PacketBuilder;
    use muslin_encap::ip::transport::Transport;
    use muslin_encap::offload::virtio::Checksum;
    use smoltcp::wire::EthernetAddress;

    use super::*;
    use crate::addresses::Nets;
    use crate::datapath::egress::{Egress, EgressConfig, NoHost, Owners, Policy};
    use crate::datapath::multicast::igmp;
    use crate::datapath::node::{Node, NodeConfig};
    use crate::datapath::peer::{Peer, PeerId};
    use crate::datapath::port::{Attachment, PortId};
    use crate::datapath::tunnel::Tunnel;
    use crate::datapath::uplink::Uplink;
    use crate::datapath::{Output, Siblings};
    use crate::drops::DropReason;

    const NOW: Instant = Instant::ZERO;
    const POD: PortId = PortId(1);
    const POD_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 1, 2]);
    const HOSTS: [EthernetAddress; 2] = [
        EthernetAddress([2, 0, 0, 0, 9, 1]),
        EthernetAddress([2, 0, 0, 0, 9, 2]),
    ];

    fn source() -> SocketAddr {
        "192.168.0.2:8285".parse().unwrap()
    }

    /// A node with a pod and a peer, to which a tunnel leads or the uplink.
    fn path(tunnel: Tunnel) -> Datapath {
        let mtu = Mtu::new(1450).unwrap();
        let gateway = EthernetAddress([2, 0, 0, 0, 1, 1]);
        let config = NodeConfig::new(
            "10.244.1.0/24".parse::<Nets>().unwrap(),
            gateway,
            tunnel,
            mtu,
            7,
        );
        let egress = Egress::new(EgressConfig::new(Policy::closed(), mtu, 7), NOW);
        let mut path = Datapath::new(Node::new(config, NOW).unwrap(), egress);
        let node = path.node_mut();
        node.attach(POD, Attachment::new(POD_MAC, vec![[10, 244, 1, 2].into()]));
        let subnet = "10.244.2.0/24".parse().unwrap();
        node.set_peer(Peer::new(PeerId(2), subnet, source()));
        if tunnel == Tunnel::None {
            let net = "192.168.0.1/24".parse::<Nets>().unwrap();
            let [own, other] = HOSTS;
            node.set_uplink(Some(Uplink::new(own, net, Mtu::ETHERNET)));
            node.learn_next_hop(NOW, source().ip(), other);
        }
        path
    }

    fn from_peer() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
        PacketBuilder::ipv4([10, 244, 2, 2], [10, 244, 1, 2], 63)
    }

    /// What is sent for datagrams of one batch: each packet with its pieces.
    fn received(path: &mut Datapath, datagrams: &mut [Vec<u8>], merging: Merging) -> Vec<Vec<u8>> {
        let mut sent = Vec::new();
        let datagrams = datagrams.iter_mut().map(|it| (source(), &mut it[..]));
        path.from_underlay_batch(NOW, datagrams, merging, &mut NoHost, |verdict, packet| {
            assert_eq!(verdict, Verdict::Port(POD));
            sent.push([packet.as_slice(), &packet.tail().concat()].concat());
        });
        sent
    }

    /// An acknowledgement of a pod of the peer's, which ends with this byte of its number.
    fn acknowledgement(number: u8) -> Vec<u8> {
        let mut packet = Vec::new();
        let builder = from_peer().tcp(5, 6, 1, 1000).ack(number.into());
        builder.write(&mut packet, &[]).unwrap();
        packet
    }

    #[test]
    fn of_acknowledgements_of_one_batch_the_last_goes_on() {
        let mut path = path(Tunnel::Udp);
        let mut take = |numbers: &[u8], merging| {
            let mut datagrams: Vec<_> = numbers.iter().map(|it| acknowledgement(*it)).collect();
            let sent = received(&mut path, &mut datagrams, merging);
            let numbers: Vec<_> = sent.iter().map(|frame| frame[14 + 20 + 11]).collect();
            (numbers, path.node().counters().superseded)
        };
        assert_eq!(take(&[10, 20, 30], Merging::On), (vec![10, 30], 1));
        assert_eq!(take(&[40, 50], Merging::On), (vec![50], 2));
        // One that came alone is known, too: what repeats it is a duplicate.
        assert_eq!(take(&[60], Merging::Off), (vec![60], 2));
        assert_eq!(take(&[60, 70], Merging::On), (vec![60, 70], 2));
        assert_eq!(path.node().counters().received, 6);
    }

    #[test]
    fn each_datagram_of_a_long_batch_has_its_sender() {
        let mut path = path(Tunnel::Udp);
        let stranger: SocketAddr = "192.168.0.3:8285".parse().unwrap();
        let sender = |number: u8| {
            if number.is_multiple_of(3) {
                stranger
            } else {
                source()
            }
        };
        let numbers = 0..2 * AHEAD as u8 + 3;
        let datagram = |number: u8| {
            let mut packet = Vec::new();
            from_peer().udp(5, 6).write(&mut packet, &[number]).unwrap();
            (sender(number), packet)
        };
        let mut datagrams: Vec<_> = numbers.clone().map(datagram).collect();
        let datagrams = datagrams.iter_mut().map(|(from, it)| (*from, &mut it[..]));
        let mut sent = Vec::new();
        path.from_underlay_batch(
            NOW,
            datagrams,
            Merging::Off,
            &mut NoHost,
            |verdict, packet| sent.push((packet.as_slice().last().copied(), verdict)),
        );
        let verdict = |number| match sender(number) == stranger {
            true => Verdict::Drop(DropReason::UnknownPeer),
            false => Verdict::Port(POD),
        };
        let expected: Vec<_> = numbers.map(|it| (Some(it), verdict(it))).collect();
        assert_eq!(sent, expected);
    }

    /// A frame with a datagram of a pod of the peer's, whose checksum the peer's card was to complete.
    fn unfinished(payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        from_peer().udp(5, 6).write(&mut packet, payload).unwrap();
        let [own, other] = HOSTS;
        let mut frame = [&own.0[..], &other.0, &[8, 0], &packet].concat();
        let at = Transport::parse(&frame, frame::HEADER_LEN).unwrap();
        let (field, sum) = (
            at.checksum_offset(),
            at.pseudo_header(&frame, at.end - at.l4),
        );
        frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    #[test]
    fn frames_of_the_uplink_with_partial_checksums_merge() {
        let mut path = path(Tunnel::None);
        for (offset, expected) in [(6, vec![Some(4)]), (2, vec![None, None])] {
            let checksum = Checksum::Partial { start: 34, offset };
            let header = Header {
                checksum,
                ..Header::default()
            };
            let mut frames = [unfinished(b"this"), unfinished(b"that")];
            let frames = frames.iter_mut().map(|it| (header.to_bytes(), &mut it[..]));
            let (mut sizes, mut payload) = (Vec::new(), Vec::new());
            path.from_uplink_batch(NOW, frames, Merging::On, &mut NoHost, |verdict, packet| {
                assert_eq!(verdict, Verdict::Port(POD));
                sizes.push(packet.offload().gso.map(|gso| gso.size));
                payload.extend_from_slice(&packet.as_slice()[42..]);
                payload.extend(packet.tail().concat());
            });
            assert_eq!((sizes, &payload[..]), (expected, &b"thisthat"[..]));
        }
        let odd = once(([0xff; virtio::LEN], &mut [][..]));
        path.from_uplink_batch(NOW, odd, Merging::On, &mut NoHost, |_, _| {
            panic!("a header that cannot be read")
        });
    }

    /// Datagrams for a group merge as others do, and reach each member as one packet.
    #[test]
    fn datagrams_for_a_group_merge() {
        const OTHER: PortId = PortId(2);
        let mut path = path(Tunnel::Udp);
        let node = path.node_mut();
        let other = EthernetAddress([2, 0, 0, 0, 1, 3]);
        node.attach(OTHER, Attachment::new(other, vec![[10, 244, 1, 3].into()]));
        let subnet = "10.244.2.0/24".parse().unwrap();
        node.set_peer(Peer::new(PeerId(2), subnet, source()).with_multicast(true));
        node.set_multicast(NOW, Some(true));
        for (port, host, mac) in [(POD, 2, POD_MAC), (OTHER, 3, other)] {
            let report = igmp::tests::report(&[(4, [239, 1, 2, 3], 0)]);
            let to = [224, 0, 0, 22].into();
            let report = igmp::tests::packet([10, 244, 1, host].into(), to, &report);
            let mut frame = [&[1, 0, 0x5e, 0, 0, 22][..], &mac.0, &[8, 0], &report].concat();
            let len = frame.len();
            let mut packet = PacketBuf::new(&mut frame, 0, len).unwrap();
            let verdict = path.from_port(NOW, port, &mut packet, &mut NoHost);
            assert_eq!(verdict, Verdict::Consumed);
        }
        // There are no other workers to be told.
        assert!(path.poll_output(NOW).is_none());

        let datagram = |payload: &[u8]| {
            let mut packet = Vec::new();
            let to_group = PacketBuilder::ipv4([10, 244, 2, 2], [239, 1, 2, 3], 1);
            to_group.udp(5, 6).write(&mut packet, payload).unwrap();
            packet
        };
        let mut datagrams = [datagram(b"this"), datagram(b"that"), datagram(b"end")];
        let datagrams = datagrams.iter_mut().map(|it| (source(), &mut it[..]));
        let mut verdicts = Vec::new();
        path.from_underlay_batch(NOW, datagrams, Merging::On, &mut NoHost, |verdict, _| {
            verdicts.push(verdict);
        });
        assert_eq!(verdicts, [Verdict::Consumed]);
        let mut ports = Vec::new();
        while let Some(output) = path.poll_output(NOW) {
            let Output::Packet(Verdict::Port(port), packet) = output else {
                panic!("{output:?}")
            };
            assert_eq!(packet.offload().gso.map(|gso| gso.size), Some(4));
            assert_eq!(packet.as_slice()[42..], *b"thisthatend");
            ports.push(port);
        }
        assert_eq!(ports, [POD, OTHER]);
        let counters = path.node().counters();
        assert_eq!(counters.came(), counters.went());
    }

    /// Each worker of a node knows who is in which group, whichever has heard it.
    #[test]
    fn siblings_hear_of_reports() {
        let mut paths = [path(Tunnel::Udp), path(Tunnel::Udp)];
        let owners = Arc::new(Owners::new(7));
        for (worker, path) in (0..).zip(&mut paths) {
            path.share(owners.clone(), worker);
            path.node_mut().set_multicast(NOW, Some(worker == 0));
        }
        let report = igmp::tests::report(&[(4, [239, 1, 2, 3], 0)]);
        let report = igmp::tests::packet([10, 244, 1, 2].into(), [224, 0, 0, 22].into(), &report);
        let mut frame = [&[1, 0, 0x5e, 0, 0, 22][..], &POD_MAC.0, &[8, 0], &report].concat();
        let len = frame.len();
        let mut packet = PacketBuf::new(&mut frame, 0, len).unwrap();
        let [one, two] = &mut paths;
        one.from_port(NOW, POD, &mut packet, &mut NoHost);
        let Some(Output::Message(Siblings::All, message)) = one.poll_output(NOW) else {
            panic!("they are told")
        };
        two.from_sibling(NOW, message, &mut NoHost);
        assert!(two.poll_output(NOW).is_none() && one.poll_output(NOW).is_none());
        assert_eq!(two.node().groups(NOW).count(), 1);
    }
}
