//! A node: lease, data path, pods and control socket, wired together.
//!
//! The lease rules say what has changed; what that means here is in `Driver`. The tunnel's port
//! is taken before a lease is, so that a node that cannot run leaves nothing behind.

mod capture;
mod cni;
mod diary;
mod doors;
mod exchange;
mod follow;
mod front;
mod handover;
mod heartbeat;
mod host_interface;
mod leases;
mod limits;
mod live;
mod liveness;
mod metrics;
mod naming;
mod pods;
mod records;
mod report;
mod running;
mod settings;
mod stores;
mod succession;
mod trace;
mod underlay;

use std::iter;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use doors::Doors;
use follow::Follower;
use front::Front;
pub(crate) use host_interface::NAME as HOST_INTERFACE;
use metrics::Exporter;
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::wireguard::PublicKey;
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::control::Link;
use muslin_stack::api::events::EventKind;
use muslin_stack::control::ipam::Memory;
use muslin_stack::control::lease::OwnChange;
use muslin_stack::control::lease::{
    Backend, Change, ConfigFault, Identity, Loss, Manager, ManagerSettings, NetworkConfig,
    SubnetKey, WantedConfig, WireGuardMode,
};
use muslin_stack::control::peers::Here;
use muslin_stack::control::plane::ControlPlane;
use muslin_stack::control::tunnel::TunnelPlan;
use muslin_stack::datapath::capture::Captures;
use muslin_stack::datapath::egress::{EgressConfig as Outside, Policy, Rules};
use muslin_stack::datapath::filter::Unfiltered;
use muslin_stack::datapath::node::NodeConfig;
use muslin_stack::datapath::tunnel::Tunnel;
use naming::NameService;
use parking_lot::Mutex;
pub(crate) use records::directories;
use running::{NodeInfo, RunningNode};
pub use settings::{NodeSettings, Offload, TraceSecret, WireGuardSettings};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};
use underlay::{Fit, Place};

use crate::condition::{Condition, Need};
use crate::confine::{self, Capability};
use crate::control::{self, Departing};
use crate::error::{Context, Error, Result};
use crate::flannel::{self, FlannelFiles, SubnetEnv};
use crate::host::{self, Clock, Endpoints};
use crate::http;
use crate::journal::Journal;
use crate::keeper::{Keeper, Kept};
use crate::lease::{self, News, Reply, Terms};
use crate::netlink::Changes;
use crate::notify;
use crate::random::random;
use crate::state::{self, StateDir, StoreId};
use crate::store::{self, Measured};
use crate::takeover::{Estate, Inherited, Predecessor};
use crate::underlay::{Adopted, PublicInterface, TunnelSockets, Underlay};
use crate::wireguard_key;
use crate::worker::{Event, Node, Workers};

/// Number of keys that are not leases after which no more are logged.
const MAX_SKIPPED: u32 = 50;

/// How long an address of IPv6 may be late at the start of a node that can do without: neighbours are asked
/// for a second or two whether they have it (RFC 4862), and routers are heard a few seconds later.
const IPV6_PATIENCE: Duration = Duration::from_secs(10);
/// Timeout for writing a node's end to the store.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long pods of an earlier run may take to be attached again before they count as gone.
const AWAITED: muslin_stack::Duration = muslin_stack::Duration::from_secs(10);

/// How a node ends that could go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It stops, and its lease is there for its successor.
    Stop,
    /// It gives its lease back.
    Leave,
}

/// Runs a node until a signal stops it, or it cannot continue.
///
/// # Errors
/// Why it cannot run.
pub async fn run(settings: NodeSettings) -> Result<()> {
    let listen = |kind| signal(kind).context("cannot listen for signals");
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ending::Stop
    };
    run_until(settings, shutdown).await
}

/// Runs a node until `shutdown` yields how it is to end, or it cannot continue.
///
/// # Errors
/// Why it cannot run, or that its lease is not given back.
pub async fn run_until(
    settings: NodeSettings,
    shutdown: impl Future<Output = Ending>,
) -> Result<()> {
    // The embedded store is there, too.
    state::check(&settings.state_dir)?;
    let store = store::open(&settings.store, &settings.etcd)?;
    let (mut predecessor, mut former) = match find_predecessor(&settings)? {
        Some((predecessor, estate)) => (Some(predecessor), Some(estate)),
        None => (None, None),
    };
    let state = match former.as_mut().and_then(Estate::take_lock) {
        Some(lock) => StateDir::inherit(&settings.state_dir, &settings.name, lock),
        None => StateDir::open(&settings.state_dir, &settings.name)?,
    };
    let identity = state.identity()?;
    let condition = Condition::new();
    let subnet_file = settings.subnet_file.clone();
    let subnet_file = subnet_file.unwrap_or_else(|| state.subnet_file());
    let flannel_files = FlannelFiles::new(subnet_file, condition.clone());
    let journal = Journal::default();
    journal.inherit(
        predecessor
            .as_mut()
            .map_or_else(Vec::new, Predecessor::take_events),
    );
    let (leave, leaving) = watch::channel(false);
    let (stop, _) = watch::channel(false);
    let doors = Doors::open(&settings, &state, former.as_mut()).await?;
    let estate = doors.copy(&state);
    let front = Arc::new(Front::new(
        settings.name.clone(),
        settings.workers,
        doors.paths(),
        condition.subscribe(),
        leave.clone(),
        estate.context("cannot copy the listeners")?,
        journal.clone(),
    ));
    let timings = front.vitals.timings.clone();
    let store: Arc<dyn store::Store> = Arc::new(Measured::new(store, timings));
    let kept = match (&settings.keeper, &predecessor) {
        (Some(keeper), None) => take_kept(keeper).await,
        _ => Kept::default(),
    };
    let (fatal, ended) = mpsc::unbounded_channel();
    let mut doors = Some(doors);
    if predecessor.is_none() {
        open(&front, doors.take(), Vec::new(), &condition, &fatal);
    }
    let start = Start {
        settings,
        store,
        state,
        identity,
        flannel_files,
        condition,
        front: front.clone(),
        leave,
        leaving,
        stop,
        fatal,
        predecessor,
        doors,
        kept,
        journal,
    };
    let result = start.run(ended, shutdown).await;
    front.finish(&result).await;
    if let Some(running) = front.running() {
        info!("node {} has stopped", running.facts.settings.name);
    }
    result
}

