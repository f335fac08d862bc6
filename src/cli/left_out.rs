//! A command that this build has not: any words are taken for it, and one line says what is missing.

use std::ffi::OsString;

use clap::Args;

use crate::error::Result;
use crate::features::Feature;

#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(super) struct Arguments {
    #[arg(
        id = "words",
        hide = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    _words: Vec<OsString>,
}

pub(super) fn run(_: Arguments) -> Result<()> {
    Err(Feature::Sidecar.missing())
}

#[cfg(test)]
mod tests {
    use clap::{Command, FromArgMatches};

    use super::*;
    use crate::cli::flannel;

    #[test]
    fn any_command_line_is_told_what_is_missing() {
        for words in [
            &[][..],
            &["--help"],
            &["--level", "tap", "--", "sh", "-c", "true"],
            &["-etcd-endpoints=http://h:1", "--socks5", "1080"],
            &["sh", "--level"],
        ] {
            let command = Arguments::augment_args(Command::new("sidecar"));
            let command = flannel::with_environment(command);
            let given = words.iter().map(OsString::from);
            let given = flannel::normalize(given, &command);
            let name = std::iter::once("sidecar".into());
            let matches = command.try_get_matches_from(name.chain(given)).unwrap();
            let error = run(Arguments::from_arg_matches(&matches).unwrap()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(
                error
                    .to_string()
                    .ends_with("without sidecar (cargo feature `sidecar`)")
            );
        }
    }
}
