//! What CNI plugins ask of a node: places for pods, and their devices. What is asked for is in the
//! order that makes a crash of either harmless: a reservation ends with the plugin's connection, and a
//! device is made to stay only once the attachment is written down.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use muslin_encap::mac::DisplayMac;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_stack::addresses::Addresses;
use muslin_stack::api::cni::{
    Call, Key, Missing, NetworkNamespace, Rate, Reply, Reserve, Reserved,
};
use muslin_stack::api::control::{Code, PodInterface};
use muslin_stack::api::events::EventKind;
use muslin_stack::control::attachments::{AttachmentError, Attachments, names};
use muslin_stack::control::ipam::PodName;
use muslin_stack::control::pods::{AttachError, Request};
use muslin_stack::datapath::port::{PortId, Rates};
use muslin_stack::datapath::rate::RateLimit;
use nix::unistd::geteuid;
use smoltcp::wire::EthernetAddress;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info, warn};

use super::pods::{Details, Pods, check_ports, refusal};
use super::records::{Record, Records, remove};
use super::running::{RunningNode, open_queues};
use super::succession::Returned;
use crate::device::PodDevice;
use crate::error::{Error, Result};
use crate::host::publish::{self, Bound};
use crate::keeper::is_tunnel;

/// The network of what `muslin attach` has attached; no configuration's name has a space.
const ATTACHED: &str = "muslin attach";
/// Queues of a device that a plugin makes. One worker reads it then, and another one the next pod's; the
/// kernel takes twice as long to make a device that can have several, while nobody else can make any.
const QUEUES: usize = 1;
/// Attachments that a runtime may name as being in use.
const MAX_VALID: usize = 1 << 16;
/// How often the attachments are compared with the namespaces that are there.
const LOOK: Duration = Duration::from_secs(30);

/// The attachments of CNI plugins.
pub(super) struct Cni {
    attachments: Attachments,
    /// What is kept for pods whose device is not here yet.
    waiting: BTreeMap<Key, Waiting>,
    records: Records,
    /// Reservations so far.
    reservations: u64,
    /// An end was called for here.
    released: Arc<Notify>,
}

/// What is kept for a pod until its device comes.
struct Waiting {
    reserve: Reserve,
    bound: Vec<Bound>,
}

/// What a plugin has said over a connection.
#[derive(Default)]
pub(super) struct Session {
    reservation: Option<Reservation>,
    /// What is still in use, as far as it was named.
    valid: Vec<Key>,
}

/// A place that a connection has reserved; it is given up when this is dropped.
pub(super) struct Reservation {
    running: Arc<RunningNode>,
    key: Key,
    number: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.running.give_up(&self.key, self.number);
    }
}

impl Cni {
    /// Whether a runtime has begun an attachment and has not completed it yet.
    pub(super) fn is_reserving(&self) -> bool {
        self.attachments.is_reserving()
    }

    /// Those of a node with this control socket, as far as an earlier process has written them down.
    pub(super) fn new(socket: &Path) -> Self {
        Self {
            attachments: Attachments::default(),
            waiting: BTreeMap::new(),
            records: Records::open(socket),
            reservations: 0,
            released: Arc::default(),
        }
    }
}

impl From<AttachmentError> for Error {
    fn from(error: AttachmentError) -> Self {
        let code = match error {
            AttachmentError::Present(_) | AttachmentError::HasDevice(_) => Code::AlreadyAttached,
            AttachmentError::Absent(_) => Code::NoSuchPod,
            AttachmentError::NotReserved(_) => Code::Usage,
            AttachmentError::OtherNamespace(_)
            | AttachmentError::DeviceMissing(_)
            | AttachmentError::DeviceGone(_) => Code::Amiss,
        };
        Self::refused(code, error)
    }
}

