//! What runs have measured so far: a file of comma-separated values (RFC 4180) that grows by a row per
//! figure, and what a version's ratios were.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::path::Path as FilePath;
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::figures::Figure;
use super::machine::Machine;
use super::path::Path;
use super::samples::{Comparison, Summary};

/// Files of the history do not count when a version is compared with its commit.
const NOT_HISTORY: &str = ":(exclude)benches/history";
const UNKNOWN: &str = "unknown";

/// When a run began, and of which version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// In UTC, by ISO 8601.
    pub(crate) date: String,
    /// As `git` abbreviates it, with `-dirty` where files differ from it.
    pub(crate) commit: String,
}

impl Stamp {
    pub(crate) fn now() -> Self {
        let date = said("date", &["-u", "+%FT%TZ"]);
        let commit = said("git", &["rev-parse", "--short", "HEAD"]);
        let status = ["status", "--porcelain", "--untracked-files=no", "--"];
        let differs = said("git", &[&status[..], &[".", NOT_HISTORY]].concat());
        let mark = differs.map_or("", |files| if files.is_empty() { "" } else { "-dirty" });
        Self {
            date: date.unwrap_or_else(|| UNKNOWN.to_owned()),
            commit: commit.unwrap_or_else(|| UNKNOWN.to_owned()) + mark,
        }
    }
}

/// What a command prints, if it succeeds.
fn said(program: &str, words: &[&str]) -> Option<String> {
    let output = Command::new(program).args(words).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

/// One figure of a path in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    date: String,
    commit: String,
    processor: String,
    cores: usize,
    kernel: String,
    path: String,
    load: String,
    figure: String,
    unit: String,
    median: f64,
    least: f64,
    most: f64,
    rounds: usize,
}

impl Row {
    pub(crate) fn new<P: Path>(
        stamp: &Stamp,
        machine: &Machine,
        (path, figure): (P, Figure),
        summary: &Summary,
    ) -> Self {
        let (title, unit) = figure.title();
        let value = |value| to_four_digits(figure.scale(value));
        Self {
            date: stamp.date.clone(),
            commit: stamp.commit.clone(),
            processor: machine.processor.clone(),
            cores: machine.cores,
            kernel: machine.kernel.clone(),
            path: path.to_string(),
            load: figure.load().to_owned(),
            figure: title.to_owned(),
            unit: unit.to_owned(),
            median: value(summary.median),
            least: value(summary.min),
            most: value(summary.max),
            rounds: summary.count(),
        }
    }
}

/// More than four digits no measurement is worth.
fn to_four_digits(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// Adds rows to a file, which is made if there is none.
pub(crate) fn append(file: &FilePath, rows: &[Row]) -> io::Result<()> {
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let file = OpenOptions::new().append(true).create(true).open(file)?;
    let is_new = file.metadata()?.len() == 0;
    let mut writer = csv::WriterBuilder::new()
        .has_headers(is_new)
        .from_writer(file);
    for row in rows {
        writer.serialize(row)?;
    }
    writer.flush()
}

/// All rows of a file.
pub(crate) fn read(file: &FilePath) -> io::Result<Vec<Row>> {
    let rows = csv::Reader::from_path(file)?.into_deserialize();
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The medians of a run.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) stamp: Stamp,
    /// By path and figure.
    medians: BTreeMap<(String, String), f64>,
}

impl Run {
    /// What a comparison says of the run.
    pub(crate) fn value<P: Path>(&self, comparison: &Comparison<P>) -> Option<f64> {
        let (title, _) = comparison.figure.title();
        let median = |path: P| self.medians.get(&(path.to_string(), title.to_owned()));
        let ours = median(comparison.ours)?;
        match comparison.theirs {
            Some(theirs) => Some(ours / median(theirs)?),
            None => Some(*ours),
        }
    }
}

/// The runs on a machine like this, in the order of their rows.
pub(crate) fn runs(rows: Vec<Row>, machine: &Machine) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let is_same = |row: &Row| row.processor == machine.processor && row.cores == machine.cores;
    for row in rows.into_iter().filter(is_same) {
        let stamp = Stamp {
            date: row.date,
            commit: row.commit,
        };
        if runs.last().is_none_or(|run| run.stamp != stamp) {
            runs.push(Run {
                stamp,
                medians: BTreeMap::new(),
            });
        }
        if let Some(run) = runs.last_mut() {
            run.medians.insert((row.path, row.figure), row.median);
        }
    }
    runs
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt;

    use serde_json::{Map, Value};

    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    pub(crate) enum Side {
        Ours,
        Theirs,
    }

    impl fmt::Display for Side {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{self:?}, veth")
        }
    }

    impl Path for Side {
        fn group(self) -> usize {
            0
        }

        fn colour(self) -> &'static str {
            "#000"
        }

        fn labels(self) -> Map<String, Value> {
            Map::new()
        }
    }

    pub(crate) const COMPARISON: Comparison<Side> = Comparison {
        figure: Figure::Udp64,
        ours: Side::Ours,
        theirs: Some(Side::Theirs),
        goal: Some((1.5, 2.0)),
    };

    pub(crate) fn machine() -> Machine {
        Machine {
            kernel: "6.18.0".to_owned(),
            processor: "A \"Fast\" CPU, 2.0 GHz".to_owned(),
            cores: 2,
            load: String::new(),
        }
    }

    /// A run's rows, with 200,000 datagrams a second of theirs.
    pub(crate) fn rows(day: u8, ours: f64) -> Vec<Row> {
        let stamp = Stamp {
            date: format!("2026-01-0{day}T00:00:00Z"),
            commit: format!("abcdef{day}-dirty"),
        };
        let row = |side, value| {
            let summary = Summary::of(&[value, value + 1.0]).unwrap();
            Row::new(&stamp, &machine(), (side, Figure::Udp64), &summary)
        };
        vec![row(Side::Ours, ours), row(Side::Theirs, 200_000.0)]
    }

    #[test]
    fn what_is_appended_is_read_with_one_header() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("new").join("it.csv");
        let [first, second] = [rows(1, 300_000.0), rows(2, 400_000.0)];
        append(&file, &first).unwrap();
        append(&file, &second).unwrap();
        assert_eq!(read(&file).unwrap(), [first, second].concat());
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[..2],
            [
                "date,commit,processor,cores,kernel,path,load,figure,unit,median,least,most,rounds",
                "2026-01-01T00:00:00Z,abcdef1-dirty,\"A \"\"Fast\"\" CPU, 2.0 GHz\",2,6.18.0,\
                 \"Ours, veth\",udp-64,UDP 64 B,k/s,300.0,300.0,300.0,2",
            ]
        );
        assert_eq!(lines.len(), 5);
    }

    #[test]
    fn a_run_has_the_ratio_of_its_own_medians() {
        let runs = runs(
            [rows(1, 300_000.0), rows(2, 500_000.0)].concat(),
            &machine(),
        );
        let values: Vec<_> = runs.iter().map(|run| run.value(&COMPARISON)).collect();
        assert_eq!(values, [Some(1.5), Some(2.5)]);
    }

    #[test]
    fn other_machines_and_missing_paths_have_no_ratio() {
        let mut rows = rows(1, 300_000.0);
        rows.pop();
        assert_eq!(runs(rows.clone(), &machine())[0].value(&COMPARISON), None);
        let other = Machine {
            cores: 4,
            ..machine()
        };
        assert!(runs(rows, &other).is_empty());
    }
}
