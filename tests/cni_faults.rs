//! What is killed while a pod is attached leaves nothing: the plugin, the node and the keeper, at each
//! step of an ADD and at any moment, whether the runtime calls DEL then or not.
//!
//! The steps are those at which something comes into being: the plugin looks at the namespace (1), the
//! node reserves a place (2), the plugin makes the device (3) and hands it over (4), the node has it
//! live, recorded, made to stay and kept (5), and the plugin tells its result and ends (6). All ends are
//! the real ones, with gates in between, which hold a message while somebody is killed.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use muslin_lab::cni::{BIN_DIR, Key, Netns, Network, Runtime, Verb};
use muslin_lab::gate::{Gate, Message};
use muslin_lab::keeper::{Keeper, queues};
use muslin_lab::{Lab, Node, NodeConfig, SOON, cni_bin, poll_until};
use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng as _;
use serde_json::json;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
/// What a run begins its random choices with.
const SEED: &str = "MUSLIN_TEST_SEED";
/// How long the node takes to see twice that a namespace is gone.
const RECONCILED: Duration = Duration::from_secs(45);
/// The first of the pods' published ports.
const FIRST_PORT: u16 = 20_000;

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Plugin,
    Node,
    Keeper,
}

/// What the runtime does then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It calls DEL, before there is a node again where that was killed.
    Del,
    /// It calls DEL once there is.
    LateDel,
    /// Nothing: it was killed, too.
    Nothing,
}

/// A moment of an ADD.
#[derive(Debug, Clone, Copy)]
struct Moment {
    /// Its step.
    step: u8,
    /// What is held, and whether between the node and the keeper.
    message: Message,
    at_keeper: bool,
    /// Whether it arrives after all.
    passes: bool,
}

const fn moment(step: u8, message: Message) -> Moment {
    Moment {
        step,
        message,
        at_keeper: false,
        passes: true,
    }
}

const fn at_keeper(step: u8, message: Message) -> Moment {
    Moment {
        at_keeper: true,
        ..moment(step, message)
    }
}

/// Between a step and the next one of the same process nothing differs: what has come into being
/// belongs to the process alone, and ends with it.
const MOMENTS: [Moment; 9] = [
    moment(1, Message::Call("hello")),
    moment(2, Message::Call("reserve")),
    moment(2, Message::Answer("reserve")),
    Moment {
        passes: false,
        ..moment(3, Message::Call("commit"))
    },
    moment(4, Message::Call("commit")),
    at_keeper(5, Message::Call("hold")),
    at_keeper(5, Message::Answer("hold")),
    moment(5, Message::Answer("commit")),
    moment(6, Message::Call("missing")),
];

/// A node with a keeper, and gates before both.
struct Bed {
    runtime: Runtime,
    keeper: Keeper,
    node: Node,
    to_node: Gate,
    to_keeper: Gate,
    /// Attachments so far.
    count: u16,
    /// Namespaces of those whose end nobody has called for.
    left: Vec<Netns>,
}

impl Bed {
    fn new(lab: &Lab) -> Self {
        let host = lab.host("n1", HOST);
        host.furnish();
        let [keep, to_keep] = ["keep.sock", "to-keep.sock"].map(|it| lab.directory().join(it));
        let keeper = Keeper::start(&host, &keep);
        let to_keeper = Gate::open(&to_keep, &keep);
        let config =
            NodeConfig::new("n1", HOST, &lab.store()).without_capability("net_bind_service");
        let node = config.with("--keeper", to_keep.display()).start(&host);
        // Beside the node's own, where the plugin leaves word for a node that is not there.
        let before_node = node.socket().with_file_name("gate.sock");
        Self {
            runtime: Runtime::new(&host, &Network::muslin(&node)),
            keeper,
            to_node: Gate::open(&before_node, &node.socket()),
            to_keeper,
            node,
            count: 0,
            left: Vec::new(),
        }
    }

    /// A container with a port of its own.
    fn container(&mut self) -> (Netns, Key) {
        let netns = self.runtime.netns();
        let port = FIRST_PORT + self.count;
        let ports = json!([{"hostPort": port, "containerPort": 80, "protocol": "tcp"}]);
        let key = Key::new(&format!("c{}", self.count), netns.path()).with("portMappings", ports);
        self.count += 1;
        (netns, key)
    }

