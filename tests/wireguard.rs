//! WireGuard: nodes carry each other's pods encrypted, and those of flannel nodes with the backend
//! `wireguard`, whose device is wireguard-go here, set up from the lease records alone.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use muslin::agent::{Agent, Ping};
use muslin_lab::etcd::{Etcd, PREFIX};
use muslin_lab::flannel::{self, Flannel, KERNEL_IP, NODE_IP};
use muslin_lab::{Lab, Node, NodeConfig, SOON, poll_until, traffic};
use serde_json::Value;

/// MTU of pods of a node, on an underlay of 1,500 bytes.
const MTU: u16 = 1408;
/// The same of flannel's.
const FLANNEL_MTU: u16 = 1420;
/// A secret of all nodes.
const PSK: &str = "FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=";

fn address(pod: &mut Agent) -> Ipv4Addr {
    pod.address("eth0").unwrap()
}

/// Sends much to a pod, and compares it there.
fn transfer(from: &mut Agent, to: &mut Agent) {
    let port = to.listen(0).unwrap();
    let address = address(to);
    traffic::transfer(from, address, port, traffic::BULK);
}

/// What a node has lost, but for datagrams that came faster than a busy machine let it read them.
fn lost(node: &Node) -> Vec<(String, u64)> {
    let lost = node.losses().into_iter();
    lost.filter(|(reason, _)| reason != "underlay-overflow")
        .collect()
}

#[test]
fn pods_of_two_nodes_are_encrypted_between_them() {
    let Some(lab) = Lab::new() else { return };
    let [one, two] = lab.two_nodes(|_, config| config.with("--backend", "wireguard"));
    assert_eq!(one.mtu(), MTU);
    let (mut ours, mut theirs) = (one.pod("ours"), two.pod("theirs"));
    let [here, there] = [address(&mut ours), address(&mut theirs)];

    // From the first packet on, nobody on the wire sees who speaks, nor what is said.
    let mut wire = two.host().agent();
    wire.capture("eth0").unwrap();
    traffic::ping(&mut ours, there);
    traffic::fits(&mut ours, there, MTU);
    let ends = [&here.octets()[..], &there.octets()].concat();
    let frames = wire.captured().unwrap();
    let shows = |frame: &Vec<u8>| frame.windows(8).any(|part| part == ends);
    assert!(frames.len() > 6, "{} frames", frames.len());
    let shown = frames.iter().find(|frame| shows(frame));
    assert_eq!(shown, None);

    transfer(&mut ours, &mut theirs);
    transfer(&mut theirs, &mut ours);
    for node in [&one, &two] {
        assert_eq!(lost(node), [], "{}", node.log());
    }
}

/// A flannel node of the backend `wireguard`: its devices are made from the records alone.
struct FlannelNode<'a> {
    etcd: &'a Etcd,
    flannel: Flannel,
    directory: PathBuf,
    device: Child,
}

impl Drop for FlannelNode<'_> {
    fn drop(&mut self) {
        let _ = self.device.kill();
        let _ = self.device.wait();
    }
}

impl<'a> FlannelNode<'a> {
    /// Takes part; nothing if there is no wireguard-go.
    fn join(lab: &Lab, etcd: &'a Etcd) -> Option<Self> {
        let flannel = Flannel::new(lab, FLANNEL_MTU);
        for (program, package) in [("wireguard-go", "wireguard-go"), ("wg", "wireguard-tools")] {
            if !flannel.host.has(program, package) {
                return None;
            }
        }
        flannel
            .host
            .sh("mount -t tmpfs none /run && mkdir /run/wireguard");
        let mut command = flannel.host.command("wireguard-go");
        command.args(["-f", "flannel-wg"]).stdin(Stdio::null());
        // It would say on each start that kernels have WireGuard, too.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let device = command.spawn().unwrap();
        poll_until(SOON, "the device", || {
            let shown = flannel.host.output(&["wg", "show", "flannel-wg"]);
            shown.status.success().then_some(())
        });
        let node = Self {
            etcd,
            flannel,
            directory: lab.directory().to_owned(),
            device,
        };
        node.flannel.host.sh(&format!(
            "ip link set flannel-wg mtu {FLANNEL_MTU} up
             ip addr add {}/32 dev flannel-wg
             ip route add {} dev flannel-wg scope link",
            flannel::kernel(0),
            flannel::NETWORK
        ));
        node.choose_key();
        Some(node)
    }

