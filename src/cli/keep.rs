//! `muslin keep`: a process that holds pods' devices while there is no node.

use std::path::PathBuf;

use clap::Args;

use crate::confine;
use crate::error::Result;
use crate::keeper;
use crate::process::block_on;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where to listen for the node, which has it as --keeper
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    confine::try_all(&[confine::gain_nothing, || confine::keep_only(&[])]);
    block_on(keeper::run(&arguments.socket))
}
