//! A run of a plan: all its events, then everything is mended, and all must be well in time.

use smoltcp::time::Duration;

use super::cluster::Cluster;
use super::kind::DeviceKind;
use super::outcome::{Failure, Summary, Violation};
use super::plan::Plan;

/// A day and what a lease may live longer than it should.
const DAY: Duration = Duration::from_secs(86_400 + 3_600);

/// Runs a plan, with its log if requested.
///
/// # Errors
/// What was wrong, and when.
pub fn run(plan: &Plan, keeps_log: bool) -> Result<Summary, Failure> {
    run_with(plan, &[], keeps_log)
}

/// The same for a plan that attaches devices of these kinds
/// ([`Event::AttachDevice`](super::Event::AttachDevice)).
///
/// # Errors
/// What was wrong, and when.
pub fn run_with(plan: &Plan, kinds: &[DeviceKind], keeps_log: bool) -> Result<Summary, Failure> {
    let mut cluster = Cluster::new(plan.seed, plan.setup.clone(), plan.weather, keeps_log);
    cluster.kinds.extend_from_slice(kinds);
    match whole(&mut cluster, plan) {
        Ok(convergence) => Ok(Summary {
            hash: cluster.log.hash(),
            figures: cluster.figures,
            convergence,
            log: cluster.log.lines(),
        }),
        Err(violation) => Err(Failure {
            violation,
            tables: cluster.tables(),
            log: cluster.log.lines(),
        }),
    }
}

fn whole(cluster: &mut Cluster, plan: &Plan) -> Result<u64, Violation> {
    for step in &plan.steps {
        cluster.run(Duration::from_millis(step.after))?;
        cluster.check_calm()?;
        cluster.apply(&step.event)?;
        cluster.check_tables()?;
    }
    cluster.heal()?;
    let convergence = cluster.converge()?;
    cluster.check_tables()?;
    cluster.await_errands()?;
    cluster.check_farewells()?;
    cluster.talk_all(plan.seed)?;
    cluster.probe_all()?;
    cluster.go_out_all()?;
    cluster.visit_all()?;
    if plan.rests {
        cluster.run(DAY)?;
        cluster.check_idle()?;
        cluster.converge()?;
        cluster.talk_all(plan.seed)?;
        cluster.go_out_all()?;
    }
    Ok(convergence)
}
