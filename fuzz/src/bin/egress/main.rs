//! Pods whose packets leave by sockets of a scripted host: TCP segments, datagrams and echo requests,
//! well formed or not; sockets that connect or do not, that have something to read, take little, end
//! or fail; pods that vanish, and time. The oracle holds that
//!
//! * what the host gets of a stream is the beginning of what the pod sent, and the other way round;
//!   each end is told of an end only where the other's stream ended; datagrams go on whole, to those
//!   they are for, each once; where both streams have ended, the host has all that it is still to take;
//! * no socket is used before it is there or after it was closed, none is written to after its end,
//!   none stays behind, and there are never more than flows may be;
//! * nothing goes where the policy forbids;
//! * packets for pods are valid, with sums that are right, and come from where the pod sent something;
//! * whatever a pod's port sends goes by one socket, and whoever answers that is heard, if he may be;
//! * a connection does not end while its pod answers, nor anything because the process stood still;
//! * timers do not spin, packets for pods come to an end, counters add up.
#![cfg_attr(fuzzing, no_main)]

mod harness;
mod world;

use muslin_fuzz::{Seed, for_each_event};

use harness::Harness;

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        // Flow 0 opens, is there, sends and ends; acknowledges; resets.
        &[0, 0, 0, 0],
        &[3, 0, 0],
        &[0, 0, 2, 0, 100],
        &[0, 0, 3, 0],
        &[0, 0, 6, 0],
        &[0, 0, 4, 0],
        &[0, 0, 1, 0],
        &[0, 0, 5, 0],
        // Its socket has bytes, takes some, ends, fails.
        &[3, 0, 2, 255],
        &[3, 0, 3, 10],
        &[3, 0, 4],
        &[3, 0, 5, 0],
        // A datagram, an answer, one from another port, an echo request.
        &[1, 0, 50, 0],
        &[3, 0, 6, 50],
        &[1, 8, 50, 0],
        &[3, 0, 6, 3],
        &[2, 0, 50, 0],
        // Time, a pod's end, a host without sockets.
        &[4, 2],
        &[4, 5],
        &[4, 7],
        &[4, 15],
        &[5, 0],
        &[6, 0],
    ],
    inputs: 20_000,
    max_len: 800,
}

/// Runs the events that `data` stands for. Its first byte chooses a configuration.
fn run(data: &[u8]) {
    let Some((choices, rest)) = data.split_first() else {
        return;
    };
    let mut harness = Harness::new(*choices);
    for_each_event(rest, |input| {
        harness.step(input)?;
        harness.check();
        Ok(())
    });
    harness.finish();
}

/// Those of IPv4, and the same of IPv6.
fn seeds() -> Vec<Seed> {
    let ipv4 = of_ipv4();
    let twins: Vec<_> = ipv4
        .iter()
        .map(|(name, data)| of_ipv6(name, data))
        .collect();
    ipv4.into_iter().chain(twins).collect()
}

/// A seed with its first byte's bit for IPv6.
fn of_ipv6(name: &'static str, data: &[u8]) -> Seed {
    let mut data = data.to_vec();
    data[0] |= 4;
    // As many as there are seeds, once.
    (format!("v6-{name}").leak(), data)
}

