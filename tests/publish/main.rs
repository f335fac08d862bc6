//! Ports of the node's machine lead to pods: who connects finds the pod's server, and the server
//! finds who connected.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod crowds;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use muslin::agent::Agent;
use muslin_lab::script::Script;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, muslin_bin, poll_until, traffic};
use proxy_header::{ParseConfig, ProxyHeader};

const NODE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// Tells each client its address, by TCP and UDP on 8080.
const MIRROR: &str = r#"
    $| = 1;
    my $at = pack_sockaddr_in(8080, INADDR_ANY);
    my $told = sub { my ($port, $ip) = unpack_sockaddr_in($_[0]); inet_ntoa($ip) . ":$port" };
    socket(my $s, PF_INET, SOCK_STREAM, 0); bind($s, $at) or die; listen($s, 64) or die;
    socket(my $d, PF_INET, SOCK_DGRAM, 0); bind($d, $at) or die;
    my $both = ""; vec($both, fileno($_), 1) = 1 for $s, $d; print "READY\n";
    while (select(my $ready = $both, undef, undef, undef)) {
        if (vec($ready, fileno($s), 1)) {
            my $from = accept(my $c, $s); syswrite($c, $told->($from)); close($c)
        }
        if (vec($ready, fileno($d), 1)) {
            my $from = recv($d, my $x, 100, 0); send($d, $told->($from), 0, $from)
        }
    }
"#;

/// A node, a client on the underlay, and nothing else.
struct Bed {
    client: Host,
    node: Node,
    host: Host,
    _lab: Lab,
}

impl Bed {
    fn new(flags: &[(&str, &str)]) -> Option<Self> {
        Self::with(|mut config| {
            for (flag, value) in flags {
                config = config.with(flag, value);
            }
            config
        })
    }

    fn with(configure: impl FnOnce(NodeConfig) -> NodeConfig) -> Option<Self> {
        let lab = Lab::new()?;
        let store = lab.store();
        let (host, client) = (lab.host("node", NODE), lab.host("client", CLIENT));
        let config = configure(NodeConfig::new("n1", NODE, &store));
        Some(Self {
            node: config.start(&host),
            client,
            host,
            _lab: lab,
        })
    }

    /// The same on hosts that have IPv6 besides, at fd09::1 and fd09::2, with these pod networks.
    fn with_ipv6(networks: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let hosts = [("node", NODE), ("client", CLIENT)].map(|(name, address)| {
            let host = lab.host(name, address);
            let [_, _, _, number] = address.octets();
            host.sh(&format!("ip addr add fd09::{number}/64 dev eth0 nodad"));
            host
        });
        let [host, client] = hosts;
        let config = NodeConfig::new("n1", NODE, &lab.store());
        let config = config
            .with("--network", networks)
            .with("--public-ipv6", "fd09::1");
        Some(Self {
            node: config.start(&host),
            client,
            host,
            _lab: lab,
        })
    }

    /// A pod with an agent that listens on 8080.
    fn server(&self, name: &str, ports: &str) -> Agent {
        let mut pod = self.node.pod_after(name, &["-p", ports], "");
        assert_eq!(pod.listen(8080).unwrap(), 8080);
        pod
    }

    /// A pod whose command is a script, on which `READY` is waited for.
    fn script(&self, name: &str, ports: &str, script: &str) -> Script {
        let words = ["run", "--name", name, "-p", ports, "--", "perl"];
        let mut pod = Script::start(self.node.client(&words), script, &[]);
        pod.expect("READY");
        pod
    }

