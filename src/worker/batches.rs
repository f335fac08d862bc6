//! How much a worker does at once: what batches and superpackets spare. Each costs some additions per
//! batch, or per superpacket, and none per packet.

/// Upper bounds of the classes of sizes: powers of two up to the largest batch.
pub const BOUNDS: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];

/// How many packets each batch had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Batches in each class of [`BOUNDS`], and beyond them.
    pub classes: [u64; BOUNDS.len() + 1],
    /// Packets of all batches.
    pub packets: u64,
}

impl Sizes {
    /// Counts a batch of so many packets, at least one.
    pub(super) fn note(&mut self, packets: usize) {
        // The bits of what is beyond the bound before.
        let class = packets
            .saturating_sub(1)
            .checked_ilog2()
            .map_or(0, |it| it + 1);
        self.classes[(class as usize).min(BOUNDS.len())] += 1;
        self.packets += packets as u64;
    }

    fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.classes.iter_mut().zip(other.classes) {
            *mine += theirs;
        }
        self.packets += other.packets;
    }
}

/// The batches of a worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Batches {
    /// Messages from peers that one system call brought; a train of datagrams is one.
    pub received: Sizes,
    /// Packets to peers that left together; a superpacket is one.
    pub sent: Sizes,
    /// Superpackets that pods have sent.
    pub from_pods: u64,
    /// Superpackets that were merged from segments of peers.
    pub merged: u64,
}

impl Batches {
    /// Adds another worker's.
    pub(super) fn add(&mut self, other: &Self) {
        self.received.add(&other.received);
        self.sent.add(&other.sent);
        self.from_pods += other.from_pods;
        self.merged += other.merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_in_the_class_of_its_bound() {
        let mut sizes = Sizes::default();
        for packets in [1, 2, 3, 4, 5, 8, 33, 64, 65, 1000] {
            sizes.note(packets);
        }
        assert_eq!(sizes.classes, [1, 1, 2, 2, 0, 0, 2, 2]);
        assert_eq!(sizes.packets, 1185);
    }
}
