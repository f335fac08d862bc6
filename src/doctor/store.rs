//! Checks of the lease store: whether it answers, what network it has, and how many leases.

use std::sync::Arc;

use ipnet::Ipv4Net;
use muslin_stack::lease::{Answer, Backend, NetworkConfig, Op};

use super::{Finding, PATIENCE, Patient, Questions, Verdict};
use crate::lease::store::{self, Store};
use crate::state;

/// Where flannel's keys are.
const PREFIX: &str = crate::node::PREFIX;

/// The network that the store has, and what was found.
pub(super) async fn examine(
    questions: &Questions,
    patient: Option<&Patient>,
) -> (Option<Ipv4Net>, Vec<Finding>) {
    let url = match (&questions.store, patient) {
        (Some(url), _) => url.clone(),
        (None, Some(patient)) => patient.status.store.clone(),
        (None, None) => state::default_store(&questions.state_dir),
    };
    if let Some(path) = url.strip_prefix("sqlite:")
        && !std::path::Path::new(path).exists()
    {
        let detail = format!("{url} is made by the first node");
        return (None, vec![Finding::fine("store", detail)]);
    }
    match store::open(&url) {
        Ok(store) => ask(store).await,
        Err(error) => (None, vec![Finding::wrong("store", error)]),
    }
}

async fn ask(store: Arc<dyn Store>) -> (Option<Ipv4Net>, Vec<Finding>) {
    let name = store.describe();
    let config = match execute(&*store, Op::Get(format!("{PREFIX}/config"))).await {
        Ok(Answer::Value(entry)) => entry,
        Ok(other) => {
            return (
                None,
                vec![Finding::wrong("store", format!("{name}: {other:?}"))],
            );
        }
        Err(why) => {
            let finding = Finding::wrong("store", format!("{name} does not answer: {why}"));
            let advice = "check that it runs and can be reached from here; nodes that run keep \
                          their last known peers";
            return (None, vec![finding.advise(advice)]);
        }
    };
    let mut findings = vec![Finding::fine("store", format!("{name} answers"))];
    let network = match config
        .as_ref()
        .map(|entry| NetworkConfig::parse(&entry.value))
    {
        None => {
            let detail = format!("{name} has no {PREFIX}/config");
            findings.push(Finding::new("network", Verdict::Warning, detail).advise(
                "the first node with --network writes it; in a flannel cluster its administrator \
                 does",
            ));
            None
        }
        Some(Err(error)) => {
            findings.push(Finding::wrong(
                "network",
                format!("{PREFIX}/config: {error}"),
            ));
            None
        }
        Some(Ok(config)) => {
            findings.push(network(&config));
            Some(config)
        }
    };
    if let Some(config) = &network {
        findings.extend(leases(&*store, config).await);
    }
    (network.map(|config| config.network), findings)
}

async fn execute(store: &dyn Store, op: Op) -> std::result::Result<Answer, String> {
    match tokio::time::timeout(PATIENCE, store.execute(op)).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("nothing within {} s", PATIENCE.as_secs())),
    }
}

fn network(config: &NetworkConfig) -> Finding {
    match &config.backend {
        Backend::Vxlan(_) | Backend::Udp { .. } => Finding::fine("network", config),
        Backend::Other(name) => Finding::wrong("network", config)
            .advise(format!("muslin has vxlan and udp, not {name}")),
    }
}

async fn leases(store: &dyn Store, config: &NetworkConfig) -> Option<Finding> {
    let Ok(Answer::Snapshot { entries, .. }) =
        execute(store, Op::List(format!("{PREFIX}/subnets"))).await
    else {
        return None;
    };
    let (used, all) = (entries.len(), config.subnets().count());
    let detail = format!("{used} of {all} subnets are leased");
    Some(if used < all {
        Finding::fine("leases", detail)
    } else {
        Finding::wrong("leases", detail).advise(
            "no node can join: nodes that are gone keep their lease for a day, or until 'muslin \
             leave'",
        )
    })
}
