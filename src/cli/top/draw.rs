//! The model, drawn.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Row as Cells, Table, TableState};
use unicode_width::UnicodeWidthStr;

use super::model::{Model, Shown};
use super::table::{Column, Kind, Row};
use crate::terminal::quantity::{duration, rate};
use crate::terminal::text::plain;

/// Lines of a screen with room for all tables at once; on others there is the one that keys are for.
const ROOM_FOR_ALL: u16 = 40;
/// Columns of the longest text that is shown whole where others need room.
const LONG: u16 = 24;
/// Columns between two columns of a table.
const GAP: u16 = 2;
/// Columns of the least that is left of a text that is cut.
const LEAST: u16 = 6;

const KEYS: &str = "q quit  Tab table  s sort  r reverse  / filter  ? help";
const HELP: [&str; 11] = [
    "Rates are of one second, between the last two looks.",
    "FROM and TO are seen from the pod or peer.",
    "A superpacket of up to 64 KiB is one packet.",
    "▲ packets are lost for this reason now.",
    "",
    "Tab ←→   another table      ↑↓ PgUp PgDn   rows",
    "s        sort by the next column, then by traffic",
    "r        turn the order around",
    "/        only rows with these letters; Esc: all",
    "q Esc    quit",
    "any key closes this",
];

/// How things are told apart: without colours by what every terminal has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Theme {
    pub(super) has_colours: bool,
}

impl Theme {
    fn coloured(self, colour: Color) -> Style {
        match self.has_colours {
            true => Style::new().fg(colour),
            false => Style::new(),
        }
    }

    fn strong(self) -> Style {
        self.coloured(Color::Cyan).add_modifier(Modifier::BOLD)
    }

    fn loud(self) -> Style {
        self.coloured(Color::Red).add_modifier(Modifier::BOLD)
    }

    fn chosen(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }
}

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model, theme: Theme) {
    let head = head(model, theme);
    let lines = u16::try_from(head.len()).unwrap_or(u16::MAX);
    let [top, middle, bottom] = Layout::vertical([
        Constraint::Length(lines),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(head), top);
    if middle.height >= ROOM_FOR_ALL {
        let rows = |kind| match kind == model.kind {
            true => Constraint::Fill(2),
            false => Constraint::Fill(1),
        };
        let areas: [_; 4] = Layout::vertical(Kind::ALL.map(rows)).areas(middle);
        for (kind, area) in Kind::ALL.into_iter().zip(areas) {
            let [title, rest] = title_and_rest(area);
            frame.render_widget(Line::from(tab(model, kind, theme)), title);
            table(frame, rest, model, kind, theme);
        }
    } else {
        let [title, rest] = title_and_rest(middle);
        let mut tabs = Vec::new();
        for kind in Kind::ALL {
            tabs.extend([tab(model, kind, theme), Span::raw(" ")]);
        }
        frame.render_widget(Line::from(tabs), title);
        table(frame, rest, model, model.kind, theme);
    }
    frame.render_widget(foot(model, theme), bottom);
    if model.has_help {
        help(frame);
    }
}

fn title_and_rest(area: Rect) -> [Rect; 2] {
    Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area)
}

/// The node, its packets, and what is wrong.
fn head(model: &Model, theme: Theme) -> Vec<Line<'static>> {
    let status = &model.status;
    let node = format!("muslin {}", plain(&status.node));
    let about = format!(
        "  {}  {}  MTU {}  {}  up {}",
        status.subnet,
        status.backend,
        status.mtu,
        status.public_ip,
        duration(status.uptime_seconds)
    );
    let mut lines = vec![Line::from(vec![
        Span::styled(node, theme.strong()),
        Span::raw(about),
    ])];
    let rates = model.packet_rates();
    let mut packets = vec![Span::raw("packets/s")];
    // What matters most is first, where a narrow screen has room for it.
    for (name, index) in [("lost", 3), ("received", 0), ("delivered", 1), ("sent", 2)] {
        let value = rates.map(|rates| rates[index]);
        let is_loss = name == "lost" && value.is_some_and(|value| value > 0.0);
        let style = match is_loss {
            true => theme.loud(),
            false => Style::new(),
        };
        let value = value.map_or_else(|| "-".to_owned(), rate);
        packets.push(Span::styled(format!("  {value} {name}"), style));
    }
    lines.push(Line::from(packets));
    if let Some(trouble) = &model.trouble {
        lines.push(Line::styled(plain(trouble).into_owned(), theme.loud()));
    }
    lines
}

/// A table's name and how many rows it has.
fn tab(model: &Model, kind: Kind, theme: Theme) -> Span<'static> {
    let text = format!(" {} {} ", kind.name(), model.count(kind));
    match kind == model.kind {
        true => Span::styled(text, theme.strong().patch(theme.chosen())),
        false => Span::raw(text),
    }
}