    /// Starts the plugin, which speaks to this socket.
    fn plugin(&self, verb: Verb, key: &Key, socket: &Path) -> Child {
        let mut config = self.runtime.first_config(verb, key);
        config["socket"] = json!(socket);
        let mut command = self.node.host().command(cni_bin());
        command
            .env("CNI_COMMAND", verb.name())
            .env("CNI_CONTAINERID", &key.container)
            .env("CNI_NETNS", &key.netns)
            .env("CNI_IFNAME", &key.interface)
            .env("CNI_ARGS", &key.args)
            .env("CNI_PATH", BIN_DIR)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut plugin = command.spawn().unwrap();
        let mut stdin = plugin.stdin.take().unwrap();
        stdin.write_all(config.to_string().as_bytes()).unwrap();
        plugin
    }

    fn kill(&mut self, victim: Victim, plugin: &mut Child) {
        match victim {
            Victim::Plugin => plugin.kill().unwrap(),
            Victim::Node => self.node.kill(),
            Victim::Keeper => self.keeper.kill(),
        }
    }

    /// What happens after the victim's end, until the plugin has ended, too. Says whether that has
    /// succeeded.
    fn go_on(&mut self, victim: Victim, then: Then, plugin: &mut Child, key: &Key) -> bool {
        match (victim, then) {
            // The runtime calls once the plugin has ended.
            (Victim::Node, Then::Del) => {
                plugin.wait().unwrap();
                self.del(key);
                self.node.start_again();
            }
            (Victim::Node, _) => self.node.start_again(),
            (Victim::Keeper, _) => self.keeper.start_again(),
            (Victim::Plugin, _) => {}
        }
        let succeeded = plugin.wait().unwrap().success();
        if then != Then::Nothing {
            self.del(key);
        }
        succeeded
    }

    fn del(&self, key: &Key) {
        let output = self.runtime.del(key);
        assert!(output.is_success(), "{output:?}");
    }