    /// What a pod with these ports is refused for.
    fn refusal(&self, ports: &str) -> String {
        let mut command = self.node.client(&["run", "-p", ports, "--", "true"]);
        let output = command.output().unwrap();
        assert!(!output.status.success(), "{ports}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Packets that were lost. A pod that repeats its last word, as on a busy machine, finds that the
    /// flow is over.
    fn losses(&self) -> BTreeMap<String, u64> {
        let mut losses = self.node.losses();
        losses.remove("egress-no-flow");
        losses
    }

    fn flows(&self, which: &str) -> u64 {
        let status = self.node.query("status");
        status["egress"][which].as_u64().unwrap()
    }
}

/// Connects from a host, and returns its own address and what the server says until its end.
fn ask(from: &Host, transport: &str, to: SocketAddrV4) -> (String, String) {
    let (kind, say) = match transport {
        "tcp" => ("SOCK_STREAM", ""),
        _ => ("SOCK_DGRAM", "send($s, 'x', 0);"),
    };
    let script = format!(
        r#"alarm 50; socket(my $s, PF_INET, {kind}, 0);
           connect($s, pack_sockaddr_in({}, inet_aton("{}"))) or die "$!"; {say}
           my ($port, $ip) = unpack_sockaddr_in(getsockname($s));
           sysread($s, my $all, 1000); print inet_ntoa($ip), ":$port\n$all""#,
        to.port(),
        to.ip()
    );
    let output = from.run(&["perl", "-MSocket", "-e", &script]);
    let (own, said) = output.split_once('\n').unwrap();
    (own.to_owned(), said.to_owned())
}

fn address(told: &str) -> Ipv4Addr {
    *told.parse::<SocketAddrV4>().unwrap().ip()
}

#[test]
fn tcp_and_udp_arrive_as_they_were_sent() {
    for offload in ["tap,gso,gro", "none"] {
        let Some(bed) = Bed::new(&[("--offload", offload), ("--egress", "off")]) else {
            return;
        };
        let _pod = bed.server("web", "7000-7001:8080-8081,7002:8080/udp,7003:8080");
        let mut client = bed.client.agent();
        for port in [7000, 7003] {
            traffic::transfer(&mut client, NODE, port, 20_000_000);
        }
        let id = client.open(SocketAddrV4::new(NODE, 7000)).unwrap();
        let echoed = client.exchange(id, 20_000_000, 5).unwrap();
        assert!(echoed.intact && echoed.bytes == 20_000_000, "{echoed:?}");
        for size in [0, 1, 1400] {
            let echoed = client.udp(SocketAddrV4::new(NODE, 7002), 50, size);
            let echoed = echoed.unwrap();
            assert_eq!((echoed.sent, echoed.intact), (50, 50), "{size} bytes");
        }
        let status = bed.node.query("status");
        assert_eq!(status["published"]["ports"], 4, "{status}");
        assert_eq!(status["published"]["flows"], 6, "{status}");
        let pods = bed.node.query("pods");
        let ports = pods[0]["published"].as_array().unwrap();
        assert_eq!(ports[2]["host_port"], 7002);
        assert_eq!(ports[2]["transport"], "udp");
        assert_eq!(bed.losses(), [].into(), "{}", bed.node.log());
    }
}

#[test]
fn pods_see_their_clients_address_where_they_can_answer_it() {
    let Some(bed) = Bed::new(&[]) else { return };
    let _pod = bed.script("mirror", "7000:8080,7000:8080/udp", MIRROR);
    let gateway = bed.node.address(1);
    for transport in ["tcp", "udp"] {
        let (own, seen) = ask(&bed.client, transport, SocketAddrV4::new(NODE, 7000));
        assert_eq!(address(&own), CLIENT);
        assert_eq!(seen, own, "{transport}");
        for local in [Ipv4Addr::LOCALHOST, NODE] {
            let (_, seen) = ask(&bed.host, transport, SocketAddrV4::new(local, 7000));
            assert_eq!(address(&seen), gateway, "{transport} by {local}");
        }
    }
}

#[test]
fn udp_answers_come_from_the_address_that_was_asked() {
    let Some(bed) = Bed::new(&[]) else { return };
    bed.host.sh("ip addr add 10.9.0.77/24 dev eth0");
    let _pod = bed.script("mirror", "7000:8080/udp", MIRROR);
    // The client's socket is connected and hears nobody else.
    for to in [NODE, Ipv4Addr::new(10, 9, 0, 77)] {
        let (own, seen) = ask(&bed.client, "udp", SocketAddrV4::new(to, 7000));
        assert_eq!(seen, own);
    }
}

#[test]
fn a_header_tells_the_client_where_the_pod_asks_for_it() {
    let Some(bed) = Bed::new(&[]) else { return };
    // It sends back what it gets first.
    let script = r#"
        $| = 1; socket(my $l, PF_INET, SOCK_STREAM, 0);
        bind($l, pack_sockaddr_in(80, INADDR_ANY)) or die; listen($l, 5); print "READY\n";
        while (accept(my $c, $l)) { sysread($c, my $x, 28); print $c unpack("H*", $x); close($c) }
    "#;
    let _pod = bed.script("proxied", "7000:80/tcp+proxy", script);
    for (from, to) in [(&bed.client, NODE), (&bed.host, Ipv4Addr::LOCALHOST)] {
        let to = SocketAddrV4::new(to, 7000);
        let (own, header) = ask(from, "tcp", to);
        let byte = |at: usize| u8::from_str_radix(&header[at..at + 2], 16).unwrap();
        let bytes: Vec<_> = (0..header.len()).step_by(2).map(byte).collect();
        let (parsed, len) = ProxyHeader::parse(&bytes, ParseConfig::default()).unwrap();
        let addresses = parsed.proxied_address().unwrap();
        assert_eq!(len, 28);
        assert_eq!(addresses.source.to_string(), own);
        assert_eq!(addresses.destination, SocketAddr::V4(to));
    }
}

#[test]
fn a_port_that_is_taken_is_told_of_and_by_whom() {
    let Some(bed) = Bed::new(&[]) else { return };
    let _pod = bed.server("web", "7000:8080");
    for ports in ["7000:80", "127.0.0.1:7000:80"] {
        let told = bed.refusal(ports);
        let expected = "port 7000/tcp is already published by the pod 'web'";
        assert!(told.contains(expected), "{told}");
    }
    let mut other = bed.host.agent();
    other.listen(7001).unwrap();
    let told = bed.refusal("7002:80,7001:80");
    let expected = "port 7001/tcp on 0.0.0.0 is in use by another process";
    assert!(told.contains(expected), "{told}");
    let told = bed.refusal("10.244.0.1:7003:80");
    assert!(told.contains("lies in the pod network"), "{told}");
    let told = bed.refusal("7004:80,7004:81");
    assert!(told.contains("published twice"), "{told}");
    // Nothing is left of those that failed, and the same port of another transport is free.
    let _second = bed.server("second", "7002-7004:8080-8082,7000:8080/udp,0:8080");
    let pods = bed.node.query("pods");
    let row = pods.as_array().unwrap();
    let row = row.iter().find(|row| row["pod"] == "second").unwrap();
    let chosen = row["published"][4]["host_port"].as_u64().unwrap();
    let mut client = bed.client.agent();
    traffic::transfer(&mut client, NODE, chosen as u16, 1000);
}

#[test]
fn a_pods_port_ends_with_it_and_is_free_at_once() {
    let Some(bed) = Bed::new(&[]) else { return };
    let mut client = bed.client.agent();
    for _ in 0..5 {
        let pod = bed.server("web", "7000:8080,7000:8080/udp");
        traffic::transfer(&mut client, NODE, 7000, 1000);
        let id = client.open(SocketAddrV4::new(NODE, 7000)).unwrap();
        assert!(client.exchange(id, 1000, 1).unwrap().intact);
        drop(pod);
        poll_until(SOON, "the pod's end", || {
            (bed.node.query("status")["pods"] == 0).then_some(())
        });
        let broken = client.exchange(id, 1000, 1).unwrap_err().to_string();
        // As with any process that dies: its kernel has ended the stream, or there was no time.
        let ends = ["unexpected end of file", "reset", "Broken pipe"];
        assert!(ends.iter().any(|end| broken.contains(end)), "{broken}");
        let refused = client.open(SocketAddrV4::new(NODE, 7000));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("refused"), "{refused}");
    }
    assert_eq!(bed.flows("open"), 0);
}

#[test]
fn an_attached_namespace_has_its_ports_until_it_is_detached() {
    let Some(bed) = Bed::new(&[]) else { return };
    let inside = bed._lab.namespace("inside");
    let pid = inside.pid().to_string();
    let attach = [
        "attach",
        "--pid",
        &pid,
        "--name",
        "there",
        "-p",
        "7000:8080",
    ];
    let output = bed.node.client(&attach).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("0.0.0.0:7000->8080/tcp"), "{told}");
    let mut server = inside.agent();
    server.listen(8080).unwrap();
    let mut client = bed.client.agent();
    traffic::transfer(&mut client, NODE, 7000, 1_000_000);
    let detached = bed.node.client(&["detach", "there"]).status().unwrap();
    assert!(detached.success());
    assert!(client.open(SocketAddrV4::new(NODE, 7000)).is_err());
}

