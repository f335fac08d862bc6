//! Commands in pods: `muslin run`, in the foreground and detached, and `muslin exec`.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use muslin_lab::processes::marked;
use muslin_lab::{Lab, Node, NodeConfig, SOON, muslin_bin, poll_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Failed at run time.
const FAILED: Option<i32> = Some(1);
/// Wrong usage.
const USAGE: Option<i32> = Some(2);
/// Until what ends by itself has ended, on a busy machine.
const LATER: Duration = Duration::from_secs(60);

fn start(lab: &Lab) -> Node {
    NodeConfig::new("n", Ipv4Addr::LOCALHOST, &lab.store()).start(lab.root())
}

/// Runs a client's command, which must succeed, and returns what it prints.
#[track_caller]
fn client(node: &Node, words: &[&str]) -> String {
    let output = node.client(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Checks that a client's command fails so, with these words on stderr.
#[track_caller]
fn fails(node: &Node, words: &[&str], code: Option<i32>, expected: &[&str]) {
    let output = node.client(words).output().unwrap();
    assert_eq!(output.status.code(), code, "{words:?}: {output:?}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    for word in expected {
        assert!(stderr.contains(word), "no '{word}': {stderr}");
    }
}

fn pods(node: &Node) -> Vec<(String, String)> {
    let rows = node.query("pods");
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| (text(row, "pod"), text(row, "address")))
        .collect()
}

fn wait_for_pods(node: &Node, count: usize) {
    let what = format!("{count} pods");
    poll_until(SOON, &what, || (pods(node).len() == count).then_some(()));
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A process that is killed when the test fails.
struct ChildProcess(Child);

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_follows_the_first_word_is_the_commands_own() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let echo = ["sh", "-c", r#"echo "$MUSLIN_POD" "$@""#, "sh"];
    let arguments = ["--name", "b", "-d", "--", "-etcd-prefix=/x", "--help"];
    let expected = format!("a {}\n", arguments.join(" "));
    for dashes in [&[][..], &["--"][..]] {
        let run = [&["run", "--name", "a"], dashes, &echo, &arguments].concat();
        assert_eq!(client(&node, &run), expected, "{dashes:?}");
        wait_for_pods(&node, 0);
        let level = ["sidecar", "--level", "process", "--pod", "a"];
        let sidecar = [&level, dashes, &echo, &arguments].concat();
        assert_eq!(client(&node, &sidecar), expected, "{dashes:?}");
        wait_for_pods(&node, 0);
    }
    let pod = node.pod("a");
    for dashes in [&[][..], &["--"][..]] {
        let exec = [&["exec", "a"], dashes, &echo, &arguments].concat();
        assert_eq!(client(&node, &exec), expected, "{dashes:?}");
    }
    drop(pod);
    // What is no option of muslin's is no command either.
    fails(
        &node,
        &["run", "--nonsense", "true"],
        USAGE,
        &["--nonsense"],
    );
}

#[test]
fn a_command_is_run_in_a_pod_that_runs() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab);
    let mut web = node.pod("web");
    let address = web.address("eth0").unwrap().to_string();
    let script = r#"hostname; cat /etc/hosts; ip -o addr show eth0; pwd
        echo "$MUSLIN_POD $MUSLIN_NODE $MUSLIN_ADDRESS"; exit 42"#;
    let inside = |node: &Node| {
        let state = node.state_dir().display().to_string();
        let exec = ["exec", "--state-dir", &state, "web", "sh", "-c", script];
        let directory = lab.directory().display().to_string();
        let there = [
            "sh",
            "-c",
            r#"cd "$0"; exec "$@""#,
            &directory,
            muslin_bin(),
        ];
        let output = lab.root().output(&[&there[..], &exec].concat());
        assert_eq!(output.status.code(), Some(42), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        for expected in [
            "web\n",
            &format!("{address}\tweb\n"),
            &format!("inet {address}/24"),
            &format!("{}\n", lab.directory().display()),
            &format!("web n {address}\n"),
        ] {
            assert!(text.contains(expected), "no '{expected}': {text}");
        }
    };
    inside(&node);
    // The node's successor knows the pod, too.
    node.start_again();
    wait_for_pods(&node, 1);
    let ready = || {
        let output = node.client(&["exec", "web", "true"]).output().unwrap();
        output.status.success().then_some(())
    };
    poll_until(SOON, "the pod is entered", ready);
    inside(&node);

    fails(
        &node,
        &["exec", "web", "/nonexistent"],
        Some(127),
        &["/nonexistent"],
    );
    fails(
        &node,
        &["exec", "nobody", "true"],
        FAILED,
        &["no pod named 'nobody'"],
    );

    // The process is as the command: what it is told, the command is, and has the terminal.
    let trap = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done";
    let mut command = node.client(&["exec", "web", "--", "sh", "-c", trap]);
    let mut child = ChildProcess(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    let output = child.0.stdout.take().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    kill(Pid::from_raw(child.0.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(7));
    let state = node.state_dir();
    let muslin = muslin_bin();
    let exec = format!(
        "{muslin} exec --state-dir {} web -- sh -c 'test -t 0 && test -t 1 && exit 9'",
        state.display()
    );
    let terminal = lab.root().output(&["script", "-qec", &exec, "/dev/null"]);
    assert_eq!(terminal.status.code(), Some(9), "{terminal:?}");
}

#[test]
fn of_other_pods_a_command_enters_the_network_if_they_have_one() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let target = lab.namespace("target");
    client(
        &node,
        &[
            "attach",
            "--pid",
            &target.pid().to_string(),
            "--name",
            "there",
        ],
    );
    let address = pods(&node)[0].1.clone();
    let seen = client(
        &node,
        &["exec", "there", "ip", "-o", "addr", "show", "eth0"],
    );
    assert!(seen.contains(&format!("inet {address}/")), "{seen}");
    client(&node, &["detach", "there"]);
    fails(&node, &["exec", "there", "true"], FAILED, &["'there'"]);

    let words = [
        "sidecar", "--level", "process", "--pod", "side", "--", "sleep", "1000",
    ];
    let _side = ChildProcess(node.client(&words).spawn().unwrap());
    wait_for_pods(&node, 1);
    fails(
        &node,
        &["exec", "side", "true"],
        FAILED,
        &["'side'", "no namespace"],
    );
}

#[test]
fn a_detached_pod_outlives_its_terminal_and_its_node() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab);
    // A daemon of its own session would outlive the command.
    let mark = format!("MUSLIN_TEST_DAEMON={}", lab.directory().display());
    let script = format!(
        "{mark} setsid sleep 1000 & echo $MUSLIN_POD; echo problem >&2; cat
        echo no more to read; exec sleep 1000"
    );
    let state = node.state_dir().display().to_string();
    let muslin = muslin_bin();
    let run = format!("{muslin} run --state-dir {state} -d --name job sh -c '{script}'");
    let started = lab.root().output(&["script", "-qec", &run, "/dev/null"]);
    assert!(started.status.success(), "{started:?}");
    assert_eq!(String::from_utf8_lossy(&started.stdout).trim(), "job");
    let before = pods(&node);
    assert_eq!(before.len(), 1);
    let logs = poll_until(SOON, "the pod's output", || {
        let logs = client(&node, &["logs", "job"]);
        logs.ends_with("no more to read\n").then_some(logs)
    });
    assert_eq!(logs, "job\nproblem\nno more to read\n");
    let daemons = || marked(&mark).len();
    assert_eq!(daemons(), 1);
    let directory = node.state_dir().join("pods/n/job");
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory.join("log")), 0o600);
    assert_eq!(mode(&directory), 0o700);

    node.start_again();
    poll_until(SOON, "the pod is back", || {
        (pods(&node) == before).then_some(())
    });
    assert_eq!(daemons(), 1);
    fails(
        &node,
        &["rm", "job"],
        FAILED,
        &["'job' is running", "muslin stop job"],
    );
    fails(
        &node,
        &["run", "-d", "--name", "job", "true"],
        FAILED,
        &["'job'"],
    );

    client(&node, &["stop", "job"]);
    assert_eq!(daemons(), 0, "nothing is left of it");
    wait_for_pods(&node, 0);
    let output = node.client(&["logs", "-f", "job"]).output().unwrap();
    // A node that was long in starting is told of behind it.
    assert!(String::from_utf8_lossy(&output.stdout).contains("\nproblem\nno more to read\n"));
    assert!(stderr(&output).contains("exit code 143"), "{output:?}");
    client(&node, &["stop", "job"]);

    assert_eq!(
        client(&node, &["run", "-d", "--name", "job", "echo", "anew"]),
        "job\n"
    );
    let again = || (client(&node, &["logs", "-f", "job"]) == "anew\n").then_some(());
    poll_until(SOON, "the log of the new pod alone", again);
    client(&node, &["rm", "job"]);
    assert!(!directory.exists());
    fails(&node, &["logs", "job"], FAILED, &["no pod named 'job'"]);
}

