//! What stands in a store: lease records, the network's configuration, keys and whole entries. What
//! is read is printed as text that reads the same, what is made reads as it was made, and a plain
//! reading of the JSON agrees on what is valid.
#![cfg_attr(fuzzing, no_main)]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use muslin_encap::tunnel::wireguard::{PublicKey, decode_key};
use muslin_fuzz::Seed;
use muslin_stack::control::lease::{
    Backend, Entry, Ipv6Range, LeaseRecord, NetworkConfig, SubnetKey, TunnelEnd, VxlanOptions,
    WireGuardMode, WireGuardOptions, ipv6_fault, is_public_ipv6, read_entry, read_peer,
};
use muslin_stack::control::peers::{Here, peer_of_ipv6, peer_of_lease};
use muslin_stack::datapath::peer::PeerId;
use muslin_stack::secret::Secret;
use serde_json::Value;

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        b"\"PublicIP\":\"192.168.64.3\"",
        b"\"PublicIPv6\":null",
        b"\"BackendType\":\"vxlan\"",
        b"\"BackendData\":{\"VNI\":1,\"VtepMAC\":\"c6:d2:32:6f:8f:44\"}",
        b"\"BackendV6Data\":",
        b"\"Network\":\"10.244.0.0/16\"",
        b"\"SubnetLen\":24",
        b"\"SubnetMin\":\"10.244.1.0\"",
        b"\"SubnetMax\":\"10.244.255.0\"",
        b"\"Backend\":{\"Type\":\"vxlan\"}",
        b"\"Backend\":{\"Type\":\"udp\",\"Port\":8285}",
        b"\"EnableIPv4\":true",
        b",\"DirectRouting\":true",
        b",\"GBP\":true",
        b",\"MTU\":1450",
        b",\"VNI\":7",
        b"null",
        b"10.244.7.0-24",
        b"&fd00:12:13::-56",
        b"/subnets/",
        b"0.0.0.0-0&",
        b"\"PublicIPv6\":\"fd00::3\"",
        b",\"EnableIPv6\":true",
        b",\"IPv6Network\":\"fd00:1::/48\"",
        b",\"IPv6SubnetLen\":64",
        b",\"IPv6SubnetMin\":\"fd00:1:0:1::\"",
        b",\"IPv6SubnetMax\":\"fd00:1:0:9::\"",
        b"\"BackendType\":\"wireguard\"",
        b"{\"PublicKey\":\"mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc=\",\"Port\":51820}",
        b"\"Backend\":{\"Type\":\"wireguard\"}",
        b",\"Mode\":\"separate\"",
        b",\"Mode\":\"auto\"",
        b",\"Mode\":\"ipv6\"",
        b",\"ListenPort\":51820",
        b",\"ListenPortV6\":51821",
        b",\"PSK\":\"4HAXZFAg2aqXKxI1GMXTEDKcNJeuMEJRr8rjFO8XmEY=\"",
        b",\"PersistentKeepaliveInterval\":25",
    ],
    inputs: 500_000,
    max_len: 800,
}

/// What the first byte chooses.
const RECORD: u8 = 0;
const CONFIG: u8 = 1;
const KEY: u8 = 2;
const ENTRY: u8 = 3;
const MADE_RECORD: u8 = 4;
const MADE_CONFIG: u8 = 5;
const MADE_RANGE: u8 = 6;
const MADE_WIREGUARD: u8 = 7;
const PEER: u8 = 8;
const KINDS: u8 = 9;

const PREFIX: &str = "/coreos.com/network";

/// The first byte chooses what the rest is.
fn run(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    match (choice % KINDS, std::str::from_utf8(bytes)) {
        (RECORD, Ok(text)) => record(text),
        (CONFIG, Ok(text)) => config(text),
        (KEY, Ok(text)) => key(text),
        (ENTRY, Ok(text)) => entry(text),
        (MADE_RECORD, _) => made_record(bytes),
        (MADE_CONFIG, _) => made_config(bytes),
        (MADE_RANGE, _) => made_range(bytes),
        (MADE_WIREGUARD, _) => made_wireguard(bytes),
        (PEER, Ok(text)) => peer(text),
        _ => {}
    }
}

