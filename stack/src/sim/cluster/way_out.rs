//! What must be true of a node's flows and their sockets after every call of its egress.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use ipnet::Ipv4Net;
use muslin_encap::ip::v6;
use smoltcp::time::Duration;
use smoltcp::wire::{
    EthernetProtocol, Icmpv4Message, Icmpv4Packet, Icmpv6Message, IpProtocol, Ipv4Packet,
    Ipv6Packet,
};

use super::Cluster;
use crate::addresses::Nets;
use crate::datapath::egress::{Egress, FlowId, FlowInfo, Protocol};
use crate::datapath::frame;
use crate::datapath::node::Verdict;
use crate::drops::DropReason;
use crate::sim::due::{Due, Happening, Who};
use crate::sim::log::seconds;
use crate::sim::machine::LeasedNode;
use crate::sim::oracle::Oracle;
use crate::sim::outcome::Violation;
use crate::sim::outside::Server;
use crate::sim::packet;
use crate::sim::sockets::Kind;
use crate::sim::way_out::{FLOWS, FLOWS_OF_POD, WayOut};
use crate::sim::worker::Worker;

/// How long a flow is idle that makes room for another.
const EVICTABLE: Duration = Duration::from_secs(10);

impl LeasedNode {
    /// Flows that were ended to make room, and packets for which there was none.
    pub(super) fn crowded(&self) -> u64 {
        let of = |worker: &Worker| {
            let counters = worker.path.node().counters();
            worker.path.egress().counters().evicted
                + counters.dropped_for(DropReason::EgressTableFull)
                + counters.dropped_for(DropReason::EgressPodFull)
        };
        self.workers.iter().map(of).sum()
    }

    /// A pod that has flows or published ports and is not attached.
    pub(super) fn stray_flow(&self) -> Option<IpAddr> {
        let is_there = |pod: IpAddr| {
            let mut ports = self.ports.values();
            ports.any(|it| it.addresses().any(|address| address == pod))
        };
        let mut workers = self.workers.iter();
        workers.find_map(|worker| worker.path.egress().stray_pod(is_there))
    }

    /// Flows and their sockets, in words.
    pub(super) fn describe_flows(&self, text: &mut String) {
        for worker in &self.workers {
            worker.describe_flows(text);
        }
    }
}

impl Worker {
    fn describe_flows(&self, text: &mut String) {
        let egress = self.path.egress();
        if egress.counters().opened == 0 {
            return;
        }
        let _ = writeln!(text, "  egress: {:?}", egress.counters());
        for (id, socket) in self.way_out.sockets.iter() {
            let key = egress.key(id);
            let mut flows = egress.flows();
            let info = flows.find(|info| Some(info.key) == key);
            let flow = info.map_or("no flow".to_owned(), |info| {
                let (pod, state, since) = (info.key.pod, info.state, seconds(info.since));
                let (sent, received) = (info.sent, info.received);
                format!("{pod}, {state}, since {since}, {sent} bytes out, {received} in")
            });
            let to = socket.to.map(|to| format!(" to {to}")).unwrap_or_default();
            let protocol = socket.protocol;
            let _ = writeln!(text, "  {protocol} socket {}{to}: {flow}", id.index);
        }
    }
}

impl Cluster {
    /// Datagrams that a node has sent outside, or given to the worker that will.
    pub(super) fn went_out(&mut self, who: Who) -> u64 {
        let running = self.machines[who.machine].running(who);
        let workers = running.iter().flat_map(|running| &running.workers);
        workers
            .map(|worker| worker.way_out.sockets.datagrams + worker.handed_over)
            .sum()
    }

    /// A datagram to an address outside that came in a frame goes on, or is dropped for a reason.
    pub(super) fn check_datagram(
        &mut self,
        who: Who,
        verdict: Verdict,
        frame: &[u8],
        before: u64,
    ) -> Result<(), Violation> {
        let went = self.went_out(who) - before;
        let running = self.machines[who.machine].running(who);
        let Some(networks) = running.map(|running| running.config.networks()) else {
            return Ok(());
        };
        let is_taken = verdict == Verdict::Consumed;
        if leaves(frame, networks) && went != u64::from(is_taken) {
            return Err(Violation(format!(
                "{verdict:?} comes of a datagram, and {went} have gone on"
            )));
        }
        Ok(())
    }

    /// What comes from outside is in frames that their pod takes.
    pub(super) fn check_arrival(
        running: &LeasedNode,
        verdict: Verdict,
        bytes: &[u8],
    ) -> Result<(), Violation> {
        let node = running.node();
        if matches!(verdict, Verdict::Port(_))
            && comes_from_outside(bytes, running.config.networks())
        {
            let checked = packet::check(bytes, node.mtu());
            return checked.map_err(|wrong| Violation(format!("from outside: {wrong}")));
        }
        Ok(())
    }