impl RunningNode {
    /// Answers a plugin.
    pub(super) async fn cni(
        self: &Arc<Self>,
        call: Call,
        device: Vec<OwnedFd>,
        session: &mut Session,
    ) -> Result<Reply> {
        self.check_frozen()?;
        match call {
            Call::Reserve(reserve) => {
                self.check_leaving()?;
                // One connection attaches one interface.
                drop(session.reservation.take());
                let (reserved, held) = self.reserve(*reserve).await?;
                session.reservation = Some(held);
                return Ok(Reply::Reserved(Box::new(reserved)));
            }
            Call::Commit { key } => {
                let held = session.reservation.take();
                let held = held.filter(|held| held.key == key);
                let held = held.ok_or_else(|| AttachmentError::NotReserved(key.clone()))?;
                let copies = self.copies_for_keeper(&device)?;
                self.commit(&held, device)?;
                self.have_kept(&key, &copies).await;
            }
            Call::Release { key } => {
                self.end(&key).await;
                self.cni.lock().released.notify_one();
            }
            Call::Check { key, netns } => {
                self.cni.lock().attachments.check(&key, &netns)?;
            }
            Call::Collect {
                network,
                valid,
                more,
            } => {
                session.valid.extend(valid);
                if session.valid.len() > MAX_VALID {
                    session.valid.clear();
                    return Err(Error::usage("too many attachments are in use"));
                }
                if more {
                    return Ok(Reply::Done);
                }
                let valid = std::mem::take(&mut session.valid);
                let now = self.facts.clock.now();
                let stale = self.cni.lock().attachments.stale(&network, &valid, now);
                for key in stale {
                    info!("the interface {key} is not in use any more");
                    self.end(&key).await;
                }
            }
            Call::Ready => self.has_room()?,
            Call::Missing => return Ok(Reply::Missing(self.missing())),
            Call::Restore { key, netns } => {
                let copies = self.copies_for_keeper(&device)?;
                self.restore(&key, &netns, device)?;
                self.have_kept(&key, &copies).await;
            }
            other => {
                return Err(Error::usage(format!(
                    "this node does not support the request {other:?}"
                )));
            }
        }
        Ok(Reply::Done)
    }

    async fn reserve(self: &Arc<Self>, reserve: Reserve) -> Result<(Reserved, Reservation)> {
        let address = addresses(&reserve.addresses)?;
        let mac = reserve.mac.as_deref().map(parse_mac).transpose()?;
        if self.release_if(&reserve.key, |records| records.take_deletion(&reserve.key)) {
            self.await_end(&reserve.key).await;
        }
        let former = self.cni.lock().attachments.admit(&reserve)?;
        match former {
            Some(pod) => {
                info!("the container of pod {pod} has started again in another namespace");
                self.end(&reserve.key).await;
            }
            // It may want the ports of one that was there before.
            None => self.closed().await,
        }
        let mut pods = self.pods.lock();
        let mut cni = self.cni.lock();
        // Another connection may have been faster.
        if cni.attachments.admit(&reserve)?.is_some() {
            return Err(AttachmentError::Present(reserve.key).into());
        }
        self.check_leaving()?;
        pods.set_time(self.facts.clock.now());
        check_ports(&pods, &reserve.publish)?;
        let bound = publish::bind(&reserve.publish, self.facts.config.networks())?;
        let details = details(&reserve, &bound);
        let pod = place(&mut pods, &reserve, address, mac, &details)?;
        let reserved = self.answer(&pods, &pod).map(|attached| {
            let mac = pods.get(&pod).map(|pod| DisplayMac(pod.mac).to_string());
            let mut reserved = Reserved::new(attached, mac.unwrap_or_default(), geteuid().as_raw());
            reserved.queues = QUEUES;
            reserved.offloads = self.facts.settings.offload.tap;
            reserved
        });
        let reserved = reserved.inspect_err(|_| drop(pods.detach(&pod)))?;
        cni.reservations += 1;
        let number = cni.reservations;
        let now = self.facts.clock.now();
        cni.attachments.reserve(&reserve, pod, number, now);
        let key = reserve.key.clone();
        cni.waiting.insert(key.clone(), Waiting { reserve, bound });
        let running = self.clone();
        Ok((
            reserved,
            Reservation {
                running,
                key,
                number,
            },
        ))
    }