fn record(text: &str) {
    let read = LeaseRecord::parse(text);
    assert_eq!(read.is_ok(), is_record(text), "{read:?}");
    let Ok(record) = read else {
        return;
    };
    let printed = record.to_json();
    let again = LeaseRecord::parse(&printed).expect("what is printed is a record");
    assert_eq!(again, record);
    assert_eq!(again.to_json(), printed);
    assert!(record.vtep_mac().is_none() || record.backend_type == "vxlan");
    assert_eq!(again.vtep_mac(), record.vtep_mac());
    assert!(record.vtep_mac_v6().is_none() || record.backend_type == "vxlan");
    assert_eq!(again.vtep_mac_v6(), record.vtep_mac_v6());
    assert_eq!(again.node_address(), record.node_address());
    let is_wireguard = record.backend_type == "wireguard";
    for (name, read) in [
        ("backenddata", record.wireguard()),
        ("backendv6data", record.wireguard_v6()),
    ] {
        let data = fields(text).expect("it was an object")(name);
        let data = data.and_then(|data| {
            fields(&data.to_string()).map(|field| {
                let key = field("publickey").and_then(|key| decode_key(key.as_str()?).ok());
                let port = field("port")
                    .and_then(|port| port.as_u64())
                    .unwrap_or_default();
                (key, u16::try_from(port).unwrap_or_default())
            })
        });
        let expected = data.and_then(|(key, port)| Some((PublicKey(key?), port)));
        let expected = expected.filter(|_| is_wireguard);
        assert_eq!(read.map(|it| (it.public_key, it.port)), expected);
    }
    assert!(record.public_keys().count() <= 2);
    assert!(is_wireguard || !matches!(record.end(), Some(TunnelEnd::Key(_))));
}

/// A configuration and a record with a newline between them: the peers of a dual lease, if there are some.
fn peer(text: &str) {
    let (config, record) = text.split_once('\n').unwrap_or((text, ""));
    let (Ok(config), Ok(record)) = (NetworkConfig::parse(config), LeaseRecord::parse(record))
    else {
        return;
    };
    let Backend::WireGuard(options) = &config.backend else {
        return;
    };
    let ipv4 = config.subnets().next();
    let ipv6 = config
        .ipv6
        .and_then(|range| Ipv6Net::new(range.subnet_min, range.subnet_len).ok());
    let Some(key) = SubnetKey::of(ipv4, ipv6) else {
        return;
    };
    let addresses = "192.168.0.1,2001:db8::1".parse().expect("these are two");
    let here = Here {
        public_key: Some(PublicKey([1; 32])),
        addresses: Some(addresses),
    };
    let halves = [
        peer_of_lease(PeerId(1), key, &record, &config, &here),
        peer_of_ipv6(PeerId(2), key, &record, &config, &here),
    ];
    let mut endpoints = Vec::new();
    for (peer, is_ipv6) in halves.into_iter().zip([false, true]) {
        let Ok(peer) = peer else {
            continue;
        };
        let end = peer.wireguard.expect("its network needs that");
        assert!(record.public_keys().any(|key| key == end.public_key));
        assert_ne!(Some(end.public_key), here.public_key);
        assert_eq!(
            (peer.address.is_ipv6(), peer.subnet.addr().is_ipv6()),
            (is_ipv6, is_ipv6)
        );
        let by_ipv6 = match options.mode {
            WireGuardMode::Separate => Some(is_ipv6),
            WireGuardMode::Ipv4 => Some(false),
            WireGuardMode::Ipv6 => Some(true),
            WireGuardMode::Auto => None,
        };
        assert!(by_ipv6.is_none_or(|by_ipv6| by_ipv6 == end.endpoint.is_ipv6()));
        assert!(end.endpoint.port() != 0);
        let networks = config.networks();
        let mut networks = networks.iter::<ipnet::IpNet>();
        assert!(!networks.any(|network| network.contains(&end.endpoint.ip())));
        endpoints.push(end.endpoint);
    }
    if let ([one, other], true) = (&endpoints[..], options.mode.is_single()) {
        assert_eq!(one, other);
    }
}

