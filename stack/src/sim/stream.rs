//! A simulated host's TCP connection, with its server.

use std::collections::VecDeque;
use std::ops::Range;

use smoltcp::time::Duration;

use super::device::{HEAD_LEN, pattern};
use super::outside::{Script, Server};
use crate::datapath::egress::{HostError, Ready};

/// Bytes that wait in each direction: fewer than one segment has, sometimes.
const ROOM: usize = 4096;

/// A connection. A client says which flow it is and how many bytes it sends, and sends them; as many
/// come back.
pub(super) struct Stream {
    server: Server,
    pub(super) script: Script,
    /// How connecting ended, if it has.
    pub(super) outcome: Result<(), HostError>,
    /// Whether the server's next turn is scheduled.
    pub(super) is_due: bool,
    /// What the server has not taken, and whether a writer waits for it.
    pending: VecDeque<u8>,
    is_waited_for: bool,
    head: Vec<u8>,
    /// The client's flow, and its bytes, once that is known.
    flow: Option<(u64, usize)>,
    /// Bytes behind the head that the server has taken.
    taken: usize,
    /// All that was written.
    pub(super) written: u64,
    pub(super) shut: bool,
    /// Bytes that the server has given, and of those the ones that were read.
    given: usize,
    read: usize,
    /// Whether the server has ended its stream, and whether that was read.
    has_ended: bool,
    end_is_read: bool,
    /// What was wrong, until somebody was told, and whether anything ever was.
    error: Option<HostError>,
    is_broken: bool,
}

/// What came of a turn.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Whether the other end has something to read, or room to write, that it had not.
    pub(super) is_news: bool,
    /// When the next turn is, if anything is left to do.
    pub(super) again: Option<Duration>,
    pub(super) wrong: Option<String>,
}

impl Stream {
    pub(super) fn new(server: Server, script: Script) -> Self {
        Self {
            server,
            script,
            outcome: Err(HostError::WouldBlock),
            is_due: false,
            pending: VecDeque::new(),
            is_waited_for: false,
            head: Vec::new(),
            flow: None,
            taken: 0,
            written: 0,
            shut: false,
            given: 0,
            read: 0,
            has_ended: false,
            end_is_read: false,
            error: None,
            is_broken: false,
        }
    }

    /// The client's flow, if that is known.
    pub(super) fn flow(&self) -> Option<u64> {
        self.flow.map(|(flow, _)| flow)
    }

    /// Bytes that were read.
    pub(super) fn received(&self) -> u64 {
        self.read as u64
    }

    /// Whether it was decided that there is no connection, or both streams have ended.
    pub(super) fn is_over(&self) -> bool {
        let is_refused = matches!(self.outcome, Err(error) if error != HostError::WouldBlock);
        is_refused || self.shut && self.end_is_read
    }

