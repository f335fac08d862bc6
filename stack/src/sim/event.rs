//! What happens to a cluster: the events of a plan, in words and in deed.

use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use muslin_encap::mtu::Mtu;

use super::Violation;
use super::cluster::{Cluster, PREFIX, address};
use super::device::{self, Order};
use super::link::Weather;
use super::machine::Who;
use super::outside::Server;
use super::rogue::Rogue;
use crate::control::lease::{Entry, LEASE_TTL, LeaseRecord, SubnetKey, lease_prefix};
use crate::datapath::egress::Protocol;
use crate::datapath::port::PortId;

/// A node that is not simulated, with a lease that no other has.
const OVERLAPPING: u8 = 255;

/// What happens. Machines are numbered from 0; an event that cannot happen does nothing, so that a
/// plan stays one when some of it is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A node is started.
    Join(usize),
    /// A node gives its lease back and stops.
    Leave(usize),
    /// A node ends without a word.
    Crash(usize),
    /// A node that does not run loses its state directory.
    Forget(usize),
    /// A pod is attached to a machine's node.
    Attach(usize),
    /// A device of one of the kinds that [`run_with`](super::run_with) is given is attached to a
    /// machine's node.
    AttachDevice {
        /// The machine.
        machine: usize,
        /// The place of its kind in that list.
        kind: usize,
    },
    /// One of a machine's pods is detached.
    Detach {
        /// The machine.
        machine: usize,
        /// Which of its pods.
        pod: usize,
    },
    /// A machine gets a new public address.
    Move(usize),
    /// A machine gets a public address that another had before.
    Inherit(usize),
    /// A machine's interface gets another MTU, and its node and pods follow.
    Resize {
        /// The machine.
        machine: usize,
        /// Its MTU in bytes.
        mtu: Mtu,
    },
    /// A machine stands still for a while.
    Freeze {
        /// The machine.
        machine: usize,
        /// For how long.
        seconds: u64,
    },
    /// Two machines exchange their public addresses.
    Swap(usize, usize),
    /// A machine whose node does not run gets a copy of another's state directory.
    Clone {
        /// Whose.
        from: usize,
        /// Who gets it.
        to: usize,
    },
    /// These machines are cut off from the others and from the store.
    Partition(Vec<usize>),
    /// Two machines do not reach each other.
    Cut(usize, usize),
    /// Links behave like this.
    Weather(Weather),
    /// All links are as they should be.
    Mend,
    /// The store is down.
    StoreDown,
    /// The store is up, and all ways to it are as they should be.
    StoreUp,
    /// A machine does not reach the store.
    StoreCut(usize),
    /// So many of a thousand requests or answers are lost on the way to the store or from it.
    StoreLoss(u16),
    /// Requests to the store take up to so many milliseconds each way.
    StoreSlow(u64),
    /// A member of the store that lags behind answers reads.
    StoreLags,
    /// The store forgets its history.
    Compact,
    /// The store ends all watches.
    EndWatches,
    /// The store loses everything, and somebody writes the network's configuration again.
    Wipe,
    /// Somebody writes a network configuration that nobody can use, until the store is as it should
    /// be.
    Misconfigure(u8),
    /// Somebody deletes the record of a machine's lease.
    DeleteRecord(usize),
    /// Somebody deletes all records.
    DeleteAll,
    /// Somebody writes something else into the record of a machine's lease.
    Rewrite {
        /// The machine.
        machine: usize,
        /// What is written.
        what: Forgery,
    },
    /// A node that is not simulated has a lease.
    Foreign(u8),
    /// So has one whose subnet is a part of that of a machine's, or has that as a part.
    Overlap {
        /// The machine.
        machine: usize,
        /// Whether it is the larger one.
        is_wider: bool,
    },
    /// So has one of flannel's, which follows the store, and loses changes.
    Flannel(u8),
    /// TCP connections between pods, which are numbered over all machines.
    Talk {
        /// Which pod connects.
        from: usize,
        /// To which.
        to: usize,
        /// How many bytes go there, and come back.
        bytes: usize,
    },
    /// A pod pings another.
    Ping {
        /// Which pod.
        from: usize,
        /// Which other.
        to: usize,
        /// Bytes of payload.
        bytes: usize,
    },
    /// TCP connections of a pod to a server outside.
    Fetch {
        /// Which pod.
        pod: usize,
        /// Which server.
        server: Server,
        /// How many at once.
        count: usize,
        /// How many bytes each sends, and gets back.
        bytes: usize,
        /// Whether the pod ends its streams before all is back.
        ends_first: bool,
    },
    /// A pod asks a server outside by datagrams or echo requests.
    Query {
        /// Which pod.
        pod: usize,
        /// Which server.
        server: Server,
        /// UDP or ping.
        protocol: Protocol,
        /// How often.
        count: usize,
        /// Bytes of payload.
        bytes: usize,
    },
    /// A client connects to a pod's published port.
    Visit {
        /// Which pod.
        pod: usize,
        /// How many bytes it sends, and gets back.
        bytes: usize,
        /// Whether it is on the pod's own host.
        is_local: bool,
    },
    /// A machine has no way to servers outside.
    CutOutside(usize),
    /// A hostile pod, attached beside another if there is none, does what pods must not do.
    Misbehave {
        /// Beside which pod, and about it.
        victim: usize,
        /// Which trick.
        trick: u8,
    },
    /// Datagrams that a stranger has seen come again, from him.
    Replay,
    /// A machine gets another network card.
    NewCard(usize),
    /// A stranger on the link claims a machine's address.
    Lie(usize),
}

