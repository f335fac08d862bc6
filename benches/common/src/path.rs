//! What is between the two ends of a measurement.

use std::fmt::Display;

use serde_json::{Map, Value};

/// A path by which one end reaches the other, as it is shown.
pub trait Path: Copy + Ord + Display {
    /// Paths that may be compared stand together.
    fn group(self) -> usize;
    /// Of its bars.
    fn colour(self) -> &'static str;
    /// What it is called in JSON.
    fn labels(self) -> Map<String, Value>;
    /// Whether it carries traffic and so has a column.
    fn is_path(self) -> bool {
        true
    }
}