    /// A new key, as each start of flanneld may have, in its record.
    fn choose_key(&self) {
        let file = self.directory.join("wgkey");
        let host = &self.flannel.host;
        let key = host.run(&["wg", "genkey"]);
        std::fs::write(&file, &key).unwrap();
        host.sh(&format!(
            "wg set flannel-wg listen-port 51820 private-key {}",
            file.display()
        ));
        let public = host.sh(&format!("wg pubkey <{}", file.display()));
        let record = format!(
            r#"{{"PublicIP":"{KERNEL_IP}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{}","Port":51820}}}}"#,
            public.trim()
        );
        let key = flannel::KERNEL_SUBNET.replace('/', "-");
        self.etcd
            .publish(&format!("{PREFIX}/subnets/{key}"), &record);
    }

    /// Adds a node as flannel does, by its record.
    fn add(&self, node: &Node, psk: bool) -> Value {
        let subnet = node.status("subnet");
        let key = format!("{PREFIX}/subnets/{}", subnet.replace('/', "-"));
        let record: Value = serde_json::from_str(&self.etcd.get(&key).unwrap().value).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        assert_eq!(record["BackendType"], "wireguard");
        let secret = match psk {
            true => {
                let file = self.directory.join("psk");
                std::fs::write(&file, PSK).unwrap();
                format!("preshared-key {}", file.display())
            }
            false => String::new(),
        };
        self.flannel.host.sh(&format!(
            "wg set flannel-wg peer {} endpoint {}:{} allowed-ips {subnet} {secret}",
            text(&record["BackendData"]["PublicKey"]),
            text(&record["PublicIP"]),
            record["BackendData"]["Port"],
        ));
        record
    }
}

fn config(psk: bool) -> String {
    let psk = match psk {
        true => format!(r#","PSK":"{PSK}""#),
        false => String::new(),
    };
    format!(
        r#"{{"Network":"{}","Backend":{{"Type":"wireguard"{psk}}}}}"#,
        flannel::NETWORK
    )
}

/// A flannel node and one of this network; nothing if there is no wireguard-go.
fn flannel_and_node<'a>(lab: &Lab, etcd: &'a Etcd, psk: bool) -> Option<(FlannelNode<'a>, Node)> {
    etcd.configure(PREFIX, &config(psk));
    let flannel = FlannelNode::join(lab, etcd)?;
    let node = NodeConfig::new("n", NODE_IP, &etcd.store());
    let node = node.start(&lab.host("n", NODE_IP));
    node.wait_peers(1);
    flannel.add(&node, psk);
    Some((flannel, node))
}

#[test]
fn a_flannel_node_and_a_muslin_node_are_one_network() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let Some((flannel, node)) = flannel_and_node(&lab, &etcd, false) else {
        return;
    };
    let (mut theirs, mut ours) = (flannel.flannel.pod.agent(), node.pod("pod"));
    let mut host = flannel.flannel.host.agent();
    let there = flannel::kernel(2);
    let here = address(&mut ours);
    // Each begins once: the handshake of the other direction.
    traffic::ping(&mut theirs, here);
    traffic::ping(&mut ours, there);
    traffic::ping(&mut host, here);
    traffic::ping(&mut ours, flannel::kernel(0));
    // All lengths up to the MTU, padded or not, and what is one too long.
    for size in (1390..=MTU).chain([100, 1280]) {
        traffic::fits(&mut ours, there, size);
        traffic::fits(&mut theirs, here, size);
    }
    traffic::exceeds(&mut theirs, here, MTU, node.address(1));
    let port = theirs.listen(0).unwrap();
    traffic::transfer(&mut ours, there, port, traffic::BULK);
    transfer(&mut theirs, &mut ours);
    assert_eq!(
        lost(&node),
        [("fragmentation-needed".to_owned(), 1)],
        "{}",
        node.log()
    );
}

