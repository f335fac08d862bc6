//! What this process takes from itself, so that others get less by it.

mod capabilities;

use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

use crate::error::{Context, Result};

pub(crate) use capabilities::{Capability, hold_only, keep_only, without};

/// Does what can be done of these, and says what cannot: a node with fewer rights is one all the same.
pub(crate) fn try_all(steps: &[fn() -> Result<()>]) {
    for step in steps {
        if let Err(error) = step() {
            warn!("{error}");
        }
    }
}

/// Nobody but root reads this process' memory, variables and descriptors, or takes them over
/// (ptrace(2), pidfd_getfd(2)); it leaves no core. Its children are their own masters again.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn keep_to_itself() -> Result<()> {
    set_dumpable(false).context("cannot protect this process")
}

/// Neither this process nor its children leave a core. Only for what starts no command of the
/// user's, which is to have its own limits.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn leave_no_core() -> Result<()> {
    let limit = getrlimit(Resource::RLIMIT_CORE).map(|(_, hard)| hard);
    limit
        .and_then(|hard| setrlimit(Resource::RLIMIT_CORE, 0, hard))
        .context("cannot do without a core")
}

/// Neither this process nor its children get rights from programs that have some.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn gain_nothing() -> Result<()> {
    set_no_new_privs().context("cannot give up new privileges")
}
