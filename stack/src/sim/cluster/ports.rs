//! Ports: how pods are attached, told what to do, and reached.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use muslin_encap::tunnel::vxlan::VtepMac;
use smoltcp::time::Duration;
use smoltcp::wire::EthernetProtocol;

use super::Cluster;
use crate::control::ipam::PodName;
use crate::control::pods::Request;
use crate::datapath::frame;
use crate::datapath::port::{Attachment, PortId, Rates};
use crate::sim::constants::LOCAL;
use crate::sim::device::{Assigned, Identity, Order, Report};
use crate::sim::due::{Due, Timer, Who};
use crate::sim::invariants;
use crate::sim::machine::Plugged;
use crate::sim::outcome::Violation;
use crate::sim::packet::in_words;
use crate::sim::pod::PORT;

/// The longest payload of a ping or datagram in IPv6, in bytes.
pub(super) const LONGEST_V6: usize = 1_200;
/// The longest that a pod takes to be attached again after a restart, in milliseconds.
const REATTACHING: u64 = 3_000;

impl Cluster {
    /// Attaches a device of a kind, now and whenever a node runs on its machine.
    pub(in crate::sim) fn attach(&mut self, machine: usize, kind: usize) -> Result<(), Violation> {
        let pods = &mut self.machines[machine].pods;
        let names = (1..).filter_map(|number| format!("pod-{number}").parse::<PodName>().ok());
        let Some(name) = names.into_iter().find(|name| !pods.contains_key(name)) else {
            return Ok(());
        };
        pods.insert(name.clone(), kind);
        if let Some(who) = self.who(machine) {
            self.plug(who, &name)?;
            self.settle(who)?;
        }
        Ok(())
    }

    /// Attaches a pod of the process before, as soon as its side has noticed.
    pub(super) fn plug_later(&mut self, who: Who, name: PodName) {
        let at = self.queue.now() + Duration::from_millis(self.random.below(REATTACHING));
        if let Some(running) = self.machines[who.machine].running(who) {
            running.unplugged.insert(name.clone());
            self.queue.schedule(at, Due::Plug(who, name));
        }
    }

    pub(super) fn plug_again(&mut self, who: Who, name: &PodName) -> Result<(), Violation> {
        let running = self.machines[who.machine].running(who);
        if running.is_some_and(|running| running.unplugged.remove(name)) {
            self.plug(who, name)?;
            self.settle(who)?;
        }
        Ok(())
    }

    pub(super) fn plug(&mut self, who: Who, name: &PodName) -> Result<(), Violation> {
        let machine = &mut self.machines[who.machine];
        let kind = machine.pods.get(name);
        let Some(kind) = kind.and_then(|kind| self.kinds.get(*kind)) else {
            return Ok(());
        };
        let (Some(disk), Some(process)) = (&mut machine.disk, &mut machine.process) else {
            return Ok(());
        };
        let Some(running) = &mut process.running else {
            return Ok(());
        };
        let mut random = self.random.clone();
        let mac = VtepMac::from_random(random.mac()).get();
        let request = Request {
            name: Some(name.clone()),
            mac: Some(mac),
            ..Request::default()
        };
        // The subnet may be too small for all of them.
        let Ok((_, pod)) = running.pods.attach(request, ()) else {
            return Ok(());
        };
        let addresses = pod.address;
        let Some(address) = addresses.ipv4() else {
            return Ok(());
        };
        let port = pod.port;
        disk.addresses = Some(running.pods.memory());
        let seed = random.number();
        self.random = random;
        let net_v6 = running.key.nets().of_hosts(addresses);
        let net_v6 = net_v6.and_then(|nets| nets.ipv6());
        let gateway_v6 = running.node().gateway().and_then(|it| it.ipv6());
        let sender = self.oracle.new_sender(addresses);
        let assigned = Assigned {
            mac,
            address,
            subnet: running.ipv4(),
            gateway: running.node().gateway_ipv4(),
            ipv6: net_v6.zip(gateway_v6),
            gateway_mac: running.gateway_mac,
            mtu: running.node().mtu(),
            sender,
            seed,
        };
        let attachment = Attachment {
            mac,
            addresses: addresses.iter().collect(),
            guarded: kind.is_guarded,
            rates: Rates::default(),
        };
        running.each_node(|node| node.attach(port, attachment.clone()));
        for address in addresses.iter() {
            running.awaited.0.remove(&address);
        }
        let plugged = Plugged {
            name: name.clone(),
            answers: kind.answers,
            mac,
            address,
            address_v6: addresses.ipv6(),
            sender,
            device: kind.make(&assigned),
            timer: Timer::default(),
            waiting: running.workers.iter().map(|_| VecDeque::new()).collect(),
            idle_turns: 0,
        };
        running.ports.insert(port, plugged);
        running.name_pods(self.queue.now());
        self.drive_names(who)?;
        self.poll_device(who, port)
    }