    /// Something happens to a socket.
    pub(super) fn socket_event(
        &mut self,
        (who, worker): (Who, usize),
        id: FlowId,
        happening: Happening,
    ) -> Result<(), Violation> {
        self.call((who, worker), |path, now, sockets| {
            if let Some(ready) = sockets.happen(id, happening) {
                path.ready(now, id, ready, sockets);
            }
        });
        self.settle(who)
    }

    /// All machines have a way out again.
    pub(super) fn heal_outside(&mut self) -> Result<(), Violation> {
        self.outside.heal(self.queue.now());
        for machine in 0..self.machines.len() {
            if let Some(who) = self.who(machine) {
                for worker in 0..self.workers(who) {
                    self.call((who, worker), |_, _, sockets| sockets.resume());
                }
                self.settle(who)?;
            }
        }
        Ok(())
    }

    /// Has happen what egress has done to sockets, and looks whether all is as it must be.
    pub(super) fn look_outside(&mut self, who: Who, number: usize) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        let worker = &mut running.workers[number];
        let sockets = &mut worker.way_out.sockets;
        for (at, id, happening) in sockets.due.drain(..) {
            self.queue
                .schedule(at, Due::Socket(who, number, id, happening));
        }
        for (id, word) in sockets.words.drain(..) {
            let key = worker.path.egress().key(id);
            self.figures.flows += u64::from(matches!(word, "connects" | "opens"));
            self.log.note(now, || {
                let flow = key.map(|key| format!(" of {} to {}", key.pod, key.remote));
                let flow = flow.unwrap_or_default();
                format!("machine {}: socket {}{flow} {word}", who.machine, id.index)
            });
        }
        if let Some(pod) = running.stray_flow() {
            return Err(Violation(format!(
                "egress of machine {} has a flow of {pod}, which is not attached",
                who.machine
            )));
        }
        check(&mut running.workers[number], &mut self.oracle)
            .map_err(|what| Violation(format!("egress of machine {}: {what}", who.machine)))
    }
}

/// Whether a frame has a datagram to an address outside, which must either go on or be dropped for a
/// reason.
fn leaves(frame: &[u8], networks: Nets) -> bool {
    let Ok(view) = frame::parse(frame) else {
        return false;
    };
    match view.ethertype() {
        EthernetProtocol::Ipv4 => leaves_v4(view.payload(), networks),
        EthernetProtocol::Ipv6 => leaves_v6(view.payload(), networks),
        _ => false,
    }
}

fn leaves_v6(packet: &[u8], networks: Nets) -> bool {
    let (Ok(ip), Ok(upper)) = (Ipv6Packet::new_checked(packet), v6::upper_layer(packet)) else {
        return false;
    };
    let to = ip.dst_addr();
    let is_inside = networks.ipv6().is_none_or(|network| network.contains(&to));
    if is_inside || to.is_multicast() || to.is_unicast_link_local() || upper.fragment.is_some() {
        return false;
    }
    match IpProtocol::from(upper.protocol) {
        IpProtocol::Udp => true,
        IpProtocol::Icmpv6 => packet.get(upper.offset) == Some(&Icmpv6Message::EchoRequest.into()),
        _ => false,
    }
}

fn leaves_v4(packet: &[u8], networks: Nets) -> bool {
    let Ok(ip) = Ipv4Packet::new_checked(packet) else {
        return false;
    };
    let is_inside = |network: Ipv4Net| network.contains(&ip.dst_addr());
    if networks.ipv4().is_some_and(is_inside) || ip.more_frags() || ip.frag_offset() != 0 {
        return false;
    }
    match ip.next_header() {
        IpProtocol::Udp => true,
        IpProtocol::Icmp => Icmpv4Packet::new_checked(ip.payload())
            .is_ok_and(|icmp| icmp.msg_type() == Icmpv4Message::EchoRequest),
        _ => false,
    }
}

fn comes_from_outside(frame: &[u8], networks: Nets) -> bool {
    let Ok(view) = frame::parse(frame) else {
        return false;
    };
    match view.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(view.payload()).map(|ip| ip.src_addr());
            let network = networks.ipv4();
            ip.is_ok_and(|from| network.is_none_or(|network| !network.contains(&from)))
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(view.payload()).map(|ip| ip.src_addr());
            let network = networks.ipv6();
            ip.is_ok_and(|from| {
                let is_inside = network.is_none_or(|network| network.contains(&from));
                !is_inside && !from.is_unicast_link_local()
            })
        }
        _ => false,
    }
}

