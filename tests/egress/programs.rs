//! Programs that people use, in pods, with servers outside: all that they fetch and send arrives as
//! it was.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::*;

const HTTP: u16 = 8080;
const NAMES: u16 = 5300;

/// The server's addresses, each with the node's that it sees.
const SERVERS: [(IpAddr, IpAddr); 2] = [
    (IpAddr::V4(SERVER), IpAddr::V4(NODE)),
    (IpAddr::V6(SERVER_V6), IpAddr::V6(NODE_V6)),
];

/// Whether a program is there; a test that needs it is skipped else, but not in CI.
fn is_there(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        skip(format_args!("'{program}' is missing"));
    }
    found
}

impl Bed {
    /// Runs a program in a pod of its own, which must succeed.
    fn in_pod(&self, words: &[&str]) -> String {
        let mut command = self.node.client(&["run", "--"]);
        let output = command.args(words).output().unwrap();
        assert!(
            output.status.success(),
            "{words:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.node.log()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// A server of files of a directory.
    fn http(&self, directory: &Path) -> Script {
        let (port, directory) = (HTTP.to_string(), directory.display().to_string());
        let script = include_str!("http.pl");
        Script::serve(&self.server_host, script, &[&port, &directory])
    }
}

/// Bytes of which none look like others.
fn content(len: u32) -> Vec<u8> {
    let byte = |at: u32| (at.wrapping_mul(2_654_435_761) >> 13) as u8;
    (0..len).map(byte).collect()
}

#[test]
fn curl_and_wget_fetch_and_send() {
    if !is_there("curl") || !is_there("wget") {
        return;
    }
    let Some(bed) = Bed::with_ipv6() else { return };
    let files = tempfile::tempdir().unwrap();
    let bytes = content(20_000_000);
    std::fs::write(files.path().join("file"), &bytes).unwrap();
    let mut server = bed.http(files.path());
    for (address, node) in SERVERS {
        fetch_and_send(&bed, SocketAddr::new(address, HTTP), files.path(), &bytes);
        // The server sees the node's host, each of the three times.
        for _ in 0..3 {
            server.expect(&format!("FROM {node}"));
        }
    }
    assert_eq!(bed.node.losses(), [].into());
}

/// Has programs in pods fetch and send the `bytes` of a file.
fn fetch_and_send(bed: &Bed, server: SocketAddr, files: &Path, bytes: &[u8]) {
    let file = |name: &str| files.join(format!("{name}-{}", server.is_ipv6()));
    let text = |name: &str| file(name).display().to_string();
    let url = |name: &str| format!("http://{server}/{name}");
    let curl = [
        "curl",
        "--fail",
        "--silent",
        "--show-error",
        "--globoff",
        "--max-time",
        "60",
    ];
    let wget = ["wget", "--quiet", "--tries=1", "--timeout=60"];
    let run = |words: &[&str], more: &[&str]| bed.in_pod(&[words, more].concat());

    run(&curl, &["--output", &text("by-curl"), &url("file")]);
    assert!(std::fs::read(file("by-curl")).unwrap() == bytes);
    let (sent, whole) = (file("sent"), files.join("file"));
    let name = sent.file_name().unwrap().to_str().unwrap();
    run(
        &curl,
        &["--upload-file", whole.to_str().unwrap(), &url(name)],
    );
    assert!(std::fs::read(sent).unwrap() == bytes);
    run(
        &wget,
        &["--output-document", &text("by-wget"), &url("file")],
    );
    assert!(std::fs::read(file("by-wget")).unwrap() == bytes);
}

#[test]
fn git_clones_by_http() {
    if !is_there("git") {
        return;
    }
    let Some(bed) = Bed::with_ipv6() else { return };
    let files = tempfile::tempdir().unwrap();
    let work = files.path().join("work");
    let work = work.display();
    let directory = files.path().display();
    std::fs::write(files.path().join("big"), content(3_000_000)).unwrap();
    // What a user has set does not count here.
    let own = "export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null HOME=/nonexistent";
    bed.server_host.sh(&format!(
        "{own}
         git -c init.defaultBranch=main init --quiet {work}
         cd {work}
         git config user.name Someone; git config user.email someone@example.org
         for number in 1 2 3 4 5; do
             echo $number >file$number; git add .; git commit --quiet --message $number
         done
         mv {directory}/big .; git add big; git commit --quiet --message big
         git clone --quiet --bare {work} {directory}/bare.git
         git -C {directory}/bare.git update-server-info"
    ));
    let _server = bed.http(files.path());
    let head = |directory: &str| {
        let script = format!("{own}; git -C {directory} rev-list --all");
        bed.server_host.sh(&script)
    };
    for (address, _) in SERVERS {
        let server = SocketAddr::new(address, HTTP);
        let clone = files.path().join(format!("clone-{}", address.is_ipv6()));
        let to = clone.display().to_string();
        bed.in_pod(&[
            "sh",
            "-e",
            "-c",
            &format!(
                "{own}; git clone --quiet http://{server}/bare.git {to}
                 git -C {to} fsck --full --strict"
            ),
        ]);
        assert_eq!(head(&to), head(&work.to_string()));
        assert_eq!(head(&to).lines().count(), 6);
        let big = std::fs::read(clone.join("big")).unwrap();
        assert!(big == content(3_000_000));
    }
}

#[test]
fn dig_asks_by_udp_and_by_tcp() {
    if !is_there("dig") {
        return;
    }
    let Some(bed) = Bed::with_ipv6() else { return };
    let port = NAMES.to_string();
    let _server = Script::serve(&bed.server_host, include_str!("resolver.pl"), &[&port]);
    for (address, _) in SERVERS {
        let server = format!("@{address}");
        let dig = |name: &str, more: &[&str]| {
            let words = ["dig", &server, "-p", &port, "+short", "+tries=1", name, "A"];
            bed.in_pod(&[&words[..], more].concat())
        };
        assert_eq!(dig("name.example", &[]), "192.0.2.77\n");
        // Cut off by UDP, so that dig asks again by TCP.
        assert_eq!(dig("big.example", &[]), "192.0.2.77\n");
        assert_eq!(dig("big.example", &["+ignore"]), "");
        assert_eq!(dig("name.example", &["+tcp"]), "192.0.2.77\n");
    }
}

#[test]
fn a_session_outlives_its_pauses() {
    let Some(mut bed) = Bed::with_ipv6() else {
        return;
    };
    let ids = SERVERS.map(|(address, _)| {
        let server = SocketAddr::new(address, PORT);
        bed.pod.open(server).unwrap()
    });
    for (number, pause) in [0, 50, 500, 2000, 0, 4000].into_iter().enumerate() {
        std::thread::sleep(Duration::from_millis(pause));
        for (id, size) in ids
            .into_iter()
            .flat_map(|id| [1, 40, 3000].map(|it| (id, it)))
        {
            let echoed = bed.pod.exchange(id, size, number as u64).unwrap();
            assert!(echoed.intact && echoed.bytes == size, "{echoed:?}");
        }
    }
    assert_eq!((bed.flows("open"), bed.flows("opened")), (2, 2));
}

#[test]
fn iperf_runs_both_ways() {
    if !is_there("iperf3") {
        return;
    }
    let Some(bed) = Bed::with_ipv6() else { return };
    let mut command = bed.server_host.command("iperf3");
    let mut server = command.args(["--server", "--port", "5201"]);
    server = server.stdout(Stdio::null()).stdin(Stdio::null());
    let mut server = server.spawn().unwrap();
    poll_until(SOON, "iperf3's port", || {
        let listeners = bed
            .server_host
            .run(&["ss", "--listening", "--tcp", "--numeric"]);
        listeners.contains(":5201").then_some(())
    });
    let loads = [
        &[][..],
        &["--reverse"],
        &["--bidir"],
        &["--udp", "--bitrate", "20M"],
    ];
    for ((address, _), more) in SERVERS
        .into_iter()
        .flat_map(|it| loads.map(|load| (it, load)))
    {
        let address = address.to_string();
        let words = ["iperf3", "--client", &address, "--json", "--time", "1"];
        let parallel = ["--parallel", "4"];
        let report = bed.in_pod(&[&words[..], &parallel, more].concat());
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert!(report["error"].is_null(), "{more:?}: {report}");
        let end = &report["end"];
        let received = end["sum_received"]["bytes"].as_f64();
        let received = received.or(end["sum"]["bytes"].as_f64());
        assert!(received > Some(1e6), "{more:?}: {end}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
}
