//! `muslin-cni`, the plugin that a container runtime starts as root for each pod.
//!
//! It makes the device in the pod's network namespace and hands it to the node, which has no
//! privileges. It ends at once, so there is no runtime in it: calls block, with a deadline. Standard
//! output has the result alone, standard error one line for each thing worth a log.

mod add;
mod check;
mod del;
mod delegate;
mod deletions;
mod gc;
pub(crate) mod install;
mod interface;
mod kernel;
mod namespace;
pub mod netavark;
mod node;
mod restore;
mod status;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::ExitCode;

use muslin_stack::api::cni::config::{Config, MAX_CONFIG};
use muslin_stack::api::cni::environment::{Command, Environment};
use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::version::Version;
pub(crate) use restore::reattach;

/// The result of a command, or why there is none.
type Result<T> = std::result::Result<T, Error>;

/// What a command is about.
struct Call {
    environment: Environment,
    config: Config,
    /// All of the configuration, for a delegate.
    input: Vec<u8>,
}

/// Does what the environment says.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, version)) => {
            let _ = print(&error.print(version));
            ExitCode::FAILURE
        }
    }
}

fn run() -> std::result::Result<(), (Error, Option<Version>)> {
    let variable = |name: &str| std::env::var_os(name).map(OsString::into_vec);
    let environment = Environment::read(variable).map_err(|error| (error, None))?;
    let Some(environment) = environment else {
        about();
        return Ok(());
    };
    let command = environment.command;
    if command == Command::Version {
        // Without a look at standard input, which may be anything.
        return print(&Version::answer()).map_err(|error| (error, None));
    }
    let input = input().map_err(|error| (error, None))?;
    let config = Config::read(&input, command)?;
    for note in &config.notes {
        log(note);
    }
    let call = Call {
        environment,
        config,
        input,
    };
    let done = match command {
        Command::Add => add::run(&call, &|added| print(&added.print(call.config.version))),
        Command::Check => check::run(&call),
        Command::Del => del::run(&call),
        Command::Gc => gc::run(&call),
        Command::Status => status::run(&call),
        Command::Version => Ok(()),
    };
    done.map_err(|error| (error, Some(call.config.version)))
}

/// What people see who start it by hand.
fn about() {
    let versions = Version::ALL.map(Version::as_str).join(", ");
    let text = format!(
        "muslin-cni {}: attaches pods to a muslin node; container runtimes start it\n\
         CNI protocol versions supported: {versions}\n",
        env!("CARGO_PKG_VERSION")
    );
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn input() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    // One byte more, by which it is seen that it is too long.
    let mut stdin = std::io::stdin().lock().take(MAX_CONFIG as u64 + 1);
    let read = stdin.read_to_end(&mut input);
    read.map_err(|error| Error::Io(format!("error reading from stdin: {error}")))?;
    Ok(input)
}

/// Writes the result.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    written.map_err(|error| Error::Io(format!("error writing to stdout: {error}")))
}

/// Writes a line to the runtime's log.
fn log(text: impl Display) {
    let text = text.to_string().replace(['\n', '\r'], " ");
    let program = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default();
    let _ = writeln!(std::io::stderr(), "{}: {text}", name.display());
}
