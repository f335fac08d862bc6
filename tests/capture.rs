//! `muslin capture` writes what a node saw, as tshark reads it.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use muslin::agent::Agent;
use muslin_lab::{Lab, Node, SOON, poll_until, traffic};

/// Two nodes with a pod each, `web` and `db`.
struct Bed {
    nodes: [Node; 2],
    pods: [Agent; 2],
    lab: Lab,
}

impl Bed {
    fn new(backend: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let nodes = lab.two_nodes(|_, config| config.with("--backend", backend));
        Self::of(lab, nodes)
    }

    /// The same with IPv6 besides.
    fn dual() -> Option<Self> {
        let lab = Lab::new()?;
        let nodes = lab.two_dual_nodes(|_, config| config.with("--backend", "vxlan"));
        Self::of(lab, nodes)
    }

    fn of(lab: Lab, nodes: [Node; 2]) -> Option<Self> {
        if !nodes[0].host().has("tshark", "tshark") {
            return None;
        }
        let pods = [nodes[0].pod("web"), nodes[1].pod("db")];
        Some(Self { nodes, pods, lab })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.lab.directory().join(name)
    }

    /// A capture at the first node that has begun.
    fn capture(&self, file: &Path, words: &[&str]) -> Child {
        self.capture_at(0, file, file, words)
    }

    /// The same at the node with that index, where the first file may have another name than what is
    /// asked for.
    fn capture_at(&self, node: usize, first: &Path, file: &Path, words: &[&str]) -> Child {
        let file = file.to_str().unwrap();
        let words: Vec<_> = ["capture", "-w", file]
            .iter()
            .chain(words)
            .copied()
            .collect();
        let child = self.nodes[node]
            .client(&words)
            .stderr(Stdio::piped())
            .spawn();
        let child = child.unwrap();
        poll_until(SOON, "the head of the file", || {
            let head = std::fs::metadata(first).ok();
            head.filter(|it| it.len() > 0).map(drop)
        });
        child
    }
}

/// Ends a capture as Ctrl-C does; how many packets it had, and how many were lost.
fn end(child: Child) -> (u64, u64) {
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    finished(child)
}

