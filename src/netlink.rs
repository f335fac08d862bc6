//! The kernel's network configuration, asked over rtnetlink.

use rtnetlink::{Handle, new_connection};

use crate::error::{Context, Result};

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
