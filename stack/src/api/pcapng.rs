//! Files of captured packets: the blocks of pcapng (draft-ietf-opsawg-pcapng) that Muslin writes.
//!
//! Numbers are little-endian; times are in microseconds since 1970.

/// Block types (section 11.1).
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;

/// Options (sections 3.5, 4.1, 4.2, 4.3 and 4.6).
const COMMENT: u16 = 1;
const APPLICATION: u16 = 4;
const NAME: u16 = 2;
const DESCRIPTION: u16 = 3;
const DROP_COUNT: u16 = 4;
const DROPPED: u16 = 5;

/// Bytes of a block's type and length, which stands at its end again.
const FRAME_LEN: usize = 12;

/// How the packets of an interface begin (tcpdump.org's list of link-layer header types).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkType {
    /// With an Ethernet header.
    Ethernet,
    /// With an IPv4 or IPv6 header.
    Raw,
}

/// A captured packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    /// The number of its interface, in the order of their descriptions.
    pub interface: u32,
    /// When it was seen, in microseconds since 1970.
    pub micros: u64,
    /// What there is of it.
    pub bytes: &'a [u8],
    /// Its length in bytes.
    pub len: u32,
    /// Packets of its interface that were lost since the one before it.
    pub lost: u64,
    /// What is to be known of it.
    pub comment: &'a str,
}

/// Adds the beginning of a file, with what wrote it.
pub fn section(out: &mut Vec<u8>, application: &str) {
    block(out, SECTION_HEADER, |body| {
        body.extend(0x1a2b_3c4d_u32.to_le_bytes());
        body.extend(1_u16.to_le_bytes());
        body.extend(0_u16.to_le_bytes());
        // The section's length is not known.
        body.extend(u64::MAX.to_le_bytes());
        option(body, APPLICATION, application.as_bytes());
        end_options(body);
    });
}

/// Adds the description of the next interface, of whose packets so many bytes are captured.
pub fn interface(
    out: &mut Vec<u8>,
    link: LinkType,
    snap_len: u32,
    (name, description): (&str, &str),
) {
    let link: u16 = match link {
        LinkType::Ethernet => 1,
        LinkType::Raw => 101,
    };
    block(out, INTERFACE_DESCRIPTION, |body| {
        body.extend(link.to_le_bytes());
        body.extend(0_u16.to_le_bytes());
        body.extend(snap_len.to_le_bytes());
        option(body, NAME, name.as_bytes());
        option(body, DESCRIPTION, description.as_bytes());
        end_options(body);
    });
}

/// Adds a packet.
pub fn packet(out: &mut Vec<u8>, packet: &Packet<'_>) {
    block(out, ENHANCED_PACKET, |body| {
        body.extend(packet.interface.to_le_bytes());
        time(body, packet.micros);
        body.extend((packet.bytes.len() as u32).to_le_bytes());
        body.extend(packet.len.to_le_bytes());
        padded(body, packet.bytes);
        option(body, COMMENT, packet.comment.as_bytes());
        if packet.lost > 0 {
            option(body, DROP_COUNT, &packet.lost.to_le_bytes());
        }
        end_options(body);
    });
}

/// Adds how many packets of an interface were lost until that time.
pub fn statistics(out: &mut Vec<u8>, interface: u32, micros: u64, lost: u64) {
    block(out, INTERFACE_STATISTICS, |body| {
        body.extend(interface.to_le_bytes());
        time(body, micros);
        option(body, DROPPED, &lost.to_le_bytes());
        end_options(body);
    });
}

/// What a block is that was written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// A section's header, or an interface's description.
    Head,
    /// A packet.
    Packet,
    /// How many packets of an interface were lost.
    Statistics(u64),
}

/// The length of the block that `bytes` begin with, and what it is. Nothing if it is not all there, or
/// none that was written here.
#[must_use]
pub fn next_block(bytes: &[u8]) -> Option<(usize, Block)> {
    let (kind, rest) = bytes.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*rest.first_chunk::<4>()?)).ok()?;
    let block = bytes
        .get(..len)
        .filter(|_| len >= FRAME_LEN && len.is_multiple_of(4))?;
    let block = match u32::from_le_bytes(*kind) {
        SECTION_HEADER | INTERFACE_DESCRIPTION => Block::Head,
        ENHANCED_PACKET => Block::Packet,
        INTERFACE_STATISTICS => {
            // Behind the interface, the time and the head of the only option.
            let lost = block.get(24..)?.first_chunk::<8>()?;
            Block::Statistics(u64::from_le_bytes(*lost))
        }
        _ => return None,
    };
    Some((len, block))
}

fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend(kind.to_le_bytes());
    out.extend([0; 4]);
    body(out);
    let len = (out.len() + 4 - start) as u32;
    out[start + 4..start + 8].copy_from_slice(&len.to_le_bytes());
    out.extend(len.to_le_bytes());
}

fn time(body: &mut Vec<u8>, micros: u64) {
    body.extend(((micros >> 32) as u32).to_le_bytes());
    body.extend((micros as u32).to_le_bytes());
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(u16::MAX.into())];
    if value.is_empty() {
        return;
    }
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    padded(body, value);
}

fn end_options(body: &mut Vec<u8>) {
    body.extend([0; 4]);
}

/// Adds bytes, and zeros up to a multiple of four.
fn padded(body: &mut Vec<u8>, bytes: &[u8]) {
    body.extend(bytes);
    body.resize(
        body.len() + bytes.len().next_multiple_of(4) - bytes.len(),
        0,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_length_at_both_ends() {
        let mut file = Vec::new();
        section(&mut file, "muslin");
        interface(
            &mut file,
            LinkType::Ethernet,
            96,
            ("from-pod", "Frames from pods"),
        );
        for len in 0..9 {
            let bytes = vec![7; len];
            packet(
                &mut file,
                &Packet {
                    interface: 0,
                    micros: 0x0001_0002_0003_0004,
                    bytes: &bytes,
                    len: 100,
                    lost: len as u64,
                    comment: "to pod web",
                },
            );
        }
        statistics(&mut file, 0, 5, 36);
        let (mut rest, mut packets, mut blocks) = (file.as_slice(), 0, 0);
        while let Some((len, kind)) = next_block(rest) {
            let (block, others) = rest.split_at(len);
            assert_eq!(block[len - 4..], (len as u32).to_le_bytes());
            if kind == Block::Packet {
                assert_eq!(
                    block[12..16],
                    0x0001_0002_u32.to_le_bytes(),
                    "the upper half of the time"
                );
                assert_eq!(block[20..24], (packets as u32).to_le_bytes());
                packets += 1;
            }
            if blocks == 11 {
                assert_eq!(kind, Block::Statistics(36));
            }
            blocks += 1;
            rest = others;
        }
        assert_eq!((rest, packets, blocks), (&[][..], 9, 12));
    }

    #[test]
    fn what_is_no_block_has_no_length() {
        assert_eq!(next_block(&[]), None);
        assert_eq!(next_block(&[6, 0, 0, 0, 12, 0, 0]), None);
        assert_eq!(
            next_block(&[6, 0, 0, 0, 12, 0, 0, 0]),
            None,
            "its end is missing"
        );
        assert_eq!(
            next_block(&[6, 0, 0, 0, 12, 0, 0, 0, 12, 0, 0, 0]),
            Some((12, Block::Packet))
        );
        for wrong in [0_u32, 8, 13] {
            let bytes = [[6, 0, 0, 0], wrong.to_le_bytes(), [0; 4], [0; 4]].concat();
            assert_eq!(next_block(&bytes), None, "{wrong}");
        }
    }
}