fn finished(child: Child) -> (u64, u64) {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let numbers = said.split(|symbol: char| !symbol.is_ascii_digit());
    let numbers: Vec<u64> = numbers.filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

/// What tshark has of these fields, a line for each packet that its display filter takes. It must not
/// complain of the file.
fn read(file: &Path, filter: &str, fields: &[&str]) -> Vec<Vec<String>> {
    let mut command = Command::new("tshark");
    command
        .arg("-r")
        .arg(file)
        .args([
            "-o",
            "tcp.check_checksum:TRUE",
            "-o",
            "ip.check_checksum:TRUE",
        ])
        .args(["-Y", filter, "-T", "fields"]);
    for field in fields {
        command.args(["-e", field]);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let complains = said.lines().any(|line| !line.contains("Running as user"));
    assert!(output.status.success() && !complains, "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| line.split('\t').map(str::to_owned).collect();
    text.lines().map(line).collect()
}

/// A ping and its reply, at both ends of the tunnel.
fn pings_are_seen_at_all_hooks(backend: &str) {
    let Some(mut bed) = Bed::new(backend) else {
        return;
    };
    let [here, there] = bed.pods.each_mut().map(|pod| pod.address("eth0").unwrap());
    traffic::ping(&mut bed.pods[0], there);
    poll_until(SOON, "the other node's name", || {
        let peers = bed.nodes[0].query("peers");
        (peers[0]["node"] == "n2").then_some(())
    });
    let file = bed.file("all.pcapng");
    let running = bed.capture(&file, &["icmp"]);
    traffic::ping(&mut bed.pods[0], there);
    let (packets, lost) = end(running);
    assert!(
        packets >= 4 && packets.is_multiple_of(4) && lost == 0,
        "{packets}, {lost}"
    );
    let fields = [
        "frame.interface_name",
        "icmp.type",
        "ip.src",
        "frame.comment",
    ];
    let seen = read(&file, "icmp", &fields);
    let (here, there) = (here.to_string(), there.to_string());
    for (hook, kind, source, comment) in [
        ("from-pod", "8", &here, "from pod web; to node n2"),
        ("to-tunnel", "8", &here, "from pod web; to node n2"),
        ("from-tunnel", "0", &there, "from 10.9.0.2"),
        ("to-pod", "0", &there, "to pod web"),
    ] {
        let is_it = |packet: &&Vec<String>| {
            packet[0] == hook
                && packet[1] == kind
                // The inner of two, with IPv4 in IPv4.
                && packet[2].rsplit(',').next() == Some(source)
                && packet[3].contains(comment)
                && !packet[3].contains(":0")
        };
        let count = seen.iter().filter(is_it).count() as u64;
        assert_eq!(count, packets / 4, "{hook}: {seen:?}");
    }
    assert_eq!(
        read(
            &file,
            "_ws.malformed || _ws.expert.severity >= 6291456",
            &["frame.number"]
        ),
        [[""; 0]; 0]
    );
}

#[test]
fn pings_over_vxlan_are_seen_at_all_hooks() {
    pings_are_seen_at_all_hooks("vxlan");
}

#[test]
fn pings_in_ipip_are_seen_at_all_hooks() {
    pings_are_seen_at_all_hooks("ipip");
}

#[test]
fn pings_over_udp_are_seen_at_all_hooks() {
    pings_are_seen_at_all_hooks("udp");
}

#[test]
fn what_is_lost_is_found_by_its_reason() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let file = bed.file("dropped.pcapng");
    let running = bed.capture(&file, &["--dropped", "--pod", "web", "ip"]);
    let there = bed.pods[1].address("eth0").unwrap();
    let gateway = bed.nodes[0].address(1);
    traffic::expires(&mut bed.pods[0], there, 1, gateway);
    let metadata = SocketAddrV4::new([169, 254, 169, 254].into(), 53);
    let _ = bed.pods[0].udp(metadata, 1, 100);
    poll_until(SOON, "the drop", || {
        bed.nodes[0].drops().get("egress-denied").map(drop)
    });
    let (packets, lost) = end(running);
    assert_eq!(lost, 0);
    let of = |reason: &str| {
        let filter = format!("frame.comment contains \"dropped: {reason}\"");
        read(&file, &filter, &["frame.interface_name", "ip.dst"])
    };
    let expired = of("ttl-exceeded");
    assert!(!expired.is_empty());
    assert!(
        expired
            .iter()
            .all(|it| it[..] == ["from-pod", &there.to_string()])
    );
    let denied = of("egress-denied");
    assert!(!denied.is_empty());
    assert!(
        denied
            .iter()
            .all(|it| it[..] == ["to-egress", "169.254.169.254"])
    );
    assert_eq!(packets, (expired.len() + denied.len()) as u64);
}

#[test]
fn at_full_load_nothing_is_lost_silently() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let there = bed.pods[1].address("eth0").unwrap();
    let port = bed.pods[1].listen(0).unwrap();
    let file = bed.file("load.pcapng");
    let before = bed.nodes[0].query("pods")[0]["received"]["packets"]
        .as_u64()
        .unwrap();
    let running = bed.capture(&file, &["--hook", "from-pod", "-s", "96"]);
    traffic::transfer(&mut bed.pods[0], there, port, traffic::BULK);
    let (packets, lost) = end(running);
    let after = bed.nodes[0].query("pods")[0]["received"]["packets"]
        .as_u64()
        .unwrap();
    // All that the pod has sent, or a little more or less at the beginning and the end.
    let sent = after - before;
    assert!(
        packets + lost <= sent && packets + lost + 50 >= sent,
        "{packets} + {lost} of {sent}"
    );
    let seen = read(
        &file,
        "frame",
        &["frame.len", "frame.cap_len", "frame.drop_count"],
    );
    assert_eq!(seen.len() as u64, packets);
    let is_whole = |it: &Vec<String>| it[0].parse::<u32>().unwrap() > 1000 && it[1] == "96";
    assert!(seen.iter().any(is_whole), "{:?}", &seen[..4]);
}

#[test]
fn it_ends_by_itself_and_keeps_a_ring_of_files() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let there = bed.pods[1].address("eth0").unwrap();
    let port = bed.pods[1].listen(0).unwrap();
    let file = bed.file("few.pcapng");
    let running = bed.capture(&file, &["-c", "5", "host", &there.to_string()]);
    let ring = bed.file("ring.pcapng");
    let first = bed.file("ring-0.pcapng");
    let words = [
        "--file-size",
        "1",
        "--files",
        "2",
        "--hook",
        "to-pod,from-pod",
    ];
    let rotating = bed.capture_at(0, &first, &ring, &words);
    traffic::transfer(&mut bed.pods[0], there, port, 5_000_000);
    assert_eq!(finished(running), (5, 0));
    assert_eq!(read(&file, "frame", &["frame.number"]).len(), 5);
    let (packets, _) = end(rotating);
    let files = ["ring-0.pcapng", "ring-1.pcapng"].map(|name| bed.file(name));
    let counts = files.each_ref().map(|file| {
        assert!(std::fs::metadata(file).unwrap().len() <= 1_100_000);
        read(file, "frame", &["frame.number"]).len() as u64
    });
    assert!(!bed.file("ring-2.pcapng").exists());
    assert!(
        counts.iter().sum::<u64>() < packets,
        "the oldest are gone: {counts:?} of {packets}"
    );
}

