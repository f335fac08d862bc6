//! What a pod's start and end cost by the CNI plugin, beside Debian's `bridge` with `host-local`: one
//! call alone, ten at once and a hundred at once.
//!
//! `cargo bench --bench cni`; see `benches/README.md`. Both plugins take turns in one run, each on a
//! host of its own, and are called as runtimes call them: environment, standard input, and from before
//! the start of the process until its output is closed.

#![allow(clippy::unwrap_used, reason = "a benchmark may")]

use std::net::Ipv4Addr;
use std::time::Duration;

use muslin_lab::cni::{Key, Network, Output, Runtime};
use muslin_lab::{Lab, NodeConfig};

/// Calls that are measured of each kind, at the least.
const CALLS: usize = 200;
/// How many are made at once.
const AT_ONCE: [usize; 3] = [1, 10, 100];

fn main() {
    if std::env::args().all(|argument| argument != "--bench") {
        // `cargo test --all-targets` only wants to know whether it starts.
        return;
    }
    let Some(lab) = Lab::without_limit() else {
        return;
    };
    let Some(bridge) = Network::bridge("10.88.0.0/24") else {
        return;
    };
    let store = lab.store();
    let addresses = [Ipv4Addr::new(10, 9, 0, 1), Ipv4Addr::new(10, 9, 0, 2)];
    let host = lab.host("n1", addresses[0]);
    host.furnish();
    // Addresses rest for a while before others have them.
    let config = NodeConfig::new("n1", addresses[0], &store).with("--subnet-len", 20);
    let node = config.start(&host);
    let muslin = Runtime::new(&host, &Network::muslin(&node));
    let reference = Runtime::new(&lab.host("reference", addresses[1]), &bridge);
    println!("milliseconds: median and 99th percentile; the ratio is of the medians");
    println!(
        "calls at once |      muslin-cni ADD |          bridge ADD | ratio |      muslin-cni DEL |          bridge DEL | ratio"
    );
    for count in AT_ONCE {
        let [mut ours, mut theirs] = [Times::default(), Times::default()];
        for round in 0..CALLS.div_ceil(count) {
            for (times, runtime) in [(&mut ours, &muslin), (&mut theirs, &reference)] {
                measure(times, runtime, count, round);
            }
        }
        println!(
            "{count:13} | {} | {} | {:5.2} | {} | {} | {:5.2}",
            show(&mut ours.add),
            show(&mut theirs.add),
            ratio(&mut ours.add, &mut theirs.add),
            show(&mut ours.del),
            show(&mut theirs.del),
            ratio(&mut ours.del, &mut theirs.del),
        );
    }
}

/// How long calls took.
#[derive(Default)]
struct Times {
    add: Vec<Duration>,
    del: Vec<Duration>,
}

/// Adds and deletes so many pods at once.
fn measure(times: &mut Times, runtime: &Runtime, count: usize, round: usize) {
    let all = runtime.all_netns(count);
    let keys: Vec<_> = all
        .iter()
        .enumerate()
        .map(|(index, netns)| Key::new(&format!("c{count}-{round}-{index}"), netns.path()))
        .collect();
    let take = |outputs: Vec<Output>| {
        let times = outputs.into_iter().map(|output| {
            assert!(output.is_success(), "{output:?}");
            output.time
        });
        times.collect::<Vec<_>>()
    };
    times.add.extend(take(runtime.add_at_once(&keys)));
    times.del.extend(take(runtime.del_at_once(&keys)));
    for netns in all {
        netns.remove();
    }
}

fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort_unstable();
    let index = (times.len() * percent / 100).min(times.len() - 1);
    times[index].as_secs_f64() * 1e3
}

fn show(times: &mut [Duration]) -> String {
    format!(
        "{:8.1} ms {:6.1} ms",
        percentile(times, 50),
        percentile(times, 99)
    )
}

fn ratio(ours: &mut [Duration], theirs: &mut [Duration]) -> f64 {
    percentile(ours, 50) / percentile(theirs, 50)
}
