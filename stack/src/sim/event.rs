//! What happens to a cluster: the events of a plan, in words.

use std::fmt;

use muslin_encap::mtu::Mtu;

use super::link::Weather;
use super::outside::Server;
use super::rogue::Rogue;
use crate::datapath::egress::Protocol;

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
pub(super) fn misconfiguration(mistake: u8) -> &'static str {
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
