//! `muslin doctor`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::{StateChoice, flannel};
use crate::cni::install::BIN_DIR;
use crate::doctor::{DoctorOptions, Finding, Verdict, examine};
use crate::error::{Error, Result};
use crate::process::block_on;
use crate::terminal::output;
use crate::terminal::text::plain;

#[derive(Debug, Args)]
#[command(
    after_help = "For a node that does not run yet, give the flags that 'muslin node' will get."
)]
pub(super) struct Arguments {
    /// The node; required if several run
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// The lease store [default: that of the running node, or the embedded one]
    #[arg(long, value_name = "URL")]
    store: Option<OsString>,
    /// How many peers to send packets to
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    peers: usize,
    /// Where container runtimes have their configurations [default: /etc/cni/net.d, if one for
    /// muslin-cni is there]
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Where container runtimes have their plugins
    #[arg(long, value_name = "DIR", default_value = BIN_DIR)]
    cni_bin_dir: PathBuf,
    #[command(flatten)]
    state: StateChoice,
    #[command(flatten)]
    flannel: flannel::Arguments,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> Result<()> {
    let options = DoctorOptions {
        state_dir: arguments.state.dir(),
        node: arguments.node,
        store: match arguments.flannel.etcd_store() {
            Some(store) => Some(store.into()),
            None => arguments.store,
        },
        etcd: arguments.flannel.etcd_options()?,
        prefix: arguments.flannel.prefix()?,
        underlay: arguments.flannel.underlay(),
        peers: arguments.peers,
        cni_conf_dir: arguments.cni_conf_dir,
        cni_bin_dir: arguments.cni_bin_dir,
    };
    let mut findings = Vec::new();
    let mut printed = Ok(());
    block_on(examine(&options, |finding| {
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
        .map(|advice| format!("{:8}  {}\n", "", plain(advice)))
        .unwrap_or_default();
    format!("{verdict:8}  {check}: {}\n{advice}", plain(detail))
}
