//! What a node remembers of its pods, written by a thread of its own: a disk may take long for it,
//! and neither clients nor names nor other pods wait for that. Of what comes meanwhile the newest
//! counts.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use muslin_stack::control::ipam::Memory;
use parking_lot::{Condvar, Mutex};
use tracing::warn;

use crate::error::Result;

/// How long the end of a node waits for the disk.
const FAREWELL: Duration = Duration::from_secs(2);
/// When it is looked again whether the last is written.
const LOOK: Duration = Duration::from_millis(2);

/// A way to the thread, which ends with it.
#[derive(Debug)]
pub(super) struct Diary {
    page: Arc<Page>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Page {
    next: Mutex<Next>,
    is_new: Condvar,
}

#[derive(Debug, Default)]
struct Next {
    memory: Option<Memory>,
    ends: bool,
}

impl Diary {
    /// Has what is noted written by `write`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn open(write: impl Fn(&Memory) -> Result<()> + Send + 'static) -> io::Result<Self> {
        let page = Arc::new(Page::default());
        let read = page.clone();
        let thread = std::thread::Builder::new()
            .name("diary".to_owned())
            .spawn(move || {
                while let Some(memory) = read.next() {
                    if let Err(error) = write(&memory) {
                        warn!("addresses of pods cannot be saved: {error}");
                    }
                }
            })?;
        Ok(Self { page, thread })
    }

    /// Has this written in place of what was to be written before.
    pub(super) fn note(&self, memory: Memory) {
        self.page.next.lock().memory = Some(memory);
        self.page.is_new.notify_one();
    }
}

impl Page {
    /// What is to be written next; nothing at the end.
    fn next(&self) -> Option<Memory> {
        let mut next = self.next.lock();
        loop {
            if let Some(memory) = next.memory.take() {
                return Some(memory);
            }
            if next.ends {
                return None;
            }
            self.is_new.wait(&mut next);
        }
    }
}

impl Drop for Diary {
    fn drop(&mut self) {
        self.page.next.lock().ends = true;
        self.page.is_new.notify_one();
        let deadline = Instant::now() + FAREWELL;
        while !self.thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
        if !self.thread.is_finished() {
            warn!("the disk is too slow: the latest addresses of pods may be lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use muslin_stack::control::ipam::AddressPool;

    use super::*;

    /// Of so many pods.
    fn memory(pods: usize) -> Memory {
        let mut pool = AddressPool::new("10.244.1.0/24".parse().unwrap());
        for pod in 0..pods {
            pool.allocate(&format!("pod-{pod}").parse().unwrap(), None)
                .unwrap();
        }
        pool.memory()
    }

    #[test]
    fn nobody_waits_for_a_slow_disk_and_the_newest_is_written() {
        // The disk takes the first when it is told to.
        let (disk, takes) = sync_channel(0);
        let written = Arc::new(Mutex::new(Vec::new()));
        let diary = Diary::open({
            let written = written.clone();
            move |memory| {
                let _ = takes.recv();
                written.lock().push(serde_json::to_value(memory).unwrap());
                Ok(())
            }
        });
        let diary = diary.unwrap();
        for pods in 1..10 {
            diary.note(memory(pods));
        }
        disk.send(()).unwrap();
        drop(disk);
        drop(diary);
        let written = written.lock();
        let last = serde_json::to_value(memory(9)).unwrap();
        assert_eq!(written.last(), Some(&last));
        assert!(written.len() <= 2, "{written:?}");
    }

    #[test]
    fn the_end_does_not_wait_for_ever() {
        let (disk, takes) = sync_channel::<()>(0);
        let diary = Diary::open(move |_| {
            let _ = takes.recv();
            Ok(())
        });
        let diary = diary.unwrap();
        diary.note(memory(1));
        drop(diary);
        drop(disk);
    }
}
