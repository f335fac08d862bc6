//! What is logged, as `MUSLIN_LOG` says.

use std::fmt::{self, Debug};

use tracing::field::Field;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::{Directive, LevelFilter};
use tracing_subscriber::fmt::format::{Writer, debug_fn};

use crate::error::{Error, Result};
use crate::terminal::{style, text};

const VARIABLE: &str = "MUSLIN_LOG";
/// Its text in `--help`.
pub(super) const HELP: &str = "The variable MUSLIN_LOG sets what is logged to stderr: off, error, \
    warn, info, debug or trace, for all or for a module, as in info,muslin::lease=debug. The \
    default is info for nodes and sidecars, and warn for other commands.";

/// Logs to stderr from now on, as much as `MUSLIN_LOG` says.
///
/// # Errors
/// Bad usage if it cannot be parsed.
pub(super) fn to_stderr(default: LevelFilter) -> Result<()> {
    let filter = match std::env::var_os(VARIABLE) {
        None => EnvFilter::default().add_directive(default.into()),
        Some(value) => match value.to_str() {
            Some(text) => filter(text, default)?,
            None => return Err(wrong(&value.to_string_lossy())),
        },
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .fmt_fields(debug_fn(write_field).delimited(" "))
        .with_target(false)
        .with_ansi(style::has_colours(&std::io::stderr()))
        .with_writer(std::io::stderr)
        // They would be printed by `eprintln`, which panics if stderr is closed.
        .log_internal_errors(false)
        .init();
    Ok(())
}

/// Writes a field as one line without control characters, whatever its source.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn Debug) -> fmt::Result {
    let value = format!("{value:?}");
    let value = text::plain(&value);
    match field.name() {
        "message" => writer.write_str(&value),
        name => write!(writer, "{name}={value}"),
    }
}

/// The filter that a list of levels stands for: `LEVEL` for all, `MODULE=LEVEL` for a module.
fn filter(text: &str, default: LevelFilter) -> Result<EnvFilter> {
    let mut filter = EnvFilter::default().add_directive(default.into());
    let parts = text.split(',').map(str::trim);
    for part in parts.filter(|part| !part.is_empty()) {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        // Without a level the parser takes it for a module, of which it logs all.
        let is_level = !level.is_empty() && level.parse::<LevelFilter>().is_ok();
        let directive = part.parse::<Directive>().ok().filter(|_| is_level);
        filter = filter.add_directive(directive.ok_or_else(|| wrong(part))?);
    }
    Ok(filter)
}

fn wrong(part: &str) -> Error {
    Error::usage(format!(
        "{VARIABLE}: '{part}' is not a log level: use off, error, warn, info, debug or trace, \
         or MODULE=LEVEL, as in info,muslin::lease=debug"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Option<String> {
        let filter = filter(text, LevelFilter::WARN);
        filter.map(|filter| filter.to_string()).ok()
    }

    #[test]
    fn levels_are_for_all_or_for_modules() {
        for (text, expected) in [
            ("", "warn"),
            (" , ", "warn"),
            ("debug", "debug"),
            ("DEBUG", "debug"),
            ("off", "off"),
            ("muslin::lease=debug", "muslin::lease=debug,warn"),
            (" info , muslin::worker=trace ", "muslin::worker=trace,info"),
        ] {
            assert_eq!(shown(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_in_one_line() {
        for text in [
            "nonsense",
            "verbose",
            "info,loud",
            "muslin",
            "muslin=loud",
            "=",
            "muslin=",
            "info;debug",
            "info debug",
            "9",
            "[",
            "a[b=debug",
        ] {
            let error = filter(text, LevelFilter::WARN).map(|_| ()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{text}");
            let line = error.to_string();
            assert!(line.contains("off, error, warn"), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }
}
