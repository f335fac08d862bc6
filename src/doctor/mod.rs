//! `muslin doctor`: what a node needs, checked one by one, and what to do where it is missing.
//!
//! Each check is a function that ends in one or several [`Finding`]s and never fails itself. Those
//! of the machine and the store need no node; those of a node ask it over its control socket and
//! send packets out of a pod that lives for the checks only.

mod clock;
mod machine;
mod node;
mod store;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use machine::obstacle_to_pods;
pub use machine::probe_namespace;
use muslin_stack::api::control::{Status, Table};
use serde::Serialize;

use crate::control::{self, Client};
use crate::error::{Error, Result};
use crate::store::EtcdOptions;
use crate::underlay::Wanted;

/// How long a store or a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What to examine.
#[derive(Debug, Clone)]
pub struct Questions {
    /// Where nodes keep their state.
    pub state_dir: PathBuf,
    /// The node, if it is not the only one.
    pub node: Option<String>,
    /// The store; that of the node which runs otherwise, or the embedded one.
    pub store: Option<OsString>,
    /// How to prove to etcd who this is.
    pub etcd: EtcdOptions,
    /// Where the store has flannel's keys.
    pub prefix: String,
    /// The underlay's interface, if no node runs that has it.
    pub underlay: Wanted,
    /// How many peers to send packets to.
    pub peers: usize,
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

/// A node that runs, and how to speak to it.
struct Patient {
    socket: PathBuf,
    status: Status,
}

/// Examines, and gives each finding to `tell` as soon as it is there.
///
/// # Errors
/// A usage error if there are several nodes and none is named. What is wrong is no error.
pub async fn examine(questions: &Questions, mut tell: impl FnMut(Finding)) -> Result<()> {
    let (patient, waits) = patient(questions).await?;
    let namespaces = machine::namespaces();
    let levels = machine::sidecar_levels(&namespaces);
    namespaces.into_iter().for_each(&mut tell);
    tell(levels);
    tell(machine::pings());
    tell(machine::confinement(patient.as_ref()));
    machine::state_directory(&questions.state_dir)
        .into_iter()
        .for_each(&mut tell);
    let underlay = machine::underlay(questions, patient.as_ref()).await;
    underlay.into_iter().for_each(&mut tell);
    let running = patient
        .as_ref()
        .map(|patient| OsStr::new(&patient.status.store));
    let store = questions.store.as_deref().or(running);
    tell(clock::examine(store, &questions.etcd).await);
    let (network, findings) = store::examine(questions, patient.as_ref()).await;
    findings.into_iter().for_each(&mut tell);
    if let Some(network) = network {
        let subnet = patient.as_ref();
        let subnet = subnet.and_then(|patient| patient.status.subnet.ipv4());
        let pods = match &patient {
            Some(patient) => node::addresses_of_pods(patient).await,
            None => Vec::new(),
        };
        let findings = machine::kernel(network, subnet, &pods).await;
        findings.into_iter().for_each(&mut tell);
    }
    match patient {
        Some(patient) => node::examine(&patient, questions.peers, tell).await,
        None => tell(match waits {
            Some(reason) => Finding::wrong("node", reason),
            None => Finding::new("node", Verdict::Unknown, "no node runs here")
                .advise("start one with 'muslin node' to check the tunnel, too"),
        }),
    }
    Ok(())
}

/// The node that runs, or why it does not answer for its tables yet.
async fn patient(questions: &Questions) -> Result<(Option<Patient>, Option<String>)> {
    let located = match questions.node.as_deref() {
        Some(named) => control::locate(&questions.state_dir, Some(named)).map(Some),
        None => control::locate_only(&questions.state_dir),
    };
    let Some(socket) = located? else {
        return Ok((None, None));
    };
    let client = Client::connect(&socket).await?;
    match client.report::<Status>(Table::Status).await {
        Ok(mut rows) => Ok((rows.pop().map(|status| Patient { socket, status }), None)),
        Err(Error::Refused { message, .. }) => Ok((None, Some(message))),
        Err(error) => Err(error),
    }
}
