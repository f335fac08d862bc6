//! How measurements are summed up, and what they must be.

use std::collections::BTreeMap;

use serde::Serialize;

use super::figures::Figure;
use super::path::Path;

/// All rounds' values of one figure.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    values: Vec<f64>,
}

impl Summary {
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted[sorted.len() / 2];
        let lower = sorted[(sorted.len() - 1) / 2];
        Some(Self {
            median: f64::midpoint(lower, upper),
            min,
            max,
            values: values.to_vec(),
        })
    }

    /// How many rounds have a value.
    pub(crate) fn count(&self) -> usize {
        self.values.len()
    }
}

/// All values of a run, and what went wrong.
#[derive(Debug)]
pub struct Samples<P> {
    values: BTreeMap<(P, Figure), Vec<f64>>,
    failures: Vec<String>,
}

impl<P> Default for Samples<P> {
    fn default() -> Self {
        Self {
            values: BTreeMap::new(),
            failures: Vec::new(),
        }
    }
}

impl<P: Path> Samples<P> {
    /// Keeps a value, and says it.
    pub fn add(&mut self, path: P, figure: Figure, value: f64) {
        let (title, unit) = figure.title();
        eprint!(" {title} {} {unit};", figure.show(value));
        self.values.entry((path, figure)).or_default().push(value);
    }

    /// Keeps what went wrong, and says it.
    pub fn fail(&mut self, path: P, why: &str) {
        eprint!(" FAILED, {why};");
        self.failures.push(format!("{path}: {why}"));
    }

    /// Keeps all that another has.
    pub(crate) fn append(&mut self, other: Self) {
        for (of, values) in other.values {
            self.values.entry(of).or_default().extend(values);
        }
        self.failures.extend(other.failures);
    }

    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    pub fn summary(&self, path: P, figure: Figure) -> Option<Summary> {
        Summary::of(self.values.get(&(path, figure))?)
    }

    pub fn has(&self, path: P) -> bool {
        self.values.keys().any(|(of, _)| *of == path)
    }
}

/// A figure that is compared with another, or with a number.
#[derive(Debug, Clone, Copy)]
pub struct Comparison<P> {
    pub figure: Figure,
    pub ours: P,
    /// Without it the figure counts as it is.
    pub theirs: Option<P>,
    /// What it must be, and what it is to become.
    pub goal: Option<(f64, f64)>,
}

impl<P: Path> Comparison<P> {
    /// The ratio of medians, if all was measured.
    pub fn value(&self, samples: &Samples<P>) -> Option<f64> {
        let ours = samples.summary(self.ours, self.figure)?.median;
        match self.theirs {
            Some(theirs) => Some(ours / samples.summary(theirs, self.figure)?.median),
            None => Some(ours),
        }
    }

    /// Whether a value is what it must be.
    pub fn is_met(&self, value: f64) -> Option<bool> {
        let (must, _) = self.goal?;
        Some(if self.figure.is_cost() {
            value <= must
        } else {
            value >= must
        })
    }
}
