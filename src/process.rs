//! This process: what its asynchronous parts run on, and how it ends.

use nix::sys::signal::Signal;

use crate::error::{Context, Error, Result};
use crate::terminal::complain;

/// Runs a command's asynchronous part on this thread alone, since what enters namespaces must have
/// one thread.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.context("cannot start")?;
    let result = runtime.block_on(future);
    // A store that hangs must not hold up the end.
    runtime.shutdown_background();
    result
}

/// Has the kernel end this process with the one that started it.
pub(crate) fn die_with_parent() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).context("cannot watch the parent process")
}

/// What a process ends with that has failed so, which it says unless its command did.
pub(crate) fn exit_code(error: &Error) -> u8 {
    if !matches!(error, Error::Command(_)) {
        complain(error);
    }
    error.exit_code()
}
