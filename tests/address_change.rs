//! A node whose machine gets another address takes its lease, its subnet and its pods' connections
//! along.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod lab;

use std::net::{Ipv4Addr, SocketAddrV4};

use lab::{Lab, NodeConfig, SOON, poll_until};

#[test]
fn connections_outlive_a_change_of_the_public_address() {
    let Some(lab) = Lab::new() else { return };
    let store = format!("sqlite:{}", lab.directory().join("leases.db").display());
    let start = |name: &str, last: u8| {
        let address = Ipv4Addr::new(10, 9, 0, last);
        let host = lab.host(name, address);
        // One follows its interface, the other has its address fixed.
        let config = match last {
            1 => NodeConfig::on_interface(name, "eth0", &store),
            _ => NodeConfig::new(name, address, &store),
        };
        config.with("--mtu", 1500).start(&host)
    };
    let (moving, fixed) = (start("n1", 1), start("n2", 2));
    moving.wait_peers(1);
    fixed.wait_peers(1);
    let (mut here, mut there) = (moving.pod("a"), fixed.pod("b"));
    let port = there.listen(0).unwrap();
    let to = SocketAddrV4::new(there.address("eth0").unwrap(), port);
    let connection = here.open(to).unwrap();
    assert!(here.exchange(connection, 100_000, 1).unwrap().intact);
    let (subnet, mac) = (moving.status("subnet"), moving.status("vtep_mac"));

    moving
        .host()
        .sh("ip addr del 10.9.0.1/24 dev eth0; ip addr add 10.9.0.77/24 dev eth0");
    poll_until(SOON, "the peer's news of the new address", || {
        let peers = fixed.query("peers");
        (peers[0]["public_ip"] == "10.9.0.77").then_some(())
    });
    assert!(here.exchange(connection, 100_000, 2).unwrap().intact);
    let now = (moving.status("subnet"), moving.status("vtep_mac"));
    assert_eq!(now, (subnet, mac));
    assert_eq!(moving.status("public_ip"), "10.9.0.77");
    assert_eq!(
        fixed.query("peers").as_array().unwrap().len(),
        1,
        "no second lease"
    );
    assert_eq!(fixed.query("leases").as_array().unwrap().len(), 2);
}