    /// The connection has ended, or failed, before the attachment was complete.
    fn give_up(&self, key: &Key, number: u64) {
        let mut pods = self.pods.lock();
        let mut cni = self.cni.lock();
        if self.check_frozen().is_err() {
            return;
        }
        if let Some(pod) = cni.attachments.give_up(key, number) {
            self.forget(&mut pods, &mut cni, key, Some(&pod));
        }
    }

    /// Forgets an attachment that has ended, and its pod if it had one.
    fn forget(&self, pods: &mut Pods, cni: &mut Cni, key: &Key, pod: Option<&PodName>) {
        if let Some(pod) = pod
            && let Err(error) = self.detach_from(pods, pod)
        {
            debug!("{error}");
        }
        cni.waiting.remove(key);
        cni.records.remove(key);
    }

    fn commit(&self, held: &Reservation, device: Vec<OwnedFd>) -> Result<()> {
        let Reservation { key, number, .. } = held;
        let (mac, queues) = open_queues(device, self.facts.settings.offload.tap)?;
        let mut pods = self.pods.lock();
        let mut cni = self.cni.lock();
        self.check_frozen()?;
        let pod = cni.attachments.reserved(key, *number)?.pod.clone();
        let Waiting { reserve, bound } = cni
            .waiting
            .remove(key)
            .ok_or_else(|| AttachmentError::NotReserved(key.clone()))?;
        let device = self.go_live(&mut pods, &pod, mac, queues, bound)?;
        let is_visible = is_there(&reserve.netns);
        write_down(&pods, &cni, reserve, &pod, is_visible, &device)?;
        cni.attachments.set_attached(key);
        if is_visible {
            cni.attachments.set_visible(key);
        }
        self.remember(&pods);
        Ok(())
    }

    /// Lets a pod of `muslin attach` outlive the node, and returns what it is known by from now on.
    pub(super) fn let_outlive(
        &self,
        pods: &mut Pods,
        pod: &PodName,
        interface: PodInterface,
        device: PodDevice,
    ) -> Result<Key> {
        let key = Key::new(ATTACHED, pod.as_str(), &interface.name);
        let reserve = Reserve::new(key.clone(), interface.netns.clone());
        let mut cni = self.cni.lock();
        let device = Arc::new(device);
        // Nobody says when its namespace is gone, and its path may be another's by then.
        write_down(pods, &cni, reserve, pod, false, &device)?;
        let now = self.facts.clock.now();
        cni.attachments
            .remember(key.clone(), interface.netns, pod.clone(), false, now);
        cni.attachments.set_attached(&key);
        if let Some(details) = pods.details_mut(pod) {
            details.attachment = Some(key.clone());
            details.device = Some(device);
        }
        Ok(key)
    }

    /// Has the data path use a pod's device, of which another descriptor is returned.
    fn go_live(
        &self,
        pods: &mut Pods,
        name: &PodName,
        mac: Option<EthernetAddress>,
        queues: Vec<PodDevice>,
        bound: Vec<Bound>,
    ) -> Result<Arc<PodDevice>> {
        let pod = pods
            .get(name)
            .ok_or_else(|| super::pods::not_attached(pods, name))?
            .clone();
        if mac != Some(pod.mac) {
            return Err(Error::usage(format!(
                "the device is to have the MAC address {}",
                DisplayMac(pod.mac)
            )));
        }
        let first = queues.first().map(PodDevice::try_clone).transpose();
        let first = first.map_err(Error::failed)?;
        let device = Arc::new(first.ok_or_else(|| Error::usage("there is no device"))?);
        self.connect(name, &pod, queues, bound)?;
        if let Some(details) = pods.details_mut(name) {
            details.device = Some(device.clone());
        }
        Ok(device)
    }

    /// Ends an attachment, if there is one. All that it had is free when this returns.
    pub(super) async fn end(&self, key: &Key) {
        if self.release_if(key, |_| true) {
            self.await_end(key).await;
        }
    }