/// What was sent by TCP from there, by sequence number, as far as it was seen at a hook.
fn sent(file: &Path, hook: &str, from: IpAddr) -> BTreeMap<u32, u8> {
    let filter = format!("{} && tcp.len > 0", at(hook, from));
    let mut sent = BTreeMap::new();
    for packet in read(file, &filter, &["tcp.seq_raw", "tcp.payload"]) {
        let first: u32 = packet[0].parse().unwrap();
        let bytes = packet[1]
            .as_bytes()
            .chunks(2)
            .map(|digits| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap());
        for (at, byte) in (0..).zip(bytes) {
            let known = sent.insert(first.wrapping_add(at), byte);
            assert!(known.is_none_or(|known| known == byte), "{packet:?}");
        }
    }
    sent
}

/// A display filter for packets from an address at a hook.
fn at(hook: &str, from: IpAddr) -> String {
    let field = if from.is_ipv4() { "ip" } else { "ipv6" };
    format!("frame.interface_name == \"{hook}\" && {field}.src == {from}")
}

/// What tshark finds wrong with packets of a file, but for what TCP does where packets are lost.
fn wrong(file: &Path) -> Vec<Vec<String>> {
    let filter = "_ws.malformed || tcp.checksum.status == 0 || ip.checksum.status == 0 \
                  || _ws.expert.severity >= 6291456 && !tcp.analysis.flags && !tcp.flags.reset";
    read(file, filter, &["frame.number", "_ws.expert.message"])
}

