//! Reports, once or again and again: on a terminal the newest in place of the one before, in a pipe one
//! after the other.

use std::fmt::Write;
use std::io::{IsTerminal, stdout};
use std::time::{Duration, SystemTime};

use humantime::format_rfc3339_seconds;
use rustix::termios::tcgetwinsize;
use serde::Serialize;
use serde_json::Value;

use crate::error::{Context, Result};
use crate::process::block_on;
use crate::signals::Signals;
use crate::terminal::output::{Table, print, print_json, try_print, width};
use crate::terminal::quantity::duration;
use crate::terminal::{complain, remark, style, text};

/// Lines of a terminal that does not say how many it has.
const LINES: usize = 24;
/// Clears the screen, hides the cursor, and shows it again on a line of its own.
const BEGIN: &str = "\x1b[2J\x1b[?25l";
const END: &str = "\x1b[?25h\n";

/// What a report says at one moment.
#[derive(Debug)]
pub(super) struct View {
    json: Value,
    text: String,
    /// Why there is no text.
    remark: Option<String>,
}

impl View {
    /// A value, for programs and for people.
    pub(super) fn new(value: &impl Serialize, text: String) -> Result<Self> {
        Ok(Self {
            json: serde_json::to_value(value).context("cannot write JSON")?,
            text,
            remark: None,
        })
    }

    /// Rows under a header, or why there may be none.
    pub(super) fn table<T: Serialize>(
        rows: &[T],
        header: &[&str],
        why_none: &str,
        cells: impl Fn(&T) -> Vec<String>,
    ) -> Result<Self> {
        let mut table = Table::new(header);
        for row in rows {
            table.add_row(cells(row));
        }
        let view = match rows {
            [] => Self::new(&rows, String::new())?.with_remark(why_none),
            _ => Self::new(&rows, table.text())?,
        };
        Ok(view)
    }

    /// The same with a remark for people.
    pub(super) fn with_remark(mut self, remark: &str) -> Self {
        self.remark = Some(remark.to_owned());
        self
    }
}

/// Shows a report, every so often if that is wanted until a signal ends it.
///
/// # Errors
/// Why there is none. A report that fails later is made again.
pub(super) fn show(
    every: Option<Duration>,
    is_json: bool,
    look: impl AsyncFn() -> Result<View>,
) -> Result<()> {
    block_on(async {
        let Some(every) = every else {
            return once(&look().await?, is_json);
        };
        let mut signals = Signals::listen()?;
        let mut paper = Paper::new(every, is_json);
        let mut is_first = true;
        loop {
            let view = tokio::select! {
                view = look() => view,
                _ = signals.next() => return Ok(()),
            };
            let is_read = match view {
                Err(error) if is_first => return Err(error),
                view => paper.put(view)?,
            };
            if !is_read {
                return Ok(());
            }
            is_first = false;
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                _ = signals.next() => return Ok(()),
            }
        }
    })
}

fn once(view: &View, is_json: bool) -> Result<()> {
    if is_json {
        return print_json(&view.json);
    }
    if let Some(text) = &view.remark {
        remark(text);
    }
    print(&view.text)
}

/// Where reports go one after the other.
struct Paper {
    every: Duration,
    is_json: bool,
    /// Whether it is a screen, and has been drawn on.
    is_screen: bool,
    is_drawn: bool,
}

impl Paper {
    fn new(every: Duration, is_json: bool) -> Self {
        Self {
            every,
            is_json,
            is_screen: !is_json && stdout().is_terminal(),
            is_drawn: false,
        }
    }

    /// Writes a report, or why there is none; whether anybody reads.
    fn put(&mut self, view: Result<View>) -> Result<bool> {
        let now = format_rfc3339_seconds(SystemTime::now());
        if self.is_screen {
            let title = format!("{now}, every {}", interval(self.every));
            let first = if self.is_drawn { "" } else { BEGIN };
            self.is_drawn = true;
            return try_print(&format!("{first}{}", screen(&title, &view, size())));
        }
        let view = match view {
            Ok(view) => view,
            Err(error) => {
                complain(&error);
                return Ok(true);
            }
        };
        if self.is_json {
            return try_print(&format!("{}\n", view.json));
        }
        if let Some(text) = &view.remark {
            remark(text);
        }
        try_print(&format!("{now}\n{}\n", view.text))
    }
}

