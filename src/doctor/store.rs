//! Checks of the lease store: whether it answers, what network it has, and how many leases.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ipnet::Ipv4Net;
use muslin_stack::api::control::{Lease, Table};
use muslin_stack::control::lease::{Answer, Backend, NetworkConfig, Op, lease_prefix};

use super::finding::{Finding, Verdict};
use super::subject::{DoctorOptions, NodeUnderTest, PATIENCE};
use crate::control::Client;
use crate::features::Feature;
use crate::state;
use crate::store::{self, Store};
use crate::terminal::quantity::count;

const AWAY: &str = "check that it runs and can be reached from here; running nodes keep their \
                    last known peers";

/// The network that the store has, and what was found.
pub(super) async fn examine(
    options: &DoctorOptions,
    tested: Option<&NodeUnderTest>,
) -> (Option<Ipv4Net>, Vec<Finding>) {
    let url = match (&options.store, tested) {
        (Some(url), _) => url.clone(),
        // It knows how to speak to its store, and how its store does.
        (None, Some(tested)) => return ask_node(tested).await,
        (None, None) => state::default_store(&options.state_dir),
    };
    if let Some(path) = url.as_bytes().strip_prefix(b"sqlite:")
        && Feature::Sqlite.is_built()
        && !Path::new(OsStr::from_bytes(path)).exists()
    {
        let detail = format!("{} is created by the first node", url.display());
        return (None, vec![Finding::fine("store", detail)]);
    }
    match store::open(&url, &options.etcd) {
        Ok(store) => ask(&*store, &options.prefix).await,
        Err(error) => (None, vec![Finding::wrong("store", error)]),
    }
}

async fn ask_node(tested: &NodeUnderTest) -> (Option<Ipv4Net>, Vec<Finding>) {
    let status = &tested.status;
    let leases = match Client::connect(&tested.socket).await {
        Ok(client) => client.report::<Lease>(Table::Leases).await,
        Err(error) => Err(error),
    };
    let found = match leases {
        Ok(leases) => Finding::fine(
            "store",
            format!(
                "{} answers and has {}",
                status.store,
                count(leases.len() as u64, "lease")
            ),
        ),
        Err(error) => Finding::wrong("store", error).advise(AWAY),
    };
    (status.network.ipv4(), vec![found])
}

async fn ask(store: &dyn Store, prefix: &str) -> (Option<Ipv4Net>, Vec<Finding>) {
    let (name, key) = (store.describe(), format!("{prefix}/config"));
    let config = match execute(store, Op::Get(key.clone())).await {
        Ok(Answer::Value(entry)) => entry,
        Ok(other) => {
            return (
                None,
                vec![Finding::wrong("store", format!("{name}: {other:?}"))],
            );
        }
        Err(why) => {
            let finding = Finding::wrong("store", format!("{name} does not answer: {why}"));
            return (None, vec![finding.advise(AWAY)]);
        }
    };
    let mut findings = vec![Finding::fine("store", format!("{name} answers"))];
    let config = match config
        .as_ref()
        .map(|entry| NetworkConfig::parse(&entry.value))
    {
        None => {
            let detail = format!("{name} has no {key}");
            findings.push(Finding::new("network", Verdict::Warning, detail).advise(
                "the first node with --network writes it; in a flannel cluster its administrator \
                 does",
            ));
            None
        }
        Some(Err(error)) => {
            findings.push(Finding::wrong("network", format!("{key}: {error}")));
            None
        }
        Some(Ok(config)) => {
            findings.push(network(&config));
            Some(config)
        }
    };
    if let Some(config) = &config {
        findings.extend(leases(store, prefix, config).await);
    }
    (config.map(|config| config.network), findings)
}

async fn execute(store: &dyn Store, op: Op) -> std::result::Result<Answer, String> {
    match tokio::time::timeout(PATIENCE, store.execute(op)).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

fn network(config: &NetworkConfig) -> Finding {
    match &config.backend {
        Backend::Other(name) => Finding::wrong("network", config).advise(format!(
            "muslin has vxlan, udp, host-gw and ipip, not {name}"
        )),
        _ => Finding::fine("network", config),
    }
}

async fn leases(store: &dyn Store, prefix: &str, config: &NetworkConfig) -> Option<Finding> {
    let Ok(Answer::Snapshot { entries, .. }) = execute(store, Op::List(lease_prefix(prefix))).await
    else {
        return None;
    };
    let (used, all) = (entries.len(), config.subnets().count());
    let are = if used == 1 { "is" } else { "are" };
    let detail = format!("{used} of {} {are} leased", count(all as u64, "subnet"));
    Some(if used < all {
        Finding::fine("leases", detail)
    } else {
        Finding::wrong("leases", detail).advise(
            "no node can join: nodes that are gone keep their lease for a day, or until 'muslin \
             leave'",
        )
    })
}
