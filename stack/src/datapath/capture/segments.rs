//! Superpackets as the segments that they stand for.

use muslin_encap::ip::{checksum, v4};
use muslin_encap::offload::split::{Checksums, MAX_HEADER_LEN, Split, TrainLimits};
use muslin_encap::offload::virtio::Checksum;
use muslin_encap::tunnel::Format;

use super::{Hook, Record};
use crate::datapath::frame;

/// A packet as it is on a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Its number among those of its superpacket, from 1.
    pub number: usize,
    /// How many these are.
    pub count: usize,
    /// What there is of it.
    pub bytes: &'a [u8],
    /// Its length in bytes.
    pub len: usize,
}

/// Makes segments of captured packets, in memory that is used again.
#[derive(Debug, Default)]
pub struct Segmenter {
    whole: Vec<u8>,
    segment: Vec<u8>,
}

impl Segmenter {
    /// Gives `each` the segments that a captured packet stands for, or itself if it is none that can be
    /// split, with finished checksums. Of what is not there of a packet headers are made, and the checksums of
    /// segments of which something is not there are not right.
    pub fn split(
        &mut self,
        record: &Record,
        format: Option<Format>,
        bytes: &[u8],
        mut each: impl FnMut(&Segment<'_>),
    ) {
        let Self { whole, segment } = self;
        whole.clear();
        whole.extend_from_slice(bytes);
        let len = record.len.max(bytes.len());
        let l3 = network_offset(record.hook, format);
        // The outer header of IPv4 in IPv4 has a length of its own.
        let outer = match (record.hook, format) {
            (Hook::FromTunnel, Some(Format::Ipip)) => l3,
            _ => 0,
        };
        // As if all were there, for the lengths of segments.
        let gso = record.offload.gso;
        whole.resize(if gso.is_some() { len } else { bytes.len() }, 0);
        let split = gso.zip(whole.get(outer..)).and_then(|(gso, packet)| {
            Split::new(packet, l3 - outer, gso, Checksums::Complete).ok()
        });
        let split = split.filter(|split| outer + split.header_len() <= bytes.len());
        let Some(mut split) = split else {
            if let Checksum::Partial { start, offset } = record.offload.checksum
                && gso.is_none()
                && bytes.len() == len
            {
                // Nothing is written if the field is outside.
                let _ = checksum::complete(whole, start.into(), offset.into());
            }
            return each(&Segment {
                number: 1,
                count: 1,
                bytes: &whole[..bytes.len()],
                len,
            });
        };
        let (count, header_len) = (split.remaining(), split.header_len());
        let mut there = bytes.len() - outer - header_len;
        let mut header = [0; MAX_HEADER_LEN];
        for number in 1..=count {
            let Ok(Some(train)) = split.next_train(&mut header, TrainLimits::ONE) else {
                return;
            };
            let Some((header, payload)) = train.segments().next() else {
                return;
            };
            let captured = there.min(payload.len());
            there -= captured;
            segment.clear();
            segment.extend_from_slice(&bytes[..outer]);
            segment.extend_from_slice(header);
            segment.extend_from_slice(&payload[..captured]);
            let len = outer + header.len() + payload.len();
            if outer > 0 {
                v4::set_total_len(segment, u16::try_from(len).unwrap_or(u16::MAX));
            }
            each(&Segment {
                number,
                count,
                bytes: segment,
                len,
            });
        }
    }
}

/// Where the IP header is of what is seen there.
fn network_offset(hook: Hook, format: Option<Format>) -> usize {
    match hook {
        Hook::FromTunnel => format.map_or(0, Format::received_network_offset),
        Hook::ToTunnel => format.map_or(0, Format::network_offset),
        hook if hook.has_frames() => frame::HEADER_LEN,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
    use muslin_encap::offload::virtio::{Gso, GsoKind, Header};
    use smoltcp::time::Instant;

    use super::*;
    use crate::datapath::observe::Source;
    use crate::datapath::port::PortId;
    use crate::datapath::verdict::Verdict;

    /// A frame of TCP with this payload, and its checksum left to be finished.
    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp(80, 5000, 1000, 9)
            .write(&mut frame, payload)
            .unwrap();
        frame[14 + 20 + 16..][..2].fill(0);
        frame
    }

    fn record(hook: Hook, len: usize, size: Option<u16>) -> Record {
        let gso = size.map(|size| Gso {
            kind: GsoKind::TcpV4,
            size,
            ecn: false,
        });
        Record {
            at: Instant::ZERO,
            hook,
            source: Source::Port(PortId(1)),
            verdict: Verdict::Consumed,
            len,
            offload: Header {
                checksum: Checksum::Partial {
                    start: 34,
                    offset: 16,
                },
                gso,
                hdr_len: 0,
            },
            lost: 0,
            captured: len,
        }
    }

    type Seen = (usize, usize, Vec<u8>, usize);

    fn split(record: &Record, format: Option<Format>, bytes: &[u8]) -> Vec<Seen> {
        let mut seen = Vec::new();
        Segmenter::default().split(record, format, bytes, |it| {
            seen.push((it.number, it.count, it.bytes.to_vec(), it.len));
        });
        seen
    }

    /// The sequence number and payload of a frame whose checksum is right.
    fn tcp(frame: &[u8]) -> (u32, Vec<u8>) {
        let parsed = SlicedPacket::from_ethernet(frame).unwrap();
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) =
            (parsed.net, parsed.transport)
        else {
            panic!("{frame:02x?}");
        };
        let sum = tcp
            .to_header()
            .calc_checksum_ipv4(&ip.header().to_header(), tcp.payload());
        assert_eq!(sum.unwrap(), tcp.checksum());
        (tcp.sequence_number(), tcp.payload().to_vec())
    }

