//! How much memory the buffers of connections may have.
//!
//! smoltcp's buffers do not grow, so a connection gets at its start what it may need: much while
//! there are few, and what is set aside for each place in the table when there are many.

/// Bytes of each of a connection's two buffers.
const LARGEST: usize = 256 << 10;
const SMALLEST: usize = 8 << 10;
/// A connection takes at most this part of what is left, for each of its buffers.
const SHARE: usize = 256;

/// A budget of bytes.
#[derive(Debug)]
pub(super) struct Memory {
    /// What each connection may have without asking, for each of its buffers.
    base: usize,
    /// What else is left.
    left: usize,
}

/// Buffers' length, to be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grant {
    /// Bytes of each buffer.
    pub(super) len: usize,
}

impl Memory {
    /// A budget of `bytes` for up to `connections`; half of it is set aside for them.
    pub(super) fn new(bytes: usize, connections: usize) -> Self {
        let base = (bytes / 4 / connections.max(1)).clamp(SMALLEST, LARGEST);
        Self {
            base,
            left: bytes.saturating_sub(2 * base * connections),
        }
    }

    pub(super) fn take(&mut self) -> Grant {
        let wanted = (self.left / SHARE).min(LARGEST);
        if wanted <= self.base {
            return Grant { len: self.base };
        }
        // A power of two below what there is: buffers of few sizes are used again.
        let len = 1 << wanted.ilog2();
        self.left -= self.extra(len);
        Grant { len }
    }

    pub(super) fn give_back(&mut self, grant: Grant) {
        self.left += self.extra(grant.len);
    }

    fn extra(&self, len: usize) -> usize {
        2 * len.saturating_sub(self.base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_connections_have_large_buffers_and_many_stay_within_the_budget() {
        let (bytes, connections) = (128 << 20, 4096);
        let mut memory = Memory::new(bytes, connections);
        let full = memory.left;
        let grants: Vec<_> = (0..connections).map(|_| memory.take()).collect();
        assert_eq!(grants[0].len, LARGEST);
        assert_eq!(grants[connections - 1].len, SMALLEST);
        let sum: usize = grants.iter().map(|grant| 2 * grant.len).sum();
        assert!(sum <= bytes, "{sum}");
        for grant in grants {
            memory.give_back(grant);
        }
        assert_eq!(memory.left, full);
    }
}