/// The fields of a JSON object by their names in lower case, the last of a name.
fn fields(text: &str) -> Option<impl Fn(&str) -> Option<Value>> {
    let Ok(Value::Object(object)) = serde_json::from_str(text) else {
        return None;
    };
    Some(move |name: &str| {
        let mut same = object
            .iter()
            .filter(|(key, _)| key.to_ascii_lowercase() == name);
        same.next_back().map(|(_, value)| value.clone())
    })
}

/// Whether flannel's nodes would take it: an address that is one, a type that is text. Only a word is
/// taken here, which people see in tables.
fn is_record(text: &str) -> bool {
    let Some(field) = fields(text) else {
        return false;
    };
    let is_ipv4 = |value: Value| {
        value
            .as_str()
            .is_some_and(|text| text.parse::<Ipv4Addr>().is_ok())
    };
    let is_ipv6 = |value: Value| {
        value
            .as_str()
            .is_some_and(|text| text.parse::<Ipv6Addr>().is_ok())
    };
    let is_word = |value: Value| {
        let printable = |text: &str| text.chars().all(|it| ('!'..='~').contains(&it));
        value
            .as_str()
            .is_some_and(|text| text.len() <= 64 && printable(text))
    };
    field("publicip").is_none_or(is_ipv4)
        && field("publicipv6").is_none_or(|value| value.is_null() || is_ipv6(value))
        && field("backendtype").is_none_or(|value| value.is_null() || is_word(value))
}

fn config(text: &str) {
    let Ok(config) = NetworkConfig::parse(text) else {
        return;
    };
    check_config(&config);
    let field = fields(text).expect("it was an object");
    let is_on = |value: Option<Value>| value.and_then(|value| value.as_bool());
    assert_eq!(
        config.enable_ipv4,
        is_on(field("enableipv4")) != Some(false)
    );
    assert_eq!(
        config.ipv6.is_some(),
        is_on(field("enableipv6")) == Some(true)
    );
    if !config.enable_ipv4 {
        return;
    }
    let network = field("network").expect("it has one");
    let network: Ipv4Net = network
        .as_str()
        .expect("it is text")
        .parse()
        .expect("it is a subnet");
    assert_eq!(config.network, network.trunc());
    if let Some(len) = field("subnetlen")
        .and_then(|len| len.as_u64())
        .filter(|len| *len > 0)
    {
        assert_eq!(u64::from(config.subnet_len), len);
    }
}

fn check_config(config: &NetworkConfig) {
    if let Some(psk) = config.backend.psk() {
        let shown = format!("{config} {config:?}");
        assert!(!shown.contains(psk.to_text().as_str()), "{shown}");
    }
    assert_eq!(NetworkConfig::parse(&config.to_json()).as_ref(), Ok(config));
    if let Some(range) = &config.ipv6 {
        check_range(range);
        let carries_ipv6 = !matches!(config.backend, Backend::Udp { .. } | Backend::Ipip { .. });
        assert!(carries_ipv6);
    }
    if !config.enable_ipv4 {
        assert!(config.ipv6.is_some() && config.subnets().next().is_none());
        return;
    }
    assert!(config.subnet_len >= config.network.prefix_len() + 2 && config.subnet_len <= 30);
    assert!(config.subnet_min <= config.subnet_max);
    let mut subnets = config.subnets();
    let first = subnets.next().expect("there is one");
    assert_eq!(first.network(), config.subnet_min);
    for subnet in [first].into_iter().chain(subnets.take(3)) {
        assert!(config.allows(subnet) && config.network.contains(&subnet));
        assert_eq!(subnet, subnet.trunc());
    }
}

fn check_range(range: &Ipv6Range) {
    assert!(range.subnet_len >= range.network.prefix_len() + 2 && range.subnet_len <= 126);
    assert!(range.subnet_min <= range.subnet_max);
    for base in [range.subnet_min, range.subnet_max] {
        let subnet = Ipv6Net::new(base, range.subnet_len).expect("it is below 127");
        assert!(range.allows(subnet) && range.network.contains(&subnet));
        assert_eq!(subnet, subnet.trunc());
    }
}

