//! Randomness.

use crate::error::{Context, Result};

/// Random bytes from the kernel.
///
/// # Errors
/// If the kernel gives none.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).context("cannot get random bytes")?;
    Ok(bytes)
}
