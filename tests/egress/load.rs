//! Many connections at once and one after the other, and what they take of the node's memory.

use super::*;

/// Of the node's memory, for each idle connection; its buffers' pages among it.
const MOST_PER_FLOW: u64 = 32 << 10;

/// Resident bytes of a node's process.
pub(crate) fn resident(bed: &Bed) -> u64 {
    let pid = bed.node.query("status")["pid"].as_u64().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
    kibibytes.parse::<u64>().unwrap() << 10
}

fn load(at_once: u64, in_a_row: u64) {
    let Some(bed) = Bed::new(&[]) else { return };
    let port = 9002.to_string();
    let enough = |program: &str| {
        let script = format!("ulimit -n $(ulimit -H -n); exec {program} \"$@\"");
        ["sh".to_owned(), "-c".to_owned(), script, "sh".to_owned()]
    };
    let mut command = bed.server_host.command("sh");
    command.args(&enough("perl")[1..]);
    let mut server = Script::start(command, include_str!("echo.pl"), &[&port]);
    server.expect("READY");
    let mut command = bed.node.client(&["run", "--"]);
    command.args(enough("perl"));
    let (before, counts) = (resident(&bed), [at_once.to_string(), in_a_row.to_string()]);
    let address = SERVER.to_string();
    let arguments = [address.as_str(), &port, &counts[0], &counts[1]];
    let mut client = Script::start(command, include_str!("flows.pl"), &arguments);
    client.expect("OPEN");
    assert_eq!(bed.flows("open"), at_once);
    let each = resident(&bed).saturating_sub(before) / at_once;
    eprintln!("{at_once} idle flows take {each} bytes each");
    assert!(each < MOST_PER_FLOW, "{each} bytes for each idle flow");
    client.go_on();
    client.expect("CLOSED");
    poll_until(SOON, "the end of the flows", || {
        (bed.flows("open") == 0).then_some(())
    });
    client.go_on();
    client.expect("DONE");
    assert_eq!(bed.flows("opened"), at_once + in_a_row);
    poll_until(SOON, "the end of the last flow", || {
        (bed.flows("open") == 0).then_some(())
    });
    let left = resident(&bed).saturating_sub(before);
    eprintln!("{left} bytes more than before are left after {in_a_row} short flows");
    assert!(left < at_once * MOST_PER_FLOW, "{left} bytes are left");
    assert_eq!(bed.node.losses(), [].into(), "{}", bed.node.log());
}

#[test]
fn connections_take_little_memory() {
    load(200, 1000);
}

#[test]
#[ignore = "takes a minute: cargo test --test egress -- --ignored thousands"]
fn thousands_of_connections() {
    load(2000, 10_000);
}