/// What a node has before it knows where its tunnel ends.
struct Start {
    settings: NodeSettings,
    store: Arc<dyn store::Store>,
    state: StateDir,
    identity: state::Identity,
    flannel_files: FlannelFiles,
    condition: Condition,
    front: Arc<Front>,
    leave: watch::Sender<bool>,
    leaving: watch::Receiver<bool>,
    stop: watch::Sender<bool>,
    fatal: mpsc::UnboundedSender<Error>,
    /// The process that is the node still, and what its clients come in by, until this one is.
    predecessor: Option<Predecessor>,
    doors: Option<Doors>,
    /// What an earlier process has left.
    kept: Kept,
    journal: Journal,
}

impl Start {
    async fn run(
        self,
        mut ended: mpsc::UnboundedReceiver<Error>,
        shutdown: impl Future<Output = Ending>,
    ) -> Result<()> {
        let mut shutdown = pin!(shutdown);
        let mut leaving = self.leaving.clone();
        let place = tokio::select! {
            place = underlay::find_place(
                &self.settings,
                &*self.store,
                self.identity.public_ipv6,
                (&self.condition, &self.journal),
            ) => place?,
            Some(error) = ended.recv() => return Err(error),
            _ = leaving.wait_for(|leave| *leave) => return Ok(()),
            // There is no lease to give back.
            _ = &mut shutdown => return Ok(()),
        };
        let (mut driver, leases) = self.driver(place)?;
        let clock = driver.clock;
        let store = driver.leases.clone();
        let (manager, controls) = leases;
        let begin_leaving = driver.leave.clone();
        let front = driver.front.clone();
        let result = {
            let mut leases = pin!(lease::run(
                manager,
                store,
                move || clock.now(),
                controls,
                |news| driver.take(news),
            ));
            tokio::select! {
                result = &mut leases => result,
                Some(error) = ended.recv() => Err(error),
                () = front.gone() => {
                    // The lease is the other process': nobody asks `leases` for anything any more.
                    stay_for_flows(&front).await;
                    return Ok(());
                }
                ending = shutdown => match ending {
                    Ending::Stop => Ok(()),
                    Ending::Leave => {
                        begin_leaving.send_replace(true);
                        leases.await
                    }
                },
            }
        };
        notify::stopping();
        driver.end_sharing(result.is_ok()).await;
        if let (true, Some(keeper)) = (*driver.leave.borrow(), &driver.settings.keeper) {
            // The port is free from here on.
            drop(take_kept(keeper).await);
        }
        result
    }

    fn driver(self, place: Place) -> Result<(Driver, (Manager, lease::Controls))> {
        let Place { interface, listed } = place;
        let public = interface.public();
        let mut identity = self.identity;
        let mut settings = ManagerSettings::new(
            Identity {
                public_ip: public.ipv4().unwrap_or(Ipv4Addr::UNSPECIFIED),
                public_ipv6: public.ipv6(),
                vtep_mac: identity.vtep_mac,
                // It is known once the network is, if that needs one.
                public_key: None,
            },
            self.settings.prefix.clone(),
            self.settings.wanted_config.clone(),
            u64::from_ne_bytes(random()?),
        );
        settings.multicast = self.settings.multicast;
        if let Some(listed) = listed {
            settings.take(&listed);
            identity.vtep_mac = settings.identity.vtep_mac;
        }
        // What this node knows of itself comes before what flannel's file says.
        settings.previous = identity
            .subnet
            .or_else(|| self.flannel_files.previous_subnet());
        settings.previous_ipv6 = identity
            .subnet_ipv6
            .or_else(|| self.flannel_files.previous_ipv6_subnet());
        settings.renew_margin = self.settings.renew_margin;
        settings.repeats = self.store.is_shared_with_flannel();
        let manager = Manager::new(settings);
        let (public_ip, addresses) = watch::channel(public.ipv4());
        let (public_ipv6, ipv6_addresses) = watch::channel(public.ipv6());
        let (seen, interface) = watch::channel(interface);
        let (networks, known) = watch::channel(underlay::asked_networks(&self.settings));
        let mut driver = Driver {
            store: self.store.describe(),
            leases: self.store,
            settings: self.settings,
            state: Arc::new(self.state),
            identity,
            is_anew: false,
            interface,
            networks,
            awaited_since: None,
            clock: Clock::start(),
            leave: self.leave,
            stop: self.stop,
            addresses: (addresses.clone(), ipv6_addresses.clone()),
            fatal: self.fatal,
            flannel_files: Arc::new(Mutex::new(self.flannel_files)),
            condition: self.condition,
            front: self.front.clone(),
            tunnel: None,
            skipped: 0,
            control: Arc::default(),
            sharing: None,
            predecessor: self.predecessor,
            watching: None,
            doors: self.doors,
            kept: self.kept,
            journal: self.journal,
        };
        if let Some(predecessor) = &driver.predecessor {
            let (lost, fatal) = (predecessor.lost()?, driver.fatal.clone());
            driver.watching = Some(tokio::spawn(async move {
                let _ = fatal.send(lost.await);
            }));
        }
        if let WantedConfig::Exactly(config) = &driver.settings.wanted_config {
            // A network that this node cannot be in must not be written for others.
            driver.plan(config)?;
            let config = config.clone();
            driver.wireguard(&config)?;
        }
        let follower = Follower {
            front: self.front.clone(),
            wanted: driver.settings.underlay.clone(),
            audience: underlay::audience(&driver.settings),
            networks: known,
            seen,
            public_ip,
            public_ipv6,
            complaint: String::new(),
        };
        self.front.spawn(follower.follow());
        let controls = lease::Controls {
            leave: self.leaving,
            public_ip: addresses,
            public_ipv6: ipv6_addresses,
            turn: self.front.turn.clone(),
            ends: self.front.vitals.lease_ends.clone(),
            journal: driver.journal.clone(),
        };
        Ok((driver, (manager, controls)))
    }
}

