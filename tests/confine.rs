//! What a node, and other commands, have taken from themselves, as the kernel tells it.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod lab;

use std::net::Ipv4Addr;
use std::path::Path;

use lab::{Lab, NodeConfig, SOON, poll_until};

fn config(lab: &Lab) -> NodeConfig {
    let store = format!("sqlite:{}", lab.directory().join("leases.db").display());
    NodeConfig::new("n", Ipv4Addr::LOCALHOST, &store)
}

/// A line of a process' or thread's status.
fn line(of: &Path, name: &str) -> String {
    let text = std::fs::read_to_string(of.join("status")).unwrap();
    let found = text.lines().find_map(|line| line.strip_prefix(name));
    found.unwrap().trim_start_matches(':').trim().to_owned()
}

/// Capabilities by their numbers (capability.h).
fn capabilities(of: &Path, set: &str) -> Vec<u32> {
    let bits = u64::from_str_radix(&line(of, set), 16).unwrap();
    (0..64).filter(|bit| bits >> bit & 1 == 1).collect()
}

const NET_ADMIN: u32 = 12;

#[test]
fn what_stays_beside_a_pods_command_can_set_its_interface_and_no_more() {
    let Some(lab) = Lab::new() else { return };
    let node = config(&lab).start(lab.root());
    let mut pod = node.pod("a");
    let beside = pod.child().id();
    let process = format!("/proc/{beside}");
    let main = Path::new(&process);
    poll_until(SOON, "what is given up", || {
        (capabilities(main, "CapEff") == [NET_ADMIN]).then_some(())
    });
    // Its command is user 0 of the pod, with all that this means.
    let command = pod.interfaces().unwrap();
    assert!(command.iter().any(|it| it.name == "eth0"));
    lab::traffic::ping(&mut pod, node.address(1));
}
