//! A plugin that chooses addresses in the node's place (`ipam.type`), such as `host-local` where
//! flannel's own configuration is used.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::result::Added;
use serde::Deserialize;

use super::call::{Call, Result, log};

/// Bytes of the longest result.
const MAX_RESULT: u64 = 1 << 20;

/// A plugin that chooses addresses.
pub(super) struct Delegate<'a> {
    call: &'a Call,
    name: &'a str,
    program: PathBuf,
}

/// An error as plugins tell it.
#[derive(Deserialize)]
struct Told {
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl<'a> Delegate<'a> {
    /// The one that a configuration names, if it does.
    ///
    /// # Errors
    /// If it is not there.
    pub(super) fn of(call: &'a Call) -> Result<Option<Self>> {
        let Some(name) = call.config.delegate.as_deref() else {
            return Ok(None);
        };
        let path = &call.environment.path;
        let folders = path.split(':').filter(|folder| folder.starts_with('/'));
        let mut programs = folders.map(|folder| Path::new(folder).join(name));
        let program = programs.find(|program| is_program(program));
        let missing = || {
            let text = format!("the plugin '{name}' of ipam.type is not in CNI_PATH ({path})");
            Error::Failed(text)
        };
        let program = program.ok_or_else(missing)?;
        Ok(Some(Self {
            call,
            name,
            program,
        }))
    }

    /// Has it choose addresses.
    pub(super) fn add(&self) -> Result<Added> {
        let output = self.run(None)?;
        let wrong = |why: String| Error::Failed(format!("the result of '{}': {why}", self.name));
        let value = serde_json::from_slice(&output).map_err(|error| wrong(error.to_string()))?;
        let added = Added::read(&value).map_err(wrong)?;
        if added.ips.is_empty() {
            return Err(wrong("it has no address".to_owned()));
        }
        Ok(added)
    }

    /// Has it take back what it has chosen.
    pub(super) fn undo(&self) {
        if let Err(error) = self.run(Some("DEL")) {
            log(format_args!("'{}' keeps its address: {error}", self.name));
        }
    }

    /// Has it do what we are asked.
    pub(super) fn forward(&self) -> Result<()> {
        self.run(None).map(drop)
    }

    /// Runs it with our environment and configuration, or another command.
    fn run(&self, instead: Option<&str>) -> Result<Vec<u8>> {
        let name = self.name;
        let failed = |what: &str, error: std::io::Error| {
            Error::Failed(format!("{what} the plugin '{name}': {error}"))
        };
        let mut command = Command::new(&self.program);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(instead) = instead {
            command.env("CNI_COMMAND", instead);
        }
        let mut child = command.spawn().map_err(|error| failed("starting", error))?;
        // Beside each other, since it may answer before it has read all.
        let stdin = child.stdin.take();
        let input = &self.call.input;
        let mut output = Vec::new();
        let read = std::thread::scope(|scope| {
            let write = move || {
                // It need not read it.
                let _ = stdin.map(|mut stdin| stdin.write_all(input));
            };
            std::thread::Builder::new().spawn_scoped(scope, write)?;
            let stdout = child.stdout.take();
            let read = stdout.map(|stdout| stdout.take(MAX_RESULT).read_to_end(&mut output));
            read.transpose()
        });
        let status = child.wait().map_err(|error| failed("waiting for", error))?;
        read.map_err(|error| failed("reading from", error))?;
        if status.success() {
            return Ok(output);
        }
        Err(match serde_json::from_slice::<Told>(&output) {
            Ok(told) => Error::Delegate {
                code: told.code,
                message: format!("{name}: {}", told.msg),
                details: told.details,
            },
            Err(_) => Error::Failed(format!("the plugin '{name}' ended with {status}")),
        })
    }
}

fn is_program(path: &Path) -> bool {
    let found = std::fs::metadata(path);
    found.is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
}
