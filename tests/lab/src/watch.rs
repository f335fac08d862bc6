//! Time limits: a test that stalls is named with what it waits for, and ends.

use std::cell::RefCell;
use std::io::Write as _;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::processes;

/// How long a test may have a lab, if it does not ask for more. A test that takes longer on an idle
/// machine says so.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a test may take to end once everything that it started is killed.
const END: Duration = Duration::from_secs(30);
/// How often a watch looks whether the limit has passed.
const LOOK: Duration = Duration::from_secs(1);
/// Where a machine has more to do than this many times its processors, something else is wrong.
const BUSIEST: f64 = 10.0;

/// `time`, and more in proportion where more processes want to run than there are processors.
pub fn stretched(time: Duration) -> Duration {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    // The averages of 1, 5 and 15 minutes, and how many run at this moment of how many.
    let mut words = text.split([' ', '/']).map(|word| word.parse().ok());
    let mut word = |at| words.nth(at).flatten().unwrap_or_default();
    let (average, running): (f64, f64) = (word(0), word(2));
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    time.mul_f64((average.max(running) / processors).clamp(1.0, BUSIEST))
}

thread_local! {
    static WAITS_FOR: RefCell<Arc<Mutex<String>>> = RefCell::default();
}

/// Notes what this thread's test waits for from now on.
pub fn waits_for(what: impl Into<String>) {
    WAITS_FOR.with_borrow(|shared| {
        *shared.lock().unwrap_or_else(PoisonError::into_inner) = what.into();
    });
}

/// A limit for the thread's test, until it is dropped.
pub struct Watch {
    limit: Arc<Mutex<Duration>>,
    _end: Sender<()>,
}

impl Watch {
    /// After the limit all processes with this mark are killed, which ends what waits for them.
    pub fn start(mark: String) -> Self {
        let (end, ended) = channel();
        let limit = Arc::new(Mutex::new(LIMIT));
        let test = Watched {
            name: std::thread::current().name().unwrap_or("?").to_owned(),
            waits_for: WAITS_FOR.with_borrow(Arc::clone),
            limit: limit.clone(),
            ended,
        };
        std::thread::spawn(move || test.watch(&mark));
        Self { limit, _end: end }
    }

    /// Sets another limit, from the start.
    pub fn limit(&self, limit: Duration) {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
    }
}

/// A test as the thread sees it that watches it.
struct Watched {
    name: String,
    waits_for: Arc<Mutex<String>>,
    limit: Arc<Mutex<Duration>>,
    ended: Receiver<()>,
}

impl Watched {
    fn watch(&self, mark: &str) {
        let began = Instant::now();
        let limit = || *self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        while began.elapsed() < limit() || began.elapsed() < stretched(limit()) {
            if self.ends_within(LOOK) {
                return;
            }
        }
        self.complain(&format!("has taken {:?}", began.elapsed()));
        processes::kill_all(mark);
        if !self.ends_within(END) {
            self.complain("does not end without its processes, and all tests end with it");
            std::process::exit(101);
        }
    }

    fn ends_within(&self, time: Duration) -> bool {
        self.ended.recv_timeout(time) == Err(RecvTimeoutError::Disconnected)
    }

    fn complain(&self, how: &str) {
        let waits_for = self.waits_for.lock();
        let waits_for = waits_for.unwrap_or_else(PoisonError::into_inner);
        // Past the test runner, which keeps what tests print until they end.
        let _ = writeln!(
            std::io::stderr(),
            "stalled: the test {} {how}; it waits for: {waits_for}",
            self.name
        );
    }
}
