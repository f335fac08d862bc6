//! `muslin doctor`: what a node needs, checked one by one, and what to do where it is missing.
//!
//! Each check is a function that ends in one or several [`Finding`]s and never fails itself. Those
//! of the machine and the store need no node; those of a node ask it over its control socket and
//! send packets out of a pod that lives for the checks only.

mod clock;
mod finding;
mod machine;
mod node;
mod runtimes;
mod store;
mod subject;

use std::ffi::OsStr;

pub use finding::{Finding, Verdict};
#[cfg(feature = "sidecar")]
pub(crate) use machine::obstacle_to_pods;
pub use machine::probe_namespace;
pub use subject::DoctorOptions;
use subject::node_under_test;

use crate::error::Result;

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
    machine::wireguard_keys(&options.state_dir)
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
