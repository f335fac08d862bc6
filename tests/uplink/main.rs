//! Uplinks against the Linux kernel: what passes a packet socket or a TAP in which direction, and
//! what superpackets come to.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod bed;

use std::collections::{BTreeSet, HashSet};
use std::io::Write as _;
use std::net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;

use bed::{Bed, FAR, Listener, NEAR, SUBNET, arp, is_arp, received, received_by, udp, wait};
use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use muslin::device::FrameDevice as _;
use muslin::underlay::uplink::{Failure, Frames, OpenError, Uplink, UplinkKind};
use muslin_bed::packets::{ACK, L3, Shape};
use muslin_bed::reference;
use muslin_encap::ip::transport::Transport;
use muslin_encap::offload::split::Checksums;
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};
use muslin_lab::inside;
use muslin_lab::{Offload, SOON, poll_until};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{setsockopt, sockopt};

const POD: [u8; 4] = [10, 244, 1, 5];
const PEER: [u8; 4] = [10, 244, 2, 3];

/// Declares a test that runs in a network namespace of its own.
macro_rules! inside {
    ($name:ident, $inner:ident, $body:block) => {
        #[test]
        fn $name() {
            inside::run(stringify!($inner));
        }

        #[test]
        #[ignore = "the part inside the lab"]
        fn $inner() {
            if inside::is_inside() {
                $body
            }
        }
    };
}

inside!(our_frames_pass_both_ways_as_they_are, both_ways, {
    let bed = Bed::new();
    let uplink = &bed.uplinks(1)[0];
    assert!(uplink.has_offloads());
    assert_eq!(uplink.hardware_address().0, NEAR);

    let ours = [
        udp(NEAR, PEER, POD, b"to a pod"),
        udp(NEAR, [192, 168, 9, 9], [10, 244, 1, 255], &[7; 1472]),
        arp(FAR, NEAR, 1),
        arp(FAR, [0xff; 6], 2),
    ];
    ours.iter().for_each(|frame| bed.send(frame));
    let heard: Vec<_> = (bed.heard_by(uplink).into_iter())
        .map(|(header, frame)| {
            assert_eq!((header.checksum, header.gso), (Checksum::Unknown, None));
            frame
        })
        .collect();
    // Each sender has a queue.
    assert_eq!(sorted(heard), sorted(ours.to_vec()));

    let sent = [udp(FAR, POD, PEER, b"from a pod"), arp(NEAR, [0xff; 6], 3)];
    for frame in &sent {
        let (head, tail) = frame.split_at(20);
        let tail = tail.split_at(9);
        uplink
            .send(&Header::default(), head, &[tail.0, tail.1])
            .unwrap();
    }
    assert_eq!(bed.receive_all(uplink), sent);
    assert!(bed.heard_by(uplink).is_empty(), "it hears itself");
});

inside!(what_is_not_ours_does_not_pass, not_ours, {
    let bed = Bed::new();
    // All that is on the cable comes as far as the filter.
    inside::sh("ip link set near promisc on");
    let uplink = &bed.uplinks(1)[0];
    let good = udp(NEAR, PEER, POD, b"to a pod");
    let tagged =
        |frame: &[u8], tag: [u8; 2]| [&frame[..12], &[0x81, 0], &tag, &frame[12..]].concat();
    let mut ipv6 = good.clone();
    ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
    let stranger = [2, 0, 0, 0, 8, 9];
    let others = [
        udp(NEAR, PEER, [10, 244, 2, 5], b"another subnet's"),
        udp(NEAR, POD, [192, 168, 9, 1], b"the host's"),
        udp(stranger, PEER, POD, b"another host's"),
        udp([0xff; 6], PEER, POD, b"a broadcast"),
        udp([1, 0, 0x5e, 0, 0, 1], PEER, POD, b"a multicast"),
        arp(FAR, stranger, 1),
        ipv6,
        tagged(&good, [0, 7]),
        tagged(&arp(FAR, [0xff; 6], 1), [0xe0, 7]),
        good[..30].to_vec(),
    ];
    others.iter().for_each(|frame| bed.send(frame));
    // A tag for nothing but a priority the kernel ignores too.
    bed.send(&tagged(&good, [0xe0, 0]));
    let heard = bed.heard_by(uplink);
    let heard: Vec<_> = heard.iter().map(|(_, frame)| frame).collect();
    assert_eq!(heard, [&good]);
});

