//! A bar chart of all figures, as SVG.

use std::fmt::Write as _;

use super::figures::Figure;
use super::path::Path;
use super::samples::Samples;

/// Panels stand side by side in so many columns.
const COLUMNS: usize = 2;
/// Sizes in pixels: a panel's, its head's, a bar's with what is below it, a gap's between
/// groups, and the texts' beside bars.
pub(crate) const PANEL_WIDTH: usize = 560;
pub(crate) const HEAD: usize = 34;
const ROW: usize = 22;
const GAP: usize = 8;
const LABEL_WIDTH: usize = 230;
const VALUE_WIDTH: usize = 60;
const MARGIN: usize = 24;
const TITLE: usize = 64;
/// The longest bar.
const BAR_WIDTH: usize = PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH;

/// Draws a panel per figure and a bar per path.
pub(crate) fn draw<P: Path>(
    title: &str,
    subtitle: &str,
    cases: &[P],
    samples: &Samples<P>,
) -> String {
    let panels: Vec<_> = Figure::ALL
        .into_iter()
        .filter_map(|figure| panel(figure, cases, samples))
        .collect();
    page(title, subtitle, &panels)
}

/// A part of a picture, drawn from its upper left corner on.
pub(crate) struct Panel {
    pub(crate) height: usize,
    pub(crate) content: String,
}

/// A picture of panels.
pub(crate) fn page(title: &str, subtitle: &str, panels: &[Panel]) -> String {
    let mut body = String::new();
    let mut y = MARGIN + TITLE;
    for row in panels.chunks(COLUMNS) {
        for (column, panel) in row.iter().enumerate() {
            let x = MARGIN + column * (PANEL_WIDTH + MARGIN);
            let content = &panel.content;
            // Writing to a string never fails.
            let _ = writeln!(body, "<g transform=\"translate({x} {y})\">\n{content}</g>");
        }
        y += row.iter().map(|panel| panel.height).max().unwrap_or(0) + MARGIN;
    }
    let width = MARGIN + COLUMNS * (PANEL_WIDTH + MARGIN);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{y}\" \
         viewBox=\"0 0 {width} {y}\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{MARGIN}\" y=\"36\" font-size=\"18\" font-weight=\"bold\">{}</text>\n\
         <text x=\"{MARGIN}\" y=\"58\" fill=\"#666\">{}</text>\n{body}</svg>\n",
        escape(title),
        escape(subtitle)
    )
}

/// One figure, if anybody has it.
fn panel<P: Path>(figure: Figure, cases: &[P], samples: &Samples<P>) -> Option<Panel> {
    let rows: Vec<_> = cases
        .iter()
        .filter_map(|case| Some((case, samples.summary(*case, figure)?)))
        .collect();
    let most = rows.iter().map(|(_, row)| row.max).fold(0.0, f64::max);
    if most <= 0.0 {
        return None;
    }
    let (title, unit) = figure.title();
    let better = figure.better();
    let mut content = format!(
        "<text y=\"16\" font-size=\"15\" font-weight=\"bold\">{title}, {unit} \
         <tspan font-size=\"12\" font-weight=\"normal\" fill=\"#666\">{better} is better</tspan>\
         </text>\n"
    );
    let length = |value: f64| value / most * BAR_WIDTH as f64;
    let mut top = HEAD;
    let mut before = rows.first().map(|(case, _)| case.group());
    for (case, row) in &rows {
        // Paths that may be compared stand together.
        if before.replace(case.group()) != Some(case.group()) {
            top += GAP;
        }
        let (text, middle) = (top + 12, top + 8);
        let (bar, low, high) = (length(row.median), length(row.min), length(row.max));
        let x = LABEL_WIDTH as f64;
        // Writing to a string never fails.
        let _ = writeln!(
            content,
            "<text x=\"{label}\" y=\"{text}\" text-anchor=\"end\">{case}</text>\
             <rect x=\"{LABEL_WIDTH}\" y=\"{top}\" width=\"{bar:.1}\" height=\"16\" fill=\"{colour}\"/>\
             <path d=\"M{from:.1} {middle}H{to:.1}\" stroke=\"#222\"/>\
             <text x=\"{after:.1}\" y=\"{text}\">{value}</text>",
            label = LABEL_WIDTH - 8,
            colour = case.colour(),
            from = x + low,
            to = x + high,
            after = x + high + 6.0,
            value = figure.show(row.median),
        );
        top += ROW;
    }
    Some(Panel {
        height: top,
        content,
    })
}

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
