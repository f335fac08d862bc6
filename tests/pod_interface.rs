//! What a pod's interface has of both IP versions, as the kernel shows it: all of it at once, and nothing
//! that others announce.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::process::Command;

use muslin::device::Tap;
use muslin::netns::{Assignment, configure, set_link};
use muslin_lab::inside;
use muslin_stack::api::control::Link;
use serde_json::Value;

const NAME: &str = "eth0";

fn assignment(address: &str) -> Assignment {
    let link = Link {
        mtu: 1450,
        mtu_v6: Some(1430),
        gso_max_segs: 40,
    };
    let routes = ["10.244.0.0/16", "0.0.0.0/0", "::/0"].map(|route| route.parse().unwrap());
    Assignment {
        address: address.parse().unwrap(),
        gateway: "10.244.1.1,fd00:1::1".parse().unwrap(),
        link,
        routes: routes.to_vec(),
    }
}

fn wait<T>(future: impl Future<Output = muslin::error::Result<T>>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().unwrap();
    runtime.block_on(future).unwrap()
}

fn ip(words: &[&str]) -> Value {
    let output = Command::new("ip").arg("-j").args(words).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The addresses with their flags.
fn addresses() -> Vec<(IpAddr, u64, Value)> {
    let all = ip(&["addr", "show", "dev", NAME]);
    let infos = all[0]["addr_info"].as_array().unwrap();
    let each = infos.iter().map(|info| {
        let address = info["local"].as_str().unwrap().parse().unwrap();
        (address, info["prefixlen"].as_u64().unwrap(), info.clone())
    });
    each.collect()
}

fn route(family: &str, to: &str) -> Value {
    let all = ip(&[family, "route", "show", to, "dev", NAME]);
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0].clone()
}

/// The MTU of a route; `ip` puts it among the metrics.
fn mtu(route: &Value) -> Option<u64> {
    route["metrics"][0]["mtu"].as_u64()
}

#[test]
fn all_addresses_can_be_used_at_once() {
    if !inside::enter() {
        return;
    }
    // As in a pod whose image switches it off.
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    let taps = Tap::create(NAME, true, 1).unwrap();
    wait(configure(NAME, &assignment("10.244.1.2/24,fd00:1::2/64")));
    let all = addresses();
    for (address, _, info) in &all {
        assert!(info["tentative"].is_null(), "{info}");
        assert!(info["dadfailed"].is_null(), "{info}");
        let to = match address {
            IpAddr::V6(link) if link.is_unicast_link_local() => {
                let index = ip(&["link", "show", "dev", NAME])[0]["ifindex"].as_u64();
                SocketAddrV6::new(*link, 0, 0, index.unwrap() as u32).into()
            }
            address => SocketAddr::new(*address, 0),
        };
        UdpSocket::bind(to).unwrap();
    }
    let given: Vec<_> = all
        .iter()
        .map(|(ip, len, _)| format!("{ip}/{len}"))
        .collect();
    assert!(given.contains(&"10.244.1.2/24".to_owned()), "{given:?}");
    assert!(given.contains(&"fd00:1::2/64".to_owned()), "{given:?}");
    assert_eq!(given.len(), 3, "and a link-local one: {given:?}");
    for (setting, value) in [
        ("accept_ra", "0"),
        ("autoconf", "0"),
        ("accept_redirects", "0"),
        ("disable_ipv6", "0"),
    ] {
        let path = format!("/proc/sys/net/ipv6/conf/{NAME}/{setting}");
        assert_eq!(fs::read_to_string(path).unwrap().trim(), value, "{setting}");
    }

    let (ipv4, ipv6) = (route("-4", "default"), route("-6", "default"));
    assert_eq!((&ipv4["gateway"], mtu(&ipv4)), (&"10.244.1.1".into(), None));
    assert_eq!(
        (&ipv6["gateway"], mtu(&ipv6)),
        (&"fd00:1::1".into(), Some(1430))
    );
    assert_eq!(mtu(&route("-6", "fd00:1::/64")), None, "pods of the node");

    // The underlay's interface has another MTU now.
    let mut changed = assignment("10.244.1.2/24,fd00:1::2/64");
    (changed.link.mtu, changed.link.mtu_v6) = (1350, Some(1330));
    wait(set_link(NAME, &changed));
    assert_eq!(mtu(&route("-6", "default")), Some(1330));
    assert_eq!(ip(&["link", "show", "dev", NAME])[0]["mtu"], 1350);

    // The node has another lease.
    let mut moved = assignment("10.244.9.2/24,fd00:9::2/64");
    moved.gateway = "10.244.9.1,fd00:9::1".parse().unwrap();
    wait(configure(NAME, &moved));
    let now = addresses();
    let now: Vec<_> = now.iter().map(|(ip, ..)| ip.to_string()).collect();
    assert!(now.iter().all(|it| !it.starts_with("fd00:1:")), "{now:?}");
    assert!(now.contains(&"fd00:9::2".to_owned()), "{now:?}");
    assert_eq!(now.len(), 3, "{now:?}");
    assert_eq!(route("-6", "default")["gateway"], "fd00:9::1");
    drop(taps);
}

#[test]
fn an_interface_of_one_ip_version_has_that_alone() {
    if !inside::enter() {
        return;
    }
    let taps = Tap::create(NAME, true, 1).unwrap();
    let mut only = assignment("fd00:1::2/64");
    only.gateway = "fd00:1::1".parse().unwrap();
    wait(configure(NAME, &only));
    let has_ipv4 = addresses().iter().any(|(ip, ..)| ip.is_ipv4());
    assert!(!has_ipv4);
    assert_eq!(route("-6", "default")["gateway"], "fd00:1::1");
    assert_eq!(ip(&["-4", "route"]).as_array().unwrap().len(), 0);
    drop(taps);
}

#[test]
fn without_ipv6_in_the_kernel_a_pod_has_its_ipv4_address() {
    if !inside::enter() {
        return;
    }
    inside::sh("mount -t tmpfs none /proc/sys/net/ipv6");
    let taps = Tap::create(NAME, true, 1).unwrap();
    let both = assignment("10.244.1.2/24,fd00:1::2/64");
    wait(configure(NAME, &both));
    let has = |all: &[(IpAddr, u64, Value)], address: &str| {
        all.iter().any(|(ip, ..)| ip.to_string() == address)
    };
    let all = addresses();
    assert!(
        has(&all, "10.244.1.2") && !has(&all, "fd00:1::2"),
        "{all:?}"
    );
    wait(set_link(NAME, &both));
    let only = assignment("fd00:1::2/64");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let refused = runtime.unwrap().block_on(configure(NAME, &only));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("kernel has no IPv6"), "{refused}");
    drop(taps);
}