    fn pods(&self) -> Vec<String> {
        let pods = self.node.query("pods");
        let names = pods.as_array().unwrap().iter();
        names
            .map(|pod| pod["pod"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Waits until a container has nothing any more.
    fn is_gone(&self, netns: &Netns, key: &Key, when: &str) {
        poll_until(
            SOON,
            &format!("the end of {} {when}", key.container),
            || {
                let links = netns.sh("ip -o link");
                (!links.contains("eth0") && !self.pods().contains(&key.container)).then_some(())
            },
        );
    }

    /// An attachment during which somebody is killed.
    fn fault(&mut self, moment: Moment, victim: Victim, then: Then) {
        let when = format!("{victim:?} at {moment:?} then {then:?}");
        let (netns, key) = self.container();
        let gate = match moment.at_keeper {
            true => &self.to_keeper,
            false => &self.to_node,
        };
        let held = gate.hold(moment.message);
        let mut plugin = self.plugin(Verb::Add, &key, self.to_node.socket());
        held.wait();
        self.kill(victim, &mut plugin);
        match moment.passes {
            true => held.pass(),
            false => held.lose(),
        }
        let succeeded = self.go_on(victim, then, &mut plugin, &key);
        // Before the device is handed over it belongs to the plugin alone, and the place to the
        // connection: both end without anybody's help.
        let ends_alone = moment.step <= 3 && !succeeded;
        if then != Then::Nothing || ends_alone {
            self.is_gone(&netns, &key, &when);
        }
        match then {
            Then::Nothing => self.left.push(netns),
            _ => netns.remove(),
        }
    }

    /// Nothing is left once the namespaces are gone and the node has looked at them.
    fn ends_clean(&mut self) {
        for netns in self.left.drain(..) {
            netns.remove();
        }
        // It need not have been killed in between.
        self.node.start_again();
        let directory = self.node.socket().parent().unwrap().to_owned();
        let files = |name: &str| -> Vec<_> {
            let entries = std::fs::read_dir(directory.join(name)).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        poll_until(RECONCILED, "the end of all pods", || {
            self.pods().is_empty().then_some(())
        });
        for name in ["attachments", "deletions"] {
            assert!(files(name).is_empty(), "{name}: {:?}", files(name));
        }
        // A queue would keep its namespace.
        for pid in [self.node.pid(), self.keeper.pid()] {
            poll_until(SOON, "the end of all queues", || {
                (queues(pid) == 0).then_some(())
            });
        }
        let host = self.node.host();
        let listening = host.sh("ss -Hltn | awk '{ print $4 }'");
        let ports = listening.lines().filter_map(|it| it.rsplit(':').next());
        let is_published = |port: &u16| (FIRST_PORT..FIRST_PORT + self.count).contains(port);
        let published: Vec<u16> = ports.filter_map(|port| port.parse().ok()).collect();
        assert!(!published.iter().any(is_published), "{listening}");
        assert_eq!(host.sh("ls /run/netns"), "");
        let links = host.sh("ip -o link");
        assert!(!links.contains("muslin:"), "{links}");
        // And there is room for others.
        let (netns, key) = self.container();
        self.runtime.add(&key).result();
        self.del(&key);
        netns.remove();
    }
}

#[test]
fn whoever_is_killed_at_whichever_step_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let mut bed = Bed::new(&lab);
    for moment in MOMENTS {
        for victim in [Victim::Plugin, Victim::Node, Victim::Keeper] {
            // Both DELs are one where the node was not killed.
            let late = (victim == Victim::Node).then_some(Then::LateDel);
            for then in [Then::Del, Then::Nothing].into_iter().chain(late) {
                bed.fault(moment, victim, then);
            }
        }
    }
    eprintln!("{} faults, {} without a DEL", bed.count, bed.left.len());
    bed.ends_clean();
}

#[test]
fn a_node_that_answers_too_late_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let mut bed = Bed::new(&lab);
    for message in [Message::Call("commit"), Message::Answer("commit")] {
        let (netns, key) = bed.container();
        let held = bed.to_node.hold(message);
        let mut plugin = bed.plugin(Verb::Add, &key, bed.to_node.socket());
        held.wait();
        assert!(!plugin.wait().unwrap().success(), "it has no answer");
        // Before the runtime may try again in the same namespace.
        let links = netns.sh("ip -o link");
        assert!(!links.contains("eth0"), "{message:?}: {links}");
        held.pass();
        bed.is_gone(&netns, &key, &format!("after {message:?}"));
        bed.runtime.add(&key).result();
        bed.del(&key);
        netns.remove();
    }
    bed.ends_clean();
}

#[test]
fn whoever_is_killed_at_any_moment_leaves_nothing() {
    const ROUNDS: u32 = 60;
    /// The longest time before somebody is killed: an ADD takes less.
    const LATEST: Duration = Duration::from_millis(60);

    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let seed = std::env::var(SEED).map_or_else(|_| 1, |text| text.parse().unwrap());
    eprintln!("{SEED}={seed}");
    let mut random = Pcg32::new(seed, 2);
    let mut choose = |count: u32| random.next_u32() % count;
    let mut bed = Bed::new(&lab);
    for _ in 0..ROUNDS {
        let (netns, key) = bed.container();
        let victim = [Victim::Plugin, Victim::Node, Victim::Keeper][choose(3) as usize];
        let then = [Then::Del, Then::LateDel, Then::Nothing][choose(3) as usize];
        let verb = [Verb::Add, Verb::Add, Verb::Del][choose(3) as usize];
        if verb == Verb::Del {
            bed.runtime.add(&key).result();
        }
        let socket = bed.node.socket();
        let mut plugin = bed.plugin(verb, &key, &socket);
        std::thread::sleep(LATEST * choose(1000) / 1000);
        bed.kill(victim, &mut plugin);
        bed.go_on(victim, then, &mut plugin, &key);
        match then {
            Then::Nothing => bed.left.push(netns),
            _ => {
                bed.is_gone(&netns, &key, &format!("{victim:?} {verb:?} {then:?}"));
                netns.remove();
            }
        }
    }
    bed.ends_clean();
}
