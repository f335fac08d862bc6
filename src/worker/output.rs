//! What a verdict means: frames go to ports at once, datagrams for peers wait for the end of the
//! batch and leave together.

use std::collections::HashMap;
use std::net::SocketAddr;

use arrayvec::ArrayVec;
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::acknowledgement::{AckTable, Offer};
use muslin_encap::offload::batch::{self, Queued, SendBatch};
use muslin_encap::offload::merge::{self, MergeSettings, Merged, Merger};
use muslin_encap::offload::split::{Checksums, MAX_HEADER_LEN, Split, TrainLimits};
use muslin_encap::offload::virtio::{GsoKind, Header};
use muslin_stack::Instant;
use muslin_stack::datapath::frame;
use muslin_stack::datapath::node::Verdict;
use muslin_stack::datapath::peer::PeerId;
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::wireguard::LinkState;
use muslin_stack::drops::DropReason;
use nix::errno::Errno;
use tracing::warn;

use super::Node;
use super::batches::Batches;
use super::busy_poll::BusyPoll;
use super::sealing::{Contents, Sealing};
use crate::device::{FrameDevice, PodDevice, Tun};
use crate::error::errno;
use crate::underlay::{Received, Route, TunnelSockets, Underlay};

/// The largest frame or datagram, and room in front of it.
pub(super) const BUFFER_LEN: usize = HEADROOM + frame::MAX_LEN;
/// Bytes of the packets of one batch. It fits a core's cache: what was just read is still there
/// when it is sent.
const OUTBOX_LEN: usize = 4 * BUFFER_LEN;
/// Packets of one batch.
const OUTBOX_PACKETS: usize = 64;

/// Packets for peers, one behind the other in a buffer.
pub(super) struct Outbox {
    storage: Box<[u8]>,
    used: usize,
    packets: ArrayVec<Waiting, OUTBOX_PACKETS>,
    headers: Box<[u8]>,
    /// Where in a datagram the inner IP packet begins.
    network: usize,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    start: usize,
    end: usize,
    way: Way,
    offload: Header,
}

impl Waiting {
    /// It in the outbox' storage, for who makes a batch.
    fn queued<'p, K>(
        &self,
        storage: &'p [u8],
        key: K,
        network: usize,
        checksums: Checksums,
    ) -> Queued<'p, K> {
        Queued {
            key,
            packet: &storage[self.start..self.end],
            network,
            offload: self.offload,
            checksums,
        }
    }
}

/// How a packet in the outbox leaves.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// By the tunnel, with these checksums.
    Tunnel(Route, Checksums),
    /// By the tunnel, sealed for this peer.
    Sealed(PeerId, Checksums),
    Uplink,
}

impl Outbox {
    pub(super) fn new(network: usize) -> Self {
        Self {
            storage: vec![0; OUTBOX_LEN].into_boxed_slice(),
            used: 0,
            packets: ArrayVec::new(),
            headers: vec![0; batch::HEADERS_LEN].into_boxed_slice(),
            network,
        }
    }

    /// Whether there is no room for another packet of any length.
    pub(super) fn is_full(&self) -> bool {
        self.packets.is_full() || self.storage.len() - self.used < BUFFER_LEN
    }

    /// Room for a packet, `HEADROOM` in front of it included.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.storage[self.used..]
    }

    /// Keeps the `len` bytes that begin at offset `headroom` of the room until they are sent.
    fn keep(&mut self, (headroom, len): (usize, usize), way: Way, offload: Header) {
        let start = self.used + headroom;
        let end = start + len;
        self.packets.push(Waiting {
            start,
            end,
            way,
            offload,
        });
        self.used = end.next_multiple_of(64).min(self.storage.len());
    }

    /// Puts the same in the place of a packet that it makes useless, if that is as long.
    fn replace(
        &mut self,
        place: usize,
        (headroom, len): (usize, usize),
        way: Way,
        offload: Header,
    ) -> bool {
        let start = self.used + headroom;
        match self.packets.get_mut(place) {
            Some(waiting) if waiting.end - waiting.start == len => {
                self.storage.copy_within(start..start + len, waiting.start);
                (waiting.way, waiting.offload) = (way, offload);
                true
            }
            _ => false,
        }
    }
}

