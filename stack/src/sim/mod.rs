//! A deterministic simulator of whole clusters: nodes, their pods, the links between them, the store
//! of their leases, and servers outside the overlay, in one thread and in virtual time.
//!
//! What runs is what runs in production: [`crate::datapath::Datapath`] with its node and egress, one for
//! each worker, [`crate::control::lease::Manager`], [`crate::control::plane::ControlPlane`],
//! [`crate::control::pods::Pods`] and [`crate::control::names::Sharer`]. What a real node has around
//! them is here anew, as simple as it can be: `cluster` does what `src/daemon/` and the workers do, and
//! what follows from each event; its module `agent` does what the loop of `src/lease/drive.rs`
//! does, and `sockets` what `src/host/` and the host's kernel do. Pods are smoltcp with TCP, UDP and
//! ping.
//!
//! # A run
//!
//! A seed makes a [`Plan`]: a cluster of two to five machines and some dozen events, such as a node
//! that joins, crashes or gets another address, a partition, a store that is down, loses answers or
//! everything, somebody who deletes or rewrites a record, a hostile pod, pods that talk to each other
//! or to servers outside. [`run`] follows it. Then everything is mended, and what is alive must show
//! in time: tables are what the store says, all pairs of pods talk, and all pods reach a server. All
//! chances of a run come from its seed, in streams of their own for plan, links, store, machines and
//! what is outside, and no hash table's order is asked for: the same seed is the same run to the
//! byte, in any process of the same build.
//!
//! # What must hold
//!
//! At every step:
//!
//! * A node's books balance: `received + originated = delivered + sent + flooded + consumed +
//!   dropped`.
//! * A pod gets no frame for another MAC or IP address, or from a MAC address that is nobody's, no
//!   ping whose source is not its sender, none twice unless a link has doubled it, and hears no false
//!   claim in ARP or neighbour discovery, and no router advertisement or redirect.
//! * TCP brings every byte as it was sent, whatever links do.
//! * Nobody is told that a pod is not there which was attached before its node's restart, until it
//!   is attached again, or ten seconds have passed.
//! * A datagram fits its sender's interface; one from a stranger is dropped.
//! * No two nodes have subnets that overlap. Three things excuse it, and each is noted when it
//!   happens: the record of one of them ended because it was not renewed for a day; somebody deleted
//!   it or wrote another; the store lost it. A node that is giving its lease back no longer counts.
//! * No lease ends while its node runs, reaches the store, and nothing has happened for two minutes.
//! * A node that runs never gets another subnet, and none refuses the network's configuration, unless
//!   somebody has written one that nobody can use: then nodes that start wait until it is mended.
//! * A record that a node writes again ends if it did before: a reservation stays one.
//! * Timers do not spin: a node's next timeout is later than now, lease rules ask for something
//!   without time passing 64 times at most, and the store four times a second, over 100 at once.
//!
//! After every call of a node's egress:
//!
//! * Flows keep their bounds, of all pods and of each, and belong to pods that are attached.
//! * Buffers of connections and the memory that is left are together what there was.
//! * Flows and sockets of the host are the same ones: each flow has its own, to where the pod wants,
//!   and each socket is closed once, with its flow. Both have carried the same bytes.
//! * Streams bring every byte to servers, to each those of its own client; only where both have
//!   ended is a socket closed without a reset.
//! * A datagram or echo request goes on, unchanged and once, or is dropped for a reason.
//! * What goes to pods fits their interface and has right lengths and checksums; a datagram's or
//!   ping's answer goes to who asked, once, and an error quotes what its receiver has sent.
//! * A connection to a server that is well fails only if its flow had to make room for others, or
//!   the machine had no way out; a refusal is told within ten seconds.
//! * A flow makes room for another only if it was not in use for ten seconds.
//! * Timers do not spin here, either.
//!
//! Between two events of a plan:
//!
//! * Tables keep their bounds, and have nothing of ports that are gone.
//! * Routes are those of peers, permanent neighbours those of pods.
//! * Where nothing has happened for two minutes and the store is in reach, a node that watches it
//!   holds its record and has the peers of all others, whoever wrote them.
//!
//! When everything is mended:
//!
//! * Within 240 s all wanted nodes run, hold their record, watch the store, and have exactly the
//!   peers of its records: none is missing, stale, or has another address. No subnets overlap.
//! * Within 300 s pods are through with all connections to servers that they began before, or are
//!   told that there is none, and a minute later those that went well are in no table.
//!   Each knows the names of all pods of all others.
//! * All pairs of pods talk over TCP or ping, within 180 s.
//! * All pods reach a good server outside, over TCP, UDP and ping.
//! * All pods are reached by clients of their published port: from outside, and from their own host,
//!   whose address they must not see.
//! * In one of seven runs a day passes then. No flow is left then, and the same must hold.
//!
//! # IPv6
//!
//! Some networks have IPv6 beside IPv4, and the last of three machines has no address of it. Pods with an
//! address of each version talk, ping, ask servers and are visited by the one or the other, and rogues do
//! in IPv6 what they do in IPv4, and what there is in IPv6 alone: false claims in neighbour discovery, also
//! behind options and in fragments, router advertisements, redirects, chains of extension headers.
//! All that must hold is held against both. Links damage nothing of IPv6, since the kernel verifies its
//! checksum in the tunnel.
//!
//! # The store
//!
//! It is etcd as [`crate::control::lease::Op`] promises it: operations happen at one moment, revisions grow,
//! keys with a time to live end, watches tell all changes in order, and one that asks for changes
//! that are no longer there, or not there yet, has a gap. Requests can be lost on the way there, and
//! answers on the way back when the store has done the work. Real nodes read linearizably; the
//! simulated ones also have to bear reads from a member that lags behind, as etcd's serializable
//! reads, or a proxy's, can be.
//!
//! Nodes of flannel's can follow it (`flannel.rs`), whose watches lose changes. Within 240 s after
//! everything is mended each of them knows the record of every node that runs.
//!
//! # Outside
//!
//! A server's address says how it does: it echoes, is slow, stalls and goes on, ends its stream
//! first, resets, refuses, is not found or silent ([`Server`]). What waits in sockets is less than
//! what most connections carry, and so are the flows that a node may have, so that bounds are
//! reached. Events of sockets come as from an edge-triggered epoll, some after the socket is closed.
//!
//! # Devices of your own
//!
//! What is behind a port implements [`Device`]: the simulator's own pods and rogues, and what you
//! bring, a pod with another stack or an attacker. [`run_with`] takes kinds of devices, and
//! [`Event::AttachDevice`] attaches one, now and whenever its machine's node runs. All that must hold
//! is held against it. `examples/own_attacker.rs` is one that takes another pod's address.
//!
//! ```
//! use muslin_stack::control::lease::{Backend, NetworkConfig, VxlanOptions};
//! use muslin_stack::sim::{Assigned, Device, DeviceKind, Event, Plan, Report, Sent, Setup, run_with};
//! use muslin_stack::{Duration, EthernetAddress, Instant};
//!
//! /// Says a word to all each second, and wants to hear none of its own again.
//! struct Herald {
//!     mac: EthernetAddress,
//!     next: Instant,
//!     reports: Vec<Report>,
//! }
//!
//! impl Device for Herald {
//!     fn receive(&mut self, _: Instant, frame: &[u8]) {
//!         if frame[6..12] == self.mac.0 {
//!             self.reports.push(Report::Wrong("a frame comes back".to_owned()));
//!         }
//!     }
//!
//!     fn poll(&mut self, now: Instant) -> Vec<Sent> {
//!         if now < self.next {
//!             return Vec::new();
//!         }
//!         self.next = now + Duration::from_secs(1);
//!         let frame = [&[0xff; 6][..], &self.mac.0, &[0x88, 0xb5], b"hear, hear"].concat();
//!         vec![frame.into()]
//!     }
//!
//!     fn poll_at(&mut self, _: Instant) -> Option<Instant> {
//!         Some(self.next)
//!     }
//!
//!     fn reports(&mut self) -> Vec<Report> {
//!         std::mem::take(&mut self.reports)
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let herald = DeviceKind::new(|assigned: &Assigned| Herald {
//!     mac: assigned.mac,
//!     next: Instant::ZERO,
//!     reports: Vec::new(),
//! });
//! let backend = Backend::Vxlan(VxlanOptions::default());
//! let network = NetworkConfig::new("10.244.0.0/16".parse()?, None, backend)?;
//! // Two machines with a pod each; on the first there is a herald, too, and it crashes once.
//! let plan = Plan::scripted(1, Setup::new(network, 2), [
//!     (0, Event::Join(0)),
//!     (0, Event::Join(1)),
//!     (100, Event::Attach(0)),
//!     (0, Event::Attach(1)),
//!     (0, Event::AttachDevice { machine: 0, kind: 0 }),
//!     (10_000, Event::Talk { from: 0, to: 1, bytes: 60_000 }),
//!     (5_000, Event::Crash(0)),
//!     (0, Event::Join(0)),
//!     (10_000, Event::Ping { from: 1, to: 0, bytes: 56 }),
//! ]);
//! let summary = run_with(&plan, &[herald], false).map_err(|failure| failure.violation)?;
//! assert!(summary.figures.talks >= 1 && summary.figures.answers >= 1);
//! # Ok(())
//! # }
//! ```
//!
//! `stack/README.md` says how to run it, how a seed that fails becomes a test, and what it found.

mod agent;
mod client;
mod cluster;
mod constants;
mod device;
mod due;
mod event;
mod flannel;
mod forge;
mod invariants;
mod kind;
mod link;
mod log;
mod machine;
mod mailbox;
mod oracle;
mod outcome;
mod outside;
mod packet;
mod plan;
mod pod;
mod queue;
mod random;
mod rogue;
mod rogue_v6;
mod run;
mod scale;
mod sharing;
mod shrink;
mod sockets;
mod store;
mod stream;
mod way_out;
mod worker;

pub use device::{Assigned, Device, Identity, Order, Report, Sent, pattern};
pub use event::{Event, Forgery};
pub use kind::DeviceKind;
pub use link::Weather;
pub use outcome::{Failure, Figures, Summary, Violation};
pub use outside::Server;
pub use plan::{Plan, Setup, Step};
pub use run::{run, run_with};
pub use scale::{Phase, Scale};
pub use shrink::{shrink, shrink_with};
