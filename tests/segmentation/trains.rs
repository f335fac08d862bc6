//! Batches of segments by chance.

use muslin_bed::packets::{ACK, L3, Shape, superpacket};
use muslin_bed::reference::{finish, split};
use muslin_encap::ip::transport::{Protocol, Transport};
use muslin_encap::offload::split::Checksums;
use proptest::prelude::*;

/// Offset of flags in a TCP header.
pub(crate) const FLAGS: usize = 13;
/// Bytes at the start of each payload by which a segment is known again.
pub(crate) const TAG: usize = 4;

/// How a flow numbers its IPv4 packets.
#[derive(Debug, Clone, Copy)]
enum Idents {
    Counting,
    Fixed,
    Random,
}

/// Something that happens to a batch on its way.
#[derive(Debug, Clone)]
pub(crate) enum Accident {
    Swap(usize),
    Drop(usize),
    Repeat(usize),
    /// A segment loses the end of its payload, and its flow goes on from there.
    Shorten(usize, usize),
    /// A flag is set or cleared.
    Flag(usize, u8),
    /// An IPv4 identification is so much larger.
    Ident(usize, u16),
    /// A bit of the headers changes; whether checksums follow.
    Change(usize, usize, u8, bool),
    /// A bit of the payload changes.
    Damage(usize),
}

fn accident() -> impl Strategy<Value = Accident> {
    let at = 0usize..40;
    prop_oneof![
        1 => at.clone().prop_map(Accident::Swap),
        2 => at.clone().prop_map(Accident::Drop),
        1 => at.clone().prop_map(Accident::Repeat),
        2 => (at.clone(), 1usize..200).prop_map(|(at, by)| Accident::Shorten(at, by)),
        4 => (at.clone(), 0u32..8).prop_map(|(at, bit)| Accident::Flag(at, 1 << bit)),
        2 => (at.clone(), 1u16..4).prop_map(|(at, by)| Accident::Ident(at, by)),
        6 => (at.clone(), 0usize..72, 0u32..8, prop::bool::weighted(0.9))
            .prop_map(|(at, byte, bit, fix)| Accident::Change(at, byte, 1 << bit, fix)),
        1 => at.prop_map(Accident::Damage),
    ]
}

/// A batch of frames of a few flows, as they come from a tunnel.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    flows: Vec<(Shape, Idents)>,
    /// Segments of one flow in a row.
    stride: usize,
    accidents: Vec<Accident>,
}

impl Batch {
    pub(crate) fn frames(&self) -> Vec<Vec<u8>> {
        let mut queues: Vec<_> = self.flows.iter().map(segments).collect();
        let mut frames = Vec::new();
        while queues.iter().any(|queue| !queue.is_empty()) {
            for queue in &mut queues {
                frames.extend(queue.drain(..queue.len().min(self.stride)));
            }
        }
        for accident in &self.accidents {
            happen(&mut frames, accident);
        }
        for (index, frame) in frames.iter_mut().enumerate() {
            mark(frame, index as u32);
        }
        for accident in &self.accidents {
            harm(&mut frames, accident);
        }
        frames
    }
}

fn segments((shape, idents): &(Shape, Idents)) -> Vec<Vec<u8>> {
    let frame = shape.frame().1;
    let mut segments = split(&frame, L3, shape.size.into(), Checksums::Complete);
    for (index, segment) in segments.iter_mut().enumerate() {
        let ident = match idents {
            Idents::Counting => continue,
            Idents::Fixed => shape.ident,
            Idents::Random => shape.ident ^ (index as u16).wrapping_mul(40_503),
        };
        if !shape.v6 {
            segment[L3 + 4..L3 + 6].copy_from_slice(&ident.to_be_bytes());
        }
    }
    segments
}