    /// Begins to end an attachment if the files are still such that it is to end; says whether they are.
    fn release_if(&self, key: &Key, is_to_end: impl FnOnce(&Records) -> bool) -> bool {
        let mut pods = self.pods.lock();
        let mut cni = self.cni.lock();
        if self.check_frozen().is_err() || !is_to_end(&cni.records) {
            return false;
        }
        let pod = cni.attachments.release(key);
        self.forget(&mut pods, &mut cni, key, pod.as_ref());
        true
    }

    /// Waits until nothing is left of an attachment that was released.
    async fn await_end(&self, key: &Key) {
        if let Some(keeper) = &self.keeper
            && let Err(error) = keeper.close(key).await
        {
            debug!("{error}");
        }
        self.closed().await;
    }

    /// Copies of a device's queues, if there is a keeper.
    pub(super) fn copies_for_keeper(&self, device: &[OwnedFd]) -> Result<Vec<OwnedFd>> {
        let queues = match self.keeper {
            Some(_) => device,
            None => &[],
        };
        let copies = queues.iter().map(OwnedFd::try_clone);
        copies.collect::<io::Result<_>>().map_err(Error::failed)
    }

    /// Has the keeper hold a device's queues.
    pub(super) async fn have_kept(&self, key: &Key, queues: &[OwnedFd]) {
        if let Some(keeper) = &self.keeper
            && let Err(error) = keeper.hold(key, queues).await
        {
            warn!("packets of {key} will not wait for a restarted node: {error}");
        }
    }

    /// Takes the devices of an earlier process back.
    async fn take_from_keeper(&self) {
        let Some(keeper) = &self.keeper else {
            return;
        };
        let devices = match keeper.give().await {
            Ok(devices) => devices,
            Err(error) => return warn!("{error}"),
        };
        for (key, device) in devices {
            if is_tunnel(&key) {
                continue;
            }
            let (is_known, netns) = {
                let cni = self.cni.lock();
                let mut missing = cni.attachments.missing();
                let found = missing.find(|(other, _)| **other == key);
                let netns = found.map(|(_, entry)| entry.netns.clone());
                (cni.attachments.contains(&key), netns)
            };
            match netns.map(|netns| self.restore(&key, &netns, device)) {
                Some(Ok(())) => {}
                Some(Err(error)) => warn!("the device of {key} cannot be used: {error}"),
                // Another process has handed it over.
                None if is_known => {}
                // Nobody wants it any more.
                None => {
                    if let Err(error) = keeper.close(&key).await {
                        debug!("{error}");
                    }
                }
            }
        }
    }

    /// The interface of an attachment is gone, and its namespace perhaps, too. Its place stays until
    /// the runtime gives it up, if one has it.
    pub(super) fn device_gone(&self, pods: &mut Pods, key: &Key, name: &PodName, port: PortId) {
        let mut cni = self.cni.lock();
        if key.network == ATTACHED {
            cni.attachments.release(key);
            return self.forget(pods, &mut cni, key, Some(name));
        }
        cni.attachments.set_gone(key);
        drop(cni);
        if let Some(details) = pods.details_mut(name) {
            details.device = None;
        }
        match self.workers.detach(port) {
            Ok(closing) => self.await_closing(closing, None),
            Err(error) => debug!("{error}"),
        }
    }

    /// Whether there is room for another pod.
    fn has_room(&self) -> Result<()> {
        let mut pods = self.pods.lock();
        pods.set_time(self.facts.clock.now());
        match pods.has_room() {
            true => Ok(()),
            false => Err(Error::refused(
                Code::NoAddressLeft,
                format!(
                    "all addresses of the subnet {} are in use",
                    self.facts.subnets
                ),
            )),
        }
    }

    /// The attachments whose devices an earlier process had.
    fn missing(&self) -> Vec<Missing> {
        let cni = self.cni.lock();
        let missing = cni.attachments.missing().map(|(key, entry)| Missing {
            key: key.clone(),
            netns: entry.netns.clone(),
            queues: QUEUES,
            offloads: self.facts.settings.offload.tap,
        });
        missing.collect()
    }