fn key(text: &str) {
    let Ok(key) = text.parse::<SubnetKey>() else {
        return;
    };
    let printed = key.to_string();
    assert_eq!(printed.parse(), Ok(key));
    let mut parts = text.split('&');
    let ipv4 = parts.next().and_then(plain_subnet::<Ipv4Net>);
    let ipv4 = ipv4.map(|net| net.trunc());
    let ipv6 = parts.next().map(plain_subnet::<Ipv6Net>);
    // All of IPv4 stands for none.
    let is_alone = ipv6.is_some() && ipv4 == Some(Ipv4Net::default());
    assert_eq!(key.ipv4(), ipv4.filter(|_| !is_alone));
    assert_eq!(
        key.ipv6().map(Some),
        ipv6.map(|net| net.map(|net| net.trunc()))
    );
    let first = key.ipv4().map(Into::into);
    assert_eq!(
        key.first(),
        first.unwrap_or_else(|| key.ipv6().expect("it has one").into())
    );
    assert!(key.overlaps(&key));
    assert_eq!(parts.next(), None);
}

/// A part of a key with a slash, as others write subnets.
fn plain_subnet<N: FromStr>(part: &str) -> Option<N> {
    let (address, len) = part.split_once('-')?;
    // flannel's nodes read zeros in front of a number.
    let len: u8 = len.parse().ok()?;
    format!("{address}/{len}").parse().ok()
}

/// A key and a value with a newline between them.
fn entry(text: &str) {
    let (key, value) = text.split_once('\n').unwrap_or((text, ""));
    let entry = Entry {
        key: key.to_owned(),
        value: value.to_owned(),
        revision: 1,
        created: 0,
        ttl: None,
    };
    let name = key
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_prefix("/subnets/"));
    // Only what is printed so is the name of a subnet.
    let subnet = name.and_then(|name| {
        let key: SubnetKey = name.parse().ok()?;
        (key.to_string() == name).then_some(key)
    });
    let read = read_entry(PREFIX, &entry);
    let expected = subnet.and_then(|subnet| Some((subnet, LeaseRecord::parse(value).ok()?)));
    match (&read, expected) {
        (Ok(read), expected) => assert_eq!(Some(read), expected.as_ref()),
        (Err(none), expected) => {
            assert_eq!(expected, None);
            assert_eq!(none.subnet, subnet);
            assert!(none.reason.chars().count() < 300, "{}", none.reason);
        }
    }
    let network = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);
    let backend = Backend::Udp { port: 8285 };
    let config = NetworkConfig::new(network, Some(24), backend).expect("it has subnets");
    // All of the network but its first subnet.
    let can_be_leased = |subnet: Ipv4Net| {
        subnet.prefix_len() == 24
            && network.contains(&subnet)
            && subnet.network() != network.network()
    };
    if let Ok((key, record)) = &read {
        let range = Ipv6Range::new("fd00:1::/48".parse().expect("it is one"), None);
        let dual = NetworkConfig::new(network, Some(24), Backend::HostGw)
            .and_then(|config| config.with_ipv6(range?))
            .expect("it has subnets");
        let is_good = ipv6_fault(*key, record, Some(&dual)).is_none();
        let range = dual.ipv6.expect("it has one");
        let is_leased = key.ipv6().is_some_and(|subnet| range.allows(subnet));
        assert_eq!(
            is_good,
            is_leased && record.public_ipv6.is_some_and(is_public_ipv6)
        );
        let is_peer = read_peer(PREFIX, &entry, Some(&dual)).is_ok();
        assert!(!is_peer || is_good || key.ipv4().is_some_and(can_be_leased));
    }
    let peer = read_peer(PREFIX, &entry, Some(&config));
    match (peer, read) {
        (Ok(peer), read) => {
            assert!(peer.0.ipv4().is_some_and(can_be_leased));
            assert!(
                ipv6_fault(peer.0, &peer.1, Some(&config)).is_some(),
                "it has none"
            );
            assert_eq!(Ok(peer), read);
        }
        (Err(_), Err(_)) => {}
        (Err(_), Ok((key, record))) => {
            let ip = record.public_ip;
            let nobody = ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast();
            assert!(nobody || !key.ipv4().is_some_and(can_be_leased));
        }
    }
}