/// What somebody writes into a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Forgery {
    /// Something that is not a record.
    Rubbish,
    /// What is there already, for ever: a reservation.
    Reservation,
    /// What is there already, for a minute.
    ShortLife,
    /// The record of a node that is not simulated.
    Stranger,
    /// A record with the address of another machine.
    Neighbour(usize),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Join(machine) => write!(f, "machine {machine} joins"),
            Self::Leave(machine) => write!(f, "machine {machine} leaves"),
            Self::Crash(machine) => write!(f, "machine {machine} crashes"),
            Self::Forget(machine) => write!(f, "machine {machine} loses its state directory"),
            Self::Attach(machine) => write!(f, "a pod is attached to machine {machine}"),
            Self::AttachDevice { machine, kind } => {
                write!(
                    f,
                    "a device of kind {kind} is attached to machine {machine}"
                )
            }
            Self::Detach { machine, pod } => {
                write!(f, "pod {pod} of machine {machine} is detached")
            }
            Self::Move(machine) => write!(f, "machine {machine} gets another public address"),
            Self::Inherit(machine) => {
                write!(
                    f,
                    "machine {machine} gets a public address that another had"
                )
            }
            Self::Resize { machine, mtu } => write!(
                f,
                "the interface of machine {machine} gets an MTU of {}",
                mtu.get()
            ),
            Self::Freeze { machine, seconds } => {
                write!(f, "machine {machine} stands still for {seconds} s")
            }
            Self::Swap(one, other) => {
                write!(
                    f,
                    "machines {one} and {other} exchange their public addresses"
                )
            }
            Self::Clone { from, to } => {
                write!(
                    f,
                    "machine {to} gets a copy of machine {from}'s state directory"
                )
            }
            Self::Partition(machines) => {
                write!(
                    f,
                    "machines {machines:?} are cut off from the others and the store"
                )
            }
            Self::Cut(one, other) => {
                write!(f, "machines {one} and {other} do not reach each other")
            }
            Self::Weather(weather) => write!(f, "links have {weather}"),
            Self::Mend => write!(f, "all links are mended"),
            Self::StoreDown => write!(f, "the store is down"),
            Self::StoreUp => write!(f, "the store is up and in reach"),
            Self::StoreCut(machine) => write!(f, "machine {machine} does not reach the store"),
            Self::StoreLoss(loss) => {
                write!(
                    f,
                    "{}.{} % of the store's requests and answers are lost",
                    loss / 10,
                    loss % 10
                )
            }
            Self::StoreSlow(millis) => {
                write!(f, "requests to the store take up to {millis} ms each way")
            }
            Self::StoreLags => write!(f, "a member of the store that lags behind answers reads"),
            Self::Compact => write!(f, "the store forgets its history"),
            Self::EndWatches => write!(f, "the store ends all watches"),
            Self::Wipe => write!(
                f,
                "the store loses everything but the network's configuration"
            ),
            Self::Misconfigure(mistake) => {
                let config = misconfiguration(*mistake);
                write!(f, "the network's configuration becomes {config}")
            }
            Self::DeleteRecord(machine) => {
                write!(f, "somebody deletes the record of machine {machine}")
            }
            Self::DeleteAll => write!(f, "somebody deletes all records"),
            Self::Rewrite { machine, what } => {
                write!(
                    f,
                    "somebody rewrites the record of machine {machine}: {what}"
                )
            }
            Self::Foreign(number) => {
                write!(f, "a foreign node with number {number} has a lease")
            }
            Self::Overlap { machine, is_wider } => {
                let place = if *is_wider { "around" } else { "within" };
                write!(
                    f,
                    "a foreign node has a lease {place} that of machine {machine}"
                )
            }
            Self::Flannel(number) => {
                write!(f, "a node of flannel's with number {number} starts")
            }
            Self::Talk { from, to, bytes } => {
                write!(f, "pod {from} and pod {to} exchange {bytes} bytes over TCP")
            }
            Self::Ping { from, to, bytes } => write!(f, "pod {from} pings pod {to}, {bytes} bytes"),
            Self::Fetch {
                pod,
                server,
                count,
                bytes,
                ends_first,
            } => {
                let end = if *ends_first { ", ending first" } else { "" };
                write!(
                    f,
                    "pod {pod} exchanges {bytes} bytes over {count} TCP connections with \
                     {server}{end}"
                )
            }
            Self::Query {
                pod,
                server,
                protocol,
                count,
                bytes,
            } => write!(
                f,
                "pod {pod} asks {server} by {protocol}, {count} times, {bytes} bytes"
            ),
            Self::Visit {
                pod,
                bytes,
                is_local,
            } => {
                let place = if *is_local { "its host" } else { "outside" };
                write!(
                    f,
                    "a client from {place} exchanges {bytes} bytes with pod {pod}"
                )
            }
            Self::CutOutside(machine) => {
                write!(f, "machine {machine} has no way to servers outside")
            }
            Self::Misbehave { victim, trick } => {
                write!(
                    f,
                    "a hostile pod beside pod {victim} {}",
                    Rogue::describe(*trick)
                )
            }
            Self::Replay => write!(f, "a stranger sends datagrams again that he has seen"),
            Self::NewCard(machine) => write!(f, "machine {machine} gets another network card"),
            Self::Lie(machine) => write!(
                f,
                "a stranger on the link claims the address of machine {machine}"
            ),
        }
    }
}

