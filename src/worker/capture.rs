//! Captured packets on their way from the workers to who reads them.
//!
//! Each worker fills batches of a fixed size and number, and gets them back when they have been read.
//! While the reader has all of them, the worker fills its last one and counts what finds no room in it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use muslin_stack::datapath::capture::{Batch, Wanted};
use tokio::sync::mpsc;

use super::message::Command;
use super::packet_loop::PacketLoop;
use super::{Ended, Workers};

/// Batches of each worker.
const BATCHES: usize = 6;
/// Packets in a batch.
const RECORDS: usize = 4096;
/// Bytes of packets in a batch; a superpacket has up to 64 KiB.
const BYTES: usize = 1 << 20;

/// A worker's end of a capture.
pub(super) struct Tap {
    id: u64,
    worker: usize,
    full: mpsc::Sender<(usize, Batch)>,
    empty: Receiver<Batch>,
}

/// A capture of all workers.
#[derive(Debug)]
pub struct Capturing<'a> {
    workers: &'a Workers,
    id: u64,
    full: mpsc::Receiver<(usize, Batch)>,
    empty: Vec<Sender<Batch>>,
}

impl Workers {
    /// Begins to capture what is wanted. It ends when that is dropped.
    ///
    /// # Errors
    /// `Ended` if a thread has ended.
    pub fn capture(&self, wanted: &Wanted) -> Result<Capturing<'_>, Ended> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let (sender, full) = mpsc::channel(BATCHES * self.0.len().max(1));
        let mut capturing = Capturing {
            workers: self,
            id,
            full,
            empty: Vec::new(),
        };
        for (number, worker) in self.0.iter().enumerate() {
            let (empties, empty) = channel();
            for _ in 1..BATCHES {
                let _ = empties.send(Batch::with_capacity(RECORDS, BYTES));
            }
            capturing.empty.push(empties);
            let tap = Tap {
                id,
                worker: number,
                full: sender.clone(),
                empty,
            };
            let first = Batch::with_capacity(RECORDS, BYTES);
            worker.send(Command::Capture(Box::new((wanted.clone(), first)), tap))?;
        }
        Ok(capturing)
    }
}

impl Capturing<'_> {
    /// The next packets, and the worker that saw them; nothing once the capture has ended.
    pub async fn next(&mut self) -> Option<(usize, Batch)> {
        self.full.recv().await
    }

    /// Gives a batch back that was read.
    pub fn give_back(&self, worker: usize, mut batch: Batch) {
        batch.clear();
        if let Some(empty) = self.empty.get(worker) {
            // A worker that has ended needs none.
            let _ = empty.send(batch);
        }
    }

    /// Captures no more. What was captured until now can still be read.
    pub fn finish(&self) {
        for worker in &self.workers.0 {
            let _ = worker.send(Command::EndCapture(self.id));
        }
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}

impl PacketLoop {
    pub(super) fn begin_capture(&mut self, wanted: Wanted, first: Batch, tap: Tap) {
        let captures = self.path.node_mut().observer_mut();
        captures.begin(tap.id, wanted, first);
        self.taps.push(tap);
    }

    pub(super) fn end_capture(&mut self, id: u64) {
        let last = self.path.node_mut().observer_mut().end(id);
        let tap = self.taps.iter().position(|tap| tap.id == id);
        if let (Some(last), Some(tap)) = (last, tap) {
            let Tap { full, worker, .. } = self.taps.swap_remove(tap);
            // Whoever reads may have gone.
            let _ = full.try_send((worker, last));
        }
    }

    /// Hands on what was captured in this turn.
    pub(super) fn flush_captures(&mut self) {
        if self.taps.is_empty() {
            return;
        }
        let captures = self.path.node_mut().observer_mut();
        let mut gone = Vec::new();
        for tap in &self.taps {
            if !captures.is_readable(tap.id) {
                continue;
            }
            // Without one the last goes on.
            let Ok(next) = tap.empty.try_recv() else {
                continue;
            };
            if let Some(batch) = captures.take(tap.id, next)
                && tap.full.try_send((tap.worker, batch)).is_err()
            {
                gone.push(tap.id);
            }
        }
        for id in gone {
            self.end_capture(id);
        }
    }
}