/// What was merged on its way in is cut as it came, at all hooks that it passes.
#[test]
fn segments_of_what_was_merged_are_whole_in_both_versions() {
    let Some(mut bed) = Bed::dual() else { return };
    let mut addresses = |pod: &mut Agent| -> [IpAddr; 2] {
        let (ipv4, ipv6) = (pod.address("eth0"), pod.address_v6("eth0"));
        [ipv4.unwrap().into(), ipv6.unwrap().into()]
    };
    let [here, there] = bed.pods.each_mut().map(&mut addresses);
    let port = bed.pods[0].listen(0).unwrap();
    for (here, there) in here.into_iter().zip(there) {
        traffic::ping(&mut bed.pods[1], here);
        let [came, left] = ["came", "left"].map(|name| bed.file(name));
        let running = [
            bed.capture_at(0, &came, &came, &["--segments", "tcp"]),
            bed.capture_at(1, &left, &left, &["--hook", "from-pod", "tcp"]),
        ];
        traffic::transfer(&mut bed.pods[1], here, port, 500_000);
        for child in running {
            let (_, lost) = end(child);
            assert_eq!(lost, 0);
        }
        let expected = sent(&left, "from-pod", there);
        assert!(expected.len() >= 500_000, "{}", expected.len());
        assert_eq!(wrong(&came), [[""; 0]; 0]);
        for hook in ["from-tunnel", "to-pod"] {
            assert!(sent(&came, hook, there) == expected, "{hook} {there}");
            let fields = ["frame.len", "frame.cap_len", "frame.comment"];
            let seen = read(&came, &at(hook, there), &fields);
            let is_cut = seen.iter().any(|it| it[2].contains("; segment 2 of "));
            assert!(is_cut, "{hook} {there}: nothing was merged");
            let longest = u32::from(bed.nodes[0].mtu()) + 14;
            for packet in seen {
                let [len, there] = [0, 1].map(|at| packet[at].parse::<u32>().unwrap());
                assert!(len <= longest && len == there, "{hook}: {packet:?}");
            }
        }
        for file in [came, left] {
            std::fs::remove_file(file).unwrap();
        }
    }
}

#[test]
fn superpackets_are_written_as_their_segments() {
    for backend in ["vxlan", "ipip"] {
        let Some(mut bed) = Bed::new(backend) else {
            return;
        };
        let [here, there] = bed.pods.each_mut().map(|pod| pod.address("eth0").unwrap());
        let port = bed.pods[1].listen(0).unwrap();
        let [whole, cut, all] = ["whole", "cut", "all"].map(|name| bed.file(name));
        let hook = ["--hook", "from-pod", "tcp"];
        let running = [
            bed.capture(&whole, &hook),
            bed.capture(&cut, &[&["--segments"], &hook[..]].concat()),
            bed.capture(&all, &["--segments", "tcp"]),
        ];
        traffic::transfer(&mut bed.pods[0], there, port, 500_000);
        let port = bed.pods[0].listen(0).unwrap();
        traffic::transfer(&mut bed.pods[1], here, port, 500_000);
        let [packets, segments, _] = running.map(|child| {
            let (packets, lost) = end(child);
            assert_eq!(lost, 0);
            packets
        });
        assert!(packets < segments, "{packets} superpackets, {segments}");
        let contents = sent(&cut, "from-pod", here.into());
        assert!(contents.len() >= 500_000);
        let expected = sent(&whole, "from-pod", here.into());
        assert!(contents == expected, "the contents differ");

        // Each as it is on a wire, with numbers that go on.
        let mtu = u64::from(bed.nodes[0].mtu());
        let fields = ["ip.len", "tcp.seq_raw", "tcp.len", "frame.comment"];
        let (mut next, mut last) = (None, 0);
        for packet in read(&cut, &format!("ip.src == {here}"), &fields) {
            let [len, sequence, payload] = [0, 1, 2].map(|at| packet[at].parse::<u64>().unwrap());
            assert!(len <= mtu, "{packet:?}");
            let Some((became, place)) = packet[3].split_once("; segment ") else {
                continue;
            };
            assert!(became.starts_with("from pod web; to "), "{packet:?}");
            let (number, count) = place.split_once(" of ").unwrap();
            let [number, count] = [number, count].map(|it| it.parse::<u32>().unwrap());
            match number {
                1 => assert_eq!(last, 0, "{packet:?}"),
                _ => assert_eq!((number, Some(sequence)), (last + 1, next), "{packet:?}"),
            }
            next = Some((sequence + payload) % (1 << 32));
            last = if number == count { 0 } else { number };
        }
        for file in [&cut, &all] {
            assert_eq!(wrong(file), [[""; 0]; 0]);
        }
        // What was merged again is cut again, at all hooks on the way.
        for hook in ["from-tunnel", "to-pod"] {
            let filter =
                format!("frame.interface_name == \"{hook}\" && ip.src == {there} && tcp.len > 0");
            let seen = read(&all, &filter, &["ip.len", "frame.comment"]);
            let is_cut = seen.iter().any(|it| it[1].contains("; segment 2 of "));
            // IPv4 in IPv4 comes one by one, if the node is as fast as that.
            assert!(!seen.is_empty() && (is_cut || backend == "ipip"), "{hook}");
            let lens = seen
                .iter()
                .map(|it| it[0].rsplit(',').next().unwrap().parse::<u64>().unwrap());
            assert!(lens.max() <= Some(mtu), "{hook}");
        }
    }
}

