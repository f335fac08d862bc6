//! The time by which keys of a database end: it passes as the machine runs, whatever the date does.
//!
//! Machines' dates jump: a board without a battery begins in 1970, an administrator mends the time
//! zone, a virtual machine is resumed. Leases must neither end nor live on for that. So the database
//! notes which moment of its own time was how long after the machine's start, and all processes of
//! the machine count from there (`CLOCK_BOOTTIME`, which goes on while it is suspended). The date
//! tells only how long the machine was off: then no node ran that could lose its lease.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, Row, params};

/// A note this old is rewritten, so that the date in it is of the machine's last hours.
const FRESH: i64 = 60_000;

/// The clocks of the machine, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reading {
    /// Which start of the machine, and of which clock: containers can have their own.
    start: String,
    since_start: i64,
    /// Since 1970.
    date: i64,
}

impl Reading {
    pub(super) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let date = i64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(i64::MAX);
        let (start, since_start) = match (boot(), uptime()) {
            (Some(boot), Some(uptime)) => (boot, uptime),
            // If the kernel does not report it, the date must do.
            _ => (String::new(), date),
        };
        Self {
            start,
            since_start,
            date,
        }
    }
}

fn boot() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = fs::read_link("/proc/self/ns/time").unwrap_or_default();
    Some(format!("{} {}", boot.trim(), namespace.display()))
}

/// Milliseconds since the machine's start, with those in which it was suspended.
fn uptime() -> Option<i64> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    let (seconds, hundredths) = text.split_whitespace().next()?.split_once('.')?;
    let hundredths: i64 = hundredths.get(..2)?.parse().ok()?;
    let seconds: i64 = seconds.parse().ok()?;
    seconds.checked_mul(1000)?.checked_add(hundredths * 10)
}

/// A moment of the database's time, and what the machine's clocks were then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Note {
    time: i64,
    at: Reading,
}

impl Note {
    /// Where nothing is noted yet, time begins with the date, by which other versions go.
    pub(super) fn first(at: Reading) -> Self {
        Self { time: at.date, at }
    }

    /// The database's time.
    pub(super) fn time(&self, now: &Reading) -> i64 {
        let passed = match now.start == self.at.start {
            true => now.since_start.saturating_sub(self.at.since_start),
            false => now.date.saturating_sub(self.at.date),
        };
        self.time.saturating_add(passed.max(0))
    }

    /// The note to write in place of this one, if it is time for that.
    pub(super) fn renewed(&self, now: &Reading) -> Option<Self> {
        let time = self.time(now);
        let is_old = now.start != self.at.start || time >= self.time.saturating_add(FRESH);
        is_old.then(|| Self {
            time,
            at: now.clone(),
        })
    }

    /// What the database has noted.
    pub(super) fn read(connection: &Connection) -> rusqlite::Result<Option<Self>> {
        let read = |row: &Row<'_>| {
            let at = Reading {
                start: row.get(1)?,
                since_start: row.get(2)?,
                date: row.get(3)?,
            };
            Ok(Self {
                time: row.get(0)?,
                at,
            })
        };
        connection
            .prepare_cached("SELECT time, start, since_start, date FROM clock")?
            .query_row([], read)
            .optional()
    }

    pub(super) fn write(&self, connection: &Connection) -> rusqlite::Result<()> {
        let Reading {
            start,
            since_start,
            date,
        } = &self.at;
        connection
            .prepare_cached("INSERT OR REPLACE INTO clock VALUES (0, ?1, ?2, ?3, ?4)")?
            .execute(params![self.time, start, since_start, date])
            .map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400_000;

    fn reading(start: &str, since_start: i64, date: i64) -> Reading {
        Reading {
            start: start.to_owned(),
            since_start,
            date,
        }
    }

    #[test]
    fn time_passes_as_the_machine_runs_whatever_its_date_does() {
        let note = Note::first(reading("a", 1_000, 50 * DAY));
        assert_eq!(note.time(&note.at), 50 * DAY);
        for date in [50 * DAY, 52 * DAY, 0, -3650 * DAY, i64::MAX, i64::MIN] {
            let now = reading("a", 1_000 + 7, date);
            assert_eq!(note.time(&now), 50 * DAY + 7, "{date}");
            assert_eq!(note.renewed(&now), None);
            // A note that is written after the jump is as good.
            let later = reading("a", 1_000 + FRESH, date);
            let renewed = note.renewed(&later).unwrap();
            assert_eq!(renewed.time(&later), 50 * DAY + FRESH);
            let back = reading("a", 2_000 + FRESH, 50 * DAY);
            assert_eq!(renewed.time(&back), 50 * DAY + FRESH + 1_000);
        }
    }

    #[test]
    fn the_date_tells_how_long_the_machine_was_off() {
        let note = Note::first(reading("a", 9 * DAY, 50 * DAY));
        let restarted = reading("b", 30, 51 * DAY);
        assert_eq!(note.time(&restarted), 51 * DAY);
        let renewed = note.renewed(&restarted).unwrap();
        assert_eq!(renewed.time(&reading("b", 40, 0)), 51 * DAY + 10);
        // Time never goes back, if the machine does not know the date at its start.
        let lost = reading("b", 30, 0);
        assert_eq!(note.time(&lost), 50 * DAY);
        let renewed = note.renewed(&lost).unwrap();
        assert_eq!(renewed.time(&reading("b", 40, 51 * DAY)), 50 * DAY + 10);
    }

    #[test]
    fn the_machine_tells_its_clocks() {
        let now = Reading::now();
        assert!(!now.start.is_empty(), "{now:?}");
        let is_later = |()| Reading::now().since_start > now.since_start;
        assert!(std::iter::repeat_n((), 10_000_000).any(is_later), "{now:?}");
    }

    #[test]
    fn a_note_is_read_as_it_was_written() {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(super::super::CLOCK).unwrap();
        assert_eq!(Note::read(&connection), Ok(None));
        for since in [1, 2] {
            let note = Note::first(reading("a", since, 3));
            note.write(&connection).unwrap();
            assert_eq!(Note::read(&connection), Ok(Some(note)));
        }
    }
}
