//! `muslin doctor`: what a node needs, checked one by one, and what to do where it is missing.
//!
//! Each check is a function that ends in one or several [`Finding`]s and never fails itself. Those
//! of the machine and the store need no node; those of a node ask it over its control socket and
//! send packets out of a pod that lives for the checks only.

mod clock;
mod machine;
mod node;
mod runtimes;
mod store;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

#[cfg(feature = "sidecar")]
pub(crate) use machine::obstacle_to_pods;
pub use machine::probe_namespace;
use muslin_stack::api::control::{Status, Table};
use serde::Serialize;

use crate::control::{self, Client};
use crate::error::{Error, Result};
use crate::store::EtcdOptions;
use crate::underlay::InterfaceChoice;

/// How long a store or a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

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

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was seen.
    pub detail: String,
    /// What to do, if it is not fine.
    pub advice: Option<String>,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// It could not be looked at.
    Unknown,
    /// It works, but not as one might expect.
    Warning,
    /// It does not work.
    Wrong,
}

impl Finding {
    fn new(check: &str, verdict: Verdict, detail: impl ToString) -> Self {
        Self {
            check: check.to_owned(),
            verdict,
            detail: detail.to_string(),
            advice: None,
        }
    }

    fn fine(check: &str, detail: impl ToString) -> Self {
        Self::new(check, Verdict::Fine, detail)
    }

    fn wrong(check: &str, detail: impl ToString) -> Self {
        Self::new(check, Verdict::Wrong, detail)
    }

    fn advise(mut self, advice: impl ToString) -> Self {
        self.advice = Some(advice.to_string());
        self
    }
}

/// A running node, and its control socket.
struct NodeUnderTest {
    socket: PathBuf,
    status: Status,
}

/// Examines, and gives each finding to `report` at once.
///
/// # Errors
/// A usage error if there are several nodes and none is named. Faults that it finds are not errors.
pub async fn examine(options: &DoctorOptions, mut report: impl FnMut(Finding)) -> Result<()> {
    let (tested, waits) = node_under_test(options).await?;
    let namespaces = machine::namespaces();
    let levels = machine::sidecar_levels(&namespaces);
    namespaces.into_iter().for_each(&mut report);
    report(levels);
    report(machine::pings());
    report(machine::confinement(tested.as_ref()));
    machine::state_directory(&options.state_dir)
        .into_iter()
        .for_each(&mut report);
    let underlay = machine::underlay(options, tested.as_ref()).await;
    underlay.into_iter().for_each(&mut report);
    runtimes::examine(
        options.cni_conf_dir.as_deref(),
        &options.cni_bin_dir,
        tested.as_ref(),
    )
    .into_iter()
    .for_each(&mut report);
    let running = tested
        .as_ref()
        .map(|tested| OsStr::new(&tested.status.store));
    let store = options.store.as_deref().or(running);
    report(clock::examine(store, &options.etcd).await);
    let (network, findings) = store::examine(options, tested.as_ref()).await;
    findings.into_iter().for_each(&mut report);
    if let Some(network) = network {
        let subnet = tested.as_ref();
        let subnet = subnet.and_then(|tested| tested.status.subnet.ipv4());
        let pods = match &tested {
            Some(tested) => node::addresses_of_pods(tested).await,
            None => Vec::new(),
        };
        let name = machine::host_interface_name(tested.as_ref());
        let findings = machine::kernel(network, subnet, &pods, name).await;
        findings.into_iter().for_each(&mut report);
    }
    report(machine::host_interface(tested.as_ref()));
    match tested {
        Some(tested) => node::examine(&tested, options.peers, report).await,
        None => report(match waits {
            Some(reason) => Finding::wrong("node", reason),
            None => Finding::new("node", Verdict::Unknown, "no node runs here")
                .advise("start one with 'muslin node' to check the tunnel, too"),
        }),
    }
    Ok(())
}

/// The node that runs, or why it does not answer for its tables yet.
async fn node_under_test(
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
