//! What happened to the node: each event is logged and remembered by one call, for `muslin events`.
//!
//! Nothing that others do makes it grow, nor pushes out what happened before: what happens to one
//! subject again and again is one event, and the room of a full journal is shared fairly between kinds.
//! Readers ask for what they do not know yet, so that a slow one holds up nobody.

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::sync::Arc;
use std::time::SystemTime;

use muslin_stack::api::events::{Event, EventKind};
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::lines::Lines;

/// Events that are remembered.
const CAPACITY: usize = 1000;
/// Events of one kind and subject in so many milliseconds; further ones are counted.
const AT_ONCE: usize = 3;
const WHILE_MS: u64 = 60_000;
/// The longest subject and sentence in characters: a store may answer at length.
const MAX_SUBJECT: usize = 100;
const MAX_TEXT: usize = 300;
/// Events in one answer, which fit a message.
const AT_MOST: usize = 25;

/// The events of a node, for all of its parts.
#[derive(Debug, Clone)]
pub struct Journal(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    ring: Mutex<Ring>,
    /// The number of the newest event.
    newest: watch::Sender<u64>,
}

impl Default for Journal {
    fn default() -> Self {
        Self(Arc::new(Shared {
            ring: Mutex::default(),
            newest: watch::Sender::new(0),
        }))
    }
}

impl Journal {
    /// Logs that something happened, and remembers it.
    pub(crate) fn note(&self, kind: EventKind, subject: impl Display, text: impl Display) {
        let text = text.to_string();
        log(kind, &text);
        self.remember(kind, subject, &text);
    }

    /// The same for what can happen by the thousand: log lines of it are few.
    pub(crate) fn note_some(
        &self,
        (lines, what): (&mut Lines, &str),
        kind: EventKind,
        subject: impl Display,
        text: impl Display,
    ) {
        let text = text.to_string();
        lines.log(what, || log(kind, &text));
        self.remember(kind, subject, &text);
    }

    fn remember(&self, kind: EventKind, subject: impl Display, text: &str) {
        let mut ring = self.0.ring.lock();
        ring.add(
            now_ms(),
            kind,
            &short(subject, MAX_SUBJECT),
            &short(text, MAX_TEXT),
        );
        let newest = ring.newest;
        drop(ring);
        self.0.newest.send_if_modified(|it| {
            let is_newer = newest > *it;
            *it = newest.max(*it);
            is_newer
        });
    }

    /// All that is remembered, the newest last.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.0.ring.lock().events.iter().cloned().collect()
    }

    /// Goes on with the events of the process before this one.
    pub(crate) fn inherit(&self, events: Vec<Event>) {
        self.0.ring.lock().inherit(events);
    }

    /// The first events of higher numbers, as soon as there are some.
    pub(crate) async fn after(&self, number: u64) -> Vec<Event> {
        let mut newest = self.0.newest.subscribe();
        // Who knows more than there is has known another process.
        let number = if number > *newest.borrow() { 0 } else { number };
        // The sender lives as long as this.
        let _ = newest.wait_for(|newest| *newest > number).await;
        self.0.ring.lock().after(number)
    }
}

