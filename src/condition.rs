//! How a node does: whether it serves its pods, and what it waits for.

use std::collections::BTreeMap;

use tokio::sync::watch;

use crate::notify;

/// The longest text for people in characters: a store may answer at length.
const MAX_TEXT: usize = 300;

/// What a node can be without for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// The underlay's interface.
    Interface,
    /// The store of leases.
    Store,
    /// The network's configuration.
    Config,
    /// Threads that pass packets.
    DataPath,
}

/// How a node does at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// Whether it serves its pods, and all tools find what they look for.
    pub is_ready: bool,
    /// What it is, once it serves its pods.
    summary: Option<String>,
    lacks: BTreeMap<Need, String>,
}

impl State {
    /// Whether it passes packets, as far as it has begun to.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.lacks(Need::DataPath)
    }

    /// Whether it is without something.
    #[must_use]
    pub fn lacks(&self, need: Need) -> bool {
        self.lacks.contains_key(&need)
    }

    /// What it waits for, or what does not work although it is ready, in one line.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let all: Vec<_> = self.lacks.values().map(String::as_str).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// For people.
    fn describe(&self) -> String {
        let trouble = self.trouble();
        match (&self.summary, trouble) {
            (None, None) => "waiting for a lease".to_owned(),
            (None, Some(trouble)) => format!("waiting: {trouble}"),
            (Some(summary), None) => summary.clone(),
            (Some(summary), Some(trouble)) => format!("{summary}, but {trouble}"),
        }
    }
}

/// A node's condition, for clients and for the service manager, which is notified of every change.
#[derive(Debug, Clone)]
pub struct Condition(watch::Sender<State>);

impl Condition {
    /// That of a node that has begun.
    #[must_use]
    pub fn new() -> Self {
        let state = State::default();
        notify::status(&state.describe());
        Self(watch::Sender::new(state))
    }

    /// Where to see it.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.0.subscribe()
    }

    /// The node is without something: why, in one line. Whether that is news.
    pub fn lack(&self, need: Need, reason: &str) -> bool {
        let text: String = reason.chars().take(MAX_TEXT).collect();
        let text = text.replace(char::is_control, " ");
        self.change(|state| state.lacks.insert(need, text.clone()) != Some(text))
    }

    /// The node has it again, or for the first time.
    pub fn have(&self, need: Need) {
        self.change(|state| state.lacks.remove(&need).is_some());
    }

    /// The node serves its pods. It is ready if all tools find what they look for, too.
    pub(super) fn serve(&self, summary: String, is_ready: bool) {
        self.0.send_modify(|state| {
            state.is_ready = is_ready;
            state.summary = Some(summary);
        });
        notify::ready(&self.0.borrow().describe());
    }

    /// The node is about to end.
    pub(super) fn end(&self) {
        self.0.send_modify(|state| state.is_ready = false);
    }

    fn change(&self, change: impl FnOnce(&mut State) -> bool) -> bool {
        let is_news = self.0.send_if_modified(change);
        if is_news {
            notify::status(&self.0.borrow().describe());
        }
        is_news
    }
}

impl Default for Condition {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_is_news_once_and_told_as_a_whole() {
        let condition = Condition::new();
        let seen = condition.subscribe();
        let told = || seen.borrow().describe();
        assert_eq!(told(), "waiting for a lease");
        assert!(condition.lack(Need::Store, "the store is unreachable"));
        assert!(!condition.lack(Need::Store, "the store is unreachable"));
        assert!(condition.lack(Need::Interface, "there is no\neth9"));
        assert_eq!(
            told(),
            "waiting: there is no eth9; the store is unreachable"
        );
        condition.have(Need::Interface);
        condition.have(Need::Config);
        assert_eq!(told(), "waiting: the store is unreachable");
        assert!(!seen.borrow().is_ready);
        condition.serve("node n".to_owned(), true);
        assert_eq!(told(), "node n, but the store is unreachable");
        assert!(seen.borrow().is_ready, "its pods are served nevertheless");
        condition.have(Need::Store);
        assert_eq!(told(), "node n");
        assert!(condition.lack(Need::Store, &"x".repeat(10_000)));
        assert!(told().len() < 400);
    }
}
