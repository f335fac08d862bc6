//! What a check ends in.

use serde::Serialize;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was seen.
    pub detail: String,
    /// What to do, if it is not fine.
    pub advice: Option<String>,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// It could not be looked at.
    Unknown,
    /// It works, but not as one might expect.
    Warning,
    /// It does not work.
    Wrong,
}

impl Finding {
    pub(super) fn new(check: &str, verdict: Verdict, detail: impl ToString) -> Self {
        Self {
            check: check.to_owned(),
            verdict,
            detail: detail.to_string(),
            advice: None,
        }
    }

    pub(super) fn fine(check: &str, detail: impl ToString) -> Self {
        Self::new(check, Verdict::Fine, detail)
    }

    pub(super) fn wrong(check: &str, detail: impl ToString) -> Self {
        Self::new(check, Verdict::Wrong, detail)
    }

    pub(super) fn advise(mut self, advice: impl ToString) -> Self {
        self.advice = Some(advice.to_string());
        self
    }
}