inside!(ipv6_for_the_subnet_passes_with_its_discovery, ipv6, {
    let bed = Bed::new();
    inside::sh("ip link set near promisc on");
    let uplinks = bed.uplinks_for("10.244.1.0/24,fd00:1::/64", 2);
    let packet = |to: [u8; 6], source: &str, destination: &str| {
        let [source, destination] =
            [source, destination].map(|it| it.parse::<Ipv6Addr>().unwrap().octets());
        PacketBuilder::ethernet2(FAR, to).ipv6(source, destination, 64)
    };
    let udp = |to, source: &str, destination: &str| {
        let mut frame = Vec::new();
        let built = packet(to, source, destination).udp(9, 9);
        built.write(&mut frame, b"hello").unwrap();
        frame
    };
    let icmp = |to, destination: &str, message: u8| {
        let mut frame = Vec::new();
        let built = packet(to, "fe80::1", destination);
        let built = built.icmpv6_raw(message, 0, [0; 4]);
        built.write(&mut frame, &[7; 20]).unwrap();
        frame
    };
    let all_nodes = [0x33, 0x33, 0xff, 0, 0, 9];
    let ours = [
        icmp(all_nodes, "ff02::1:ff00:9", 135),
        icmp(NEAR, "fd00:9::9", 136),
        udp(NEAR, "fd00:2::5", "fd00:1::5"),
    ];
    let others = [
        udp(NEAR, "fd00:2::5", "fd00:3::5"),
        udp(all_nodes, "fd00:2::5", "fd00:1::5"),
        udp([2, 0, 0, 0, 8, 9], "fd00:2::5", "fd00:1::5"),
        icmp(all_nodes, "ff02::1", 134),
    ];
    others.iter().chain(&ours).for_each(|frame| bed.send(frame));
    let heard = bed.heard_by_each(&uplinks).into_iter().flatten();
    let heard: Vec<_> = heard.map(|(_, frame)| frame).collect();
    assert_eq!(sorted(heard), sorted(ours.to_vec()));

    // A flow is at one worker.
    let mut workers = BTreeSet::new();
    for pod in 2..34 {
        let (near, far) = (format!("fd00:1::{pod:x}"), "fd00:2::5");
        let there = udp(NEAR, far, &near);
        bed.send(&there);
        bed.send(&there);
        let each = bed.heard_by_each(&uplinks);
        let which: Vec<_> = each.iter().map(Vec::len).collect();
        assert!(which == [2, 0] || which == [0, 2], "{which:?}");
        workers.insert(which);
    }
    assert_eq!(workers.len(), 2, "flows differ in their workers");
});

inside!(
    each_flow_is_at_one_worker_and_each_pod_in_one_queue,
    flows,
    {
        let bed = Bed::new();
        let uplinks = bed.uplinks(3);
        let sent: Vec<_> = (0..60u8)
            .map(|flow| udp(NEAR, [10, 244, 2, flow], [10, 244, 1, 200], &[flow; 9]))
            .collect();
        for frame in &sent {
            bed.send(frame);
            bed.send(frame);
        }
        let question = arp(FAR, [0xff; 6], 9);
        bed.send(&question);
        let (mut all, mut questions) = (Vec::new(), 0);
        for (index, heard) in bed.heard_by_each(&uplinks).into_iter().enumerate() {
            let heard = heard.into_iter().map(|(_, frame)| frame);
            let (arp, heard): (Vec<_>, Vec<_>) = heard.partition(|frame| is_arp(frame));
            questions += arp.iter().filter(|frame| **frame == question).count();
            assert!(heard.len() > 20, "{index} has {}", heard.len());
            let pairs = heard.chunks(2);
            assert!(pairs.into_iter().all(|pair| pair[0] == pair[1]), "{index}");
            all.extend(heard.into_iter().step_by(2));
        }
        assert_eq!(questions, 1, "which that worker tells the others");
        assert_eq!(sorted(all), sorted(sent));

        let queues = uplinks[0].queues().count();
        let mut used = HashSet::new();
        for pod in 0..queues as u8 {
            for flow in 0..8 {
                bed.send(&udp(NEAR, [10, 244, 2, pod], [10, 244, 1, flow], b"?"));
            }
            let mut at = Vec::new();
            poll_until(SOON, "its frames", || {
                for queue in 0..queues {
                    let heard = uplinks.iter().flat_map(|it| received_by(it, queue));
                    at.extend(heard.map(|_| queue));
                }
                (at.len() >= 8).then_some(())
            });
            assert_eq!(at, [at[0]; 8], "{pod}");
            used.insert(at[0]);
        }
        assert_eq!(used.len(), queues, "neighbours share no queue");
    }
);

