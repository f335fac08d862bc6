//! `muslin doctor`.

use std::net::Ipv4Addr;

use clap::Args;

use super::{StateChoice, block_on, output};
use crate::doctor::{Finding, Questions, Verdict, examine};
use crate::error::{Error, Result};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The node; needed where several run
    #[arg(long, value_name = "NAME", env = "MUSLIN_NODE")]
    node: Option<String>,
    /// The lease store [default: the node's]
    #[arg(long, value_name = "URL", env = "MUSLIN_STORE")]
    store: Option<String>,
    /// The public address of a node that does not run yet
    #[arg(long, value_name = "IP", env = "MUSLIN_PUBLIC_IP")]
    public_ip: Option<Ipv4Addr>,
    /// The interface of a node that does not run yet
    #[arg(long, value_name = "NAME", env = "MUSLIN_IFACE")]
    iface: Option<String>,
    /// How many peers to send packets to
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    peers: usize,
    #[command(flatten)]
    state: StateChoice,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<()> {
    let questions = Questions {
        state_dir: arguments.state.dir(),
        node: arguments.node,
        store: arguments.store,
        public_ip: arguments.public_ip,
        interface: arguments.iface,
        peers: arguments.peers,
    };
    let mut findings = Vec::new();
    let mut printed = Ok(());
    block_on(examine(&questions, |finding| {
        if !arguments.json && printed.is_ok() {
            printed = output::print(&line(&finding));
        }
        findings.push(finding);
    }))?;
    printed?;
    if arguments.json {
        output::print_json(&findings)?;
    }
    match findings
        .iter()
        .filter(|finding| finding.verdict == Verdict::Wrong)
        .count()
    {
        0 => Ok(()),
        1 => Err(Error::failed("one thing is wrong")),
        many => Err(Error::failed(format!("{many} things are wrong"))),
    }
}

fn line(finding: &Finding) -> String {
    let verdict = match finding.verdict {
        Verdict::Fine => "fine",
        Verdict::Unknown => "unknown",
        Verdict::Warning => "warning",
        Verdict::Wrong => "WRONG",
    };
    let Finding {
        check,
        detail,
        advice,
        ..
    } = finding;
    let advice = advice
        .as_ref()
        .map(|advice| format!("{:8}  {advice}\n", ""))
        .unwrap_or_default();
    format!("{verdict:8}  {check}: {detail}\n{advice}")
}
