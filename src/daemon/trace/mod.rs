//! Traces: a question about a packet becomes that packet, and what the data path would do with it
//! becomes words.

mod words;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use muslin_encap::tunnel::ipip;
use muslin_stack::addresses::ipv4;
use muslin_stack::api::exchange::{Ask, Told};
use muslin_stack::api::published::Transport;
use muslin_stack::api::trace::{
    Arrival, Beginning, Medium, Next, Outcome, Packet, Part, Protocol, Question, Step, Verdict,
};
use muslin_stack::control::ipam::PodName;
use muslin_stack::control::names::Found;
use muslin_stack::control::tunnel::TunnelPlan;
use muslin_stack::datapath::gateway;
use muslin_stack::datapath::node;
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::trace::{self, Entrance, Mark, Probe, Trace, TraceStep};
use muslin_stack::datapath::tunnel::Tunnel;
use smoltcp::wire::EthernetAddress;
use words::Words;

use super::exchange;
use super::pods::{Pod, Pods, not_attached};
use super::running::RunningNode;
use crate::dns::DOMAIN;
use crate::error::{Error, Result};
use crate::terminal::suggest::hint;

/// Somebody outside, whose address nobody has (RFC 5737).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

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
    let packet = packet.ok_or_else(|| Error::usage("what is to be traced is no packet of IPv4"))?;
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
                "arp",
                format!(
                    "{destination} is in the sender's own subnet, and no pod has it: nobody answers"
                ),
                Verdict::Dropped,
                "The sender's own kernel gives up: no route to host.",
            ),
        };
        Ok(Part {
            node: words.node().to_owned(),
            packet: packet.ok_or_else(|| Error::usage("no packet of IPv4"))?,
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
    let source = pod.address.ipv4();
    let source = source.ok_or_else(|| Error::usage("the pod has no address of IPv4"))?;
    let destination = find(running, &beginning.to)?;
    let probe = Probe {
        mark,
        ..probe(beginning, source.into(), destination)
    };
    if destination.is_loopback() || destination == IpAddr::from(source) {
        return Ok(Err(Unsent {
            probe,
            destination,
            is_own: true,
        }));
    }
    let is_near = ipv4(destination).is_some_and(|it| running.facts.subnet.contains(&it));
    let own = [
        gateway::address(running.facts.subnet),
        running.facts.subnet.network(),
    ];
    let next_hop = if let Some(group) = group_mac(destination, running.facts.subnet.broadcast()) {
        group
    } else if is_near && !own.map(IpAddr::V4).contains(&destination) {
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
        running.facts.gateway_mac
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
    let destination = find(running, &beginning.to)?;
    let source = running.facts.subnet.network();
    let packet = probe(beginning, source.into(), destination).packet();
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
    let address = pod.address.ipv4();
    let address = address.ok_or_else(|| Error::usage("the pod has no address of IPv4"))?;
    let probe = Probe {
        destination_port: leads.pod_port,
        ..probe(beginning, OUTSIDE.into(), address.into())
    };
    Ok(Incoming {
        entrance: Entrance::Egress,
        bytes: probe.packet().map_err(Error::usage)?,
    })
}

/// What a probe carries that is asked about in these words.
pub(crate) const fn protocol(protocol: Protocol) -> trace::Protocol {
    match protocol {
        Protocol::Tcp => trace::Protocol::Tcp,
        Protocol::Udp => trace::Protocol::Udp,
        Protocol::Icmp => trace::Protocol::Icmp,
    }
}

fn probe(beginning: &Beginning, source: IpAddr, destination: IpAddr) -> Probe {
    Probe {
        source,
        destination,
        protocol: protocol(beginning.protocol),
        source_port: beginning.source_port,
        destination_port: beginning.destination_port,
        len: beginning.size,
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

/// The address that `name` stands for.
fn find(running: &RunningNode, name: &str) -> Result<IpAddr> {
    if let Ok(address) = name.parse() {
        return Ok(address);
    }
    let subnet = running.facts.subnet;
    match name {
        "outside" => return Ok(OUTSIDE.into()),
        "gateway" => return Ok(gateway::address(subnet).into()),
        "host" => return Ok(subnet.network().into()),
        _ => {}
    }
    let names = running.naming.names.read();
    let below = name
        .strip_suffix(DOMAIN)
        .and_then(|name| name.strip_suffix('.'));
    if let Found::Addresses(addresses) = names.find(below.unwrap_or(name))
        && let Some(address) = addresses.first()
    {
        return Ok(*address);
    }
    let is_own = name == running.facts.settings.name;
    let node = match names.subnet_of(name) {
        Some(subnet) => ipv4(subnet.network()),
        None => is_own.then(|| subnet.network()),
    };
    // The first address after the base is a gateway's.
    let gateway = node.map(|base| IpAddr::from(Ipv4Addr::from(u32::from(base).saturating_add(1))));
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
            let own = running.interface().address;
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
    let own = running.interface().public_ip;
    Some(Next {
        public_ip,
        node,
        arrival: Arrival {
            by,
            source: SocketAddr::new(own.into(), running.facts.plan.port),
            packet: Packet(packet.clone()),
        },
    })
}

/// The MAC address of a group's, or of all of a subnet whose last address that is (RFC 1112 section 6.4).
fn group_mac(destination: IpAddr, last: Ipv4Addr) -> Option<EthernetAddress> {
    let destination = ipv4(destination)?;
    if destination == last || destination.is_broadcast() {
        return Some(EthernetAddress::BROADCAST);
    }
    let [_, a, b, c] = destination.octets();
    let group = EthernetAddress([0x01, 0x00, 0x5e, a & 0x7f, b, c]);
    destination.is_multicast().then_some(group)
}

/// How a MAC address is written.
fn mac(address: EthernetAddress) -> String {
    muslin_encap::mac::DisplayMac(address).to_string()
}