    /// Detaches a machine's pod for good, if there is one.
    pub(super) fn detach(&mut self, machine: usize, pod: usize) -> Result<(), Violation> {
        let pods = &mut self.machines[machine].pods;
        let Some(name) = pods.keys().nth(pod).cloned() else {
            return Ok(());
        };
        pods.remove(&name);
        let Some(who) = self.who(machine) else {
            return Ok(());
        };
        let port = self.machines[machine].running(who).and_then(|running| {
            running.unplugged.remove(&name);
            let mut ports = running.ports.iter();
            let port = ports.find(|(_, plugged)| plugged.name == name);
            port.map(|(port, _)| *port)
        });
        if let Some(port) = port {
            self.unplug(who, port, &name)?;
        }
        self.settle(who)
    }

    fn unplug(&mut self, who: Who, port: PortId, name: &PodName) -> Result<(), Violation> {
        let mut was_attached = true;
        for worker in 0..self.workers(who) {
            let is_there = self.call((who, worker), |path, _, sockets| {
                sockets.pod_is_gone = true;
                let is_there = path.detach(port, sockets);
                sockets.pod_is_gone = false;
                is_there
            });
            was_attached &= is_there == Some(true);
        }
        self.settle(who)?;
        let machine = &mut self.machines[who.machine];
        let Some(running) = machine.running(who) else {
            return Ok(());
        };
        let plugged = running.ports.remove(&port);
        let mac = plugged.map(|plugged| plugged.mac);
        running.gone.extend(mac);
        running.pods.detach(name);
        let memory = running.pods.memory();
        running.name_pods(self.queue.now());
        if !was_attached {
            return Err(Violation(format!("port {port} was not attached")));
        }
        if let Some(disk) = &mut machine.disk {
            disk.addresses = Some(memory);
        }
        self.drive_names(who)
    }

    /// All devices that are attached and answer, with their addresses.
    pub(in crate::sim) fn plugged(&self) -> Vec<(Who, PortId, Ipv4Addr)> {
        let mut all = Vec::new();
        for machine in 0..self.machines.len() {
            let Some(who) = self.who(machine) else {
                continue;
            };
            let process = self.machines[machine].process.as_ref();
            if let Some(running) = process.and_then(|process| process.running.as_ref()) {
                let pods = running.ports.iter().filter(|(_, plugged)| plugged.answers);
                all.extend(pods.map(|(port, plugged)| (who, *port, plugged.address)));
            }
        }
        all
    }

    /// Gives an order to a pod.
    pub(super) fn order(&mut self, who: Who, port: PortId, order: Order) -> Result<(), Violation> {
        let now = self.queue.now();
        let running = self.machines[who.machine].running(who);
        if let Some(plugged) = running.and_then(|running| running.ports.get_mut(&port)) {
            plugged.device.order(now, order);
            self.poll_device(who, port)?;
        }
        Ok(())
    }

