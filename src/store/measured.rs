//! A store whose requests are timed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use muslin_stack::control::lease::{Answer, Entry, LeaseRecord, Op, Revision};
use parking_lot::Mutex;

use super::{Store, StoreError, Watch};

/// Upper bounds of the classes of durations, in seconds: an embedded store answers in less than a
/// millisecond, one at the other end of the world in less than a second.
pub(crate) const BOUNDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];

/// What is asked of a store, by name.
pub(crate) const REQUESTS: [&str; 6] = ["get", "list", "create", "put", "delete", "watch"];

/// How long requests have taken.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Durations {
    /// Requests in each class of [`BOUNDS`], and beyond them.
    pub(crate) classes: [u64; BOUNDS.len() + 1],
    /// The sum of all.
    pub(crate) sum: Duration,
    /// Those of them that failed.
    pub(crate) failed: u64,
}

impl Durations {
    fn note(&mut self, duration: Duration, has_failed: bool) {
        let seconds = duration.as_secs_f64();
        let class = BOUNDS.partition_point(|bound| *bound < seconds);
        self.classes[class] += 1;
        self.sum += duration;
        self.failed += u64::from(has_failed);
    }
}

/// How long requests to a store have taken, by what was asked ([`REQUESTS`]).
#[derive(Debug, Clone, Default)]
pub(crate) struct Timings(Arc<Mutex<[Durations; REQUESTS.len()]>>);

impl Timings {
    /// Each kind of request with its durations until now.
    pub(crate) fn read(&self) -> impl Iterator<Item = (&'static str, Durations)> + use<> {
        let all = *self.0.lock();
        REQUESTS.into_iter().zip(all)
    }

    fn note<T>(&self, request: usize, began: Instant, answer: &Result<T, StoreError>) {
        if let Some(durations) = self.0.lock().get_mut(request) {
            durations.note(began.elapsed(), answer.is_err());
        }
    }
}

/// Another store, whose requests are timed. Those that are given up are not counted.
pub(crate) struct Measured {
    store: Arc<dyn Store>,
    timings: Timings,
}

impl Measured {
    /// The same store.
    pub(crate) fn new(store: Arc<dyn Store>, timings: Timings) -> Self {
        Self { store, timings }
    }
}

/// The place of an operation in [`REQUESTS`].
fn request(op: &Op) -> usize {
    match op {
        Op::Get(_) => 0,
        Op::List(_) => 1,
        Op::Create { .. } | Op::Claim { .. } => 2,
        Op::CompareAndPut { .. } => 3,
        Op::CompareAndDelete { .. } => 4,
    }
}

#[async_trait]
impl Store for Measured {
    async fn execute(&self, op: Op) -> Result<Answer, StoreError> {
        let (request, began) = (request(&op), Instant::now());
        let answer = self.store.execute(op).await;
        self.timings.note(request, began, &answer);
        answer
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        let began = Instant::now();
        let answer = self.store.watch(prefix, from).await;
        self.timings.note(REQUESTS.len() - 1, began, &answer);
        answer
    }

    async fn survey(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        self.store.survey(prefix).await
    }

    fn keeps_names(&self) -> bool {
        self.store.keeps_names()
    }

    fn is_shared_with_flannel(&self) -> bool {
        self.store.is_shared_with_flannel()
    }

    fn servers(&self) -> &[String] {
        self.store.servers()
    }

    fn id(&self) -> Option<String> {
        self.store.id()
    }

    fn describe(&self) -> String {
        self.store.describe()
    }

    fn listed(&self, public_ip: std::net::Ipv4Addr) -> Result<Option<LeaseRecord>, StoreError> {
        self.store.listed(public_ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_class_of_its_bound() {
        let mut durations = Durations::default();
        for (millis, has_failed) in [(1, false), (2, false), (600, true), (60_000, true)] {
            durations.note(Duration::from_millis(millis), has_failed);
        }
        assert_eq!(durations.classes, [1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1]);
        assert_eq!(durations.failed, 2);
        assert_eq!(durations.sum, Duration::from_millis(60_603));
    }

    /// A store that is away.
    struct Away;

    #[async_trait]
    impl Store for Away {
        async fn execute(&self, _: Op) -> Result<Answer, StoreError> {
            Err(StoreError::Unavailable("away".to_owned()))
        }

        async fn watch(&self, _: &str, _: Revision) -> Result<Box<dyn Watch>, StoreError> {
            Err(StoreError::Gap)
        }

        fn describe(&self) -> String {
            "away".to_owned()
        }
    }

    #[tokio::test]
    async fn requests_are_counted_by_what_was_asked() {
        let timings = Timings::default();
        let store = Measured::new(Arc::new(Away), timings.clone());
        store.execute(Op::List(String::new())).await.unwrap_err();
        store.execute(Op::Get(String::new())).await.unwrap_err();
        store.execute(Op::Get(String::new())).await.unwrap_err();
        assert!(store.watch("", 0).await.is_err());
        let counts = timings.read();
        let counts: Vec<_> = counts
            .map(|(name, it)| (name, it.classes.iter().sum::<u64>(), it.failed))
            .filter(|(_, count, _)| *count > 0)
            .collect();
        assert_eq!(counts, [("get", 2, 2), ("list", 1, 1), ("watch", 1, 1)]);
    }
}