/// What changes how frames follow each other, checksums aside.
fn happen(frames: &mut Vec<Vec<u8>>, accident: &Accident) {
    let len = frames.len();
    if len < 2 {
        return;
    }
    match *accident {
        Accident::Swap(at) => frames.swap(at % len, (at + 1) % len),
        Accident::Drop(at) => drop(frames.remove(at % len)),
        Accident::Repeat(at) => frames.insert(at % len, frames[at % len].clone()),
        Accident::Shorten(at, by) => shorten(frames, at % len, by),
        Accident::Flag(at, flag) => {
            if let Some(at) = tcp_at(&frames[at % len]).map(|it| (at % len, it.l4 + FLAGS)) {
                frames[at.0][at.1] ^= flag;
            }
        }
        Accident::Ident(at, by) => {
            let frame = &mut frames[at % len];
            if frame[L3] >> 4 == 4 {
                let field = &mut frame[L3 + 4..L3 + 6];
                let ident = u16::from_be_bytes([field[0], field[1]]).wrapping_add(by);
                field.copy_from_slice(&ident.to_be_bytes());
            }
        }
        Accident::Change(at, byte, by, true) => {
            if let Some(byte) = frames[at % len].get_mut(L3 + byte) {
                *byte ^= by;
            }
        }
        Accident::Change(..) | Accident::Damage(_) => {}
    }
}

/// What leaves a checksum wrong.
fn harm(frames: &mut [Vec<u8>], accident: &Accident) {
    let len = frames.len();
    match *accident {
        Accident::Change(at, byte, by, false) => {
            if let Some(byte) = frames[at % len].get_mut(L3 + byte) {
                *byte ^= by;
            }
        }
        Accident::Damage(at) => {
            if let Some(byte) = frames[at % len].last_mut() {
                *byte ^= 1;
            }
        }
        _ => {}
    }
}

fn tcp_at(frame: &[u8]) -> Option<Transport> {
    let at = Transport::parse(frame, L3).ok()?;
    (at.protocol == Protocol::Tcp).then_some(at)
}

fn shorten(frames: &mut [Vec<u8>], index: usize, by: usize) {
    let Some(at) = tcp_at(&frames[index]) else {
        return;
    };
    let by = by.min(at.payload_len().saturating_sub(TAG));
    let ports = frames[index][at.l4..at.l4 + 4].to_vec();
    frames[index].truncate(at.end - by);
    finish(&mut frames[index], &at, Checksums::Complete);
    for frame in &mut frames[index + 1..] {
        let Some(at) = tcp_at(frame).filter(|at| frame[at.l4..at.l4 + 4] == ports) else {
            continue;
        };
        let field = &mut frame[at.l4 + 4..at.l4 + 8];
        let sequence = u32::from_be_bytes(field.try_into().unwrap());
        field.copy_from_slice(&sequence.wrapping_sub(by as u32).to_be_bytes());
    }
}

/// Gives a frame its tag and right checksums.
fn mark(frame: &mut Vec<u8>, tag: u32) {
    if let Ok(at) = Transport::parse(frame, L3)
        && at.payload_len() >= TAG
    {
        frame.truncate(at.end);
        frame[at.payload..at.payload + TAG].copy_from_slice(&tag.to_be_bytes());
        finish(frame, &at, Checksums::Complete);
    }
}

/// Batches that fit one train of datagrams.
pub(crate) fn batch() -> impl Strategy<Value = Batch> {
    let idents = prop::sample::select(vec![Idents::Counting, Idents::Fixed, Idents::Random]);
    (
        proptest::collection::vec((flow(), idents), 1..4),
        1usize..6,
        proptest::collection::vec(accident(), 0..4),
    )
        .prop_map(|(mut flows, stride, accidents)| {
            for (index, (shape, _)) in flows.iter_mut().enumerate() {
                shape.flow = index as u8;
            }
            Batch {
                flows,
                stride,
                accidents,
            }
        })
}

/// A flow's segments as the superpacket they would be.
fn flow() -> impl Strategy<Value = Shape> {
    let sizes = (20u16..800, 1usize..18, 0usize..800);
    (superpacket(), sizes, prop::bool::weighted(0.3)).prop_map(
        |(shape, (size, count, last), busy)| {
            // The last segment may be shorter, but has room for a tag.
            let last = if last < TAG || last >= size.into() {
                0
            } else {
                last
            };
            Shape {
                payload: usize::from(size) * count + last,
                size,
                flags: if busy { shape.flags } else { ACK },
                ..shape
            }
        },
    )
}