/// What changes of the lease mean for this node.
struct Driver {
    settings: NodeSettings,
    store: String,
    leases: Arc<dyn store::Store>,
    state: Arc<StateDir>,
    identity: state::Identity,
    /// Whether that is another one than is written down.
    is_anew: bool,
    /// The underlay's interface as it was seen last.
    interface: watch::Receiver<PublicInterface>,
    /// Takes the pod networks, by which the interface is chosen from then on.
    networks: watch::Sender<Option<Nets>>,
    /// Since when an address of IPv6 is waited for.
    awaited_since: Option<Instant>,
    clock: Clock,
    leave: watch::Sender<bool>,
    /// Whether the node stops and keeps its lease.
    stop: watch::Sender<bool>,
    /// The public addresses that the lease is to have.
    addresses: (
        watch::Receiver<Option<Ipv4Addr>>,
        watch::Receiver<Option<Ipv6Addr>>,
    ),
    /// Takes the reason why the node cannot go on.
    fatal: mpsc::UnboundedSender<Error>,
    flannel_files: Arc<Mutex<FlannelFiles>>,
    condition: Condition,
    /// The service of the control sockets; it holds the running node.
    front: Arc<Front>,
    /// The tunnel, from the network's configuration until the node runs.
    tunnel: Option<OpenTunnel>,
    /// Keys that were logged as not being leases.
    skipped: u32,
    /// What is known of other nodes' leases.
    control: Arc<Mutex<ControlPlane>>,
    /// Tells other nodes of this node's pods.
    sharing: Option<JoinHandle<()>>,
    /// The process that is the node until this one is, and what its clients come in by.
    predecessor: Option<Predecessor>,
    /// Looks whether that gives up.
    watching: Option<JoinHandle<()>>,
    doors: Option<Doors>,
    /// What an earlier process has left.
    kept: Kept,
    /// Takes what happens.
    journal: Journal,
}

/// A tunnel whose port is taken.
struct OpenTunnel {
    config: NetworkConfig,
    plan: TunnelPlan,
    interface: PublicInterface,
    /// What WireGuard needs, if it is one of that.
    wireguard: Option<WireGuardSettings>,
    /// For each worker.
    sockets: Vec<Option<TunnelSockets>>,
}

/// What a node has of a network's IPv6.
enum Settled {
    /// All, or the network has none.
    AsItIs,
    /// Nothing, for this reason.
    Without(String),
    /// That is not known yet.
    Later,
}

impl Driver {
    fn take(&mut self, news: News) -> Result<Reply> {
        match news {
            News::Lease(Change::Own(OwnChange::Configured(config))) => {
                return self.configure(config);
            }
            News::Lease(change) => self.apply(change)?,
            News::StoreFails(reason) => {
                self.condition.lack(Need::Store, &reason);
            }
            News::StoreWorks => self.condition.have(Need::Store),
            News::StoreKnown => return self.recognize(),
        }
        Ok(Reply::Taken)
    }

    /// Looks whether the node's state is of this store. What it was in another one it is not here, where
    /// others may be that.
    fn recognize(&mut self) -> Result<Reply> {
        let Some(id) = self.leases.id() else {
            return Ok(Reply::Taken);
        };
        let store = StoreId {
            url: self.store.clone(),
            id,
            prefix: self.settings.prefix.clone(),
        };
        let former = self.identity.store.replace(store.clone());
        let Some(former) =
            former.filter(|former| former.id != store.id || !store.continues(former))
        else {
            return Ok(Reply::Taken);
        };
        if store.continues(&former) {
            info!(
                "{store} was recreated since this node last used it: the node keeps its identity"
            );
            return Ok(Reply::Taken);
        }
        let text = format!(
            "this node's state belongs to {former}: in {store} the node starts afresh, with a new \
             VTEP and subnet and new addresses for its pods"
        );
        self.journal.note(EventKind::IdentityChanged, &store, text);
        self.identity = state::Identity {
            store: Some(store),
            ..state::Identity::fresh()?
        };
        self.is_anew = true;
        Ok(Reply::Anew(self.identity.vtep_mac))
    }

