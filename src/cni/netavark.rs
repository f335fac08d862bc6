//! `muslin-netavark`, the same plugin as netavark starts it for Podman.

use std::ffi::OsString;
use std::process::ExitCode;

use muslin_stack::api::netavark::{self, Container};

use super::call::{Call, Result, input, log, print};
use super::{add, del};
use crate::control::version::VERSION;

/// Does what the arguments say.
pub fn main() -> ExitCode {
    match run(std::env::args_os().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = print(&error);
            ExitCode::FAILURE
        }
    }
}

/// Or says, as netavark reads it, what is wrong.
fn run(mut arguments: impl Iterator<Item = OsString>) -> std::result::Result<(), String> {
    let command = arguments.next();
    let mut netns = || {
        let path = arguments.next().and_then(|path| path.into_string().ok());
        path.ok_or_else(|| netavark::error("the path of the network namespace is missing"))
    };
    let done = match command.as_ref().and_then(|it| it.to_str()) {
        Some("create") => create(),
        Some("setup") => setup(netns()?),
        Some("teardown") => teardown(netns()?),
        Some("info") => print(&netavark::info(VERSION)),
        _ => {
            let text = "there are create, setup, teardown and info";
            return Err(netavark::error(text));
        }
    };
    done.map_err(netavark::error)
}

fn create() -> Result<()> {
    print(&netavark::create(&input()?)?)
}

fn setup(netns: String) -> Result<()> {
    let call = call(netns, Container::setup)?;
    add::run(&call, &|added| {
        print(&netavark::status(added, &call.environment.interface))
    })
}

fn teardown(netns: String) -> Result<()> {
    del::run(&call(netns, Container::teardown)?)
}

fn call(netns: String, read: fn(&[u8], String) -> Result<Container>) -> Result<Call> {
    let input = input()?;
    let Container {
        environment,
        config,
        ..
    } = read(&input, netns)?;
    config.notes.iter().for_each(log);
    Ok(Call {
        environment,
        config,
        input,
    })
}
