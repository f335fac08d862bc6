//! A node's worker: its data path and the sockets of that.

use super::due::Timer;
use super::way_out::WayOut;
use crate::datapath::Datapath;

/// A thread of a node's data path.
pub(super) struct Worker {
    pub(super) path: Datapath,
    /// The sockets of its flows to addresses outside.
    pub(super) way_out: Box<WayOut>,
    pub(super) timer: Timer,
    /// Packets that it has handed over to others.
    pub(super) handed_over: u64,
}

impl Worker {
    pub(super) fn new(path: Datapath, way_out: WayOut) -> Self {
        Self {
            path,
            way_out: Box::new(way_out),
            timer: Timer::default(),
            handed_over: 0,
        }
    }
}
