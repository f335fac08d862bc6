//! `muslin sidecar`: a pod's address by what its container may do, at the least by nothing at all.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::process::{Child, Command, Stdio};

use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, muslin_bin, poll_until, script, traffic};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SIDECAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const NODE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// On the underlay, where nobody has it.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 99);
/// The first pods of the two.
const OWN: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 2);
const PORT: u16 = 9000;

/// What a container with Pod Security "restricted" is left with: no device, a root that cannot be
/// written, no capabilities, no new privileges, and no namespaces by a filter of system calls.
const RESTRICTED: &str = r#"
    mount -t tmpfs none /dev/net
    mount -t tmpfs none /dev/shm
    mount -o remount,bind,ro /
    exec setpriv --bounding-set -all --inh-caps -all --no-new-privs perl -e '
        my ($prctl, $unshare, $setns, $clone) = (`uname -m` =~ /x86_64/)
            ? (157, 272, 308, 56) : (167, 97, 268, 220);
        my @filter = (
            pack("SCCL", 0x20, 0, 0, 0),
            pack("SCCL", 0x15, 6, 0, $unshare),
            pack("SCCL", 0x15, 5, 0, $setns),
            pack("SCCL", 0x15, 5, 0, 435),
            pack("SCCL", 0x15, 0, 2, $clone),
            pack("SCCL", 0x20, 0, 0, 16),
            pack("SCCL", 0x45, 1, 0, 0x10000000),
            pack("SCCL", 0x06, 0, 0, 0x7fff0000),
            pack("SCCL", 0x06, 0, 0, 0x00050001),
            pack("SCCL", 0x06, 0, 0, 0x00050026),
        );
        my $filter = join "", @filter;
        my $program = pack("S x6 P", scalar @filter, $filter);
        syscall($prctl, 22, 2, $program) == 0 or die "no filter: $!";
        exec @ARGV or die "no @ARGV: $!";
    ' "$0" "$@"
"#;

/// A server that reads all of a stream, and answers with its length and sum and its client.
const SERVER: &str = r#"
    use Socket; socket(my $l, PF_INET, SOCK_STREAM, 0); setsockopt($l, SOL_SOCKET, SO_REUSEADDR, 1);
    bind($l, pack_sockaddr_in($ARGV[0], INADDR_ANY)) or die; listen($l, 20); $| = 1;
    print "READY\n"; $SIG{CHLD} = "IGNORE";
    while (my $from = accept(my $c, $l)) {
        next if fork; my ($len, $sum) = (0, 0);
        while (sysread($c, my $part, 65536)) { $len += length $part; $sum += unpack("%32C*", $part) }
        syswrite($c, "$len $sum " . inet_ntoa((unpack_sockaddr_in($from))[1]) . "\n"); exit;
    }
"#;

/// A client that says words in hexadecimal digits, each answered by so many bytes, which it prints;
/// then sends a stream and prints what comes back.
const CLIENT: &str = r#"
    use Socket; my ($host, $port, $bytes, @words) = @ARGV; socket(my $s, PF_INET, SOCK_STREAM, 0);
    connect($s, pack_sockaddr_in($port, inet_aton($host))) or die "connect: $!"; alarm 30;
    $SIG{PIPE} = "IGNORE";
    for (@words) {
        my ($said, $answered) = split /:/; syswrite($s, pack("H*", $said));
        my $answer = ""; while (length $answer < $answered) {
            sysread($s, $answer, $answered - length $answer, length $answer) or last;
        }
        print unpack("H*", $answer), "\n";
    }
    my $left = $bytes; while ($left > 0) {
        $left -= syswrite($s, "muslin" x 10000, $left > 60000 ? 60000 : $left) // last;
    }
    shutdown($s, 1); local $/; print readline($s);
"#;

/// A sidecar beside others on its host; killed on drop.
struct Sidecar {
    child: Child,
    log: std::path::PathBuf,
}

impl Sidecar {
    fn start(mut command: Command, directory: &std::path::Path) -> Self {
        let log = directory.join("sidecar.log");
        let file = std::fs::File::create(&log).unwrap();
        command.env("MUSLIN_LOG", "debug").stderr(file);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        Self { child, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until it has said this.
    fn wait_for(&mut self, what: &str) {
        poll_until(SOON, what, || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", self.log());
            self.log().contains(what).then_some(())
        });
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the sidecar:\n{}---", self.log());
        }
    }
}

/// A program that says `READY`.
fn ready(mut command: Command) -> Child {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let output = child.stdout.as_mut().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "READY\n");
    child
}

/// Two hosts: one for a sidecar, one with a node.
struct Bed {
    node: Node,
    host: Host,
    store: String,
    lab: Lab,
}

impl Bed {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        let nodes = lab.directory().join("nodes.toml");
        std::fs::write(
            &nodes,
            format!(
                "network = \"10.244.0.0/16\"\n\
                 [[node]]\npublic-ip = \"{SIDECAR}\"\nsubnet = \"10.244.1.0/24\"\n\
                 [[node]]\npublic-ip = \"{NODE}\"\nsubnet = \"10.244.2.0/24\"\n"
            ),
        )
        .unwrap();
        let store = format!("file:{}", nodes.display());
        Some(Self::with(lab, store))
    }

    fn with(lab: Lab, store: String) -> Self {
        let (host, other) = (lab.host("sidecar", SIDECAR), lab.host("node", NODE));
        let node = NodeConfig::new("n2", NODE, &store).start(&other);
        Self {
            node,
            host,
            store,
            lab,
        }
    }

    /// A sidecar with a node of its own, where there are no rights.
    fn restricted(&self, words: &[&str]) -> Sidecar {
        self.restricted_with(&[], words)
    }

    /// The same with variables.
    fn restricted_with(&self, variables: &[(&str, &str)], words: &[&str]) -> Sidecar {
        let mut command = self.host.command("unshare");
        command.args(["--mount", "sh", "-e", "-c", RESTRICTED, muslin_bin()]);
        let public_ip = SIDECAR.to_string();
        command.args(["sidecar", "--store", &self.store, "--public-ip", &public_ip]);
        command.args(words).env("HOME", "/nonexistent");
        command.env_remove("TMPDIR").env_remove("XDG_STATE_HOME");
        command.envs(variables.iter().copied());
        Sidecar::start(command, self.lab.directory())
    }

    /// A server in a pod of the other node.
    fn server(&self) -> Child {
        let port = PORT.to_string();
        let words = ["run", "--name", "server", "--", "perl", "-e", SERVER, &port];
        ready(self.node.client(&words))
    }

    /// What a client on the sidecar's host prints.
    fn client(&self, port: u16, bytes: u64, words: &[String]) -> Vec<String> {
        let mut command = self.host.command("perl");
        command.args(["-e", CLIENT, "127.0.0.1"]);
        command.args([port.to_string(), bytes.to_string()]);
        let output = command.args(words).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}{told}");
        text.lines().map(str::to_owned).collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a SOCKS5 client says to connect.