fn log(kind: EventKind, text: &str) {
    match kind.is_trouble() {
        true => warn!("{text}"),
        false => info!("{text}"),
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// At most so many characters of a text, without control characters.
fn short(text: impl Display, most: usize) -> String {
    let text = text.to_string();
    text.replace(char::is_control, " ")
        .chars()
        .take(most)
        .collect()
}

/// The newest events, in the order of their numbers.
#[derive(Debug, Default)]
struct Ring {
    newest: u64,
    events: VecDeque<Event>,
}

impl Ring {
    fn add(&mut self, now_ms: u64, kind: EventKind, subject: &str, text: &str) {
        let is_recent = |event: &&mut Event| event.time_ms.abs_diff(now_ms) < WHILE_MS;
        let is_same = |event: &Event| event.kind == kind.name() && event.subject == subject;
        let recent = self.events.iter_mut().rev().take_while(is_recent);
        let mut same = recent.filter(|event| is_same(event));
        let last = same.next();
        if let Some(last) = last.filter(|_| same.count() + 1 >= AT_ONCE) {
            last.times += 1;
            last.last_ms = Some(now_ms);
            text.clone_into(&mut last.text);
            return;
        }
        self.newest += 1;
        let event = Event::new(
            self.newest,
            now_ms,
            kind,
            subject.to_owned(),
            text.to_owned(),
        );
        self.events.push_back(event);
        if self.events.len() > CAPACITY {
            self.forget_one();
        }
    }

    /// Forgets the oldest event of the kind of which there are most, so that what happens often does not
    /// push out what happens once.
    fn forget_one(&mut self) {
        let mut counts = HashMap::<_, usize>::new();
        for event in &self.events {
            *counts.entry(event.kind.as_str()).or_default() += 1;
        }
        let most = counts.values().copied().max();
        let is_of_most = |event: &Event| counts.get(event.kind.as_str()).copied() == most;
        if let Some(oldest) = self.events.iter().position(is_of_most) {
            self.events.remove(oldest);
        }
    }

    fn after(&self, number: u64) -> Vec<Event> {
        let first = self
            .events
            .partition_point(|event| event.sequence <= number);
        let events = self.events.iter().skip(first).take(AT_MOST);
        events.cloned().collect()
    }

    /// Puts events of higher and higher numbers in front of those there are, which count on from there.
    fn inherit(&mut self, events: Vec<Event>) {
        let last = events.last().map_or(0, |event| event.sequence);
        let own = std::mem::take(&mut self.events);
        self.events = events.into();
        self.newest += last;
        self.events.extend(own.into_iter().map(|mut event| {
            event.sequence += last;
            event
        }));
        while self.events.len() > CAPACITY {
            self.forget_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.sequence).collect()
    }

    #[test]
    fn a_flapping_subject_is_few_events_with_a_number() {
        let mut ring = Ring::default();
        for second in 0..50 {
            ring.add(second * 1000, EventKind::PodAttached, "web", "attached");
            ring.add(second * 1000, EventKind::PodDetached, "web", "detached");
        }
        ring.add(50_000, EventKind::PodAttached, "db", "attached");
        let times: Vec<_> = ring.events.iter().map(|event| event.times).collect();
        assert_eq!(times, [1, 1, 1, 1, 48, 48, 1]);
        assert_eq!(ring.events[4].last_ms, Some(49_000));
        ring.add(WHILE_MS + 3000, EventKind::PodAttached, "web", "attached");
        assert_eq!(ring.events.len(), 8, "after a while it is told again");
    }

    #[test]
    fn many_events_of_a_kind_do_not_push_out_those_of_others() {
        let mut ring = Ring::default();
        ring.add(0, EventKind::StoreAway, "etcd", "away");
        for pod in 0..5000 {
            ring.add(pod, EventKind::PodAttached, &pod.to_string(), "attached");
        }
        ring.add(5000, EventKind::StoreBack, "etcd", "back");
        assert_eq!(ring.events.len(), CAPACITY);
        assert_eq!(ring.events[0].kind, "store-away");
        let last = ring.events.back().unwrap();
        assert_eq!((last.kind.as_str(), last.sequence), ("store-back", 5002));
        let mut subjects = ring.events.iter().map(|event| event.subject.as_str());
        assert_eq!(subjects.nth(1).unwrap(), "4002", "the newest stay");
    }

    #[test]
    fn a_clock_that_is_set_back_hides_nothing_for_long() {
        let mut ring = Ring::default();
        for _ in 0..5 {
            ring.add(1_000_000_000, EventKind::StoreAway, "etcd", "away");
        }
        ring.add(1000, EventKind::StoreAway, "etcd", "away");
        assert_eq!(ring.events.len(), AT_ONCE + 1);
    }

    #[tokio::test]
    async fn a_reader_gets_what_it_does_not_know_and_sees_what_it_has_missed() {
        let journal = Journal::default();
        for pod in 0..CAPACITY + 10 {
            journal.note(EventKind::PodAttached, pod, "attached");
        }
        let first = journal.after(0).await;
        assert_eq!(
            numbers(&first),
            (11..11 + AT_MOST as u64).collect::<Vec<_>>()
        );
        let all = journal.events();
        assert_eq!((all.len(), all[CAPACITY - 1].sequence), (CAPACITY, 1010));
        let waits = journal.after(1010);
        journal.note(EventKind::PodDetached, 7, "x".repeat(10_000));
        let next = waits.await;
        assert_eq!((numbers(&next), next[0].text.len()), (vec![1011], MAX_TEXT));
        // Another process counts from the beginning.
        let anew = journal.after(5000).await;
        assert_eq!(anew[0].sequence, 12);
    }

    #[tokio::test]
    async fn a_message_has_room_for_the_longest_events() {
        let journal = Journal::default();
        for pod in 0..2 * AT_MOST {
            let long = "\u{1f9f5}".repeat(1000);
            journal.note(EventKind::PodAttached, format!("{pod}{long}"), &long);
        }
        let text = serde_json::to_string(&journal.after(0).await).unwrap();
        assert!(text.len() < crate::control::MAX_MESSAGE - 1000);
    }

    #[test]
    fn numbers_go_on_in_the_next_process() {
        let (old, new) = (Journal::default(), Journal::default());
        old.note(EventKind::StoreAway, "etcd", "away");
        old.note(EventKind::StoreBack, "etcd", "back");
        new.note(EventKind::StoreAway, "etcd", "away");
        new.inherit(old.events());
        new.note(EventKind::TakenOver, "n", "taken over");
        let all = new.events();
        assert_eq!(numbers(&all), [1, 2, 3, 4]);
        assert_eq!(all[1].kind, "store-back");
    }
}