/// What must be true of egress at any time.
fn check(worker: &mut Worker, oracle: &mut Oracle) -> Result<(), String> {
    if let Some(wrong) = worker.way_out.sockets.wrong.take() {
        return Err(wrong);
    }
    let Worker { path, way_out, .. } = worker;
    let egress = path.egress();
    check_books(egress, way_out)?;
    check_evicted(egress, way_out)?;
    let mut of_pods = BTreeMap::new();
    for info in egress.flows() {
        let pod = info.key.pod.ip();
        let count = of_pods.entry((pod, info.direction)).or_insert(0);
        *count += 1;
        if *count > FLOWS_OF_POD {
            return Err(format!("{pod} has {count} flows"));
        }
        check_flow(egress, way_out, &info, oracle)?;
    }
    for (id, identity) in way_out.sockets.fresh.drain(..) {
        let pod = egress.key(id).map(|key| key.pod.ip());
        if !pod.is_some_and(|pod| oracle.has(identity.sender, pod)) {
            return Err(format!(
                "a datagram of {identity:?} goes out in a flow of {pod:?}"
            ));
        }
        if !oracle.goes_out(identity) {
            return Err(format!("datagram {} goes out again", identity.ping));
        }
    }
    Ok(())
}

/// Flows and sockets are the same ones, and none is lost.
fn check_books(egress: &Egress, way: &WayOut) -> Result<(), String> {
    let (counters, sockets) = (egress.counters(), &way.sockets);
    let open = sockets.iter().count() as u64;
    let has_lost = counters.opened != sockets.made || sockets.made - sockets.closed != open;
    if has_lost || counters.open != open {
        return Err(format!(
            "it counts {counters:?}, where {} sockets were made and {} closed",
            sockets.made, sockets.closed
        ));
    }
    egress.audit()?;
    if open > FLOWS as u64 {
        return Err(format!("it has {open} flows"));
    }
    Ok(())
}

/// Flows make room for others only if they are not in use, or their pod has most.
fn check_evicted(egress: &Egress, way: &mut WayOut) -> Result<(), String> {
    let evicted = egress.counters().evicted;
    let count = evicted - std::mem::replace(&mut way.evicted, evicted);
    let now = egress
        .flows()
        .map(|info| (info.key, info.direction))
        .collect();
    let before = std::mem::replace(&mut way.flows, now);
    let idle = way.sockets.idle.drain(..);
    let idle = idle.filter(|idle| *idle >= EVICTABLE).count() as u64;
    if idle >= count {
        return Ok(());
    }
    let mut shares = BTreeMap::<_, usize>::new();
    for (key, direction) in &before {
        *shares.entry((key.pod.ip(), *direction)).or_default() += 1;
    }
    let most = shares.values().max().copied().unwrap_or_default();
    let mut gone = before.difference(&way.flows);
    // One more may have come since.
    if most < 2 || !gone.any(|(key, direction)| shares[&(key.pod.ip(), *direction)] + 1 >= most) {
        return Err(format!(
            "{count} flows make room, {idle} are idle, and the shares are {shares:?}"
        ));
    }
    Ok(())
}

/// A flow has its own socket, to where it says, and has carried what went through that.
fn check_flow(
    egress: &Egress,
    way: &WayOut,
    info: &FlowInfo,
    oracle: &Oracle,
) -> Result<(), String> {
    let key = info.key;
    let socket = egress.find(&key).and_then(|id| way.sockets.get(id));
    let socket = socket.ok_or_else(|| format!("{key:?} has no socket"))?;
    let to = (!key.is_mapping()).then_some(key.remote);
    if (socket.protocol, socket.to) != (key.protocol, to) {
        return Err(format!("{key:?} has a socket to {:?}", socket.to));
    }
    if to.is_some() != (key.protocol == Protocol::Tcp) {
        return Err(format!("{key:?} depends on its other end"));
    }
    let carried = match &socket.kind {
        Kind::Connection(connection) => {
            if let Some(flow) = connection.flow()
                && oracle.client_of(flow) != Some((key.pod.ip(), Server::at(key.remote.ip())))
            {
                return Err(format!("{key:?} carries flow {flow}"));
            }
            (connection.written, connection.received())
        }
        Kind::Mailbox(mailbox) => (mailbox.written, mailbox.read),
        Kind::Client(client) => client.carried(),
    };
    let is_tcp = key.protocol == Protocol::Tcp;
    if carried != (info.sent, info.received) {
        return Err(format!(
            "{info:?} has carried {carried:?}{}",
            if is_tcp { " bytes of streams" } else { "" }
        ));
    }
    Ok(())
}