/// What packets leave by.
pub(super) struct Io {
    pub(super) ports: HashMap<PortId, PodDevice>,
    pub(super) underlay: Underlay,
    /// The host interface.
    pub(super) host: Option<Tun>,
    /// WireGuard's sessions, if it is the tunnel.
    pub(super) sealing: Option<Sealing>,
    /// A superpacket that is to be taken apart for a device, in one piece.
    flat: Vec<u8>,
    /// Where the headers of one are made that goes to a peer at once.
    headers: Box<[u8]>,
    /// Where in a datagram the inner IP packet begins.
    network: usize,
    /// Whether it was warned that a device refused a superpacket.
    warned: bool,
    /// Whether the uplink takes superpackets of UDP, as far as that is known.
    uplink_joins_datagrams: bool,
    /// Acknowledgements that went to other nodes lately, by the offset of their IP header.
    acks: AckTable<usize>,
    /// How long to poll before a sleep, as packets and sleeps tell.
    pub(super) busy_poll: BusyPoll,
    /// How much was done at once.
    pub(super) batches: Batches,
    tally: Tally,
}

/// What became of packets after their verdict, until the node is warned.
#[derive(Default)]
pub(super) struct Tally {
    lost: Vec<(DropReason, u64)>,
    /// Acknowledgements that were not sent, since a newer one is.
    superseded: u64,
    /// Ports that a frame was copied to, and its length.
    flooded: Vec<(PortId, usize)>,
}

impl Tally {
    pub(super) fn lose(&mut self, reason: DropReason, packets: u64) {
        self.lost.push((reason, packets));
    }
}

impl Io {
    pub(super) fn new(underlay: Underlay, sealing: Option<Sealing>, network: usize) -> Self {
        Self {
            ports: HashMap::new(),
            underlay,
            host: None,
            sealing,
            flat: Vec::new(),
            headers: vec![0; batch::HEADERS_LEN].into_boxed_slice(),
            network,
            warned: false,
            uplink_joins_datagrams: true,
            acks: AckTable::new(),
            busy_poll: BusyPoll::default(),
            batches: Batches::default(),
            tally: Tally::default(),
        }
    }

    /// Whether a port takes superpackets.
    pub(super) fn takes_superpackets(&self, port: PortId) -> bool {
        self.ports.get(&port).is_some_and(PodDevice::has_offloads)
    }

    /// Whether any does.
    pub(super) fn any_takes_superpackets(&self) -> bool {
        let host = self.host.as_ref();
        host.is_some_and(Tun::has_offloads) || self.ports.values().any(PodDevice::has_offloads)
    }

    /// Sends a packet, with what belongs to it and is elsewhere, where a verdict says.
    pub(super) fn send(&mut self, verdict: Verdict, packet: &mut PacketBuf<'_>) {
        self.busy_poll.note(packet.total_len());
        if matches!(verdict, Verdict::Peer { .. } | Verdict::Uplink { .. }) {
            // It may be of any flow, and does not wait.
            self.acks.forget();
        }
        let sent = match verdict {
            Verdict::Port(port) => self.send_to_port(port, packet),
            Verdict::Flood { except } => {
                self.flood(except, packet);
                Ok(())
            }
            Verdict::Uplink { .. } => self.send_to_uplink(packet).map(|_| ()),
            Verdict::Host => self.send_to_host(packet),
            Verdict::Peer { id, checksums, .. } if self.sealing.is_some() => {
                self.send_sealed(id, checksums, packet)
            }
            Verdict::Peer {
                destination,
                flow,
                checksums,
                ..
            } if !packet.is_single() => {
                self.send_superpacket((destination, flow), checksums, packet)
            }
            Verdict::Peer { destination, .. } => self.send_to_peer(destination, packet.as_slice()),
            // The data path gives none to egress that it does not take itself.
            Verdict::Egress | Verdict::Consumed | Verdict::Drop(_) => Ok(()),
        };
        if let Err(reason) = sent {
            self.tally.lose(reason, 1);
        }
    }

