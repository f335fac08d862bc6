//! What a node tells of its tables, what comes into them by ARP, and when it forgets.

use super::*;
use crate::datapath::neighbour::{KEPT, Place, State};
use crate::datapath::switch;

const FREE_MAC: EthernetAddress = EthernetAddress([2, 7, 7, 7, 7, 7]);

/// A node with one unguarded pod at port 1, and its frame to an address that nobody has.
fn with_free_pod() -> (Node, Vec<u8>) {
    let mut node = bare_node(1, "vxlan");
    node.attach(POD_PORT, attachment(1, 2, false));
    let frame = ethernet(
        FREE_MAC,
        GATEWAY_MAC,
        0x0800,
        &ping(pod(1, 2), pod(1, 50), 64, 10),
    );
    (node, frame)
}

#[test]
fn tables_are_told_as_they_are() {
    let (mut node, frame) = with_free_pod();
    node.set_peer(peer(2, "10.244.2.0/24"));
    from_pod(&mut node, &frame);
    let ports: Vec<_> = node.ports().map(|(id, port)| (id, port.received)).collect();
    assert_eq!(ports.len(), 1);
    assert_eq!((ports[0].0, ports[0].1.packets), (POD_PORT, 1));
    let mut routes: Vec<_> = node
        .routes()
        .map(|(prefix, _)| prefix.to_string())
        .collect();
    routes.sort();
    assert_eq!(routes, ["10.244.1.0/24", "10.244.2.0/24"]);
    let learned: Vec<_> = node.fdb().map(|(mac, _)| mac).collect();
    assert!(learned.contains(&FREE_MAC));
    let places: Vec<_> = node.neighbours().collect();
    assert!(places.contains(&(
        pod(1, 2).into(),
        Some(Place {
            mac: pod_mac(1, 2),
            port: POD_PORT,
        }),
        State::Permanent,
    )));
    assert_eq!(node.format(), Some(Format::Vxlan));
    assert_eq!(bare_node(1, "none").format(), None);
    assert_eq!(node.mtu(), Mtu::new(1450).unwrap());

    node.count_drops(DropReason::PortGone, 3);
    assert_eq!(node.counters().dropped_for(DropReason::PortGone), 3);
    node.count_flooded(POD_PORT, 60);
    let sent = node.ports().next().unwrap().1.sent;
    assert_eq!((sent.packets, sent.bytes), (1, 60));
}

#[test]
fn what_was_learned_is_forgotten_in_time() {
    let (mut node, frame) = with_free_pod();
    from_pod(&mut node, &frame);
    let learned = |node: &Node| {
        let macs = node.fdb().map(|(mac, _)| mac);
        macs.filter(|mac| *mac == FREE_MAC).count()
    };
    let end = NOW + switch::AGEING.max(KEPT) + AGEING_PERIOD;
    let mut now = NOW;
    while now < end {
        let expected = usize::from(now < NOW + switch::AGEING);
        assert_eq!(learned(&node), expected, "{now}");
        let due = node.poll_at();
        assert!(now < due && due <= now + AGEING_PERIOD, "{now} {due}");
        now = due;
        node.handle_timeout(now);
        outputs(&mut node);
    }
    assert_eq!(learned(&node), 0);
}

#[test]
fn only_hosts_of_the_subnet_are_learned_by_arp() {
    let say = |address| {
        let all = (EthernetAddress::BROADCAST, address);
        frame::write_arp(ArpOperation::Request, (FREE_MAC, address), all)
    };
    let (outside, broadcast) = ([10, 9, 9, 9].into(), pod(1, 255));
    let learned = |node: &Node, address: Ipv4Addr| {
        let mut places = node.neighbours();
        places.any(|(known, place, _)| known == address && place.is_some())
    };
    for overheard in [true, false] {
        let (mut node, _) = with_free_pod();
        for address in [outside, broadcast, pod(1, 50)] {
            if overheard {
                node.learn_from_sibling(NOW, POD_PORT, &say(address));
            } else {
                from_pod(&mut node, &say(address));
            }
            assert_eq!(learned(&node, address), address == pod(1, 50));
        }
        assert!(node.fdb().any(|(mac, _)| mac == FREE_MAC));
    }

    // Where a pod is guarded, what others overhear is, too.
    let mut node = bare_node(1, "vxlan");
    node.attach(POD_PORT, attachment(1, 2, true));
    node.learn_from_sibling(NOW, POD_PORT, &say(pod(1, 50)));
    assert!(!learned(&node, pod(1, 50)));
    assert!(node.fdb().all(|(mac, _)| mac != FREE_MAC));
}
