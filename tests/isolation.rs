//! What a pod of `muslin run` can see and do of what is outside, and what is left of it at its end.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use muslin_lab::processes::marked;
use muslin_lab::{Lab, Node, NodeConfig, SOON, muslin_bin, poll_until};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The variable by which a pod's processes are known outside.
const MARK: &str = "MUSLIN_TEST_POD";

fn start(lab: &Lab) -> Node {
    NodeConfig::new("n", Ipv4Addr::LOCALHOST, &lab.store()).start(lab.root())
}

/// What a pod's shell script prints, which must succeed.
#[track_caller]
fn prints(node: &Node, flags: &[&str], script: &str, arguments: &[&str]) -> String {
    let words = [
        &["run"],
        flags,
        &["--", "sh", "-c", script, "sh"],
        arguments,
    ]
    .concat();
    succeeds(&mut node.client(&words))
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Before a command that is to have a session of its own, wherever the test has been started.
fn session(flags: &[&str]) -> Command {
    let mut session = Command::new("env");
    session.args(["--default-signal", "setsid"]).args(flags);
    session
}

/// A command without a terminal.
fn without_terminal(command: &Command) -> Command {
    let mut session = session(&[]);
    session.arg(command.get_program()).args(command.get_args());
    session
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

#[test]
fn a_pod_sees_and_signals_its_own_processes_alone() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let other = node.pod("other");
    let script = r#"
        echo /proc/[0-9]*; echo $$
        for pid in "$@"; do
            kill -0 $pid 2>/dev/null && echo "may signal $pid"
            test -e /proc/$pid && echo "sees $pid"
        done
        # Its own it may signal, but not what all of the pod hangs on.
        sleep 1000 & kill $! && wait $! ; echo $?; kill -KILL 1; kill -TERM 1; cat /proc/1/comm
        cat /proc/1/environ 2>/dev/null | wc -c; readlink /proc/1/root /proc/1/fd/*; echo end"#;
    let strangers = [node.pid().to_string(), std::process::id().to_string()];
    let strangers = strangers.each_ref().map(String::as_str);
    let seen = prints(&node, &[], script, &strangers);
    assert_eq!(seen, "/proc/1 /proc/2\n2\n143\nmuslin\n0\nend\n");
    drop(other);
}

#[test]
fn what_a_command_leaves_running_ends_with_it() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let mark = format!("{MARK}={}", lab.directory().display());
    let script = format!("export {mark}; sleep 1000 & setsid sleep 1000 & echo hi; exit 3");
    // They hold its output, and would for ever.
    let run = node
        .client(&["run", "--", "sh", "-c", &script])
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(3), "{run:?}");
    assert_eq!(run.stdout, b"hi\n");
    assert_eq!(marked(&mark).len(), 0);
}

#[test]
fn orphans_in_a_pod_do_not_stay_as_zombies() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let script = r#"(sh -c 'echo orphan $PPID; exit 3' &)
        until set -- /proc/[0-9]*; test $# -eq 2; do sleep 0.01; done; echo clean"#;
    let seen = prints(&node, &[], script, &[]);
    assert!(
        seen.ends_with("\nclean\n") && seen.lines().count() == 2,
        "{seen}"
    );
}

#[test]
fn a_run_ends_as_its_command_does() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    for (script, code) in [
        ("exit 42", 42),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("kill -SEGV $$", 139),
    ] {
        let run = node.client(&["run", "--", "sh", "-c", script]).output();
        assert_eq!(run.unwrap().status.code(), Some(code), "{script}");
    }
}

#[test]
fn a_run_passes_on_what_asks_it_to_end() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    // All of a shell's job has it, not the shell alone.
    let script = r#"trap 'echo caught' INT TERM HUP QUIT
        sh -c 'trap "echo inner; exit 3" INT TERM HUP QUIT; echo ready; while :; do sleep 0.01; done'
        echo $?; exit 7"#;
    for asked in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        let run = node.client(&["run", "--", "sh", "-c", script]);
        let mut run = without_terminal(&run);
        let mut run = run.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = run.stdout.take().unwrap();
        let mut line = [0; 6];
        output.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"ready\n");
        signal(&run, asked);
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "inner\ncaught\n3\n", "{asked}");
        assert_eq!(run.wait().unwrap().code(), Some(7), "{asked}");
    }
}

/// A command on a terminal of its own, and the other end of that.
fn on_terminal(command: &Command) -> (Child, File) {
    let pair = openpty(None, None).unwrap();
    let (ours, theirs) = (File::from(pair.master), File::from(pair.slave));
    let again = || Stdio::from(OwnedFd::from(theirs.try_clone().unwrap()));
    let mut session = session(&["--ctty", "--wait", "--"]);
    session.arg(command.get_program()).args(command.get_args());
    session.stdin(again()).stdout(again()).stderr(again());
    (session.spawn().unwrap(), ours)
}

/// Reads from a terminal until this has come.
fn read_until(terminal: &mut File, wanted: &str) -> String {
    let mut text = String::new();
    let mut bytes = [0; 256];
    while !text.contains(wanted) {
        // The end of a terminal is an error (EIO).
        let len = terminal.read(&mut bytes).unwrap_or(0);
        assert_ne!(len, 0, "no '{wanted}': {text}");
        text += &String::from_utf8_lossy(&bytes[..len]);
    }
    text
}

#[test]
fn what_is_typed_reaches_a_command_and_then_the_shell_again() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let caught = r#"trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.01; done"#;
    for words in [["run", "--name"], ["exec", "--"]] {
        let pod = (words[0] == "exec").then(|| node.pod("a"));
        let run = [&words[..], &["a", "sh", "-c", caught]].concat();
        let (mut child, mut terminal) = on_terminal(&node.client(&run));
        read_until(&mut terminal, "ready");
        terminal.write_all(b"\x03").unwrap();
        read_until(&mut terminal, "caught");
        assert_eq!(child.wait().unwrap().code(), Some(7), "{words:?}");
        drop(pod);
    }
    // A shell in a pod makes its jobs own the terminal, as this does.
    let owner = r#"$SIG{TTOU} = "IGNORE"; setpgid(0, 0); tcsetpgrp(0, $$) or die "tcsetpgrp: $!""#;
    let run = node.client(&["run", "--", "perl", "-MPOSIX", "-e", owner]);
    let mut script = Command::new("sh");
    script.args([
        "-c",
        r#""$@" || exit; echo ready; read line; echo "read $line""#,
        "sh",
    ]);
    script.arg(run.get_program()).args(run.get_args());
    let (mut child, mut terminal) = on_terminal(&script);
    read_until(&mut terminal, "ready");
    terminal.write_all(b"words\n").unwrap();
    read_until(&mut terminal, "read words");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Ways to a file that is hidden, of which each that works is printed.
const WAYS: &str = r#"
    file=$1; hidden=$2; above=$(dirname "$hidden")
    test -e "$file" && echo by its path
    umount "$hidden" 2>/dev/null && echo by umount
    umount -l "$hidden" 2>/dev/null && echo by umount -l
    umount -R /proc 2>/dev/null && echo by umount of /proc
    mkdir "$above/$$"; mount -t tmpfs none "$above/$$"; at="$above/$$/all"; mkdir "$at"
    mount --bind "$above" "$at" 2>/dev/null && find "$at" -name "$(basename "$file")"
    mount --rbind "$above" "$at" && find "$at" -name "$(basename "$file")"
    mount -t overlay -o lowerdir="$hidden:/etc" none "$at" 2>/dev/null && find "$at" -name "$(basename "$file")"
    mount --move "$hidden" "$at" 2>/dev/null && echo by moving what hides it
    mount -o remount,bind "$hidden" 2>/dev/null; test -e "$file" && echo by remounting
    unshare --mount sh -c 'umount "$0"' "$hidden" 2>/dev/null && echo by another namespace
    unshare --user --map-root-user --mount sh -c 'umount "$0"' "$hidden" 2>/dev/null && echo by another user
    for process in ${3:-/proc/[0-9]*}; do
        for way in root cwd; do
            test -e $process/$way$file && echo by $process/$way
        done
        nsenter --mount=$process/ns/mnt test -e "$file" 2>/dev/null && echo by the mounts of $process
    done
    test -e nodes && echo by the working directory
    ls -A "$hidden" | wc -l"#;

#[test]
fn a_pods_root_finds_no_way_to_the_control_socket() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let state = node.state_dir();
    let socket = state.join("nodes/n/control.sock");
    let [file, hidden] = [&socket, &state].map(|path| path.to_str().unwrap());
    // It begins in the directory that is hidden.
    let there = |words: &[&str]| {
        let mut command = lab.root().command("sh");
        command
            .args(["-c", r#"cd "$0" && exec "$@""#, hidden])
            .args(words);
        succeeds(&mut command)
    };
    // That they are ways is seen outside.
    let outside = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        WAYS,
        "sh",
        file,
        hidden,
        "/proc/self",
    ];
    let found = there(&outside);
    for way in [
        "by its path",
        "/all/state/nodes/n/control.sock",
        "by /proc/self/root",
        "by the mounts",
        "by the working directory",
    ] {
        assert!(found.contains(way), "no '{way}': {found}");
    }
    let ways = ["--", "sh", "-c", WAYS, "sh", file, hidden];
    assert_eq!(
        there(&[&[muslin_bin(), "run", "--state-dir", hidden], &ways[..]].concat()),
        "0\n"
    );
    let ask = [
        "run",
        "--",
        "env",
        "-u",
        "MUSLIN_NODE",
        muslin_bin(),
        "status",
        "--socket",
        file,
    ];
    let asked = node.client(&ask).output().unwrap();
    assert_eq!(asked.status.code(), Some(1), "{asked:?}");
    // By another mount of the same file system it is out of sight, too.
    let other = lab.directory().join("other");
    std::fs::create_dir(&other).unwrap();
    let other = other.to_str().unwrap();
    let above = state.parent().unwrap().to_str().unwrap();
    lab.root().run(&["mount", "--bind", above, other]);
    let file = format!("{other}/state/nodes/n/control.sock");
    lab.root().run(&["test", "-S", &file]);
    let script = r#"ls -A "$1" "$1/state" | sort; test -e "$2" && echo there; umount "$1/state""#;
    let seen = node
        .client(&["run", "--", "sh", "-c", script, "sh", other, &file])
        .output();
    let seen = String::from_utf8(seen.unwrap().stdout).unwrap();
    assert!(
        seen.contains("\nstate\n") && !seen.contains("nodes") && !seen.contains("there"),
        "{seen}"
    );
    // In a directory of its own, or as a file among others, it is out of sight as well.
    let elsewhere = lab.directory().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let other = elsewhere.join("other.sock");
    std::fs::write(elsewhere.join("beside"), "").unwrap();
    std::os::unix::fs::symlink(&socket, elsewhere.join("link.sock")).unwrap();
    std::fs::hard_link(&socket, &other).unwrap();
    let script = r#"test -S "$0" && echo there; ls -A "$(dirname "$0")""#;
    for (mode, seen) in [("700", ""), ("755", "beside\nlink.sock\nother.sock\n")] {
        lab.root()
            .run(&["chmod", mode, elsewhere.to_str().unwrap()]);
        let mut run = lab.root().command(muslin_bin());
        run.args(["run", "--socket"]).arg(&other);
        run.args(["--", "sh", "-c", script]).arg(&other);
        assert_eq!(succeeds(&mut run), seen, "{mode}");
    }
}

#[test]
fn a_pods_user_is_root_or_the_caller_without_rights() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let script = r#"echo $(id -u) $(id -g) $(stat -c '%u' "$1")
        sed -n 's/^CapEff:\t//p' /proc/self/status; hostname other 2>/dev/null && echo may name itself
        perl -MSocket -e 'socket(my $s, PF_INET, SOCK_STREAM, 0);
            print bind($s, pack_sockaddr_in(80, INADDR_ANY)) ? "port 80\n" : "no port: $!\n";
            print socket(my $p, PF_INET, SOCK_DGRAM, 1) ? "pings\n" : "no pings: $!\n"'"#;
    let mine = lab.directory().to_str().unwrap();
    // In a lab all are user 0, but in a namespace.
    let run = |flags: &[&str]| {
        let words = [&["run"], flags, &["--", "sh", "-c", script, "sh", mine]].concat();
        let client = node.client(&words);
        let mut caller = node.host().command("unshare");
        caller.args(["--user", "--map-user=1000", "--map-group=1001"]);
        caller.arg("--keep-caps").arg("--").arg(muslin_bin());
        let arguments = client.get_args().skip_while(|word| *word != "run");
        succeeds(caller.args(arguments))
    };
    let seen = run(&["--user"]);
    let rights = "0000000000000000";
    assert_eq!(seen, format!("1000 1001 1000\n{rights}\nport 80\npings\n"));
    let seen = run(&[]);
    assert!(
        seen.starts_with("0 0 0\n") && !seen.contains(rights),
        "{seen}"
    );
    assert!(
        seen.ends_with("may name itself\nport 80\npings\n"),
        "{seen}"
    );
}

#[test]
fn a_command_has_of_the_environment_what_it_is_given() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let given = [
        ("SECRET_TOKEN", "xyz"),
        ("GIVEN", "by name"),
        ("MUSLIN_ETCD_PASSWORD", "pw"),
        ("HOME", "/home/someone"),
        ("TERM", "dumb"),
    ];
    let variables = |words: &[&str]| {
        let mut command = node.client(words);
        let printed = succeeds(command.envs(given));
        let lines = printed
            .lines()
            .map(|line| line.split('=').next().unwrap().to_owned());
        (lines.collect::<BTreeSet<_>>(), printed)
    };
    let (names, text) = variables(&["run", "--", "env"]);
    assert!(
        names.contains("SECRET_TOKEN") && names.contains("GIVEN"),
        "{text}"
    );
    assert!(!names.contains("MUSLIN_ETCD_PASSWORD"), "{text}");

    let _pod = node.pod("a");
    let cleared = [
        "--clear-env",
        "-e",
        "GIVEN",
        "--env",
        "NEW=a=b",
        "-e",
        "MISSING",
    ];
    for words in [&["run"][..], &["exec"]] {
        let command: &[&str] = if words == ["run"] {
            &["--", "env"]
        } else {
            &["a", "env"]
        };
        let (names, text) = variables(&[words, &cleared, command].concat());
        let expected = [
            "GIVEN",
            "HOME",
            "MUSLIN_ADDRESS",
            "MUSLIN_NODE",
            "MUSLIN_POD",
            "NEW",
            "PATH",
            "TERM",
        ];
        assert!(names.iter().eq(expected), "{text}");
        for line in ["GIVEN=by name\n", "NEW=a=b\n", "HOME=/home/someone\n"] {
            assert!(text.contains(line), "no {line}: {text}");
        }
    }
    let bad = node.client(&["run", "-e", "=x", "true"]).output().unwrap();
    assert_eq!(bad.status.code(), Some(2), "{bad:?}");
}

#[test]
fn a_command_in_a_pod_is_one_of_its_processes() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let mark = format!("{MARK}={}", lab.directory().display());
    let script = format!("export {mark}; echo ready; sleep 1000 & exec sleep 1000");
    let mut run = node.client(&["run", "--name", "web", "--", "sh", "-c", &script]);
    let mut run = run.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = [0; 6];
    run.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    let exec = |script: &str| {
        let words = ["exec", "web", "--", "sh", "-c", script];
        node.client(&words).output().unwrap()
    };
    poll_until(SOON, "both of its processes", || {
        (marked(&mark).len() == 2).then_some(())
    });
    // It sees them, and the pod's view of them is the mounted one.
    let seen = exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '; kill -0 2; echo $?; kill -9 $$");
    let text = String::from_utf8(seen.stdout).unwrap();
    let both = "exec sleep 1000 sleep 1000 sleep 1000 sh ";
    assert!(text.contains(both), "{text}");
    assert!(text.ends_with("0\n"), "{text}");
    assert_eq!(seen.status.code(), Some(137));

    // One that is killed takes its command along; the pod takes all.
    let lasting = |mark: &str| {
        let script = format!("export {MARK}={mark}; echo ready; exec sleep 1000");
        let mut exec = node.client(&["exec", "web", "--", "sh", "-c", &script]);
        let mut exec = exec.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0; 6];
        exec.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        exec
    };
    let directory = lab.directory().display();
    let [first, second] = [1, 2].map(|number| format!("{directory}/{number}"));
    let mut child = lasting(&first);
    poll_until(SOON, "a command", || {
        (marked(&format!("{MARK}={first}")).len() == 1).then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let count = |mark: &str| marked(&format!("{MARK}={mark}")).len();
    poll_until(SOON, "the end of its command", || {
        (count(&first) == 0).then_some(())
    });
    let mut child = lasting(&second);
    poll_until(SOON, "its command", || (count(&second) == 1).then_some(()));
    signal(&run, Signal::SIGKILL);
    run.wait().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(137));
    let all = [
        &mark,
        &format!("{MARK}={first}"),
        &format!("{MARK}={second}"),
    ];
    poll_until(SOON, "the end of all of the pod", || {
        all.iter().all(|mark| marked(mark).is_empty()).then_some(())
    });
}

#[test]
fn a_pod_runs_in_a_pod() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let script = r#"unset MUSLIN_NODE
        "$0" node --public-ip 127.0.0.1 --store "sqlite:$1/inner.db" --state-dir "$1/inner" 2>/dev/null &
        until "$0" status --state-dir "$1/inner" >/dev/null 2>&1; do sleep 0.05; done
        "$0" run --state-dir "$1/inner" -- sh -c 'echo $$; ls "$0" | wc -l; hostname' "$1/inner""#;
    let directory = lab.directory().to_str().unwrap();
    let words = ["run", "--", "sh", "-c", script, muslin_bin(), directory];
    assert_eq!(succeeds(&mut node.client(&words)), "2\n0\npod-1\n");
}
