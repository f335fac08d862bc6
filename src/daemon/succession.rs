//! A node that is taken over (see [`crate::takeover`]): the end of the process that runs it from now
//! on.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use muslin_stack::api::cni::Key;
use muslin_stack::control::pods::Request;
use muslin_stack::control::tunnel::TunnelPlan;
use muslin_stack::datapath::egress::FlowKey;
use smoltcp::wire::EthernetAddress;
use socket2::Socket;
use tokio_seqpacket::UnixSeqpacket;
use tracing::{debug, info, warn};

use super::pods::{Details, refusal};
use super::running::{RunningNode, open_queues};
use super::underlay;
use crate::control::Connection;
use crate::error::{Error, Result};
use crate::host::publish::Bound;
use crate::takeover::{About, InheritedPod, Part};
use crate::underlay::PublicInterface;

/// Looks whether a node is the one that runs already, as far as its settings say.
///
/// # Errors
/// What differs.
pub(super) fn check(
    about: &About,
    backend: &str,
    plan: &TunnelPlan,
    interface: &PublicInterface,
    workers: usize,
) -> Result<()> {
    let differs = |what: &str, is: String, was: String| {
        Err(Error::usage(format!(
            "the node that is to be taken over has {what} {was}, and this one would have {is}: give it \
             the same, or stop the other first and start without --take-over"
        )))
    };
    if about.workers != workers {
        return differs("--workers", workers.to_string(), about.workers.to_string());
    }
    if about.backend != backend {
        return differs("the backend", backend.to_owned(), about.backend.clone());
    }
    let text = |end: Option<SocketAddr>| end.map_or("none".to_owned(), |it| it.to_string());
    for (what, is, was) in [
        (
            "the tunnel's end",
            underlay::end_v4(plan, interface),
            about.end,
        ),
        (
            "the tunnel's end of IPv6",
            underlay::end_v6(plan, interface),
            about.end_v6,
        ),
    ] {
        if is != was {
            return differs(what, text(is), text(was));
        }
    }
    Ok(())
}

/// What a pod of a container runtime has again.
pub(super) struct Returned {
    /// Its device.
    pub(super) queues: Vec<OwnedFd>,
    /// Its ports; they are to be taken if there are none.
    pub(super) published: Option<Vec<Bound>>,
}

impl From<Vec<OwnedFd>> for Returned {
    fn from(queues: Vec<OwnedFd>) -> Self {
        Self {
            queues,
            published: None,
        }
    }
}

impl RunningNode {
    /// Goes on with the pods of the process before this one. Those of container runtimes are returned by
    /// their attachments: their places are in the records.
    pub(super) fn adopt(&self, pods: Vec<InheritedPod>) -> BTreeMap<Key, Returned> {
        let mut attachments = BTreeMap::new();
        for pod in pods {
            if let Some(key) = pod.state.attachment.clone() {
                let returned = Returned {
                    queues: pod.queues,
                    published: Some(bound(pod.published)),
                };
                attachments.insert(key, returned);
                continue;
            }
            let name = pod.state.name.clone();
            if let Err(error) = self.adopt_pod(pod) {
                warn!("the pod {name} of the process before this one is lost: {error}");
            }
        }
        self.remember(&self.pods.lock());
        attachments
    }

    fn adopt_pod(&self, pod: InheritedPod) -> Result<()> {
        let InheritedPod {
            state,
            queues,
            published,
            namespaces,
        } = pod;
        let mac = EthernetAddress(state.mac);
        let (_, queues) = open_queues(queues, self.facts.settings.offload.tap)?;
        let bound = bound(published);
        let details = Details {
            persistent: state.persistent,
            published: bound.iter().map(|bound| bound.published).collect(),
            namespaces: namespaces.map(|(kinds, namespaces)| (kinds, namespaces.into())),
            ..Details::persistent()
        };
        let request = Request {
            name: Some(state.name),
            address: Some(state.address),
            mac: Some(mac),
            aliases: state.aliases,
            has_rested: false,
        };
        let mut pods = self.pods.lock();
        let (name, pod) = pods
            .attach(request, details)
            .map_err(|error| refusal(&error))?;
        let pod = pod.clone();
        let connected = self.connect(&name, &pod, queues, bound);
        connected.inspect_err(|_| drop(pods.detach(&name)))
    }

    /// Forgets flows of the process before this one as they end.
    pub(super) async fn follow_flows(self: Arc<Self>, connection: OwnedFd) {
        let ended = match UnixSeqpacket::try_from(connection) {
            Ok(socket) => {
                let connection = Connection::new(socket);
                loop {
                    match connection.receive::<Part>().await {
                        Ok(Some((Part::Ended(flows), _))) => {
                            let flows: Vec<_> = flows.into_iter().map(FlowKey::from).collect();
                            if self.workers.forget_predecessors(Some(&flows)).is_err() {
                                return;
                            }
                        }
                        Ok(Some((other, _))) => {
                            debug!("the process before this one says {other:?}")
                        }
                        Ok(None) => break Ok(()),
                        Err(error) => break Err(error),
                    }
                }
            }
            Err(error) => Err(error),
        };
        match ended {
            Ok(()) => info!("the process before this one has ended"),
            Err(error) => warn!("the process before this one is lost: {error}"),
        }
        let _ = self.workers.forget_predecessors(None);
    }
}

/// Published ports with the sockets that the process before this one has taken them with.
fn bound(published: Vec<(muslin_stack::api::published::PortMapping, OwnedFd)>) -> Vec<Bound> {
    let bound = published.into_iter().map(|(published, socket)| Bound {
        published,
        socket: Socket::from(socket),
    });
    bound.collect()
}
