//! Traces: a question about a packet becomes that packet, and what the data path would do with it
//! becomes words.

mod words;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use muslin_encap::tunnel::ipip;
use muslin_stack::addresses::{Addresses, Dual, Nets};
use muslin_stack::api::exchange::{Ask, Told};
use muslin_stack::api::published::Transport;
use muslin_stack::api::trace::{
    Arrival, Beginning, Medium, Next, Outcome, Packet, Part, Protocol, Question, Step, Verdict,
    Version,
};
use muslin_stack::control::ipam::PodName;
use muslin_stack::control::names::Found;
use muslin_stack::control::tunnel::TunnelPlan;
use muslin_stack::datapath::gateway;
use muslin_stack::datapath::node;
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::trace::{self, Entrance, Mark, Probe, Trace, TraceStep};
use muslin_stack::datapath::tunnel::Tunnel;
use smoltcp::wire::{EthernetAddress, IpVersion};
use words::Words;

use super::exchange;
use super::pods::{Pod, Pods, not_attached};
use super::running::RunningNode;
use crate::dns::DOMAIN;
use crate::error::{Error, Result};
use crate::terminal::suggest::hint;

/// Somebody outside, whose addresses nobody has (RFC 5737, RFC 3849).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// A packet that is about to come in.
struct Incoming {
    entrance: Entrance,
    bytes: Vec<u8>,
}

/// A packet that never comes in: its sender's own kernel does not send it.
struct Unsent {
    probe: Probe,
    destination: IpAddr,
    /// Whether that is since it is the sender's; else nobody has the destination.
    is_own: bool,
}

/// This node's part of a packet's way.
///
/// # Errors
/// If there can be no such packet.
pub(super) async fn part(running: &RunningNode, question: Question) -> Result<Part> {
    let words = Words::new(running);
    let incoming = match question {
        Question::Beginning(beginning) => match begin(running, &beginning).await? {
            Ok(incoming) => incoming,
            Err(unsent) => return unsent.part(&words),
        },
        Question::Arrival(arrival) => arrive(running, arrival)?,
        Question::Elsewhere { public_ip, arrival } => {
            return match running
                .exchange
                .ask(running, public_ip, Ask::Trace(arrival))
                .await?
            {
                Told::Trace(part) => Ok(*part),
                told => Err(exchange::unexpected(told)),
            };
        }
        _ => return Err(Error::usage("this node is too old to trace that")),
    };
    let (entrance, bytes) = (incoming.entrance, incoming.bytes);
    let packet = words.summary_of(entrance, &bytes);
    let packet = packet.ok_or_else(|| Error::usage("what is to be traced is no IP packet"))?;
    let trace = running.workers.trace(entrance, bytes).await;
    let trace = trace.map_err(Error::failed)?;
    Ok(Part {
        node: running.facts.settings.name.clone(),
        packet,
        steps: trace.steps.iter().map(|step| words.step(step)).collect(),
        outcome: words.outcome(&trace),
        own: trace.own.iter().map(|own| words.own(own)).collect(),
        more_own: trace.more_own,
        next: next(running, &trace),
    })
}

impl Unsent {
    fn part(self, words: &Words<'_>) -> Result<Part> {
        let bytes = self.probe.packet().map_err(Error::usage)?;
        let packet = words.summary_of(Entrance::Host, &bytes);
        let destination = self.destination;
        let (kind, step, verdict, outcome) = match self.is_own {
            true => (
                "loopback",
                format!("{destination} is the sender's own address"),
                Verdict::Delivered,
                "The sender's own kernel keeps it, and the node does not see it.",
            ),
            false => (
                if destination.is_ipv4() { "arp" } else { "ndp" },
                format!(
                    "{destination} is in the sender's own subnet, and no pod has it: nobody answers"
                ),
                Verdict::Dropped,
                "The sender's own kernel gives up: no route to host.",
            ),
        };
        Ok(Part {
            node: words.node().to_owned(),
            packet: packet.ok_or_else(|| Error::usage("no IP packet"))?,
            steps: vec![Step {
                kind: kind.to_owned(),
                text: step,
            }],
            outcome: Outcome {
                verdict,
                reason: None,
                text: outcome.to_owned(),
            },
            own: Vec::new(),
            more_own: 0,
            next: None,
        })
    }
}

