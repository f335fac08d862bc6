//! The agent's pings say what the kernel does with packets that fit, do not fit, or die on the way.

use std::net::{Ipv4Addr, Ipv6Addr};

use muslin::agent::Ping;
use muslin_lab::Lab;

#[test]
fn pings_tell_what_becomes_of_them() {
    let Some(lab) = Lab::new() else { return };
    // One - router - other, with a narrower link behind the router.
    let [one, router, other] = ["one", "router", "other"].map(|name| lab.namespace(name));
    lab.cable((&one, "eth0"), (&router, "left"));
    lab.cable((&router, "right"), (&other, "eth0"));
    one.sh("ip addr add 192.0.2.2/25 dev eth0; ip route add default via 192.0.2.1");
    other.sh(
        "ip addr add 192.0.2.130/25 dev eth0; ip route add default via 192.0.2.129
         ip link set eth0 mtu 1400",
    );
    router.sh(
        "ip addr add 192.0.2.1/25 dev left; ip addr add 192.0.2.129/25 dev right
         ip link set right mtu 1400; echo 1 >/proc/sys/net/ipv4/ip_forward",
    );
    let mut agent = one.agent();
    let ping = Ping::new([192, 0, 2, 130]);

    let pinged = agent.ping(&ping).unwrap();
    assert!(pinged.is_perfect(3), "{pinged:?}");
    assert_eq!(pinged.replies[0].ttl, Some(63));

    let sized = |size: usize, dont_fragment| Ping {
        size: size - 28,
        dont_fragment,
        count: 1,
        ..ping.clone()
    };
    for (size, dont_fragment) in [(1400, true), (1400, false), (1401, false), (1501, false)] {
        let pinged = agent.ping(&sized(size, dont_fragment)).unwrap();
        assert!(pinged.is_perfect(1), "{size}: {pinged:?}");
    }
    let pinged = agent.ping(&sized(1401, true)).unwrap();
    assert_eq!(pinged.errors.len(), 1, "{pinged:?}");
    assert!(pinged.errors[0].is_fragmentation_needed(1400), "{pinged:?}");
    assert_eq!(pinged.errors[0].from, Ipv4Addr::new(192, 0, 2, 1));
    // From then on the system knows better.
    for size in [1401, 1501] {
        let pinged = agent.ping(&sized(size, true)).unwrap();
        assert!(pinged.refused[0].is_too_long(), "{pinged:?}");
    }

    let dying = Ping {
        ttl: Some(1),
        ..ping
    };
    let pinged = agent.ping(&dying).unwrap();
    assert_eq!((pinged.replies.len(), pinged.errors.len()), (0, 3));
    assert!(pinged.errors[2].is_time_exceeded(), "{pinged:?}");

    let nobody = Ping {
        timeout_ms: 1,
        ..Ping::new([192, 0, 2, 131])
    };
    assert!(agent.ping(&nobody).unwrap().replies.is_empty());
    one.sh("ip route del default");
    let pinged = agent.ping(&nobody).unwrap();
    assert_eq!(pinged.refused[0].error, "ENETUNREACH");
}

#[test]
fn pings_of_ipv6_tell_the_same() {
    let Some(lab) = Lab::new() else { return };
    let [one, router, other] = ["one", "router", "other"].map(|name| lab.namespace(name));
    lab.cable((&one, "eth0"), (&router, "left"));
    lab.cable((&router, "right"), (&other, "eth0"));
    one.sh("ip addr add fd01::2/64 dev eth0 nodad; ip route add default via fd01::1");
    other.sh(
        "ip addr add fd02::2/64 dev eth0 nodad; ip route add default via fd02::1
         ip link set eth0 mtu 1400",
    );
    router.sh(
        "ip addr add fd01::1/64 dev left nodad; ip addr add fd02::1/64 dev right nodad
         ip link set right mtu 1400; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding",
    );
    let mut agent = one.agent();
    let ping = Ping::new("fd02::2".parse::<Ipv6Addr>().unwrap());

    let pinged = agent.ping(&ping).unwrap();
    assert!(pinged.is_perfect(3), "{pinged:?}");
    assert_eq!(pinged.replies[0].ttl, Some(63));

    let sized = |size: usize, dont_fragment| Ping {
        size: size - 48,
        dont_fragment,
        count: 1,
        ..ping.clone()
    };
    for dont_fragment in [true, false] {
        let pinged = agent.ping(&sized(1400, dont_fragment)).unwrap();
        assert!(pinged.is_perfect(1), "{pinged:?}");
    }
    let pinged = agent.ping(&sized(1401, true)).unwrap();
    assert_eq!(pinged.errors.len(), 1, "{pinged:?}");
    assert!(pinged.errors[0].is_fragmentation_needed(1400), "{pinged:?}");
    assert_eq!(
        pinged.errors[0].from,
        "fd01::1".parse::<Ipv6Addr>().unwrap()
    );
    for size in [1401, 1501] {
        let pinged = agent.ping(&sized(size, true)).unwrap();
        assert!(pinged.refused[0].is_too_long(), "{pinged:?}");
        // Its fragments are as long as the path takes.
        let pinged = agent.ping(&sized(size, false)).unwrap();
        assert!(pinged.is_perfect(1), "{size}: {pinged:?}");
    }

    let dying = Ping {
        ttl: Some(1),
        ..ping
    };
    let pinged = agent.ping(&dying).unwrap();
    assert_eq!((pinged.replies.len(), pinged.errors.len()), (0, 3));
    assert!(pinged.errors[2].is_time_exceeded(), "{pinged:?}");
    assert_eq!(
        agent.address_v6("eth0").unwrap(),
        "fd01::2".parse::<Ipv6Addr>().unwrap()
    );
}

#[test]
fn frames_arrive_as_they_are_sent() {
    let Some(lab) = Lab::new() else { return };
    let [one, other] = ["one", "other"].map(|name| lab.namespace(name));
    lab.cable((&one, "eth0"), (&other, "eth0"));
    let (mut sender, mut receiver) = (one.agent(), other.agent());
    receiver.capture("eth0").unwrap();
    let frames: Vec<Vec<u8>> = [14, 15, 60, 1514]
        .map(|len| (0..len).map(|byte| byte as u8 & 0xfe).collect())
        .into();
    sender.inject("eth0", &frames).unwrap();
    let mut captured = receiver.captured().unwrap();
    captured.retain(|frame| frame.starts_with(&[0, 0, 2, 2]));
    assert_eq!(captured, frames);
    assert!(sender.inject("eth0", &[vec![0; 1515]]).is_err());
    assert!(sender.inject("none", &frames).is_err());
    assert!(sender.captured().is_err());
}