    #[test]
    fn segments_are_numbered_and_whole() {
        let payload: Vec<u8> = (0..250).collect();
        let bytes = frame(&payload);
        let seen = split(&record(Hook::FromPod, bytes.len(), Some(100)), None, &bytes);
        let mut all = Vec::new();
        for (at, (number, count, bytes, len)) in seen.iter().enumerate() {
            assert_eq!((*number, *count, *len), (at + 1, 3, bytes.len()));
            let (sequence, payload) = tcp(bytes);
            assert_eq!(sequence as usize, 1000 + all.len());
            all.extend(payload);
        }
        assert_eq!(all, payload);
    }

    #[test]
    fn what_is_not_there_of_a_packet_is_not_made_up() {
        let payload: Vec<u8> = (0..250).collect();
        let bytes = frame(&payload);
        let record = record(Hook::FromPod, bytes.len(), Some(100));
        let seen = split(&record, None, &bytes[..54 + 130]);
        let lens: Vec<_> = seen.iter().map(|it| (it.2.len(), it.3)).collect();
        assert_eq!(lens, [(154, 154), (84, 154), (54, 104)]);
        assert_eq!(tcp(&seen[0].2).1, payload[..100]);
        assert_eq!(seen[1].2[54..], payload[100..130]);
        // Not even the headers: it is as it was.
        let seen = split(&record, None, &bytes[..40]);
        assert_eq!(seen, [(1, 1, bytes[..40].to_vec(), bytes.len())]);
    }

    #[test]
    fn the_checksum_of_a_single_packet_is_finished() {
        let bytes = frame(&[7; 50]);
        let record = record(Hook::FromPod, bytes.len(), None);
        // As a kernel leaves it: with the sum of the pseudo header.
        let mut partial = bytes.clone();
        let at = muslin_encap::ip::transport::Transport::parse(&bytes, 14).unwrap();
        let sum = at.pseudo_header(&bytes, bytes.len() - 34);
        partial[50..52].copy_from_slice(&sum.to_be_bytes());
        let seen = split(&record, None, &partial);
        assert_eq!(seen.len(), 1);
        assert_eq!(tcp(&seen[0].2).1, [7; 50]);
        let short = split(&record, None, &partial[..60]);
        assert_eq!(short, [(1, 1, partial[..60].to_vec(), bytes.len())]);
    }

    #[test]
    fn each_segment_has_an_outer_header_of_its_own() {
        let inner = frame(&[7; 150])[14..].to_vec();
        let mut bytes = Vec::new();
        PacketBuilder::ipv4([10, 9, 0, 1], [10, 9, 0, 2], 64)
            .tcp(1, 1, 1, 1)
            .write(&mut bytes, &[])
            .unwrap();
        bytes.truncate(20);
        bytes[9] = 4;
        bytes.extend(inner);
        let record = record(Hook::FromTunnel, bytes.len(), Some(100));
        let seen = split(&record, Some(Format::Ipip), &bytes);
        let lens: Vec<_> = seen.iter().map(|it| (it.3, it.2[2..4].to_vec())).collect();
        assert_eq!(lens, [(160, vec![0, 160]), (110, vec![0, 110])]);
    }
}
