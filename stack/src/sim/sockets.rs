//! A simulated host's sockets, one for each flow of egress, with a server at the other end of each.
//!
//! Events come as from an edge-triggered epoll: one for each change, with all that the socket is
//! ready for when it is read. They may come when their socket is closed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use smoltcp::time::{Duration, Instant};

use super::client::Client;
use super::constants::{LOCAL, METADATA, TUNNEL};
use super::device::Identity;
use super::due::Happening;
use super::mailbox::Mailbox;
use super::outside::{Script, Server};
use super::random::{Random, Stream};
use super::stream::Stream as Connection;
use crate::datapath::egress::{
    Complaint, FlowId, FlowKey, Host, HostError, Marks, Protocol, Ready,
};

/// The sockets of a node.
pub(super) struct Sockets {
    /// When egress calls.
    pub(super) now: Instant,
    /// Whether there is no way out.
    pub(super) is_cut: bool,
    /// Whether flows end because their pod has gone.
    pub(super) pod_is_gone: bool,
    /// What is to happen.
    pub(super) due: Vec<(Instant, FlowId, Happening)>,
    /// What egress has done, in words.
    pub(super) words: Vec<(FlowId, &'static str)>,
    /// What it has done wrong.
    pub(super) wrong: Option<String>,
    /// Sockets that were made, and how many of them are closed.
    pub(super) made: u64,
    pub(super) closed: u64,
    /// How long those were not used that were reset since somebody has looked.
    pub(super) idle: Vec<Duration>,
    /// Datagrams that went out.
    pub(super) datagrams: u64,
    /// Those that were not checked yet.
    pub(super) fresh: Vec<(FlowId, Identity)>,
    /// Flows of clients that got everything back.
    pub(super) served: BTreeSet<u64>,
    sockets: BTreeMap<FlowId, Socket>,
    /// All flows that ever had one.
    known: BTreeSet<FlowId>,
    random: Random,
}

/// A socket.
pub(super) struct Socket {
    pub(super) protocol: Protocol,
    /// The other end, if there is one.
    pub(super) to: Option<SocketAddr>,
    /// When it was last used.
    used: Instant,
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    Connection(Box<Connection>),
    Mailbox(Mailbox),
    /// The other end has begun it.
    Client(Box<Client>),
}

impl Sockets {
    pub(super) fn new(seed: u64, now: Instant) -> Self {
        Self {
            now,
            is_cut: false,
            pod_is_gone: false,
            due: Vec::new(),
            words: Vec::new(),
            wrong: None,
            made: 0,
            closed: 0,
            idle: Vec::new(),
            datagrams: 0,
            fresh: Vec::new(),
            served: BTreeSet::new(),
            sockets: BTreeMap::new(),
            known: BTreeSet::new(),
            random: Random::new(seed, Stream::Outside),
        }
    }

