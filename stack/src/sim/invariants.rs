//! What must be true of a node at any time.

use smoltcp::time::Instant;
use smoltcp::wire::{ArpRepr, EthernetProtocol, Ipv4Packet, Ipv6Packet};

use super::machine::LeasedNode;
use super::outcome::Violation;
use super::store::Retimed;
use crate::datapath::frame;
use crate::datapath::gateway;
use crate::datapath::ndp::Message;
use crate::datapath::node::{Node, Verdict};
use crate::datapath::port::PortId;
use crate::datapath::trace::{Trace, TraceStep};
use crate::datapath::work;
use crate::drops::DropReason;

/// Turns in which nothing is taken of a port whose last frame had too much work for one.
const IDLE_TURNS: u32 = 8;

/// A node's books balance: every packet ended in exactly one way.
pub(super) fn counters(machine: usize, node: &Node) -> Result<(), Violation> {
    let counters = node.counters();
    let (came, went) = (counters.came(), counters.went());
    if came == went {
        return Ok(());
    }
    Err(Violation(format!(
        "the counters of machine {machine} do not add up: {came} packets came, {went} went"
    )))
}

/// What was foreseen of a packet is what became of it. Only the host's answers cannot be foreseen.
pub(super) fn foreseen(
    machine: usize,
    trace: Option<Trace>,
    verdict: Verdict,
    packet: &[u8],
) -> Result<(), Violation> {
    let Some(trace) = trace else {
        return Ok(());
    };
    let is_so = match (trace.verdict, verdict) {
        (Verdict::Egress, Verdict::Consumed) => true,
        (Verdict::Egress, Verdict::Drop(reason)) => {
            is_hosts(reason) || trace.steps.last() == Some(&TraceStep::Reassembled)
        }
        (foreseen, verdict) => foreseen == verdict && trace.packet == packet,
    };
    if is_so {
        return Ok(());
    }
    let Trace {
        verdict: foreseen,
        steps,
        ..
    } = trace;
    Err(Violation(format!(
        "machine {machine} was to give a packet the verdict {foreseen:?} after {steps:?}, and gave it {verdict:?}"
    )))
}

/// Whether a packet is dropped since the host would not have it.
const fn is_hosts(reason: DropReason) -> bool {
    matches!(
        reason,
        DropReason::EgressHostFailed
            | DropReason::EgressPing
            | DropReason::EgressHostFull
            | DropReason::EgressExhausted
            | DropReason::EgressTooLong
            | DropReason::EgressUnreachable
            | DropReason::GatewayPort
    )
}

/// A turn is no longer than it may be: no frame is taken once `taken` has used it up, whatever the
/// node has counted.
pub(super) fn turn(machine: usize, port: PortId, taken: u64) -> Result<(), Violation> {
    if taken < work::TURN {
        return Ok(());
    }
    Err(Violation(format!(
        "port {port} of machine {machine} has work of {taken} done in its turn, and more"
    )))
}

/// Who waits has a turn again: what is taken beyond one is no more than the largest frame, copied to
/// all.
pub(super) fn patience(machine: usize, port: PortId, idle_turns: u32) -> Result<(), Violation> {
    if idle_turns < IDLE_TURNS {
        return Ok(());
    }
    Err(Violation(format!(
        "port {port} of machine {machine} has had {idle_turns} turns in which nothing was taken"
    )))
}

/// Nobody is told that a pod is not there which is about to be attached again.
pub(super) fn refusal(
    machine: usize,
    running: &LeasedNode,
    now: Instant,
    packet: &[u8],
) -> Result<(), Violation> {
    let (awaited, until) = &running.awaited;
    let to = match packet.first().map(|first| first >> 4) {
        Some(6) => Ipv6Packet::new_checked(packet).map(|view| view.dst_addr().into()),
        _ => Ipv4Packet::new_checked(packet).map(|view| view.dst_addr().into()),
    };
    match to {
        Ok(to) if now < *until && awaited.contains(&to) => Err(Violation(format!(
            "machine {machine} refuses a packet for {to}, which is about to be attached again"
        ))),
        _ => Ok(()),
    }
}

/// No pod hears in neighbour discovery that an address is where it is not, or that there is a router
/// but the gateway.
fn claim_of_ipv6(running: &LeasedNode, packet: &[u8]) -> Result<(), Violation> {
    let (address, claimed) = match Message::parse(packet) {
        Ok(Some(Message::Solicitation(it))) => (it.source, it.mac),
        Ok(Some(Message::Advertisement(it))) => (it.target, it.mac),
        Err(DropReason::RouterAdvertisement) => {
            return Err(Violation("a pod gets a router advertisement".to_owned()));
        }
        // A broken one is for the receiver to see.
        Ok(Some(Message::RouterSolicitation { .. }) | None) | Err(_) => return Ok(()),
    };
    let pods = running.ports.values();
    let pods = pods.filter_map(|plugged| Some((plugged.address_v6?, plugged.mac)));
    let own = gateway::addresses(running.key.nets());
    let own = own.ipv6().iter().map(|own| (*own, running.gateway_mac));
    let mut places = pods.chain(own);
    match (places.find(|(owned, _)| *owned == address), claimed) {
        (Some((_, mac)), Some(claimed)) if mac != claimed => Err(Violation(format!(
            "a pod hears that {address} is at {claimed}, and it is at {mac}"
        ))),
        _ => Ok(()),
    }
}

/// Whether a record ends is not its node's to change: a reservation has no end, and a lease has one.
/// Somebody else may make either of the other.
pub(super) fn retimed(change: &Retimed) -> Result<(), Violation> {
    let Retimed { key, writer, ends } = change;
    let what = if *ends {
        "a reservation, ends"
    } else {
        "a lease, has no end"
    };
    Err(Violation(format!(
        "{key}, {what} now that machine {writer} has written it again"
    )))
}

/// No pod gets a frame from a MAC address that is neither a pod's nor the gateway's, or hears in an
/// ARP message that an address is where it is not.
pub(super) fn sender(running: &LeasedNode, bytes: &[u8]) -> Result<(), Violation> {
    let gateway = (running.node().gateway_ipv4(), running.gateway_mac);
    let pods = running.ports.values();
    let pods = pods.map(|plugged| (plugged.address, plugged.mac));
    let mut places = pods.chain([gateway]);
    let source = frame::parse(bytes).map(|view| view.src_addr());
    if source.is_ok_and(|source| running.gone.contains(&source)) {
        return Ok(());
    }
    if let Ok(source) = source
        && !places.clone().any(|(_, mac)| mac == source)
    {
        return Err(Violation(format!(
            "a pod gets a frame from {source}, which is nobody's"
        )));
    }
    let payload = bytes.get(frame::HEADER_LEN..).unwrap_or_default();
    if frame::parse(bytes).is_ok_and(|view| view.ethertype() == EthernetProtocol::Ipv6) {
        return claim_of_ipv6(running, payload);
    }
    let Some(ArpRepr::EthernetIpv4 {
        source_hardware_addr: claimed,
        source_protocol_addr: address,
        ..
    }) = frame::arp(payload).filter(|_| frame::is_arp(bytes))
    else {
        return Ok(());
    };
    match places.find(|(owned, _)| *owned == address) {
        Some((_, mac)) if mac != claimed => Err(Violation(format!(
            "a pod hears that {address} is at {claimed}, and it is at {mac}"
        ))),
        Some(_) | None => Ok(()),
    }
}