fn table(frame: &mut Frame<'_>, area: Rect, model: &Model, kind: Kind, theme: Theme) {
    let rows = model.rows(kind);
    if rows.is_empty() {
        let why = match model.count(kind) {
            0 => kind.why_none(),
            _ => "no row has the letters of the filter",
        };
        frame.render_widget(Paragraph::new(format!("  {why}")), area);
        return;
    }
    let shown = model.shown(kind);
    let (columns, widths) = fit(&rows, kind.columns(), area.width);
    let aligned = |text: &str, column: usize, width: u16| {
        let text = cut(text, width);
        let line = Line::from(text);
        match kind.columns()[column].is_number {
            true => line.alignment(Alignment::Right),
            false => line,
        }
    };
    let head = columns.iter().zip(&widths).map(|(column, width)| {
        let title = kind.columns()[*column].title;
        let line = aligned(title, *column, *width);
        match shown.sort == Some(*column) {
            true => line.style(Style::new().add_modifier(Modifier::UNDERLINED)),
            false => line,
        }
    });
    let head = Cells::new(head.collect::<Vec<_>>()).style(theme.strong());
    // Only what is seen is drawn: flows may be many.
    let marked = shown.marked.min(rows.len() - 1);
    let room = usize::from(area.height.saturating_sub(1)).max(1);
    let first = (marked + 1).saturating_sub(room);
    let lines = rows.iter().skip(first).take(room).map(|row| {
        let cells = columns.iter().zip(&widths);
        let cells = cells.map(|(column, width)| aligned(&row.cells[*column].text, *column, *width));
        let style = match row.is_loud {
            true => theme.loud(),
            false => Style::new(),
        };
        Cells::new(cells.collect::<Vec<_>>()).style(style)
    });
    let table = Table::new(lines, widths.iter().map(|width| Constraint::Length(*width)))
        .header(head)
        .column_spacing(GAP);
    let is_chosen = kind == model.kind;
    let table = match is_chosen {
        true => table.row_highlight_style(theme.chosen()),
        false => table,
    };
    let mut state = TableState::default();
    if is_chosen {
        state.select(Some(marked - first));
    }
    frame.render_stateful_widget(table, area, &mut state);
}

/// The columns that there is room for, and their widths.
fn fit(rows: &[Row], columns: &[Column], room: u16) -> (Vec<usize>, Vec<u16>) {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row.cells[column].text.width());
        let widest = cells.chain([columns[column].title.width()]).max();
        u16::try_from(widest.unwrap_or_default()).unwrap_or(u16::MAX)
    };
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let mut chosen: Vec<_> = (0..columns.len()).collect();
    // Long texts are cut before a column is left out.
    let needed = |column: usize| match columns[column].is_number {
        true => widths[column],
        false => widths[column].min(LONG),
    };
    let total = |chosen: &[usize], width: &dyn Fn(usize) -> u16| {
        let widths = chosen.iter().map(|column| width(*column));
        let gaps = GAP.saturating_mul(u16::try_from(chosen.len().saturating_sub(1)).unwrap_or(0));
        widths.fold(gaps, u16::saturating_add)
    };
    while total(&chosen, &needed) > room {
        let most = chosen.iter().map(|column| columns[*column].optional).max();
        match most.filter(|most| *most > 0) {
            Some(most) => chosen.retain(|column| columns[*column].optional != most),
            None => break,
        }
    }
    let mut fitted: Vec<_> = chosen.iter().map(|column| needed(*column)).collect();
    // What is missing is taken from texts; what is left over goes to those that are cut.
    let mut over = total(&chosen, &needed).saturating_sub(room);
    let mut left = room.saturating_sub(total(&chosen, &needed));
    for (column, width) in chosen.iter().zip(&mut fitted) {
        if !columns[*column].is_number {
            let less = over.min(width.saturating_sub(LEAST));
            *width -= less;
            over -= less;
        }
        let more = left.min(widths[*column].saturating_sub(*width));
        *width += more;
        left -= more;
    }
    (chosen, fitted)
}

/// The start of a text, with a sign that it goes on.
fn cut(text: &str, columns: u16) -> String {
    use unicode_width::UnicodeWidthChar;
    let columns = usize::from(columns);
    if text.width() <= columns {
        return text.to_owned();
    }
    let mut taken = 1;
    let start = text.chars().take_while(|symbol| {
        taken += symbol.width().unwrap_or_default();
        taken <= columns
    });
    let mut start: String = start.collect();
    start.push('…');
    start
}

/// What is filtered and sorted by, or which keys there are.
fn foot(model: &Model, theme: Theme) -> Line<'static> {
    if model.is_filtering {
        return Line::styled(
            format!("/{}▏ Enter: keep  Esc: all", plain(&model.filter)),
            theme.strong(),
        );
    }
    let Shown {
        sort, is_reversed, ..
    } = model.shown(model.kind);
    let mut parts = Vec::new();
    if !model.filter.is_empty() {
        parts.push(format!("filter: {}", plain(&model.filter)));
    }
    if sort.is_some() || is_reversed {
        let by = sort.map_or("traffic", |column| model.kind.columns()[column].title);
        let reversed = if is_reversed { ", reversed" } else { "" };
        parts.push(format!("by {by}{reversed}"));
    }
    parts.push(KEYS.to_owned());
    Line::from(parts.join("  "))
}

/// What keys and columns mean, over everything else.
fn help(frame: &mut Frame<'_>) {
    let area = frame.area();
    let lines = u16::try_from(HELP.len()).unwrap_or(u16::MAX);
    let widest = HELP.iter().map(|line| line.width()).max();
    let width = u16::try_from(widest.unwrap_or_default()).unwrap_or(u16::MAX);
    let (width, height) = ((width + 4).min(area.width), (lines + 2).min(area.height));
    let place = Rect {
        x: area.x + (area.width - width) / 2,
        y: area.y + (area.height - height) / 2,
        width,
        height,
    };
    frame.render_widget(Clear, place);
    let block = Block::bordered().title(" muslin top ");
    frame.render_widget(
        Paragraph::new(HELP.map(Line::from).to_vec()).block(block),
        place,
    );
}