fn sorted(mut frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    frames.sort();
    frames
}

inside!(a_superpacket_leaves_as_its_segments, superpackets_out, {
    let bed = Bed::new();
    // On the wire, nobody is left to segment or to finish checksums.
    inside::sh("ip link set near gso_max_segs 1");
    inside::sh(&Offload::Checksums.off("near"));
    let uplink = &bed.uplinks(1)[0];
    for (tcp, payload, size) in [
        (true, 65_535 - 40, 1460),
        (true, 3000, 1448),
        (false, 9001, 1000),
    ] {
        let shape = Shape {
            v6: false,
            tcp,
            flow: 3,
            network_options: 0,
            options: Vec::new(),
            flags: ACK,
            fragment: 0x40,
            ident: 0xfff0,
            sequence: u32::MAX - 5000,
            payload,
            size,
            zero: false,
        };
        let (right, frame) = shape.frame();
        let expected = reference::split(&frame, L3, size.into(), Checksums::Complete);
        // A pod's kernel gives a hint that may be anything (see `virtio`).
        for hdr_len in [right.hdr_len, 0, frame.len().min(65_535) as u16] {
            let header = Header { hdr_len, ..right };
            let (head, tail) = frame.split_at(right.hdr_len.into());
            let tail: Vec<_> = tail.chunks(1400).collect();
            uplink.send(&header, head, &tail).unwrap();
            let arrived = bed.receive_all(uplink);
            assert_eq!(arrived.len(), expected.len());
            assert!(arrived == expected, "{tcp} {payload} {hdr_len}");
        }
    }
});

inside!(superpackets_arrive_with_their_headers, superpackets_in, {
    let bed = Bed::new();
    bed.far.sh("ip addr add 192.168.9.2/24 dev far
         ip neigh add 192.168.9.1 lladdr 02:00:00:00:08:02 dev far
         ip route add 10.244.1.0/24 via 192.168.9.1");
    let uplink = &bed.uplinks(1)[0];
    let mut listener = Listener::new(uplink);
    let data: Vec<u8> = (0..14_000u32).map(|i| (i * 7 + i / 250) as u8).collect();

    let sent = data.clone();
    bed.far.run(move || {
        let socket = UdpSocket::bind("192.168.9.2:0").unwrap();
        setsockopt(&socket, sockopt::UdpGsoSegment, &1000).unwrap();
        socket.send_to(&sent, SocketAddr::from((POD, 53))).unwrap();
    });
    let (header, frame) = listener.next();
    assert_superpacket(&header, GsoKind::Udp, 1000);
    assert_eq!(payload(&frame), data);

    let sent = data.clone();
    let (sender, stream) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let write = move || {
                let mut stream = TcpStream::connect(SocketAddr::from((POD, 80))).unwrap();
                stream.write_all(&sent).unwrap();
                sender.send(stream).unwrap();
            };
            bed.far.run(write);
        });
        let (_, syn) = listener.next();
        accept(uplink, &syn);
        stream.recv().unwrap()
    });
    let (mut got, mut superpackets) = (Vec::new(), 0);
    while got.len() < data.len() {
        let (header, frame) = listener.next();
        if frame.len() > 1514 {
            assert_superpacket(&header, GsoKind::TcpV4, 1460);
            superpackets += 1;
        }
        got.extend(payload(&frame));
    }
    assert_eq!(got, data);
    assert!(superpackets > 0);
});

