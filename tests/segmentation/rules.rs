//! What must hold between the kernel's merging and Muslin's, and how they may differ.

use std::collections::BTreeMap;

use muslin_bed::packets::{ACK, CWR, L3};
use muslin_bed::reference;
use muslin_encap::ip::checksum;
use muslin_encap::ip::transport::{ChecksumState, Error, Protocol, Transport};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::merge::MergeSettings;
use muslin_encap::offload::virtio::Header;
use smoltcp::wire::IpVersion;

use crate::trains::{FLAGS, TAG};
use crate::tunnels::Tunnels;

/// Offset of the urgent pointer in a TCP header.
const URGENT: usize = 18;
const DONT_FRAGMENT: u8 = 0x40;

/// A packet that was passed on, and the frames it is of by their place in the batch.
#[derive(Debug)]
struct Group {
    members: Vec<usize>,
    virtio: Header,
    bytes: Vec<u8>,
}

/// Merges a batch both ways, and returns how many superpackets Muslin made.
///
/// # Panics
/// If Muslin merges what the kernel does not, or does not merge what the kernel merges, and that
/// is none of the differences listed here.
pub(crate) fn merges_agree(tunnels: &Tunnels, frames: &[Vec<u8>]) -> usize {
    let ours = merge(frames);
    let theirs = kernel_merge(tunnels, frames);
    let mut made = 0;
    for group in ours.iter().filter(|group| group.members.len() > 1) {
        match theirs.iter().find(|it| it.members == group.members) {
            Some(theirs) => assert_same(group, theirs),
            None => assert_mergeable(tunnels, frames, group),
        }
        made += 1;
    }
    for group in &theirs {
        for pair in group.members.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            let joined = ours.iter().find(|it| it.members.contains(&a)).unwrap();
            // What began with another segment, which has been looked at, may end with another.
            let began = joined.members[0] == group.members[0];
            assert!(
                joined.members.contains(&b) || !began || is_refused(frames, a, b),
                "the kernel joins {b} to {a}: {:?}, not {:?}",
                members(&theirs),
                members(&ours),
            );
        }
    }
    assert_eq!(order(frames, &ours), order(frames, &theirs));
    made
}

fn merge(frames: &[Vec<u8>]) -> Vec<Group> {
    let settings = MergeSettings {
        mtu: Mtu::new(1500).unwrap(),
        mtu_v6: Mtu::new(1500).unwrap(),
        udp: true,
    };
    let outputs = reference::merge(frames, L3, settings);
    let outputs = outputs.into_iter().map(|it| (it.virtio, it.bytes));
    groups(frames, outputs)
}

fn kernel_merge(tunnels: &Tunnels, frames: &[Vec<u8>]) -> Vec<Group> {
    let outputs = tunnels.merge(frames);
    groups(frames, outputs.into_iter().map(|it| (it.virtio, it.bytes)))
}

/// Finds the frames of a batch in what was made of them, each of which must be there once.
fn groups(frames: &[Vec<u8>], outputs: impl Iterator<Item = (Header, Vec<u8>)>) -> Vec<Group> {
    let mut left: Vec<_> = (0..frames.len()).collect();
    let groups = outputs.map(|(virtio, bytes)| {
        let members = if let Some(gso) = virtio.gso {
            let at = Transport::parse(&bytes, L3).unwrap();
            let payload = &bytes[at.payload..at.end];
            payload.chunks(gso.size.into()).map(tag).collect()
        } else {
            let found = left.iter().find(|index| frames[**index] == bytes);
            vec![*found.expect("it is as it came")]
        };
        left.retain(|index| !members.contains(index));
        Group {
            members,
            virtio,
            bytes,
        }
    });
    let groups: Vec<_> = groups.collect();
    let count: usize = groups.iter().map(|group| group.members.len()).sum();
    assert!(left.is_empty() && count == frames.len());
    groups
}

fn tag(payload: &[u8]) -> usize {
    let tag = payload[..TAG].try_into().unwrap();
    u32::from_be_bytes(tag) as usize
}

fn members(groups: &[Group]) -> Vec<&[usize]> {
    groups.iter().map(|group| &group.members[..]).collect()
}

fn assert_same(ours: &Group, theirs: &Group) {
    assert_eq!(ours.bytes, theirs.bytes);
    assert_eq!(ours.virtio.gso, theirs.virtio.gso);
    assert_eq!(ours.virtio.checksum, theirs.virtio.checksum);
}

