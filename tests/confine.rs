//! What a node, and other commands, have taken from themselves, as the kernel tells it.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::Ipv4Addr;
use std::path::Path;

use muslin_lab::{LEAVES_OPEN, Lab, NodeConfig, SOON, muslin_bin, poll_until};

fn config(lab: &Lab) -> NodeConfig {
    NodeConfig::new("n", Ipv4Addr::LOCALHOST, &lab.store())
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

const NET_BIND_SERVICE: u32 = 10;
const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;

#[test]
fn a_node_takes_from_itself_what_it_does_not_need() {
    let Some(lab) = Lab::new() else { return };
    let node = config(&lab).start(lab.root());
    let process = format!("/proc/{}", node.pid());
    let mut threads = 0;
    for thread in std::fs::read_dir(format!("{process}/task")).unwrap() {
        let thread = thread.unwrap().path();
        assert_eq!(line(&thread, "NoNewPrivs"), "1", "{thread:?}");
        assert_eq!(line(&thread, "Seccomp"), "2", "{thread:?}");
        let bounding = capabilities(&thread, "CapBnd");
        assert_eq!(bounding, [NET_BIND_SERVICE, NET_RAW], "{thread:?}");
        threads += 1;
    }
    assert!(threads >= 2, "{threads}");
    // A tunnel by UDP has no use for raw sockets.
    let main = Path::new(&process);
    for set in ["CapEff", "CapPrm"] {
        assert_eq!(capabilities(main, set), [NET_BIND_SERVICE], "{set}");
    }
    let limits = std::fs::read_to_string(format!("{process}/limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let soft = core.unwrap().split_whitespace().nth(4);
    assert_eq!(soft, Some("0"), "{limits}");
    let confinement = &node.query("status")["confinement"];
    assert_eq!(confinement["seccomp"]["in_force"], true, "{confinement}");
    assert_eq!(confinement["landlock"]["in_force"], true, "{confinement}");
    assert_eq!(confinement["no_new_privileges"], true, "{confinement}");
    assert_eq!(confinement["not_dumpable"], true, "{confinement}");
    assert_eq!(confinement["capabilities"][0], "net_bind_service");
    let text = node.client(&["status"]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    let words = "seccomp, landlock, capabilities net_bind_service";
    assert!(text.contains(words), "{text}");
    // What pods need of it works: names, addresses outside, and the end.
    let mut pod = node.pod("a");
    muslin_lab::traffic::ping(&mut pod, node.address(1));
}

#[test]
fn each_measure_has_a_switch() {
    let Some(lab) = Lab::new() else { return };
    let bare = config(&lab).flag("--no-seccomp").flag("--no-landlock");
    let node = bare.start(lab.root());
    let process = format!("/proc/{}", node.pid());
    assert_eq!(line(Path::new(&process), "Seccomp"), "0");
    let confinement = &node.query("status")["confinement"];
    for measure in ["seccomp", "landlock"] {
        let measure = &confinement[measure];
        assert_eq!(measure["in_force"], false, "{confinement}");
        assert_eq!(measure["reason"], "switched off", "{confinement}");
    }
    let doctor = node.client(&["doctor"]).output().unwrap();
    let doctor = String::from_utf8(doctor.stdout).unwrap();
    assert!(doctor.contains("no seccomp (switched off)"), "{doctor}");
}

#[test]
fn what_was_left_open_is_a_commands_and_not_a_nodes() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.directory().join("left-open");
    std::fs::write(&file, "for the command").unwrap();
    let node = config(&lab).leaves_open(&file).start(lab.root());
    let open = std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap();
    // Some are closed while they are looked at.
    let open = open.filter_map(|it| std::fs::read_link(it.unwrap().path()).ok());
    let open: Vec<_> = open.collect();
    assert!(open.len() > 3 && !open.contains(&file), "{open:?}");
    let mut run = node.host().command("sh");
    run.args(["-c", LEAVES_OPEN]).arg(&file);
    run.args([muslin_bin(), "run", "--state-dir"])
        .arg(node.state_dir())
        .args(["--", "sh", "-c", "cat <&7"]);
    let output = run.output().unwrap();
    assert_eq!(output.stdout, b"for the command", "{output:?}");
}

#[test]
fn a_sidecar_is_limited_if_it_starts_nothing() {
    let Some(lab) = Lab::new() else { return };
    let node = config(&lab).start(lab.root());
    for (name, command, seccomp) in [
        ("alone", &[][..], "2"),
        ("beside", &["--", "sleep", "1000"], "0"),
    ] {
        let words = [
            "sidecar", "--pod", name, "--level", "process", "--expose", "80=7000",
        ];
        let words = [&words[..], command].concat();
        let mut sidecar = node.client(&words).spawn().unwrap();
        poll_until(SOON, "the sidecar's pod", || {
            let pods = node.query("pods");
            (pods[0]["pod"] == name).then_some(())
        });
        let process = format!("/proc/{}", sidecar.id());
        assert_eq!(line(Path::new(&process), "Seccomp"), seccomp, "{name}");
        sidecar.kill().unwrap();
        sidecar.wait().unwrap();
        poll_until(SOON, "its end", || {
            node.query("pods").as_array()?.is_empty().then_some(())
        });
    }
}

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
    muslin_lab::traffic::ping(&mut pod, node.address(1));
}

#[test]
fn what_enters_a_namespace_for_attach_has_nothing_but_its_device() {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};

    let Some(lab) = Lab::new() else { return };
    // User 0 there has all rights over what is inside, but for what is taken care of.
    let mut pod = lab.root().command("unshare");
    let mut pod = pod.args(["-Urn", "sleep", "1000"]).spawn().unwrap();
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let theirs = poll_until(SOON, "the pod's namespace", || {
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", pod.id()));
        (comm.unwrap() == "sleep\n").then(|| namespace(pod.id()))
    });
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (ours, stdin) = pair.unwrap();
    let left_open = lab.directory().join("left-open");
    std::fs::write(&left_open, "").unwrap();
    let mut inside = lab.root().command("sh");
    inside.args(["-c", LEAVES_OPEN]).arg(&left_open);
    inside.args([muslin_bin(), "attach-inside", "--queues", "1", "--pid"]);
    let mut inside = inside
        .arg(pod.id().to_string())
        .stdin(stdin)
        .spawn()
        .unwrap();
    let process = format!("/proc/{}", inside.id());
    let main = Path::new(&process);
    poll_until(SOON, "the process in there", || {
        (namespace(inside.id()) == theirs).then_some(())
    });
    // It has given away what it has made, and waits for the address.
    let made = ["/dev/net/tun", "net:[", "user:["];
    let open = poll_until(SOON, "an end of the device", || {
        let open = std::fs::read_dir(main.join("fd")).unwrap();
        let open = open.filter_map(|it| std::fs::read_link(it.unwrap().path()).ok());
        let open: Vec<_> = open.map(|it| it.display().to_string()).collect();
        let is_given = capabilities(main, "CapEff") == [NET_ADMIN]
            && !open
                .iter()
                .any(|it| made.iter().any(|made| it.starts_with(made)));
        is_given.then_some(open)
    });
    assert!(!open.contains(&left_open.display().to_string()), "{open:?}");
    let read = |of: &str| {
        let pid = pod.id().to_string();
        let enter = ["nsenter", "-t", &pid, "-U", "-n", "--preserve-credentials"];
        lab.root().output(&[&enter[..], &["cat", of]].concat())
    };
    let beside = read(&format!("/proc/{}/environ", pod.id()));
    assert!(beside.status.success(), "{beside:?}");
    let refused = read(&format!("{process}/environ"));
    assert!(!refused.status.success(), "{refused:?}");
    // The node has refused.
    shutdown(ours.as_raw_fd(), Shutdown::Write).unwrap();
    assert!(inside.wait().unwrap().success());
    pod.kill().unwrap();
    pod.wait().unwrap();
}

#[test]
fn lesser_sockets_do_less() {
    let Some(lab) = Lab::new() else { return };
    let node = config(&lab).start(lab.root());
    let muslin = |socket: &str, words: &[&str], rest: &[&str]| {
        let path = node.state_dir().join("nodes/n").join(socket);
        let mut command = node.host().command(muslin_bin());
        command.args(words).arg("--socket").arg(path).args(rest);
        let output = command.stdin(std::process::Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    };
    let succeeds = |socket, words: &[&str], rest: &[&str]| {
        let (is_done, said) = muslin(socket, words, rest);
        assert!(is_done, "{socket} {words:?}: {said}");
    };
    let fails = |socket, words: &[&str], rest: &[&str]| {
        let (is_done, said) = muslin(socket, words, rest);
        let is_told = said.contains("not allowed on this socket");
        assert!(!is_done && is_told, "{socket} {words:?}: {said}");
    };
    let text = node.client(&["status"]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    for told in [
        "control.sock (all)",
        "attach.sock (attach)",
        "status.sock (status)",
    ] {
        assert!(text.contains(told), "{text}");
    }
    let _pod = node.pod("a");
    succeeds("status.sock", &["status"], &[]);
    succeeds("status.sock", &["pods"], &[]);
    for words in [&["leave"][..], &["detach", "a"]] {
        for socket in ["status.sock", "attach.sock"] {
            fails(socket, words, &[]);
        }
    }
    fails("status.sock", &["run"], &["--", "true"]);
    succeeds("attach.sock", &["status"], &[]);
    fails("attach.sock", &["pods"], &[]);
    succeeds("attach.sock", &["run"], &["--", "true"]);
    fails(
        "attach.sock",
        &["run", "--publish", "127.0.0.1:0:80"],
        &["--", "true"],
    );
    fails("attach.sock", &["exec"], &["a", "true"]);
    succeeds("control.sock", &["detach", "a"], &[]);
}