inside!(an_interface_may_go_down_and_away, down_and_away, {
    let bed = Bed::new();
    let uplink = &bed.uplinks(1)[0];
    let receive = || {
        let each = (0..uplink.queues().count()).map(|queue| {
            let received = uplink.receive(queue, &mut Frames::default());
            received.map_err(|error| Failure::from(&error))
        });
        let first = each.clone().next().unwrap();
        assert!(each.skip(1).all(|it| it == first), "every queue is told");
        first
    };
    let send = || {
        let sent = uplink.send(&Header::default(), &arp(NEAR, FAR, 1), &[]);
        sent.map_err(|error| Failure::from(&error))
    };
    let open = |name: &str| {
        let subnet = SUBNET.parse().unwrap();
        Uplink::open(&UplinkKind::PacketSocket, name, subnet, 2)
    };
    let long = udp(FAR, POD, PEER, &[0; 1473]);
    let sent = uplink.send(&Header::default(), &long, &[]);
    assert_eq!(
        sent.map_err(|error| Failure::from(&error)),
        Err(Failure::TooLong)
    );

    inside::sh("ip link set near down");
    wait(uplink);
    assert_eq!(receive(), Err(Failure::Down));
    assert_eq!(receive(), Err(Failure::QueueFull), "once is enough");
    assert_eq!(send(), Err(Failure::Down));
    assert!(matches!(open("near"), Err(OpenError::Down(name)) if name == "near"));

    inside::sh("ip link set near up");
    bed.wait_for(std::slice::from_ref(uplink));
    bed.heard_by(uplink);
    bed.send(&udp(NEAR, PEER, POD, b"again"));
    assert_eq!(bed.heard_by(uplink).len(), 1);

    inside::sh("ip link del near");
    wait(uplink);
    assert_eq!(receive(), Err(Failure::Gone));
    assert_eq!(send(), Err(Failure::Gone));
    assert!(matches!(open("near"), Err(OpenError::NoInterface(_))));
    assert!(matches!(open("lo"), Err(OpenError::NotEthernet { .. })));
});

inside!(what_does_not_fit_the_queue_is_counted, overflow, {
    let bed = Bed::new();
    let uplink = &bed.uplinks(1)[0];
    for queue in uplink.queues() {
        setsockopt(&queue, sockopt::RcvBuf, &200_000).unwrap();
    }
    // Fewer than wait for the other host's processor (`netdev_max_backlog`).
    let sent = 800;
    for _ in 0..sent {
        bed.send(&udp(NEAR, PEER, POD, &[1; 1400]));
    }
    let (mut arrived, mut lost) = (0, 0);
    let mut frames = Frames::default();
    poll_until(SOON, "all frames, or word of them", || {
        for queue in 0..uplink.queues().count() {
            while uplink.receive(queue, &mut frames).is_ok() {
                arrived += frames.frames().count();
                lost += frames.lost();
            }
        }
        lost += uplink.take_losses();
        (arrived as u64 + lost == sent).then_some(())
    });
    assert!(lost > 0 && arrived > 0);
});

inside!(without_the_capability_it_says_what_to_do, no_capability, {
    let _bed = Bed::new();
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-net_raw"]);
    command.arg(std::env::current_exe().unwrap());
    inside::succeeds(&mut command, "refused");
});

#[test]
#[ignore = "the part inside the lab"]
fn refused() {
    if inside::is_inside() {
        let subnet = SUBNET.parse().unwrap();
        let opened = Uplink::open(&UplinkKind::PacketSocket, "near", subnet, 1);
        let error = opened.unwrap_err();
        assert!(matches!(&error, OpenError::NoCapability(name) if name == "near"));
        let words = error.to_string();
        for word in [
            "near",
            "CAP_NET_RAW",
            "AmbientCapabilities",
            "--cap-add NET_RAW",
            "tap:",
        ] {
            assert!(words.contains(word), "{words}");
        }
    }
}