#[test]
fn ports_come_back_with_their_node() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let _pod = bed.server("web", "7000:8080,0:8080");
    let published = |node: &Node| node.query("pods")[0]["published"].clone();
    let before = published(&bed.node);
    let mut client = bed.client.agent();
    for _ in 0..2 {
        traffic::transfer(&mut client, NODE, 7000, 1000);
        bed.node.start_again();
        poll_until(SOON, "the pod is back", || {
            (published(&bed.node) == before).then_some(())
        });
    }
    traffic::transfer(&mut client, NODE, 7000, 1000);
}

#[test]
fn clients_see_what_servers_do() {
    let Some(bed) = Bed::new(&[]) else { return };
    // The first byte says what becomes of the connection.
    let script = r#"
        $| = 1; socket(my $l, PF_INET, SOCK_STREAM, 0);
        bind($l, pack_sockaddr_in(80, INADDR_ANY)) or die; listen($l, 5); print "READY\n";
        while (accept(my $c, $l)) {
            sysread($c, my $what, 1);
            if ($what eq "r") { setsockopt($c, SOL_SOCKET, SO_LINGER, pack("ii", 1, 0)) }
            if ($what eq "h") { syswrite($c, "mine"); shutdown($c, 1); local $/; print <$c>, "\n" }
            close($c);
        }
    "#;
    let mut pod = bed.script("server", "7000:80,7001:81", script);
    let client = |script: &str| {
        let script = format!(
            r#"alarm 50; $| = 1; $SIG{{PIPE}} = "IGNORE"; socket(my $s, PF_INET, SOCK_STREAM, 0);
               my $to = sub {{ connect($s, pack_sockaddr_in($_[0], inet_aton("{NODE}"))) or die }};
               my $rest = sub {{ my $n = sysread($s, my $x, 100); defined $n ? "$x|" : "$!|" }};
               {script}"#
        );
        bed.client.run(&["perl", "-MSocket", "-e", &script])
    };
    let half = client(
        r#"$to->(7000); syswrite($s, "h"); print $rest->(), $rest->(); syswrite($s, "yours");"#,
    );
    assert_eq!(half, "mine||");
    assert_eq!(pod.line(), "yours", "after the server's end");
    let reset = client(r#"$to->(7000); syswrite($s, "r"); print $rest->()"#);
    assert_eq!(reset, "Connection reset by peer|");
    let refused = client(r#"$to->(7001); print $rest->()"#);
    assert_eq!(refused, "Connection reset by peer|", "nobody listens there");
    poll_until(SOON, "the flows' end", || {
        (bed.flows("open") == 0).then_some(())
    });
    assert_eq!((bed.flows("refused"), bed.flows("reset")), (1, 1));
}

#[test]
fn many_clients_at_once_have_a_stream_each() {
    let Some(bed) = Bed::new(&[]) else { return };
    // An agent keeps no more than 64, at either end.
    let mut all = Vec::new();
    for i in 0..4 {
        let port = 7000 + i;
        let pod = bed.server(&format!("pod{i}"), &format!("{port}:8080"));
        let mut client = bed.client.agent();
        let to = SocketAddrV4::new(NODE, port);
        let ids: Vec<_> = (0..50).map(|_| client.open(to).unwrap()).collect();
        all.push((pod, client, ids));
    }
    poll_until(SOON, "200 flows", || {
        (bed.flows("open") == 200).then_some(())
    });
    for (_, client, ids) in &mut all {
        for id in ids {
            let echoed = client.exchange(*id, 5000, *id).unwrap();
            assert!(echoed.intact && echoed.bytes == 5000, "{echoed:?}");
        }
    }
    drop(all);
    poll_until(SOON, "the end of 200 flows", || {
        (bed.flows("open") == 0).then_some(())
    });
    assert_eq!(bed.losses(), [].into(), "{}", bed.node.log());
}

#[test]
fn any_worker_finds_the_flow_of_what_a_pod_sends() {
    let Some(bed) = Bed::new(&[("--workers", "4")]) else {
        return;
    };
    // It speaks to all its clients whenever one of them says something: in superpackets, by TCP and,
    // with UDP_SEGMENT, in datagrams of 1,000 bytes.
    let script = r#"
        $| = 1; my @all; my $at = pack_sockaddr_in(80, INADDR_ANY);
        my $stream = join "", map { pack "N", $_ * 2654435761 % 4294967296 } 1 .. 25000;
        my $train = join "", map { chr(64 + $_) x 1000 } 1 .. 6;
        socket(my $l, PF_INET, SOCK_STREAM, 0); bind($l, $at) or die; listen($l, 99);
        socket(my $d, PF_INET, SOCK_DGRAM, 0); bind($d, $at) or die; my @from;
        setsockopt($d, 17, 103, pack("i", 1000)) or die "UDP_SEGMENT: $!";
        my $both = ""; vec($both, fileno($_), 1) = 1 for $l, $d; print "READY\n";
        while (select(my $ready = $both, undef, undef, undef)) {
            if (vec($ready, fileno($l), 1)) {
                accept(my $c, $l); push @all, $c; sysread($c, my $x, 1);
                if ($x eq "!") { for my $c (@all) { print $c $stream; close($c) } }
            }
            if (vec($ready, fileno($d), 1)) {
                push @from, recv($d, my $x, 9, 0);
                if ($x eq "!") { send($d, $train, 0, $_) == 6000 or die "send: $!" for @from }
            }
        }
    "#;
    let _pod = bed.script("late", "7000:80,7000:80/udp", script);
    for (transport, kind, take) in [
        (
            "tcp",
            "SOCK_STREAM",
            r#"my $all = ""; 1 while sysread($s, $all, 65536, length $all);
               my $expected = join "", map { pack "N", $_ * 2654435761 % 4294967296 } 1 .. 25000;
               $all eq $expected or die "another stream, of " . length $all;"#,
        ),
        (
            "udp",
            "SOCK_DGRAM",
            r#"for my $i (1 .. 6) {
                   sysread($s, my $all, 65536);
                   $all eq chr(64 + $i) x 1000 or die "another datagram $i, of " . length $all;
               }"#,
        ),
    ] {
        // The kernel remembers for 3 s on which queue a flow was written to.
        let client = format!(
            r#"alarm 50; my @all; my $to = pack_sockaddr_in(7000, inet_aton("{NODE}"));
               for my $i (1 .. 32) {{
                   if ($i == 32) {{ select(undef, undef, undef, 5) }}
                   socket(my $s, PF_INET, {kind}, 0); connect($s, $to) or die "$!";
                   syswrite($s, $i == 32 ? "!" : "x"); push @all, $s;
               }}
               for my $s (@all) {{ {take} }} print "all""#
        );
        let said = bed.client.run(&["perl", "-MSocket", "-e", &client]);
        assert_eq!(said, "all", "{transport}");
    }
    assert_eq!(bed.losses(), [].into(), "{}", bed.node.log());
}

#[test]
fn nobody_is_kept_waiting_by_clients_that_do_not_read_or_pods_that_vanish() {
    let Some(bed) = Bed::new(&[]) else { return };
    // It sends as much as is taken.
    let script = r#"
        use IO::Handle; $| = 1; my @all; $SIG{PIPE} = "IGNORE";
        socket(my $l, PF_INET, SOCK_STREAM, 0);
        bind($l, pack_sockaddr_in(80, INADDR_ANY)) or die; listen($l, 99); print "READY\n";
        while (accept(my $c, $l)) {
            $c->blocking(0); 1 while syswrite($c, "x" x 65536); push @all, $c;
        }
    "#;
    let _pod = bed.server("web", "7000:8080");
    for client_ends in [true, false] {
        let firehose = bed.script("firehose", "7001:80", script);
        let mut client = bed.client.agent();
        let open = |_| client.open(SocketAddrV4::new(NODE, 7001)).unwrap();
        let stalled: Vec<_> = (0..32).map(open).collect();
        poll_until(SOON, "32 flows", || (bed.flows("open") == 32).then_some(()));
        let mut other = bed.client.agent();
        traffic::transfer(&mut other, NODE, 7000, 10_000_000);
        if client_ends {
            for id in stalled {
                client.close(id).unwrap();
            }
        }
        drop(firehose);
        poll_until(SOON, "the flows' end", || {
            (bed.flows("open") == 0).then_some(())
        });
        traffic::transfer(&mut other, NODE, 7000, 10_000_000);
    }
}

#[test]
fn a_port_for_root_only_is_told_with_what_to_do() {
    let bed = Bed::with(|config| config.without_capability("net_bind_service"));
    let Some(bed) = bed else { return };
    let advice = "choose one from 1024 on, or let root allow it with 'sysctl \
                  net.ipv4.ip_unprivileged_port_start=80'";
    for transport in ["tcp", "udp"] {
        let told = bed.refusal(&format!("80:8080/{transport}"));
        let expected = format!("muslin: port 80/{transport} is for root only: {advice}\n");
        assert_eq!(told, expected);
    }
    assert_eq!(bed.node.query("status")["published"]["ports"], 0);
    let mut client = bed.client.agent();
    let higher = bed.server("higher", "1024:8080");
    traffic::transfer(&mut client, NODE, 1024, 1_000_000);
    drop(higher);
    bed.host
        .sh("echo 80 >/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let _opened = bed.server("opened", "80:8080,80:8080/udp");
    traffic::transfer(&mut client, NODE, 80, 1_000_000);
    let echoed = client.udp(SocketAddrV4::new(NODE, 80), 20, 1000).unwrap();
    assert_eq!((echoed.sent, echoed.intact), (20, 20));
}

#[test]
fn ports_that_cannot_be_are_refused_before_anything_happens() {
    for (ports, part) in [("80", "like 8080:80"), ("1:2/sctp", "neither 'tcp' nor")] {
        let mut command = std::process::Command::new(muslin_bin());
        let output = command.args(["run", "-p", ports, "--", "true"]).output();
        let output = output.unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(part), "{told}");
    }
}

/// In a network of both IP versions a port of the machine leads to the pod's address of the same one.
#[test]
fn ports_of_ipv6_lead_to_pods_addresses_of_ipv6() {
    let Some(bed) = Bed::with_ipv6("10.244.0.0/16,fd44::/48") else {
        return;
    };
    // Only in IPv6 does anybody answer.
    let ports = ["-p", "[::]:8080:8080", "-p", "[::]:8080:8080/udp"];
    let script = "ip -4 addr flush dev eth0";
    let mut pod = bed.node.pod_after("web", &ports, script);
    pod.listen(8080).unwrap();
    let node: Ipv6Addr = "fd09::1".parse().unwrap();
    let mut client = bed.client.agent();
    traffic::transfer(&mut client, node, 8080, 5_000_000);
    let echoed = client.udp((node, 8080), 10, 1000).unwrap();
    assert_eq!((echoed.sent, echoed.intact), (10, 10));
    // A client on the machine itself is seen as the gateway.
    let mut own = bed.host.agent();
    for address in [Ipv6Addr::LOCALHOST, node] {
        traffic::transfer(&mut own, address, 8080, 100_000);
    }
    let refused = client.open((NODE, 8080)).unwrap_err();
    assert!(refused.to_string().contains("refused"), "{refused}");
    let within = "[fd44::1]:8081:8080";
    let mut command = bed.node.client(&["run", "-p", within, "--", "true"]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("it lies in the pod network fd44::/48"),
        "{said}"
    );
}

/// Pods of IPv6 alone have clients of IPv4, too: what is published ends in the node.
#[test]
fn clients_of_ipv4_reach_pods_of_ipv6_alone() {
    let Some(bed) = Bed::with_ipv6("fd44::/48") else {
        return;
    };
    let mut pod = bed.server("web", "8080:8080");
    assert!(pod.address("eth0").is_err());
    let (mut client, mut own) = (bed.client.agent(), bed.host.agent());
    traffic::transfer(&mut client, NODE, 8080, 5_000_000);
    traffic::transfer(&mut own, Ipv4Addr::LOCALHOST, 8080, 100_000);
}
