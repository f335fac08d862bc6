//! The kernel's filter on a packet socket: classic BPF (Linux, Documentation/networking/filter.rst)
//! that passes our frames and nothing else, so that no thread wakes up for the LAN's other traffic.

use std::net::Ipv6Addr;

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_stack::addresses::Nets;
use nix::libc;

use crate::underlay::bpf::{self, NOTHING, ancillary, statement};

/// Where things are in an Ethernet frame without a VLAN tag.
mod offset {
    pub(super) const ETHERTYPE: u32 = 12;
    pub(super) const IPV4_DESTINATION: u32 = 14 + 16;
    pub(super) const IPV6_NEXT_HEADER: u32 = 14 + 6;
    pub(super) const IPV6_DESTINATION: u32 = 14 + 24;
    pub(super) const ICMPV6_TYPE: u32 = 14 + 40;
}

/// What a program returns if the whole frame passes.
const WHOLE: u32 = u32::MAX;

/// The first of two types of ICMPv6 messages, neighbour solicitation and advertisement (RFC 4861).
const SOLICITATION: u32 = 135;

/// A program that lets pass what is sent to this host and is for one of `subnets`, and what says which MAC
/// address is whose: ARP, which may be a broadcast too, and its like of IPv6, which may be a multicast.
///
/// Frames of VLANs belong to other interfaces; VLAN 0 is none (IEEE 802.1Q: a tag for its priority).
pub(super) fn program(subnets: Nets) -> Vec<libc::sock_filter> {
    let mut program = Vec::new();
    if let Some(subnet) = subnets.ipv4() {
        program.extend(rules_of_ipv4(subnet));
    }
    if let Some(subnet) = subnets.ipv6() {
        program.extend(rules_of_ipv6(subnet));
    }
    program.push(NOTHING);
    program
}

/// What is sent to this host alone.
fn to_us() -> [Step; 2] {
    [
        load(libc::BPF_W, ancillary(libc::SKF_AD_PKTTYPE)),
        Step::Require(libc::PACKET_HOST.into()),
    ]
}

/// The same, or to many. `more` is a packet type of one bit.
fn to_us_or(more: libc::c_uchar) -> [Step; 3] {
    [
        load(libc::BPF_W, ancillary(libc::SKF_AD_PKTTYPE)),
        alu(libc::BPF_AND, !u32::from(more)),
        Step::Require(libc::PACKET_HOST.into()),
    ]
}

fn rules_of_ipv4(subnet: Ipv4Net) -> Vec<libc::sock_filter> {
    let network = [
        load(libc::BPF_W, offset::IPV4_DESTINATION),
        alu(libc::BPF_AND, subnet.netmask().into()),
        Step::Require(subnet.network().into()),
    ];
    let ipv4 = of_type(libc::ETH_P_IP);
    let arp = of_type(libc::ETH_P_ARP);
    let to_us_or_all = to_us_or(libc::PACKET_BROADCAST);
    let mut rules = rule(&[&of_no_vlan()[..], &ipv4, &to_us(), &network].concat());
    rules.extend(rule(&[&of_no_vlan()[..], &arp, &to_us_or_all].concat()));
    rules
}

