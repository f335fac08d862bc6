//! A node that has its lease: serves its clients and follows its peers' leases.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use muslin_encap::mac::DisplayMac;
use muslin_stack::addresses::{Addresses, Dual, Nets};
use muslin_stack::api::control::{
    Attach, Attached, Code, ControlSocket, Link, Namespace, PodNamespaces,
};
use muslin_stack::api::events::EventKind;
use muslin_stack::control::ipam::PodName;
use muslin_stack::control::lease::NetworkConfig;
use muslin_stack::control::plane::{ControlPlane, Operation};
use muslin_stack::control::tunnel::TunnelPlan;
use muslin_stack::datapath::gateway;
use muslin_stack::datapath::peer::PeerId;
use muslin_stack::datapath::port::PortId;
use parking_lot::Mutex;
use smoltcp::wire::EthernetAddress;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tracing::{debug, info, warn};

use super::capture::MAX_CAPTURES;
use super::cni::Cni;
use super::diary::Diary;
use super::exchange::Exchange;
use super::front::Front;
use super::host_interface::HostState;
use super::live::Watched;
use super::naming::NameService;
use super::pods::{self, Pod, Pods, check_ports, not_attached};
use super::settings::{NodeSettings, WireGuardSettings};
use super::underlay;
use crate::condition;
use crate::device::PodDevice;
use crate::error::{Context, Error, Result};
use crate::host::Clock;
use crate::host::publish::{self, Bound};
use crate::journal::Journal;
use crate::keeper::Keeper;
use crate::lines::Lines;
use crate::state::StateDir;
use crate::store::Store;
use crate::underlay::{Adopted, PublicInterface, describe_ends};
use crate::worker::{Closing, Workers};

/// What does not change while a node runs.
#[derive(Debug)]
pub(super) struct NodeInfo {
    pub(super) settings: NodeSettings,
    pub(super) store: String,
    /// The underlay's interface as it was at the start.
    pub(super) interface: PublicInterface,
    pub(super) config: NetworkConfig,
    pub(super) plan: TunnelPlan,
    /// What WireGuard needs, in a network that has it.
    pub(super) wireguard: Option<WireGuardSettings>,
    /// The subnets of the lease.
    pub(super) subnets: Nets,
    /// The gateway's MAC address.
    pub(super) gateway_mac: EthernetAddress,
    /// Where it listens for commands.
    pub(super) control: Vec<ControlSocket>,
    /// What it counts time by.
    pub(super) clock: Clock,
}

impl NodeInfo {
    /// The gateways' addresses.
    pub(super) fn gateways(&self) -> Addresses {
        self.subnets.map(gateway::address, gateway::address_v6)
    }

    /// The subnet of IPv4, for what works by that alone.
    ///
    /// # Errors
    /// Bad usage if the lease has none.
    pub(super) fn ipv4_subnet(&self) -> Result<Ipv4Net> {
        let subnet = self.subnets.ipv4();
        subnet.ok_or_else(|| Error::usage("that needs IPv4, and this node has no subnet of it"))
    }

    /// The subnets of the lease, each with the network that it is of.
    pub(super) fn networks_and_subnets(&self) -> Dual<(Ipv4Net, Ipv4Net), (Ipv6Net, Ipv6Net)> {
        let networks = self.config.networks();
        self.subnets.map(
            |subnet| (networks.ipv4().unwrap_or(subnet), subnet),
            |subnet| (networks.ipv6().unwrap_or(subnet), subnet),
        )
    }

    /// What pods reach through the gateways: the networks of the cluster, and all else.
    fn routes(&self) -> Vec<IpNet> {
        let ipv4 = [self.config.network, Ipv4Net::default()].map(IpNet::V4);
        let ipv6 = [IpNet::V6(Ipv6Net::default())];
        let ipv4 = self.subnets.ipv4().map(|_| ipv4);
        let ipv6 = self.subnets.ipv6().map(|_| ipv6);
        ipv4.into_iter()
            .flatten()
            .chain(ipv6.into_iter().flatten())
            .collect()
    }
}

impl fmt::Display for NodeInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            subnets,
            plan,
            interface,
            config,
            ..
        } = self;
        let backend = config.backend.name();
        write!(
            f,
            "subnet {subnets} of {}, {backend} on {}",
            config.networks(),
            describe_ends(interface.addresses(), plan.ports)
        )?;
        if plan.is_direct {
            write!(f, ", unencapsulated to nodes in {}", interface.prefixes())?;
        }
        if interface.is_translated() {
            write!(f, ", public address {}", interface.public())?;
        }
        Ok(())
    }
}