/// With a secret that all nodes have, and one handshake after the other: from either side, by another key,
/// and from another address.
#[test]
fn keys_and_addresses_change_while_pods_speak() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let Some((flannel, node)) = flannel_and_node(&lab, &etcd, true) else {
        return;
    };
    let host = &flannel.flannel.host;
    let (mut theirs, mut ours) = (flannel.flannel.pod.agent(), node.pod("pod"));
    let here = address(&mut ours);
    traffic::ping(&mut ours, flannel::kernel(2));
    let port = ours.listen(0).unwrap();
    let connection = theirs.open(SocketAddrV4::new(here, port)).unwrap();
    assert!(theirs.exchange(connection, 100_000, 1).unwrap().intact);

    // The flannel node gets another address, and says so by what it sends.
    host.sh("echo 1 >/proc/sys/net/ipv4/conf/all/promote_secondaries");
    let moved = Ipv4Addr::new(10, 9, 0, 77);
    host.sh(&format!(
        "ip addr add {moved}/24 dev eth0; ip addr del {KERNEL_IP}/24 dev eth0"
    ));
    // wireguard-go looks for another address of its own when nothing has been answered for 15 s.
    poll_until(2 * SOON, "a packet from the other address", || {
        let pinged = theirs.ping(&Ping {
            count: 1,
            ..Ping::new(here)
        });
        pinged.unwrap().is_perfect(1).then_some(())
    });
    assert!(theirs.exchange(connection, 1_000_000, 2).unwrap().intact);
    traffic::ping(&mut ours, flannel::kernel(2));
    let shown = node.query("peers");
    let encryption = &shown[0]["encryption"];
    assert_eq!(encryption["endpoint"], format!("{moved}:51820"), "{shown}");
    assert_eq!(
        (&encryption["roamed"], &encryption["waiting"]),
        (&true.into(), &0.into())
    );
    let handshake = encryption["handshake_seconds"].as_u64();
    assert!(handshake.is_some_and(|seconds| seconds < 60), "{shown}");
    // Its record, written again, changes nothing.
    let key = format!(
        "{PREFIX}/subnets/{}",
        flannel::KERNEL_SUBNET.replace('/', "-")
    );
    let record = etcd.get(&key).unwrap();
    etcd.publish(&key, &record.value);
    assert!(theirs.exchange(connection, 1_000_000, 3).unwrap().intact);

    // It starts anew, with another key, and the connection goes on.
    host.sh(&format!("ip addr add {KERNEL_IP}/24 dev eth0"));
    flannel.choose_key();
    traffic::ping(&mut ours, flannel::kernel(2));
    assert!(theirs.exchange(connection, 1_000_000, 5).unwrap().intact);
    traffic::ping(&mut ours, flannel::kernel(2));

    // A flannel node that does not know the secret is not heard.
    let wrong = host.run(&["wg", "genpsk"]);
    std::fs::write(lab.directory().join("wrong"), wrong).unwrap();
    let peer = host.sh("wg show flannel-wg peers");
    let set = |file: &str| {
        let file = lab.directory().join(file);
        host.sh(&format!(
            "wg set flannel-wg peer {} remove
             wg set flannel-wg peer {} endpoint {NODE_IP}:51820 allowed-ips {} preshared-key {}",
            peer.trim(),
            peer.trim(),
            node.status("subnet"),
            file.display()
        ));
    };
    set("wrong");
    poll_until(2 * SOON, "a handshake that is refused", || {
        let pinged = ours.ping(&Ping {
            count: 1,
            ..Ping::new(flannel::kernel(2))
        });
        assert!(pinged.unwrap().replies.is_empty());
        node.drops().contains_key("wireguard-forged").then_some(())
    });
    set("psk");
    assert!(theirs.exchange(connection, 1_000_000, 6).unwrap().intact);
}

/// Links lose and reorder; a session ends after two minutes and the next begins meanwhile.
#[test]
#[ignore = "it takes two minutes: cargo test --test wireguard -- --ignored"]
fn sessions_are_renewed_while_pods_speak_over_a_lossy_link() {
    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(400));
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let Some((flannel, node)) = flannel_and_node(&lab, &etcd, false) else {
        return;
    };
    let (mut theirs, mut ours) = (flannel.flannel.pod.agent(), node.pod("pod"));
    let here = address(&mut ours);
    let port = ours.listen(0).unwrap();
    let connection = theirs.open(SocketAddrV4::new(here, port)).unwrap();
    let begin = Instant::now();
    let mut rounds = 0;
    while begin.elapsed() < Duration::from_secs(250) {
        let exchanged = theirs.exchange(connection, 100_000, rounds).unwrap();
        assert!(exchanged.intact, "round {rounds}");
        rounds += 1;
    }
    let shown = flannel
        .flannel
        .host
        .run(&["wg", "show", "flannel-wg", "latest-handshakes"]);
    eprintln!("{rounds} rounds, handshakes at {shown}");
    assert_eq!(lost(&node), [], "{}", node.log());
}
