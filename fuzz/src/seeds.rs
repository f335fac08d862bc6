//! The seeds: small inputs, each of which takes the fuzzer to a place it would be long in finding.

/// The name of a file, and what is in it.
pub type Seed = (&'static str, Vec<u8>);

/// The seeds of each target.
#[must_use]
pub fn all() -> [(&'static str, Vec<Seed>); 3] {
    [
        ("codecs", codecs()),
        ("node", node()),
        ("segments", segments()),
    ]
}

fn codecs() -> Vec<Seed> {
    let packet = |options: &[u8], fragment: [u8; 2], payload: usize| {
        let header_len = 20 + options.len();
        let total = (header_len + payload) as u16;
        let mut bytes = vec![0x40 | (header_len / 4) as u8, 0];
        bytes.extend(total.to_be_bytes());
        bytes.extend([0, 7, fragment[0], fragment[1], 64, 17, 0, 0]);
        bytes.extend([10, 244, 1, 2, 10, 244, 2, 3]);
        bytes.extend(options);
        let sum = muslin_encap::checksum::compute(&bytes);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.resize(usize::from(total), 9);
        [&[0, 40][..], &bytes].concat()
    };
    vec![
        (
            "vxlan",
            [&[0, 1, 8, 0, 0, 0, 0, 0, 1, 0][..], &[2; 60]].concat(),
        ),
        (
            "vxlan-group-policy",
            vec![0, 1, 0x88, 0x40, 0x12, 0x34, 0, 0, 7, 0xff],
        ),
        ("vxlan-no-vni", vec![0, 1, 0xf7, 0, 0, 0, 0, 0, 1, 0]),
        ("mac-colons", b"\0\x010e:1f:20:a1:b2:c3".to_vec()),
        ("mac-dots", b"\0\x010e1f.20a1.b2c3".to_vec()),
        ("ipv4", packet(&[], [0, 0], 300)),
        ("ipv4-dont-fragment", packet(&[], [0x40, 0], 300)),
        (
            "ipv4-options",
            packet(&[7, 3, 4, 1, 148, 4, 0, 0], [0, 0], 300),
        ),
        ("ipv4-last-fragment", packet(&[], [0x1f, 0xff], 300)),
    ]
}

const IPV4: u8 = 0;
const ARP: u8 = 4;
const IPV6: u8 = 6;
const TAGGED: u8 = 7;
const GATEWAY: u8 = 0;
const BROADCAST: u8 = 16;
/// This node's VTEP, and the peer's with identity 0.
const VTEPS: [u8; 2] = [15, 8];
const ICMP: u8 = 0;
const UDP: u8 = 2;
const ECHO_REQUEST: u8 = 8;
/// The last of these is beyond what a packet may have.
const FRAGMENT_AT_END: u8 = 0x1f;

/// A frame from a pod at a port; pods 2, 3 and 4 are at ports 0, 1 and 2.
fn frame(port: u8, destination: u8, source: u8, kind: u8, fields: [u8; 8]) -> Vec<u8> {
    [&[0, port, destination, source, kind][..], &fields, &[0]].concat()
}

fn from_pod(fields: [u8; 8]) -> Vec<u8> {
    frame(0, GATEWAY, 2, IPV4, fields)
}

fn from_peer(host: u8, fields: [u8; 8]) -> Vec<u8> {
    let [ours, theirs] = VTEPS;
    [&[5, host, ours, theirs, IPV4][..], &fields, &[0]].concat()
}

fn node() -> Vec<Seed> {
    // Bits of the first byte: bare IP tunnel, no peer guard, MTU, small tables, unguarded port 2.
    let (vxlan, udp, unguarded) = (0, 1, 32);
    let (mtu_68, no_peer_guard, small) = (4, 2, 16);
    let [attach, detach, set_peer, remove_peer, hold, wait] = [9u8, 10, 11, 12, 13, 14];
    let run = |first: u8, events: &[Vec<u8>]| [&[first][..], &events.concat()].concat();

    let to_peer = from_pod([2, 18, 64, UDP, 0, 20, 0, 0]);
    let to_gateway = from_pod([2, 1, 64, ICMP, 0, 20, 0, ECHO_REQUEST]);
    let large = from_pod([2, 18, 64, UDP, 0, 200, 2, 148]);
    let to_pod = from_peer(0, [18, 2, 64, UDP, 0, 20, 0, 0]);
    let unknown = from_pod([2, 9, 64, UDP, 0, 20, 0, 0]);
    let announce = frame(2, BROADCAST, 4, ARP, [2, 4, 9, 4, 9, 0, 0, 0]);
    let seconds = vec![wait, 12];
    vec![
        ("to-peer-vxlan", run(vxlan, std::slice::from_ref(&to_peer))),
        ("to-peer-udp", run(udp, std::slice::from_ref(&to_peer))),
        ("to-pod-vxlan", run(vxlan, std::slice::from_ref(&to_pod))),
        ("to-pod-udp", run(udp, std::slice::from_ref(&to_pod))),
        (
            "to-pod-unknown-peer",
            run(
                no_peer_guard,
                &[from_peer(3, [50, 2, 64, UDP, 0, 20, 0, 0])],
            ),
        ),
        (
            "ping-gateway",
            run(
                vxlan,
                &[
                    to_gateway.clone(),
                    from_peer(0, [16, 0, 9, ICMP, 0, 20, 0, ECHO_REQUEST]),
                ],
            ),
        ),
        (
            "ping-gateway-large",
            run(
                mtu_68,
                &[from_pod([2, 1, 64, ICMP, 0, 100, 0, ECHO_REQUEST])],
            ),
        ),
        (
            "ttl-ends",
            run(
                vxlan,
                &[
                    from_pod([2, 18, 1, UDP, 0, 20, 0, 0]),
                    from_peer(0, [18, 2, 1, UDP, 0, 20, 0, 0]),
                ],
            ),
        ),
        (
            "no-route",
            run(mtu_68, &[from_pod([2, 50, 9, UDP, 0, 60, 0, 0])]),
        ),
        (
            "tunnel-to-tunnel",
            run(vxlan, &[from_peer(0, [18, 34, 9, UDP, 0, 20, 0, 0])]),
        ),
        ("fragments", run(vxlan, std::slice::from_ref(&large))),
        (
            "fragments-many",
            run(
                udp | mtu_68,
                &[vec![hold, 3], large.clone(), large.clone(), large.clone()],
            ),
        ),
        (
            "fragment-beyond-the-end",
            run(
                udp,
                &[from_pod([2, 18, 9, UDP, FRAGMENT_AT_END, 200, 0, 0])],
            ),
        ),
        (
            "dont-fragment",
            run(mtu_68, &[from_pod([2, 18, 9, UDP, 0x40, 200, 0, 0])]),
        ),
        (
            "switched",
            run(vxlan, &[frame(0, 3, 2, IPV4, [2, 3, 9, UDP, 0, 20, 0, 0])]),
        ),
        (
            "reserved-group",
            run(
                unguarded,
                &[frame(2, 17, 4, TAGGED, [4, 3, 9, UDP, 0, 20, 0, 1])],
            ),
        ),
        (
            "vlan-0",
            run(
                vxlan,
                &[frame(0, 3, 2, TAGGED, [1, 3, 9, UDP, 0, 20, 0, 0])],
            ),
        ),
        (
            "lengths-that-hide-a-source",
            run(
                vxlan,
                &[[
                    &[0, 0, 3, 2, IPV4][..],
                    &[1, 3, 9, UDP, 0, 20, 0, 0],
                    &[251, 16, 0x7f],
                ]
                .concat()],
            ),
        ),
        (
            "router-advertisement",
            run(
                unguarded,
                &[
                    frame(2, 18, 4, IPV6, [4, 3, 58, 0, 1, 4, 0, 0]),
                    frame(2, 18, 4, IPV6, [4, 2, 58, 0, 0, 1, 0, 0]),
                ],
            ),
        ),
        (
            "arp-for-gateway",
            run(
                vxlan,
                &[frame(0, BROADCAST, 2, ARP, [1, 2, 2, 20, 1, 0, 0, 0])],
            ),
        ),
        (
            "arp-probe",
            run(
                vxlan,
                &[frame(0, BROADCAST, 2, ARP, [1, 2, 54, 20, 1, 0, 0, 0])],
            ),
        ),
        (
            "arp-poses-as-gateway",
            run(
                unguarded,
                &[frame(2, BROADCAST, 4, ARP, [2, 4, 1, 16, 1, 0, 0, 0])],
            ),
        ),
        (
            "arp-tunnelled",
            run(
                vxlan,
                &[[
                    &[5, 0, BROADCAST, 8, ARP][..],
                    &[1, 8, 16, 20, 0, 0, 0, 0],
                    &[0],
                ]
                .concat()],
            ),
        ),
        (
            "resolved",
            run(
                unguarded,
                &[
                    unknown.clone(),
                    announce.clone(),
                    unknown.clone(),
                    vec![wait, 100],
                    unknown.clone(),
                ],
            ),
        ),
        (
            "given-up",
            run(
                unguarded | small,
                &[unknown.clone(), seconds.clone(), seconds.clone(), seconds],
            ),
        ),
        (
            "attached-while-waiting",
            run(
                unguarded,
                &[unknown, vec![attach, 4, 7, 0], vec![detach, 2], announce],
            ),
        ),
        (
            "port-gone",
            run(vxlan, &[vec![hold, 2], to_gateway, vec![detach, 0]]),
        ),
        (
            "peer-gone",
            run(vxlan, &[vec![hold, 2], large, vec![remove_peer, 0]]),
        ),
        (
            "peer-with-own-subnet",
            run(
                vxlan,
                &[
                    vec![set_peer, 2, 5, 2, 0],
                    to_pod.clone(),
                    vec![remove_peer, 2],
                    to_pod,
                ],
            ),
        ),
        (
            "peers-with-one-subnet",
            run(
                vxlan,
                &[
                    vec![set_peer, 2, 0, 2, 0],
                    vec![set_peer, 3, 3, 2, 3],
                    vec![remove_peer, 2],
                    to_peer.clone(),
                    vec![remove_peer, 3],
                    to_peer.clone(),
                    vec![remove_peer, 0],
                    to_peer,
                ],
            ),
        ),
    ]
}

/// Choices of the first byte: where the IP header is, and what the receiver takes.
const BARE: u8 = 0;
const BEHIND_VXLAN: u8 = 3;
const UNFINISHED: u8 = 1 << 2;
const ONE_BY_ONE: u8 = 1 << 3;
const MTU_576: u8 = 1 << 5;
const MTU_1450: u8 = 2 << 5;

/// A frame of a virtio-net type with 100-byte segments; what is to happen to its segments.
fn superpacket(choice: u8, (gso, v6): (u8, bool), flags: u8, changes: &[[u8; 4]]) -> Vec<u8> {
    let tcp = gso != 5;
    let l3 = if choice & 3 == BEHIND_VXLAN { 22 } else { 0 };
    let protocol = if tcp { 6 } else { 17 };
    let mut frame = vec![0; l3];
    if l3 > 0 {
        frame[l3 - 2..].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
    }
    if v6 {
        frame.extend([0x60, 0, 0, 0, 0, 0, protocol, 64]);
        frame.extend([0xfd; 32]);
    } else {
        frame.extend([0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, protocol, 0, 0]);
        frame.extend([10, 244, 1, 2, 10, 244, 2, 3]);
    }
    let l4 = frame.len();
    frame.extend([0x80, 0, 0x1f, 0x90]);
    if tcp {
        frame.extend([0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 2, 0x80, flags, 1, 2]);
        frame.extend([0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
    } else {
        frame.extend([0; 4]);
    }
    let header_len = frame.len() as u16;
    frame.extend(0..100);
    let offset = if tcp { 16 } else { 6 };
    let numbers = [header_len, 100, l4 as u16, offset].map(u16::to_le_bytes);
    [
        &[choice, 2, 1, gso][..],
        &numbers.concat(),
        &[changes.len() as u8],
        &changes.concat(),
        &frame,
    ]
    .concat()
}

fn segments() -> Vec<Seed> {
    let (v4, v6, udp4, udp6) = ((1, false), (4, true), (5, false), (5, true));
    let (ack, psh, fin, cwr, syn) = (0x10, 0x18, 0x11, 0x90, 0x12);
    let [drop, swap, again, pad, unfinish, finish, change, damage] = [0u8, 1, 2, 3, 4, 5, 6, 7];
    let (flags, ttl, fragment) = (33, 8, 6);
    let plain = |choice, kind, flags| superpacket(choice | MTU_1450, kind, flags, &[]);
    let with = |changes: &[[u8; 4]]| superpacket(BARE | MTU_1450, v4, ack, changes);
    vec![
        ("tcp4", plain(BARE, v4, ack)),
        ("tcp4-vxlan", plain(BEHIND_VXLAN, v4, psh)),
        ("tcp4-fin", plain(BARE, v4, fin)),
        ("tcp4-cwr", plain(BARE, (0x81, false), cwr)),
        ("tcp4-syn", plain(BARE, v4, syn)),
        ("tcp4-unfinished", plain(BARE | UNFINISHED, v4, ack)),
        ("tcp4-one-by-one", plain(BARE | ONE_BY_ONE, v4, ack)),
        ("tcp6", plain(BARE, v6, ack)),
        ("tcp6-vxlan", plain(BEHIND_VXLAN, v6, psh)),
        ("udp4", plain(BARE, udp4, 0)),
        ("udp6-vxlan", plain(BEHIND_VXLAN, udp6, 0)),
        ("wrong-kind", plain(BARE, (4, false), ack)),
        ("whole", superpacket(BARE | MTU_576, (0, false), psh, &[])),
        ("lost", with(&[[1, drop, 0, 0]])),
        ("reordered", with(&[[1, swap, 0, 0]])),
        ("repeated", with(&[[1, again, 0, 0]])),
        ("padded", with(&[[5, pad, 6, 0], [0, pad, 6, 0]])),
        (
            "some-unfinished",
            with(&[[1, unfinish, 0, 0], [2, finish, 0, 0]]),
        ),
        ("pushed", with(&[[1, change, flags, 8]])),
        ("reset", with(&[[2, change, flags, 4]])),
        ("other-ttl", with(&[[2, change, ttl, 1]])),
        ("fragment", with(&[[2, change, fragment, 0x60]])),
        ("damaged", with(&[[2, damage, 60, 1], [4, damage, 10, 1]])),
        ("damaged-first", with(&[[0, damage, 60, 1]])),
    ]
}
