//! What goes wrong around a node: readers that go, clients that misbehave, signals at any moment.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use muslin_lab::{Lab, Node, NodeConfig, SOON, descriptors, muslin_bin, poll_until, script};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send,
    sendmsg, socket, socketpair,
};
use nix::unistd::Pid;

fn config(lab: &Lab) -> NodeConfig {
    NodeConfig::new("n1", Ipv4Addr::LOCALHOST, &lab.store())
}

fn start(lab: &Lab) -> Node {
    config(lab).start(lab.root())
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Processes that have this path in their arguments.
fn processes_of(path: &Path) -> Vec<String> {
    let path = path.to_str().unwrap();
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(path))
        .collect()
}

#[test]
fn a_node_outlives_the_reader_of_its_log() {
    let Some(lab) = Lab::new() else { return };
    let state = lab.directory().join("state");
    let mut node = lab.root().command(muslin_bin());
    node.args(["node", "--name", "n1", "--public-ip", "127.0.0.1"])
        .arg("--state-dir")
        .arg(&state)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut node = node.spawn().unwrap();
    let mut line = String::new();
    let mut log = BufReader::new(node.stderr.take().unwrap());
    log.read_line(&mut line).unwrap();
    assert!(line.contains("is ready"), "{line}");
    drop(log);
    for _ in 0..2 {
        let mut run = lab.root().command(muslin_bin());
        run.args(["run", "--node", "n1", "--state-dir"])
            .arg(&state)
            .args(["--", "true"]);
        succeeds(&mut run);
    }
    kill(Pid::from_raw(node.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(node.wait().unwrap().code(), Some(0));
}

/// A connection to the control socket that does not wait for anything.
fn client(node: &Node) -> OwnedFd {
    let path = node.state_dir().join("nodes/n1/control.sock");
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let client = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    let address = UnixAddr::new(&path).unwrap();
    poll_until(SOON, "a place in the socket's queue", || {
        connect(client.as_raw_fd(), &address).ok()
    });
    client
}

/// The same when it has said hello.
fn greeted(node: &Node) -> OwnedFd {
    let client = client(node);
    let hello = br#"{"hello":{"protocol":1}}"#;
    send(client.as_raw_fd(), hello, MsgFlags::MSG_NOSIGNAL).unwrap();
    poll_until(SOON, "a welcome", || {
        recv(client.as_raw_fd(), &mut [0; 1024], MsgFlags::empty()).ok()
    });
    client
}

#[test]
fn clients_that_do_not_read_or_speak_hold_up_nobody() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let silent: Vec<_> = (0..100).map(|_| client(&node)).collect();
    let deaf: Vec<_> = (0..10).map(|_| greeted(&node)).collect();
    let (drops, garbage) = (br#"{"report":"drops"}"#, [b'['; 30_000]);
    for client in &deaf {
        for message in [&drops[..], &garbage[..]].into_iter().cycle().take(5000) {
            match send(client.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL) {
                Ok(_) => {}
                // The node waits for this one to read.
                Err(Errno::EAGAIN) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert_eq!(node.query("pods"), serde_json::json!([]));
    succeeds(&mut node.client(&["run", "--", "true"]));
    drop((silent, deaf));
    succeeds(&mut node.client(&["run", "--", "true"]));
}

#[test]
fn a_node_that_was_out_of_descriptors_serves_again() {
    let Some(lab) = Lab::new() else { return };
    let node = config(&lab).logs("info,muslin::worker=debug");
    let node = node.start(lab.root());
    let mut pod = node.pod_after("web", &["-p", "7000:8080"], "");
    assert_eq!(pod.listen(8080).unwrap(), 8080);
    lab.root().leaves_descriptors(node.pid(), 6);

    // The kernel connects them all, and the node can take only some of them.
    let mut crowd = script::crowd(lab.root(), 7000);
    let says = |what: &str| {
        poll_until(SOON, what, || node.log().contains(what).then_some(()));
    };
    says("0.0.0.0:7000->8080/tcp pauses");
    let mut waiting = node
        .client(&["pods"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    says("cannot accept on the control socket");

    // Those who waited have gone without a word when there is room again.
    crowd.kill();
    poll_until(SOON, "an answer to who waits", || {
        let status = waiting.try_wait().unwrap()?;
        assert!(status.success(), "{status}");
        Some(())
    });
    let mut client = lab.root().agent();
    let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7000);
    let id = client.open(to).unwrap();
    assert!(client.exchange(id, 100_000, 1).unwrap().intact);
}

/// Sends a request to attach with these descriptors, and reads the answer.
fn attach(client: &OwnedFd, name: &str, descriptors: &[RawFd]) -> String {
    let request = format!(
        r#"{{"attach":{{"pod":{name:?},"address":null,"persistent":false,"publish":[]}}}}"#
    );
    let control = [ControlMessage::ScmRights(descriptors)];
    let control = if descriptors.is_empty() {
        &[][..]
    } else {
        &control
    };
    let request = [IoSlice::new(request.as_bytes())];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(client.as_raw_fd(), &request, control, flags, None).unwrap();
    let mut answer = vec![0; 65_536];
    let len = poll_until(SOON, "an answer", || {
        recv(client.as_raw_fd(), &mut answer, MsgFlags::empty()).ok()
    });
    String::from_utf8_lossy(&answer[..len]).into_owned()
}

/// The same where it is refused.
fn refusal(client: &OwnedFd, name: &str, descriptors: &[RawFd]) {
    let answer = attach(client, name, descriptors);
    assert!(answer.contains("refused"), "{answer}");
}

#[test]
fn who_shares_a_descriptor_cannot_make_the_node_wait() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab);
    let mut pod = node.pod("pod");
    let (other, _other) = (node.address(3), node.pod("other"));
    let (client, flags) = (greeted(&node), SockFlag::SOCK_CLOEXEC);
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (near, far) = pair.unwrap();
    let answer = attach(&client, "hostile", &[near.as_raw_fd()]);
    assert!(answer.contains("attached"), "{answer}");
    // O_NONBLOCK is the open file's, which both have.
    fcntl(&near, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    // The node reads what there is, and once more.
    let (header, broadcast) = ([0; 10], [0xff; 6]);
    let frame = [&header[..], &broadcast, &[2, 0, 0, 0, 0, 9, 8, 6], &[0; 46]].concat();
    for _ in 0..3 {
        send(far.as_raw_fd(), &frame, MsgFlags::MSG_NOSIGNAL).unwrap();
        muslin_lab::traffic::ping(&mut pod, other);
    }
    assert_eq!(node.query("status")["trouble"], serde_json::Value::Null);
    node.signal(Signal::SIGTERM);
    assert_eq!(node.wait_exit(SOON), Some(0));
    drop(far);
}

#[test]
fn what_comes_with_a_request_that_is_refused_is_closed() {
    let Some(lab) = Lab::new() else { return };
    // Room for five pods.
    let node = config(&lab).with("--network", "10.244.0.0/24");
    let node = node.with("--subnet-len", 29).start(lab.root());
    let _pods: Vec<_> = ["first", "second", "third", "fourth", "fifth"]
        .map(|name| {
            node.pod_after(
                name,
                if name == "first" {
                    &["-p", "7000:80"]
                } else {
                    &[]
                },
                "",
            )
        })
        .into();
    let address = node.address(2).to_string();
    let before = descriptors(node.pid());

    let cases: [(&[&str], &str); 5] = [
        (&["--name", "first"], "'first'"),
        (&["--ip", &address], &address),
        (&["--ip", "10.200.0.2"], "10.200.0.2"),
        (&["-p", "7000:80"], "7000/tcp"),
        (&[], "addresses of the subnet"),
    ];
    for (flags, part) in cases {
        for _ in 0..4 {
            let words = [&["run"], flags, &["--", "true"]].concat();
            let output = node.client(&words).output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && told.contains(part), "{told}");
        }
    }
    let client = greeted(&node);
    let file = File::open("/dev/null").unwrap();
    let null = file.as_raw_fd();
    for _ in 0..50 {
        refusal(&client, "other", &[]);
        refusal(&client, "other", &[null]);
        refusal(&client, "other", &[null; 64]);
        refusal(&client, "Bad_Name", &[null; 2]);
    }
    drop(client);
    poll_until(SOON, "the same number of descriptors", || {
        (descriptors(node.pid()) <= before).then_some(())
    });
}

#[test]
fn a_pod_needs_no_directory_for_its_files() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let mut run = node.client(&["run", "--name", "web", "--", "cat", "/etc/hosts"]);
    let hosts = succeeds(run.env("TMPDIR", "/nowhere"));
    assert!(hosts.contains("\tweb\n"), "{hosts}");
    let script = "mount | grep -c '^muslin on /etc/'; test -e /proc/self/status";
    assert_eq!(
        succeeds(&mut node.client(&["run", "--", "sh", "-e", "-c", script])),
        "2\n"
    );
}

#[test]
fn a_killed_run_takes_its_command_along() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let marker = lab.directory().join("marker");
    let script = "trap '' HUP INT TERM; touch \"$0\"; while :; do sleep 1; done";
    let mut run = node.client(&["run", "--", "sh", "-c", script]);
    let mut run = run.arg(&marker).spawn().unwrap();
    poll_until(SOON, "the command's start", || {
        marker.exists().then_some(())
    });
    run.kill().unwrap();
    run.wait().unwrap();
    poll_until(SOON, "the command's end", || {
        processes_of(&marker).is_empty().then_some(())
    });
}

#[test]
fn an_ignored_signal_stays_ignored_in_a_pod() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let ignored = |status: &str| {
        let line = status.lines().find(|line| line.starts_with("SigIgn"));
        let digits = line.and_then(|line| line.rsplit('\t').next());
        u64::from_str_radix(digits.unwrap(), 16).unwrap() & 0b111
    };
    let mask = |traps: &str| {
        let run = node.client(&["run", "--", "cat", "/proc/self/status"]);
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{traps}\nexec \"$@\""), "sh"]);
        shell.arg(run.get_program()).args(run.get_args());
        ignored(&succeeds(&mut shell))
    };
    // The tests may be in the background themselves.
    let ours = ignored(&std::fs::read_to_string("/proc/self/status").unwrap());
    assert_eq!(mask(""), ours);
    assert_eq!(mask("trap '' HUP"), ours | 0b001, "nohup");
    assert_eq!(mask("trap '' INT QUIT"), ours | 0b110, "'&' in a script");
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    let Some(lab) = Lab::new() else { return };
    let moments = [0, 2, 5, 10, 20, 40, 80, 150, 300, 600, 1200, 2500, 4000];
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    for (moment, signal) in moments.into_iter().zip(signals.into_iter().cycle()) {
        let directory = tempfile::tempdir().unwrap();
        // What is ignored where the tests run, as under nohup, is not to be ignored here.
        let mut demo = lab.root().command("env");
        demo.args(["--default-signal=INT,TERM,HUP", muslin_bin()])
            .args(["demo", "--megabytes", "1"])
            .env("TMPDIR", directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let demo = demo.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(moment));
        kill(Pid::from_raw(demo.id() as i32), signal).unwrap();
        let output = demo.wait_with_output().unwrap();
        let what = format!("{signal} after {moment} ms: {output:?}");
        // Before it listens for signals the process ends by them, with nothing begun yet.
        let interrupted = output.status.code() == Some(128 + signal as i32)
            || std::os::unix::process::ExitStatusExt::signal(&output.status).is_some();
        assert!(interrupted || output.status.success(), "{what}");
        let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
        assert!(left.is_empty(), "{what}: {left:?}");
        // A pod that was about to start ends on its own at the end of its input.
        poll_until(SOON, &what, || {
            processes_of(directory.path()).is_empty().then_some(())
        });
    }
}

#[test]
fn two_demos_at_once_do_not_meet() {
    let Some(lab) = Lab::new() else { return };
    let demos: Vec<_> = (0..3)
        .map(|_| {
            let mut demo = lab.root().command(muslin_bin());
            demo.args(["demo", "--megabytes", "1", "--json"])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            demo.spawn().unwrap()
        })
        .collect();
    for demo in demos {
        let output = demo.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {stderr}", output.status);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["ok"], true);
    }
}
