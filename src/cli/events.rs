//! `muslin events`: what happened on a node.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use clap::builder::PossibleValue;
use humantime::format_rfc3339_seconds;
use muslin_stack::api::control::{Code, Table};
use muslin_stack::api::events::{Event, EventKind};
use tokio::time::sleep;

use super::report;
use super::watch::View;
use crate::control::Client;
use crate::error::{Context, Error, Result};
use crate::process::block_on;
use crate::terminal::output::try_print;
use crate::terminal::quantity::count;
use crate::terminal::{remark, text};

/// How often it is looked whether a node is there again.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub(super) struct EventArguments {
    #[command(flatten)]
    common: report::Arguments,
    /// Go on with what happens from now on, one line each; with --json one object a line
    #[arg(short, long, conflicts_with = "watch")]
    follow: bool,
    #[command(flatten)]
    filter: Filter,
}

/// Which events are meant.
#[derive(Debug, Args)]
struct Filter {
    /// Only events of this kind; can be repeated
    #[arg(long, value_name = "KIND", value_parser = kinds())]
    kind: Vec<String>,
    /// Only what happened in the last TIME, as in 90s, 10m, 2h or 1d
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    since: Option<Duration>,
}

/// The names of kinds, for the parser.
fn kinds() -> Vec<PossibleValue> {
    let kinds = EventKind::ALL.iter();
    kinds
        .map(|kind| PossibleValue::new(kind.name()).help(kind.describe()))
        .collect()
}

impl Filter {
    /// Whether an event is meant, if nothing before a moment is.
    fn has(&self, event: &Event, from_ms: u64) -> bool {
        let is_kind = self.kind.is_empty() || self.kind.contains(&event.kind);
        is_kind && event.latest_ms() >= from_ms
    }

    /// The moment before which nothing is meant, in milliseconds of Unix time.
    fn earliest_ms(&self) -> u64 {
        let from = self
            .since
            .and_then(|ago| SystemTime::now().checked_sub(ago));
        let from = from.and_then(|from| from.duration_since(UNIX_EPOCH).ok());
        from.map_or(0, |from| from.as_millis() as u64)
    }

    /// Why there may be no such events.
    fn why_none(&self) -> &'static str {
        match (self.kind.is_empty(), self.since) {
            (true, None) => "no events: nothing has happened since the node's start",
            (true, Some(_)) => "no events: nothing has happened in that time",
            (false, _) => "no events: nothing of that kind is remembered",
        }
    }
}

pub(super) fn run(arguments: &EventArguments) -> Result<()> {
    let (common, filter) = (&arguments.common, &arguments.filter);
    if arguments.follow {
        let socket = common.node.socket()?;
        let follower = Follower {
            known: None,
            is_json: common.json,
            filter,
            from_ms: filter.earliest_ms(),
        };
        return block_on(follower.follow(&socket));
    }
    let header = ["TIME", "KIND", "SUBJECT", "WHAT HAPPENED"];
    common.show(async || {
        let mut rows = common.fetch::<Event>(Table::Events).await?;
        let from_ms = filter.earliest_ms();
        rows.retain(|event| filter.has(event, from_ms));
        View::table(&rows, &header, filter.why_none(), |event| {
            cells(event).into()
        })
    })
}

fn cells(event: &Event) -> [String; 4] {
    let text = match event.last_ms {
        Some(last) => format!(
            "{} ({} times until {})",
            event.text,
            event.times,
            time(last)
        ),
        None => event.text.clone(),
    };
    [
        time(event.time_ms),
        event.kind.clone(),
        event.subject.clone(),
        text,
    ]
}

/// A moment, in the seconds of UTC, as in the log.
fn time(ms: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(ms));
    // Beyond it there is no year of four digits.
    let time = time.filter(|time| *time < UNIX_EPOCH + Duration::from_secs(253_402_300_800));
    time.map_or_else(String::new, |it| format_rfc3339_seconds(it).to_string())
}

/// An event as a line under those before.
fn line(event: &Event) -> String {
    let [time, kind, subject, what] = cells(event).map(|cell| text::plain(&cell).into_owned());
    let width = EventKind::ALL.iter().map(|kind| kind.name().len()).max();
    let width = width.unwrap_or_default();
    format!("{time}  {kind:width$}  {subject:18}  {what}\n")
}

/// Somebody who reads events as they happen.
struct Follower<'a> {
    /// The number and the time of the last event.
    known: Option<(u64, u64)>,
    is_json: bool,
    filter: &'a Filter,
    from_ms: u64,
}