/// What of the underlay has changed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Followed {
    /// Whether the tunnel ends at another address.
    pub(super) is_moved: bool,
    /// Whether the uplink is another one.
    pub(super) has_uplink: bool,
    /// The MTU of pods, if it is another one.
    pub(super) mtu: Option<u16>,
}

/// A node that runs.
pub(super) struct RunningNode {
    pub(super) facts: NodeInfo,
    pub(super) workers: Workers,
    pub(super) naming: NameService,
    /// The interface by which the host and pods reach each other.
    pub(super) host: HostState,
    pub(super) pods: Mutex<Pods>,
    /// Ports that may still be open though their pods are detached.
    closing: Mutex<Vec<Closing>>,
    /// Attachments of container runtimes. Who holds it and the pods has locked the pods first.
    pub(super) cni: Mutex<Cni>,
    /// Holds the devices of those while there is no node.
    pub(super) keeper: Option<Keeper>,
    /// What is known of other nodes' leases.
    pub(super) control: Arc<Mutex<ControlPlane>>,
    /// Their lines in the log.
    peer_lines: Mutex<Lines>,
    /// The peers that the data path has.
    told_peers: Mutex<HashSet<PeerId>>,
    pub(super) since: Instant,
    pub(super) confirmed: Mutex<Instant>,
    interface: Mutex<PublicInterface>,
    link: watch::Sender<Link>,
    uplink_is_gone: AtomicBool,
    /// Whether another process takes the node over, so that nothing new begins here.
    pub(super) leaving: AtomicBool,
    /// Whether what there is has gone to that process.
    pub(super) frozen: AtomicBool,
    pub(super) leases: Arc<dyn Store>,
    /// Places for captures.
    pub(super) captures: Arc<Semaphore>,
    /// Probes that are watched for.
    pub(super) watched: Watched,
    /// What is asked of other nodes, and by them.
    pub(super) exchange: Exchange,
    diary: Diary,
    condition: watch::Receiver<condition::State>,
    /// Takes what happens.
    pub(super) journal: Journal,
}

impl RunningNode {
    pub(super) fn new(
        facts: NodeInfo,
        workers: Workers,
        naming: NameService,
        control: Arc<Mutex<ControlPlane>>,
        leases: Arc<dyn Store>,
        state: Arc<StateDir>,
        front: &Front,
    ) -> Result<Self> {
        let now = Instant::now();
        let socket = facts.control.first();
        let socket = socket.map(|socket| PathBuf::from(&socket.path));
        let pods = Pods::new(facts.subnets, state.addresses());
        let diary = Diary::open(move |memory| state.write_addresses(memory));
        Ok(Self {
            pods: Mutex::new(pods),
            closing: Mutex::default(),
            keeper: facts.settings.keeper.as_deref().map(Keeper::new),
            cni: Mutex::new(Cni::new(&socket.unwrap_or_default())),
            host: HostState::default(),
            captures: Arc::new(Semaphore::new(MAX_CAPTURES)),
            watched: Watched::default(),
            exchange: Exchange::new(facts.settings.trace_secret.as_ref()),
            diary: diary.context("cannot start a thread")?,
            control,
            peer_lines: Mutex::new(Lines::new(now)),
            told_peers: Mutex::default(),
            since: now,
            confirmed: Mutex::new(now),
            interface: Mutex::new(facts.interface.clone()),
            link: watch::Sender::new(underlay::link(&facts.plan, facts.subnets)),
            uplink_is_gone: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            facts,
            workers,
            naming,
            leases,
            condition: front.condition.clone(),
            journal: front.journal.clone(),
        })
    }

    /// The underlay's interface as it is now.
    pub(super) fn interface(&self) -> PublicInterface {
        self.interface.lock().clone()
    }

    /// The pod at a port, as it is called in a sentence.
    pub(super) fn pod_words(&self, port: PortId) -> String {
        let pods = self.pods.lock();
        let name = pods.name_of(port);
        name.map_or_else(|| format!("port {port}"), |name| format!("pod {name}"))
    }

    /// A peer, as it is called in a sentence.
    pub(super) fn peer_words(&self, id: PeerId) -> String {
        match self.peer_named(id) {
            Some((_, Some(name))) => format!("node {name}"),
            Some((address, None)) => format!("the node at {address}"),
            None => format!("peer {id}"),
        }
    }

