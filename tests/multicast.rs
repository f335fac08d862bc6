//! Groups between pods, on one node and on two: who joins by IGMP or MLD hears, and nobody else.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use muslin::agent::Agent;
use muslin_lab::skip::skip;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until};
use muslin_stack::api::control::{Attached, Group};
use socket2::{Domain, Protocol, Socket, Type};

const NETWORK: &str = "fd44::/48";
/// Where most groups are spoken to.
const PORT: u16 = 9999;
/// Where multicast DNS is.
const MDNS: u16 = 5353;
const BOTH: [&str; 2] = ["239.1.2.3", "ff05::1:3"];

/// A pod as a namespace, with a process in it that sends, joins and leaves.
struct Pod {
    name: String,
    address: Attached,
    child: Child,
    /// Text, and where it came from.
    heard: Arc<Mutex<Vec<(String, SocketAddr)>>>,
    _host: Host,
}

impl Pod {
    fn new(lab: &Lab, node: &Node, name: &str) -> Self {
        let host = lab.namespace(name);
        let pid = host.pid().to_string();
        let mut command = node.client(&["attach", "--pid", &pid, "--name", name, "--json"]);
        let output = command.stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success(), "no pod {name}{}", node.log());
        let mut command = host.command(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "--nocapture", "inside_a_pod"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (lines, all) = (BufReader::new(child.stdout.take().unwrap()), heard.clone());
        thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut words = line.split(' ').skip_while(|word| *word != "heard");
                if let (Some(_), Some(text), Some(from)) =
                    (words.next(), words.next(), words.next())
                {
                    all.lock()
                        .unwrap()
                        .push((text.to_owned(), from.parse().unwrap()));
                }
            }
        });
        let pod = Self {
            name: name.to_owned(),
            address: serde_json::from_slice(&output.stdout).unwrap(),
            child,
            heard,
            _host: host,
        };
        poll_until(SOON, "the process in the pod", || pod.has_heard("ready"));
        pod
    }

    fn tell(&mut self, words: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{words}").unwrap();
    }

    /// Sends a text to a group, or to a pod.
    fn send(&mut self, to: impl ToString, port: u16, hops: u8, text: &str) {
        self.tell(&format!("send {} {port} {hops} {text}", to.to_string()));
    }

    fn has_heard(&self, text: &str) -> Option<SocketAddr> {
        let heard = self.heard.lock().unwrap();
        heard.iter().find(|it| it.0 == text).map(|it| it.1)
    }

    /// Waits for a text, and says from where it came.
    fn hears(&self, text: &str) -> SocketAddr {
        let what = format!("{text} at {}", self.name);
        poll_until(SOON, &what, || self.has_heard(text))
    }

    fn ipv4(&self) -> Ipv4Addr {
        self.address.address.ipv4().unwrap().addr()
    }

    fn ipv6(&self) -> Ipv6Addr {
        self.address.address.ipv6().unwrap().addr()
    }

    /// Joins or leaves, and waits until its node knows.
    fn joins(&mut self, node: &Node, group: &str, joins: bool) {
        self.tell(&format!("{} {group}", if joins { "join" } else { "leave" }));
        let what = format!("{} and {group}, {joins}", self.name);
        poll_until(SOON, &what, || {
            (groups(node).contains(&(group.to_owned(), self.name.clone())) == joins).then_some(())
        });
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // At the end of its input it ends.
        self.child.stdin = None;
        let _ = self.child.wait();
    }
}

/// Who is in which group.
fn groups(node: &Node) -> Vec<(String, String)> {
    let rows: Vec<Group> = serde_json::from_value(node.query("groups")).unwrap();
    let row = |row: Group| (row.group.to_string(), row.pod.unwrap().to_string());
    rows.into_iter().map(row).collect()
}

