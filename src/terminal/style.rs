//! Colours, where somebody sees them.

use std::io::IsTerminal;

/// Whether text that goes there may have colours: to a terminal, unless `NO_COLOR` is set
/// (<https://no-color.org>).
pub(crate) fn has_colours(to: &impl IsTerminal) -> bool {
    let is_unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    to.is_terminal() && !is_unwanted
}

/// Text that is less important than what is around it.
pub(crate) fn dim(text: &str, to: &impl IsTerminal) -> String {
    match has_colours(to) {
        true => format!("\x1b[2m{text}\x1b[0m"),
        false => text.to_owned(),
    }
}
