//! The kernel's network configuration, asked over rtnetlink.

use rtnetlink::{Handle, new_connection};

use crate::error::{Context, Error, Result};

/// The same on a thread of its own, where nothing can be awaited.
///
/// # Errors
/// If there is no connection.
pub(crate) fn with_blocking<T: Send>(ask: impl AsyncFnOnce(&Handle) -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_io().build();
            let runtime = runtime.context("cannot speak rtnetlink")?;
            runtime.block_on(with(ask))
        });
        let failed = |_| Err(Error::failed("rtnetlink's thread has ended"));
        thread.join().unwrap_or_else(failed)
    })
}

/// Speaks rtnetlink in the network namespace of this thread, for as long as `ask` takes.
///
/// # Errors
/// If there is no connection; what `ask` has to say is its own.
pub(crate) async fn with<T>(ask: impl AsyncFnOnce(&Handle) -> T) -> Result<T> {
    let (connection, handle, _) = new_connection().context("cannot speak rtnetlink")?;
    let connection = tokio::spawn(connection);
    let answer = ask(&handle).await;
    connection.abort();
    Ok(answer)
}