/// Two nodes in both versions, which follow groups where it is said.
fn nodes(lab: &Lab, follow: [bool; 2]) -> Option<[Node; 2]> {
    let store = lab.store();
    let hosts = [1, 2].map(|number: u8| {
        let host = lab.host(&format!("h{number}"), Ipv4Addr::new(10, 9, 0, number));
        let address = format!("fd09::{number}/64");
        let words = ["ip", "addr", "add", &address, "dev", "eth0", "nodad"];
        let has_ipv6 = host.output(&words).status.success();
        has_ipv6.then_some(host)
    });
    let [Some(one), Some(two)] = hosts else {
        skip("the kernel has no IPv6");
        return None;
    };
    let start = |(host, name, follows): (&Host, &str, bool)| {
        let config = NodeConfig::on_interface(name, "eth0", &store);
        let config = config
            .with("--network", format_args!("10.244.0.0/16,{NETWORK}"))
            .with("--workers", 2);
        match follows {
            true => config.flag("--multicast").start(host),
            false => config.start(host),
        }
    };
    let nodes = [(&one, "n1", follow[0]), (&two, "n2", follow[1])].map(start);
    for (node, follows) in nodes.iter().zip(follow) {
        node.wait_peers(1);
        assert_eq!(node.query("status")["multicast"], follows);
    }
    Some(nodes)
}

/// Whether a text is in one of the frames that a pod was given.
fn is_in(frames: &[Vec<u8>], text: &str) -> bool {
    let text = text.as_bytes();
    let mut frames = frames.iter();
    frames.any(|frame| frame.windows(text.len()).any(|part| part == text))
}

#[test]
fn members_on_both_nodes_hear_and_others_do_not() {
    let Some(lab) = Lab::new() else { return };
    let Some(nodes) = nodes(&lab, [true, true]) else {
        return;
    };
    let mut sender = Pod::new(&lab, &nodes[0], "sender");
    let mut near = Pod::new(&lab, &nodes[0], "near");
    let mut far = Pod::new(&lab, &nodes[1], "far");
    let mut others: Vec<Agent> = nodes.iter().map(|node| node.pod("other")).collect();
    for other in &mut others {
        other.capture("eth0").unwrap();
    }
    for (at, group) in BOTH.into_iter().enumerate() {
        let text = |what: &str| format!("{what}-{at}");
        near.joins(&nodes[0], group, true);
        far.joins(&nodes[1], group, true);
        sender.send(group, PORT, 8, &text("all"));
        let source = near.hears(&text("all"));
        assert_eq!(far.hears(&text("all")), source, "the pod's own address");
        let own: [IpAddr; 2] = [sender.ipv4().into(), sender.ipv6().into()];
        assert_eq!(source.ip(), own[at]);

        // What is to stay on the link does.
        sender.send(group, PORT, 1, &text("near"));
        sender.send(group, PORT, 2, &text("again"));
        near.hears(&text("near"));
        far.hears(&text("again"));
        assert_eq!(far.has_heard(&text("near")), None);

        // A member that leaves hears no more, and others go on.
        near.joins(&nodes[0], group, false);
        sender.send(group, PORT, 8, &text("left"));
        far.hears(&text("left"));
        sender.send(near.ipv4(), PORT, 64, &text("fence"));
        near.hears(&text("fence"));
        assert_eq!(near.has_heard(&text("left")), None);
        far.joins(&nodes[1], group, false);
    }
    for other in &mut others {
        let frames = other.captured().unwrap();
        for text in ["all-", "near-", "again-", "left-"] {
            assert!(!is_in(&frames, text), "{text}");
        }
    }
    // Memberships end with their pods.
    far.joins(&nodes[1], BOTH[0], true);
    drop(far);
    poll_until(SOON, "the end of the pod's membership", || {
        let all = groups(&nodes[1]);
        let mut left = all.iter().filter(|(group, _)| group == BOTH[0]);
        left.next().is_none().then_some(())
    });
}

/// A question to all, and an answer to all, as responders have it (RFC 6762).
#[test]
fn pods_of_two_nodes_find_each_other_by_multicast_dns() {
    let Some(lab) = Lab::new() else { return };
    let Some(nodes) = nodes(&lab, [true, true]) else {
        return;
    };
    let mut asks = Pod::new(&lab, &nodes[0], "asks");
    let mut near = Pod::new(&lab, &nodes[0], "near");
    let mut far = Pod::new(&lab, &nodes[1], "far");
    for (at, group) in ["224.0.0.251", "ff02::fb"].into_iter().enumerate() {
        let text = |what: &str| format!("{what}-{at}");
        for (pod, node) in [(&mut asks, 0), (&mut near, 0), (&mut far, 1)] {
            pod.joins(&nodes[node], group, true);
        }
        asks.send(group, MDNS, 255, &text("question"));
        near.hears(&text("question"));
        // From an address that can be answered, not from that of another link.
        let source = far.hears(&text("question")).ip();
        let own: [IpAddr; 2] = [asks.ipv4().into(), asks.ipv6().into()];
        assert_eq!(source, own[at]);
        far.send(group, MDNS, 255, &text("answer"));
        asks.hears(&text("answer"));
        near.hears(&text("answer"));
        far.send(source, MDNS, 255, &text("directly"));
        asks.hears(&text("directly"));
    }
}