    /// Tells the node what became of packets after their verdict.
    pub(super) fn settle(&mut self, node: &mut Node) {
        node.count_superseded(std::mem::take(&mut self.tally.superseded));
        for (reason, packets) in self.tally.lost.drain(..) {
            node.count_drops(reason, packets);
        }
        for (port, len) in self.tally.flooded.drain(..) {
            node.count_flooded(port, len);
        }
    }

    /// The same for a packet in the outbox' room, which waits there if it is for another node.
    pub(super) fn send_later(
        &mut self,
        verdict: Verdict,
        outbox: &mut Outbox,
        (headroom, len): (usize, usize),
        offload: Header,
    ) {
        let Underlay { tunnel, uplink } = &self.underlay;
        let way = match verdict {
            Verdict::Peer { id, checksums, .. } if self.sealing.is_some() => {
                Some(Some(Way::Sealed(id, checksums)))
            }
            Verdict::Peer {
                destination,
                flow,
                checksums,
                ..
            } => {
                let tunnel = tunnel.as_ref();
                let route = tunnel.and_then(|it| it.route(destination, flow));
                Some(route.map(|route| Way::Tunnel(route, checksums)))
            }
            Verdict::Uplink { .. } => Some(uplink.as_ref().map(|_| Way::Uplink)),
            _ => None,
        };
        if let Some(way) = way {
            self.busy_poll.note(len);
            match way {
                Some(way) => self.keep(outbox, (headroom, len), way, offload),
                None => self.tally.lose(DropReason::UnderlayFailed, 1),
            }
            return;
        }
        if let Ok(packet) = PacketBuf::new(outbox.room(), headroom, len) {
            self.send(verdict, &mut packet.with_offload(offload));
        }
    }

    /// Keeps a packet in the outbox until the end of the batch. It takes the place of a TCP
    /// acknowledgement there that it makes useless.
    fn keep(&mut self, outbox: &mut Outbox, place: (usize, usize), way: Way, offload: Header) {
        let (headroom, len) = place;
        let network = match way {
            Way::Tunnel(..) | Way::Sealed(..) => outbox.network,
            Way::Uplink => frame::HEADER_LEN,
        };
        let index = outbox.packets.len();
        let packet = &outbox.storage[outbox.used + headroom..][..len];
        match self.acks.offer(packet, network, network, index) {
            Offer::Replaces(index) if outbox.replace(index, place, way, offload) => {
                self.tally.superseded += 1;
            }
            Offer::Replaces(_) | Offer::Waits | Offer::Other => outbox.keep(place, way, offload),
        }
    }

    /// Sends what waits for the end of the batch.
    pub(super) fn flush(&mut self, outbox: &mut Outbox) {
        if !outbox.packets.is_empty() {
            self.batches.sent.note(outbox.packets.len());
        }
        self.flush_to_tunnel(outbox);
        self.flush_to_uplink(&mut outbox.storage, &outbox.packets);
        self.acks.end_batch();
        outbox.packets.clear();
        outbox.used = 0;
    }

    fn flush_to_tunnel(&mut self, outbox: &mut Outbox) {
        let Outbox {
            storage,
            packets,
            headers,
            network,
            ..
        } = outbox;
        let Some(tunnel) = &self.underlay.tunnel else {
            return;
        };
        if let Some(sealing) = &mut self.sealing {
            let sealed = packets.iter().filter_map(|waiting| match waiting.way {
                Way::Sealed(peer, checksums) => {
                    Some((peer, waiting.queued(storage, (), *network, checksums)))
                }
                Way::Tunnel(..) | Way::Uplink => None,
            });
            sealing.send(tunnel, sealed, &mut self.tally);
        }
        let plain = packets.iter().filter_map(|waiting| match waiting.way {
            Way::Tunnel(key, checksums) => Some(waiting.queued(storage, key, *network, checksums)),
            Way::Sealed(..) | Way::Uplink => None,
        });
        send_all(tunnel, headers, plain, &mut self.tally);
    }

