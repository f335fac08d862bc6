//! A two-port switch: frames go in, and each verdict says which port they leave by. The ports are
//! unguarded, so that the switch learns MAC addresses from what it hears, as a bridge does.
//!
//! ```text
//! cargo run -p muslin-stack --example switch
//! ```

use std::error::Error;

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::mtu::Mtu;
use muslin_stack::addresses::Nets;
use muslin_stack::datapath::node::{Node, NodeConfig, Verdict};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::{EthernetAddress, Instant};

const LEFT: PortId = PortId(1);
const RIGHT: PortId = PortId(2);
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 1, 2]];

fn main() -> Result<(), Box<dyn Error>> {
    let (subnet, mac) = (
        "10.244.1.0/24".parse::<Nets>()?,
        EthernetAddress([2, 0, 0, 0, 0, 1]),
    );
    let config = NodeConfig::new(subnet, mac, Tunnel::None, Mtu::ETHERNET, 7);
    let mut switch = Node::new(config, Instant::ZERO)?;
    for (port, mac) in [LEFT, RIGHT].into_iter().zip(MACS) {
        let attachment = Attachment::new(EthernetAddress(mac), Vec::new());
        switch.attach(port, attachment.unguarded());
    }
    let (left, right) = (MACS[0], MACS[1]);
    // A guest behind the right port, whose MAC address nobody has been told of.
    let guest = [2, 0, 0, 0, 1, 9];
    let flood = |port| Verdict::Flood { except: Some(port) };
    for (port, from, to, expected) in [
        (LEFT, left, right, Verdict::Port(RIGHT)),
        (LEFT, left, guest, flood(LEFT)),
        (RIGHT, guest, left, Verdict::Port(LEFT)),
        (LEFT, left, guest, Verdict::Port(RIGHT)),
        (RIGHT, right, [0xff; 6], flood(RIGHT)),
    ] {
        let frame = [&[0; HEADROOM][..], &to, &from, &[0x88, 0xb5], b"hello"].concat();
        let (mut storage, len) = (frame, 6 + 6 + 2 + 5);
        let mut packet = PacketBuf::new(&mut storage, HEADROOM, len)?;
        let verdict = switch.from_port(Instant::ZERO, port, &mut packet);
        println!("{port}: {from:02x?} to {to:02x?}: {verdict:?}");
        assert_eq!(verdict, expected);
    }
    let counters = switch.counters();
    assert_eq!((counters.received, counters.came()), (5, counters.went()));
    Ok(())
}