fn connect(to: SocketAddrV4) -> [String; 2] {
    let [a, b, c, d] = to.ip().octets();
    let [high, low] = to.port().to_be_bytes();
    let request = [5, 1, 0, 1, a, b, c, d, high, low];
    ["050100:2".to_owned(), format!("{}:10", hex(&request))]
}

/// What the server says of so many bytes from the sidecar.
fn received(bytes: u64) -> String {
    let whole: u64 = b"muslin".iter().map(|byte| u64::from(*byte)).sum();
    let rest = &b"muslin"[..(bytes % 6) as usize];
    let rest: u64 = rest.iter().map(|byte| u64::from(*byte)).sum();
    format!("{bytes} {} {OWN}", bytes / 6 * whole + rest)
}

#[test]
fn without_any_rights_pods_are_reached_and_reach_it() {
    let Some(bed) = Bed::new() else { return };
    let mut server = bed.server();
    let mut sidecar = bed.restricted(&[
        "--socks5",
        "1080",
        "--http-proxy",
        "3128",
        "--forward",
        &format!("8000={POD}:{PORT}"),
        "--expose",
        "80=7000",
    ]);
    sidecar.wait_for("leads to");
    let status = std::fs::read_to_string(format!("/proc/{}/status", sidecar.child.id())).unwrap();
    for line in ["CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    assert!(
        sidecar.log().contains("no state is kept"),
        "{}",
        sidecar.log()
    );
    bed.node.wait_peers(1);

    let to = SocketAddrV4::new(POD, PORT);
    for bytes in [0, 7, 20_000_000] {
        // A port that leads there, SOCKS5, and the HTTP proxy.
        assert_eq!(bed.client(8000, bytes, &[]), [received(bytes)]);
        let told = bed.client(1080, bytes, &connect(to));
        assert_eq!(told[0], "0500");
        assert!(told[1].starts_with("05000001"), "{told:?}");
        assert_eq!(told[2..], [received(bytes)]);
        let head = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n");
        let told = bed.client(3128, bytes, &[format!("{}:19", hex(head.as_bytes()))]);
        assert!(
            told[0].starts_with(&hex(b"HTTP/1.1 200 OK\r\n")),
            "{told:?}"
        );
        assert_eq!(told.last(), Some(&received(bytes)));
    }

    // A pod of the other node reaches what the sidecar exposes, and nothing else.
    let mut local = bed.host.agent();
    local.listen(7000).unwrap();
    let mut pod = bed.node.pod("client");
    traffic::ping(&mut pod, OWN);
    traffic::transfer(&mut pod, OWN, 80, 20_000_000);
    let id = pod.open(SocketAddrV4::new(OWN, 80)).unwrap();
    let echoed = pod.exchange(id, 5_000_000, 3).unwrap();
    assert!(echoed.intact && echoed.bytes == 5_000_000, "{echoed:?}");
    let refused = pod.open(SocketAddrV4::new(OWN, 7000)).unwrap_err();
    assert!(refused.to_string().contains("refused"), "{refused}");
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn names_of_pods_are_asked_for_at_the_gateway() {
    let Some(lab) = Lab::new() else { return };
    // Names are shared by a store that can be written to.
    let store = lab.store();
    let bed = Bed::with(lab, store);
    let mut server = bed.server();
    let mut command = bed.host.command(muslin_bin());
    command.args(["sidecar", "--level", "process", "--store", &bed.store]);
    command.args(["--public-ip", &SIDECAR.to_string(), "--state-dir"]);
    command.arg(bed.lab.directory().join("state"));
    command.args(["--socks5", "1080", "--http-proxy", "3128", "--forward"]);
    command.arg(format!("8000=server.muslin:{PORT}"));
    let mut sidecar = Sidecar::start(command, bed.lab.directory());
    sidecar.wait_for("leads to");

    let connect = |name: &str| {
        let head = [5, 1, 0, 3, name.len() as u8];
        let request = [&head, name.as_bytes(), &PORT.to_be_bytes()].concat();
        ["050100:2".to_owned(), format!("{}:10", hex(&request))]
    };
    poll_until(SOON, "the name of the other node's pod", || {
        let told = bed.client(1080, 0, &connect("server.muslin"));
        told[1].starts_with("0500").then_some(())
    });
    // The address at the end is for the node to choose.
    let all = received(70_000).replace(&OWN.to_string(), "10.244.");
    for name in ["server.muslin", "SERVER.Muslin.", "server.n2.muslin"] {
        let told = bed.client(1080, 70_000, &connect(name));
        assert!(told[2].starts_with(&all), "{name}: {told:?}");
    }
    let head = format!("CONNECT server.muslin:{PORT} HTTP/1.1\r\nHost: server.muslin\r\n\r\n");
    let told = bed.client(3128, 70_000, &[format!("{}:19", hex(head.as_bytes()))]);
    assert!(told.last().unwrap().starts_with(&all), "{told:?}");
    let told = bed.client(8000, 70_000, &[]);
    assert!(told[0].starts_with(&all), "{told:?}");
    let told = bed.client(1080, 0, &connect("nobody.muslin"));
    assert_eq!(told[1][..4], *"0504", "{told:?}");
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn pods_are_reached_and_reach_it_in_ipv6() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.store();
    let hosts = [("sidecar", SIDECAR), ("node", NODE)].map(|(name, address)| {
        let host = lab.host(name, address);
        let number = address.octets()[3];
        host.sh(&format!("ip addr add fd09::{number}/64 dev eth0 nodad"));
        host
    });
    let [host, other] = hosts;
    let config = NodeConfig::new("n2", NODE, &store).with("--public-ipv6", "fd09::2");
    let node = config
        .with("--network", "10.244.0.0/16")
        .with("--ipv6-network", "fd44::/48")
        .start(&other);
    let mut server = node.pod("server");
    server.listen(PORT).unwrap();
    let address = server.address_v6("eth0").unwrap();
    // Its name has an address of IPv6 that does not answer.
    let script = "ip -6 addr flush dev eth0 scope global";
    let mut deaf = node.pod_after("deaf", &[], script);
    deaf.listen(PORT).unwrap();

    let mut command = host.command(muslin_bin());
    command.args(["sidecar", "--level", "process", "--store", &store]);
    command.args([
        "--public-ip",
        &SIDECAR.to_string(),
        "--public-ipv6",
        "fd09::1",
    ]);
    command
        .arg("--state-dir")
        .arg(lab.directory().join("state"));
    command.args(["--socks5", "[::1]:1080,1081", "--expose", "80=[::1]:7000"]);
    let forwards = [
        format!("[::1]:8000=[{address}]:{PORT}"),
        format!("8001=server.muslin:{PORT}"),
        format!("8002=deaf.muslin:{PORT}"),
    ];
    command.args(["--forward", &forwards.join(",")]);
    let mut sidecar = Sidecar::start(command, lab.directory());
    sidecar.wait_for("8002 leads to");
    node.wait_peers(1);

    let mut client = host.agent();
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut send = |to: SocketAddr, bytes| {
        let sent = client.send(to, bytes, 3);
        sent.is_ok_and(|sent| sent.bytes == bytes && sent.intact)
    };
    assert!(send((Ipv6Addr::LOCALHOST, 8000).into(), 20_000_000));
    for port in [8001, 8002] {
        poll_until(SOON, "the name of the other node's pod", || {
            send(at(port), 20_000).then_some(())
        });
    }
    // The sidecar's pod has the second address of its subnet.
    let peers = node.query("peers");
    let subnet = peers[0]["subnet"].as_str().unwrap();
    let own: Ipv6Addr = subnet
        .split_once(',')
        .unwrap()
        .1
        .replace("::/64", "::2")
        .parse()
        .unwrap();
    let request = [&[5, 1, 0, 4][..], &address.octets(), &PORT.to_be_bytes()].concat();
    let words = ["050100:2".to_owned(), format!("{}:22", hex(&request))];
    let mut perl = host.command("perl");
    perl.args(["-e", CLIENT, "127.0.0.1", "1081", "0"])
        .args(&words);
    let output = perl.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let by = hex(&own.octets());
    let answers = format!("0500\n05000004{by}0000\n");
    assert!(text.starts_with(&answers), "{text}");

    client.listen(7000).unwrap();
    traffic::ping(&mut server, own);
    traffic::transfer(&mut server, own, 80, 20_000_000);
    let refused = server.open((own, 7000)).unwrap_err();
    assert!(refused.to_string().contains("refused"), "{refused}");
}

#[test]
fn proxies_that_ask_others_for_nothing_are_told() {
    let Some(bed) = Bed::new() else { return };
    let words = ["--socks5", "0.0.0.0:1080", "--allow-public-proxy"];
    let secret = ("MUSLIN_PROXY_AUTH", "me:owl");
    for (secrets, is_told) in [(&[][..], true), (&[secret], false)] {
        let mut sidecar = bed.restricted_with(secrets, &words);
        sidecar.wait_for("SOCKS5 at");
        let log = sidecar.log();
        assert_eq!(
            log.contains("anyone who reaches 0.0.0.0:1080 can reach"),
            is_told,
            "{log}"
        );
    }
}

#[test]
fn a_command_gets_no_secrets_of_its_sidecar() {
    let Some(bed) = Bed::new() else { return };
    let credentials = ("CREDENTIALS_DIRECTORY", "/run/credentials/none");
    let secret = ("MUSLIN_PROXY_AUTH", "me:owl");
    let command = r#"env >&2; cat /proc/$PPID/environ >&2 || echo "it is hidden" >&2
        echo "it has looked" >&2; exec sleep 60"#;
    let mut sidecar = bed.restricted_with(&[secret, credentials], &["--", "sh", "-c", command]);
    sidecar.wait_for("it has looked");
    let log = sidecar.log();
    assert!(log.contains("MUSLIN_NODE="), "{log}");
    assert!(log.contains("it is hidden"), "{log}");
    for variable in [secret.0, credentials.0] {
        assert!(!log.contains(variable), "{log}");
    }
    // It has it where it needs it.
    assert!(log.contains("ALL_PROXY=socks5h://me:owl@"), "{log}");
}

#[test]
fn clients_see_what_becomes_of_connections() {
    let Some(bed) = Bed::new() else { return };
    let mut sidecar = bed.restricted(&["--socks5", "1080", "--http-proxy", "3128"]);
    sidecar.wait_for("HTTP proxy at");
    bed.node.wait_peers(1);
    let _pod = bed.node.pod("pod");
    let nowhere = Ipv4Addr::new(10, 244, 9, 9);
    let absent = Ipv4Addr::new(10, 244, 2, 200);
    for (to, code, status) in [
        (POD, 5, "502"),
        (nowhere, 3, "502"),
        (absent, 4, "502"),
        (NOBODY, 4, "502"),
    ] {
        let to = SocketAddrV4::new(to, 1);
        let told = bed.client(1080, 0, &connect(to));
        assert_eq!(told[1][..4], format!("05{code:02x}"), "{to}: {told:?}");
        let head = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n");
        let told = bed.client(3128, 0, &[format!("{}:12", hex(head.as_bytes()))]);
        assert_eq!(
            told[0],
            hex(format!("HTTP/1.1 {status}").as_bytes()),
            "{to}"
        );
        assert!(told.last().unwrap().starts_with("muslin: "), "{told:?}");
    }
}

#[test]
fn bad_clients_are_refused_and_harm_nobody() {
    let Some(bed) = Bed::new() else { return };
    let mut server = bed.server();
    let mut sidecar = bed.restricted(&["--socks5", "1080", "--http-proxy", "3128"]);
    sidecar.wait_for("HTTP proxy at");
    bed.node.wait_peers(1);

    // What it says before it closes the connection.
    for (said, answer) in [
        (hex(b"GET / HTTP/1.1\r\n\r\n"), "050100"),
        (hex(&[4, 1, 0, 80, 10, 244, 2, 2, 0]), "050100"),
        ("0500".to_owned(), "050100"),
        ("050109".to_owned(), "05ff"),
        ("05010005020001000000000000".to_owned(), "0500050700"),
        ("0501000509000101".to_owned(), "0500050700"),
        ("05010005010002".to_owned(), "0500050800"),
        ("050100050100030120".to_owned(), "0500"),
    ] {
        let told = bed.client(1080, 0, &[format!("{said}:40")]);
        assert!(told[0].starts_with(answer), "{said}: {told:?}");
    }
    let long = "x".repeat(20_000);
    for (head, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400"),
        ("CONNECT 10.244.2.2 HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("GET ftp://10.244.2.2/ HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("GET http://a_%/ HTTP/1.1\r\n\r\n".to_owned(), "400"),
        (
            "GET http://10.244.2.2:65536/ HTTP/1.1\r\n\r\n".to_owned(),
            "400",
        ),
        (
            "CONNECT 10.244.2.2:1 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello".to_owned(),
            "400",
        ),
        (
            "GET http://10.244.2.2/ HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
                .to_owned(),
            "501",
        ),
        ("\u{1}\u{2}garbage\r\n\r\n".to_owned(), "400"),
        (
            format!("GET http://10.244.2.2/ HTTP/1.1\r\nX: {long}\r\n\r\n"),
            "431",
        ),
        (format!("GET http://{long}/ HTTP/1.1\r\n\r\n"), "4"),
    ] {
        let told = bed.client(3128, 0, &[format!("{}:12", hex(head.as_bytes()))]);
        let expected = hex(format!("HTTP/1.1 {status}").as_bytes());
        assert!(told[0].starts_with(&expected), "{head}: {told:?}");
    }

    // A client that says a little and then nothing is not heard for long, and others meanwhile are.
    let slow: Vec<_> = [(1080, "05"), (3128, "474554")]
        .map(|(port, said)| {
            let mut command = bed.host.command("perl");
            command.args(["-e", CLIENT, "127.0.0.1", &port.to_string(), "0"]);
            command.arg(format!("{said}:1")).stdout(Stdio::piped());
            command.spawn().unwrap()
        })
        .into();
    let told = bed.client(1080, 7, &connect(SocketAddrV4::new(POD, PORT)));
    assert_eq!(told[2..], [received(7)]);
    for mut client in slow {
        let ended = poll_until(SOON, "the end of a slow client", || {
            client.try_wait().unwrap()
        });
        // By the proxy, not by its own alarm.
        assert!(ended.success(), "{ended}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn proxies_want_what_they_were_told() {
    let Some(bed) = Bed::new() else { return };
    let mut server = bed.server();
    let mut sidecar = bed.restricted(&[
        "--socks5",
        "1080",
        "--http-proxy",
        "3128",
        "--proxy-auth",
        "me:owl",
    ]);
    sidecar.wait_for("HTTP proxy at");
    bed.node.wait_peers(1);
    let to = SocketAddrV4::new(POD, PORT);
    let [_, request] = connect(to);
    for (password, answer) in [("owl", "0100"), ("cat", "0101")] {
        let told = hex(&[b"\x01\x02me\x03", password.as_bytes()].concat());
        let words = [
            "05020002:2".to_owned(),
            format!("{told}:2"),
            request.clone(),
        ];
        let told = bed.client(1080, 7, &words);
        assert_eq!(told[..2], ["0502", answer]);
        assert_eq!(told.last() == Some(&received(7)), password == "owl");
    }
    assert_eq!(bed.client(1080, 0, &["050100:2".to_owned()])[0], "05ff");
    for (field, status) in [
        ("", "407"),
        ("Proxy-Authorization: Basic bWU6Y2F0\r\n", "407"),
        ("Proxy-Authorization: Basic bWU6b3ds\r\n", "200"),
    ] {
        let head = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{field}\r\n");
        let told = bed.client(3128, 0, &[format!("{}:12", hex(head.as_bytes()))]);
        assert_eq!(told[0], hex(format!("HTTP/1.1 {status}").as_bytes()));
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn what_others_could_use_has_to_be_meant() {
    for (words, reason) in [
        (&["--socks5", "0.0.0.0:1080"][..], "--allow-public-proxy"),
        (&["--http-proxy", "192.0.2.1:80"], "--allow-public-proxy"),
        (
            &["--forward", "0.0.0.0:1=10.244.1.2:1"],
            "--allow-public-proxy",
        ),
        (&["--level", "tap", "--socks5", "1080"], "--level process"),
        (&["--level", "run"], "give a command"),
        (&["--socks5", "localhost"], "[ADDR:]PORT"),
        (&["--forward", "80"], "is not a forwarded port"),
        (&["--expose", "0=80"], "is not an exposed port"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(muslin_bin());
        command
            .args(["sidecar", "--state-dir"])
            .arg(directory.path());
        let output = command.args(words).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {told}");
        assert!(told.contains(reason), "{words:?}: {told}");
    }
}

/// What a sidecar that runs a command prints, and its exit code.
fn run_by(host: &Host, store: &str, words: &[&str]) -> (Option<i32>, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let mut command = host.command(muslin_bin());
    command.args(["sidecar", "--store", store, "--public-ip"]);
    command.arg(SIDECAR.to_string()).arg("--state-dir");
    command.arg(directory.path()).args(words);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn the_best_level_that_is_possible_is_chosen_and_told() {
    let Some(bed) = Bed::new() else { return };
    let mut server = bed.server();
    // The command reaches a pod of the other node by an interface, whichever has it.
    let client = format!("exec perl -e '{CLIENT}' {POD} {PORT} 7; exit 9");
    let command = ["--", "sh", "-c", &client];
    let (host, store) = (&bed.host, &bed.store);
    host.sh("ip route add 192.0.2.0/24 via 10.9.0.2");
    let (code, said, log) = run_by(host, store, &[&["--level", "tap"], &command[..]].concat());
    assert_eq!((code, said.trim()), (Some(0), &*received(7)), "{log}");
    assert!(
        log.contains("level tap: the pod has the interface muslin0"),
        "{log}"
    );
    let (code, said, log) = run_by(host, store, &command);
    assert_eq!((code, said.trim()), (Some(0), &*received(7)), "{log}");
    assert!(log.contains("level tap"), "{log}");

    let (code, said, log) = run_by(host, store, &[&["--level", "run"], &command[..]].concat());
    assert_eq!((code, said.trim()), (Some(0), &*received(7)), "{log}");
    assert!(log.contains("level run"), "{log}");

    // The pod's own routes stay, and the sidecar ends with the command's code.
    let routes = "ip route show default; ip route get 192.0.2.1; ip route get 10.244.2.2; exit 7";
    let (code, said, log) = run_by(host, store, &["--", "sh", "-c", routes]);
    assert_eq!(code, Some(7), "{log}");
    assert!(said.contains("192.0.2.1 via 10.9.0.2 dev eth0"), "{said}");
    assert!(said.contains("via 10.244.1.1 dev muslin0"), "{said}");
    assert!(!said.contains("default"), "{said}");
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn without_rights_a_command_finds_proxies() {
    let Some(bed) = Bed::new() else { return };
    let command = "echo $MUSLIN_ADDRESS $ALL_PROXY $http_proxy >&2; exit 5";
    let mut sidecar = bed.restricted(&["--", "sh", "-c", command]);
    let status = poll_until(SOON, "the sidecar's end", || {
        sidecar.child.try_wait().unwrap()
    });
    let log = sidecar.log();
    assert_eq!(status.code(), Some(5), "{log}");
    for line in [
        "not level tap: /dev/net/tun does not exist",
        "not level run: user namespaces are forbidden here",
        "level process",
        "10.244.1.2 socks5h://muslin:",
        "@127.0.0.1:",
        " http://muslin:",
    ] {
        assert!(log.contains(line), "{line}: {log}");
    }
}

#[test]
fn a_sidecar_may_be_a_pod_of_a_node_that_comes_back() {
    let Some(mut bed) = Bed::new() else { return };
    let socket = bed.node.state_dir().join("nodes/n2/attach.sock");
    let mut command = bed.node.host().command(muslin_bin());
    command.args(["sidecar", "--pod", "side", "--expose", "80=7000", "--agent"]);
    let mut sidecar = Sidecar::start(
        {
            command.arg(&socket);
            command
        },
        bed.lab.directory(),
    );
    sidecar.wait_for("pod side of the node n2");
    let mut local = bed.node.host().agent();
    local.listen(7000).unwrap();
    let mut pod = bed.node.pod("client");
    traffic::transfer(&mut pod, POD, 80, 1_000_000);
    bed.node.start_again();
    poll_until(SOON, "the pod's return", || {
        let pods = bed.node.query("pods");
        (pods.as_array()?.len() == 2).then_some(())
    });
    traffic::transfer(&mut pod, POD, 80, 1_000_000);
}

/// A server that answers datagrams with themselves and their sender.
const UDP_SERVER: &str = r#"
    use Socket; socket(my $s, PF_INET, SOCK_DGRAM, 0);
    bind($s, pack_sockaddr_in($ARGV[0], INADDR_ANY)) or die; $| = 1; print "READY\n";
    while (my $from = recv($s, my $said, 65536, 0)) {
        my ($port, $host) = unpack_sockaddr_in($from);
        send($s, $said . " from " . inet_ntoa($host) . ":$port", 0, $from);
    }
"#;

/// A client that asks for a relay and sends datagrams by it, each given in hexadecimal digits; it
/// prints what comes back for each, within a second for those with a minus sign in front.
const UDP_CLIENT: &str = r#"
    use Socket; my ($port, @datagrams) = @ARGV; socket(my $s, PF_INET, SOCK_STREAM, 0); alarm 60;
    connect($s, pack_sockaddr_in($port, inet_aton("127.0.0.1"))) or die "connect: $!";
    syswrite($s, pack("H*", "050100" . "05030001000000000000"));
    my $answer = ""; while (length $answer < 12) {
        sysread($s, $answer, 12 - length $answer, length $answer) or die "end";
    }
    my ($code, $host, $relay) = unpack("x3 C x2 a4 n", $answer);
    socket(my $u, PF_INET, SOCK_DGRAM, 0);
    for (@datagrams) {
        my $patience = s/^-// ? 1 : 20;
        send($u, pack("H*", $_), 0, pack_sockaddr_in($relay, $host)) or die "send: $!";
        my $ready = ""; vec($ready, fileno($u), 1) = 1;
        if (select($ready, undef, undef, $patience)) {
            recv($u, my $said, 65536, 0); print unpack("H20", $said), " ", substr($said, 10), "\n";
        } else { print "nothing\n" }
    }
"#;

#[test]
fn datagrams_go_by_socks5_and_come_to_exposed_ports() {
    let Some(bed) = Bed::new() else { return };
    let port = PORT.to_string();
    let words = [
        "run", "--name", "server", "--", "perl", "-e", UDP_SERVER, &port,
    ];
    let mut server = ready(bed.node.client(&words));
    let mut sidecar = bed.restricted(&["--socks5", "1080", "--expose", "53/udp=7000"]);
    sidecar.wait_for("SOCKS5 at");
    bed.node.wait_peers(1);
    let header = hex(&[0, 0, 0, 1, 10, 244, 2, 2, 0x23, 0x28]);
    let by_name = [&[0, 0, 0, 3, 10][..], b"10.244.2.2", &[0x23, 0x28]].concat();
    let fragment = hex(&[0, 0, 1, 1, 10, 244, 2, 2, 0x23, 0x28]);
    let mut command = bed.host.command("perl");
    command.args(["-e", UDP_CLIENT, "1080"]);
    for (wait, header) in [
        ("", &header),
        ("", &hex(&by_name)),
        ("-", &fragment),
        ("-", &"0000".to_owned()),
        ("", &header),
    ] {
        command.arg(format!("{wait}{header}{}", hex(b"word")));
    }
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let answer = format!("{header} word from {OWN}:");
    assert_eq!(
        lines.len(),
        5,
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for (line, is_answered) in lines.iter().zip([true, true, false, false, true]) {
        assert_eq!(line.starts_with(&answer), is_answered, "{text}");
        assert_eq!(*line == "nothing", !is_answered, "{text}");
    }
    // One port of the pod's address for all.
    assert_eq!(lines[0], lines[1]);

    let mut local = bed.host.agent();
    local.listen(7000).unwrap();
    let mut pod = bed.node.pod("client");
    let echoed = pod.udp(SocketAddrV4::new(OWN, 53), 20, 1000).unwrap();
    assert_eq!((echoed.sent, echoed.intact), (20, 20));
    let refusal = pod.udp(SocketAddrV4::new(OWN, 54), 2, 10).unwrap_err();
    assert!(refusal.to_string().contains("refused"), "{refusal}");
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn a_datagram_waits_for_no_other_ones_name() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.store();
    let bed = Bed::with(lab, store);
    let port = PORT.to_string();
    let words = [
        "run", "--name", "server", "--", "perl", "-e", UDP_SERVER, &port,
    ];
    let mut server = ready(bed.node.client(&words));
    let mut command = bed.host.command(muslin_bin());
    command.args(["sidecar", "--store", &bed.store, "--socks5", "1080"]);
    command.args(["--public-ip", &SIDECAR.to_string(), "--state-dir"]);
    command.arg(bed.lab.directory().join("state"));
    // Its resolver never answers.
    command.args(["--dns", &NOBODY.to_string()]);
    let mut sidecar = Sidecar::start(command, bed.lab.directory());
    sidecar.wait_for("SOCKS5 at");
    bed.node.wait_peers(1);
    let server_ip = bed.node.address(2).octets();
    let to_name = |name: &str| {
        let head = [0, 0, 0, 3, name.len() as u8];
        hex(&[&head, name.as_bytes(), &PORT.to_be_bytes(), b"word"].concat())
    };
    let to_address = hex(&[&[0, 0, 0, 1][..], &server_ip, &PORT.to_be_bytes(), b"word"].concat());
    // Names of pods are known as soon as nodes have told each other.
    poll_until(SOON, "the name of the other node's pod", || {
        let mut command = bed.host.command("perl");
        command.args(["-e", UDP_CLIENT, "1080"]);
        command.arg(format!("-{}", to_name("server.muslin")));
        let output = command.output().unwrap().stdout;
        (!output.starts_with(b"nothing")).then_some(())
    });
    let mut command = bed.host.command("perl");
    command.args(["-e", UDP_CLIENT, "1080"]);
    // Nobody answers the first; if others waited for its name, they would have no answer in time.
    for datagram in [
        to_name("silent.example"),
        to_address.clone(),
        to_name("server.muslin"),
        to_name("silent.example"),
        to_address,
    ] {
        command.arg(format!("-{datagram}"));
    }
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().map(|line| line != "nothing").collect();
    let log = sidecar.log();
    assert_eq!(lines, [false, true, true, false, true], "{text}{log}");
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn plain_requests_are_passed_on_without_what_is_the_proxys() {
    let Some(bed) = Bed::new() else { return };
    let script = r#"
        use Socket; socket(my $l, PF_INET, SOCK_STREAM, 0);
        bind($l, pack_sockaddr_in($ARGV[0], INADDR_ANY)) or die; listen($l, 5); $| = 1;
        print "READY\n";
        while (accept(my $c, $l)) {
            my $head = ""; sysread($c, $head, 65536, length $head) until $head =~ /\r\n\r\n/;
            syswrite($c, "HTTP/1.1 200 OK\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nX-Kept: 2\r\n"
                . "Content-Length: " . length($head) . "\r\n\r\n$head"); close $c;
        }"#;
    let port = PORT.to_string();
    let words = ["run", "--name", "server", "--", "perl", "-e", script, &port];
    let mut server = ready(bed.node.client(&words));
    let mut sidecar = bed.restricted(&["--http-proxy", "3128"]);
    sidecar.wait_for("HTTP proxy at");
    bed.node.wait_peers(1);
    let head = format!(
        "GET http://me@{POD}:{PORT}/a?b=c HTTP/1.1\r\nHost: other\r\nProxy-Connection: x\r\n\
         Connection: x-mine, close\r\nX-Mine: 1\r\nX-Kept: 2\r\nTE: trailers\r\n\r\n"
    );
    let told = bed.client(3128, 0, &[format!("{}:12", hex(head.as_bytes()))]);
    let text = told.join("\n").to_ascii_lowercase();
    assert_eq!(told[0], hex(b"HTTP/1.1 200"), "{text}");
    for kept in [
        "get /a?b=c http/1.1",
        &format!("host: {POD}:{PORT}"),
        "x-kept: 2",
    ] {
        assert!(text.contains(kept), "{kept}: {text}");
    }
    for lost in ["x-mine", "x-hop", "proxy-connection", "trailers", "me@"] {
        assert!(!text.contains(lost), "{lost}: {text}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

/// A server that answers a request with its head, and with length and sum of its content: in
/// chunks, beside a length that is wrong.
const HTTP_SERVER: &str = r#"
    use Socket; socket(my $l, PF_INET, SOCK_STREAM, 0);
    bind($l, pack_sockaddr_in($ARGV[0], INADDR_ANY)) or die; listen($l, 5); $| = 1;
    print "READY\n";
    while (accept(my $c, $l)) {
        my $said = ""; my $more = sub { sysread($c, $said, 65536, length $said) };
        $more->() or last until $said =~ s/^(.*?)\r\n\r\n//s;
        my $head = $1; my $content = "";
        if ($head =~ /^transfer-encoding: chunked/mi) {
            while (1) {
                $more->() or last until $said =~ s/^([0-9a-f]+)\r\n//i;
                my $len = hex $1; $more->() or last until length $said >= $len + 2;
                $content .= substr($said, 0, $len); substr($said, 0, $len + 2) = "";
                last if $len == 0;
            }
        } else {
            my ($len) = $head =~ /^content-length: (\d+)/mi;
            $more->() or last until length $said >= ($len // 0); $content = $said;
        }
        my $text = sprintf "%s\n%d %d\nend\n", $head, length $content, unpack("%32C*", $content);
        syswrite($c, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
            . sprintf("%x\r\n%s\r\n0\r\n\r\n", length $text, $text)); close $c;
    }
"#;

#[test]
fn content_passes_the_http_proxy_whole_in_both_directions() {
    let Some(bed) = Bed::new() else { return };
    let port = PORT.to_string();
    let words = [
        "run",
        "--name",
        "server",
        "--",
        "perl",
        "-e",
        HTTP_SERVER,
        &port,
    ];
    let mut server = ready(bed.node.client(&words));
    let mut sidecar = bed.restricted(&["--http-proxy", "3128"]);
    sidecar.wait_for("HTTP proxy at");
    bed.node.wait_peers(1);
    let sum = |bytes| received(bytes).replace(&format!(" {OWN}"), "");
    let chunks = "Transfer-Encoding: chunked\r\n\r\n4\r\nmusl\r\n2\r\nin\r\n0\r\n\r\n";
    for (method, version, rest, streamed, content) in [
        ("GET", "1.1", "\r\n", 0, 0),
        ("GET", "1.0", "\r\n", 0, 0),
        (
            "POST",
            "1.1",
            "Content-Length: 70000\r\n\r\n",
            70_000,
            70_000,
        ),
        (
            "PUT",
            "1.0",
            "Content-Length: 70000\r\n\r\n",
            70_000,
            70_000,
        ),
        ("POST", "1.1", chunks, 0, 6),
        ("GET", "1.1", chunks, 0, 6),
    ] {
        let head = format!("{method} http://{POD}:{PORT}/ HTTP/{version}\r\n{rest}");
        let told = bed.client(3128, streamed, &[format!("{}:0", hex(head.as_bytes()))]);
        let text = told.join("\n");
        assert!(text.contains(&format!("HTTP/{version} 200 OK")), "{text}");
        for line in [&format!("{method} / HTTP/1.1"), &sum(content), "end"] {
            let has = told.iter().any(|told| told.trim_end() == line);
            assert!(has, "{line}: {text}");
        }
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

/// A server that reads the head of a request, asks for its content or does not, and answers with what
/// it has read of that.
const STRICT_SERVER: &str = r#"
    use Socket; socket(my $l, PF_INET, SOCK_STREAM, 0);
    bind($l, pack_sockaddr_in($ARGV[0], INADDR_ANY)) or die; listen($l, 5); $| = 1;
    print "READY\n"; $SIG{PIPE} = "IGNORE";
    while (accept(my $c, $l)) {
        my $said = ""; my $more = sub { sysread($c, $said, 65536, length $said) };
        $more->() or last until $said =~ s/^(.*?)\r\n\r\n//s; my $head = $1;
        my $early = length $said; my ($len) = $head =~ /^content-length: (\d+)/mi;
        if ($head =~ m{^\S+ /asks}) {
            # Nothing may come before it is asked for.
            my $ready = ""; vec($ready, fileno($c), 1) = 1;
            $early += select($ready, undef, undef, 2);
            syswrite($c, "HTTP/1.1 100 Continue\r\n\r\n");
        }
        if ($head =~ m{^\S+ /(asks|silent)}) {
            $more->() or last until length $said >= $len;
            my $text = sprintf "%d early, %d %d\n", $early, length $said, unpack("%32C*", $said);
            syswrite($c, "HTTP/1.1 200 OK\r\nContent-Length: " . length($text) . "\r\n\r\n$text");
        } else {
            sleep 2 if $head =~ m{^\S+ /late};
            my $text = $head =~ /^expect: 100-continue/mi ? "expected\n" : "unexpected\n";
            syswrite($c, "HTTP/1.1 413 Too Large\r\nContent-Length: " . length($text) . "\r\n\r\n$text");
        }
        close $c;
    }
"#;

#[test]
fn a_server_says_whether_it_wants_content_and_is_heard_before_that_is_whole() {
    let Some(bed) = Bed::new() else { return };
    let port = PORT.to_string();
    let words = [
        "run",
        "--name",
        "server",
        "--",
        "perl",
        "-e",
        STRICT_SERVER,
        &port,
    ];
    let mut server = ready(bed.node.client(&words));
    let mut sidecar = bed.restricted(&["--http-proxy", "3128"]);
    sidecar.wait_for("HTTP proxy at");
    bed.node.wait_peers(1);
    let bytes = 20_000_000;
    let head = |path: &str, expects: bool| {
        let expect = if expects {
            "Expect: 100-continue\r\n"
        } else {
            ""
        };
        let head = format!(
            "POST http://{POD}:{PORT}{path} HTTP/1.1\r\nContent-Length: {bytes}\r\n{expect}\r\n"
        );
        hex(head.as_bytes())
    };
    let sum = received(bytes).replace(&format!(" {OWN}"), "");
    let asks = b"HTTP/1.1 100 Continue\r\n\r\n";
    let refuses = b"HTTP/1.1 413 ";

    // Asked for, content comes, and not before.
    let words = [format!("{}:{}", head("/asks", true), asks.len())];
    let told = bed.client(3128, bytes, &words);
    assert_eq!(told[0], hex(asks), "{told:?}");
    assert_eq!(told.last(), Some(&format!("0 early, {sum}")), "{told:?}");
    // A server that does not know how to ask has it from a client that does not wait.
    let told = bed.client(3128, bytes, &[format!("{}:0", head("/silent", true))]);
    let last = told.last().unwrap();
    assert!(last.ends_with(&format!(" early, {sum}")), "{told:?}");

    // A client that waits has the refusal and nothing before it, however long that takes.
    for path in ["/refuses", "/late"] {
        let words = [format!("{}:{}", head(path, true), refuses.len())];
        let told = bed.client(3128, 0, &words);
        assert_eq!(told[0], hex(refuses), "{told:?}");
        assert_eq!(told.last().unwrap(), "expected", "{told:?}");
    }
    // One that sends meanwhile has it too, although the server has read nothing of that.
    for (path, expects) in [("/refuses", false), ("/late", false), ("/late", true)] {
        let told = bed.client(3128, bytes, &[format!("{}:0", head(path, expects))]);
        let text = told.join("\n");
        assert!(text.contains("HTTP/1.1 413"), "{path}: {text}");
        let expected = if expects { "expected" } else { "unexpected" };
        assert_eq!(told.last().unwrap(), expected, "{text}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn a_job_gives_its_lease_back() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.store();
    let (host, other) = (lab.host("sidecar", SIDECAR), lab.host("node", NODE));
    // Three nodes fit.
    let node = NodeConfig::new("n2", NODE, &store).with("--network", "10.244.0.0/22");
    let node = node.start(&other);
    let leases = || node.query("leases").as_array().unwrap().len();
    let [exits, ends] = ["exit 7", "exit 0"].map(|script| ["--", "sh", "-c", script]);
    for round in 0..5 {
        for (words, code) in [(&exits, 7), (&ends, 0)] {
            let (ended, _, log) = run_by(&host, &store, words);
            assert_eq!(ended, Some(code), "{round}: {log}");
            assert_eq!(leases(), 1, "{round}: {log}");
        }
    }

    // A level that is not possible is no reason to take one.
    let mut command = host.command("timeout");
    command.args([
        "60",
        "unshare",
        "--mount",
        "sh",
        "-e",
        "-c",
        RESTRICTED,
        muslin_bin(),
    ]);
    command.args([
        "sidecar",
        "--store",
        "etcd://10.9.0.99:2379",
        "--level",
        "tap",
    ]);
    command.args(["--public-ip", &SIDECAR.to_string()]);
    command.args(["--", "true"]).env("HOME", "/nonexistent");
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("/dev/net/tun does not exist"), "{told}");

    // Whether one without a command gives it back when it is told to end depends on its state.
    let state = tempfile::tempdir().unwrap();
    let kept = ["--state-dir", state.path().to_str().unwrap()];
    let leaves = [&kept[..], &["--leave"]].concat();
    for (words, left) in [(&kept[..], 2), (&leaves, 1), (&[], 1)] {
        // HOME cannot be written.
        let script = "mount -t tmpfs -o ro none /mnt; exec \"$0\" \"$@\"";
        let mut command = host.command("unshare");
        command.args(["--mount", "sh", "-e", "-c", script, muslin_bin()]);
        command.args(["sidecar", "--store", &store, "--public-ip"]);
        command.arg(SIDECAR.to_string()).args(["--socks5", "1080"]);
        command.args(words).env("HOME", "/mnt");
        command.env_remove("XDG_STATE_HOME");
        let mut sidecar = Sidecar::start(command, lab.directory());
        sidecar.wait_for("SOCKS5 at");
        assert_eq!(leases(), 2);
        kill(
            Pid::from_raw(sidecar.child.id().try_into().unwrap()),
            Signal::SIGTERM,
        )
        .unwrap();
        let ended = poll_until(SOON, "the sidecar's end", || {
            sidecar.child.try_wait().unwrap()
        });
        assert!(ended.success(), "{words:?}: {ended}: {}", sidecar.log());
        assert_eq!(leases(), left, "{words:?}: {}", sidecar.log());
    }
}

#[test]
fn a_sidecar_that_was_out_of_descriptors_serves_again() {
    let Some(bed) = Bed::new() else { return };
    let mut server = bed.server();
    let mut sidecar = bed.restricted(&["--forward", &format!("8000={POD}:{PORT}")]);
    sidecar.wait_for("leads to");
    bed.node.wait_peers(1);
    assert_eq!(bed.client(8000, 7, &[]), [received(7)]);
    bed.host.leaves_descriptors(sidecar.child.id(), 6);
    let mut crowd = script::crowd(&bed.host, 8000);
    sidecar.wait_for("cannot accept clients now");
    crowd.kill();
    // Whoever comes while the others go may find no descriptor for the way on.
    poll_until(SOON, "a client that is served", || {
        (bed.client(8000, 7, &[]) == [received(7)]).then_some(())
    });
    server.kill().unwrap();
    server.wait().unwrap();
}