    pub(super) fn ready(&self) -> Ready {
        Ready {
            readable: self.given > self.read || self.has_ended || self.is_broken,
            writable: self.pending.len() < ROOM || self.is_broken,
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<usize, HostError> {
        if self.is_broken {
            return Err(self.error.take().unwrap_or(HostError::Reset));
        }
        let len = bytes.len().min(ROOM - self.pending.len());
        self.is_waited_for |= len < bytes.len();
        if len == 0 {
            return Err(HostError::WouldBlock);
        }
        self.pending.extend(&bytes[..len]);
        self.written += len as u64;
        Ok(len)
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, HostError> {
        let len = buffer.len().min(self.given - self.read);
        if len == 0 {
            return match self.error.take() {
                Some(error) => Err(error),
                None if self.has_ended || self.is_broken => {
                    self.end_is_read = true;
                    Ok(0)
                }
                None => Err(HostError::WouldBlock),
            };
        }
        let flow = self.flow().unwrap_or_default();
        let range = self.read..self.read + len;
        for (byte, at) in buffer.iter_mut().zip(range) {
            *byte = pattern(!flow, at);
        }
        self.read += len;
        Ok(len)
    }

    /// The server's turn.
    pub(super) fn go_on(&mut self) -> Turn {
        if self.outcome == Err(HostError::WouldBlock) {
            self.outcome = match self.server {
                Server::Refuses => Err(HostError::Refused),
                Server::Lost => Err(HostError::HostUnreachable),
                Server::Silent | Server::Unreachable => Err(HostError::TimedOut),
                _ => Ok(()),
            };
            return Turn {
                is_news: true,
                again: self.outcome.ok().map(|()| self.script.pace),
                wrong: None,
            };
        }
        if self.outcome.is_err() || self.is_broken {
            return Turn::default();
        }
        let mut turn = Turn::default();
        if let Err(wrong) = self.take() {
            turn.wrong = Some(wrong);
        }
        let is_waited_for = self.is_waited_for && self.pending.len() < ROOM;
        self.is_waited_for &= !is_waited_for;
        turn.is_news = is_waited_for | self.give() | self.end(&mut turn.wrong) | self.reset();
        turn.again = self.next_turn();
        turn
    }

    /// Takes what has come, and compares it to what the client sends.
    fn take(&mut self) -> Result<(), String> {
        let len = self.script.chunk.min(self.pending.len());
        let bytes: Vec<_> = self.pending.drain(..len).collect();
        for byte in bytes {
            let Some((flow, bytes)) = self.flow else {
                self.head.push(byte);
                self.flow = read_head(&self.head);
                continue;
            };
            let expected = pattern(flow, self.taken);
            if byte != expected || self.taken >= bytes {
                let at = self.taken;
                return Err(format!(
                    "has the byte {byte} at {at} of flow {flow}, where {expected} was sent"
                ));
            }
            self.taken += 1;
        }
        Ok(())
    }

    /// What it may give, of all that it has to give.
    fn to_give(&self) -> Range<usize> {
        let bytes = self.flow.map_or(0, |(_, bytes)| bytes);
        let end = match self.server {
            Server::GivesFirst => bytes,
            _ => self.taken,
        };
        self.given..end.min(self.read + ROOM).max(self.given)
    }

    fn give(&mut self) -> bool {
        let len = self.to_give().len().min(self.script.chunk);
        self.given += len;
        len > 0
    }

    /// Whether the client's stream has ended, and all of it was taken.
    fn hears_end(&self) -> bool {
        self.shut && self.pending.is_empty()
    }

    /// Ends its stream when it is time.
    fn end(&mut self, wrong: &mut Option<String>) -> bool {
        let is_whole = self.flow.is_some_and(|(_, bytes)| self.taken == bytes);
        if self.hears_end() && !is_whole {
            let (flow, taken) = (self.flow, self.taken);
            *wrong = Some(format!("has ended after {taken} bytes of {flow:?}"));
        }
        let has_given = self.flow.is_some_and(|(_, bytes)| self.given == bytes);
        let is_time = has_given && (self.server == Server::GivesFirst || self.hears_end());
        is_time && !std::mem::replace(&mut self.has_ended, true)
    }

    fn reset(&mut self) -> bool {
        let is_time = self.script.resets.is_some_and(|at| self.taken >= at);
        if is_time {
            self.error = Some(HostError::Reset);
            self.is_broken = true;
            self.pending.clear();
        }
        is_time
    }

    fn next_turn(&mut self) -> Option<Duration> {
        if let Some((_, pause)) = self.script.stop.take_if(|(at, _)| self.taken >= *at) {
            return Some(pause);
        }
        let is_busy = !self.pending.is_empty() || !self.to_give().is_empty();
        (is_busy && !self.is_broken).then_some(self.script.pace)
    }
}

fn read_head(head: &[u8]) -> Option<(u64, usize)> {
    let head = u128::from_be_bytes(*head.first_chunk::<HEAD_LEN>()?);
    Some(((head >> 64) as u64, head as u64 as usize))
}