#[test]
fn groups_are_followed_only_where_it_is_said() {
    for follow in [[false, false], [true, false], [false, true]] {
        let Some(lab) = Lab::new() else { return };
        let Some(nodes) = nodes(&lab, follow) else {
            return;
        };
        let mut pods = [0, 1].map(|at| Pod::new(&lab, &nodes[at], ["one", "two"][at]));
        for group in BOTH {
            for (at, pod) in pods.iter_mut().enumerate() {
                match follow[at] {
                    true => pod.joins(&nodes[at], group, true),
                    false => pod.tell(&format!("join {group}")),
                }
            }
            for (from, to) in [(0, 1), (1, 0)] {
                // What is sent behind it comes.
                let (address, fence) = (pods[to].ipv4(), format!("fence-{from}-{group}"));
                pods[from].send(group, PORT, 8, "group");
                pods[from].send(address, PORT, 64, &fence);
                pods[to].hears(&fence);
                assert_eq!(pods[to].has_heard("group"), None, "{follow:?}");
            }
        }
        for (node, follows) in nodes.iter().zip(follow) {
            assert_eq!(groups(node).is_empty(), !follows);
            assert!(!node.drops().contains_key("destination-not-unicast"));
        }
    }
}

/// The process in a pod: it takes orders from its input.
#[test]
#[ignore = "others run it"]
fn inside_a_pod() {
    let index = nix::net::if_::if_nametoindex("eth0").unwrap_or_default();
    let socket = |domain, port| {
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        let any: IpAddr = match domain {
            Domain::IPV6 => {
                socket.set_only_v6(true).unwrap();
                socket.set_multicast_if_v6(index).unwrap();
                Ipv6Addr::UNSPECIFIED.into()
            }
            _ => Ipv4Addr::UNSPECIFIED.into(),
        };
        socket.bind(&SocketAddr::new(any, port).into()).unwrap();
        let reader: std::net::UdpSocket = socket.try_clone().unwrap().into();
        thread::spawn(move || {
            let mut room = [0; 200];
            while let Ok((len, from)) = reader.recv_from(&mut room) {
                println!("heard {} {from}", String::from_utf8_lossy(&room[..len]));
            }
        });
        socket
    };
    let sockets = [PORT, MDNS].map(|port| [Domain::IPV4, Domain::IPV6].map(|it| socket(it, port)));
    println!("\nheard ready 0.0.0.0:0");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let address: IpAddr = words[1].parse().unwrap();
        let at = usize::from(address.is_ipv6());
        let [of_groups, of_mdns] = &sockets;
        match (words[0], address) {
            ("join", IpAddr::V4(it)) => {
                of_groups[at].join_multicast_v4(&it, &Ipv4Addr::UNSPECIFIED)
            }
            ("join", IpAddr::V6(it)) => of_groups[at].join_multicast_v6(&it, index),
            ("leave", IpAddr::V4(it)) => {
                of_groups[at].leave_multicast_v4(&it, &Ipv4Addr::UNSPECIFIED)
            }
            ("leave", IpAddr::V6(it)) => of_groups[at].leave_multicast_v6(&it, index),
            (_, address) => {
                let port: u16 = words[2].parse().unwrap();
                let socket = if port == MDNS {
                    &of_mdns[at]
                } else {
                    &of_groups[at]
                };
                let hops = words[3].parse().unwrap();
                let to: SocketAddr = match address {
                    IpAddr::V4(it) => {
                        socket.set_multicast_ttl_v4(hops).unwrap();
                        socket.set_multicast_loop_v4(false).unwrap();
                        (it, port).into()
                    }
                    IpAddr::V6(it) => {
                        socket.set_multicast_hops_v6(hops).unwrap();
                        socket.set_multicast_loop_v6(false).unwrap();
                        let scope = if it.is_multicast() { index } else { 0 };
                        SocketAddrV6::new(it, port, 0, scope).into()
                    }
                };
                socket.send_to(words[4].as_bytes(), &to.into()).map(|_| ())
            }
        }
        .unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}
