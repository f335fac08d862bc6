//! The loop that drives rules, a machine without I/O, against a store: it executes what they ask for
//! and gives them what comes of it.

use std::future::pending;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use muslin_stack::control::lease::{Action, Answer, Op, Revision, WatchEvent};
use smoltcp::time::Instant;
use tokio::sync::RwLock;
use tokio::time::sleep;
use tracing::debug;

use crate::error::Result;
use crate::store::{Store, StoreError, Watch};

/// The longest sleep: timers stand still while a machine is suspended, and the rules' clock need not.
const NAP: Duration = Duration::from_secs(1);

/// The right to write to the store: those who do share it, until somebody has it alone.
pub type Turn = Arc<RwLock<()>>;

/// What a store does, as its rules take it.
pub(super) type StoreResult<T> = std::result::Result<T, StoreError>;

/// Rules that a store serves, with those who give them input and hear of their changes. Whatever
/// fails with an error ends the loop.
pub(super) trait Rules {
    /// What the log calls the store where it serves these rules.
    const STORE: &'static str;
    /// Whether they log each failure themselves.
    const LOG_FAILURES: bool;

    /// The time for all that they do; it never goes back.
    fn now(&self) -> Instant;

    /// Reports what has changed, and says what to do next.
    fn poll(&mut self) -> Result<Action>;

    /// Takes what came of an operation, which was a list or another.
    fn answer(&mut self, is_list: bool, answer: StoreResult<Answer>) -> Result<()>;

    /// What is watched: all keys that begin so.
    fn prefix(&self) -> String;

    /// Takes note that the watch is open.
    fn watch_opened(&mut self) -> Result<()> {
        Ok(())
    }

    /// Takes what the watch reports.
    fn events(&mut self, events: Vec<WatchEvent>);

    /// The watch has ended, or could not be opened.
    fn watch_ended(&mut self, error: &StoreError) -> Result<()>;

    /// Waits for input from elsewhere and takes it; for ever if there will be none. It breaks off the
    /// opening of a watch if the node is to end. Nothing is lost if it is dropped.
    async fn input(&mut self) -> ControlFlow<()>;
}

/// Does what the rules ask for, until they end. They write while they have their `turn`.
///
/// # Errors
/// What the rules say.
pub(super) async fn drive(rules: &mut impl Rules, store: &dyn Store, turn: &Turn) -> Result<()> {
    let mut driver = Driver {
        rules,
        store,
        stream: None,
    };
    loop {
        match driver.rules.poll()? {
            Action::Store(op) => {
                let _turn = turn.read().await;
                driver.execute(op).await?;
            }
            Action::Watch { from, .. } if driver.stream.is_none() => driver.open(from).await?,
            Action::Watch { until, .. } | Action::Wait { until } => driver.idle(until).await?,
            Action::Stop => return Ok(()),
        }
    }
}

struct Driver<'a, R> {
    rules: &'a mut R,
    store: &'a dyn Store,
    /// The watch, which stays open during all operations but lists.
    stream: Option<Box<dyn Watch>>,
}

impl<R: Rules> Driver<'_, R> {
    async fn execute(&mut self, op: Op) -> Result<()> {
        let is_list = matches!(op, Op::List(_));
        if is_list {
            self.stream = None;
        }
        let asked_for = op.to_string();
        let mut execution = self.store.execute(op);
        // It is completed whatever comes: else it would be unknown whether it was done.
        let answer = loop {
            tokio::select! {
                biased;
                answer = &mut execution => break answer,
                events = next(&mut self.stream) => self.take(events)?,
                _ = self.rules.input() => {}
            }
        };
        match &answer {
            Ok(answer) => debug!("{}: {asked_for}: {answer}", R::STORE),
            Err(_) if R::LOG_FAILURES => {}
            Err(error) => debug!("{}: {asked_for}: {error}", R::STORE),
        }
        self.rules.answer(is_list, answer)
    }

    async fn open(&mut self, from: Revision) -> Result<()> {
        let prefix = self.rules.prefix();
        let mut opening = self.store.watch(&prefix, from);
        let opened = loop {
            tokio::select! {
                opened = &mut opening => break opened,
                input = self.rules.input() => if input.is_break() {
                    return Ok(());
                },
            }
        };
        match opened {
            Ok(stream) => {
                self.stream = Some(stream);
                self.rules.watch_opened()
            }
            Err(error) => self.rules.watch_ended(&error),
        }
    }

    /// Waits until something happens, or it is time.
    async fn idle(&mut self, until: Instant) -> Result<()> {
        let now = self.rules.now();
        let left = if until > now {
            Duration::from_micros((until - now).total_micros())
        } else {
            Duration::ZERO
        };
        tokio::select! {
            events = next(&mut self.stream) => self.take(events)?,
            _ = self.rules.input() => {}
            () = sleep(left.min(NAP)) => {}
        }
        Ok(())
    }

    /// Handles what the watch says.
    fn take(&mut self, events: StoreResult<Vec<WatchEvent>>) -> Result<()> {
        match events {
            Ok(events) => {
                self.rules.events(events);
                Ok(())
            }
            Err(error) => {
                self.stream = None;
                self.rules.watch_ended(&error)
            }
        }
    }
}

/// The next changes of a watch that is open.
async fn next(stream: &mut Option<Box<dyn Watch>>) -> StoreResult<Vec<WatchEvent>> {
    match stream {
        Some(stream) => stream.next().await,
        None => pending().await,
    }
}
