//! Ends that do not do what they should: a pod sees what a host of its own would see, in a time that
//! is bounded, and nothing of it stays behind.

use muslin_lab::skip::skip;

use super::load::resident;
use super::*;

const FAULTY: u16 = 9003;
/// What is sent where somebody does not read.
const MUCH: usize = 60_000_000;
/// More than the sockets of both ends and what is between them take.
const HELD_BACK: u64 = 40_000_000;
/// What a stalled connection may take of the node's memory.
const MOST: u64 = 4 << 20;

/// What all scripts begin with: a pattern, ends that are connected, and ways to look at streams.
const COMMON: &str = r#"
use strict; use warnings; use IO::Handle;
$| = 1; $SIG{PIPE} = "IGNORE";
my ($address, $port) = @ARGV;
my $pattern = join "", map { pack "N", $_ * 2654435761 % 4294967296 } 0 .. 9999;
sub part { my ($at, $length) = @_;
    return substr($pattern x (2 + int($length / 40000)), $at % 40000, $length); }
sub listener {
    socket(my $listener, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
    setsockopt($listener, SOL_SOCKET, SO_REUSEADDR, 1) or die "setsockopt: $!";
    bind($listener, pack_sockaddr_in($port, INADDR_ANY)) or die "bind: $!";
    listen($listener, 16) or die "listen: $!";
    print "READY\n";
    return $listener;
}
sub accepted { accept(my $client, shift) or die "accept: $!"; return $client; }
sub connected {
    socket(my $socket, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
    connect($socket, pack_sockaddr_in($port, inet_aton($address))) or print "FAILED $!\n" and exit;
    print "CONNECTED\n";
    return $socket;
}
sub send_all { my ($socket, $length) = @_;
    for (my $sent = 0; $sent < $length;) {
        my $some = syswrite($socket, part($sent, $length - $sent < 65536 ? $length - $sent : 65536));
        if (!defined $some) { print "BROKEN $!\n"; return; }
        $sent += $some;
    }
    print "SENT $length\n";
}
sub take_all { my ($socket) = @_;
    my $taken = 0;
    while (1) {
        my $some = sysread($socket, my $bytes, 65536);
        if (!defined $some) { print "BROKEN $!\n"; return; }
        last if !$some;
        if ($bytes ne part($taken, $some)) { print "WRONG at $taken\n"; return; }
        $taken += $some;
    }
    print "TAKEN $taken\n";
}
sub reset_it { my ($socket) = @_;
    setsockopt($socket, SOL_SOCKET, SO_LINGER, pack("ii", 1, 0)); close($socket); }
"#;

impl Bed {
    /// A server that begins with a listener.
    fn faulty(&self, script: &str) -> Script {
        let (script, port) = (format!("{COMMON}{script}"), FAULTY.to_string());
        Script::serve(&self.server_host, &script, &["0.0.0.0", &port])
    }

    /// A script in a pod of its own.
    fn client(&self, to: Ipv4Addr, script: &str) -> Script {
        let command = self.node.client(&["run", "--", "perl"]);
        let script = format!("{COMMON}{script}");
        Script::start(command, &script, &[&to.to_string(), &FAULTY.to_string()])
    }

    fn wait_no_flows(&self) {
        poll_until(SOON, "the flows' end", || {
            (self.flows("open") == 0).then_some(())
        });
    }
}

#[test]
fn each_end_may_stop_sending_and_go_on_taking() {
    let Some(bed) = Bed::new(&[]) else { return };
    let first_sends = "send_all($s, 3000000); shutdown($s, 1); take_all($s);";
    let first_takes = "take_all($s); send_all($s, 2000000); shutdown($s, 1);";
    let mut server = bed.faulty(&format!(
        "my $l = listener(); my $s = accepted($l); {first_takes} $s = accepted($l); {first_sends}"
    ));
    for (script, ours, theirs) in [
        (
            first_sends,
            ["SENT 3000000", "TAKEN 2000000"],
            ["TAKEN 3000000", "SENT 2000000"],
        ),
        (
            first_takes,
            ["TAKEN 3000000", "SENT 2000000"],
            ["SENT 3000000", "TAKEN 2000000"],
        ),
    ] {
        // It stays until the server has all: what a pod has sent and egress holds may end with it.
        let script = format!("my $s = connected(); {script} <STDIN>;");
        let mut client = bed.client(SERVER, &script);
        client.expect("CONNECTED");
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            client.expect(ours);
            server.expect(theirs);
        }
    }
    bed.wait_no_flows();
    assert_eq!(bed.flows("reset"), 0);
}

#[test]
fn a_pod_may_go_before_the_server_has_taken_all() {
    let Some(bed) = Bed::new(&[]) else { return };
    // Most is in the socket of the node's host when the pod has gone.
    let mut server = bed.faulty(
        r#"my $l = listener(); setsockopt($l, SOL_SOCKET, SO_RCVBUF, 4096);
           my $s = accepted($l); print "WAITING\n"; <STDIN>; take_all($s);"#,
    );
    let mut client = bed.client(SERVER, "my $s = connected(); send_all($s, 12000);");
    client.expect("CONNECTED");
    client.expect("SENT 12000");
    server.expect("WAITING");
    poll_until(SOON, "the pod's end", || {
        let pods = bed.node.query("pods");
        (pods.as_array()?.len() == 1).then_some(())
    });
    server.go_on();
    server.expect("TAKEN 12000");
    bed.wait_no_flows();
}

#[test]
fn a_reset_in_the_middle_of_a_stream_is_seen() {
    let Some(bed) = Bed::new(&[]) else { return };
    let mut server = bed.faulty(
        r#"my $l = listener();
           my $s = accepted($l); sysread($s, my $bytes, 65536); reset_it($s); print "RESET\n";
           $s = accepted($l); syswrite($s, part(0, 100000)); <STDIN>; reset_it($s); print "RESET\n";
           <STDIN>;"#,
    );
    let mut client = bed.client(SERVER, "my $s = connected(); send_all($s, 100000000);");
    client.expect("CONNECTED");
    server.expect("RESET");
    let end = client.line();
    // Whoever writes after the reset has come sees the second.
    let seen = end.contains("reset by peer") || end.contains("Broken pipe");
    assert!(seen, "{end}");

    let mut client = bed.client(
        SERVER,
        r#"my $s = connected(); sysread($s, my $bytes, 1000); print "BEGUN\n";
           take_all($s) if $bytes eq part(0, 1000);"#,
    );
    client.expect("CONNECTED");
    client.expect("BEGUN");
    server.go_on();
    server.expect("RESET");
    // The first byte that is looked at is the thousandth, so anything is wrong or broken.
    let end = client.line();
    assert!(!end.starts_with("TAKEN"), "{end}");
    bed.wait_no_flows();
    assert_eq!(bed.flows("reset"), 2);
}

#[test]
fn who_does_not_read_holds_the_other_back_and_no_memory() {
    let Some(bed) = Bed::new(&[]) else { return };
    let sends = format!(
        r#"my $sent = 0; $s->blocking(0);
           while ($sent < {MUCH}) {{
               my $free = ""; vec($free, fileno($s), 1) = 1;
               if (!select(undef, $free, undef, 2)) {{ print "STALLED $sent\n"; <STDIN>; next; }}
               my $len = {MUCH} - $sent < 16384 ? {MUCH} - $sent : 16384;
               $sent += syswrite($s, part($sent, $len)) || die "write: $!";
           }}
           print "SENT $sent\n"; shutdown($s, 1); <STDIN>;"#
    );
    let takes = r#"print "WAITING\n"; <STDIN>; take_all($s);"#;
    for pod_sends in [true, false] {
        let (at_server, in_pod) = if pod_sends {
            (takes, sends.as_str())
        } else {
            (sends.as_str(), takes)
        };
        let script = format!("my $l = listener(); my $s = accepted($l); {at_server}");
        let mut server = bed.faulty(&script);
        let before = resident(&bed);
        let mut client = bed.client(SERVER, &format!("my $s = connected(); {in_pod}"));
        client.expect("CONNECTED");
        let (sender, taker) = if pod_sends {
            (&mut client, &mut server)
        } else {
            (&mut server, &mut client)
        };
        taker.expect("WAITING");
        let stalled = sender.line();
        let sent: u64 = stalled.strip_prefix("STALLED ").unwrap().parse().unwrap();
        assert!((1..HELD_BACK).contains(&sent), "{stalled}");
        let grown = resident(&bed).saturating_sub(before);
        eprintln!("{stalled}: {grown} bytes of the node's memory");
        assert!(grown < MOST, "{grown} bytes for one stalled connection");
        taker.go_on();
        sender.go_on();
        let mut end = sender.line();
        // It may wait for the other once more.
        while end.starts_with("STALLED") {
            sender.go_on();
            end = sender.line();
        }
        assert_eq!(end, format!("SENT {MUCH}"));
        taker.expect(&format!("TAKEN {MUCH}"));
        drop((client, server));
        bed.wait_no_flows();
    }
}

#[test]
fn who_gets_no_answer_is_told_nothing_and_gives_up() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let filter = bed.server_host.output(&[
        "iptables",
        "--append",
        "INPUT",
        "--protocol",
        "tcp",
        "--dport",
        "9003",
        "--jump",
        "DROP",
    ]);
    if !filter.status.success() {
        return skip(format_args!("no iptables: {filter:?}"));
    }
    // Both give up after a few seconds instead of minutes.
    bed.node_host
        .sh("echo 1 >/proc/sys/net/ipv4/tcp_syn_retries");
    let command = bed.node.client(&[
        "run",
        "--",
        "sh",
        "-c",
        "echo 1 >/proc/sys/net/ipv4/tcp_syn_retries; exec perl \"$@\"",
        "sh",
    ]);
    let script = format!("{COMMON} connected();");
    let to = [SERVER.to_string(), FAULTY.to_string()];
    let mut client = Script::start(command, &script, &[&to[0], &to[1]]);
    client.expect("FAILED Connection timed out");
    bed.wait_no_flows();
    assert_eq!(bed.flows("unreachable"), 1);
    // Others are not held up by that.
    traffic::transfer(&mut bed.pod, SERVER, PORT, 100_000);
}

#[test]
fn a_pod_that_is_gone_leaves_no_connection() {
    let Some(bed) = Bed::new(&[]) else { return };
    let mut server = bed.faulty("my $l = listener(); my $s = accepted($l); take_all($s);");
    let mut client = bed.client(SERVER, "my $s = connected(); send_all($s, 1e12);");
    client.expect("CONNECTED");
    poll_until(SOON, "the stream", || {
        (bed.flows("open") == 1).then_some(())
    });
    client.kill();
    let end = server.line();
    // Its own kernel may have ended the connection, or the node have reset it.
    let seen = end.starts_with("TAKEN") || end.contains("reset by peer");
    assert!(seen, "{end}");
    bed.wait_no_flows();
}

#[test]
fn a_node_that_is_gone_ends_connections() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let mut server = bed.faulty("my $l = listener(); my $s = accepted($l); take_all($s);");
    let mut client = bed.client(SERVER, "my $s = connected(); send_all($s, 1000); <STDIN>;");
    client.expect("CONNECTED");
    client.expect("SENT 1000");
    assert_eq!(bed.flows("open"), 1);
    bed.node.kill();
    let end = server.line();
    assert!(end == "TAKEN 1000" || end.contains("reset"), "{end}");
}
