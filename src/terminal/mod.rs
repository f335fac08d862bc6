//! What people see: text, tables and JSON on their terminal, and which job has it.

pub(crate) mod job;
pub(crate) mod output;
pub(crate) mod quantity;
pub(crate) mod style;
pub(crate) mod suggest;
pub(crate) mod text;

use std::io::Write;

/// Says beside data what there is to know about it.
pub(crate) fn remark(what: &str) {
    let mut stderr = std::io::stderr();
    let line = style::dim(&text::plain(what), &stderr);
    // In one piece: others may write there, too.
    let _ = stderr.write_all(format!("{line}\n").as_bytes());
}

/// Says what went wrong. A reader of stderr that has gone, like `head` or a terminal, is no reason
/// to fail, as it is for `eprintln`.
pub(crate) fn complain(what: &impl std::fmt::Display) {
    let what = what.to_string();
    let _ = writeln!(std::io::stderr(), "muslin: {}", text::plain(&what));
}