/// The packet that a question describes.
async fn begin(
    running: &RunningNode,
    beginning: &Beginning,
) -> Result<std::result::Result<Incoming, Unsent>> {
    match beginning.from.as_str() {
        "outside" => begin_outside(running, beginning).map(Ok),
        "host" => begin_at_host(running, beginning).map(Ok),
        name => {
            let sender = sender(&running.pods.lock(), name);
            let sender = sender.ok_or_else(|| not_attached(&running.pods.lock(), name))?;
            begin_at_pod(running, beginning, &sender, None).await
        }
    }
}

/// The frame of a marked packet that a pod of the node might send, and the pod's port.
///
/// # Errors
/// If there can be no such frame.
pub(super) async fn marked(
    running: &RunningNode,
    beginning: &Beginning,
    mark: Mark,
) -> Result<(PortId, Vec<u8>)> {
    let name = &beginning.from;
    let pod = sender(&running.pods.lock(), name);
    let pod = pod.ok_or_else(|| not_attached(&running.pods.lock(), name))?;
    match begin_at_pod(running, beginning, &pod, Some(mark)).await? {
        Ok(incoming) => Ok((pod.port, incoming.bytes)),
        Err(unsent) => {
            let destination = unsent.destination;
            let message = match unsent.is_own {
                true => {
                    format!("{destination} is the sender's own address: no node sees the packet")
                }
                false => format!("no pod has {destination}: the sender's own kernel sends nothing"),
            };
            Err(Error::usage(message))
        }
    }
}

/// A packet as a pod's own kernel sends it: to the subnet's hosts directly, to all others by the
/// gateway.
async fn begin_at_pod(
    running: &RunningNode,
    beginning: &Beginning,
    pod: &Pod,
    mark: Option<Mark>,
) -> Result<std::result::Result<Incoming, Unsent>> {
    let facts = &running.facts;
    let (source, destination) = ends(beginning, pod.address, find(running, &beginning.to)?)?;
    let probe = Probe {
        mark,
        ..probe(beginning, source, destination)
    };
    if destination.is_loopback() || destination == source {
        return Ok(Err(Unsent {
            probe,
            destination,
            is_own: true,
        }));
    }
    let is_near = match destination {
        IpAddr::V4(it) => facts.subnets.ipv4().is_some_and(|net| net.contains(&it)),
        IpAddr::V6(it) => facts.subnets.ipv6().is_some_and(|net| net.contains(&it)),
    };
    let is_gateway = gateway::addresses(facts.subnets).contains(destination);
    let next_hop = if let Some(group) = group_mac(destination, facts.subnets) {
        group
    } else if is_near && !is_gateway {
        let neighbours = running.workers.neighbours().await.map_err(Error::failed)?;
        let known = neighbours.pods.get(&destination);
        match known.and_then(|(place, _)| *place) {
            Some(place) => place.mac,
            None => {
                return Ok(Err(Unsent {
                    probe,
                    destination,
                    is_own: false,
                }));
            }
        }
    } else {
        facts.gateway_mac
    };
    let bytes = probe.frame(pod.mac, next_hop).map_err(Error::usage)?;
    let entrance = Entrance::Port(pod.port);
    Ok(Ok(Incoming { entrance, bytes }))
}

fn begin_at_host(running: &RunningNode, beginning: &Beginning) -> Result<Incoming> {
    if running.host.addresses().is_empty() {
        return Err(Error::usage(
            "this machine has no host interface: make it with 'muslin host-interface'",
        ));
    }
    let host = Addresses::from(running.facts.ipv4_subnet()?.network());
    let (source, destination) = ends(beginning, host, find(running, &beginning.to)?)?;
    let packet = probe(beginning, source, destination).packet();
    Ok(Incoming {
        entrance: Entrance::Host,
        bytes: packet.map_err(Error::usage)?,
    })
}

