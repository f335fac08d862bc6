//! The kernel's filter on a packet socket: classic BPF (Linux, Documentation/networking/filter.rst)
//! that passes our frames and nothing else, so that no thread wakes up for the LAN's other traffic.

use ipnet::Ipv4Net;
use nix::libc;

use crate::underlay::bpf::{self, NOTHING, ancillary, statement};

/// Where things are in an Ethernet frame without a VLAN tag.
mod offset {
    pub(super) const ETHERTYPE: u32 = 12;
    pub(super) const IPV4_DESTINATION: u32 = 14 + 16;
}

/// What a program returns if the whole frame passes.
const WHOLE: u32 = u32::MAX;

/// A program that lets pass what is sent to this host and is IPv4 for `subnet` or ARP, which may be a
/// broadcast too.
///
/// Frames of VLANs belong to other interfaces; VLAN 0 is none (IEEE 802.1Q: a tag for its priority).
pub(super) fn program(subnet: Ipv4Net) -> Vec<libc::sock_filter> {
    let network = [
        load(libc::BPF_W, offset::IPV4_DESTINATION),
        alu(libc::BPF_AND, subnet.netmask().into()),
        Step::Require(subnet.network().into()),
    ];
    let to_us = [
        load(libc::BPF_W, ancillary(libc::SKF_AD_PKTTYPE)),
        Step::Require(libc::PACKET_HOST.into()),
    ];
    let to_us_or_all = [
        load(libc::BPF_W, ancillary(libc::SKF_AD_PKTTYPE)),
        // The two numbers differ in the last bit.
        alu(libc::BPF_AND, !u32::from(libc::PACKET_BROADCAST)),
        Step::Require(libc::PACKET_HOST.into()),
    ];
    let ipv4 = of_type(libc::ETH_P_IP);
    let arp = of_type(libc::ETH_P_ARP);
    let mut program = rule(&[&of_no_vlan()[..], &ipv4, &to_us, &network].concat());
    program.extend(rule(&[&of_no_vlan()[..], &arp, &to_us_or_all].concat()));
    program.push(NOTHING);
    program
}

/// A step of a rule.
#[derive(Debug, Clone, Copy)]
enum Step {
    Do(libc::sock_filter),
    /// The rule applies only if the accumulator has this value.
    Require(u32),
}

/// Lets a frame pass of which all that is required is true; what comes next decides of others.
fn rule(steps: &[Step]) -> Vec<libc::sock_filter> {
    let compiled = steps.iter().enumerate().map(|(index, step)| match *step {
        Step::Do(instruction) => instruction,
        Step::Require(value) => libc::sock_filter {
            // A rule has far fewer than 255 steps.
            jf: (steps.len() - index) as u8,
            ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value)
        },
    });
    let pass = statement(libc::BPF_RET, WHOLE);
    compiled.chain([pass]).collect()
}

fn of_type(ethertype: libc::c_int) -> [Step; 2] {
    let ethertype = ethertype.cast_unsigned();
    [
        load(libc::BPF_H, offset::ETHERTYPE),
        Step::Require(ethertype),
    ]
}

/// The kernel takes the tag out of a frame and keeps it beside. Where there is none, what it keeps
/// may be anything.
fn of_no_vlan() -> [Step; 6] {
    [
        load(libc::BPF_W, ancillary(libc::SKF_AD_VLAN_TAG_PRESENT)),
        x_from_a(),
        load(libc::BPF_W, ancillary(libc::SKF_AD_VLAN_TAG)),
        alu(libc::BPF_AND, 0xfff),
        alu_x(libc::BPF_MUL),
        Step::Require(0),
    ]
}

const fn load(size: u32, offset: u32) -> Step {
    Step::Do(bpf::load(size, offset))
}

const fn alu(operation: u32, operand: u32) -> Step {
    Step::Do(bpf::alu(operation, operand))
}

const fn alu_x(operation: u32) -> Step {
    Step::Do(bpf::alu_x(operation))
}