/// Whether there is more to be read.
type IsRead = bool;

impl Follower<'_> {
    /// Prints events until nobody reads them, beyond the end of a node.
    async fn follow(mut self, socket: &Path) -> Result<()> {
        let mut is_told = false;
        loop {
            let before = self.known;
            match self.read(socket).await {
                Ok(()) => return Ok(()),
                // A node that has never answered, and one that does not know what this is.
                Err(error) if self.known.is_none() => return Err(error),
                Err(
                    error @ Error::Refused {
                        code: Code::Usage, ..
                    },
                ) => return Err(error),
                Err(error) => {
                    is_told &= self.known == before;
                    if !std::mem::replace(&mut is_told, true) {
                        remark(&format!("{error}: waiting for a node"));
                    }
                    sleep(LOOK_AGAIN).await;
                }
            }
        }
    }

    /// Prints events until nobody reads them, or the node is gone.
    async fn read(&mut self, socket: &Path) -> Result<()> {
        let client = Client::connect(socket).await?;
        let all = client.report::<Event>(Table::Events).await?;
        let is_known = |event: &Event| Some((event.sequence, event.time_ms)) == self.known;
        // If the last is not there, it is another process, which counts anew.
        let first = all.iter().position(is_known).map_or(0, |at| at + 1);
        self.known = self.known.or(Some((0, 0)));
        if !self.print(&all[first..])? {
            return Ok(());
        }
        let last = all.last().map_or(0, |event| event.sequence);
        let mut after = last;
        loop {
            let events = client.await_events(after).await?;
            let Some(newest) = events.last() else {
                continue;
            };
            let missed = missed(after, &events);
            if missed > 0 {
                let what = count(missed, "event");
                remark(&format!(
                    "{what} came faster than they were read, and are lost"
                ));
            }
            after = newest.sequence;
            if !self.print(&events)? {
                return Ok(());
            }
        }
    }

    fn print(&mut self, events: &[Event]) -> Result<IsRead> {
        let mut lines = String::new();
        for event in events {
            self.known = Some((event.sequence, event.time_ms));
            if !self.filter.has(event, self.from_ms) {
                continue;
            }
            if self.is_json {
                lines += &serde_json::to_string(event).context("cannot write JSON")?;
                lines.push('\n');
            } else {
                lines += &line(event);
            }
        }
        Ok(lines.is_empty() || try_print(&lines)?)
    }
}

/// How many events are missing among those that follow the one with this number.
fn missed(after: u64, events: &[Event]) -> u64 {
    let last = events.last().map_or(after, |event| event.sequence);
    last.saturating_sub(after)
        .saturating_sub(events.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(sequence: u64, time_ms: u64, kind: EventKind) -> Event {
        Event::new(sequence, time_ms, kind, "web".into(), "attached".into())
    }

    #[test]
    fn gaps_between_numbers_are_events_that_are_missed() {
        let events = |numbers: &[u64]| {
            let all = numbers
                .iter()
                .map(|it| event(*it, 0, EventKind::PodAttached));
            all.collect::<Vec<_>>()
        };
        assert_eq!(missed(3, &events(&[4, 5, 6])), 0);
        assert_eq!(missed(3, &events(&[7, 9])), 4);
        assert_eq!(missed(900, &events(&[1, 2])), 0, "another process");
        assert_eq!(missed(3, &[]), 0);
    }

    #[test]
    fn filters_are_by_kind_and_time() {
        let mut filter = Filter {
            kind: vec!["pod-attached".to_owned()],
            since: None,
        };
        let mut attached = event(1, 5000, EventKind::PodAttached);
        assert!(filter.has(&attached, 5000));
        assert!(!filter.has(&attached, 5001));
        attached.last_ms = Some(9000);
        assert!(filter.has(&attached, 5001), "it happened again");
        let lost = event(2, 5000, EventKind::PeerLost);
        assert!(!filter.has(&lost, 0));
        filter.kind.clear();
        assert!(filter.has(&lost, 0));
    }

    #[test]
    fn lines_are_aligned_and_say_how_often() {
        let mut attached = event(1, 1_700_000_000_000, EventKind::PodAttached);
        let first = line(&attached);
        let expected = "2023-11-14T22:13:20Z  pod-attached         web                 attached\n";
        assert_eq!(first, expected);
        (attached.times, attached.last_ms) = (7, Some(1_700_000_009_000));
        let again = line(&attached);
        assert!(again.ends_with("attached (7 times until 2023-11-14T22:13:29Z)\n"));
        assert_eq!(time(u64::MAX), "");
    }
}