/// The kernel must merge what Muslin merges, if not among others (with which it may have begun
/// another way) then by itself.
fn assert_mergeable(tunnels: &Tunnels, frames: &[Vec<u8>], group: &Group) {
    let members: Vec<_> = group.members.iter().map(|it| frames[*it].clone()).collect();
    let theirs = tunnels.merge(&members);
    if let [theirs] = &theirs[..] {
        assert_eq!(group.bytes, theirs.bytes);
        assert_eq!(group.virtio.gso, theirs.virtio.gso);
        return;
    }
    // One in 65,536 finished checksums looks unfinished, and Muslin takes its word (see `checksum`).
    assert!(
        members.iter().any(|frame| looks_unfinished(frame)),
        "the kernel does not merge {:?}, of which the first is {:02x?}",
        group.members,
        members[0],
    );
}

fn looks_unfinished(frame: &[u8]) -> bool {
    let at = Transport::parse(frame, L3).unwrap();
    at.is_partial(frame)
}

fn flags(frame: &[u8]) -> u8 {
    let at = Transport::parse(frame, L3).unwrap();
    match at.protocol {
        Protocol::Tcp => frame[at.l4 + FLAGS],
        Protocol::Udp => ACK,
    }
}

/// Whether Muslin has a reason not to join frame `b` to frame `a`, where the kernel has none.
fn is_refused(frames: &[Vec<u8>], a: usize, b: usize) -> bool {
    let between = frames[a + 1..b].iter();
    let mut between = between.filter(|frame| ends(frame, &frames[a]));
    let (a, b) = (&frames[a], &frames[b]);
    let at = Transport::parse(a, L3).unwrap();
    let fragment = L3 + 6;
    // Linux 6.18 takes equal identifications without DF too. Split again, they would count.
    let fixed = at.version == IpVersion::Ipv4
        && a[fragment] & DONT_FRAGMENT == 0
        && a[L3 + 4..L3 + 6] == b[L3 + 4..L3 + 6];
    // No kernel sends data without ACK, and urgent data without URG is nobody's: not worth a rule.
    let odd = at.protocol == Protocol::Tcp
        && (flags(b) & ACK == 0 || a[at.l4 + URGENT..][..2] != b[at.l4 + URGENT..][..2]);
    // Linux 6.15 to 6.18 leave CWR alone, as Muslin does. Before, others joined a first segment that
    // had it; later kernels join what all has it, for which the virtio-net header has no word.
    let cwr = flags(a) & CWR != 0;
    fixed || odd || cwr || between.next().is_some()
}

/// Whether Muslin keeps a frame in its place between others of a flow, while the kernel does not
/// see that it is of that flow and lets it overtake them.
fn ends(frame: &[u8], of: &[u8]) -> bool {
    match Transport::parse(frame, L3) {
        Ok(_) => connection(frame) == connection(of) && kernel_flow(frame) != kernel_flow(of),
        Err(Error::EtherType(_) | Error::Version(_) | Error::Protocol(_)) => false,
        Err(_) => true,
    }
}

/// Protocol, addresses and ports.
fn connection(frame: &[u8]) -> Option<Vec<u8>> {
    let at = Transport::parse(frame, L3).ok()?;
    let addresses = match at.version {
        IpVersion::Ipv4 => L3 + 12..L3 + 20,
        IpVersion::Ipv6 => L3 + 8..L3 + 40,
    };
    let protocol = [u8::from(at.protocol == Protocol::Tcp)];
    Some([&protocol, &frame[addresses], &frame[at.l4..at.l4 + 4]].concat())
}

/// What is a flow to the kernel, whose packets keep their order: the flow label and extension
/// headers count, and what is damaged or has IPv4 options is of no flow.
fn kernel_flow(frame: &[u8]) -> Option<Vec<u8>> {
    let at = Transport::parse(frame, L3).ok()?;
    let network = &frame[L3..at.l4];
    let plain =
        at.version == IpVersion::Ipv6 || network.len() == 20 && checksum::compute(network) == 0;
    let intact = at.checksum_state(frame) == ChecksumState::Valid;
    let more: &[&[u8]] = match at.version {
        IpVersion::Ipv4 => &[],
        IpVersion::Ipv6 => &[&[network[1] & 0xf], &network[2..4], &network[40..]],
    };
    (plain && intact).then_some([connection(frame)?, more.concat()].concat())
}

/// The frames of each flow in the order in which they came out.
fn order(frames: &[Vec<u8>], groups: &[Group]) -> BTreeMap<Vec<u8>, Vec<usize>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for index in groups.iter().flat_map(|group| &group.members) {
        if let Some(flow) = kernel_flow(&frames[*index]) {
            flows.entry(flow).or_default().push(*index);
        }
    }
    flows
}
