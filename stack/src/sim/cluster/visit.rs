//! Visits: clients of pods' published ports.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use smoltcp::time::Duration;

use super::Cluster;
use crate::datapath::egress::Protocol;
use crate::datapath::port::PortId;
use crate::datapath::published::{Client, PublishedPort};
use crate::sim::client::Client as Visitor;
use crate::sim::due::Who;
use crate::sim::outcome::Violation;
use crate::sim::pod::PORT;

/// Where clients are that are not on a node's host (TEST-NET-3).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
/// The same of IPv6 (RFC 3849).
const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 80);
/// Few, so that two clients have the same port.
const PORTS: u64 = 3;
/// The worker that has published ports.
const FIRST: usize = 0;
/// How often a client tries, and how long it waits.
const ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that go to the pod and come back.
const BYTES: usize = 3_000;

impl Cluster {
    pub(super) fn visit_some(
        &mut self,
        pod: usize,
        bytes: usize,
        is_local: bool,
    ) -> Result<(), Violation> {
        let pods = self.plugged();
        match pods.get(pod % pods.len().max(1)) {
            Some((who, port, address)) => {
                let address = self.published_address((*who, *port), *address, bytes);
                self.visit(*who, address, bytes, is_local).map(drop)
            }
            None => Ok(()),
        }
    }

    /// A client connects to a pod's published port; the number says which flow it is, if there is one.
    fn visit(
        &mut self,
        who: Who,
        pod: IpAddr,
        bytes: usize,
        is_local: bool,
    ) -> Result<Option<u64>, Violation> {
        let machine = &self.machines[who.machine];
        let (local, outside) = match (pod, machine.public_ipv6) {
            (IpAddr::V6(_), Some(local)) => (local.into(), OUTSIDE_V6.into()),
            _ => (machine.public_ip.into(), OUTSIDE.into()),
        };
        let address: IpAddr = if is_local { local } else { outside };
        let port = 40_000 + self.random.below(PORTS) as u16;
        let client = Client {
            address: SocketAddr::new(address, port),
            local,
        };
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(None);
        };
        let gateway = running.node().gateway();
        let gateway = gateway.and_then(|both| match pod {
            IpAddr::V4(_) => both.ipv4().map(IpAddr::V4),
            IpAddr::V6(_) => both.ipv6().map(IpAddr::V6),
        });
        let networks = running.config.networks();
        let network = match pod {
            IpAddr::V4(_) => networks.ipv4().map(IpNet::V4),
            IpAddr::V6(_) => networks.ipv6().map(IpNet::V6),
        };
        let Some(network) = network else {
            return Ok(None);
        };
        let published = PublishedPort {
            protocol: Protocol::Tcp,
            pod: SocketAddr::new(pod, PORT),
            network,
        };
        let flow = self.oracle.new_flow();
        let seen = self.call((who, FIRST), |path, now, sockets| {
            let id = path.accept(now, published, client, &[], sockets).ok()?;
            let key = path.egress().key(id)?;
            sockets.adopt(id, Visitor::new(flow, bytes), &key);
            Some(key.remote)
        });
        self.settle(who)?;
        let Some(seen) = seen.flatten() else {
            return Ok(None);
        };
        if seen != client.address && Some(seen.ip()) != gateway || is_local && seen.ip() == local {
            return Err(Violation(format!("{pod} sees {client:?} as {seen}")));
        }
        Ok(Some(flow))
    }

    /// All pods are reached from outside and from their own host.
    pub(in crate::sim) fn visit_all(&mut self) -> Result<(), Violation> {
        for (number, (who, port, pod)) in self.plugged().into_iter().enumerate() {
            let pod = self.published_address((who, port), pod, number);
            for is_local in [false, true] {
                self.visit_until_served(who, pod, is_local)?;
            }
        }
        Ok(())
    }

    /// The address of a pod that has the published port: that of IPv6 for even numbers, if it has one.
    fn published_address(
        &self,
        (who, port): (Who, PortId),
        address: Ipv4Addr,
        number: usize,
    ) -> IpAddr {
        let ipv6 = self.machines[who.machine].pod_v6(|it, _| it == port);
        match ipv6.filter(|_| number.is_multiple_of(2)) {
            Some(address) => address.into(),
            None => address.into(),
        }
    }

    /// Several times, because a flow may have to wait until another may make room for it.
    fn visit_until_served(
        &mut self,
        who: Who,
        pod: IpAddr,
        is_local: bool,
    ) -> Result<(), Violation> {
        for _ in 0..ROUNDS {
            let flow = self.visit(who, pod, BYTES, is_local)?;
            let end = self.queue.now() + PATIENCE;
            while self.queue.now() < end {
                self.run(Duration::from_millis(500))?;
                let running = self.machines[who.machine].running(who);
                let sockets = running.map(|running| &running.workers[FIRST].way_out.sockets);
                if sockets.is_some_and(|it| flow.is_some_and(|flow| it.served.contains(&flow))) {
                    self.figures.visits += 1;
                    return Ok(());
                }
            }
        }
        Err(Violation(format!(
            "{ROUNDS} clients of the published port of {pod} are not served"
        )))
    }
}