    /// Sends the frames for the uplink. Small ones of a flow that follow each other leave as one, which
    /// the kernel, or the card, takes apart again.
    fn flush_to_uplink(&mut self, storage: &mut [u8], packets: &[Waiting]) {
        let is_for_uplink = |waiting: &&Waiting| matches!(waiting.way, Way::Uplink);
        let mut frames = packets.iter().filter(is_for_uplink).peekable();
        if frames.peek().is_some() {
            let datagrams = self.uplink_joins_datagrams;
            join(storage, frames, datagrams, |merged| {
                self.send_merged(merged);
            });
        }
    }

    /// Sends a frame that may be several to the uplink.
    fn send_merged(&mut self, merged: Merged<'_, '_, ()>) {
        let packets = 1 + merged.tail.len() as u64;
        let is_datagrams = merged
            .virtio
            .gso
            .is_some_and(|gso| gso.kind == GsoKind::Udp);
        let len = merged.head.len();
        let Ok(packet) = PacketBuf::new(merged.head, 0, len) else {
            return;
        };
        let mut packet = packet.with_offload(merged.virtio).with_tail(merged.tail);
        match self.send_to_uplink(&mut packet) {
            Ok(Sent::InSegments) if is_datagrams => self.uplink_joins_datagrams = false,
            Ok(_) => {}
            Err(reason) => self.tally.lose(reason, packets),
        }
    }

    /// Sends a superpacket of the node's own to a peer.
    fn send_superpacket(
        &mut self,
        (destination, flow): (SocketAddr, u32),
        checksums: Checksums,
        packet: &PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        let tunnel = self.underlay.tunnel.as_ref();
        let tunnel = tunnel.ok_or(DropReason::UnderlayFailed)?;
        let route = tunnel.route(destination, flow);
        let queued = Queued {
            key: route.ok_or(DropReason::UnderlayFailed)?,
            packet: packet.as_slice(),
            network: self.network,
            offload: packet.offload(),
            checksums,
        };
        send_all(tunnel, &mut self.headers, [queued], &mut self.tally);
        Ok(())
    }

    /// Sends any packet of the node's own to a peer, sealed.
    fn send_sealed(
        &mut self,
        peer: PeerId,
        checksums: Checksums,
        packet: &PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        let tunnel = self.underlay.tunnel.as_ref();
        let tunnel = tunnel.ok_or(DropReason::UnderlayFailed)?;
        let queued = Queued {
            key: (),
            packet: packet.as_slice(),
            network: self.network,
            offload: packet.offload(),
            checksums,
        };
        if let Some(sealing) = &mut self.sealing {
            sealing.send(tunnel, [(peer, queued)], &mut self.tally);
        }
        Ok(())
    }

    /// Opens what was received, if the tunnel is sealed.
    pub(super) fn open(&mut self, received: &mut Received) -> Option<Contents> {
        let (sealing, tunnel) = (self.sealing.as_mut()?, self.underlay.tunnel.as_ref()?);
        Some(sealing.open(tunnel, received.datagrams(), &mut self.tally))
    }

