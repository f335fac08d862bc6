//! `muslin-cni`, the plugin that a container runtime starts as root for each pod.
//!
//! It makes the device in the pod's network namespace and hands it to the node, which has no
//! privileges. It ends at once, so there is no runtime in it: calls block, with a deadline. Standard
//! output has the result alone, standard error one line for each thing worth a log.

mod add;
mod call;
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
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;

use call::{Call, input, log, print};
use muslin_stack::api::cni::config::Config;
use muslin_stack::api::cni::environment::{Command, Environment};
use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::version::Version;
pub(crate) use restore::reattach;

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
