//! What is examined: what the user names, and the node that runs.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use muslin_stack::api::control::{Status, Table};

use crate::control::{self, Client};
use crate::error::{Error, Result};
use crate::store::EtcdOptions;
use crate::underlay::InterfaceChoice;

/// How long a store or a node may take to answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// What `muslin doctor` examines.
#[derive(Debug, Clone)]
pub struct DoctorOptions {
    /// Where nodes keep their state.
    pub state_dir: PathBuf,
    /// The node, if it is not the only one.
    pub node: Option<String>,
    /// The store; else that of the running node, or the embedded one.
    pub store: Option<OsString>,
    /// The credentials for etcd.
    pub etcd: EtcdOptions,
    /// The prefix of flannel's keys in the store.
    pub prefix: String,
    /// The underlay's interface, if no node runs that has it.
    pub underlay: InterfaceChoice,
    /// How many peers to send packets to.
    pub peers: usize,
    /// Where container runtimes have their configurations; else the usual directory, if one of ours is
    /// there.
    pub cni_conf_dir: Option<PathBuf>,
    /// Where they have their plugins.
    pub cni_bin_dir: PathBuf,
}

/// A running node, and its control socket.
pub(super) struct NodeUnderTest {
    pub(super) socket: PathBuf,
    pub(super) status: Status,
}

/// The node that runs, or why it does not answer for its tables yet.
pub(super) async fn node_under_test(
    options: &DoctorOptions,
) -> Result<(Option<NodeUnderTest>, Option<String>)> {
    let located = match options.node.as_deref() {
        Some(named) => control::locate(&options.state_dir, Some(named)).map(Some),
        None => control::locate_only(&options.state_dir),
    };
    let Some(socket) = located? else {
        return Ok((None, None));
    };
    let client = Client::connect(&socket).await?;
    match client.report::<Status>(Table::Status).await {
        Ok(mut rows) => Ok((
            rows.pop().map(|status| NodeUnderTest { socket, status }),
            None,
        )),
        Err(Error::Refused { message, .. }) => Ok((None, Some(message))),
        Err(error) => Err(error),
    }
}