inside!(a_bridged_tap_is_an_uplink_too, bridged_tap, {
    let bed = Bed::new();
    let kind = UplinkKind::Tap("lan0".to_owned());
    let uplinks = Uplink::open(&kind, "", SUBNET.parse().unwrap(), 2).unwrap();
    plug("lan0");
    bed.wait_for(&uplinks);
    let mac = uplinks[0].hardware_address();
    assert!(
        uplinks
            .iter()
            .all(|it| it.has_offloads() && it.hardware_address() == mac)
    );
    // The bridge learns from it where the node is.
    let hello = arp(mac.0, FAR, 1);
    for uplink in &uplinks {
        uplink.send(&Header::default(), &hello, &[]).unwrap();
        assert_eq!(bed.receive_all(uplink), std::slice::from_ref(&hello));
    }
    let mut sent: Vec<_> = (0..40u8)
        .map(|flow| udp(mac.0, [10, 244, 2, flow], POD, &[flow; 9]))
        .collect();
    sent.iter().for_each(|frame| bed.send(frame));
    let mut all = Vec::new();
    poll_until(SOON, "all frames", || {
        let heard = uplinks.iter().flat_map(received);
        let heard = heard.map(|(_, frame)| frame);
        all.extend(heard.filter(|frame| !is_arp(frame)));
        (all.len() == sent.len()).then_some(())
    });
    all.sort();
    sent.sort();
    assert!(all == sent, "{all:02x?}");
});

inside!(a_tap_of_one_queue_is_read_by_one_worker, one_queue, {
    let bed = Bed::new();
    inside::sh("ip tuntap add dev lan1 mode tap");
    let kind = UplinkKind::Tap("lan1".to_owned());
    let uplinks = Uplink::open(&kind, "", SUBNET.parse().unwrap(), 2).unwrap();
    plug("lan1");
    assert!(uplinks.iter().all(Uplink::has_offloads));
    bed.wait_for(&uplinks[..1]);
    let mac = uplinks[0].hardware_address().0;
    let mut listener = Listener::new(&uplinks[0]);
    for uplink in &uplinks {
        let frame = arp(mac, FAR, 1);
        uplink.send(&Header::default(), &frame, &[]).unwrap();
        assert_eq!(bed.receive_all(uplink), [frame]);
    }
    let frame = udp(mac, PEER, POD, b"to the first");
    bed.send(&frame);
    assert_eq!(listener.next().1, frame);
    bed.send(&frame);
    wait(&uplinks[0]);
    let silent = uplinks[1].queues().next().unwrap();
    let mut waited = [PollFd::new(silent, PollFlags::POLLIN)];
    assert_eq!(
        poll(&mut waited, 0u16).unwrap(),
        0,
        "it would wake up in vain"
    );
    assert!(received(&uplinks[1]).is_empty());
    assert_eq!(listener.next().1, frame);
    let again = Uplink::open(&kind, "", SUBNET.parse().unwrap(), 2);
    assert!(matches!(again, Err(OpenError::TapInUse(name)) if name == "lan1"));
});

/// Bridges a TAP with the cable.
fn plug(tap: &str) {
    inside::sh(&format!(
        "ip link add bridge type bridge stp_state 0 mcast_snooping 0
         ip link set bridge addrgenmode none
         ip link set {tap} addrgenmode none
         ip link set {tap} master bridge up
         ip link set near master bridge
         ip link set bridge up"
    ));
}

#[track_caller]
fn assert_superpacket(header: &Header, kind: GsoKind, size: u16) {
    let ecn = false;
    assert_eq!(header.gso, Some(Gso { kind, size, ecn }));
    let offset = if kind == GsoKind::Udp { 6 } else { 16 };
    assert_eq!(header.checksum, Checksum::Partial { start: 34, offset });
}

fn payload(frame: &[u8]) -> Vec<u8> {
    let at = Transport::parse(frame, L3).unwrap();
    frame[at.payload..at.end].to_vec()
}

/// Answers a SYN.
fn accept(uplink: &Uplink, syn: &[u8]) {
    let syn = SlicedPacket::from_ethernet(syn).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = syn.transport else {
        panic!("{syn:?}");
    };
    assert!(tcp.syn() && !tcp.ack());
    let mut answer = Vec::new();
    PacketBuilder::ethernet2(NEAR, FAR)
        .ipv4(POD, [192, 168, 9, 2], 64)
        .tcp(80, tcp.source_port(), 1000, 65_535)
        .syn()
        .ack(tcp.sequence_number().wrapping_add(1))
        .options(&[etherparse::TcpOptionElement::MaximumSegmentSize(1460)])
        .unwrap()
        .write(&mut answer, &[])
        .unwrap();
    uplink.send(&Header::default(), &answer, &[]).unwrap();
}