    /// How it stands with the keys of peers, if the tunnel is sealed.
    pub(super) fn links(&self) -> impl Iterator<Item = LinkState> + '_ {
        let sealing = self.sealing.iter();
        sealing.flat_map(|sealing| sealing.wireguard.links())
    }

    /// When [`Self::handle_timeout`] is next needed, if ever.
    pub(super) fn poll_at(&self) -> Option<Instant> {
        self.sealing.as_ref()?.wireguard.poll_at()
    }

    /// Does what is due for sessions with peers.
    pub(super) fn handle_timeout(&mut self) {
        if let Some(sealing) = &mut self.sealing {
            sealing.handle_timeout(self.underlay.tunnel.as_ref(), &mut self.tally);
        }
    }

    fn flood(&mut self, except: Option<PortId>, packet: &mut PacketBuf<'_>) {
        let Self {
            ports,
            flat,
            warned,
            tally,
            ..
        } = self;
        for (&port, tap) in ports.iter().filter(|(port, _)| Some(**port) != except) {
            match send_frame(tap, packet, flat, warned).map_err(lost_to_port) {
                Ok(_) => tally.flooded.push((port, packet.total_len())),
                Err(reason) => tally.lose(reason, 1),
            }
        }
    }

    fn send_to_port(&mut self, port: PortId, packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
        let tap = self.ports.get(&port).ok_or(DropReason::PortGone)?;
        send_frame(tap, packet, &mut self.flat, &mut self.warned)
            .map(|_| ())
            .map_err(lost_to_port)
    }

    fn send_to_host(&mut self, packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
        let host = self.host.as_ref().ok_or(DropReason::PortDown)?;
        send_frame(host, packet, &mut self.flat, &mut self.warned)
            .map(|_| ())
            .map_err(lost_to_port)
    }

    fn send_to_uplink(&mut self, packet: &mut PacketBuf<'_>) -> Result<Sent, DropReason> {
        let uplink = self.underlay.uplink.as_ref();
        let uplink = uplink.ok_or(DropReason::UnderlayFailed)?;
        send_frame(uplink, packet, &mut self.flat, &mut self.warned).map_err(lost_to_peer)
    }

    fn send_to_peer(&self, destination: SocketAddr, datagram: &[u8]) -> Result<(), DropReason> {
        let tunnel = self.underlay.tunnel.as_ref();
        let tunnel = tunnel.ok_or(DropReason::UnderlayFailed)?;
        let sent = tunnel.send_one(datagram, destination);
        sent.map_err(|error| lost_to_peer(errno(&error)))
    }
}

/// Joins frames of one flow that follow each other, datagrams only if they may be.
fn join<'a>(
    storage: &mut [u8],
    frames: impl Iterator<Item = &'a Waiting>,
    datagrams: bool,
    mut send: impl FnMut(Merged<'_, '_, ()>),
) {
    // Whether they fit the link was checked.
    let mut merger = Merger::new(MergeSettings {
        mtu: Mtu::MAX,
        mtu_v6: Mtu::MAX,
        udp: datagrams,
    });
    let (mut rest, mut at) = (storage, 0);
    for waiting in frames {
        let (frame, behind) = rest[waiting.start - at..].split_at_mut(waiting.end - waiting.start);
        (rest, at) = (behind, waiting.end);
        if merge::is_plain(&waiting.offload, frame, frame::HEADER_LEN) {
            merger.push(frame, frame::HEADER_LEN, (), &mut send);
            continue;
        }
        merger.flush(&mut send);
        send(Merged {
            key: (),
            virtio: waiting.offload,
            head: frame,
            tail: &[],
        });
    }
    merger.flush(&mut send);
}

/// Sends packets to peers in as few calls as it takes.
fn send_all<'a>(
    tunnel: &TunnelSockets,
    headers: &mut [u8],
    packets: impl IntoIterator<Item = Queued<'a, Route>>,
    tally: &mut Tally,
) {
    let mut split = None;
    let mut packets = packets.into_iter().peekable();
    while packets.peek().is_some() {
        let mut batch = SendBatch::new(headers, tunnel.has_gso());
        while let Some(queued) = packets.peek() {
            match batch.push(queued, &mut split) {
                Ok(Ok(())) => {}
                Ok(Err(batch::Full)) => break,
                Err(_) => tally.lose(DropReason::SuperpacketRefused, 1),
            }
            packets.next();
        }
        tunnel.send(&batch, |send, error| {
            tally.lose(lost_to_peer(error), send.packets.max(1) as u64);
        });
    }
}

pub(super) fn lost_to_peer(error: Errno) -> DropReason {
    match error {
        Errno::EAGAIN | Errno::ENOBUFS => DropReason::UnderlayQueueFull,
        _ => DropReason::UnderlayFailed,
    }
}