fn made_record(bytes: &[u8]) {
    let Some(&[vxlan, a, b, c, d, v0, v1, v2, mac @ ..]) = bytes.first_chunk::<14>() else {
        return;
    };
    let ip = Ipv4Addr::new(a, b, c, d);
    let (vni, mac) = (
        u32::from_be_bytes([0, v0, v1, v2]),
        VtepMac::from_random(mac),
    );
    let record = if vxlan % 2 == 0 {
        LeaseRecord::vxlan(ip, Vni::new(vni).expect("it has 24 bits"), mac)
    } else {
        LeaseRecord::udp(ip)
    };
    let read = LeaseRecord::parse(&record.to_json());
    assert_eq!(read.as_ref(), Ok(&record));
    assert_eq!(record.vtep_mac(), (vxlan % 2 == 0).then_some(mac));
    assert_eq!(record.public_ip, ip);
    let ipv6 = Ipv6Addr::from([
        0xfd00,
        u16::from(a),
        u16::from(b),
        0,
        0,
        0,
        u16::from(c),
        d.into(),
    ]);
    let backend = match vxlan % 2 == 0 {
        true => Backend::Vxlan(VxlanOptions::default()),
        false => Backend::HostGw,
    };
    let dual = LeaseRecord::of(&backend, ip, mac).with_ipv6(&backend, ipv6, mac);
    for record in [dual.clone(), dual.without_ipv4()] {
        assert!(record.carries_ipv6());
        let read = LeaseRecord::parse(&record.to_json());
        assert_eq!(read.as_ref(), Ok(&record));
        assert_eq!(record.vtep_mac_v6(), (vxlan % 2 == 0).then_some(mac));
        assert_eq!(record.addresses().ipv6(), Some(ipv6));
    }
}

/// Whether a network has neither the unspecified address, nor the loopback's, nor an IPv4-mapped, link-local or
/// multicast one (RFC 4291 section 2.4).
fn is_fit_for_pods(network: Ipv6Net) -> bool {
    let network = network.trunc();
    let (first, last) = (network.network(), network.broadcast());
    let unfit = [
        ("::", "::1"),
        ("::ffff:0.0.0.0", "::ffff:255.255.255.255"),
        ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ];
    unfit.iter().all(|(from, to)| {
        let [from, to] = [from, to].map(|ip| Ipv6Addr::from_str(ip).expect("it is an address"));
        last < from || to < first
    })
}

