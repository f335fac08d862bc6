//! The cluster: machines, links and the store, and what happens next.

mod agent;
mod check;
mod errand;
mod event;
mod flannel;
mod frozen;
mod lan;
mod ports;
mod process;
mod report;
mod sharing;
mod traffic;
mod visit;
mod way_out;
mod worker;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use muslin_encap::buffer::HEADROOM;
use smoltcp::time::{Duration, Instant};

use crate::control::lease::{Revision, lease_prefix};
use crate::datapath::frame;
use crate::sim::agent::StoreWeather;
use crate::sim::constants::{PREFIX, address, public_ipv6};
use crate::sim::due::{Due, Timer, Who};
use crate::sim::flannel::Flannel;
use crate::sim::invariants;
use crate::sim::kind::DeviceKind;
use crate::sim::link::{Underlay, Weather};
use crate::sim::log::Log;
use crate::sim::machine::Machine;
use crate::sim::oracle::Oracle;
use crate::sim::outcome::{Figures, Violation};
use crate::sim::outside::Outside;
use crate::sim::plan::Setup;
use crate::sim::queue::Queue;
use crate::sim::random::{Random, Stream};
use crate::sim::store::{Lost, Store};

/// How long nothing must have happened until a lease must be renewed.
const CALM: Duration = Duration::from_secs(120);

/// A whole cluster.
pub(super) struct Cluster {
    pub(super) setup: Setup,
    pub(super) queue: Queue<Due>,
    pub(super) machines: Vec<Machine>,
    pub(super) addresses: BTreeMap<Ipv4Addr, usize>,
    /// Addresses that machines had.
    pub(super) former: Vec<Ipv4Addr>,
    /// What can be attached.
    pub(super) kinds: Vec<DeviceKind>,
    pub(super) underlay: Underlay,
    pub(super) outside: Outside,
    pub(super) store: Store,
    pub(super) store_weather: StoreWeather,
    pub(super) flannels: Vec<Flannel>,
    /// Whether the store has an unusable network configuration.
    pub(super) is_misconfigured: bool,
    /// Whether it ever had one. A node may have read it
    /// long after that was mended, from a member that lags behind.
    pub(super) was_misconfigured: bool,
    pub(super) oracle: Oracle,
    pub(super) log: Log,
    pub(super) figures: Figures,
    /// When something last happened from outside.
    pub(super) disturbed: Instant,
    /// The store's revision, and since when it has it.
    pub(super) written: (Revision, Instant),
    pub(super) random: Random,
    pub(super) name_random: Random,
    expiry: Timer,
    /// The last datagrams and where they went.
    pub(super) captured: VecDeque<(SocketAddr, Vec<u8>)>,
    /// Where packets are given to nodes.
    pub(super) storage: Vec<u8>,
    /// Packets that were given to nodes.
    pub(super) traced: u64,
}

impl Cluster {
    pub(super) fn new(seed: u64, setup: Setup, weather: Weather, keeps_lines: bool) -> Self {
        let now = Instant::from_secs(1);
        let machines = setup.mtus.iter().enumerate().map(|(number, mtu)| Machine {
            public_ip: address(number, 0),
            public_ipv6: public_ipv6(setup.config.ipv6.is_some(), number),
            mtu: *mtu,
            disk: None,
            is_copy: false,
            is_wanted: false,
            pods: BTreeMap::new(),
            process: None,
            starts: 0,
            cards: 0,
            frozen: None,
            slept: None,
        });
        let machines: Vec<_> = machines.collect();
        let addresses = machines.iter().enumerate();
        let addresses = addresses.map(|(number, machine)| (machine.public_ip, number));
        let addresses = addresses.collect();
        let mut store = Store::new(setup.tells_ttl);
        if setup.is_configured {
            let key = format!("{PREFIX}/config");
            store.put(now, None, key, setup.config.to_json(), None);
        }
        Self {
            setup,
            queue: Queue::new(now),
            machines,
            addresses,
            former: Vec::new(),
            kinds: DeviceKind::own(),
            underlay: Underlay::new(seed, weather),
            outside: Outside::new(seed),
            store,
            store_weather: StoreWeather::new(seed),
            flannels: Vec::new(),
            is_misconfigured: false,
            was_misconfigured: false,
            oracle: Oracle::default(),
            log: Log::new(keeps_lines),
            figures: Figures::default(),
            disturbed: now,
            written: (0, now),
            random: Random::new(seed, Stream::Machines),
            name_random: Random::new(seed, Stream::Names),
            expiry: Timer::default(),
            captured: VecDeque::new(),
            storage: vec![0; HEADROOM + frame::MAX_LEN + HEADROOM],
            traced: 0,
        }
    }

    /// The process that runs on a machine.
    pub(super) fn who(&self, machine: usize) -> Option<Who> {
        let process = self.machines[machine].process.as_ref()?.number;
        Some(Who { machine, process })
    }