fn rules_of_ipv6(subnet: Ipv6Net) -> Vec<libc::sock_filter> {
    let words = |address: Ipv6Addr| {
        let bits = u128::from(address);
        [96, 64, 32, 0].map(|shift| (bits >> shift) as u32)
    };
    let pairs = words(subnet.netmask())
        .into_iter()
        .zip(words(subnet.network()));
    let places = (offset::IPV6_DESTINATION..).step_by(4);
    let in_subnet = places.zip(pairs).filter(|(_, (mask, _))| *mask != 0);
    let network: Vec<Step> = in_subnet
        .flat_map(|(place, (mask, value))| {
            [
                load(libc::BPF_W, place),
                alu(libc::BPF_AND, mask),
                Step::Require(value),
            ]
        })
        .collect();
    let discovery = [
        load(libc::BPF_B, offset::IPV6_NEXT_HEADER),
        Step::Require(libc::IPPROTO_ICMPV6.cast_unsigned()),
        load(libc::BPF_B, offset::ICMPV6_TYPE),
        alu(libc::BPF_SUB, SOLICITATION),
        // Two numbers that differ in the last bit.
        alu(libc::BPF_AND, !1),
        Step::Require(0),
    ];
    let ipv6 = of_type(libc::ETH_P_IPV6);
    let to_us_or_some = to_us_or(libc::PACKET_MULTICAST);
    let mut rules = rule(&[&of_no_vlan()[..], &ipv6, &to_us(), &network].concat());
    rules.extend(rule(
        &[&of_no_vlan()[..], &ipv6, &to_us_or_some, &discovery].concat(),
    ));
    rules
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
        const LOAD_BYTE: u16 = 0x30;
        let (mut a, mut x, mut at) = (0u32, 0u32, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                LOAD_WORD | LOAD_HALF | LOAD_BYTE => {
                    let question = k.wrapping_sub(libc::SKF_AD_OFF.cast_unsigned());
                    a = match question.cast_signed() {
                        libc::SKF_AD_PKTTYPE => frame.packet_type.into(),
                        libc::SKF_AD_VLAN_TAG_PRESENT => frame.tag.is_some().into(),
                        libc::SKF_AD_VLAN_TAG => frame.tag.unwrap_or(0x5a5a).into(),
                        _ => {
                            let len = match code {
                                LOAD_WORD => 4,
                                LOAD_HALF => 2,
                                _ => 1,
                            };
                            let bytes = frame.bytes.get(k as usize..k as usize + len);
                            let Some(bytes) = bytes else { return false };
                            bytes.iter().fold(0, |a, byte| a << 8 | u32::from(*byte))
                        }
                    };
                }
                0x07 => x = a,
                0x54 => a &= k,
                0x14 => a = a.wrapping_sub(k),
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

    /// An IPv6 packet, or an ICMPv6 message of a type.
    fn to_v6(destination: &str, message: Option<u8>) -> Frame {
        let mut whole = frame(0x86dd, ip("0.0.0.0"), ip("0.0.0.0"));
        whole.bytes.truncate(14);
        whole.bytes.extend([0x60, 0, 0, 0, 0, 24]);
        whole
            .bytes
            .extend([if message.is_some() { 58 } else { 17 }, 255]);
        let [source, destination] = ["fd00:2::3", destination].map(|text| {
            let address: Ipv6Addr = text.parse().unwrap();
            address.octets()
        });
        whole.bytes.extend(source);
        whole.bytes.extend(destination);
        whole.bytes.extend([message.unwrap_or(135); 24]);
        whole
    }

    #[test]
    fn of_ipv6_what_is_for_the_subnet_passes_and_neighbour_discovery() {
        for subnets in ["fd00:1:0:8000::/49", "10.244.1.0/24,fd00:1:0:8000::/49"] {
            let program = subnet(subnets);
            for (destination, expected) in [
                ("fd00:1:0:8000::2", true),
                ("fd00:1:0:ffff::", true),
                ("fd00:1:0:7fff::2", false),
                ("fd00:1:1:8000::2", false),
                ("fe80::1", false),
            ] {
                let frame = to_v6(destination, None);
                assert_eq!(passes(&program, &frame), expected, "{destination}");
                for packet_type in 1..=4 {
                    let frame = Frame {
                        packet_type,
                        ..frame.clone()
                    };
                    assert!(!passes(&program, &frame));
                }
            }
            // Router advertisements and redirects are none of ours.
            for (message, expected) in [
                (133, false),
                (134, false),
                (135, true),
                (136, true),
                (137, false),
            ] {
                let frame = to_v6("ff02::1:ff00:9", Some(message));
                // PACKET_HOST, BROADCAST, MULTICAST, OTHERHOST and OUTGOING.
                for packet_type in 0..=4 {
                    let is_ours = expected && matches!(packet_type, 0 | 2);
                    let frame = Frame {
                        packet_type,
                        ..frame.clone()
                    };
                    assert_eq!(passes(&program, &frame), is_ours, "{message}");
                }
            }
            let whole = to_v6("fd00:1:0:8000::2", None);
            let tagged = Frame {
                tag: Some(7),
                ..whole.clone()
            };
            assert!(!passes(&program, &tagged));
            for len in 0..14 + 32 {
                let bytes = whole.bytes[..len].to_vec();
                let cut = Frame {
                    bytes,
                    ..whole.clone()
                };
                assert!(!passes(&program, &cut), "{len}");
            }
            let has_ipv4 = subnets.contains("10.244");
            assert_eq!(passes(&program, &to("10.244.1.3")), has_ipv4);
            assert_eq!(passes(&program, &arp()), has_ipv4);
        }
        assert!(passes(&subnet("::/0"), &to_v6("fe80::1", None)));
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