/// A client of a published port, after the machine's own kernel has taken its packet: the port is the
/// machine's or the pod's.
fn begin_outside(running: &RunningNode, beginning: &Beginning) -> Result<Incoming> {
    let pods = running.pods.lock();
    let pod = sender(&pods, &beginning.to);
    let pod = pod.ok_or_else(|| not_attached(&pods, &beginning.to))?;
    let published = &pod.details.published;
    let transport = match beginning.protocol {
        Protocol::Tcp => Transport::Tcp,
        Protocol::Udp => Transport::Udp,
        Protocol::Icmp => return Err(Error::usage("from outside only TCP and UDP reach pods")),
    };
    let port = beginning.destination_port;
    let of_transport = || published.iter().filter(|it| it.transport == transport);
    // Another of its ports may lead to the pod's port with the machine's number.
    let leads = of_transport().find(|it| it.host_port == port);
    let leads = leads.or_else(|| of_transport().find(|it| it.pod_port == port));
    let Some(leads) = leads else {
        let all: Vec<_> = published.iter().map(ToString::to_string).collect();
        let all = match all.is_empty() {
            true => "it publishes no port".to_owned(),
            false => format!("it publishes {}", all.join(", ")),
        };
        let to = &beginning.to;
        return Err(Error::usage(format!(
            "nobody outside reaches port {port} of {to}: {all}"
        )));
    };
    let (source, destination) = ends(beginning, outside(), pod.address)?;
    let probe = Probe {
        destination_port: leads.pod_port,
        ..probe(beginning, source, destination)
    };
    Ok(Incoming {
        entrance: Entrance::Egress,
        bytes: probe.packet().map_err(Error::usage)?,
    })
}

/// What a probe carries that is asked about in these words.
const fn protocol(protocol: Protocol) -> trace::Protocol {
    match protocol {
        Protocol::Tcp => trace::Protocol::Tcp,
        Protocol::Udp => trace::Protocol::Udp,
        Protocol::Icmp => trace::Protocol::Icmp,
    }
}

/// The addresses of a packet's ends, of the IP version that is asked for, or that of an address that is
/// named, or the first that both ends have.
fn ends(beginning: &Beginning, from: Addresses, to: Addresses) -> Result<(IpAddr, IpAddr)> {
    let (sender, receiver) = (&beginning.from, &beginning.to);
    let named = [sender, receiver].map(|name| name.parse::<IpAddr>().ok().map(Version::of));
    let wanted = beginning
        .version
        .or_else(|| named.into_iter().flatten().next());
    let both = |version| match version {
        Version::Ipv4 => Some((from.ipv4()?.into(), to.ipv4()?.into())),
        Version::Ipv6 => Some((from.ipv6()?.into(), to.ipv6()?.into())),
    };
    let found = match wanted {
        Some(version) => both(version),
        None => both(Version::Ipv4).or_else(|| both(Version::Ipv6)),
    };
    found.ok_or_else(|| {
        let version = wanted.unwrap_or(if from.ipv4().is_some() {
            Version::Ipv4
        } else {
            Version::Ipv6
        });
        let has = |end: Addresses| match version {
            Version::Ipv4 => end.ipv4().is_some(),
            Version::Ipv6 => end.ipv6().is_some(),
        };
        let name = if has(from) { receiver } else { sender };
        Error::usage(format!("'{name}' has no address of {version}"))
    })
}

fn outside() -> Addresses {
    Dual::with_ipv4(OUTSIDE, Some(OUTSIDE_V6))
}

fn probe(beginning: &Beginning, source: IpAddr, destination: IpAddr) -> Probe {
    let protocol = protocol(beginning.protocol);
    let version = match destination {
        IpAddr::V4(_) => IpVersion::Ipv4,
        IpAddr::V6(_) => IpVersion::Ipv6,
    };
    let len = match (beginning.size, beginning.has_mark) {
        (0, has_mark) => Probe::least(version, protocol, has_mark),
        (len, _) => len,
    };
    Probe {
        source,
        destination,
        protocol,
        source_port: beginning.source_port,
        destination_port: beginning.destination_port,
        len,
        ttl: beginning.ttl,
        dont_fragment: beginning.dont_fragment,
        mark: None,
    }
}

/// The pod of this node with that name or address.
fn sender(pods: &Pods, name: &str) -> Option<Pod> {
    let address = name.parse::<IpAddr>().ok();
    let is_it = |it: &PodName, pod: &Pod| {
        it.as_str() == name
            || address.is_some_and(|it| pod.address.iter::<IpAddr>().any(|own| own == it))
    };
    let mut pods = pods.iter();
    pods.find(|(it, pod)| is_it(it, pod))
        .map(|(_, pod)| pod.clone())
}