    /// Opens the tunnel of a network. One that this node cannot be in as it is now it waits for, if
    /// others may have mended it by then.
    fn configure(&mut self, config: NetworkConfig) -> Result<Reply> {
        if self.tunnel.is_some() || self.running().is_some() {
            return Ok(Reply::Taken);
        }
        self.networks
            .send_if_modified(|it| it.replace(config.networks()) != Some(config.networks()));
        let without_ipv6 = match self.settle_ipv6(&config) {
            Ok(Settled::Later) => return Ok(Reply::ConfigRefused),
            Ok(Settled::AsItIs) => None,
            Ok(Settled::Without(reason)) => Some(reason),
            Err(Error::Usage(reason)) if store::is_shared(&self.settings.store) => {
                self.await_config(&reason);
                return Ok(Reply::ConfigRefused);
            }
            Err(error) => return Err(error),
        };
        let limits = flannel::limits(&config);
        let public_key;
        match self.open_tunnel(config) {
            Ok(tunnel) => {
                public_key = tunnel.wireguard.as_ref().map(WireGuardSettings::public_key);
                self.tunnel = Some(tunnel);
            }
            Err(Error::Usage(reason)) if store::is_shared(&self.settings.store) => {
                self.await_config(&reason);
                return Ok(Reply::ConfigRefused);
            }
            Err(error) => return Err(error),
        }
        for limit in limits {
            warn!("{limit}");
        }
        self.condition.have(Need::Config);
        Ok(Reply::ConfigTaken(Terms {
            without_ipv6,
            public_key,
        }))
    }

    /// Looks whether the interface has what the network needs of IPv6, and waits for it where it may come:
    /// not long, unless the user has named the address or the network has nothing else.
    fn settle_ipv6(&mut self, config: &NetworkConfig) -> Result<Settled> {
        let interface = self.interface.borrow().clone();
        let plan = underlay::plan(config, &self.settings, &interface, self.identity.vtep_mac)?;
        let wanted = &self.settings.underlay;
        let had_ipv6 = self.identity.subnet_ipv6.is_some();
        let is_only = config.backend.wireguard_mode() == Some(WireGuardMode::Ipv6);
        let needs_ipv6 = is_only || !config.enable_ipv4;
        let (reason, is_long) = match underlay::fit(config, &plan, &interface, wanted) {
            Fit::Good => return Ok(self.end_waiting(Settled::AsItIs)),
            Fit::Bad(reason) if wanted.public_ipv6.is_some() => {
                let text = format!("{reason}: choose another with --public-ipv6");
                return Err(Error::usage(text));
            }
            Fit::WithoutIpv6(reason) if needs_ipv6 => {
                let why = match is_only {
                    true => "the network's nodes reach each other by IPv6 (Mode ipv6)",
                    false => "the network has IPv6 alone",
                };
                return Err(Error::usage(format!("{why}: {reason}")));
            }
            // What was there may be late at this boot.
            Fit::WithoutIpv6(reason) if interface.ends.ipv6().is_none() && had_ipv6 => {
                (format!("{reason}, but had one before"), false)
            }
            Fit::WithoutIpv6(reason) => return Ok(self.end_waiting(Settled::Without(reason))),
            Fit::Bad(reason) => (reason, needs_ipv6),
            Fit::Soon(reason) => (reason, needs_ipv6 || wanted.public_ipv6.is_some()),
        };
        let since = *self.awaited_since.get_or_insert_with(Instant::now);
        if !is_long && since.elapsed() >= IPV6_PATIENCE {
            return Ok(self.end_waiting(Settled::Without(reason)));
        }
        if self.condition.lack(Need::Interface, &reason) {
            let how_long = match is_long {
                true => String::new(),
                false => format!(" for up to {} s", IPV6_PATIENCE.as_secs()),
            };
            let text = format!("{reason}: waiting for another address of IPv6{how_long}");
            let journal = &self.journal;
            journal.note(EventKind::InterfaceAway, "underlay", text);
        }
        Ok(Settled::Later)
    }

    fn end_waiting(&mut self, settled: Settled) -> Settled {
        if self.awaited_since.take().is_some() {
            self.condition.have(Need::Interface);
            let addresses = self.interface.borrow().public();
            let text = format!("the node goes on with the addresses {addresses}");
            let journal = &self.journal;
            journal.note(EventKind::InterfaceBack, "underlay", text);
        }
        settled
    }

    /// The address that tells this node from others, for people.
    fn address(&self) -> String {
        let (ipv4, ipv6) = &self.addresses;
        let all = Addresses::new(*ipv4.borrow(), *ipv6.borrow());
        all.map_or_else(String::new, |all| all.to_string())
    }

    /// Writes down which address of IPv6 the lease names, for the next start.
    fn remember_ipv6(&mut self) -> Result<()> {
        let public_ipv6 = self.running().and_then(|running| running.public_ipv6());
        if public_ipv6.is_none() || self.identity.public_ipv6 == public_ipv6 {
            return Ok(());
        }
        self.identity.public_ipv6 = public_ipv6;
        self.state.write_identity(&self.identity)
    }

    /// Says once why the store's configuration cannot be used.
    fn await_config(&self, fault: &str) {
        let reason = format!("{}: {fault}", self.store);
        if self.condition.lack(Need::Config, &reason) {
            let text = format!("{reason}: waiting for a usable one");
            let journal = &self.journal;
            journal.note(EventKind::ConfigRefused, &self.store, text);
        }
    }

    fn running(&self) -> Option<&Arc<RunningNode>> {
        self.front.running()
    }

