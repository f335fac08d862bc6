//! A simulated client of a pod's published port: a connection that begins outside.

use super::device::{HEAD_LEN, pattern};
use crate::datapath::egress::{HostError, Ready};

/// A client. It says which flow it is and how many bytes it sends, sends them, and ends its stream
/// when as many have come back.
pub(super) struct Client {
    pub(super) flow: u64,
    bytes: usize,
    /// What became of its connection to the pod, if that is known.
    pub(super) outcome: Option<Result<(), HostError>>,
    /// Bytes that were read of what it sends, its head included.
    said: usize,
    /// Bytes that the pod has sent.
    heard: usize,
    pub(super) shut: bool,
    end_is_read: bool,
}

impl Client {
    pub(super) const fn new(flow: u64, bytes: usize) -> Self {
        Self {
            flow,
            bytes,
            outcome: None,
            said: 0,
            heard: 0,
            shut: false,
            end_is_read: false,
        }
    }

    /// Bytes to the host and from there.
    pub(super) const fn carried(&self) -> (u64, u64) {
        (self.heard as u64, self.said as u64)
    }

    /// Whether everything came back.
    pub(super) const fn is_served(&self) -> bool {
        self.heard == self.bytes
    }

    /// Whether there is no connection, or both streams have ended.
    pub(super) const fn is_over(&self) -> bool {
        matches!(self.outcome, Some(Err(_))) || self.shut && self.end_is_read
    }

    pub(super) const fn ready(&self) -> Ready {
        Ready {
            readable: self.said < HEAD_LEN + self.bytes || self.is_served(),
            writable: true,
        }
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, HostError> {
        let head = u128::from(self.flow) << 64 | self.bytes as u128;
        let head = head.to_be_bytes();
        let len = buffer.len().min(HEAD_LEN + self.bytes - self.said);
        for (byte, at) in buffer[..len].iter_mut().zip(self.said..) {
            *byte = match at.checked_sub(HEAD_LEN) {
                Some(offset) => pattern(self.flow, offset),
                None => head[at],
            };
        }
        self.said += len;
        match len {
            0 if self.is_served() => {
                self.end_is_read = true;
                Ok(0)
            }
            0 => Err(HostError::WouldBlock),
            len => Ok(len),
        }
    }

    /// Takes what the pod sends, and says what is wrong with it.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        for byte in bytes {
            let (at, flow) = (self.heard, self.flow);
            let expected = pattern(!flow, at);
            if *byte != expected || at >= self.bytes {
                return Err(format!(
                    "brings the byte {byte} at {at} of flow {flow}, where {expected} was sent"
                ));
            }
            self.heard += 1;
        }
        Ok(())
    }
}
