//! What every path between two ends must carry, and what it must say of what it cannot.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use muslin::agent::{Agent, Ping, Pinged};

/// Bytes of a bulk transfer.
pub const BULK: u64 = 100_000_000;
/// Headers of an echo request: IPv4 and ICMP.
const HEADERS_LEN: usize = 28;

/// Pings, each of which must come back whole.
pub fn ping(from: &mut Agent, to: impl Into<IpAddr>) {
    let to = to.into();
    let ping = Ping::new(to);
    let pinged = from.ping(&ping).unwrap();
    assert!(pinged.is_perfect(ping.count), "ping {to}: {pinged:?}");
}

/// Sends bytes by TCP to a listener, which must get them all, as they were.
pub fn transfer(from: &mut Agent, to: impl Into<IpAddr>, port: u16, bytes: u64) {
    let to = to.into();
    let sent = from.send(SocketAddr::new(to, port), bytes, bytes ^ 7);
    let sent = sent.unwrap_or_else(|error| panic!("transfer to {to}: {error}"));
    assert_eq!((sent.bytes, sent.intact), (bytes, true), "to {to}");
    eprintln!(
        "{bytes} bytes to {to}: {:.0} Mbit/s",
        sent.bits_per_second() / 1e6
    );
}

/// One ping of so many bytes, IP header included.
pub fn ping_of_size(from: &mut Agent, to: Ipv4Addr, size: u16, dont_fragment: bool) -> Pinged {
    let ping = Ping {
        count: 1,
        size: usize::from(size) - HEADERS_LEN,
        dont_fragment,
        ..Ping::new(to)
    };
    from.ping(&ping).unwrap()
}

/// One ping of as many bytes as fit, which must not be fragmented.
pub fn fits(from: &mut Agent, to: Ipv4Addr, size: u16) {
    let pinged = ping_of_size(from, to, size, true);
    assert!(pinged.is_perfect(1), "{size} bytes to {to}: {pinged:?}");
}

/// One ping of one byte too many, about which a router must say so.
pub fn exceeds(from: &mut Agent, to: Ipv4Addr, mtu: u16, router: Ipv4Addr) {
    let pinged = ping_of_size(from, to, mtu + 1, true);
    assert!(pinged.replies.is_empty(), "{to}: {pinged:?}");
    assert_eq!(pinged.errors.len(), 1, "{to}: {pinged:?}");
    let error = &pinged.errors[0];
    assert!(error.is_fragmentation_needed(mtu), "{to}: {pinged:?}");
    assert_eq!(error.from, router, "{to}");
}

/// Pings that die on their way, at this router.
pub fn expires(from: &mut Agent, to: Ipv4Addr, ttl: u8, router: Ipv4Addr) {
    let ping = Ping {
        ttl: Some(ttl),
        ..Ping::new(to)
    };
    let pinged = from.ping(&ping).unwrap();
    assert!(pinged.replies.is_empty(), "{to}: {pinged:?}");
    assert_eq!(pinged.errors.len(), 3, "{to}: {pinged:?}");
    for error in &pinged.errors {
        assert!(error.is_time_exceeded(), "{to}: {pinged:?}");
        assert_eq!(error.from, router, "{to}");
    }
}

/// Pings to which nobody answers, and of which the node says that it knows no way.
pub fn unreachable(from: &mut Agent, to: Ipv4Addr) {
    let ping = Ping::new(to);
    let pinged = from.ping(&ping).unwrap();
    assert!(pinged.replies.is_empty(), "{to}: {pinged:?}");
    assert_eq!(pinged.errors.len(), 3, "{to}: {pinged:?}");
    for error in &pinged.errors {
        assert_eq!((error.kind, error.code), (3, 0), "{to}: {pinged:?}");
    }
}