    /// A peer's public address, and its name if that is known.
    pub(super) fn peer_named(&self, id: PeerId) -> Option<(IpAddr, Option<String>)> {
        let control = self.control.lock();
        let mut peers = control.peers().iter();
        let (key, known) = peers.find(|(_, known)| known.id == id || known.id_v6 == Some(id))?;
        let names = self.naming.names.read();
        let name = names
            .record(key.first())
            .map(|record| record.node.to_string());
        let public_ipv6 = known.record.public_ipv6.filter(|_| known.id != id);
        let address = public_ipv6.map_or(known.record.node_address(), IpAddr::V6);
        Some((address, name))
    }

    /// How packets travel as things are now.
    pub(super) fn plan(&self) -> TunnelPlan {
        self.control.lock().plan().unwrap_or(self.facts.plan)
    }

    /// What the interfaces of pods are to have.
    pub(super) fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    /// The address that its lease names of IPv6, if it has a subnet of that.
    pub(super) fn public_ipv6(&self) -> Option<Ipv6Addr> {
        let subnet = self.facts.subnets.ipv6();
        subnet.and_then(|_| self.interface().public().ipv6())
    }

    /// Takes the underlay along to what its interface is now.
    pub(super) fn follow(&self, now: &PublicInterface) -> Result<Followed> {
        let (before, former) = (self.interface(), self.plan());
        let plan = underlay::follow_interface(&former, now)?;
        let ends = |it: &PublicInterface| (it.addresses(), it.public());
        let followed = Followed {
            is_moved: ends(now) != ends(&before),
            has_uplink: self.needs_uplink(now),
            mtu: (plan.mtu != former.mtu).then_some(plan.mtu.get()),
        };
        if followed.is_moved || followed.has_uplink {
            self.move_to(now, &plan)?;
        }
        *self.interface.lock() = now.clone();
        self.control.lock().set_plan(plan);
        self.update_tables()?;
        Ok(followed)
    }

    /// Logs the pods whose MTU cannot be changed, since `muslin attach` has ended.
    fn warn_unattended(&self, mtu: u16) {
        let pods = self.pods.lock();
        let names = pods.iter().filter(|(_, pod)| pod.details.persistent);
        let names: Vec<_> = names.map(|(name, _)| name.as_str()).collect();
        if !names.is_empty() {
            warn!(
                "the interfaces of {} keep their MTU, since 'muslin attach' has ended: set {mtu} in \
                 their namespaces, or attach them again",
                names.join(", ")
            );
        }
    }

