//! The tables, and the files.

use std::path::Path as FilePath;

use comfy_table::{Table, presets};
use serde_json::{Map, Value, json};

use super::benchmark::Benchmark;
use super::chart;
use super::figures::Figure;
use super::history::{self, Row, Stamp};
use super::machine::Machine;
use super::path::Path;
use super::rounds::PhaseCount;
use super::samples::{Samples, Summary};
use super::trend;

/// A whole run.
pub(crate) struct Report<P> {
    pub(crate) benchmark: Benchmark<P>,
    pub(crate) machine: Machine,
    pub(crate) rounds: usize,
    /// Per measurement.
    pub(crate) seconds: f64,
    /// The share of the processors that others took before each round.
    pub(crate) others: Vec<f64>,
    pub(crate) phases: PhaseCount,
    pub(crate) samples: Samples<P>,
}

impl<P: Path> Report<P> {
    pub(crate) fn print(&self) {
        println!(
            "\nMedians of {} rounds of {} s (least and most):\n{}",
            self.rounds,
            self.seconds,
            self.figures()
        );
        println!("\nRatios of medians:\n{}", self.comparisons());
        let others = self.others.iter().copied().fold(0.0, f64::max) * 100.0;
        println!("\nOthers used up to {others:.0} % of the processors before a round.");
        let PhaseCount {
            measurements,
            repeated,
            slow,
            ..
        } = &self.phases;
        println!(
            "Of {measurements} measurements of a path, {repeated} were repeated since the machine was \
             slow, and {slow} are of a slow machine nevertheless."
        );
        for failure in self.samples.failures() {
            println!("FAILED: {failure}");
        }
    }

    /// All that was measured.
    fn measured(&self) -> impl Iterator<Item = P> {
        let all = self.benchmark.paths.iter().copied();
        all.filter(|path| self.samples.has(*path))
    }

    /// The paths among them.
    fn paths(&self) -> Vec<P> {
        self.measured().filter(|path| path.is_path()).collect()
    }

    /// A row per figure, a column per path.
    fn figures(&self) -> Table {
        let paths = self.paths();
        let mut table = plain_table();
        let titles = paths
            .iter()
            .map(|case| case.to_string().replace(", ", "\n"));
        table.set_header(std::iter::once(String::new()).chain(titles));
        for figure in Figure::ALL {
            let cells: Vec<_> = paths
                .iter()
                .map(|case| self.samples.summary(*case, figure))
                .collect();
            if cells.iter().any(Option::is_some) {
                let (title, unit) = figure.title();
                let cells = cells.iter().map(|summary| cell(figure, summary.as_ref()));
                table.add_row(std::iter::once(format!("{title}\n{unit}")).chain(cells));
            }
        }
        table
    }

    fn comparisons(&self) -> Table {
        let mut table = plain_table();
        table.set_header(["figure", "of", "to", "is", "must", "aim", ""]);
        for row in &self.benchmark.comparisons {
            let Some(value) = row.value(&self.samples) else {
                continue;
            };
            let goal = |pick: fn((f64, f64)) -> f64| row.goal.map(pick).map(|it| format!("{it}"));
            let (title, unit) = row.figure.title();
            let shown = match row.theirs {
                Some(_) => format!("{value:.2}"),
                None => format!("{} {unit}", row.figure.show(value)),
            };
            let bound = if row.figure.is_cost() { "<= " } else { ">= " };
            table.add_row([
                title.to_owned(),
                row.ours.to_string(),
                row.theirs.map_or_else(String::new, |case| case.to_string()),
                shown,
                goal(|(must, _)| must).map_or_else(String::new, |it| format!("{bound}{it}")),
                goal(|(_, aim)| aim).unwrap_or_default(),
                match row.is_met(value) {
                    Some(true) => "ok".to_owned(),
                    Some(false) => "MISSING".to_owned(),
                    None => String::new(),
                },
            ]);
        }
        table
    }

    /// Writes the run as JSON and as a chart.
    pub(crate) fn write(&self, target: &FilePath) {
        let name = self.benchmark.name;
        let directory = target.join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let (data, picture) = (
            directory.join(format!("{name}.json")),
            directory.join(format!("{name}.svg")),
        );
        let text = serde_json::to_string_pretty(&self.json()).unwrap();
        std::fs::write(&data, text + "\n").unwrap();
        let title = format!(
            "{}: medians of {} rounds of {} s, whiskers from least to most",
            self.benchmark.title, self.rounds, self.seconds
        );
        let svg = chart::draw(
            &title,
            &self.machine.to_string(),
            &self.paths(),
            &self.samples,
        );
        std::fs::write(&picture, svg).unwrap();
        println!("\nWritten: {}, {}", data.display(), picture.display());
    }

    /// Adds the run to the history in a directory, and draws what that says by now.
    pub(crate) fn remember(&self, directory: &FilePath, stamp: &Stamp, target: &FilePath) {
        let name = self.benchmark.name;
        let file = directory.join(name).with_extension("csv");
        history::append(&file, &self.rows(stamp)).unwrap();
        let runs = history::runs(history::read(&file).unwrap(), &self.machine);
        let picture = target.join(name).join("history.svg");
        let title = format!("{}: ratios of medians, run by run", self.benchmark.title);
        let Machine {
            cores, processor, ..
        } = &self.machine;
        let machine = format!("{cores} cores ({processor})");
        let svg = trend::draw(&title, &machine, &self.benchmark.comparisons, &runs);
        std::fs::write(&picture, svg).unwrap();
        println!("Added to {}; drawn: {}", file.display(), picture.display());
    }

    fn rows(&self, stamp: &Stamp) -> Vec<Row> {
        let of = |path| {
            Figure::ALL.into_iter().filter_map(move |figure| {
                let summary = self.samples.summary(path, figure)?;
                Some(Row::new(stamp, &self.machine, (path, figure), &summary))
            })
        };
        self.measured().flat_map(of).collect()
    }

    fn json(&self) -> Value {
        let measured: Vec<_> = self.measured().map(|case| self.case(case)).collect();
        let comparisons: Vec<_> = self
            .benchmark
            .comparisons
            .iter()
            .filter_map(|row| {
                let value = row.value(&self.samples)?;
                Some(json!({
                    "figure": row.figure.key(),
                    "ours": row.ours.to_string(),
                    "theirs": row.theirs.map(|case| case.to_string()),
                    "value": value,
                    "must": row.goal.map(|(must, _)| must),
                    "aim": row.goal.map(|(_, aim)| aim),
                    "met": row.is_met(value),
                }))
            })
            .collect();
        json!({
            "machine": self.machine,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "others_busy": self.others,
            "phases": self.phases,
            "measured": measured,
            "comparisons": comparisons,
            "failures": self.samples.failures(),
        })
    }

    fn case(&self, path: P) -> Value {
        let figures = Figure::ALL.into_iter().filter_map(|figure| {
            let summary = self.samples.summary(path, figure)?;
            Some((figure.key().to_owned(), json!(summary)))
        });
        let mut case = path.labels();
        let figures = figures.collect::<Map<_, _>>();
        case.insert("figures".to_owned(), figures.into());
        case.into()
    }
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table
}

fn cell(figure: Figure, summary: Option<&Summary>) -> String {
    let Some(Summary {
        median, min, max, ..
    }) = summary
    else {
        return String::new();
    };
    let [median, min, max] = [median, min, max].map(|value| figure.show(*value));
    format!("{median}\n{min}-{max}")
}
