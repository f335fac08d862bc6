//! What takes minutes: traffic whose contents are compared, through faults that come at any time.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use muslin::agent::Agent;
use muslin_lab::{Lab, NodeConfig, descriptors};
use nix::sys::signal::Signal;
use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng as _;

/// Minutes of it, and what the faults follow from.
const MINUTES: &str = "MUSLIN_SOAK_MINUTES";
const SEED: &str = "MUSLIN_SOAK_SEED";
/// Restarts in a row.
const KILLS: usize = 100;
/// Between two faults.
const QUIET: Duration = Duration::from_secs(5);
/// How long a node stands still.
const STANDSTILL: Duration = Duration::from_secs(2);
/// Bytes of one transfer.
const TRANSFER: u64 = 2_000_000;
/// A node holds no more than that after all of it.
const MEMORY: u64 = 64 << 20;
const DESCRIPTORS: usize = 200;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, number)
}

fn config(lab: &Lab, number: u8) -> NodeConfig {
    NodeConfig::new(&format!("n{number}"), address(number), &lab.store())
}

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.unwrap().split_whitespace().nth(1).unwrap();
    kilobytes.parse::<u64>().unwrap() * 1024
}

/// Sends there and back until it is told to end, and counts.
fn keep_sending(agent: &mut Agent, to: SocketAddrV4, ends: &AtomicBool) -> (u64, Vec<String>) {
    let (mut done, mut failed) = (0, Vec::new());
    while !ends.load(Ordering::Relaxed) {
        let sent = agent.open(to).and_then(|id| {
            let sent = agent.exchange(id, TRANSFER, done);
            agent.close(id)?;
            sent
        });
        match sent {
            Ok(sent) => assert!(sent.intact, "transfer {done} to {to} is not what was sent"),
            Err(error) => failed.push(format!("transfer {done} to {to}: {error}")),
        }
        done += 1;
    }
    (done, failed)
}

#[test]
#[ignore = "minutes: make soak"]
fn contents_are_whole_whatever_happens_to_nodes() {
    let Some(lab) = Lab::new() else { return };
    let minutes = variable(MINUTES).unwrap_or(10);
    let seed = variable(SEED).unwrap_or(1);
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    lab.limit(Duration::from_secs(minutes * 60 + 300));
    let mut nodes = [1, 2].map(|number| {
        let host = lab.host(&format!("n{number}"), address(number));
        config(&lab, number).start(&host)
    });
    nodes.iter().for_each(|node| node.wait_peers(1));
    let mut pods = Vec::new();
    for node in &nodes {
        pods.extend(["first", "second"].map(|name| node.pod(name)));
    }
    let ends: Vec<_> = pods
        .iter_mut()
        .map(|pod| SocketAddrV4::new(pod.address("eth0").unwrap(), pod.listen(0).unwrap()))
        .collect();
    // Within each node, and both ways between them.
    let targets = [ends[1], ends[2], ends[3], ends[0]];
    let stops = &AtomicBool::new(false);
    let mut random = Pcg32::new(seed, 1);
    let (mut transfers, mut failed, mut faults) = (0, Vec::new(), 0);
    std::thread::scope(|scope| {
        // All pods are there until the last has ended.
        let senders: Vec<_> = pods
            .iter_mut()
            .zip(targets)
            .map(|(pod, to)| scope.spawn(move || keep_sending(pod, to, stops)))
            .collect();
        while Instant::now() + QUIET < end {
            std::thread::sleep(QUIET);
            let node = &mut nodes[random.next_u32() as usize % 2];
            match random.next_u32() % 3 {
                0 => node.start_again(),
                1 => {
                    node.signal(Signal::SIGTERM);
                    node.wait_exit(muslin_lab::SOON);
                    node.start_again();
                }
                _ => {
                    node.signal(Signal::SIGSTOP);
                    std::thread::sleep(STANDSTILL);
                    node.signal(Signal::SIGCONT);
                }
            }
            faults += 1;
        }
        stops.store(true, Ordering::Relaxed);
        for sender in senders {
            let (done, its) = sender.join().unwrap();
            transfers += done;
            failed.extend(its);
        }
    });
    eprintln!(
        "{transfers} transfers of {} MB there and back, {faults} faults (seed {seed}), {} failed",
        TRANSFER / 1_000_000,
        failed.len()
    );
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(transfers > 0);
    for node in &nodes {
        let (memory, open) = (resident_bytes(node.pid()), descriptors(node.pid()));
        eprintln!("{} kB resident, {open} descriptors", memory / 1024);
        assert!(memory < MEMORY && open < DESCRIPTORS, "{memory}, {open}");
    }
}

#[test]
#[ignore = "minutes: make attack"]
fn a_node_that_is_killed_at_any_time_is_the_same_node() {
    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(900));
    let seed = variable(SEED).unwrap_or(1);
    let mut random = Pcg32::new(seed, 1);
    let host = lab.host("n1", address(1));
    let mut node = config(&lab, 1).start(&host);
    let pod = node.pod("pod");
    let identity = |node: &muslin_lab::Node| (node.status("subnet"), node.status("vtep_mac"));
    let before = identity(&node);
    for _ in 0..KILLS {
        // It may not be ready by then.
        node.start_anew();
        let wait = Duration::from_micros(u64::from(random.next_u32() % 120_000));
        std::thread::sleep(wait);
        node.kill();
    }
    node.start_again();
    assert_eq!(identity(&node), before);
    muslin_lab::poll_until(muslin_lab::SOON, "the pod is back", || {
        (node.query("pods").as_array()?.len() == 1).then_some(())
    });
    drop(pod);
}