    /// Moves the tunnel and the uplink to what the interface is now.
    fn move_to(&self, interface: &PublicInterface, plan: &TunnelPlan) -> Result<()> {
        let networks = self.facts.config.networks();
        let is_inside = |address: &IpAddr| {
            let mut networks = networks.iter::<IpNet>();
            networks.any(|network| network.contains(address))
        };
        if let Some(address) = interface.addresses().iter().find(is_inside) {
            return Err(Error::failed(format!(
                "{address} lies in the pod network {networks}"
            )));
        }
        let facts = &self.facts;
        let interfaces = (&self.interface(), interface);
        let (underlays, uplink) = underlay::open(plan, facts.subnets, &facts.settings, interfaces)?;
        let copies = match self.keeper {
            Some(_) => underlay::copies(&underlays),
            None => Vec::new(),
        };
        self.workers
            .rebind(underlays, uplink)
            .map_err(Error::failed)?;
        self.have_tunnel_kept(copies);
        self.uplink_is_gone.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The uplink's interface is gone; it is looked for from now on.
    pub(super) fn lose_uplink(&self) {
        if !self.uplink_is_gone.swap(true, Ordering::Relaxed) {
            let name = self.interface().name;
            let text = format!("the uplink {name} is gone");
            self.journal.note(EventKind::InterfaceAway, name, text);
        }
    }

    /// Whether the uplink has to be reopened: it was gone, or its link is another one.
    fn needs_uplink(&self, now: &PublicInterface) -> bool {
        self.facts.plan.is_direct
            && (self.uplink_is_gone.load(Ordering::Relaxed) || *now != self.interface())
    }

    pub(super) fn lease_confirmed(&self) {
        *self.confirmed.lock() = Instant::now();
    }

    /// Tells of a peer, but logs not thousands.
    fn note_peer(&self, kind: EventKind, peer: impl fmt::Display, text: impl fmt::Display) {
        let mut lines = self.peer_lines.lock();
        let lines = (&mut *lines, "changes of peers");
        self.journal.note_some(lines, kind, peer, text);
    }

    /// Does what follows from changes of leases and of the underlay.
    pub(super) fn update_tables(&self) -> Result<()> {
        loop {
            let Some(operation) = self.control.lock().poll() else {
                return Ok(());
            };
            self.update(&operation)?;
        }
    }

    /// Does what follows from a change of a lease.
    pub(super) fn update(&self, operation: &Operation) -> Result<()> {
        operation.apply_to_names(&mut self.naming.names.write());
        let updated = match operation {
            Operation::SetPeer(peer) => {
                let kind = match self.told_peers.lock().insert(peer.id) {
                    true => EventKind::PeerJoined,
                    false => EventKind::PeerChanged,
                };
                let address = endpoint_words(peer.address);
                let text = format!("peer {address} has {}", peer.subnet);
                self.note_peer(kind, peer.subnet, text);
                self.workers.set_peer(peer)
            }
            Operation::RefusePeer {
                id,
                subnet,
                public_ip,
                unusable,
            } => {
                self.told_peers.lock().remove(id);
                let text = format!("the node {public_ip} cannot be a peer: {unusable}");
                self.note_peer(EventKind::PeerRefused, subnet, text);
                self.workers.remove_peer(*id)
            }
            Operation::RemovePeer {
                id,
                subnet,
                public_ip,
            } => {
                self.told_peers.lock().remove(id);
                let text = format!("peer {public_ip} is gone");
                self.note_peer(EventKind::PeerLost, subnet, text);
                self.workers.remove_peer(*id)
            }
            Operation::SetMtu(mtu) => {
                let link = underlay::link(&self.plan(), self.facts.subnets);
                self.link.send_replace(link);
                self.warn_unattended(mtu.get());
                self.workers.set_mtu(*mtu, self.plan().mtu_v6())
            }
        };
        updated.map_err(Error::failed)
    }

    /// Detaches the pod of a port, if it is not detached yet. One that a container runtime has attached
    /// keeps its place.
    pub(super) fn detach_port(&self, port: PortId) {
        // One lock for both, or another pod could have the name by then.
        let mut pods = self.pods.lock();
        if self.check_frozen().is_err() {
            return;
        }
        let Some(name) = pods.name_of(port).cloned() else {
            return;
        };
        let attachment = pods
            .get(&name)
            .and_then(|pod| pod.details.attachment.clone());
        match attachment {
            Some(key) => self.device_gone(&mut pods, &key, &name, port),
            None => {
                if let Err(error) = self.detach_from(&mut pods, &name) {
                    debug!("{error}");
                }
            }
        }
    }

    pub(super) fn detach_from(&self, pods: &mut Pods, pod: &PodName) -> Result<()> {
        pods.set_time(self.facts.clock.now());
        let gone = pods.detach(pod).ok_or_else(|| not_attached(pods, pod))?;
        self.remember(pods);
        let text = format!("pod {pod} is detached");
        self.journal.note(EventKind::PodDetached, pod, text);
        let closing = self.workers.detach(gone.port).map_err(Error::failed)?;
        self.await_closing(closing, gone.details.device);
        Ok(())
    }

    /// Knows of a port that is being closed, whose device goes, too, if that would stay without us.
    pub(super) fn await_closing(&self, closing: Closing, device: Option<Arc<PodDevice>>) {
        {
            let mut all = self.closing.lock();
            all.retain(|closing| !closing.is_over());
            all.push(closing.clone());
        }
        let (Some(device), Ok(runtime)) = (device, Handle::try_current()) else {
            return;
        };
        runtime.spawn(async move {
            closing.over().await;
            // The kernel takes its time to remove an interface.
            tokio::task::spawn_blocking(move || {
                if let Err(error) = device.set_persistent(false) {
                    debug!("the interface is gone already: {error}");
                }
            });
        });
    }

    /// Waits until what detached pods had is closed.
    pub(super) async fn closed(&self) {
        let all = self.closing.lock().clone();
        for closing in all {
            closing.over().await;
        }
    }

    /// What does not work at this moment, in one line.
    pub(super) fn trouble(&self) -> Option<String> {
        self.condition.borrow().trouble()
    }

    /// Whether something may begin.
    pub(super) fn check_leaving(&self) -> Result<()> {
        self.check_stays(&self.leaving)
    }

    /// Whether something may change.
    pub(super) fn check_frozen(&self) -> Result<()> {
        self.check_stays(&self.frozen)
    }

    fn check_stays(&self, ends: &AtomicBool) -> Result<()> {
        match ends.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(Error::refused(
                Code::NotReady,
                "another process takes this node over: try again",
            )),
        }
    }