    /// Lets a pod talk to an address over TCP; the number says which flow it is.
    pub(in crate::sim) fn talk(
        &mut self,
        (who, port): (Who, PortId),
        to: Ipv4Addr,
        bytes: usize,
    ) -> Result<u64, Violation> {
        let flow = self.oracle.new_flow();
        let to = self.version_of((who, port), to, flow);
        let order = Order::Talk {
            to: SocketAddr::new(to, PORT),
            flow,
            bytes,
            ends_first: false,
        };
        self.order(who, port, order)?;
        Ok(flow)
    }

    /// Lets a pod ping an address; the number says which ping it is.
    pub(super) fn ping(
        &mut self,
        (who, port): (Who, PortId),
        to: Ipv4Addr,
        bytes: usize,
    ) -> Result<u64, Violation> {
        let Some(identity) = self.new_identity(who, port) else {
            return Ok(0);
        };
        let to = self.version_of((who, port), to, identity.ping);
        // A pod's stack fragments nothing in IPv6.
        let bytes = match to {
            IpAddr::V4(_) => bytes,
            IpAddr::V6(_) => bytes.min(LONGEST_V6),
        };
        let order = Order::Ping {
            to,
            identity,
            bytes,
        };
        self.order(who, port, order)?;
        Ok(identity.ping)
    }

    /// The address by which a pod reaches another: that of IPv6 every other time, if both have one and
    /// their machines' interfaces have room for it.
    fn version_of(&self, (who, port): (Who, PortId), to: Ipv4Addr, number: u64) -> IpAddr {
        let own = &self.machines[who.machine];
        let own = own.pod_v6(|it, _| it == port);
        let mut others = self.machines.iter();
        let theirs = others.find_map(|machine| machine.pod_v6(|_, it| it.address == to));
        match own.and(theirs) {
            Some(address) if number.is_multiple_of(2) => address.into(),
            _ => to.into(),
        }
    }

    pub(super) fn new_identity(&mut self, who: Who, port: PortId) -> Option<Identity> {
        let running = self.machines[who.machine].running(who)?;
        let sender = running.ports.get(&port)?.sender;
        let ping = self.oracle.new_ping();
        Some(Identity { ping, sender })
    }

    pub(super) fn poll_device(&mut self, who: Who, port: PortId) -> Result<(), Violation> {
        let now = self.queue.now();
        let running = self.machines[who.machine].running(who);
        let Some(plugged) = running.and_then(|running| running.ports.get_mut(&port)) else {
            return Ok(());
        };
        let queue = &mut self.queue;
        for sent in plugged.device.poll(now) {
            queue.schedule(now + LOCAL, Due::FromDevice(who, port, sent));
        }
        if let Some(at) = plugged.device.poll_at(now) {
            // What is due at once was not due a moment ago: smoltcp says so of what waits for ARP.
            let at = at.max(now + Duration::from_millis(1));
            if plugged.timer.arm(at) {
                queue.schedule(at, Due::Device(who, port));
            }
        }
        for report in plugged.device.reports() {
            if let Report::Failed { flow, why } = report {
                self.check_failure(who, flow, why)?;
            }
            self.oracle.take_report(now, report, &mut self.figures)?;
        }
        Ok(())
    }

    pub(super) fn deliver(
        &mut self,
        who: Who,
        port: PortId,
        frame: &[u8],
    ) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        let Some(plugged) = running.ports.get(&port) else {
            return Ok(());
        };
        self.figures.frames += 1;
        let kind = frame::parse(frame).map(|view| view.ethertype());
        self.figures.frames_v6 += u64::from(kind == Ok(EthernetProtocol::Ipv6));
        let place = (who.machine as u64) << 32 | u64::from(port.0);
        self.log.bytes(now, place, frame);
        self.log.note(now, || {
            let (machine, frame) = (who.machine, in_words(frame));
            format!("port {port} of machine {machine} gets {frame}")
        });
        self.oracle.check_frame(plugged, frame)?;
        invariants::sender(running, frame)?;
        let Some(plugged) = running.ports.get_mut(&port) else {
            return Ok(());
        };
        plugged.device.receive(now, frame);
        self.poll_device(who, port)
    }
}