#[test]
fn what_was_captured_is_told_though_the_node_ends() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let there = bed.pods[1].address("eth0").unwrap();
    let file = bed.file("all.pcapng");
    let running = bed.capture(&file, &["--hook", "from-pod", "icmp"]);
    let head = std::fs::metadata(&file).unwrap().len();
    traffic::ping(&mut bed.pods[0], there);
    poll_until(SOON, "the pings in the file", || {
        (std::fs::metadata(&file).unwrap().len() > head + 100).then_some(())
    });
    bed.nodes[0].kill();
    let output = running.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    assert!(
        lines[1].contains("the node has ended, and the capture with it"),
        "{said}"
    );
    let told: usize = lines[0].split(' ').next().unwrap().parse().unwrap();
    assert!(told > 0 && lines[0].contains(" captured, "), "{said}");
    assert_eq!(read(&file, "icmp", &["frame.number"]).len(), told);
}

#[test]
fn tcpdump_reads_what_pods_and_vxlan_carry() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let there = bed.pods[1].address("eth0").unwrap();
    let file = bed.file("all.pcapng");
    let running = bed.capture(&file, &["icmp"]);
    traffic::ping(&mut bed.pods[0], there);
    let (packets, _) = end(running);
    let output = Command::new("tcpdump").arg("-nr").arg(&file).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count() as u64, packets, "{text}");
}

#[test]
fn it_ends_though_nobody_reads() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let there = bed.pods[1].address("eth0").unwrap();
    let port = bed.pods[1].listen(0).unwrap();
    let mut client = bed.nodes[0].client(&["capture", "-w", "-"]);
    let client = client.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = client.spawn().unwrap();
    let mut output = running.stdout.take().unwrap();
    let mut head = [0; 28];
    output.read_exact(&mut head).unwrap();
    // More than the pipe takes.
    traffic::transfer(&mut bed.pods[0], there, port, 5_000_000);
    let pid = nix::unistd::Pid::from_raw(running.id() as i32);
    let ended = poll_until(SOON, "its end", || {
        let ended = running.try_wait().unwrap();
        if ended.is_none() {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        }
        ended
    });
    assert_eq!(ended.code(), Some(1));
    let said = std::io::read_to_string(running.stderr.take().unwrap()).unwrap();
    assert!(said.contains("interrupted before"), "{said}");
    drop(output);
}

#[test]
fn wrong_words_are_one_line() {
    let Some(bed) = Bed::new("vxlan") else { return };
    let file = bed.file("x.pcapng");
    for (words, code, said) in [
        (
            &["--hook", "nowhere"][..],
            2,
            "there is no hook 'nowhere': hooks are from-pod, to-pod",
        ),
        (&["--pod", "nobody"], 1, "no pod named 'nobody'"),
        (&["--peer", "nobody"], 2, "there is no other node 'nobody'"),
        (
            &["ether", "host", "x"],
            2,
            "a filter cannot have 'ether' here",
        ),
        (
            &["port", "http"],
            2,
            "port needs a number up to 65535, and 'http' is none",
        ),
    ] {
        let file = file.to_str().unwrap();
        let words: Vec<_> = ["capture", "-w", file]
            .iter()
            .chain(words)
            .copied()
            .collect();
        let output = bed.nodes[0].client(&words).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
        assert!(
            error.contains(said) && error.lines().count() == 1,
            "{words:?}: {error}"
        );
    }
    assert!(!file.exists(), "a file that would stay empty");
}