    fn apply(&mut self, change: Change) -> Result<()> {
        debug!("lease: {change:?}");
        let Some(change) = self.control.lock().take(change) else {
            return match self.running() {
                Some(running) => running.update_tables(),
                None => Ok(()),
            };
        };
        match change {
            // Nobody but the one who has named another network looks after a store of his own.
            OwnChange::AwaitsConfig(fault @ ConfigFault::OtherNetwork { .. })
                if !store::is_shared(&self.settings.store) =>
            {
                return Err(Error::usage(explain(&fault)));
            }
            OwnChange::AwaitsConfig(fault) => self.await_config(&explain(&fault)),
            // It is taken before.
            OwnChange::Configured(_) => {}
            OwnChange::Acquired(key) => self.start(key)?,
            OwnChange::Renewed => {
                debug!("the lease is renewed");
                if let Some(running) = self.running() {
                    running.lease_confirmed();
                }
                self.remember_ipv6()?;
            }
            OwnChange::Disputed(key) => {
                let text = format!("another writer changed the lease {key}; writing it again");
                self.journal.note(EventKind::LeaseDisputed, key, text);
            }
            OwnChange::Moved { key, from } => {
                let text = format!(
                    "the lease {key} moves from the public address {from} to {}",
                    self.address()
                );
                self.journal.note(EventKind::LeaseMoved, key, text);
            }
            OwnChange::Replaced { key, end } => {
                let text = format!(
                    "the lease {key} already had the public address {}, with the {end}: \
                     it is taken over; if that node is alive, one of the two needs another address",
                    self.address()
                );
                self.journal.note(EventKind::LeaseDisputed, key, text);
            }
            OwnChange::Races { attempts } => info!(
                "other nodes take subnets at the same time: after {attempts} attempts this one goes on, with \
                 breaks between them"
            ),
            OwnChange::NoIpv6(reason) => warn!("this node has no IPv6 subnet: {reason}"),
            OwnChange::Changed { from, to } => {
                let text = format!("the lease {from} becomes {to}");
                self.journal.note(EventKind::LeaseMoved, to, text);
            }
            OwnChange::Overlap {
                key,
                node,
                contested,
            } => {
                let text = match contested.public_key {
                    Some(holder) => format!(
                        "the lease {key} of {node} has the public key of {holder}, whose lease is older: it \
                         has no traffic"
                    ),
                    None => {
                        let holders = [contested.ipv4, contested.ipv6].into_iter().flatten();
                        let holders: Vec<_> = holders.map(|it| it.to_string()).collect();
                        format!(
                            "the lease {key} of {node} overlaps with that of {}: it has no traffic of \
                             that subnet",
                            holders.join(" and ")
                        )
                    }
                };
                self.journal.note(EventKind::LeaseDisputed, key, text);
            }
            OwnChange::Skipped { key, reason } => self.log_skipped(&key, &reason),
            OwnChange::Left => {
                let name = &self.settings.name;
                let text = "the lease is given back";
                self.journal.note(EventKind::LeaseReturned, name, text);
                self.flannel_files.lock().withdraw();
            }
            OwnChange::Lost(loss) => {
                let (name, error) = (&self.settings.name, refusal(&loss));
                let text = format!("the lease is lost: {error}");
                self.journal.note(EventKind::LeaseLost, name, text);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Logs that a key is not a lease, for a limited number of keys.
    fn log_skipped(&mut self, key: &str, reason: &str) {
        self.skipped += 1;
        if self.skipped > MAX_SKIPPED {
            return debug!("the key {key} is not a lease: {reason}");
        }
        warn!("the key {key} is not a lease: {reason}");
        if self.skipped == MAX_SKIPPED {
            warn!("further such keys are not logged: `muslin leases` shows them all");
        }
    }

    fn plan(&self, config: &NetworkConfig) -> Result<TunnelPlan> {
        if let Some(egress) = &self.settings.egress {
            egress.check(config.networks())?;
        }
        naming::resolvers(&self.settings, config.networks())?;
        let mac = self.identity.vtep_mac;
        underlay::plan(config, &self.settings, &self.interface.borrow(), mac)
    }

    /// The interface as a node of this network has it.
    fn interface_for(&self, config: &NetworkConfig) -> PublicInterface {
        let mut interface = self.interface.borrow().clone();
        interface.awaits_ipv6 = false;
        match config.ipv6 {
            Some(_) => interface,
            None => interface.with_ipv6(None),
        }
    }

    /// What this node needs for a network of WireGuard: its key, which is made if there is none yet.
    fn wireguard(&mut self, config: &NetworkConfig) -> Result<Option<WireGuardSettings>> {
        let Backend::WireGuard(options) = &config.backend else {
            return Ok(None);
        };
        if self.settings.workers > 1 {
            if self.settings.has_named_workers {
                return Err(Error::failed(format!(
                    "--workers {}: a node of the backend wireguard has one packet thread: leave out \
                     --workers",
                    self.settings.workers
                )));
            }
            info!("a node of the backend wireguard has one packet thread");
            self.settings.workers = 1;
            self.front.set_queues(1);
        }
        let file = self.settings.wireguard_key_file.clone();
        let file = file.unwrap_or_else(|| self.state.wireguard_key_file());
        let private_key = wireguard_key::read_or_make(&file)?;
        let wireguard = WireGuardSettings::new(private_key, options);
        self.check_listed_key(wireguard.public_key(), &file)?;
        Ok(Some(wireguard))
    }

    /// Whether a static list, if that is the store, has this node's public key, which is of this file.
    fn check_listed_key(&self, own: PublicKey, file: &Path) -> Result<()> {
        let public_ip = self.interface.borrow().public().ipv4();
        let listed = self
            .leases
            .listed(public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED));
        let Some(listed) = listed.map_err(Error::usage)? else {
            return Ok(());
        };
        let listed = listed.public_keys().next();
        if listed == Some(own) {
            return Ok(());
        }
        let instead = listed.map_or_else(String::new, |key| format!(" in place of {key}"));
        Err(Error::usage(format!(
            "this node needs public-key = \"{own}\" there{instead}, which is the key of {}",
            file.display()
        )))
    }

    fn open_tunnel(&mut self, config: NetworkConfig) -> Result<OpenTunnel> {
        let mut plan = self.plan(&config)?;
        let wireguard = self.wireguard(&config)?;
        let interface = self.interface_for(&config);
        let sockets = match &self.predecessor {
            Some(predecessor) => {
                let (about, workers) = (&predecessor.about, self.settings.workers);
                succession::check(about, config.backend.name(), &plan, &interface, workers)?;
                plan.is_direct = about.is_direct;
                Vec::new()
            }
            None => {
                let kept = std::mem::take(&mut self.kept.tunnel);
                match underlay::reuse(kept, &plan, &self.settings, interface.addresses()) {
                    Some(sockets) if !plan.is_direct => sockets,
                    _ => underlay::bind(&mut plan, config.networks(), &self.settings, &interface)?,
                }
            }
        };
        Ok(OpenTunnel {
            config,
            plan,
            interface,
            wireguard,
            sockets,
        })
    }

    /// The tunnel that was opened for the lease, or another one if the interface has changed since.
    fn take_tunnel(&mut self) -> Result<OpenTunnel> {
        let Some(tunnel) = self.tunnel.take() else {
            return Err(Error::failed(
                "the lease changed to another subnet while the node ran",
            ));
        };
        if tunnel.interface == self.interface_for(&tunnel.config) {
            return Ok(tunnel);
        }
        let OpenTunnel {
            config, sockets, ..
        } = tunnel;
        // The port must be free, in case the new end is the old one.
        drop(sockets);
        self.open_tunnel(config).map_err(Error::failed)
    }

    /// The node has its lease: data path and pods begin.
    fn start(&mut self, key: SubnetKey) -> Result<()> {
        let tunnel = self.take_tunnel()?;
        let predecessor = self.predecessor.take();
        if let Some(watching) = self.watching.take() {
            watching.abort();
        }
        let interface = tunnel.interface;
        // Who goes without an IP version this time asks for what it had the next time.
        self.identity.subnet = key.ipv4().or(self.identity.subnet);
        self.identity.subnet_ipv6 = key.ipv6().or(self.identity.subnet_ipv6);
        if let (Some(_), Some(public_ipv6)) = (key.ipv6(), interface.public().ipv6()) {
            self.identity.public_ipv6 = Some(public_ipv6);
        }
        if self.is_anew {
            self.state.forget_addresses()?;
        }
        self.state.write_identity(&self.identity)?;
        let kernel = underlay::kernel();
        let own_interface = self.settings.host_interface.as_deref();
        if let Some(ipv4) = key.ipv4() {
            underlay::warn_of_kernel(&kernel, own_interface, (tunnel.config.network, ipv4));
        }
        let config = self.node_config(key, &tunnel.plan)?;
        let now = self.clock.now();
        let (sockets, plan) = (tunnel.sockets, tunnel.plan);
        let options = match &predecessor {
            Some(_) => underlay::tested(&plan, &self.settings, interface.addresses()),
            None => None,
        };
        if !plan.is_direct && plan.tunnel != Tunnel::Ipip {
            confine::try_all(&[|| confine::without(Capability::CAP_NET_RAW)]);
        }
        let mut endpoints = match self.settings.egress {
            Some(_) => Endpoints::new(self.leases.servers()),
            None => Endpoints::default(),
        };
        let own: Vec<_> = kernel.addresses().map(IpAddr::from).collect();
        let stores = endpoints.look(&own);
        let outside = self.egress_config(key, &plan, tunnel.config.networks(), &stores)?;
        let memory = self.state.addresses();
        let pods: Vec<_> = memory.iter().flat_map(Memory::addresses).collect();
        let mut control = self.control.lock();
        let public = interface.public();
        let here = Here {
            public_key: tunnel.wireguard.as_ref().map(WireGuardSettings::public_key),
            addresses: Addresses::new(public.ipv4(), key.ipv6().and(public.ipv6())),
        };
        control.start(tunnel.config.clone(), plan, key, here);
        let updates: Vec<_> = iter::from_fn(|| control.poll()).collect();
        drop(control);
        let (naming, connector) =
            NameService::start(&self.settings, tunnel.config.networks(), key.nets())?;
        // From here on nobody moves packets, until this process does.
        let inherited = predecessor.as_ref().map(Predecessor::switch).transpose()?;
        let mut inherited = inherited.unwrap_or_default();
        let (underlays, uplink) = match &predecessor {
            Some(_) => {
                let workers = std::mem::take(&mut inherited.workers);
                underlay::adopt(&plan, workers, options, &self.settings, &interface)?
            }
            None => underlay::join(&plan, sockets, key.nets(), &self.settings, &interface)?,
        };
        let tunnel_copies = self.copy_tunnel(&underlays);
        let nodes = underlays.into_iter().zip(0..).map(|(underlay, worker)| {
            let node = Node::with(config.clone(), Captures::default(), Unfiltered, now);
            let mut node = node.map_err(Error::usage)?;
            node.set_uplink(uplink);
            if self.settings.multicast {
                node.set_multicast(now, Some(worker == 0));
            }
            for (host, mac) in &inherited.next_hops {
                node.learn_next_hop(now, *host, *mac);
            }
            node.set_egress(Some(tunnel.config.networks()));
            node.await_pods(pods.iter().copied(), now + AWAITED);
            // Before it takes what has come to the tunnel's port already.
            for update in &updates {
                update.apply_to_node(&mut node);
            }
            Ok((node, underlay))
        });
        let nodes = nodes.collect::<Result<_>>()?;
        let (sender, events) = mpsc::unbounded_channel();
        let wireguard = tunnel.wireguard.as_ref().map(WireGuardSettings::config);
        let workers = Workers::start(
            nodes,
            wireguard.as_ref(),
            &outside,
            &connector,
            self.clock,
            &sender,
        );
        let workers = workers.context("cannot start the data path")?;
        let facts = NodeInfo {
            settings: self.settings.clone(),
            store: self.store.clone(),
            interface,
            config: tunnel.config,
            plan,
            wireguard: tunnel.wireguard,
            subnets: key.nets(),
            gateway_mac: self.identity.gateway_mac.get(),
            control: self.front.sockets(),
            clock: self.clock,
        };
        let subnet = SubnetEnv {
            subnets: facts.networks_and_subnets(),
            mtu: facts.plan.mtu.get(),
            ip_masq: self.settings.ip_masq,
        };
        let ready = format!("node {} is ready: {facts}", self.settings.name);
        self.journal.note(EventKind::LeaseTaken, key, &ready);
        self.sharing = Some(self.front.spawn(self.sharing(&naming, &facts).run()));
        let running = RunningNode::new(
            facts,
            workers,
            naming,
            self.control.clone(),
            self.leases.clone(),
            self.state.clone(),
            &self.front,
        )?;
        for update in &updates {
            running.update(update)?;
        }
        self.take_up(&running, &mut inherited)?;
        let running = Arc::new(running);
        if !self.front.serve(running.clone()) {
            return Err(Error::failed("the node is already running"));
        }
        if let Some(predecessor) = predecessor {
            self.succeed(predecessor, inherited.clients, &running)?;
        }
        running.have_tunnel_kept(tunnel_copies);
        self.front
            .spawn(stores::follow(endpoints, stores, running.clone()));
        self.look_after(&running);
        self.watch_over(running, events);
        self.flannel_files.lock().announce(subnet, &ready);
        Ok(())
    }

    /// Gives a node what another process had for it, and has it read packets.
    fn take_up(&mut self, running: &RunningNode, inherited: &mut Inherited) -> Result<()> {
        if let Some(channel) = inherited.channel.take() {
            let succeeded = running.workers.succeed(&inherited.flows, channel);
            succeeded.context("cannot go on with flows")?;
        }
        let mut devices = running.adopt(std::mem::take(&mut inherited.pods));
        let kept = std::mem::take(&mut self.kept.devices);
        devices.extend(kept.into_iter().map(|(key, queues)| (key, queues.into())));
        running.recall_attachments(devices);
        running.host.inherit(std::mem::take(&mut inherited.host));
        running.workers.read().map_err(Error::failed)
    }

    /// Is the node from now on, in place of another process.
    fn succeed(
        &mut self,
        predecessor: Predecessor,
        clients: Vec<Departing>,
        running: &Arc<RunningNode>,
    ) -> Result<()> {
        let connection = predecessor.succeed()?;
        let (name, text) = (&self.settings.name, "this process has taken over the node");
        self.journal.note(EventKind::TakenOver, name, text);
        let front = &self.front;
        front.spawn(running.clone().follow_flows(connection));
        let doors = self.doors.take();
        open(front, doors, clients, &self.condition, &self.fatal);
        Ok(())
    }

    /// Does what is to be done for as long as the node runs.
    fn look_after(&self, running: &Arc<RunningNode>) {
        let front = &self.front;
        front.spawn(running.clone().keep_attachments());
        front.spawn(keep_mtu(self.flannel_files.clone(), running.link()));
        if let Some(name) = self.settings.host_interface.clone() {
            let changes = Changes::listen();
            front.spawn(host_interface::follow(name, changes, running.clone()));
        }
        front.spawn(limits::watch(running.clone()));
        if let Some(messages) = running.exchange.open(&running.workers) {
            front.spawn(exchange::serve(running.clone(), messages));
        }
        front.spawn(heartbeat::watch(running.clone(), self.condition.clone()));
    }

    /// Copies of the tunnel's sockets for the keeper, if there is one and a tunnel.
    fn copy_tunnel(&self, underlays: &[Underlay]) -> Vec<Adopted> {
        match self.settings.keeper {
            Some(_) => underlay::copies(underlays),
            None => Vec::new(),
        }
    }

    fn node_config(&self, key: SubnetKey, plan: &TunnelPlan) -> Result<NodeConfig> {
        let mut config = NodeConfig::new(
            key.nets(),
            self.identity.gateway_mac.get(),
            plan.tunnel,
            plan.mtu,
            u64::from_ne_bytes(random()?),
        );
        config.mtu_v6 = match (key.ipv6(), plan.mtu_v6()) {
            (None, mtu) => mtu.unwrap_or(plan.mtu),
            (Some(_), Some(mtu)) => mtu,
            (Some(_), None) => {
                let least = Mtu::MIN_IPV6.get();
                return Err(Error::usage(format!(
                    "the lease has an IPv6 subnet, for which {} leaves less than {least} bytes: \
                     IPv6 needs a larger MTU, and the backend vxlan, wireguard or host-gw",
                    self.interface.borrow().name
                )));
            }
        };
        config.clamp_mss = self.settings.clamp_mss;
        config.guard.peers = self.settings.guard_peers;
        Ok(config)
    }

    fn egress_config(
        &self,
        key: SubnetKey,
        plan: &TunnelPlan,
        networks: Nets,
        stores: &[SocketAddr],
    ) -> Result<Outside> {
        let policy = match &self.settings.egress {
            None => Policy::closed(),
            Some(settings) => {
                let mut rules = Rules::default();
                rules.allow.clone_from(&settings.allow);
                rules.deny.clone_from(&settings.deny);
                rules.networks = networks.iter().collect();
                rules.host_loopback = settings.host_loopback;
                rules.nat64 = settings.nat64;
                rules.tunnel_ports = plan.ports.iter().collect();
                rules.stores = stores.to_vec();
                Policy::new(rules)
            }
        };
        let mut outside = Outside::new(policy, plan.mtu, u64::from_ne_bytes(random()?));
        outside.subnets = Some(key.nets());
        outside.limits = host::limits();
        Ok(outside)
    }

    fn sharing(&self, naming: &NameService, facts: &NodeInfo) -> lease::Sharing {
        lease::Sharing {
            store: self.leases.clone(),
            prefix: self.settings.prefix.clone(),
            networks: facts.config.networks(),
            node: naming.node().clone(),
            subnets: facts.subnets,
            pods: naming.pods(),
            leave: self.leave.subscribe(),
            stop: self.stop.subscribe(),
            names: naming.names.clone(),
            turn: self.front.turn.clone(),
            journal: self.journal.clone(),
        }
    }

    /// Tells other nodes how this one ends: its names go with the lease, if it has given that back,
    /// or its record says that it has stopped in order.
    async fn end_sharing(&mut self, is_in_order: bool) {
        let is_leaving = *self.leave.borrow();
        let is_orderly = is_leaving || is_in_order;
        self.stop.send_replace(is_orderly && !is_leaving);
        if let Some(sharing) = self.sharing.take().filter(|_| is_orderly) {
            // Without a lease names count for nothing, and of a node that stays silent they know
            // soon enough.
            let _ = tokio::time::timeout(FAREWELL, sharing).await;
        }
    }

    /// Handles the data path's events.
    fn watch_over(&self, heard: Arc<RunningNode>, mut events: mpsc::UnboundedReceiver<Event>) {
        let fatal = self.fatal.clone();
        self.front.spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    Event::PortGone(port) => {
                        debug!("the interface of port {port} is gone");
                        heard.detach_port(port);
                    }
                    Event::UplinkGone => heard.lose_uplink(),
                    Event::HostGone => heard.host.lose(),
                    Event::Ended => break,
                }
            }
            let _ = fatal.send(Error::failed("the data path's thread has ended"));
        });
    }
}