/// The addresses that `name` stands for.
fn find(running: &RunningNode, name: &str) -> Result<Addresses> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(match address {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => address.into(),
        });
    }
    let facts = &running.facts;
    match name {
        "outside" => return Ok(outside()),
        "gateway" => return Ok(facts.gateways()),
        "host" => return Ok(facts.ipv4_subnet()?.network().into()),
        _ => {}
    }
    let names = running.naming.names.read();
    let below = name
        .strip_suffix(DOMAIN)
        .and_then(|name| name.strip_suffix('.'));
    if let Found::Addresses(addresses) = names.find(below.unwrap_or(name))
        // Pods of one name on several nodes: the first of each version.
        && let Some(addresses) = Addresses::collect(addresses.into_iter().rev())
    {
        return Ok(addresses);
    }
    let is_own = name == facts.settings.name;
    let subnets = names.subnets_of(name);
    let subnets = subnets.or_else(|| is_own.then_some(facts.subnets));
    let gateway = subnets.map(|it| it.map(gateway::address, gateway::address_v6));
    gateway.ok_or_else(|| {
        let hint = hint(name, names.all());
        // As it is where a pod is not attached: it may be in a moment.
        Error::failed(format!(
            "there is no pod or node called '{name}'{hint}, and it is no address: 'muslin pods' and \
             'muslin peers' list them"
        ))
    })
}

/// A packet that another node has sent, as it comes out of the socket here.
fn arrive(running: &RunningNode, arrival: Arrival) -> Result<Incoming> {
    let Packet(bytes) = arrival.packet;
    let TunnelPlan { tunnel, .. } = running.plan();
    let (entrance, bytes) = match (arrival.by, tunnel, arrival.source.ip()) {
        (Medium::Uplink, _, _) => (Entrance::Uplink, bytes),
        (Medium::Tunnel, Tunnel::Ipip, IpAddr::V4(source)) => {
            let ends = running.interface().ends;
            let own = ends.ipv4().map_or(Ipv4Addr::UNSPECIFIED, |end| end.address);
            let entrance = Entrance::Underlay(arrival.source);
            (entrance, ipip::received(source, own, &bytes))
        }
        (Medium::Tunnel, _, _) => (Entrance::Underlay(arrival.source), bytes),
    };
    Ok(Incoming { entrance, bytes })
}

/// The packet on its way to another node. If it went on in pieces, the first of them.
fn next(running: &RunningNode, trace: &Trace) -> Option<Next> {
    let whole = (trace.verdict, &trace.packet);
    let pieces = trace.own.iter().map(|(verdict, bytes)| (*verdict, bytes));
    let is_in_pieces = trace
        .steps
        .iter()
        .any(|step| matches!(step, TraceStep::InPieces { .. }));
    let (id, by, packet) = std::iter::once(whole)
        .chain(pieces.filter(|_| is_in_pieces))
        .find_map(|(verdict, bytes)| match verdict {
            node::Verdict::Peer { id, .. } => Some((id, Medium::Tunnel, bytes)),
            node::Verdict::Uplink { id: Some(id) } => Some((id, Medium::Uplink, bytes)),
            _ => None,
        })?;
    let (public_ip, node) = running.peer_named(id)?;
    let public = running.interface().public();
    let own = match public_ip {
        IpAddr::V4(_) => public.ipv4()?.into(),
        IpAddr::V6(_) => running.public_ipv6()?.into(),
    };
    Some(Next {
        public_ip,
        node,
        arrival: Arrival {
            by,
            source: SocketAddr::new(own, running.facts.plan.ports.of(own)),
            packet: Packet(packet.clone()),
        },
    })
}

/// The MAC address of a group's, or of all of a subnet whose last address that is (RFC 1112 section 6.4,
/// RFC 2464 section 7).
fn group_mac(destination: IpAddr, subnets: Nets) -> Option<EthernetAddress> {
    match destination {
        IpAddr::V4(it) => {
            let last = subnets.ipv4().map(|net| net.broadcast());
            if Some(it) == last || it.is_broadcast() {
                return Some(EthernetAddress::BROADCAST);
            }
            let [_, a, b, c] = it.octets();
            let group = EthernetAddress([0x01, 0x00, 0x5e, a & 0x7f, b, c]);
            it.is_multicast().then_some(group)
        }
        IpAddr::V6(it) => {
            let [.., a, b, c, d] = it.octets();
            let group = EthernetAddress([0x33, 0x33, a, b, c, d]);
            it.is_multicast().then_some(group)
        }
    }
}

/// How a MAC address is written.
fn mac(address: EthernetAddress) -> String {
    muslin_encap::mac::DisplayMac(address).to_string()
}
