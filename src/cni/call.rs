//! What a command gets from the runtime, and gives to it.

use std::fmt::Display;
use std::io::{Read, Write};
use std::path::Path;

use muslin_stack::api::cni::config::{Config, MAX_CONFIG};
use muslin_stack::api::cni::environment::Environment;
use muslin_stack::api::cni::error::Error;

/// The result of a command, or why there is none.
pub(super) type Result<T> = std::result::Result<T, Error>;

/// What a command is about.
pub(super) struct Call {
    pub(super) environment: Environment,
    pub(super) config: Config,
    /// All of the configuration, for a delegate.
    pub(super) input: Vec<u8>,
}

/// Reads the configuration.
pub(super) fn input() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    // One byte more, by which it is seen that it is too long.
    let mut stdin = std::io::stdin().lock().take(MAX_CONFIG as u64 + 1);
    let read = stdin.read_to_end(&mut input);
    read.map_err(|error| Error::Io(format!("error reading from stdin: {error}")))?;
    Ok(input)
}

/// Writes the result.
pub(super) fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    written.map_err(|error| Error::Io(format!("error writing to stdout: {error}")))
}

/// Writes a line to the runtime's log.
pub(super) fn log(text: impl Display) {
    let text = text.to_string().replace(['\n', '\r'], " ");
    let program = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default();
    let _ = writeln!(std::io::stderr(), "{}: {text}", name.display());
}
