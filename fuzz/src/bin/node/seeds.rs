//! The seeds of events.

use muslin_fuzz::Seed;

const IPV4: u8 = 0;
const ARP: u8 = 4;
const IPV6: u8 = 6;
const TAGGED: u8 = 7;
const GATEWAY: u8 = 0;
const BROADCAST: u8 = 16;
/// This node's VTEP, and the peer's with identity 0.
const VTEPS: [u8; 2] = [15, 8];
/// No byte of a virtio-net header.
const NOT_EDITED: u8 = 99;
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

pub fn seeds() -> Vec<Seed> {
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
            "tunnel-from-another-port",
            run(udp, &[from_peer(4, [18, 2, 9, UDP, 0, 20, 0, 0])]),
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
            "many-addresses",
            run(
                unguarded | small,
                &[21, 22, 23, 24].map(|mac| frame(2, 3, mac, ARP, [2, 4, 9, 4, 9, 0, 0, 0])),
            ),
        ),
        (
            "many-neighbours",
            run(
                unguarded | small,
                &[5, 6, 7, 8].map(|host| from_pod([2, host, 64, UDP, 0, 20, 0, 0])),
            ),
        ),
        (
            "many-wait",
            run(
                unguarded,
                &[
                    &[(); 6].map(|()| unknown.clone())[..],
                    std::slice::from_ref(&announce),
                ]
                .concat(),
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
    .into_iter()
    .chain(superpackets())
    .chain(through_egress())
    .collect()
}

/// Packets to egress and from it: an address outside, and what is for the gateway's services.
fn through_egress() -> Vec<Seed> {
    let (egress, mtu_576) = (64, 8);
    let from_egress = |fields: [u8; 8]| [&[4][..], &fields].concat();
    let run = |first: u8, events: &[Vec<u8>]| [&[first][..], &events.concat()].concat();
    let outside = 50;
    // Lengths: 240 is a byte less than fits, 241 what fits, 242 a byte more, and so on for fragments.
    let exact = |first, source, destination| {
        let lens = (240..=247).map(|len| from_egress([source, destination, 64, UDP, 0, len, 0, 0]));
        run(first, &lens.collect::<Vec<_>>())
    };
    let superpacket = |choices, size, len| {
        let fields = [outside, 2, 64, choices, size, len, NOT_EDITED, 0];
        let event = [&[15, 12, 0, 0][..], &fields].concat();
        run(egress, &[event])
    };
    vec![
        (
            "to-egress",
            run(
                egress,
                &[
                    from_pod([2, outside, 64, UDP, 0, 20, 0, 0]),
                    from_pod([2, outside, 1, UDP, 0, 20, 0, 0]),
                    from_pod([2, 1, 64, UDP, 0, 20, 0, 0]),
                ],
            ),
        ),
        ("from-egress-exact", exact(egress, outside, 2)),
        ("from-egress-exact-576", exact(egress | mtu_576, outside, 3)),
        ("from-gateway-exact", exact(egress, 1, 18)),
        ("from-pod-exact", {
            let lens = (240..=247).map(|len| from_pod([2, 18, 64, UDP, 0, len, 0, 0]));
            run(0, &lens.collect::<Vec<_>>())
        }),
        ("from-pod-borders", {
            let hosts = (56..=63).map(|host| from_pod([2, host, 64, UDP, 0, 20, 0, 0]));
            run(egress, &hosts.collect::<Vec<_>>())
        }),
        // 45 segments and one byte, and the longest that there can be.
        ("superpacket-from-egress", superpacket(32 | 128, 175, 45)),
        ("superpacket-from-egress-longest", superpacket(33, 254, 255)),
    ]
    .into_iter()
    .chain(seeds_v6())
    .collect()
}

/// What a node with both IP versions meets.
fn seeds_v6() -> Vec<Seed> {
    let (dual, egress, no_peer_guard, small, unguarded) = (128, 64, 2, 16, 32);
    let run = |first: u8, events: &[Vec<u8>]| [&[first][..], &events.concat()].concat();
    let [group, solicited, bridge] = [18, 21, 4];
    let (icmp, tcp, udp, other) = (0, 1, 2, 3);
    let [echo, ask, say, advertise, redirect] = [128, 135, 136, 134, 137];
    let pod = |fields| frame(0, GATEWAY, 2, IPV6, fields);
    let peer = |host, fields: [u8; 8]| {
        // The VTEPs of IPv6: this node's, and that of the peer with identity 4.
        [&[5, host, 14, 12, IPV6][..], &fields, &[0]].concat()
    };
    let from_egress = |fields: [u8; 8]| [&[4][..], &fields].concat();
    let chains = (1..12).map(|headers| pod([2, 18, 64, tcp, headers, 20, 0, 0]));
    let claims = [3, 0, 1, 48, 2, 49, 50]
        .map(|about| frame(0, group, 2, IPV6, [2, 51, 255, icmp, 0, 5, say, about]));
    let sources = [3, 0, 1, 48, 49, 50, 51, 53, 54, 55, 61, 62];
    let sources_of = |port: u8, mac| {
        let each = sources.iter();
        each.map(|source| {
            frame(
                port,
                GATEWAY,
                mac,
                IPV6,
                [*source, 18, 64, tcp, 0, 20, 0, 0],
            )
        })
        .collect::<Vec<_>>()
    };
    let peers_sources = sources.map(|source| peer(0, [source, 2, 64, tcp, 0, 20, 0, 0]));
    let fitting = [240, 241, 242, 249, 250, 251];
    let long = fitting.map(|len| pod([2, 18, 64, tcp, 0, len, 0, 0]));
    let long_here = fitting.map(|len| from_egress([128 | 61, 2, 64, tcp, 0, len, 0, 0]));
    let scan = [5, 6, 7, 8, 9].map(|host| pod([2, host, 64, udp, 0, 20, 0, 0]));
    vec![
        (
            "v6-to-peer",
            run(dual, &[pod([2, 18, 64, tcp, 0, 20, 0, 0])]),
        ),
        (
            "v6-to-pod",
            run(dual, &[peer(0, [18, 2, 64, tcp, 0, 20, 0, 0])]),
        ),
        (
            "v6-to-neighbour",
            run(dual, &[pod([2, 3, 64, tcp, 0, 20, 0, 0])]),
        ),
        (
            "v6-gateway",
            run(
                dual,
                &[
                    pod([2, 1, 64, icmp, 0, 20, echo, 0]),
                    pod([50, 48, 64, icmp, 0, 20, echo, 0]),
                    peer(0, [16, 0, 9, icmp, 0, 20, echo, 0]),
                ],
            ),
        ),
        (
            "v6-asks",
            run(
                dual,
                &[
                    frame(0, solicited, 2, IPV6, [2, 58, 255, icmp, 0, 5, ask, 3]),
                    frame(0, solicited, 2, IPV6, [2, 58, 255, icmp, 0, 5, ask, 1]),
                    frame(0, solicited, 2, IPV6, [54, 58, 255, icmp, 0, 4, ask, 2]),
                    frame(0, group, 2, IPV6, [2, 52, 255, icmp, 0, 5, 133, 0]),
                ],
            ),
        ),
        ("v6-claims", run(dual, &claims)),
        (
            "v6-routers",
            run(
                dual | unguarded,
                &[
                    frame(0, group, 2, IPV6, [50, 51, 255, icmp, 0, 5, advertise, 2]),
                    frame(0, group, 2, IPV6, [50, 51, 255, icmp, 2, 5, advertise, 2]),
                    frame(
                        2,
                        group,
                        bridge,
                        IPV6,
                        [50, 51, 255, icmp, 4, 5, advertise, 2],
                    ),
                    frame(2, 3, bridge, IPV6, [50, 3, 255, icmp, 0, 5, redirect, 2]),
                ],
            ),
        ),
        ("v6-chains", run(dual, &chains.collect::<Vec<_>>())),
        ("v6-sources", run(dual, &sources_of(0, 2))),
        (
            "v6-sources-unguarded",
            run(dual | unguarded, &sources_of(2, bridge)),
        ),
        ("v6-peers-sources", run(dual, &peers_sources)),
        (
            "v6-peers-sources-unguarded",
            run(dual | no_peer_guard, &peers_sources),
        ),
        (
            "v6-over-ipv4",
            run(
                dual,
                &[
                    peer(5, [18, 2, 64, tcp, 0, 20, 0, 0]),
                    [
                        &[5, 5, 15, 8, IPV4][..],
                        &[18, 2, 64, UDP, 0, 20, 0, 0],
                        &[0],
                    ]
                    .concat(),
                ],
            ),
        ),
        (
            "v6-tunnel-to-tunnel",
            run(
                dual,
                &[
                    vec![11, 5, 9, 1, 0],
                    peer(0, [18, 34, 64, tcp, 0, 20, 0, 0]),
                    peer(0, [34, 2, 64, tcp, 0, 20, 0, 0]),
                    peer(1, [34, 2, 64, tcp, 0, 20, 0, 0]),
                ],
            ),
        ),
        (
            "v6-leases-within",
            run(
                dual,
                &[
                    vec![11, 5, 10, 1, 0],
                    pod([2, 56, 64, tcp, 0, 20, 0, 0]),
                    peer(0, [56, 2, 64, tcp, 0, 20, 0, 0]),
                    peer(1, [56, 2, 64, tcp, 0, 20, 0, 0]),
                    vec![12, 5],
                ],
            ),
        ),
        ("v6-long", run(dual, &long)),
        ("v6-long-from-outside", run(dual | egress, &long_here)),
        (
            "v6-hops-end",
            run(
                dual,
                &[
                    pod([2, 18, 1, tcp, 0, 20, 0, 0]),
                    pod([2, 18, 0, tcp, 0, 20, 0, 0]),
                    peer(0, [18, 2, 1, tcp, 0, 20, 0, 0]),
                ],
            ),
        ),
        (
            "v6-outside",
            run(
                dual | egress,
                &[
                    pod([2, 61, 64, udp, 0, 20, 0, 0]),
                    pod([2, 57, 64, udp, 0, 20, 0, 0]),
                    pod([2, 1, 64, udp, 0, 20, 0, 0]),
                    from_egress([128 | 61, 2, 64, udp, 0, 20, 0, 0]),
                    from_egress([128 | 18, 2, 64, udp, 0, 20, 0, 0]),
                    from_egress([128 | 1, 18, 64, udp, 0, 20, 0, 0]),
                    from_egress([128 | 61, 18, 64, udp, 0, 20, 0, 0]),
                ],
            ),
        ),
        (
            "v6-link-local",
            run(
                dual,
                &[
                    pod([50, 18, 64, tcp, 0, 20, 0, 0]),
                    pod([2, 50, 64, tcp, 0, 20, 0, 0]),
                    frame(0, group, 2, IPV6, [50, 51, 255, icmp, 0, 5, say, 50]),
                    frame(1, group, 3, IPV6, [50, 51, 255, icmp, 0, 5, say, 50]),
                    peer(0, [50, 2, 64, tcp, 0, 20, 0, 0]),
                    peer(0, [18, 50, 64, tcp, 0, 20, 0, 0]),
                ],
            ),
        ),
        (
            "v6-unknown",
            run(
                dual | unguarded | small,
                &[
                    &scan[..],
                    &[frame(
                        2,
                        group,
                        bridge,
                        IPV6,
                        [9, 51, 255, icmp, 0, 9, say, 9],
                    )],
                ]
                .concat(),
            ),
        ),
        (
            "v6-groups",
            run(
                dual,
                &[59, 51, 52, 60].map(|to| frame(0, 22, 2, IPV6, [2, to, 1, other, 0, 20, 17, 0])),
            ),
        ),
    ]
}

/// A frame from pod 2 with a virtio-net header: destination, choices, segment size in units of
/// eight bytes, payload.
fn superpacket(mac: u8, destination: u8, [choices, size, len]: [u8; 3]) -> Vec<u8> {
    vec![
        15,
        0,
        mac,
        2,
        2,
        destination,
        64,
        choices,
        size,
        len,
        NOT_EDITED,
        0,
        0,
    ]
}

fn superpackets() -> Vec<Seed> {
    let (udp, dont_fragment, single, other_kind, finished) = (1, 2, 4, 8, 16);
    let exact = 32 | 64;
    let (bare, mtu_576, unguarded) = (1, 8, 32);
    let (size, len) = (125, 155);
    let run = |first: u8, events: &[Vec<u8>]| [&[first][..], &events.concat()].concat();
    let one = |first, packet| run(first, &[packet]);
    let to_peer = |choices| superpacket(GATEWAY, 18, [choices, size, len]);
    let from_peer = |choices| vec![15, 6, 15, 8, 18, 2, 64, choices, size, len, NOT_EDITED, 0];
    let mut checksum_elsewhere = superpacket(GATEWAY, 18, [single, size, 60]);
    checksum_elsewhere[10..12].copy_from_slice(&[6, 14]);
    let waiting = superpacket(GATEWAY, 9, [udp, size, len]);
    let announce = frame(2, BROADCAST, 4, ARP, [2, 4, 9, 4, 9, 0, 0, 0]);
    vec![
        ("superpacket-to-peer", one(0, to_peer(0))),
        ("superpacket-to-peer-bare", one(bare, to_peer(udp))),
        (
            "superpacket-to-port",
            one(0, superpacket(GATEWAY, 3, [0, size, len])),
        ),
        (
            "superpacket-switched",
            one(0, superpacket(3, 3, [udp, size, len])),
        ),
        ("superpacket-from-peer", one(0, from_peer(0))),
        ("superpacket-from-peer-bare", one(bare, from_peer(udp))),
        ("superpacket-too-large", one(mtu_576, to_peer(0))),
        (
            "superpacket-dont-fragment",
            one(mtu_576, to_peer(dont_fragment)),
        ),
        ("superpacket-waits", run(unguarded, &[waiting, announce])),
        ("superpacket-other-kind", one(0, to_peer(other_kind))),
        ("superpacket-finished", one(0, to_peer(finished))),
        (
            "superpacket-no-size",
            one(0, superpacket(GATEWAY, 18, [0, 0, len])),
        ),
        (
            "unfinished-to-peer",
            one(0, superpacket(GATEWAY, 18, [single, size, 60])),
        ),
        (
            "unfinished-to-port",
            one(0, superpacket(GATEWAY, 3, [single | udp, size, 60])),
        ),
        ("unfinished-elsewhere", one(0, checksum_elsewhere)),
        // Segments of the MTU, and the longest superpacket.
        (
            "superpacket-longest",
            one(0, superpacket(GATEWAY, 18, [exact, 254, 255])),
        ),
        (
            "superpacket-longest-udp",
            one(0, superpacket(GATEWAY, 3, [exact | udp, 254, 44])),
        ),
        (
            "superpacket-a-byte-too-large",
            one(0, superpacket(GATEWAY, 18, [exact, 255, 3])),
        ),
    ]
}