/// How a device has taken a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Whole,
    /// A superpacket, one segment after the other.
    InSegments,
}

/// Hands a frame to a device as it can take it.
fn send_frame(
    device: &impl FrameDevice,
    packet: &mut PacketBuf<'_>,
    flat: &mut Vec<u8>,
    warned: &mut bool,
) -> Result<Sent, Errno> {
    if !device.has_offloads() {
        if !packet.is_single() {
            return send_segments(device, packet, flat);
        }
        packet.complete_checksum();
    }
    let sent = device.send(&packet.offload(), packet.as_slice(), packet.tail());
    match sent.map_err(|error| errno(&error)) {
        Ok(()) => Ok(Sent::Whole),
        // Kernels around 6.6 take no superpacket whose last segment is shorter.
        Err(Errno::EINVAL) if !packet.is_single() => {
            if !std::mem::replace(warned, true) {
                warn!("the kernel refuses GSO packets: they are segmented first");
            }
            send_segments(device, packet, flat)
        }
        Err(error) => Err(error),
    }
}

/// EINVAL where a superpacket cannot be taken apart.
fn send_segments<D: FrameDevice>(
    device: &D,
    packet: &PacketBuf<'_>,
    flat: &mut Vec<u8>,
) -> Result<Sent, Errno> {
    let gso = packet.offload().gso.ok_or(Errno::EINVAL)?;
    flat.clear();
    flat.extend_from_slice(packet.as_slice());
    for piece in packet.tail() {
        flat.extend_from_slice(piece);
    }
    let split = Split::new(flat, D::NETWORK, gso, Checksums::Complete);
    let mut split = split.map_err(|_| Errno::EINVAL)?;
    let mut header = [0; MAX_HEADER_LEN];
    while let Some(train) = split
        .next_train(&mut header, TrainLimits::ONE)
        .map_err(|_| Errno::EINVAL)?
    {
        for (header, payload) in train.segments() {
            let sent = device.send(&Header::default(), header, &[payload]);
            sent.map_err(|error| errno(&error))?;
        }
    }
    Ok(Sent::InSegments)
}