/// A network of IPv6 and the length of its subnets.
fn made_range(bytes: &[u8]) {
    let Some((&[len, subnet_len], address)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    let Some(address) = address.first_chunk::<16>() else {
        return;
    };
    let network = Ipv6Net::new(Ipv6Addr::from(*address), len % 129).expect("it is at most 128");
    let subnet_len = (subnet_len > 0).then_some(subnet_len % 129);
    let least = network.prefix_len() + 2;
    let range = Ipv6Range::new(network, subnet_len);
    let is_possible =
        is_fit_for_pods(network) && (least..=126).contains(&subnet_len.unwrap_or(least));
    assert_eq!(range.is_ok(), is_possible, "{network} {subnet_len:?}");
    if let Ok(range) = range {
        check_range(&range);
        assert_eq!(range.subnet_len, subnet_len.unwrap_or(least.max(64)));
        let config = NetworkConfig::ipv6_only(range, Backend::HostGw);
        check_config(&config.expect("host-gw carries IPv6"));
    }
}

fn made_config(bytes: &[u8]) {
    let Some(&[choices, len, subnet_len, a, b, c, d, v, p0, p1]) = bytes.first_chunk::<10>() else {
        return;
    };
    let port = u16::from_be_bytes([p0, p1]).max(1);
    let backend = if choices & 1 == 0 {
        Backend::Udp { port }
    } else {
        let mut options = VxlanOptions::default();
        // Zero stands for the default.
        options.vni = Vni::new(u32::from(v.max(1))).expect("it is small");
        options.port = port;
        options.direct_routing = choices & 2 != 0;
        options.learning = choices & 4 != 0;
        options.gbp = choices & 8 != 0;
        Backend::Vxlan(options)
    };
    let network = Ipv4Net::new(Ipv4Addr::new(a, b, c, d), len % 33).expect("it is at most 32");
    let subnet_len = (subnet_len > 0).then_some(subnet_len % 33);
    let least = network.prefix_len() + 2;
    let config = NetworkConfig::new(network, subnet_len, backend);
    // Four subnets or more, and two pods or more in each.
    let is_possible = (least..=30).contains(&subnet_len.unwrap_or(least));
    assert_eq!(config.is_ok(), is_possible, "{network} {subnet_len:?}");
    if let Ok(config) = config {
        check_config(&config);
        let expected = subnet_len.unwrap_or(least.max(24));
        assert_eq!(config.subnet_len, expected);
    }
}

/// A network of WireGuard, and a node's record in it.
fn made_wireguard(bytes: &[u8]) {
    let Some((&[mode, choices, p0, p1, p2, p3, keepalive], key)) = bytes.split_first_chunk::<7>()
    else {
        return;
    };
    let Some(key) = key.first_chunk::<32>() else {
        return;
    };
    let mut options = WireGuardOptions::default();
    options.mode = WireGuardMode::ALL[usize::from(mode) % 4];
    options.listen_port = u16::from_be_bytes([p0, p1]).max(1);
    options.listen_port_v6 = u16::from_be_bytes([p2, p3]).max(1);
    options.keepalive = keepalive.into();
    options.psk = (choices & 1 != 0).then(|| Secret::from(*key));
    options.mtu = (choices & 2 != 0).then_some(Mtu::ETHERNET);
    let (port, mode) = (options.listen_port, options.mode);
    let port_v6 = if mode.is_single() {
        port
    } else {
        options.listen_port_v6
    };
    let backend = Backend::WireGuard(options);
    let network = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);
    let range = Ipv6Range::new("fd00:1::/48".parse().expect("it is one"), None).expect("it fits");
    let plain = NetworkConfig::new(network, None, backend.clone()).expect("it has subnets");
    assert_eq!(
        plain.clone().without_ipv6().is_ok(),
        mode != WireGuardMode::Ipv6
    );
    check_config(&plain.with_ipv6(range).expect("it carries IPv6"));
    let alone = NetworkConfig::ipv6_only(range, backend.clone());
    assert_eq!(alone.is_ok(), mode != WireGuardMode::Ipv4);

    let (key, ip) = (PublicKey(*key), Ipv4Addr::new(192, 168, 0, 3));
    let ipv6 = Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 3);
    let dual = LeaseRecord::of(&backend, ip, key).with_ipv6(&backend, ipv6, key);
    for record in [dual.clone(), dual.clone().without_ipv4()] {
        assert!(record.carries_ipv6());
        assert_eq!(LeaseRecord::parse(&record.to_json()).as_ref(), Ok(&record));
        let data = record.wireguard_v6().expect("it was written");
        assert_eq!((data.public_key, data.port), (key, port_v6));
        assert_eq!(record.end(), Some(TunnelEnd::Key(key)));
    }
    assert_eq!(dual.wireguard().map(|data| data.port), Some(port));
}