impl Drop for Paper {
    fn drop(&mut self) {
        if self.is_drawn {
            // Its terminal may be gone.
            let _ = print(END);
        }
    }
}

fn interval(every: Duration) -> String {
    match every.subsec_millis() {
        0 => duration(every.as_secs()),
        _ => format!("{} s", every.as_secs_f64()),
    }
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    let size = tcgetwinsize(stdout()).ok();
    let size = size.filter(|size| size.ws_row > 0 && size.ws_col > 0);
    let columns = width().map_or(usize::MAX, usize::from);
    size.map_or((columns, LINES), |size| {
        (columns.min(size.ws_col.into()), size.ws_row.into())
    })
}

/// What draws a report over the one before, cut to so many columns and lines.
fn screen(title: &str, view: &Result<View>, (columns, lines): (usize, usize)) -> String {
    let body = match view {
        Ok(View { text, remark, .. }) => [remark.as_deref().unwrap_or_default(), text].concat(),
        Err(error) => format!("muslin: {}", text::plain(&error.to_string())),
    };
    let total = body.lines().count();
    // The title is one; and one says what does not fit.
    let room = lines.saturating_sub(1);
    let fits = if total > room {
        room.saturating_sub(1)
    } else {
        total
    };
    let mut drawn = format!(
        "\x1b[H{}\x1b[K",
        style::dim(&cut(title, columns), &stdout())
    );
    for line in body.lines().take(fits) {
        let _ = write!(drawn, "\r\n{}\x1b[K", cut(line, columns));
    }
    if total > fits {
        let rest = cut(&format!("{} more lines", total - fits), columns);
        let _ = write!(drawn, "\r\n{}\x1b[K", style::dim(&rest, &stdout()));
    }
    drawn.push_str("\x1b[J");
    drawn
}

/// The start of a line that takes no more than so many columns.
fn cut(line: &str, columns: usize) -> String {
    use unicode_width::UnicodeWidthChar;
    let mut taken = 0;
    line.chars()
        .take_while(|symbol| {
            taken += symbol.width().unwrap_or_default();
            taken <= columns
        })
        .collect()
}

/// An interval in seconds.
///
/// # Errors
/// What is wrong with it.
pub(super) fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds = text.parse::<f64>().ok();
    let seconds = seconds.filter(|seconds| (0.1..=86_400.0).contains(seconds));
    let seconds = seconds.ok_or("it must be a number of seconds from 0.1 to 86400")?;
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn a_screen_is_never_exceeded() {
        let rows: Vec<_> = (0..100)
            .map(|it| format!("row {it} 日本語").repeat(3))
            .collect();
        let cells = |row: &String| vec![row.clone()];
        let view = View::table(&rows, &["ROW"], "none", cells);
        for (columns, lines) in [(1, 1), (10, 2), (30, 24), (80, 200)] {
            let drawn = screen("a title", &view, (columns, lines));
            let plain = drawn
                .replace("\x1b[H", "")
                .replace("\x1b[K", "")
                .replace("\x1b[J", "");
            let shown: Vec<_> = plain.split("\r\n").collect();
            assert!(shown.len() <= lines.max(2), "{lines}: {}", shown.len());
            for line in shown {
                assert!(
                    unicode_width::UnicodeWidthStr::width(line) <= columns,
                    "{line}"
                );
            }
        }
        let drawn = screen("t", &view, (80, 10));
        assert!(drawn.contains("93 more lines"), "{drawn}");
        let drawn = screen("t", &Err(Error::failed("gone\n\x1b[2J")), (80, 10));
        assert!(drawn.contains("muslin: gone\\n\\u{1b}[2J"), "{drawn:?}");
    }

    #[test]
    fn intervals_are_seconds() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "x", "NaN", "inf", "1e9", ""] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
        assert_eq!(interval(Duration::from_millis(2500)), "2.5 s");
        assert_eq!(interval(Duration::from_secs(2)), "2 s");
    }
}
