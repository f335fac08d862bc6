//! A whole node under a sequence of events, watched by an oracle that keeps its own, much simpler
//! idea of ports, peers and routes. `harness` runs the events and says what must come of them,
//! `event` reads them from bytes.
#![cfg_attr(fuzzing, no_main)]

mod event;
mod harness;
mod ledger;
mod packet;
mod seeds;
mod v6;

use event::{Event, Events};
use harness::Harness;
use seeds::seeds;

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        // Pod 2 to the gateway, to a pod of peer 0, to pod 3, and a datagram of peer 0 for pod 2.
        &[0, 0, 0, 2, 0, 2, 1, 64, 0, 0, 20, 0, 8, 0],
        &[0, 0, 0, 2, 0, 2, 18, 64, 2, 0, 20, 0, 0, 0],
        &[0, 0, 3, 2, 0, 2, 3, 64, 2, 0, 20, 0, 0, 0],
        &[5, 0, 15, 8, 0, 18, 2, 64, 2, 0, 20, 0, 0, 0],
        // Pod 2 to an address outside.
        &[0, 0, 0, 2, 0, 2, 50, 64, 2, 0, 20, 0, 0, 0],
        // To an address that nobody has, and ARP from pod 4 to all about it.
        &[0, 0, 0, 2, 0, 2, 9, 64, 2, 0, 20, 0, 0, 0],
        &[0, 2, 16, 4, 4, 2, 4, 9, 4, 9, 0, 0, 0, 0],
        // In IPv6: pod 2 to the gateway, to a pod of peer 4, to pod 3, and that peer to pod 2; who has pod
        // 3's address, and that pod 2 has its own.
        &[0, 0, 0, 2, 6, 2, 1, 64, 0, 0, 20, 128, 0, 0],
        &[0, 0, 0, 2, 6, 2, 18, 64, 1, 0, 20, 0, 0, 0],
        &[0, 0, 3, 2, 6, 2, 3, 64, 1, 0, 20, 0, 0, 0],
        &[5, 0, 14, 12, 6, 18, 2, 64, 1, 0, 20, 0, 0, 0],
        &[0, 0, 21, 2, 6, 2, 58, 255, 0, 0, 5, 135, 3, 0],
        &[0, 0, 18, 2, 6, 2, 51, 255, 0, 0, 5, 136, 2, 0],
        &[11, 2, 8, 0, 0],
        // Superpackets to a peer and from it.
        &[15, 0, 0, 2, 2, 18, 64, 0, 125, 155, 99, 0, 0],
        &[15, 6, 15, 8, 18, 2, 64, 0, 125, 155, 99, 0],
        // From egress to pod 2, what just fits and a byte more; a superpacket of 64 KiB.
        &[4, 50, 2, 64, 2, 0, 241, 0, 0],
        &[4, 50, 2, 64, 2, 0, 242, 0, 0],
        &[15, 12, 0, 0, 50, 2, 64, 32, 254, 255, 99, 0],
        // Attach, detach, set and remove a peer, hold, wait two seconds and five minutes.
        &[9, 2, 4, 1],
        &[10, 2],
        &[11, 2, 0, 2, 0],
        &[12, 0],
        &[13, 3],
        &[14, 16],
        &[14, 194],
    ],
    inputs: 100_000,
    max_len: 800,
}

/// Runs the events that `data` stands for. Its first byte chooses a configuration.
fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let mut harness = Harness::new(*first);
    let mut hold = 0;
    for event in Events::new(rest, harness.mtu()) {
        if let Event::Hold(events) = event {
            hold = events;
            continue;
        }
        harness.apply(event);
        harness.check_tables();
        if hold == 0 {
            harness.poll();
        } else {
            hold -= 1;
        }
        harness.check_books();
    }
    harness.finish();
}