fn of_ipv4() -> Vec<Seed> {
    let opened: &[u8] = &[0, 0, 0, 0, 3, 0, 0];
    let with = |choices: u8, parts: &[&[u8]]| [&[choices], opened, &parts.concat()[..]].concat();
    vec![
        // Both streams, then both ends, the pod's first or last.
        (
            "streams",
            with(
                1,
                &[
                    &[0, 0, 2, 0, 100, 0, 0, 6, 0, 3, 0, 2, 255, 3, 0, 2, 7],
                    &[0, 0, 4, 0, 3, 0, 2, 9, 3, 0, 4, 4, 5],
                ],
            ),
        ),
        (
            "streams-host-ends-first",
            with(
                1,
                &[&[
                    3, 0, 2, 255, 3, 0, 4, 0, 0, 3, 0, 0, 0, 2, 0, 9, 0, 0, 4, 0, 4, 4,
                ]],
            ),
        ),
        // The host takes little by little, and the pod sends on.
        (
            "held-back",
            with(
                1,
                &[
                    &[
                        3, 0, 3, 10, 0, 0, 3, 0, 0, 0, 6, 0, 3, 0, 3, 10, 4, 3, 3, 0, 3, 255,
                    ],
                    &[0, 0, 4, 0, 3, 0, 3, 255, 3, 0, 3, 255, 3, 0, 3, 255],
                ],
            ),
        ),
        // Both streams end, while the host has not taken all of the pod's.
        (
            "left-behind",
            with(
                1,
                &[
                    &[3, 0, 3, 10, 0, 0, 3, 0, 0, 0, 4, 0, 3, 0, 4, 0, 0, 1, 0],
                    &[4, 5, 3, 0, 3, 10],
                ],
            ),
        ),
        (
            "left-behind-host-first",
            with(
                1,
                &[
                    &[3, 0, 3, 10, 3, 0, 4, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 1, 0],
                    &[4, 5, 4, 5, 3, 0, 3, 10],
                ],
            ),
        ),
        // The pod does not take what comes, and does later.
        (
            "window",
            with(
                0,
                &[&[
                    0, 0, 7, 0, 3, 0, 2, 255, 3, 0, 2, 255, 4, 4, 0, 0, 1, 0, 4, 3, 0, 0, 1, 0,
                ]],
            ),
        ),
        // Segments that come out of order, twice, or with a number that is wrong.
        (
            "reordered",
            with(
                1,
                &[&[
                    0, 0, 2, 240, 50, 0, 0, 2, 241, 50, 0, 0, 3, 242, 0, 0, 2, 0, 50,
                ]],
            ),
        ),
        ("reset", with(1, &[&[0, 0, 2, 0, 9, 3, 0, 5, 0]])),
        ("given-up", with(1, &[&[0, 0, 2, 0, 9, 0, 0, 5, 0]])),
        (
            "refused",
            vec![1, 0, 0, 0, 0, 3, 0, 1, 0, 0, 1, 0, 0, 3, 1, 1, 1],
        ),
        ("denied", vec![1, 0, 16, 0, 0, 1, 16, 9, 0, 1, 24, 9, 0]),
        (
            "no-sockets",
            vec![1, 6, 0, 0, 0, 0, 0, 1, 0, 9, 0, 6, 3, 2, 0, 9, 0],
        ),
        // Datagrams there and back, several that wait, refused.
        (
            "datagrams",
            vec![
                0, 1, 0, 50, 0, 3, 0, 6, 50, 3, 0, 6, 0, 1, 8, 9, 0, 3, 0, 5, 1, 1, 0, 9, 0, 4, 6,
            ],
        ),
        // One port, two places outside; answers from everywhere.
        (
            "mapping",
            vec![
                0, 1, 0, 50, 0, 1, 8, 20, 0, 3, 0, 6, 0, 3, 0, 6, 3, 3, 0, 6, 6, 3, 0, 6, 9, 3, 0,
                6, 12, 3, 0, 6, 15, 3, 0, 6, 18, 3, 0, 6, 21, 1, 0, 9, 0, 4, 6,
            ],
        ),
        // The process stands still, for minutes and for hours.
        (
            "frozen",
            with(
                1,
                &[&[
                    1, 0, 9, 0, 2, 0, 9, 0, 4, 14, 0, 0, 2, 0, 9, 4, 15, 3, 0, 2, 9, 4, 15, 4, 6,
                ]],
            ),
        ),
        ("superpacket", vec![0, 1, 0, 200, 200, 3, 0, 6, 255]),
        ("pings", vec![0, 2, 0, 50, 0, 3, 0, 7, 50, 2, 0, 0, 0, 4, 6]),
        // A full table: the oldest makes room, if it is idle.
        (
            "full",
            with(
                1,
                &[
                    &[
                        0, 2, 0, 0, 0, 4, 0, 0, 1, 0, 9, 0, 0, 6, 0, 0, 4, 5, 0, 6, 0, 0,
                    ],
                    &[1, 2, 9, 0, 3, 3, 0],
                ],
            ),
        ),
        // A pod vanishes, and its socket speaks too late.
        (
            "vanished",
            with(
                1,
                &[&[1, 0, 9, 0, 5, 0, 7, 0, 0, 0, 2, 0, 9, 0, 0, 0, 0, 4, 4]],
            ),
        ),
        // Idle for hours, whether the pod answers or not.
        ("idle", with(1, &[&[4, 6, 4, 6, 4, 7, 4, 7]])),
        ("silent", with(2, &[&[3, 0, 2, 50, 4, 6, 4, 7]])),
        (
            "broken",
            vec![1, 0, 0, 0, 246, 1, 0, 9, 250, 2, 0, 9, 250, 0, 0, 2, 247, 9],
        ),
    ]
}
