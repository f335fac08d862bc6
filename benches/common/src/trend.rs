//! How ratios went from run to run, as SVG.

use std::fmt::Write as _;

use super::chart::{HEAD, PANEL_WIDTH, Panel, escape, page};
use super::history::{Run, Stamp};
use super::path::Path;
use super::samples::Comparison;

/// Sizes in pixels: of the plot in a panel, of the texts beside and below it, and of the line below the
/// title.
const WIDTH: f64 = (PANEL_WIDTH - RIGHT) as f64;
const HEIGHT: f64 = 110.0;
const RIGHT: usize = 70;
const BELOW: usize = 24;
const SUBTITLE: usize = 14;
/// What is above the plot.
const TOP: usize = HEAD + SUBTITLE;
/// Free space above the largest value.
const AIR: f64 = 1.05;

/// Draws a panel for each comparison that has a goal, and in it a point per run.
pub(crate) fn draw<P: Path>(
    title: &str,
    subtitle: &str,
    comparisons: &[Comparison<P>],
    runs: &[Run],
) -> String {
    let panels = comparisons.iter().filter_map(|comparison| {
        let values = runs
            .iter()
            .filter_map(|run| Some((&run.stamp, run.value(comparison)?)));
        panel(comparison, &values.collect::<Vec<_>>())
    });
    page(title, subtitle, &panels.collect::<Vec<_>>())
}

/// One comparison, if it has a goal and any run a value.
fn panel<P: Path>(comparison: &Comparison<P>, values: &[(&Stamp, f64)]) -> Option<Panel> {
    let (must, aim) = comparison.goal?;
    let [(first, _), ..] = values else {
        return None;
    };
    let most = values.iter().map(|(_, value)| *value);
    let most = most.fold(must.max(aim), f64::max) * AIR;
    let height = |value: f64| TOP as f64 + HEIGHT * (1.0 - value / most);
    let mut content = head(comparison);
    for (goal, name, dashes) in [(must, "must", "6 3"), (aim, "aim", "2 3")] {
        let y = height(goal);
        // Writing to a string never fails, here and below.
        let _ = writeln!(
            content,
            "<path d=\"M0 {y:.1}H{WIDTH}\" stroke=\"#999\" stroke-dasharray=\"{dashes}\"/>\
             <text x=\"{text}\" y=\"{y:.1}\" dy=\"4\" font-size=\"11\" fill=\"#666\">{name} {goal}</text>",
            text = WIDTH + 6.0,
        );
    }
    let steps = (values.len() - 1).max(1) as f64;
    let colour = comparison.ours.colour();
    let mut line = String::new();
    let mut points = String::new();
    for (index, (stamp, value)) in values.iter().enumerate() {
        let (x, y) = (WIDTH * index as f64 / steps, height(*value));
        let _ = write!(line, "{x:.1},{y:.1} ");
        let _ = writeln!(
            points,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\">\
             <title>{} {}: {value:.2}</title></circle>",
            escape(&stamp.date),
            escape(&stamp.commit),
        );
    }
    let _ = writeln!(
        content,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n{points}",
        line.trim_end()
    );
    let y = TOP + HEIGHT as usize + 16;
    let _ = writeln!(
        content,
        "<text y=\"{y}\" font-size=\"11\">{}</text>",
        label(first)
    );
    if let [_, .., (last, value)] = values {
        let _ = writeln!(
            content,
            "<text x=\"{WIDTH}\" y=\"{y}\" font-size=\"11\" text-anchor=\"end\">{}: {value:.2}</text>",
            label(last)
        );
    }
    Some(Panel {
        height: TOP + HEIGHT as usize + BELOW,
        content,
    })
}

fn head<P: Path>(comparison: &Comparison<P>) -> String {
    let (title, unit) = comparison.figure.title();
    let (theirs, unit) = match comparison.theirs {
        Some(theirs) => (format!(" / {theirs}"), String::new()),
        None => (String::new(), format!(", {unit}")),
    };
    let better = comparison.figure.better();
    format!(
        "<text y=\"16\" font-size=\"15\" font-weight=\"bold\">{title}{unit} \
         <tspan font-size=\"12\" font-weight=\"normal\" fill=\"#666\">{better} is better</tspan>\
         </text>\n<text y=\"33\" fill=\"#666\">{}</text>\n",
        escape(&format!("{}{theirs}", comparison.ours))
    )
}

/// A version and its day.
fn label(stamp: &Stamp) -> String {
    let day = stamp.date.split('T').next().unwrap_or_default();
    escape(&format!("{} ({day})", stamp.commit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::runs;
    use crate::history::tests::{COMPARISON, machine, rows};

    fn drawn(runs: &[Run], comparison: Comparison<crate::history::tests::Side>) -> String {
        draw("a title", "a machine", &[comparison], runs)
    }

    #[test]
    fn each_run_is_a_point_at_the_height_of_its_ratio() {
        let runs = runs(
            [rows(1, 300_000.0), rows(2, 400_000.0)].concat(),
            &machine(),
        );
        let picture = drawn(&runs, COMPARISON);
        // The aim, 2.0, is the largest value, and the second run's.
        let top = TOP as f64 + HEIGHT * (1.0 - 1.0 / AIR);
        let middle = TOP as f64 + HEIGHT * (1.0 - 0.75 / AIR);
        let line = format!("points=\"0.0,{middle:.1} {WIDTH:.1},{top:.1}\"");
        assert!(picture.contains(&line), "{picture}");
        assert_eq!(picture.matches("<circle").count(), 2);
        assert!(picture.contains("abcdef2-dirty (2026-01-02): 2.00"));
    }

    #[test]
    fn what_has_no_goal_or_no_value_has_no_panel() {
        let runs = runs(rows(1, 300_000.0), &machine());
        assert_eq!(drawn(&runs, COMPARISON).matches("<circle").count(), 1);
        let goalless = Comparison {
            goal: None,
            ..COMPARISON
        };
        assert_eq!(drawn(&runs, goalless).matches("<g ").count(), 0);
        assert_eq!(drawn(&[], COMPARISON).matches("<g ").count(), 0);
    }
}
