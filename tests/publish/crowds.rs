//! More clients than there is room for: in the node's table of flows, and in the queue of a pod's
//! listener.

use super::*;

/// So many that each has few flows: workers share the bounds.
const WORKERS: &str = "16";
/// Of one pod, and of all.
const FLOWS_OF_POD: u64 = 2048 / 16;
const FLOWS: u64 = 4096 / 16;

/// What a client is told that connects, says a word and reads.
const READ: &str = r#"
    $| = 1; my ($address, $port) = @ARGV; alarm 50; socket(my $s, PF_INET, SOCK_STREAM, 0);
    # A reset may come as early as before the call returns.
    my $said = ""; my $is_well = connect($s, pack_sockaddr_in($port, inet_aton($address)))
        && syswrite($s, "word") && defined sysread($s, $said, 100);
    print $is_well ? "$said\n" : "$!\n";
"#;

/// Sends a datagram from each of many ports and reads the answer; another, as often as a line comes,
/// from one port more; and from all of them once more.
const DATAGRAMS: &str = r#"
    $| = 1; my ($address, $port, $own, $count) = @ARGV; alarm 100;
    my $to = pack_sockaddr_in($port, inet_aton($address));
    sub from {
        socket(my $s, PF_INET, SOCK_DGRAM, 0); bind($s, pack_sockaddr_in($_[0], INADDR_ANY)) or die;
        connect($s, $to) or die "connect: $!"; send($s, "x", 0); return $s;
    }
    sub answered {
        my $s = from($_[0]); sysread($s, my $said, 100); $said eq "$own:$_[0]" or die "'$said'";
    }
    answered(20000 + $_) for 1 .. $count; print "OPEN\n"; <STDIN>;
    my $late = from(20000); print "SENT\n"; <STDIN>;
    my $ready = ""; vec($ready, fileno($late), 1) = 1;
    print select($ready, undef, undef, 0) ? "ANSWERED\n" : "NOTHING\n";
    answered(20000 + $_) for 1 .. $count; print "OPEN\n";
"#;

impl Bed {
    /// A pod that gives back what comes on 8080, on as many connections as are wanted.
    fn echo(&self, name: &str, ports: &str) -> Script {
        let words = ["run", "--name", name, "-p", ports, "--", "perl"];
        let command = self.node.client(&words);
        let mut pod = Script::start(command, include_str!("../egress/echo.pl"), &["8080"]);
        pod.expect("READY");
        pod
    }

    /// A script of the client, about a port of the node.
    fn asks(&self, port: u16, script: &str, more: &[&str]) -> Script {
        let (node, port) = (NODE.to_string(), port.to_string());
        let arguments = [&[node.as_str(), &port], more].concat();
        Script::start(self.client.command("perl"), script, &arguments)
    }

    /// As many connections as one pod may have, each of which has carried something.
    fn crowd(&self, port: u16) -> Script {
        let (count, later) = (FLOWS_OF_POD.to_string(), "5");
        let flows = include_str!("../egress/flows.pl");
        let mut crowd = self.asks(port, flows, &[&count, later]);
        crowd.expect("OPEN");
        crowd
    }

    fn wait_flows(&self, count: u64) {
        poll_until(SOON, &format!("{count} flows"), || {
            (self.flows("open") == count).then_some(())
        });
    }

    fn lost(&self, reason: &str) -> u64 {
        self.losses().get(reason).copied().unwrap_or_default()
    }
}

#[test]
fn a_full_table_is_shared_out() {
    let Some(bed) = Bed::new(&[("--workers", WORKERS)]) else {
        return;
    };
    let _pods = ["a", "b", "c"].map(|name| {
        let port = 7000 + u16::from(name.as_bytes()[0] - b'a');
        bed.echo(name, &format!("{port}:8080"))
    });
    let mut first = bed.crowd(7000);
    bed.asks(7000, READ, &[]).expect("Connection reset by peer");
    assert_eq!(bed.losses(), [("egress-pod-full".to_owned(), 1)].into());
    bed.asks(7002, READ, &[]).expect("word");
    bed.wait_flows(FLOWS_OF_POD);

    let mut second = bed.crowd(7001);
    assert_eq!(bed.flows("open"), FLOWS);
    // A pod that has none gets one of those who have most: of two, the one with the higher address.
    bed.asks(7002, READ, &[]).expect("word");
    assert_eq!(bed.flows("evicted"), 1);

    // The others have what they had, and leave room when they go.
    first.go_on();
    first.expect("CLOSED");
    bed.wait_flows(FLOWS_OF_POD - 1);
    first.go_on();
    first.expect("DONE");
    bed.asks(7002, READ, &[]).expect("word");
    second.kill();
    bed.wait_flows(0);
    assert_eq!(
        (bed.lost("egress-pod-full"), bed.lost("egress-table-full")),
        (1, 0)
    );
    assert_eq!((bed.flows("evicted"), bed.flows("refused")), (1, 0));
}