fn seeds() -> Vec<Seed> {
    let with = |choice: u8, text: &str| [&[choice], text.as_bytes()].concat();
    let vxlan = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
    let udp = r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#;
    let dual = r#"{"PublicIP":"1.1.1.1","PublicIPv6":"fd00::3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":""},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}}"#;
    let whole = r#"{"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0","Backend":{"Type":"UDP","Port":7890}}"#;
    let switches = r#"{"network":"10.5.0.0/16","EnableIPv4":true,"Backend":{"Type":"vxlan","VNI":7,"MTU":1400,"DirectRouting":true,"GBP":true}}"#;
    let wireguard = r#"{"PublicIP":"192.168.0.3","PublicIPv6":"fd01::3","BackendType":"wireguard","BackendData":{"PublicKey":"mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc=","Port":51820},"BackendV6Data":{"PublicKey":"mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc=","Port":51821}}"#;
    let wireguards = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"wireguard","Mode":"separate","PSK":"4HAXZFAg2aqXKxI1GMXTEDKcNJeuMEJRr8rjFO8XmEY="}}"#;
    let auto = wireguards.replace("separate", "auto");
    let entry = |key: &str, value: &str| with(ENTRY, &format!("{PREFIX}/subnets/{key}\n{value}"));
    vec![
        ("entry-whole-network", entry("10.244.0.0-16", udp)),
        ("entry-part-of-a-subnet", entry("10.244.7.128-25", udp)),
        ("entry-first-subnet", entry("10.244.0.0-24", udp)),
        (
            "entry-dual",
            entry(
                "10.244.7.0-24&fd00:1:0:7::-64",
                r#"{"PublicIP":"1.2.3.4","PublicIPv6":"fd01::4","BackendType":"host-gw"}"#,
            ),
        ),
        (
            "entry-ipv6-alone",
            entry(
                "0.0.0.0-0&fd00:1:0:7::-64",
                r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd01::4","BackendType":"host-gw"}"#,
            ),
        ),
        ("key-ipv6-alone", with(KEY, "0.0.0.0-0&fd00:1:2:3::-64")),
        (
            "config-dual",
            with(
                CONFIG,
                r#"{"Network":"10.42.0.0/16","IPv6Network":"2001:cafe:42::/56","EnableIPv6":true,"IPv6SubnetMin":"2001:cafe:42:8::","IPv6SubnetMax":"2001:cafe:42:9::","Backend":{"Type":"vxlan"}}"#,
            ),
        ),
        (
            "config-ipv6-alone",
            with(
                CONFIG,
                r#"{"enableIPv6":true,"ipv6Network":"fc00::/48","enableIPv4":false,"Backend":{"Type":"host-gw"}}"#,
            ),
        ),
        (
            "made-range",
            vec![
                MADE_RANGE, 48, 0, 0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ],
        ),
        (
            "made-range-smallest",
            vec![
                MADE_RANGE, 124, 0, 0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ],
        ),
        (
            "made-range-highest",
            vec![
                MADE_RANGE, 0, 64, 0xff, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
                255, 255, 255, 255,
            ],
        ),
        ("record-wireguard", with(RECORD, wireguard)),
        ("config-wireguard", with(CONFIG, wireguards)),
        (
            "peer-separate",
            with(PEER, &format!("{wireguards}\n{wireguard}")),
        ),
        ("peer-auto", with(PEER, &format!("{auto}\n{wireguard}"))),
        (
            "made-wireguard",
            [
                &[MADE_WIREGUARD, 1, 3, 0xca, 0x6c, 0xca, 0x6d, 25][..],
                &[7; 32],
            ]
            .concat(),
        ),
        ("record-vxlan", with(RECORD, vxlan)),
        ("record-udp", with(RECORD, udp)),
        ("record-dual-stack", with(RECORD, dual)),
        (
            "record-lower-case",
            with(
                RECORD,
                r#"{"publicip":"10.0.0.1","BACKENDTYPE":"host-gw","New":[1]}"#,
            ),
        ),
        ("record-empty", with(RECORD, "{}")),
        ("config-least", with(CONFIG, r#"{"Network":"10.3.0.0/26"}"#)),
        ("config-whole", with(CONFIG, whole)),
        ("config-switches", with(CONFIG, switches)),
        (
            "config-other",
            with(
                CONFIG,
                r#"{"Network":"10.3.0.0/16","Backend":{"Type":"host-gw"}}"#,
            ),
        ),
        ("key", with(KEY, "10.12.13.0-24")),
        ("key-dual-stack", with(KEY, "10.12.13.0-24&fd00:12:13::-56")),
        ("entry", entry("10.244.7.0-24", vxlan)),
        ("entry-elsewhere", entry("10.12.13.0-24", udp)),
        ("entry-not-canonical", entry("10.244.7.1-24", udp)),
        (
            "made-vxlan",
            vec![MADE_RECORD, 0, 192, 168, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7],
        ),
        (
            "made-udp",
            vec![MADE_RECORD, 1, 192, 168, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            "made-config",
            vec![MADE_CONFIG, 3, 16, 24, 10, 244, 0, 0, 1, 0x21, 0x18],
        ),
        (
            "made-config-udp",
            vec![MADE_CONFIG, 0, 26, 0, 10, 3, 0, 0, 0, 0x20, 0x5d],
        ),
        (
            "made-config-smallest",
            vec![MADE_CONFIG, 0, 28, 0, 10, 3, 0, 0, 0, 0x20, 0x5d],
        ),
        (
            "made-config-too-small",
            vec![MADE_CONFIG, 0, 29, 0, 10, 3, 0, 0, 0, 0x20, 0x5d],
        ),
        (
            "made-config-smallest-subnets",
            vec![MADE_CONFIG, 0, 24, 30, 10, 3, 0, 0, 0, 0x20, 0x5d],
        ),
    ]
}
