//! `muslin completions` and `muslin man`: what shells complete, and pages of the manual.

use std::fs;
use std::path::PathBuf;

use clap::{Args, Command};
use clap_complete::{Shell, generate};

use crate::error::{Context, Result};
use crate::terminal::output::print;

#[derive(Debug, Args)]
pub(super) struct CompletionArguments {
    /// The shell
    shell: Shell,
}

#[derive(Debug, Args)]
pub(super) struct ManArguments {
    /// Where to write them; it is made if it is not there
    directory: PathBuf,
}

/// Prints what a shell reads to complete commands.
pub(super) fn completions(arguments: &CompletionArguments) -> Result<()> {
    let mut script = Vec::new();
    generate(arguments.shell, &mut visible(), "muslin", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// The command line without what is not for people, which is completed otherwise.
fn visible() -> Command {
    let all = super::command();
    let below = all.get_subcommands().filter(|it| !it.is_hide_set());
    Command::new("muslin")
        .version(env!("CARGO_PKG_VERSION"))
        .propagate_version(true)
        .subcommands(below.cloned())
}

/// Writes a page for each command.
pub(super) fn man(arguments: &ManArguments) -> Result<()> {
    let directory = &arguments.directory;
    let at = directory.display();
    fs::create_dir_all(directory).context(format!("cannot make {at}"))?;
    let written = clap_mangen::generate_to(super::command(), directory);
    written.context(format!("cannot write the manual to {at}"))
}