/// A network configuration that no node can use.
fn misconfiguration(mistake: u8) -> &'static str {
    let all = [
        r#"{"Network": \ }"#,
        "",
        r#"{"Network":"10.244.0.0/31"}"#,
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"pigeons"}}"#,
    ];
    all[usize::from(mistake) % all.len()]
}

impl fmt::Display for Forgery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rubbish => write!(f, "what is no record"),
            Self::Reservation => write!(f, "the same, for ever"),
            Self::ShortLife => write!(f, "the same, for a minute"),
            Self::Stranger => write!(f, "that of another node"),
            Self::Neighbour(machine) => write!(f, "with the address of machine {machine}"),
        }
    }
}

impl Cluster {
    /// Lets an event happen.
    pub(super) fn apply(&mut self, event: &Event) -> Result<(), Violation> {
        let now = self.queue.now();
        self.disturbed = now;
        self.log.note(now, || format!("--- {event}"));
        self.wake_for(event);
        match event {
            Event::Join(machine) => {
                self.machines[*machine].is_wanted = true;
                self.start(*machine)?;
            }
            Event::Leave(machine) => {
                self.machines[*machine].is_wanted = false;
                if let Some(who) = self.who(*machine) {
                    self.leave(who)?;
                }
            }
            Event::Crash(machine) => {
                if let Some(who) = self.who(*machine) {
                    self.end_process(who, "has crashed");
                }
            }
            Event::Forget(machine) => {
                let machine = &mut self.machines[*machine];
                if machine.process.is_none() {
                    machine.disk = None;
                    machine.is_copy = false;
                }
            }
            Event::Attach(machine) => self.attach(*machine, device::POD)?,
            Event::AttachDevice { machine, kind } => {
                let kind = device::FIRST + kind;
                if kind < self.kinds.len() {
                    self.attach(*machine, kind)?;
                }
            }
            Event::Detach { machine, pod } => self.detach(*machine, *pod)?,
            Event::Move(machine) => {
                let to = (1..).map(|changes| address(*machine, changes));
                let mut to =
                    to.filter(|to| !self.addresses.contains_key(to) && !self.former.contains(to));
                if let Some(to) = to.next() {
                    self.move_machine(*machine, to)?;
                }
            }
            Event::Inherit(machine) => {
                if let Some(to) = self.former.first().copied() {
                    self.move_machine(*machine, to)?;
                }
            }
            Event::Resize { machine, mtu } => self.resize_machine(*machine, *mtu)?,
            Event::Freeze { machine, seconds } => self.freeze(*machine, *seconds),
            Event::Swap(one, other) => self.swap_machines(*one, *other)?,
            Event::Clone { from, to } => {
                let disk = self.machines[*from].disk.clone();
                let machine = &mut self.machines[*to];
                if machine.process.is_none() && disk.is_some() && from != to {
                    machine.disk = disk;
                    machine.is_copy = true;
                }
            }
            Event::Partition(machines) => {
                self.underlay.other_side = machines.iter().copied().collect();
                self.ways_changed();
            }
            Event::Cut(one, other) => {
                self.underlay.cut.insert((*one.min(other), *one.max(other)));
            }
            Event::Weather(weather) => self.underlay.weather = *weather,
            Event::Mend => {
                self.underlay.heal();
                self.ways_changed();
                self.heal_outside()?;
            }
            Event::CutOutside(machine) => self.outside.cut(now, *machine),
            Event::Fetch { .. } | Event::Query { .. } => self.send_out(event)?,
            Event::Visit {
                pod,
                bytes,
                is_local,
            } => self.visit_some(*pod, *bytes, *is_local)?,
            Event::Talk { .. } | Event::Ping { .. } | Event::Misbehave { .. } => {
                self.apply_to_pods(event)?;
            }
            Event::Replay => self.replay(),
            Event::NewCard(machine) => self.change_card(*machine),
            Event::Lie(victim) => self.lie(*victim)?,
            _ => self.apply_to_store(event)?,
        }
        Ok(())
    }