#[test]
fn what_a_detached_pod_cannot_do_is_told_at_once() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let missing = ["run", "-d", "--name", "job", "/nonexistent"];
    fails(&node, &missing, Some(127), &["cannot run /nonexistent"]);
    fails(
        &node,
        &["run", "-d", "/etc/passwd"],
        Some(126),
        &["/etc/passwd"],
    );
    fails(&node, &["run", "-d"], USAGE, &["command"]);
    fails(
        &node,
        &["run", "-d", "--ip", "10.200.0.2", "true"],
        USAGE,
        &["10.200.0.2"],
    );
    wait_for_pods(&node, 0);
    for words in [&["logs", "job"][..], &["stop", "job"], &["rm", "job"]] {
        fails(
            &node,
            words,
            FAILED,
            &["no pod named 'job'", "muslin run -d"],
        );
    }
    let fore = node.pod("fore");
    fails(
        &node,
        &["stop", "fore"],
        FAILED,
        &["'fore'", "muslin run -d"],
    );
    drop(fore);
}

#[test]
fn the_log_of_a_loud_pod_is_followed_and_bounded() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    // It waits until somebody follows, and does not end when it is asked to.
    let script = r#"trap '' TERM; echo begin; while ! [ -e "$1" ]; do sleep 0.01; done
        i=0; while [ $i -lt 300 ]; do head -c 65536 /dev/zero | tr '\0' x; i=$((i + 1)); done
        echo; echo end; exec sleep 1000"#;
    let go = lab.directory().join("go");
    let words = ["run", "-d", "--name", "loud", "sh", "-c", script, "sh"];
    let at = go.display().to_string();
    let words = [&words[..], &[&at]].concat();
    client(&node, &words);
    let mut follower = node.client(&["logs", "--follow", "loud"]);
    let mut follower = ChildProcess(follower.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(follower.0.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert_eq!(next(), "begin");
    std::fs::write(&go, "").unwrap();
    let long = next();
    assert!(long.bytes().all(|byte| byte == b'x'));
    assert_eq!(next(), "end");

    let directory = node.state_dir().join("pods/n/loud");
    let files = std::fs::read_dir(&directory).unwrap();
    let sizes = files.map(|file| file.unwrap().metadata().unwrap().len());
    let (all, wrote) = (sizes.sum::<u64>(), 300 << 16);
    assert!((4 << 20..9 << 20).contains(&all), "{all} of {wrote}");
    let kept = client(&node, &["logs", "loud"]);
    assert!(
        kept.ends_with("x\nend\n") && kept.len() >= 4 << 20,
        "{}",
        kept.len()
    );

    client(&node, &["stop", "--time", "0", "loud"]);
    poll_until(LATER, "the follower ends with the pod", || {
        follower.0.try_wait().unwrap()
    });
    let output = node.client(&["logs", "loud"]).output().unwrap();
    assert!(stderr(&output).contains("exit code 137"));
}
