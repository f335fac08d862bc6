//! `muslin page`: the nodes of this machine in a browser.

use std::net::SocketAddr;

use clap::Args;
use nix::sys::signal::Signal;

use super::StateChoice;
use crate::error::Result;
use crate::page::{self, Nodes, Page};
use crate::process::block_on;
use crate::signals::Listener;
use crate::terminal::output::print;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    state: StateChoice,
    /// Where the page is served; by another address than this machine's own it asks for a token
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8484")]
    listen: SocketAddr,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    block_on(async {
        let listener = page::listen(arguments.listen, "--listen").await?;
        let address = listener.local_addr().unwrap_or(arguments.listen);
        let page = Page::new(Nodes::In(arguments.state.dir()), address)?;
        print(&format!("{}\n", page.url()))?;
        let mut interrupt = Listener::new(Signal::SIGINT)?;
        let mut terminate = Listener::new(Signal::SIGTERM)?;
        tokio::select! {
            () = page.serve(listener) => {}
            () = interrupt.heard() => {}
            () = terminate.heard() => {}
        }
        Ok(())
    })
}
