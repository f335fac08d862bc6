//! UDP is endpoint-independent: a pod's socket has one port outside, and whoever answers that is
//! heard. It goes on when the machine's address changes.

use super::*;

/// Answers on several ports with the port that it sees, to "other" from a port of its own.
const SERVER_SCRIPT: &str = r#"
    use strict; use warnings; use Socket; $| = 1;
    my @sockets = map {
        socket(my $s, PF_INET, SOCK_DGRAM, 0) or die "socket: $!";
        bind($s, pack_sockaddr_in($_, INADDR_ANY)) or die "bind: $!";
        $s
    } 7000 .. 7005, 0;
    my $watched = "";
    vec($watched, fileno($_), 1) = 1 for @sockets;
    print "READY\n";
    while (select(my $ready = $watched, undef, undef, undef)) {
        for my $s (grep { vec($ready, fileno($_), 1) } @sockets) {
            my $from = recv($s, my $what, 100, 0) // next;
            my ($port) = unpack_sockaddr_in($from);
            send($what eq "other" ? $sockets[-1] : $s, $port, 0, $from);
        }
    }"#;

/// Sockets that ask ports of the server; what they hear.
const CLIENT_SCRIPT: &str = r#"
    use strict; use warnings; use Socket; $| = 1; $SIG{ALRM} = sub { die "no answer" };
    my ($address) = @ARGV;
    sub ask { my ($s, $port, $what) = @_;
        alarm 20;
        send($s, $what, 0, pack_sockaddr_in($port, inet_aton($address))) // die "send: $!";
        my $from = recv($s, my $answer, 100, 0) // die "recv: $!";
        alarm 0;
        return ($answer, unpack_sockaddr_in($from));
    }
    for my $number (1 .. 12) {
        socket(my $s, PF_INET, SOCK_DGRAM, 0) or die "socket: $!";
        my %seen;
        for my $port (7000 .. 7005) {
            my ($answer, $from) = ask($s, $port, "x");
            $from == $port or die "an answer of $from for $port";
            $seen{$answer} = 1;
        }
        keys %seen == 1 or die "seen as " . join ", ", keys %seen;
        my ($answer, $from) = ask($s, 7000, "other");
        ($from < 7000 || $from > 7005) && $seen{$answer} or die "$answer from $from";
    }
    print "DONE\n"; <STDIN>;"#;

#[test]
fn a_socket_has_one_port_outside_and_hears_all_that_answer() {
    for workers in ["1", "2"] {
        let Some(bed) = Bed::new(&[("--workers", workers)]) else {
            return;
        };
        let _server = Script::serve(&bed.server_host, SERVER_SCRIPT, &[]);
        let command = bed.node.client(&["run", "--", "perl"]);
        let mut client = Script::start(command, CLIENT_SCRIPT, &[&SERVER.to_string()]);
        client.expect("DONE");
        let rows = bed.node.query("flows");
        let rows = rows.as_array().unwrap();
        assert_eq!(rows.len(), 12, "one for each socket: {rows:?}");
        for row in rows {
            assert_eq!(row["remote"], format!("{SERVER}:7000"), "the last");
            // Each answer is a number of five digits or less.
            assert_eq!(row["sent_bytes"], 6 + "other".len(), "{row}");
        }
        assert_eq!(bed.node.losses(), [].into(), "{}", bed.node.log());
    }
}

#[test]
fn a_socket_outlives_a_change_of_the_machines_address() {
    let Some(bed) = Bed::new(&[]) else { return };
    let _server = Script::serve(&bed.server_host, SERVER_SCRIPT, &[]);
    let script = r#"
        use strict; use warnings; use Socket; $| = 1;
        my $to = pack_sockaddr_in(7000, inet_aton($ARGV[0]));
        socket(my $s, PF_INET, SOCK_DGRAM, 0) or die "socket: $!";
        sub ask {
            for (1 .. 100) {
                send($s, "x", 0, $to);
                my $ready = ""; vec($ready, fileno($s), 1) = 1;
                next if !select($ready, undef, undef, 0.2);
                return $_ if defined recv($s, my $answer, 100, 0);
            }
            die "no answer";
        }
        ask(); print "BEFORE\n"; <STDIN>; ask(); print "AFTER\n"; <STDIN>;"#;
    let command = bed.node.client(&["run", "--", "perl"]);
    let mut client = Script::start(command, script, &[&SERVER.to_string()]);
    client.expect("BEFORE");
    bed.node_host
        .sh("ip addr del 10.9.0.1/24 dev eth0; ip addr add 10.9.0.77/24 dev eth0");
    client.go_on();
    client.expect("AFTER");
    assert_eq!(bed.flows("opened"), 1, "the same flow");
}

#[test]
fn a_host_without_a_free_port_is_told() {
    // One worker has all three flows before it hears of the first.
    let Some(mut bed) = Bed::new(&[("--workers", "1")]) else {
        return;
    };
    bed.node_host
        .sh("echo 40000 40001 >/proc/sys/net/ipv4/ip_local_port_range");
    let script = r#"
        use strict; use warnings; use Socket; $| = 1; $SIG{ALRM} = sub { die "silence" }; alarm 20;
        my $to = pack_sockaddr_in(9, inet_aton($ARGV[0]));
        my @sockets;
        for (1 .. 3) {
            socket(my $s, PF_INET, SOCK_DGRAM, 0) or die "socket: $!";
            # IP_RECVERR: Linux tells other UDP sockets nothing of hosts that are unreachable.
            setsockopt($s, 0, 11, pack("i", 1)) or die "setsockopt: $!";
            connect($s, $to) or die "connect: $!";
            send($s, "x", 0) // die "send: $!";
            push @sockets, $s;
        }
        recv($sockets[2], my $answer, 100, 0) // print "TOLD $!\n"; <STDIN>;"#;
    let command = bed.node.client(&["run", "--", "perl"]);
    let mut client = Script::start(command, script, &[&NODE.to_string()]);
    client.expect("TOLD No route to host");
    let exhausted = bed.node.drops().get("egress-exhausted").copied();
    assert_eq!(exhausted, Some(1), "{:?}", bed.node.drops());
    // Ports of connections are shared by destinations, of which there is one here.
    let refusals = (0..3).map(|_| bed.refusal_or_nothing(SERVER, PORT));
    let refusal = refusals.flatten().next().unwrap();
    assert!(refusal.contains("No route to host"), "{refusal}");
}

impl Bed {
    /// What the pod is told when it connects, if it does not.
    fn refusal_or_nothing(&mut self, to: Ipv4Addr, port: u16) -> Option<String> {
        let opened = self.pod.open(SocketAddrV4::new(to, port));
        opened.err().map(|error| error.to_string())
    }
}