fn lost_to_port(error: Errno) -> DropReason {
    match error {
        Errno::EAGAIN | Errno::ENOBUFS => DropReason::PortQueueFull,
        Errno::EINVAL => DropReason::SuperpacketRefused,
        // The latter until it is seen that the interface was removed.
        Errno::EIO | Errno::EBADFD => DropReason::PortDown,
        _ => DropReason::PortFailed,
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use muslin_encap::ip::transport::Transport;
    use muslin_encap::offload::virtio::Checksum;

    use super::*;

    /// A frame of a flow with a partial checksum, as a pod's kernel leaves it.
    fn frame(port: u16, payload: &[u8]) -> (Vec<u8>, Header) {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 244, 1, 2], [10, 244, 2, 2], 63)
            .udp(port, 9)
            .write(&mut frame, payload)
            .unwrap();
        let at = Transport::parse(&frame, frame::HEADER_LEN).unwrap();
        let (field, sum) = (
            at.checksum_offset(),
            at.pseudo_header(&frame, at.end - at.l4),
        );
        frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        let checksum = Checksum::Partial {
            start: at.l4 as u16,
            offset: 6,
        };
        let header = Header {
            checksum,
            ..Header::default()
        };
        (frame, header)
    }

    /// What leaves: segment size and payloads of each frame.
    fn joined(frames: &[(Vec<u8>, Header)], datagrams: bool) -> Vec<(Option<u16>, Vec<u8>)> {
        let mut outbox = Outbox::new(0);
        for (frame, header) in frames {
            outbox.room()[HEADROOM..HEADROOM + frame.len()].copy_from_slice(frame);
            outbox.keep((HEADROOM, frame.len()), Way::Uplink, *header);
        }
        let mut sent = Vec::new();
        let Outbox {
            storage, packets, ..
        } = &mut outbox;
        join(storage, packets.iter(), datagrams, |merged| {
            let size = merged.virtio.gso.map(|gso| gso.size);
            let payload = [&merged.head[42..], &merged.tail.concat()].concat();
            assert!(matches!(merged.virtio.checksum, Checksum::Partial { .. }));
            sent.push((size, payload));
        });
        sent
    }

    #[test]
    fn datagrams_of_a_flow_leave_as_one() {
        let frames = [
            frame(1, b"first"),
            frame(2, b"other"),
            frame(1, b"again"),
            frame(1, b"end"),
            frame(1, b"anew!"),
        ];
        let expected = [
            (Some(5), b"firstagainend".to_vec()),
            (None, b"other".to_vec()),
            (None, b"anew!".to_vec()),
        ];
        let mut sent = joined(&frames, true);
        sent.sort_by_key(|(size, payload)| (size.is_none(), payload[0] != b'o'));
        assert_eq!(sent, expected);
        let alone = joined(&frames, false);
        let payloads = frames.map(|(frame, _)| (None, frame[42..].to_vec()));
        assert_eq!(alone, payloads);
    }

    /// A frame with a TCP acknowledgement of all bytes before this one.
    fn acknowledgement(number: u8) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 244, 1, 2], [10, 244, 2, 2], 63)
            .tcp(1, 9, 1, 1000)
            .ack(number.into())
            .write(&mut frame, &[])
            .unwrap();
        frame
    }

    #[test]
    fn an_acknowledgement_takes_the_place_of_one_that_waits() {
        let there = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        there
            .set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .unwrap();
        let options = crate::underlay::Options {
            format: muslin_encap::tunnel::Format::Udp,
            source_ports: 0,
            gso: false,
            gro: false,
        };
        let tunnel =
            crate::underlay::TunnelSocket::bind("127.0.0.1:0".parse().unwrap(), options, 1);
        let underlay = Underlay {
            tunnel: tunnel.unwrap().pop().map(Into::into),
            uplink: None,
        };
        let network = frame::HEADER_LEN;
        let (mut io, mut outbox) = (Io::new(underlay, None, network), Outbox::new(network));
        let verdict = Verdict::Peer {
            id: PeerId(1),
            destination: there.local_addr().unwrap(),
            flow: 0,
            checksums: Checksums::Complete,
        };
        let mut numbers = Vec::new();
        for batch in [&[10, 20, 30][..], &[40, 50]] {
            for number in batch {
                let frame = acknowledgement(*number);
                outbox.room()[HEADROOM..HEADROOM + frame.len()].copy_from_slice(&frame);
                let place = (HEADROOM, frame.len());
                io.send_later(verdict, &mut outbox, place, Header::default());
            }
            io.flush(&mut outbox);
        }
        while numbers.last() != Some(&50) {
            let mut frame = [0; 100];
            let len = there.recv(&mut frame).unwrap();
            assert_eq!(frame[..len], acknowledgement(frame[45]));
            numbers.push(frame[45]);
        }
        assert_eq!((numbers, io.tally.superseded), (vec![10, 30, 50], 2));
    }

    #[test]
    fn a_checksum_elsewhere_stays_where_it_is() {
        let (frame, mut header) = frame(1, b"first");
        let elsewhere = Checksum::Partial {
            start: 34,
            offset: 2,
        };
        header.checksum = elsewhere;
        let mut outbox = Outbox::new(0);
        for _ in 0..2 {
            outbox.room()[HEADROOM..HEADROOM + frame.len()].copy_from_slice(&frame);
            outbox.keep((HEADROOM, frame.len()), Way::Uplink, header);
        }
        let mut sent = 0;
        let Outbox {
            storage, packets, ..
        } = &mut outbox;
        join(storage, packets.iter(), true, |merged| {
            assert_eq!(
                (merged.virtio.checksum, merged.head.to_vec()),
                (elsewhere, frame.clone())
            );
            sent += 1;
        });
        assert_eq!(sent, 2);
    }
}