/// Tells flannel's tools when pods have another MTU.
async fn keep_mtu(flannel_files: Arc<Mutex<FlannelFiles>>, mut link: watch::Receiver<Link>) {
    while link.changed().await.is_ok() {
        let mtu = link.borrow_and_update().mtu;
        flannel_files.lock().set_mtu(mtu);
    }
}

/// The process that is the node now, if this one is to take it over.
fn find_predecessor(settings: &NodeSettings) -> Result<Option<(Predecessor, Estate)>> {
    if !settings.take_over {
        return Ok(None);
    }
    let socket = settings.socket.clone();
    let socket = socket.unwrap_or_else(|| state::socket_path(&settings.state_dir, &settings.name));
    let found = Predecessor::find(&socket)?;
    if found.is_none() {
        info!(
            "no node runs at {}: there is nothing to take over",
            socket.display()
        );
    }
    Ok(found)
}

/// What a keeper holds, where packets have waited for this process.
async fn take_kept(keeper: &Path) -> Kept {
    let taken = Keeper::new(keeper).take().await;
    taken.unwrap_or_else(|error| {
        warn!("{error}");
        Kept::default()
    })
}

/// Answers clients, those of a process before this one first.
fn open(
    front: &Arc<Front>,
    doors: Option<Doors>,
    mut inherited: Vec<Departing>,
    condition: &Condition,
    fatal: &mpsc::UnboundedSender<Error>,
) {
    let Some(doors) = doors else {
        return;
    };
    let Doors {
        control,
        health,
        metrics,
        page,
    } = doors;
    front.set_open();
    for (_, level, listener) in control {
        let own = inherited.extract_if(.., |client| client.level == level);
        let own = own.collect();
        let (service, fatal) = (front.clone(), fatal.clone());
        front.spawn(async move {
            let error = control::serve(listener, level, service, own).await;
            let _ = fatal.send(Error::failed(format!("the control socket failed: {error}")));
        });
    }
    if let Some(listener) = health {
        front.spawn(http::health::serve(listener, condition.subscribe()));
    }
    if let Some(listener) = metrics {
        let exporter = Exporter::new(front.clone(), condition.subscribe());
        front.spawn(http::metrics::serve(listener, exporter));
    }
    if let Some((page, listener)) = page {
        front.spawn(page.serve(listener));
    }
}