#[test]
fn a_connection_that_is_idle_makes_room() {
    let Some(bed) = Bed::new(&[("--workers", WORKERS)]) else {
        return;
    };
    let _pod = bed.echo("a", "7000:8080");
    let mut crowd = bed.crowd(7000);
    let refused = poll_until(SOON, "a place", || {
        let said = bed.asks(7000, READ, &[]).line();
        (said == "word").then(|| bed.lost("egress-pod-full"))
    });
    assert!(refused > 0, "{}", bed.node.log());
    // It was the first.
    assert_eq!(bed.flows("evicted"), 1);
    let rows = bed.node.query("flows");
    assert!(rows.as_array().unwrap().len() as u64 >= FLOWS_OF_POD - 1);
    crowd.kill();
    bed.wait_flows(0);
}

#[test]
fn a_full_table_takes_no_datagrams_of_others() {
    let Some(bed) = Bed::new(&[("--workers", WORKERS)]) else {
        return;
    };
    let pod = bed.script("mirror", "7000:8080/udp", MIRROR);
    let (own, count) = (CLIENT.to_string(), FLOWS_OF_POD.to_string());
    let mut clients = bed.asks(7000, DATAGRAMS, &[&own, &count]);
    clients.expect("OPEN");
    assert_eq!(bed.flows("open"), FLOWS_OF_POD);
    clients.go_on();
    clients.expect("SENT");
    poll_until(SOON, "the datagram's end", || {
        (bed.lost("egress-pod-full") == 1).then_some(())
    });
    clients.go_on();
    clients.expect("NOTHING");
    clients.expect("OPEN");
    assert_eq!(bed.flows("opened"), FLOWS_OF_POD);
    assert_eq!(bed.losses(), [("egress-pod-full".to_owned(), 1)].into());
    drop(pod);
    bed.wait_flows(0);
}

#[test]
fn clients_wait_while_the_queue_of_a_listener_is_full() {
    const CLIENTS: usize = 8;
    let Some(bed) = Bed::new(&[]) else { return };
    // It has room for five, and takes nobody until another was turned away. The others try again
    // later and later, for half a minute.
    let script = r#"
        $| = 1; socket(my $l, PF_INET, SOCK_STREAM, 0);
        # With cookies a kernel may reset whom it cannot take yet.
        open(my $cookies, ">", "/proc/sys/net/ipv4/tcp_syncookies") or die $!;
        syswrite($cookies, "0") or die $!;
        bind($l, pack_sockaddr_in(80, INADDR_ANY)) or die; listen($l, 4) or die; print "READY\n";
        sub overflows {
            open(my $file, "<", "/proc/net/netstat") or die;
            my ($names, $values) = map { [split] } grep { /^TcpExt:/ } <$file>;
            my ($at) = grep { $names->[$_] eq "ListenOverflows" } 0 .. $#$names;
            return $values->[$at];
        }
        select(undef, undef, undef, 0.01) until overflows(); print "OVERFLOW\n"; <STDIN>;
        while (accept(my $c, $l)) {
            my $all = ""; 1 while sysread($c, $all, 65536, length $all);
            syswrite($c, scalar reverse $all); close($c);
        }
    "#;
    let mut pod = bed.script("busy", "7000:80", script);
    let _other = bed.server("other", "7001:8080");
    let mut clients = bed.asks(
        7000,
        r#"$| = 1; my ($address, $port, $count) = @ARGV; alarm 100; my @all;
           for my $i (1 .. $count) {
               socket(my $s, PF_INET, SOCK_STREAM, 0);
               connect($s, pack_sockaddr_in($port, inet_aton($address))) or die "connect: $!";
               my $said = "client $i, " x 3000; syswrite($s, $said) == length $said or die;
               shutdown($s, 1); push @all, [$s, scalar reverse $said];
           }
           print "SENT\n";
           for (@all) {
               my ($s, $expected) = @$_; my $all = "";
               while (my $some = sysread($s, $all, 65536, length $all) // die "read: $!") { }
               $all eq $expected or die "another content";
           }
           print "ALL\n";"#,
        &[&CLIENTS.to_string()],
    );
    clients.expect("SENT");
    pod.expect("OVERFLOW");
    // Nobody is refused for that, and others do not wait.
    bed.wait_flows(CLIENTS as u64);
    traffic::transfer(&mut bed.client.agent(), NODE, 7001, 10_000_000);
    pod.go_on();
    clients.expect("ALL");
    bed.wait_flows(0);
    for end in ["refused", "unreachable", "reset", "expired"] {
        assert_eq!(bed.flows(end), 0, "{end}");
    }
    assert_eq!(bed.flows("opened"), CLIENTS as u64 + 1);
    assert_eq!(bed.losses(), [].into(), "{}", bed.node.log());
}
