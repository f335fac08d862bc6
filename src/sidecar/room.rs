//! Room for datagrams that wait: each port has some, and all together have more, so that nobody who
//! does not read or is not read makes this process grow.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of one port, as a kernel's sockets have (`net.core.wmem_default`).
const PORT: usize = 212_992;
/// Bytes of all ports in one direction.
const ALL: usize = 8 << 20;
/// What a datagram takes beside its bytes.
const OVERHEAD: usize = 256;

/// Room in one direction, from which ports take theirs.
#[derive(Debug)]
pub(super) struct Rooms(Arc<Semaphore>);

impl Rooms {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(ALL)))
    }

    /// Room for one port.
    pub(super) fn port(&self) -> Room {
        Room {
            port: Arc::new(Semaphore::new(PORT)),
            all: self.0.clone(),
        }
    }
}

/// The room of a port.
#[derive(Debug)]
pub(super) struct Room {
    port: Arc<Semaphore>,
    all: Arc<Semaphore>,
}

/// Some of it, until it is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    _port: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Room {
    /// Room for a datagram of so many bytes, if there is some.
    pub(super) fn take(&self, len: usize) -> Option<Taken> {
        let len = u32::try_from(len + OVERHEAD).ok()?;
        Some(Taken {
            _port: self.port.clone().try_acquire_many_owned(len).ok()?,
            _all: self.all.clone().try_acquire_many_owned(len).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_bounded_for_each_port_and_for_all() {
        let rooms = Rooms::new();
        let fill = |room: &Room, len| {
            let taken = std::iter::from_fn(|| room.take(len));
            taken.take(ALL).collect::<Vec<_>>()
        };
        let room = rooms.port();
        // The longest datagram fits, and what is dropped is free again.
        for _ in 0..2 {
            assert_eq!(fill(&room, 65_507).len(), 3);
        }
        // Datagrams without bytes take room, too.
        assert_eq!(fill(&room, 0).len(), PORT / OVERHEAD);
        let ports: Vec<_> = (0..100).map(|_| rooms.port()).collect();
        let all: usize = ports.iter().map(|room| fill(room, 1000).len()).sum();
        assert_eq!(all, 100 * (PORT / 1256));
        let held: Vec<_> = ports.iter().map(|room| fill(room, 1000)).collect();
        assert_eq!(held.iter().map(Vec::len).sum::<usize>(), ALL / 1256);
        assert!(room.take(1000).is_none());
        drop(held);
        assert!(room.take(1000).is_some());
    }
}