    fn apply_to_pods(&mut self, event: &Event) -> Result<(), Violation> {
        let pods = self.plugged();
        let pick = |number: usize| pods.get(number % pods.len().max(1)).copied();
        match event {
            Event::Talk { from, to, bytes } => {
                if let (Some((who, port, own)), Some((.., to))) = (pick(*from), pick(*to))
                    && own != to
                {
                    self.talk((who, port), to, *bytes)?;
                }
            }
            Event::Ping { from, to, bytes } => {
                if let (Some((who, port, own)), Some((.., to))) = (pick(*from), pick(*to))
                    && own != to
                {
                    self.ping((who, port), to, *bytes)?;
                }
            }
            Event::Misbehave { victim, trick } => {
                let Some((who, _, victim)) = pick(*victim) else {
                    return Ok(());
                };
                if self.rogue(who).is_none() {
                    self.attach(who.machine, device::ROGUE)?;
                }
                if let Some(port) = self.rogue(who)
                    && let Some(identity) = self.new_identity(who, port)
                {
                    let order = Order::Misbehave {
                        victim,
                        identity,
                        trick: *trick,
                    };
                    self.order(who, port, order)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A machine's rogue.
    pub(super) fn rogue(&self, who: Who) -> Option<PortId> {
        let machine = &self.machines[who.machine];
        let running = machine.process.as_ref()?.running.as_ref()?;
        let mut ports = running.ports.iter();
        let rogue =
            ports.find(|(_, plugged)| machine.pods.get(&plugged.name) == Some(&device::ROGUE));
        Some(*rogue?.0)
    }

    fn apply_to_store(&mut self, event: &Event) -> Result<(), Violation> {
        match event {
            Event::StoreDown => {
                self.store_weather.is_down = true;
                self.end_watches()?;
            }
            Event::StoreUp => {
                self.store_weather.heal();
                self.store.lag(false);
                if self.is_misconfigured {
                    self.configure();
                }
                self.ways_changed();
            }
            Event::StoreCut(machine) => {
                self.store_weather.cut.insert(*machine);
                self.ways_changed();
            }
            Event::StoreLoss(loss) => self.store_weather.loss = *loss,
            Event::StoreSlow(millis) => self.store_weather.latency = millis * 1000,
            Event::StoreLags => self.store.lag(true),
            Event::Compact => self.store.compact(),
            Event::EndWatches => self.end_watches()?,
            Event::Wipe => {
                self.store.wipe();
                self.configure();
                self.end_watches()?;
            }
            Event::Misconfigure(mistake) => {
                (self.is_misconfigured, self.was_misconfigured) = (true, true);
                let (key, value) = (format!("{PREFIX}/config"), misconfiguration(*mistake));
                let now = self.queue.now();
                self.store.put(now, None, key, value.to_owned(), None);
            }
            Event::DeleteAll => self.store.delete(&lease_prefix(PREFIX)),
            Event::DeleteRecord(machine) => {
                if let Some((entry, _)) = self.record_of(*machine) {
                    self.store.delete(&entry.key);
                }
            }
            Event::Rewrite { machine, what } => {
                if let Some((entry, key)) = self.record_of(*machine) {
                    self.rewrite(entry, key, *what);
                }
            }
            Event::Foreign(number) => {
                self.write_foreign(*number);
            }
            Event::Overlap { machine, is_wider } => self.write_overlap(*machine, *is_wider),
            Event::Flannel(number) => {
                if let Some(key) = self.write_foreign(*number) {
                    self.start_flannel(key);
                }
            }
            _ => {}
        }
        self.store_changed()
    }

    /// A node that is not simulated has a lease, with this key. As flannel does, it takes none that is
    /// taken.
    fn write_foreign(&mut self, number: u8) -> Option<String> {
        let now = self.queue.now();
        let subnets = self.setup.config.subnets().collect::<Vec<_>>();
        let subnet = subnets.get(usize::from(number) % subnets.len().max(1))?;
        let key = format!("{}/{}", lease_prefix(PREFIX), SubnetKey::new(*subnet));
        if self.store.entries(now, &key).next().is_some() {
            return None;
        }
        let value = self.stranger(number);
        self.store
            .put(now, None, key.clone(), value, Some(LEASE_TTL));
        Some(key)
    }

    /// A node that is not simulated has a lease that no node of this network has.
    fn write_overlap(&mut self, machine: usize, is_wider: bool) {
        let process = self.machines[machine].process.as_ref();
        let Some(running) = process.and_then(|process| process.running.as_ref()) else {
            return;
        };
        let own = running.key.ipv4;
        let other = match is_wider {
            true => own.supernet(),
            false => Ipv4Net::new(own.network(), own.prefix_len() + 1).ok(),
        };
        if let Some(other) = other {
            let key = format!("{}/{}", lease_prefix(PREFIX), SubnetKey::new(other.trunc()));
            let (now, value) = (self.queue.now(), self.stranger(OVERLAPPING));
            self.store.put(now, None, key, value, Some(LEASE_TTL));
        }
    }

    /// Somebody writes the network's configuration.
    fn configure(&mut self) {
        let (key, value) = (format!("{PREFIX}/config"), self.setup.config.to_json());
        self.store.put(self.queue.now(), None, key, value, None);
        self.is_misconfigured = false;
    }

    /// The record of the lease that a machine's node has, as the store has it.
    fn record_of(&self, machine: usize) -> Option<(Entry, SubnetKey)> {
        let running = self.machines[machine].process.as_ref()?.running.as_ref()?;
        let name = format!("{}/{}", lease_prefix(PREFIX), running.key);
        let (entry, _) = self.store.entries(self.queue.now(), &name).next()?;
        Some((entry, running.key))
    }

    fn rewrite(&mut self, entry: Entry, key: SubnetKey, what: Forgery) {
        let now = self.queue.now();
        let [.., last, _] = key.ipv4.network().octets();
        let (value, ttl) = match what {
            Forgery::Rubbish => ("rubbish".to_owned(), entry.ttl),
            Forgery::Reservation => (entry.value, None),
            Forgery::ShortLife => (entry.value, Some(std::time::Duration::from_secs(60))),
            Forgery::Stranger => (self.stranger(last), Some(LEASE_TTL)),
            Forgery::Neighbour(machine) => {
                let Ok(mut record) = LeaseRecord::parse(&entry.value) else {
                    return;
                };
                record.public_ip = self.machines[machine].public_ip;
                (record.to_json(), Some(LEASE_TTL))
            }
        };
        self.store.put(now, None, entry.key, value, ttl);
    }

    /// The record of a node that is not simulated.
    fn stranger(&self, number: u8) -> String {
        let public_ip = Ipv4Addr::new(198, 51, 100, number.max(1));
        let mac = [2, 0x5a, 0, 0, 0, number];
        self.setup.record(public_ip, mac).to_json()
    }

    /// Everything works again: links, the store and the ways to it, all machines that are wanted;
    /// what others wrote into the store
    /// is gone, and no two machines have one state directory.
    pub(super) fn heal(&mut self) -> Result<(), Violation> {
        self.apply(&Event::Mend)?;
        self.apply(&Event::StoreUp)?;
        self.delete_foreign()?;
        for machine in 0..self.machines.len() {
            // Two nodes with one state directory are no cluster that works.
            if std::mem::take(&mut self.machines[machine].is_copy) {
                self.apply(&Event::Crash(machine))?;
                self.apply(&Event::Forget(machine))?;
            }
            self.start(machine)?;
        }
        Ok(())
    }

    fn delete_foreign(&mut self) -> Result<(), Violation> {
        let now = self.queue.now();
        let prefix = lease_prefix(PREFIX);
        let entries: Vec<_> = self.store.entries(now, &prefix).collect();
        for (entry, writer) in entries {
            let is_alive = self.is_flannels(&entry.key);
            if writer.is_none() && entry.ttl.is_some() && !is_alive {
                self.store.delete(&entry.key);
            }
        }
        self.store_changed()
    }
}
