//! A load that goes on while something happens to nodes, and tells how long it stood still.

use std::net::SocketAddrV4;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use muslin::agent::Agent;

use super::SOON;
use super::watch::{stretched, waits_for};

/// Bytes of one exchange, which takes milliseconds.
const PART: u64 = 256 << 10;

/// Exchanges over one TCP connection, one after the other, whose contents are compared.
pub struct Load {
    progress: Arc<(Mutex<Progress>, Condvar)>,
    thread: Option<JoinHandle<Agent>>,
}

#[derive(Default)]
struct Progress {
    exchanges: u64,
    /// The longest time in which no byte came, since it was last asked for.
    gap: Duration,
    failed: Option<String>,
    ends: bool,
}

impl Load {
    /// Opens a connection from an agent to a listener, and sends and compares until the end.
    pub fn start(mut agent: Agent, to: SocketAddrV4) -> Self {
        let id = agent.open(to).unwrap();
        let progress = Arc::<(Mutex<Progress>, Condvar)>::default();
        let shared = Arc::clone(&progress);
        let thread = std::thread::spawn(move || {
            let (state, changed) = &*shared;
            for part in 0.. {
                let done = agent.exchange(id, PART, part);
                let mut state = state.lock().unwrap();
                match done {
                    Ok(done) if done.intact => {
                        state.exchanges += 1;
                        state.gap = state.gap.max(done.longest_gap());
                    }
                    Ok(_) => state.failed = Some(format!("part {part} is not what was sent")),
                    Err(error) => state.failed = Some(format!("part {part}: {error}")),
                }
                changed.notify_all();
                if state.ends || state.failed.is_some() {
                    break;
                }
            }
            agent
        });
        Self {
            progress,
            thread: Some(thread),
        }
    }

    /// The longest time in which no byte came since this was last called. Waits until an exchange is
    /// over that began now.
    ///
    /// # Panics
    /// If the connection has ended, or something else came than was sent.
    pub fn gap(&self) -> Duration {
        waits_for("the progress of a load");
        let (state, changed) = &*self.progress;
        let mut state = state.lock().unwrap();
        // One may be under way.
        let enough = state.exchanges + 2;
        let patience = stretched(SOON);
        while state.exchanges < enough {
            assert_eq!(state.failed, None);
            let (next, waited) = changed.wait_timeout(state, patience).unwrap();
            assert!(!waited.timed_out(), "nothing moves for {patience:?}");
            state = next;
        }
        std::mem::take(&mut state.gap)
    }

    /// Ends it, and tells how many bytes there were.
    ///
    /// # Panics
    /// As the gap.
    pub fn end(mut self) -> (Agent, u64) {
        self.progress.0.lock().unwrap().ends = true;
        let agent = self.thread.take().unwrap().join().unwrap();
        let state = self.progress.0.lock().unwrap();
        assert_eq!(state.failed, None);
        (agent, state.exchanges * PART)
    }
}
