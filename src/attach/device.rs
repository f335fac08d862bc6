//! A pod's device, as it is given to a node, and what the node's answer means for its interface.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use muslin_stack::api::control::{Attach, Attached, Namespace};
use tracing::warn;

use crate::control::Client;
use crate::error::Result;
use crate::netns::Assignment;

/// Queues that a pod's device is to have: one for each worker of the node.
///
/// # Errors
/// If the node does not answer, or cannot attach pods yet.
pub(crate) async fn queues(socket: &Path) -> Result<usize> {
    Client::connect(socket).await?.queues()
}

/// What a node is given of a pod.
pub(crate) struct Device<'a> {
    /// The queues of its TAP device, or one end of a pair of sockets.
    pub(crate) queues: Vec<BorrowedFd<'a>>,
    /// The namespaces that `muslin exec` enters.
    pub(crate) namespaces: Vec<(Namespace, OwnedFd)>,
}

impl<'a> Device<'a> {
    /// A TAP device.
    pub(crate) fn tap(queues: &'a [impl AsFd]) -> Self {
        Self {
            queues: queues.iter().map(AsFd::as_fd).collect(),
            namespaces: Vec::new(),
        }
    }

    /// A socket of a pod that lives in a process.
    #[cfg(feature = "sidecar")]
    pub(crate) fn socket(socket: &'a impl AsFd) -> Self {
        Self {
            queues: vec![socket.as_fd()],
            namespaces: Vec::new(),
        }
    }

    /// The same with these namespaces, in the order in which others can enter them.
    pub(crate) fn with_namespaces(mut self, namespaces: Vec<(Namespace, OwnedFd)>) -> Self {
        self.namespaces = namespaces;
        self
    }

    /// Attaches it.
    ///
    /// # Errors
    /// What the node says against it.
    pub(crate) async fn attach(&self, client: &Client, request: Attach) -> Result<Attached> {
        let attached = client.attach(request, &self.queues).await?;
        if !self.namespaces.is_empty() {
            let kept = client.keep_namespaces(&attached.pod, &self.namespaces);
            if let Err(error) = kept.await {
                warn!("`muslin exec` will not find the pod: {error}");
            }
        }
        Ok(attached)
    }
}

/// What a node's answer means for the interface.
pub(crate) fn assignment(attached: &Attached) -> Assignment {
    Assignment {
        address: attached.address,
        gateway: attached.gateway,
        link: attached.link,
        routes: attached.routes.clone(),
    }
}