    /// The machine that has a public address.
    pub(super) fn machine_at(&self, address: IpAddr) -> Option<usize> {
        match address {
            IpAddr::V4(address) => self.addresses.get(&address).copied(),
            IpAddr::V6(address) => {
                let mut machines = self.machines.iter();
                machines.position(|machine| machine.public_ipv6 == Some(address))
            }
        }
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, duration: Duration) -> Result<(), Violation> {
        let until = self.queue.now() + duration;
        while let Some(due) = self.queue.next(until) {
            self.figures.steps += 1;
            self.happen(due)?;
        }
        self.queue.advance(until);
        Ok(())
    }

    fn happen(&mut self, due: Due) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(due) = self.unless_frozen(due) else {
            return Ok(());
        };
        match due {
            Due::Agent(who) => {
                let process = self.machines[who.machine].process(who);
                if process.is_some_and(|process| process.agent.timer.fires(now)) {
                    self.drive(who)?;
                }
            }
            Due::Request(who, id, op) => self.serve(who, id, op)?,
            Due::Answer(who, id, answer) => self.take_answer(who, id, answer)?,
            Due::Open(who, id, from) => self.serve_watch(who, id, from),
            Due::Opened(who, id, opened) => self.take_watch(who, id, opened)?,
            Due::Patience(who, id) => self.lose_patience(who, id)?,
            Due::Watch(who, number) => self.tell_watch(who, number)?,
            Due::WatchEnds(who) => {
                self.end_watch(who)?;
                self.end_names(who)?;
            }
            Due::KeepAlive(who, number) => self.keep_alive(who, number)?,
            Due::Farewell(who) => self.end_for_now(who, "could not give its lease back"),
            Due::Expiry => {
                if self.expiry.fires(now) {
                    self.store.expire(now);
                    self.store_changed()?;
                }
            }
            Due::OpenFlannel(number, from) => self.open_flannel(number, from),
            Due::TellFlannel(number) => self.tell_flannel(number),
            Due::Wake(machine, since) => self.wake_since(machine, since),
            Due::Start(machine) => self.start(machine)?,
            Due::Plug(who, name) => self.plug_again(who, &name)?,
            Due::Node(who, worker) => self.node_timeout(who, worker)?,
            Due::Names(who) => self.names_timeout(who)?,
            Due::NameRequest(who, op) => self.serve_names(who, op)?,
            Due::NameWatch(who) => self.tell_names(who)?,
            Due::Message(who, worker, message) => self.take_message(who, worker, message)?,
            Due::Device(who, port) => {
                let running = self.machines[who.machine].running(who);
                let plugged = running.and_then(|running| running.ports.get_mut(&port));
                if plugged.is_some_and(|plugged| plugged.timer.fires(now)) {
                    self.poll_device(who, port)?;
                }
            }
            Due::ToDevice(who, port, frame) => self.deliver(who, port, &frame)?,
            Due::FromDevice(who, port, frame) => self.hear_device(who, port, frame),
            Due::Turn(who, port) => self.take_turn(who, port)?,
            Due::Socket(who, worker, id, happening) => {
                self.socket_event((who, worker), id, happening)?;
            }
            Due::Frame(machine, bytes) => self.take_link_frame(machine, &bytes)?,
            Due::Datagram {
                source,
                destination,
                bytes,
            } => self.datagram(source, destination, &bytes)?,
        }
        Ok(())
    }

    /// Something was written to the store, or has ended there.
    pub(super) fn store_changed(&mut self) -> Result<(), Violation> {
        if self.store.revision() != self.written.0 {
            self.written = (self.store.revision(), self.queue.now());
        }
        for retimed in self.store.retimed() {
            invariants::retimed(&retimed)?;
        }
        for lost in self.store.lost() {
            self.oracle.excuse(&lost.key, lost.writer);
            if lost.expired {
                self.check_renewal(&lost)?;
            }
        }
        if let Some(at) = self.store.next_expiry()
            && self.expiry.arm(at)
        {
            self.queue.schedule(at, Due::Expiry);
        }
        self.wake_watches();
        self.wake_names();
        self.wake_flannels();
        Ok(())
    }

    /// Whether nodes that reach the store have had time to do what they must.
    pub(super) fn is_calm(&self) -> bool {
        self.queue.now() >= self.disturbed + CALM
            && self.store_weather.is_fair()
            && !self.store.lags()
    }

    /// No lease ends while its node runs and nothing keeps it from renewing it.
    fn check_renewal(&self, lost: &Lost) -> Result<(), Violation> {
        let machine = lost.writer;
        let process = self.machines[machine].process.as_ref();
        let running = process.and_then(|process| process.running.as_ref());
        let is_held = running
            .is_some_and(|running| lost.key == format!("{}/{}", lease_prefix(PREFIX), running.key));
        let sleeps = self.machines[machine].frozen.is_some();
        if is_held && !sleeps && self.is_calm() && self.reaches_store(machine) {
            return Err(Violation(format!(
                "the lease {} of machine {machine} ends, which could have renewed it",
                lost.key
            )));
        }
        Ok(())
    }
}
