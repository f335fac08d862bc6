//! The data path of a node with two workers, as a kernel with two queues feeds it: frames of one
//! socket of a pod come to either worker, messages between them wait, and their mailboxes may be full.
//! The oracle holds that
//!
//! * a datagram of a pod goes out once at most, by its own socket, and is lost only where that was
//!   counted; all that one port of a pod sends goes by one socket of one worker;
//! * what clients send to a published port reaches its pod whole, from an address that the pod can
//!   answer, and its answer goes to that client, whichever worker it comes to;
//! * a stream of a peer's pod comes whole from batches of datagrams, merged or not, and nothing of
//!   strangers, other peers and other networks is in it;
//! * a connection that begins on the host's side is told once what became of it;
//! * a packet that was handed over is not handed over again, and nobody hands one to itself;
//! * what one worker hears of a neighbour all know when messages have arrived;
//! * frames for pods are valid and for ports that are there, flows end with their pod, counters of each
//!   worker add up, timers do not spin.
#![cfg_attr(fuzzing, no_main)]

mod harness;
mod host;

use muslin_fuzz::{Seed, for_each_event};

use harness::Harness;

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        // A datagram by the first worker, by the second; a client's; the pod's answer by each.
        &[0, 0, 0],
        &[0, 1, 0],
        &[1, 0],
        &[2, 0, 0],
        &[2, 1, 0],
        // The same in IPv6.
        &[0, 0, 0x80],
        &[0, 1, 0x80],
        &[1, 0x80],
        &[5, 0x80],
        &[5, 0x82],
        &[10, 0, 0x81, 4, 3, 3, 3, 11],
        // Messages arrive.
        &[3, 0, 9],
        &[3, 1, 9],
        // A neighbour, a connection from the host's side, answered, refused.
        &[4, 1, 9],
        &[5, 0],
        &[5, 2],
        &[6, 1, 0],
        &[6, 1, 1],
        // Something for a socket, time, a pod's end, another one in its place.
        &[7, 0, 0],
        &[8, 2],
        &[8, 3],
        &[9, 0],
        &[11, 0, 0],
        &[11, 1, 2],
        &[12, 1, 0],
        &[12, 0, 1],
        // A batch of a stream, with what is not the peer's.
        &[10, 0, 1, 4, 3, 3, 3, 11],
        &[10, 0, 1, 3, 3, 1, 3],
    ],
    inputs: 20_000,
    max_len: 400,
}

/// Runs the events that `data` stands for.
fn run(data: &[u8]) {
    let mut harness = Harness::new();
    for_each_event(data, |input| {
        harness.step(input)?;
        harness.check();
        Ok(())
    });
    harness.finish();
}

fn seeds() -> Vec<Seed> {
    vec![
        // One socket of a pod, whose packets come to both workers.
        (
            "mapping",
            vec![
                0, 0, 0, 0, 1, 0, 3, 0, 9, 3, 1, 9, 0, 1, 8, 3, 0, 9, 7, 0, 0,
            ],
        ),
        (
            "both-first",
            vec![0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 3, 0, 9, 3, 1, 9],
        ),
        // A client of a published port, and answers by either worker.
        (
            "published",
            vec![
                1, 0, 2, 0, 0, 2, 1, 0, 3, 0, 9, 1, 1, 2, 1, 1, 3, 0, 9, 8, 3, 1, 0,
            ],
        ),
        // Connections from the host's side: answered, refused, silent.
        (
            "dialled",
            vec![
                5, 0, 6, 1, 0, 3, 0, 9, 5, 1, 6, 0, 1, 3, 0, 9, 5, 0, 8, 2, 8, 3,
            ],
        ),
        // Batches of a stream: a stranger, another peer and another network are in between.
        ("batch", vec![10, 0, 1, 5, 3, 3, 3, 3, 11]),
        (
            "batch-strangers",
            vec![
                10, 0, 1, 7, 3, 1, 3, 0, 3, 2, 3, 10, 0, 0, 3, 3, 1, 3, 10, 0, 1, 3, 1, 3, 3,
            ],
        ),
        // One client connects twice, and is seen as itself once only.
        ("dialled-again", vec![5, 2, 5, 2, 6, 1, 0, 8, 2, 5, 2, 8, 3]),
        // Two ends of the host with one port, and answers by the other worker.
        (
            "host",
            vec![
                11, 0, 0, 11, 0, 2, 11, 1, 4, 12, 1, 0, 12, 1, 1, 12, 0, 2, 8, 4, 11, 1, 2,
            ],
        ),
        ("neighbours", vec![4, 1, 9, 3, 0, 9, 4, 0, 10, 3, 1, 9]),
        // What there is of IPv6: a socket by both workers, a client, connections, a batch.
        (
            "v6",
            vec![
                0, 0, 0x80, 0, 1, 0x80, 3, 0, 9, 3, 1, 9, 7, 0, 0, 1, 0x80, 2, 0, 0, 2, 1, 0, 3, 0,
                9, 5, 0x80, 6, 1, 0, 3, 0, 9, 5, 0x83, 6, 0, 3, 3, 0, 9, 8, 3,
            ],
        ),
        (
            "v6-batch",
            vec![
                10, 0, 0x81, 7, 3, 1, 3, 0, 3, 2, 3, 10, 1, 0x83, 3, 3, 3, 11,
            ],
        ),
        // One port of a pod with each version.
        (
            "v6-beside",
            vec![
                0, 0, 0, 0, 0, 0x80, 0, 1, 0x80, 0, 1, 0, 3, 0, 9, 3, 1, 9, 9, 0, 1, 0x80, 1, 0,
            ],
        ),
        // More than a mailbox holds.
        (
            "crowded",
            [vec![1, 0], [2, 1, 0].repeat(12), vec![3, 0, 9]].concat(),
        ),
        // A pod vanishes while its packets are under way.
        (
            "vanished",
            vec![
                1, 0, 2, 1, 0, 5, 0, 0, 1, 3, 9, 0, 3, 0, 9, 3, 1, 9, 1, 0, 2, 1, 0, 3, 0, 9,
            ],
        ),
    ]
}