    /// Has the keeper hold the tunnel's sockets, where datagrams wait for a restarted node.
    pub(super) fn have_tunnel_kept(&self, sockets: Vec<Adopted>) {
        let (Some(keeper), Ok(runtime)) = (self.keeper.clone(), Handle::try_current()) else {
            return;
        };
        runtime.spawn(async move {
            if let Err(error) = keeper.hold_tunnel(sockets).await {
                warn!("datagrams of other nodes will not wait for a restarted node: {error}");
            }
        });
    }

    /// Lets all know of the pods as they are now.
    pub(super) fn remember(&self, pods: &Pods) {
        if self.check_frozen().is_err() {
            return;
        }
        self.naming.set_pods(pods);
        self.diary.note(pods.memory());
    }
}

/// A pod that is detached when this is dropped.
pub(super) struct Attachment {
    running: Arc<RunningNode>,
    port: PortId,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.running.detach_port(self.port);
    }
}

impl RunningNode {
    /// Has a pod end with a client of the process before this one.
    pub(super) fn take_again(self: &Arc<Self>, name: &PodName) -> Option<Attachment> {
        let pods = self.pods.lock();
        let pod = pods.get(name).filter(|pod| !pod.details.persistent)?;
        Some(Attachment {
            running: self.clone(),
            port: pod.port,
        })
    }
}

/// The end of a tunnel, as it is called in a sentence: IPv4 in IPv4 has no port.
pub(super) fn endpoint_words(address: SocketAddr) -> String {
    match address.port() {
        0 => address.ip().to_string(),
        _ => address.to_string(),
    }
}

/// The queues of a pod's device and its MAC address, if it has one.
pub(super) fn open_queues(
    device: Vec<OwnedFd>,
    offload: bool,
) -> Result<(Option<EthernetAddress>, Vec<PodDevice>)> {
    let mut queues = Vec::new();
    let mut macs = Vec::new();
    for descriptor in device {
        let mut queue = PodDevice::from_descriptor(descriptor).map_err(Error::usage)?;
        if !offload {
            queue
                .disable_offloads()
                .context("cannot disable offloads")?;
        }
        let mac = queue.hardware_address();
        macs.push(mac.context("cannot read the device's MAC address")?);
        queues.push(queue);
    }
    match macs.as_slice() {
        [None] => Ok((None, queues)),
        [first @ Some(_), others @ ..] if others.iter().all(|mac| mac == first) => {
            Ok((*first, queues))
        }
        _ => Err(Error::usage(
            "the descriptors are not queues of the same device",
        )),
    }
}

impl RunningNode {
    /// Attaches a pod by its device, for as long as what comes with the answer lives; for good if it
    /// is persistent and nothing comes.
    pub(super) async fn attach(
        self: &Arc<Self>,
        request: Attach,
        device: Vec<OwnedFd>,
    ) -> Result<(Attached, Option<Attachment>)> {
        let interface = request.interface.clone();
        let interface = interface.filter(|_| request.persistent && self.keeper.is_some());
        let copies = match interface {
            Some(_) => self.copies_for_keeper(&device)?,
            None => Vec::new(),
        };
        let (mac, queues) = open_queues(device, self.facts.settings.offload.tap)?;
        let first = queues.first().map(PodDevice::try_clone).transpose();
        let first = first.map_err(Error::failed)?;
        // It may want the ports of one that was there before.
        self.closed().await;
        let (attached, attachment) = self.attach_now(&request, mac, queues)?;
        if let (Some(interface), Some(device)) = (interface, first) {
            let name = &attached.pod;
            let kept = self.let_outlive(&mut self.pods.lock(), name, interface, device);
            match kept {
                Ok(key) => self.have_kept(&key, &copies).await,
                Err(error) => warn!("the pod {name} will not outlive the node: {error}"),
            }
        }
        Ok((attached, attachment))
    }