/// Serves flows for another process that is the node now, until they have ended or somebody insists on
/// the end: a service manager asks once when that process is ready.
async fn stay_for_flows(front: &Front) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return;
    };
    let insist = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {
                info!("flows are served to their end; another signal ends them now");
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
            }
        }
    };
    tokio::select! {
        () = front.stay_for_flows() => {}
        () = insist => warn!("flows to and from outside addresses are cut"),
    }
}

/// What is wrong with a network's configuration, and what to do.
fn explain(fault: &ConfigFault) -> String {
    match fault {
        ConfigFault::OtherNetwork { .. } => format!(
            "{fault}: to join that network leave out --network, --subnet-len, --backend, --vni, --port, \
             --direct-routing and --wireguard-mode; a second network needs another --etcd-prefix, or another --store, \
             and on the same machine another --port or --public-ip"
        ),
        ConfigFault::Missing(_)
        | ConfigFault::Invalid(_)
        | ConfigFault::NoPublicIp(_)
        | ConfigFault::NoPublicIpv6
        | ConfigFault::OtherBackend(_) => fault.to_string(),
    }
}

fn refusal(loss: &Loss) -> Error {
    match loss {
        Loss::OutOfSubnets(_) | Loss::OutOfIpv6Subnets | Loss::Races => Error::failed(loss),
        Loss::Taken { .. } | Loss::Cloned { .. } | Loss::Disputed { .. } => {
            Error::LeaseLost(loss.to_string())
        }
    }
}
