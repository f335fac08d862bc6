//! Errands: what pods want of servers outside, and what must come of it.

use std::net::IpAddr;

use smoltcp::time::Duration;

use super::Cluster;
use super::ports::LONGEST_V6;
use crate::datapath::egress::Protocol;
use crate::datapath::port::PortId;
use crate::sim::device::{Identity, Order};
use crate::sim::due::Who;
use crate::sim::event::Event;
use crate::sim::oracle::{Errand, Flow};
use crate::sim::outcome::Violation;
use crate::sim::outside::Server;

/// How long pods may take with all their errands: they have patience for a minute without a word.
const PATIENCE: u64 = 300;
/// How long a pod may wait for a refusal: its stack asks for one neighbour a second.
const REFUSAL: Duration = Duration::from_secs(10);
/// How long a connection may stay in tables that is over at both ends.
const FAREWELL: Duration = Duration::from_secs(60);
/// Bytes that go out and come back.
const BYTES: usize = 3_000;
/// How often a server is asked by datagrams that may be lost.
const ROUNDS: usize = 5;

impl Cluster {
    /// Sends a pod on an errand.
    pub(super) fn send_out(&mut self, event: &Event) -> Result<(), Violation> {
        let pods = self.plugged();
        let pick = |number: usize| pods.get(number % pods.len().max(1)).copied();
        match *event {
            Event::Fetch {
                pod,
                server,
                count,
                bytes,
                ends_first,
            } => {
                if let Some((who, port, _)) = pick(pod) {
                    for _ in 0..count {
                        self.fetch((who, port), server, bytes, ends_first)?;
                    }
                }
            }
            Event::Query {
                pod,
                server,
                protocol,
                count,
                bytes,
            } => {
                if let Some((who, port, _)) = pick(pod) {
                    for _ in 0..count {
                        self.query((who, port), server, bytes, protocol)?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Lets a pod exchange bytes with a server over TCP; the number says which flow it is.
    pub(in crate::sim) fn fetch(
        &mut self,
        (who, port): (Who, PortId),
        server: Server,
        bytes: usize,
        ends_first: bool,
    ) -> Result<Option<u64>, Violation> {
        let since = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(None);
        };
        let Some(plugged) = running.ports.get(&port) else {
            return Ok(None);
        };
        let plugged_address = plugged.address;
        let crowded = running.crowded();
        let flow = self.oracle.new_flow();
        let machine = &self.machines[who.machine];
        let own = machine.pod_v6(|it, _| it == port);
        let own = own.filter(|_| flow.is_multiple_of(2));
        let errand = Errand {
            who,
            port,
            address: own.map_or(plugged_address.into(), IpAddr::V6),
            server,
            since,
            crowded,
            done: None,
        };
        self.oracle.errands.insert(flow, errand);
        let order = Order::Talk {
            to: server.reached(own.is_some()),
            flow,
            bytes,
            ends_first,
        };
        self.order(who, port, order)?;
        Ok(Some(flow))
    }

    /// Lets a pod ask a server by a datagram or an echo request; the number says which it is.
    pub(super) fn query(
        &mut self,
        (who, port): (Who, PortId),
        server: Server,
        bytes: usize,
        protocol: Protocol,
    ) -> Result<u64, Violation> {
        let Some(identity) = self.new_identity(who, port) else {
            return Ok(0);
        };
        let Identity { ping, .. } = identity;
        let own = self.machines[who.machine].pod_v6(|it, _| it == port);
        let by_ipv6 = own.is_some() && ping.is_multiple_of(2);
        let to = server.reached(by_ipv6);
        // A pod's stack fragments nothing in IPv6.
        let bytes = match by_ipv6 {
            true => bytes.min(LONGEST_V6),
            false => bytes,
        };
        let order = match protocol {
            Protocol::Ping => Order::Ping {
                to: to.ip(),
                identity,
                bytes,
            },
            Protocol::Tcp | Protocol::Udp => Order::Query {
                to,
                identity,
                bytes,
            },
        };
        self.order(who, port, order)?;
        Ok(ping)
    }

    /// A pod's connection has failed: to a server that is well it must not, and with one that refuses
    /// it must at once, unless its flow had to make room, there was no way out, or its
    /// machine slept.
    pub(super) fn check_failure(
        &mut self,
        who: Who,
        flow: u64,
        why: &str,
    ) -> Result<(), Violation> {
        let Some(errand) = self.oracle.errands.get(&flow).copied() else {
            return Ok(());
        };
        let running = self.machines[who.machine].running(who);
        let is_crowded = running.is_some_and(|running| running.crowded() > errand.crowded);
        let was_cut = self.outside.was_cut(who.machine, errand.since);
        let took = self.queue.now() - errand.since;
        let is_late = errand.server == Server::Refuses && took > REFUSAL;
        let slept = self.has_slept(who.machine, errand.since);
        if !(errand.server.is_fair() || is_late) || is_crowded || was_cut || slept {
            return Ok(());
        }
        Err(Violation(format!(
            "{} cannot talk to {} in flow {flow}, after {took}: {why}",
            errand.address, errand.server
        )))
    }

    /// Waits until pods are through with what they have begun.
    pub(in crate::sim) fn await_errands(&mut self) -> Result<(), Violation> {
        for _ in 0..PATIENCE {
            if self.unfinished().is_none() {
                return Ok(());
            }
            self.run(Duration::from_secs(1))?;
        }
        match self.unfinished() {
            None => Ok(()),
            Some((flow, errand)) => Err(Violation(format!(
                "{} still talks to {} after {PATIENCE} s in flow {flow}",
                errand.address, errand.server
            ))),
        }
    }

    /// An errand of a pod that is still there.
    fn unfinished(&self) -> Option<(u64, Errand)> {
        let is_open = |flow: u64| self.oracle.flow(flow) == Flow::Open;
        let mut open = self
            .oracle
            .errands
            .iter()
            .filter(|(flow, _)| is_open(**flow));
        let open = open.find(|(_, errand)| {
            let process = self.machines[errand.who.machine].process.as_ref();
            let process = process.filter(|process| process.number == errand.who.process);
            let running = process.and_then(|process| process.running.as_ref());
            running.is_some_and(|running| running.ports.contains_key(&errand.port))
        });
        open.map(|(flow, errand)| (*flow, *errand))
    }

    /// All pods reach a good server, over TCP, by datagrams and by echo requests.
    pub(in crate::sim) fn go_out_all(&mut self) -> Result<(), Violation> {
        let pods = self.plugged();
        for (number, (who, port, _)) in pods.iter().enumerate() {
            self.fetch((*who, *port), Server::Good, BYTES, number % 2 == 0)?;
            self.run(Duration::from_millis(20))?;
        }
        self.await_errands()?;
        for protocol in [Protocol::Udp, Protocol::Ping] {
            self.ask_good_server(protocol)?;
        }
        self.run(FAREWELL)?;
        self.check_farewells()
    }

    /// Several times, because a flow may have to wait until another may make room for it.
    fn ask_good_server(&mut self, protocol: Protocol) -> Result<(), Violation> {
        let mut pods = self.plugged();
        for _ in 0..ROUNDS {
            let mut asked = Vec::new();
            for (who, port, _) in &pods {
                asked.push(self.query((*who, *port), Server::Good, 64, protocol)?);
            }
            self.run(Duration::from_secs(11))?;
            let mut asked = asked.into_iter();
            pods.retain(|_| !asked.next().is_some_and(|it| self.oracle.is_answered(it)));
        }
        match pods.first() {
            None => Ok(()),
            Some((.., from)) => Err(Violation(format!(
                "{ROUNDS} questions by {protocol} from {from} to {} have no answer",
                Server::Good
            ))),
        }
    }

    /// Connections that were brought to their end are in no table.
    pub(in crate::sim) fn check_farewells(&self) -> Result<(), Violation> {
        let now = self.queue.now();
        for (number, machine) in self.machines.iter().enumerate() {
            let process = machine.process.as_ref();
            let running = process.and_then(|process| process.running.as_ref());
            let workers = running.into_iter().flat_map(|running| &running.workers);
            for flow in workers.flat_map(|worker| worker.way_out.sockets.streams()) {
                let done = self.oracle.errands.get(&flow).and_then(|it| it.done);
                if done.is_some_and(|done| done + FAREWELL <= now)
                    && !self.outside.was_cut(number, done.unwrap_or(now))
                {
                    return Err(Violation(format!(
                        "machine {number} keeps flow {flow}, which is over"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Nothing has gone out for longer than any flow may be idle: all tables are empty.
    pub(in crate::sim) fn check_idle(&self) -> Result<(), Violation> {
        for (number, machine) in self.machines.iter().enumerate() {
            let process = machine.process.as_ref();
            let running = process.and_then(|process| process.running.as_ref());
            let workers = running.into_iter().flat_map(|running| &running.workers);
            let mut flows = workers.flat_map(|worker| worker.path.egress().flows());
            if let Some(info) = flows.next() {
                return Err(Violation(format!(
                    "machine {number} has a flow that is idle for a day: {info:?}"
                )));
            }
        }
        Ok(())
    }
}
