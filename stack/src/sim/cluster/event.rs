//! What an event of a plan does to a cluster.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::Cluster;
use crate::control::lease::{Entry, LEASE_TTL, LeaseRecord, SubnetKey, lease_prefix};
use crate::datapath::port::PortId;
use crate::sim::constants::{PREFIX, address};
use crate::sim::device::Order;
use crate::sim::due::Who;
use crate::sim::event::{Event, Forgery, misconfiguration};
use crate::sim::kind;
use crate::sim::outcome::Violation;

/// A node that is not simulated, with a lease that no other has.
const OVERLAPPING: u8 = 255;

impl Cluster {
    /// Lets an event happen.
    pub(in crate::sim) fn apply(&mut self, event: &Event) -> Result<(), Violation> {
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
            Event::Attach(machine) => self.attach(*machine, kind::POD)?,
            Event::AttachDevice { machine, kind } => {
                let kind = kind::FIRST + kind;
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
                    self.attach(who.machine, kind::ROGUE)?;
                }
                if let Some(port) = self.rogue(who)
                    && let Some(identity) = self.new_identity(who, port)
                {
                    let running = self.machines[who.machine].running(who);
                    let victim_v6 = running.and_then(|running| {
                        let mut ports = running.ports.values();
                        ports.find(|it| it.address == victim)?.address_v6
                    });
                    let order = Order::Misbehave {
                        victim,
                        victim_v6,
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
            ports.find(|(_, plugged)| machine.pods.get(&plugged.name) == Some(&kind::ROGUE));
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
        let own = running.ipv4();
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
        let [.., last, _] = key.ipv4().unwrap_or_default().network().octets();
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
    pub(in crate::sim) fn heal(&mut self) -> Result<(), Violation> {
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
