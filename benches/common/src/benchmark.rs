//! What is measured and compared.

use super::samples::Comparison;

/// What is measured and compared.
pub struct Benchmark<P> {
    /// Of its files.
    pub name: &'static str,
    /// Of its chart.
    pub title: &'static str,
    /// Cargo's directory for files of benchmarks, `target/tmp`. The report goes beside it.
    pub temporary: &'static str,
    /// What is measured in each round.
    pub paths: Vec<P>,
    /// What the report compares.
    pub comparisons: Vec<Comparison<P>>,
    /// Whether its runs are kept in the history.
    pub has_history: bool,
}