    fn attach_now(
        self: &Arc<Self>,
        request: &Attach,
        mac: Option<EthernetAddress>,
        queues: Vec<PodDevice>,
    ) -> Result<(Attached, Option<Attachment>)> {
        let mut pods = self.pods.lock();
        self.check_leaving()?;
        pods.set_time(self.facts.clock.now());
        check_ports(&pods, &request.publish)?;
        let bound = publish::bind(&request.publish, self.facts.config.networks())?;
        let published: Vec<_> = bound.iter().map(|bound| bound.published).collect();
        let (name, pod) = pods::attach(&mut pods, request, mac, published)?;
        let pod = pod.clone();
        let attached = self.connect(&name, &pod, queues, bound);
        let attached = attached.and_then(|()| self.answer(&pods, &name));
        let attached = attached.inspect_err(|_| drop(pods.detach(&name)))?;
        self.remember(&pods);
        let attachment = (!pod.details.persistent).then(|| Attachment {
            running: self.clone(),
            port: pod.port,
        });
        Ok((attached, attachment))
    }

    /// Has the data path use a pod's device and its published ports.
    pub(super) fn connect(
        &self,
        name: &PodName,
        pod: &Pod,
        queues: Vec<PodDevice>,
        bound: Vec<Bound>,
    ) -> Result<()> {
        let mut attachment = pod.attachment(self.facts.settings.guard_pods);
        attachment.rates = pod.details.rates.clone();
        let network = self.facts.config.networks();
        let workers = &self.workers;
        workers
            .attach(pod.port, &attachment, queues)
            .map_err(Error::failed)?;
        workers
            .publish(pod.port, pod.address, network, bound)
            .map_err(Error::failed)?;
        let mac = DisplayMac(pod.mac);
        let text = format!("pod {name} is attached: {} at {mac}", pod.address);
        self.journal.note(EventKind::PodAttached, name, text);
        for port in &pod.details.published {
            info!("pod {name} is published: {port}");
        }
        Ok(())
    }

    /// What a pod's interface is to have.
    pub(super) fn answer(&self, pods: &Pods, name: &PodName) -> Result<Attached> {
        let pod = pods.get(name).ok_or_else(|| not_attached(pods, name))?;
        let facts = &self.facts;
        let address = facts.subnets.of_hosts(pod.address);
        let address = address.ok_or_else(|| Error::failed("the pod has no address"))?;
        let gateway = facts.gateways();
        let link = underlay::link(&self.plan(), facts.subnets);
        let node = facts.settings.name.clone();
        let mut attached = Attached::new(name.clone(), node, address, gateway, link);
        attached.routes = facts.routes();
        attached.dns = gateway.iter().take(1).collect();
        (attached.search, attached.dns_options) = self.naming.dns.search();
        attached.published.clone_from(&pod.details.published);
        Ok(attached)
    }

    /// Keeps a pod's namespaces, for commands that are run in it later.
    pub(super) fn keep_namespaces(
        &self,
        pod: &PodName,
        kinds: Vec<Namespace>,
        namespaces: Vec<OwnedFd>,
    ) -> Result<()> {
        let mut pods = self.pods.lock();
        self.check_frozen()?;
        if let Some(details) = pods.details_mut(pod) {
            details.namespaces = Some((kinds, namespaces.into()));
            return Ok(());
        }
        Err(not_attached(&pods, pod))
    }

    /// A pod's namespaces.
    pub(super) fn namespaces(&self, name: &PodName) -> Result<(PodNamespaces, Arc<[OwnedFd]>)> {
        let pods = self.pods.lock();
        let pod = pods.get(name).ok_or_else(|| not_attached(&pods, name))?;
        let (kinds, namespaces) = pod.details.namespaces.clone().ok_or_else(|| {
            Error::failed(format!(
                "the pod '{name}' has no namespace to run a command in: it belongs to a sidecar, \
                 or was attached by an older muslin"
            ))
        })?;
        let node = self.facts.settings.name.clone();
        let pod = PodNamespaces::new(node, pod.address, kinds);
        Ok((pod, namespaces))
    }

    /// Detaches a pod. Its device and its published ports are closed when this returns.
    pub(super) async fn detach(&self, pod: &PodName) -> Result<()> {
        let attachment = {
            let mut pods = self.pods.lock();
            self.check_frozen()?;
            let attachment = pods.get(pod).and_then(|pod| pod.details.attachment.clone());
            if attachment.is_none() {
                self.detach_from(&mut pods, pod)?;
            }
            attachment
        };
        match attachment {
            Some(key) => self.end(&key).await,
            None => self.closed().await,
        }
        Ok(())
    }
}
