//! Reports on stdout: tables for people, JSON for programs.

use std::io::{self, Write};

use comfy_table::{ColumnConstraint, ContentArrangement, Width, presets};
use serde::Serialize;

use crate::error::{Context, Result};
use crate::terminal::text;

/// Prints text; a closed pipe, as by `head`, is not an error.
pub(crate) fn print(text: &str) -> Result<()> {
    try_print(text).map(|_| ())
}

/// Prints text; whether anybody reads it.
pub(crate) fn try_print(text: &str) -> Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => written.context("cannot write to stdout").map(|()| true),
    }
}

/// Prints a value as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("cannot write JSON")?;
    print(&(text + "\n"))
}

/// Spaces between two columns.
const GAP: u16 = 2;

/// A table without rules. In a narrow terminal its cells are wrapped between words; where even that
/// does not fit, each row becomes a block of lines, so that an address is never cut in two.
#[derive(Debug)]
pub(crate) struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings and no row.
    pub(crate) fn new(header: &[&str]) -> Self {
        Self {
            header: header.iter().map(ToString::to_string).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with a cell for each heading.
    pub(crate) fn add_row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        let plain = |cell: String| text::plain(&cell).into_owned();
        let cells = cells.into_iter().map(Into::into);
        self.rows.push(cells.map(plain).collect());
    }

    /// Its lines, for where stdout leads to.
    pub(crate) fn text(&self) -> String {
        self.fit(width())
    }

    fn fit(&self, width: Option<u16>) -> String {
        let lines = || std::iter::once(&self.header).chain(&self.rows);
        let least: u16 = least_widths(lines()).iter().sum();
        match width {
            Some(width) if least > width => self.blocks(width),
            _ => arrange(lines(), width, 0),
        }
    }

    fn blocks(&self, width: u16) -> String {
        let names = self.header.iter().map(|name| name.chars().count());
        let names = names.max().unwrap_or_default();
        let block = |row: &Vec<String>| {
            let pairs = self.header.iter().zip(row);
            let pairs: Vec<_> = pairs
                .filter(|(_, cell)| !cell.is_empty())
                .map(|(name, cell)| vec![name.clone(), cell.clone()])
                .collect();
            arrange(pairs.iter(), Some(width), names)
        };
        let blocks: Vec<_> = self.rows.iter().map(block).collect();
        blocks.join("\n")
    }
}

/// Names and what there is to say of each, one under the other.
pub(crate) fn pairs(pairs: &[(&str, String)]) -> String {
    let pairs = pairs
        .iter()
        .map(|(name, value)| vec![(*name).to_owned(), text::plain(value).into_owned()]);
    arrange(pairs.collect::<Vec<_>>().iter(), width(), 0)
}

/// The columns that stdout has room for: what `COLUMNS` says, or the terminal's. A pipe has no end.
pub(crate) fn width() -> Option<u16> {
    let named = std::env::var("COLUMNS").ok();
    let named = named.and_then(|text| text.trim().parse().ok());
    named
        .filter(|width| *width > 0)
        .or_else(|| comfy_table::Table::new().width())
}

/// For each column the width of its longest word, with what is between it and the next.
fn least_widths<'a>(lines: impl Iterator<Item = &'a Vec<String>>) -> Vec<u16> {
    let mut widths = Vec::new();
    for line in lines {
        widths.resize(widths.len().max(line.len()), 0);
        for (least, cell) in widths.iter_mut().zip(line) {
            let words = cell.split(' ').map(|word| word.chars().count());
            let longest = u16::try_from(words.max().unwrap_or_default()).unwrap_or(u16::MAX);
            *least = longest.saturating_add(GAP).max(*least);
        }
    }
    widths
}

/// Lines of cells under each other, without spaces at their ends. The first column has at least so
/// many characters.
fn arrange<'a>(
    lines: impl Iterator<Item = &'a Vec<String>> + Clone,
    width: Option<u16>,
    first: usize,
) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(presets::NOTHING);
    match width {
        Some(width) => table
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_width(width),
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    table.add_rows(lines.clone());
    let mut widths = least_widths(lines);
    if let Some(least) = widths.first_mut() {
        let first = u16::try_from(first).unwrap_or(u16::MAX);
        *least = first.saturating_add(GAP).max(*least);
    }
    for (column, least) in table.column_iter_mut().zip(widths) {
        column
            .set_padding((0, GAP))
            .set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(least)));
    }
    let lines = table.lines().map(|line| line.trim_end().to_owned() + "\n");
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of a text, which wrapping must leave as they are.
    fn words(text: &str) -> Vec<&str> {
        text.split_whitespace().collect()
    }

    #[test]
    fn no_width_cuts_a_word() {
        let mut table = Table::new(&["SUBNET", "VTEP MAC", "STATE"]);
        let rows = [
            ["10.244.100.0/24", "0e:1f:20:a1:b2:c3", "ok"],
            ["10.244.7.0/24", "", "it uses the backend host-gw"],
        ];
        for row in rows {
            table.add_row(row);
        }
        let wide = table.fit(None);
        assert_eq!(
            wide,
            "SUBNET           VTEP MAC           STATE\n\
             10.244.100.0/24  0e:1f:20:a1:b2:c3  ok\n\
             10.244.7.0/24                       it uses the backend host-gw\n"
        );
        for width in 1..100 {
            let text = table.fit(Some(width));
            let uncut = |word| words(&text).contains(&word);
            let all: Vec<_> = rows.iter().flatten().flat_map(|cell| words(cell)).collect();
            assert!(all.into_iter().all(uncut), "{width}:\n{text}");
            let longest = text.lines().map(str::len).max().unwrap_or_default();
            // The longest word with its name in front.
            assert!(longest <= usize::from(width).max(27), "{width}:\n{text}");
        }
        assert_eq!(table.fit(Some(200)), wide);
        assert_eq!(
            table.fit(Some(30)),
            "SUBNET    10.244.100.0/24\n\
             VTEP MAC  0e:1f:20:a1:b2:c3\n\
             STATE     ok\n\
             \n\
             SUBNET    10.244.7.0/24\n\
             STATE     it uses the\n          backend host-gw\n"
        );
    }
}