    fn restore(&self, key: &Key, netns: &NetworkNamespace, device: Vec<OwnedFd>) -> Result<()> {
        let (mac, queues) = open_queues(device, self.facts.settings.offload.tap)?;
        let mut pods = self.pods.lock();
        let mut cni = self.cni.lock();
        let pod = cni.attachments.without_device(key, netns)?.pod.clone();
        let bound = cni.waiting.remove(key).map(|waiting| waiting.bound);
        let device = self.go_live(&mut pods, &pod, mac, queues, bound.unwrap_or_default())?;
        // It is so already, unless the earlier process ended just before.
        device.set_persistent(true).map_err(Error::failed)?;
        cni.attachments.set_attached(key);
        let text = format!("pod {pod} has its device again");
        self.journal.note(EventKind::PodRestored, &pod, text);
        Ok(())
    }

    /// Takes up what an earlier process has written down, and then looks again and again whether
    /// attachments and namespaces fit.
    pub(super) async fn keep_attachments(self: Arc<Self>) {
        self.take_from_keeper().await;
        let released = self.cni.lock().released.clone();
        loop {
            let next = Instant::now() + LOOK;
            self.delete_what_was_left().await;
            let gone = self.cni.lock().attachments.look(is_there);
            for key in gone {
                info!("the network namespace of the interface {key} is gone");
                self.end(&key).await;
            }
            // Where some ends were called for, others may have been while there was no time for them.
            while timeout_at(next, released.notified()).await.is_ok() {
                self.delete_what_was_left().await;
            }
        }
    }

    /// Ends the attachments whose end was called for while no node was there, or had no time.
    async fn delete_what_was_left(&self) {
        let deletions = self.cni.lock().records.deletions();
        for (key, path) in deletions {
            match key {
                Some(key) => {
                    debug!("the interface {key} was given up meanwhile");
                    // Unless the container has been started again by now.
                    if self.release_if(&key, |_| path.exists()) {
                        self.await_end(&key).await;
                    }
                }
                None => warn!("{} names no attachment", path.display()),
            }
            remove(&path);
        }
    }

    /// Gives the pods of an earlier process their places back, without a device yet but for those whose
    /// devices are here.
    pub(super) fn recall_attachments(&self, mut devices: BTreeMap<Key, Returned>) {
        let records = self.cni.lock().records.all();
        for record in records {
            let key = record.reserve.key.clone();
            let netns = record.reserve.netns.clone();
            let (device, published) = match devices.remove(&key) {
                Some(pod) => (Some(pod.queues), pod.published),
                None => (None, None),
            };
            if let Err(error) = self.recall(record, published) {
                warn!("the interface {key} of an earlier run has lost its place: {error}");
                self.cni.lock().records.remove(&key);
            } else if let Some(device) = device
                && let Err(error) = self.restore(&key, &netns, device)
            {
                warn!("the device of {key} cannot be used: {error}");
            }
        }
        for key in devices.keys() {
            debug!("there is no record of the interface {key} any more");
        }
        self.remember(&self.pods.lock());
    }

    /// Gives a pod its place back. Its ports are taken, unless they are here.
    fn recall(&self, record: Record, published: Option<Vec<Bound>>) -> Result<()> {
        let Record {
            reserve,
            pod,
            address,
            mac,
            published: ports,
            is_visible,
            ..
        } = record;
        let key = reserve.key.clone();
        let bound = published.unwrap_or_else(|| {
            let bound = publish::bind(&ports, self.facts.config.networks());
            bound.unwrap_or_else(|error| {
                warn!("the ports of pod {pod} are not published: {error}");
                Vec::new()
            })
        });
        let details = details(&reserve, &bound);
        let request = Request {
            name: Some(pod.clone()),
            address: Some(address),
            mac: Some(parse_mac(&mac)?),
            aliases: reserve.aliases.clone(),
            has_rested: false,
        };
        let mut pods = self.pods.lock();
        let mut cni = self.cni.lock();
        pods.attach(request, details)
            .map_err(|error| refusal(&error))?;
        let now = self.facts.clock.now();
        cni.attachments
            .remember(key.clone(), reserve.netns.clone(), pod, is_visible, now);
        cni.waiting.insert(key, Waiting { reserve, bound });
        Ok(())
    }
}