const fn x_from_a() -> Step {
    Step::Do(bpf::x_from_a())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// A frame and what the kernel knows of it.
    #[derive(Debug, Clone)]
    struct Frame {
        bytes: Vec<u8>,
        packet_type: u8,
        tag: Option<u16>,
    }

    fn frame(ethertype: u16, source: Ipv4Addr, destination: Ipv4Addr) -> Frame {
        let mut bytes = vec![7; 12];
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend([0x45; 12]);
        bytes.extend(source.octets());
        bytes.extend(destination.octets());
        Frame {
            bytes,
            packet_type: libc::PACKET_HOST,
            tag: None,
        }
    }

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    fn to(destination: &str) -> Frame {
        frame(0x0800, ip("10.244.2.3"), ip(destination))
    }

    fn arp() -> Frame {
        frame(0x0806, ip("1.2.3.4"), ip("5.6.7.8"))
    }

    /// Runs the instructions that are used here, as the kernel would.
    fn passes(program: &[libc::sock_filter], frame: &Frame) -> bool {
        const LOAD_WORD: u16 = 0x20;
        const LOAD_HALF: u16 = 0x28;
        let (mut a, mut x, mut at) = (0u32, 0u32, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                LOAD_WORD | LOAD_HALF => {
                    let question = k.wrapping_sub(libc::SKF_AD_OFF.cast_unsigned());
                    a = match question.cast_signed() {
                        libc::SKF_AD_PKTTYPE => frame.packet_type.into(),
                        libc::SKF_AD_VLAN_TAG_PRESENT => frame.tag.is_some().into(),
                        libc::SKF_AD_VLAN_TAG => frame.tag.unwrap_or(0x5a5a).into(),
                        _ => {
                            let len = if code == LOAD_WORD { 4 } else { 2 };
                            let bytes = frame.bytes.get(k as usize..k as usize + len);
                            let Some(bytes) = bytes else { return false };
                            bytes.iter().fold(0, |a, byte| a << 8 | u32::from(*byte))
                        }
                    };
                }
                0x07 => x = a,
                0x54 => a &= k,
                0x2c => a = a.wrapping_mul(x),
                0x15 => at += usize::from(if a == k { jt } else { jf }),
                0x06 => return k != 0,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    fn subnet(text: &str) -> Vec<libc::sock_filter> {
        program(text.parse().unwrap())
    }

    #[test]
    fn only_what_is_for_the_subnet_passes() {
        let program = subnet("10.244.1.0/24");
        for (destination, expected) in [
            ("10.244.1.0", true),
            ("10.244.1.255", true),
            ("10.244.0.255", false),
            ("10.244.2.0", false),
            ("192.168.1.1", false),
        ] {
            assert_eq!(passes(&program, &to(destination)), expected);
        }
        let ipv6 = frame(0x86dd, ip("10.244.2.3"), ip("10.244.1.3"));
        assert!(!passes(&program, &ipv6));
        assert!(passes(&program, &arp()));
        assert!(passes(&subnet("0.0.0.0/0"), &to("9.9.9.9")));
        assert!(passes(&subnet("9.9.9.9/32"), &to("9.9.9.9")));
        assert!(!passes(&subnet("9.9.9.9/32"), &to("9.9.9.8")));
    }

    #[test]
    fn only_what_is_sent_to_this_host_passes_and_arp_to_all() {
        let program = subnet("10.244.1.0/24");
        let sent = |frame: Frame, packet_type| Frame {
            packet_type,
            ..frame
        };
        // PACKET_BROADCAST, MULTICAST, OTHERHOST and OUTGOING.
        for (packet_type, expected) in [(1, true), (2, false), (3, false), (4, false)] {
            assert!(!passes(&program, &sent(to("10.244.1.3"), packet_type)));
            assert_eq!(passes(&program, &sent(arp(), packet_type)), expected);
        }
    }

    #[test]
    fn frames_of_vlans_are_others() {
        let program = subnet("10.244.1.0/24");
        // VLAN 7, the same with a priority, VLAN 4095; a priority alone.
        for (tag, expected) in [
            (7, false),
            (0xe007, false),
            (0xfff, false),
            (0xe000, true),
            (0, true),
        ] {
            for frame in [to("10.244.1.3"), arp()] {
                let tag = Some(tag);
                assert_eq!(passes(&program, &Frame { tag, ..frame }), expected);
            }
        }
    }

    #[test]
    fn what_is_cut_off_does_not_pass() {
        let program = subnet("10.244.1.0/24");
        let whole = to("10.244.1.3");
        assert!(passes(&program, &whole));
        for len in 0..whole.bytes.len() {
            let bytes = whole.bytes[..len].to_vec();
            assert!(!passes(
                &program,
                &Frame {
                    bytes,
                    ..whole.clone()
                }
            ));
        }
    }
}
