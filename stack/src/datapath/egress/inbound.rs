//! Flows that begin on the host's side, with a pod as their server: published ports and proxies.
//!
//! The host's socket is there first. Once the pod has answered, such a flow is like any other.

use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};

use smoltcp::time::Instant;

use super::Egress;
use super::flow::Direction;
use super::host::{FlowId, Host, HostError, Ready};
use super::key::{EPHEMERAL, FlowKey, Key, Protocol, plain, quoted};
use super::output::Outbox;
use super::state::{Dial, Flow, LATER, Step};
use super::table::Moved;
use super::tcp::{Outcome, Progress};
use crate::datapath::gateway;
use crate::datapath::hash::Seed;
use crate::drops::DropReason;

impl Egress {
    /// Begins a TCP connection to a pod, of this node or of another, for a socket that the host has
    /// already and gives this flow. What becomes of it [`Host::dialled`] tells, later. The pod gets
    /// `preface` before all that the socket has for it.
    ///
    /// The pod sees `key.remote` as its client: an address outside the overlay or, for any pod of
    /// the cluster, one of the gateway's. A port is chosen if that is 0; [`Egress::key`] tells it.
    ///
    /// # Errors
    /// `EgressTableFull`, `EgressInUse` if there is such a flow or no port is free, or `EgressFamily`.
    pub fn dial(
        &mut self,
        now: Instant,
        key: FlowKey,
        preface: &[u8],
        host: &mut impl Host,
    ) -> Result<FlowId, DropReason> {
        let key = self.key_in(key)?;
        self.awake(now, |egress, now, out| {
            egress.begin_dial(now, key, preface, host, out)
        })
    }