    pub(super) fn get(&self, id: FlowId) -> Option<&Socket> {
        self.sockets.get(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (FlowId, &Socket)> {
        self.sockets.iter().map(|(id, socket)| (*id, socket))
    }

    /// The flows of connections, as far as clients have said which they are.
    pub(super) fn streams(&self) -> impl Iterator<Item = u64> {
        self.sockets
            .values()
            .filter_map(|socket| match &socket.kind {
                Kind::Connection(connection) => connection.flow(),
                Kind::Client(client) => Some(client.flow),
                Kind::Mailbox(_) => None,
            })
    }

    /// A client has connected to a published port, and its flow to the pod begins.
    pub(super) fn adopt(&mut self, id: FlowId, client: Client, key: &FlowKey) {
        let socket = Socket {
            protocol: Protocol::Tcp,
            to: Some(key.remote),
            used: self.now,
            kind: Kind::Client(Box::new(client)),
        };
        self.make(id, socket);
        self.words.push((id, "is a client's"));
        self.tell(id);
    }

    /// Lets something happen to a socket, and says what it is ready for if it is to be told.
    pub(super) fn happen(&mut self, id: FlowId, happening: Happening) -> Option<Ready> {
        let Some(socket) = self.sockets.get_mut(&id) else {
            // It comes too late, and nobody takes it for another's.
            let is_event = happening == Happening::Event;
            return is_event.then_some(Ready {
                readable: true,
                writable: true,
            });
        };
        match (happening, &mut socket.kind) {
            (Happening::Event, kind) => return Some(kind.ready()),
            (Happening::Turn, Kind::Connection(connection)) => {
                connection.is_due = false;
                if !self.is_cut {
                    self.turn(id);
                }
            }
            (Happening::Answer(from, bytes), Kind::Mailbox(mailbox)) if !self.is_cut => {
                mailbox.answers.push_back((from, bytes));
                self.tell(id);
            }
            (Happening::Failure(to, quoted), Kind::Mailbox(mailbox)) if !self.is_cut => {
                mailbox.failures.push_back((to, quoted));
                self.tell(id);
            }
            _ => {}
        }
        None
    }

    /// There is a way out again: all servers go on.
    pub(super) fn resume(&mut self) {
        let ids: Vec<_> = self.sockets.keys().copied().collect();
        for id in ids {
            self.wake(id);
        }
    }

    fn turn(&mut self, id: FlowId) {
        let Some(Socket {
            kind: Kind::Connection(connection),
            ..
        }) = self.sockets.get_mut(&id)
        else {
            return;
        };
        let turn = connection.go_on();
        if let Some(wrong) = turn.wrong {
            self.accuse(id, &wrong);
        }
        if turn.is_news {
            self.tell(id);
        }
        if let Some(after) = turn.again {
            self.turn_after(id, after);
        }
    }

    /// Lets a connection's server have its turn, if it has none already.
    fn wake(&mut self, id: FlowId) {
        if let Some(Kind::Connection(connection)) = self.kind(id) {
            let pace = connection.script.pace;
            self.turn_after(id, pace);
        }
    }

    fn turn_after(&mut self, id: FlowId, after: Duration) {
        let at = self.now + after;
        if let Some(Kind::Connection(connection)) = self.kind(id)
            && !std::mem::replace(&mut connection.is_due, true)
        {
            self.due.push((at, id, Happening::Turn));
        }
    }

    fn kind(&mut self, id: FlowId) -> Option<&mut Kind> {
        self.sockets.get_mut(&id).map(|socket| &mut socket.kind)
    }

    /// Notes that a socket is in use, and lets its server have a turn.
    fn use_now(&mut self, id: FlowId) {
        if let Some(socket) = self.sockets.get_mut(&id) {
            socket.used = self.now;
        }
        self.wake(id);
    }

    fn tell(&mut self, id: FlowId) {
        self.due.push((self.now + LOCAL, id, Happening::Event));
    }

    fn accuse(&mut self, id: FlowId, what: &str) {
        let socket = self.sockets.get(&id);
        let to = socket.map(|socket| (socket.protocol, socket.to));
        self.wrong
            .get_or_insert_with(|| format!("the socket of {id:?} to {to:?} {what}"));
    }

    /// Notes that a socket is made.
    fn make(&mut self, id: FlowId, socket: Socket) {
        if self.sockets.insert(id, socket).is_some() || !self.known.insert(id) {
            self.accuse(id, "has the number of another");
        }
        self.made += 1;
    }

    fn check_destination(&mut self, id: FlowId, protocol: Protocol, to: SocketAddr) {
        let is_secret = to.ip() == *METADATA.ip();
        if is_secret || protocol == Protocol::Udp && to.port() == TUNNEL.port() {
            self.accuse(id, "goes where no pod may");
        }
    }
}

impl Host for Sockets {
    fn open(
        &mut self,
        id: FlowId,
        protocol: Protocol,
        _: smoltcp::wire::IpVersion,
    ) -> Result<(), HostError> {
        let socket = Socket {
            protocol,
            to: None,
            used: self.now,
            kind: Kind::Mailbox(Mailbox::new(protocol)),
        };
        self.make(id, socket);
        self.words.push((id, "opens"));
        self.tell(id);
        Ok(())
    }

    fn connect(&mut self, id: FlowId, protocol: Protocol, to: SocketAddr) -> Result<(), HostError> {
        self.check_destination(id, protocol, to);
        if protocol != Protocol::Tcp {
            self.accuse(id, "has one other end");
        }
        let Some(server) = Server::at(to.ip()) else {
            return Err(HostError::NetUnreachable);
        };
        if self.is_cut || server == Server::Unreachable {
            return Err(HostError::NetUnreachable);
        }
        let script = Script::new(server, &mut self.random);
        let latency = script.latency;
        let socket = Socket {
            protocol,
            to: Some(to),
            used: self.now,
            kind: Kind::Connection(Box::new(Connection::new(server, script))),
        };
        self.make(id, socket);
        self.words.push((id, "connects"));
        self.turn_after(id, latency);
        Ok(())
    }

    /// Sends a datagram, and lets the server answer.
    fn send(&mut self, id: FlowId, to: SocketAddr, bytes: &[u8]) -> Result<(), HostError> {
        if let Some(socket) = self.sockets.get(&id) {
            self.check_destination(id, socket.protocol, to);
        }
        let (now, is_cut) = (self.now, self.is_cut);
        let Some(Socket {
            kind: Kind::Mailbox(mailbox),
            used,
            ..
        }) = self.sockets.get_mut(&id)
        else {
            return Err(HostError::Failed);
        };
        mailbox.check(to.ip(), is_cut, &mut self.random)?;
        *used = now;
        match mailbox.read_identity(to.ip(), bytes) {
            Ok(identity) => self.fresh.extend(identity.map(|identity| (id, identity))),
            Err(wrong) => {
                let wrong = wrong.to_owned();
                self.accuse(id, &wrong);
                return Ok(());
            }
        }
        let then = mailbox.reaction(to, bytes);
        self.due
            .extend(then.map(|(after, then)| (now + after, id, then)));
        self.datagrams += 1;
        Ok(())
    }

    fn receive(&mut self, id: FlowId, buffer: &mut [u8]) -> Result<(usize, SocketAddr), HostError> {
        let Some(Kind::Mailbox(mailbox)) = self.kind(id) else {
            self.accuse(id, "is read as if it had no other end");
            return Err(HostError::Failed);
        };
        let read = mailbox.read(buffer);
        let latest = mailbox.latest;
        // What others send does not keep a mapping in use.
        if read.is_ok_and(|(_, from)| latest == Some(from.ip())) {
            self.use_now(id);
        }
        read
    }

    fn serve(&mut self, _: FlowId, _: FlowKey) -> Result<(), HostError> {
        Err(HostError::Refused)
    }

    fn dialled(&mut self, id: FlowId, result: Result<(), HostError>) {
        match self.kind(id) {
            Some(Kind::Client(client)) if client.outcome.is_none() => {
                client.outcome = Some(result);
            }
            _ => self.accuse(id, "was dialled by nobody"),
        }
    }

    fn connected(&mut self, id: FlowId) -> Result<(), HostError> {
        self.use_now(id);
        match self.kind(id) {
            Some(Kind::Connection(connection)) => connection.outcome,
            Some(Kind::Client(_) | Kind::Mailbox(_)) | None => Err(HostError::Failed),
        }
    }

    fn read(&mut self, id: FlowId, buffer: &mut [u8]) -> Result<usize, HostError> {
        let read = match self.kind(id) {
            Some(Kind::Mailbox(_)) => Err("is read as if it had another end"),
            Some(Kind::Connection(_)) if buffer.is_empty() => Err("is read without room"),
            Some(Kind::Connection(connection)) => Ok(connection.read(buffer)),
            Some(Kind::Client(client)) => Ok(client.read(buffer)),
            None => Err("is read and not there"),
        };
        match read {
            Ok(read) => {
                if read.is_ok_and(|len| len > 0) {
                    self.use_now(id);
                }
                read
            }
            Err(wrong) => {
                self.accuse(id, wrong);
                Err(HostError::Failed)
            }
        }
    }

    fn write(&mut self, id: FlowId, bytes: &[u8]) -> Result<usize, HostError> {
        let written = match self.kind(id) {
            Some(Kind::Mailbox(_)) => Err("is written to as if it had another end"),
            Some(Kind::Connection(connection)) if connection.shut => {
                Err("is written to after its end")
            }
            Some(Kind::Connection(connection)) => Ok(connection.write(bytes)),
            Some(Kind::Client(client)) if client.shut => Err("is written to after its end"),
            Some(Kind::Client(client)) => {
                let wrong = client.write(bytes).err();
                let (flow, is_served) = (client.flow, client.is_served());
                if let Some(wrong) = wrong {
                    self.accuse(id, &wrong);
                }
                if is_served {
                    // It ends its stream now.
                    self.served.insert(flow);
                    self.tell(id);
                }
                Ok(Ok(bytes.len()))
            }
            None => Err("is written to and not there"),
        };
        match written {
            Ok(written) => {
                if written.is_ok() {
                    self.use_now(id);
                }
                written
            }
            Err(wrong) => {
                self.accuse(id, wrong);
                Err(HostError::Failed)
            }
        }
    }

    fn mark(&mut self, id: FlowId, marks: Marks) {
        match self.kind(id) {
            Some(Kind::Mailbox(mailbox)) if marks.ttl > 0 => mailbox.marks = Some(marks),
            _ => self.accuse(id, "is marked wrongly"),
        }
    }

    fn complaint(&mut self, id: FlowId, quoted: &mut [u8]) -> Option<Complaint> {
        match self.kind(id) {
            Some(Kind::Mailbox(mailbox)) => mailbox.complain(quoted),
            Some(Kind::Connection(_) | Kind::Client(_)) | None => None,
        }
    }

    fn shutdown(&mut self, id: FlowId) -> Result<(), HostError> {
        self.words.push((id, "ends its stream"));
        match self.kind(id) {
            Some(Kind::Connection(connection)) if !connection.shut => {
                connection.shut = true;
                self.wake(id);
                Ok(())
            }
            Some(Kind::Client(client)) if !client.shut => {
                client.shut = true;
                Ok(())
            }
            _ => {
                self.accuse(id, "is ended twice");
                Err(HostError::Failed)
            }
        }
    }

    fn close(&mut self, id: FlowId, reset: bool) {
        let word = if reset { "is reset" } else { "is closed" };
        self.words.push((id, word));
        let pod_is_gone = self.pod_is_gone;
        match self.kind(id) {
            None => self.accuse(id, "is closed twice"),
            Some(Kind::Connection(connection)) => {
                // Nobody is left for the other stream then.
                let is_delivered = pod_is_gone && connection.shut;
                if reset && is_delivered {
                    self.accuse(id, "is reset though it has all of its pod's stream");
                } else if !reset && !connection.is_over() && !is_delivered {
                    self.accuse(id, "is closed as if both streams had ended");
                }
            }
            Some(Kind::Client(client)) => {
                if !reset && !client.is_over() {
                    self.accuse(id, "is closed as if both streams had ended");
                }
            }
            Some(Kind::Mailbox(_)) => {}
        }
        if let Some(socket) = self.sockets.remove(&id) {
            self.closed += 1;
            self.idle.extend(reset.then_some(self.now - socket.used));
        }
    }
}

impl Kind {
    fn ready(&self) -> Ready {
        match self {
            Self::Connection(connection) => connection.ready(),
            Self::Mailbox(mailbox) => mailbox.ready(),
            Self::Client(client) => client.ready(),
        }
    }
}