/// Writes an attachment down, which outlives the node from then on.
fn write_down(
    pods: &Pods,
    cni: &Cni,
    reserve: Reserve,
    name: &PodName,
    is_visible: bool,
    device: &PodDevice,
) -> Result<()> {
    let pod = pods
        .get(name)
        .ok_or_else(|| super::pods::not_attached(pods, name))?;
    let record = cni.records.record(
        reserve,
        name.clone(),
        pod.address,
        DisplayMac(pod.mac).to_string(),
        pod.details.published.clone(),
        is_visible,
    );
    let written = cni.records.write(&record);
    let kept = written.and_then(|()| device.set_persistent(true));
    kept.map_err(|error| Error::failed(format!("cannot record the attachment: {error}")))
}

/// What a node knows of a pod for which this was asked.
fn details(reserve: &Reserve, bound: &[Bound]) -> Details {
    let limit = |rate: Option<Rate>| {
        let limit = RateLimit::new(rate?.bits_per_second, rate?.burst_bits)?;
        Some(Arc::new(limit))
    };
    Details {
        published: bound.iter().map(|bound| bound.published).collect(),
        attachment: Some(reserve.key.clone()),
        rates: Rates {
            from_pod: limit(reserve.egress),
            to_pod: limit(reserve.ingress),
        },
        ..Details::persistent()
    }
}

/// Gives a pod the best of its names that is free.
fn place(
    pods: &mut Pods,
    reserve: &Reserve,
    address: Option<Addresses>,
    mac: Option<EthernetAddress>,
    details: &Details,
) -> Result<PodName> {
    let candidates = names(reserve).map(Some).chain([None]);
    let mut refused = None;
    for name in candidates {
        let request = Request {
            name,
            address,
            mac,
            aliases: reserve.aliases.clone(),
            has_rested: true,
        };
        match pods.attach(request, details.clone()) {
            Ok((name, _)) => return Ok(name),
            Err(error @ (AttachError::NameTaken(_) | AttachError::NameReserved(_))) => {
                refused = Some(error);
            }
            Err(error) => return Err(refusal(&error)),
        }
    }
    Err(refused.map_or_else(
        || Error::failed("no name is free for the pod"),
        |error| refusal(&error),
    ))
}

/// The addresses that a pod is to have; at most one of each IP version.
fn addresses(wanted: &[IpAddr]) -> Result<Option<Addresses>> {
    let ipv4 = wanted.iter().filter_map(|it| match it {
        IpAddr::V4(it) => Some(*it),
        IpAddr::V6(_) => None,
    });
    let ipv6 = wanted.iter().filter_map(|it| match it {
        IpAddr::V4(_) => None,
        IpAddr::V6(it) => Some(*it),
    });
    let (ipv4, ipv6): (Vec<_>, Vec<_>) = (ipv4.collect(), ipv6.collect());
    if ipv4.len() > 1 || ipv6.len() > 1 {
        let message = "an interface has one address of each IP version at most";
        return Err(Error::refused(Code::AddressNotAvailable, message));
    }
    Ok(Addresses::new(ipv4.first().copied(), ipv6.first().copied()))
}

fn parse_mac(text: &str) -> Result<EthernetAddress> {
    let mac: VtepMac = text.parse().map_err(Error::usage)?;
    Ok(mac.get())
}

/// Whether a namespace is where it was. One that cannot be looked at counts as being there.
fn is_there(netns: &NetworkNamespace) -> bool {
    match fs::metadata(&netns.path) {
        Ok(file) => (file.dev(), file.ino()) == (netns.device, netns.inode),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}