    fn begin_dial(
        &mut self,
        now: Instant,
        mut key: Key,
        preface: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Result<FlowId, DropReason> {
        if key.remote.port() == 0 {
            key.remote.set_port(self.choose_port(key)?);
        }
        if key.protocol != Protocol::Tcp || key.pod.port() == 0 || self.flows.find(&key).is_some() {
            return Err(DropReason::EgressInUse);
        }
        self.make_room(now, key.pod.ip(), Direction::In, host, out)?;
        self.counters.opened += 1;
        self.counters.inbound += 1;
        let mut connection = self.ends.dial(now, key, self.memory.take(key.pod.ip()));
        out.asks = Some(self.flows.next_id());
        self.ends.transmit(now, &mut connection, out);
        out.asks = None;
        let dial = Dial {
            connection,
            preface: preface.into(),
            fails: None,
        };
        let id = self
            .flows
            .insert(now, Direction::In, key, Flow::Dialling(Box::new(dial)));
        self.flows.schedule(id, now + LATER);
        Ok(id)
    }

    /// Sends a pod a datagram from the host's side. It begins a flow if there is none with these
    /// ends; what the pod answers goes to [`Host::write`] of that flow.
    ///
    /// # Errors
    /// `EgressTableFull`, `EgressMalformed` for a datagram or a port that cannot be, or `EgressFamily`.
    pub fn deliver(
        &mut self,
        now: Instant,
        key: FlowKey,
        payload: &[u8],
        host: &mut impl Host,
    ) -> Result<FlowId, DropReason> {
        let key = self.key_in(key)?;
        self.awake(now, |egress, now, out| {
            egress.take_delivery(now, key, payload, host, out)
        })
    }

    fn take_delivery(
        &mut self,
        now: Instant,
        key: Key,
        payload: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Result<FlowId, DropReason> {
        if key.protocol != Protocol::Udp || key.pod.port() == 0 || key.remote.port() == 0 {
            return Err(DropReason::EgressMalformed);
        }
        let id = match self.flows.find(&key) {
            Some(id) => id,
            None => {
                self.make_room(now, key.pod.ip(), Direction::In, host, out)?;
                self.counters.inbound += 1;
                self.add_datagrams(now, Direction::In, key, Flow::DATAGRAMS)
            }
        };
        let moved = Moved {
            sent: 0,
            received: payload.len(),
        };
        self.flows.count(id, now, moved);
        self.datagrams.deliver(key, payload, out)?;
        Ok(id)
    }

    /// Says that UDP flows with this port of a pod may begin on the host's side, here or where
    /// another has them.
    ///
    /// # Errors
    /// `EgressFamily` if pods have no flows of this IP version.
    pub fn expect_datagrams(&mut self, pod: SocketAddr) -> Step {
        if !self.config.carries(pod) {
            return Err(DropReason::EgressFamily);
        }
        self.published.insert(plain(pod));
        Ok(())
    }

    /// The gateway's address by which a pod knows clients that have none that it could answer.
    pub(in crate::datapath) fn gateway(&self, pod: IpAddr) -> Option<IpAddr> {
        let subnets = self.config.subnets?;
        match pod {
            IpAddr::V4(_) => Some(gateway::address(subnets.ipv4()?).into()),
            IpAddr::V6(_) => Some(gateway::address_v6(subnets.ipv6()?).into()),
        }
    }

    /// The key of a flow that begins on the host's side.
    fn key_in(&self, key: FlowKey) -> Result<Key, DropReason> {
        match self.config.carries(key.pod) && !key.is_mapping() {
            true => key.try_into(),
            false => Err(DropReason::EgressFamily),
        }
    }

    /// The flow by which a packet with these ends has come to a pod.
    pub(super) fn flow_to(&self, key: &Key) -> Option<FlowId> {
        let mapping = || self.flows.find(&self.mapping_of(key));
        self.flows.find(key).or_else(mapping)
    }

    /// A port for a flow that differs in it from all others with its pod (RFC 6056 section 3.3.3).
    ///
    /// # Errors
    /// `EgressInUse` if there is none, or `EgressFamily`.
    pub fn free_port(&mut self, key: FlowKey) -> Result<u16, DropReason> {
        self.choose_port(self.key_in(key)?)
    }

    fn choose_port(&mut self, mut key: Key) -> Result<u16, DropReason> {
        let offset = Seed(self.config.random_seed).hash_one((key.pod, key.remote.ip()));
        self.ports_chosen += 1;
        let first = offset.wrapping_add(self.ports_chosen);
        let count = EPHEMERAL.len() as u64;
        let ports = (0..count).map(|i| EPHEMERAL.start() + (first.wrapping_add(i) % count) as u16);
        let mut ports = ports.into_iter();
        let free = ports.find(|port| {
            key.remote.set_port(*port);
            self.flows.find(&key).is_none() && !self.predecessors.contains(&key)
        });
        free.ok_or(DropReason::EgressInUse)
    }

    /// Looks how far a pod is with its answer.
    pub(super) fn dialling(
        &mut self,
        now: Instant,
        id: FlowId,
        host: &mut impl Host,
        out: &mut Outbox,
    ) {
        let Some((_, Flow::Dialling(dial))) = self.flows.get_mut(id) else {
            return;
        };
        let connection = &mut dial.connection;
        out.asks = Some(id);
        let outcome = self.ends.transmit(now, connection, out);
        out.asks = None;
        match (connection.progress(), dial.fails) {
            (Progress::Connected, _) => self.answered(now, id, host, out),
            (Progress::Refused, error) => {
                self.give_up(id, error.unwrap_or(HostError::Refused), host);
            }
            (Progress::Pending, Some(error)) => self.give_up(id, error, host),
            (Progress::Pending, None) => {
                if let Outcome::Open(Some(due)) = outcome {
                    self.flows.schedule(id, due.max(now + LATER));
                }
            }
        }
    }

    fn answered(&mut self, now: Instant, id: FlowId, host: &mut impl Host, out: &mut Outbox) {
        let Some((_, flow)) = self.flows.get_mut(id) else {
            return;
        };
        // Whatever is put in its place does not stay there.
        let Flow::Dialling(dial) = std::mem::replace(flow, Flow::DATAGRAMS) else {
            return;
        };
        let Dial {
            mut connection,
            preface,
            ..
        } = *dial;
        if !connection.begin_with(&preface) {
            connection.abort();
        }
        *flow = Flow::Connected {
            connection: Box::new(connection),
            ready: Ready {
                readable: true,
                writable: true,
            },
        };
        self.flows.count(id, now, Moved::default());
        self.flows.schedule(id, now + self.config.limits.tcp_idle);
        host.dialled(id, Ok(()));
        self.look_after(now, id, host, out);
    }

    /// A packet for a pod that is to answer was dropped.
    pub(super) fn unreachable(&mut self, now: Instant, id: FlowId, reason: DropReason) {
        if let Some(error) = unreachable(reason)
            && let Some((_, Flow::Dialling(dial))) = self.flows.get_mut(id)
        {
            dial.fails.get_or_insert(error);
            self.flows.schedule(id, now + LATER);
        }
    }

    /// Whether `sender` may tell what becomes of packets to the pod of a flow: a pod speaks for itself,
    /// and another node's routers for their pods.
    pub(super) fn may_tell(&self, key: &Key, sender: IpAddr) -> bool {
        match self.config.subnets {
            Some(_) if self.is_local(*key) => sender == key.pod.ip(),
            Some(_) => !self.config.is_in_subnet(sender),
            None => true,
        }
    }

    /// Takes an ICMP error from `sender` that quotes `offender`, which went to a pod.
    pub(super) fn take_unreachable(
        &mut self,
        sender: IpAddr,
        code: u8,
        offender: &[u8],
        host: &mut impl Host,
    ) -> Step {
        let key = quoted(offender).ok_or(DropReason::EgressProtocol)?;
        let id = self.flow_to(&key).ok_or(DropReason::EgressProtocol)?;
        if !self.may_tell(&key, sender) {
            return Err(DropReason::EgressProtocol);
        }
        // About a connection that is there it is a passing one (RFC 1122 section 4.2.3.9).
        if let Some((_, Flow::Dialling(_))) = self.flows.get_mut(id) {
            let error = match sender {
                IpAddr::V4(_) => told(code),
                IpAddr::V6(_) => told_v6(code),
            };
            self.give_up(id, error, host);
        }
        Ok(())
    }
}

/// What a code of "destination unreachable" says (RFC 792, RFC 1812 section 5.2.7.1).
const fn told(code: u8) -> HostError {
    match code {
        0 | 6 | 11 => HostError::NetUnreachable,
        2 | 3 => HostError::Refused,
        9 | 10 | 13 => HostError::NotPermitted,
        _ => HostError::HostUnreachable,
    }
}

/// What a code of ICMPv6's "destination unreachable" says (RFC 4443 section 3.1).
const fn told_v6(code: u8) -> HostError {
    match code {
        0 => HostError::NetUnreachable,
        4 => HostError::Refused,
        1 | 5 | 6 => HostError::NotPermitted,
        _ => HostError::HostUnreachable,
    }
}

/// What it means for a connection that the router drops its SYN for `reason`.
const fn unreachable(reason: DropReason) -> Option<HostError> {
    match reason {
        DropReason::NoRoute => Some(HostError::NetUnreachable),
        DropReason::HostUnreachable | DropReason::NextHopUnreachable | DropReason::PeerGone => {
            Some(HostError::HostUnreachable)
        }
        // Another time it may pass.
        _ => None,
    }
}
