//! Making a failing plan small: steps that it fails without are left out (Zeller and Hildebrandt's
//! delta debugging, in its simple form).

use super::kind::DeviceKind;
use super::outcome::Failure;
use super::plan::Plan;
use super::run::run_with;

/// Runs at most: a plan that fails late takes a while.
const MAX_RUNS: usize = 400;

/// A plan of some of the steps of a failing one that still fails, and how.
#[must_use]
pub fn shrink(plan: &Plan, failure: Failure) -> (Plan, Failure) {
    shrink_with(plan, &[], failure)
}

/// The same for a plan that attaches devices of these kinds.
#[must_use]
pub fn shrink_with(plan: &Plan, kinds: &[DeviceKind], failure: Failure) -> (Plan, Failure) {
    let mut best = (plan.clone(), failure);
    let mut runs = 0;
    let mut chunk = best.0.steps.len().div_ceil(2).max(1);
    loop {
        let mut is_smaller = false;
        let mut start = 0;
        while start < best.0.steps.len() && runs < MAX_RUNS {
            let plan = without(&best.0, start, chunk);
            runs += 1;
            match run_with(&plan, kinds, false) {
                Err(failure) => {
                    best = (plan, failure);
                    is_smaller = true;
                }
                Ok(_) => start += chunk,
            }
        }
        if chunk == 1 && !is_smaller || runs >= MAX_RUNS {
            return best;
        }
        if !is_smaller {
            chunk = (chunk / 2).max(1);
        }
    }
}

fn without(plan: &Plan, start: usize, len: usize) -> Plan {
    let numbers = plan.steps.iter().map(|step| step.number);
    let kept: Vec<_> = numbers
        .enumerate()
        .filter(|(index, _)| !(start..start + len).contains(index))
        .map(|(_, number)| number)
        .collect();
    plan.only(&kept)
}
