//! The paths that are measured: a host with a pod or without, and a server on another host.

use std::fmt;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

use clap::ValueEnum;
use muslin_bench::machine::resident_bytes;
use muslin_bench::path::Path;
use muslin_bench::pods::{UNDERLAY, attached_pod};
use muslin_bench::window::Ends;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, muslin_bin, poll_until};
use serde_json::{Map, Value, json};

/// Of the underlay, so that VXLAN's pods have 1,500.
const UNDERLAY_MTU: u16 = 1550;
/// Of all pods that are compared.
const POD_MTU: u16 = 1500;
/// What slirp4netns's documentation advises, and pasta has if nothing is said.
const LARGE_MTU: u16 = 65_520;
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Of the host that the sidecar leads from, and of the pod that it leads to.
const FORWARDED: u16 = 8000;

/// What carries a client's connections to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Route {
    /// The host's own, without a pod.
    Plain,
    /// A pod of a node.
    Muslin,
    /// A program beside a sidecar of the lowest level, which leads its connections to a pod of the
    /// server's node.
    Sidecar,
    /// A pod of slirp4netns.
    #[value(name = "slirp4netns")]
    Slirp4netns,
    /// A pod of pasta.
    Pasta,
    /// slirp4netns with large packets.
    #[value(name = "slirp4netns-65520")]
    Slirp4netnsLarge,
    /// pasta with large packets.
    #[value(name = "pasta-65520")]
    PastaLarge,
}

impl Route {
    pub(crate) const ALL: [Self; 7] = [
        Self::Plain,
        Self::Muslin,
        Self::Sidecar,
        Self::Slirp4netns,
        Self::Pasta,
        Self::Slirp4netnsLarge,
        Self::PastaLarge,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Muslin => "muslin",
            Self::Sidecar => "muslin sidecar",
            Self::Slirp4netns => "slirp4netns",
            Self::Pasta => "pasta",
            Self::Slirp4netnsLarge => "slirp4netns, 65520",
            Self::PastaLarge => "pasta, 65520",
        }
    }

    fn mtu(self) -> u16 {
        match self {
            Self::Slirp4netnsLarge | Self::PastaLarge => LARGE_MTU,
            _ => POD_MTU,
        }
    }

    /// The package without which there is no such path here.
    pub(crate) fn missing(self) -> Option<&'static str> {
        let (program, package) = match self {
            Self::Plain | Self::Muslin | Self::Sidecar => return None,
            Self::Slirp4netns | Self::Slirp4netnsLarge => ("slirp4netns", "slirp4netns"),
            Self::Pasta | Self::PastaLarge => ("pasta", "passt"),
        };
        let found = Command::new(program).arg("--version").output();
        found.is_err().then_some(package)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Path for Route {
    fn group(self) -> usize {
        usize::from(self.mtu() == LARGE_MTU)
    }

    fn colour(self) -> &'static str {
        match self {
            Self::Plain => "#9aa5b1",
            Self::Muslin => "#2f7ed8",
            Self::Sidecar => "#8172b3",
            Self::Slirp4netns | Self::Slirp4netnsLarge => "#dd8452",
            Self::Pasta | Self::PastaLarge => "#55a868",
        }
    }

    fn labels(self) -> Map<String, Value> {
        [("path".to_owned(), json!(self.name()))]
            .into_iter()
            .collect()
    }
}

/// A client that reaches a server.
pub(crate) struct Stage {
    pub(crate) ends: Ends,
    carrier: Carrier,
    _lab: Lab,
}

/// What carries its connections.
enum Carrier {
    Kernel,
    Node(Node),
    Program(Child),
    /// With the node of the server, which is a pod.
    Sidecar {
        child: Child,
        _far: Node,
    },
}

impl Drop for Carrier {
    fn drop(&mut self) {
        if let Self::Program(child) | Self::Sidecar { child, .. } = self {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Stage {
    /// Sets it up; `None` where this machine has no labs.
    pub(crate) fn new(route: Route) -> Option<Self> {
        let lab = Lab::without_limit()?;
        let (host, server) = (lab.namespace("host"), lab.namespace("server"));
        lab.cable((&host, UNDERLAY), (&server, UNDERLAY));
        for (end, address) in [(&host, HOST), (&server, SERVER)] {
            end.sh(&format!(
                "ip link set {UNDERLAY} mtu {UNDERLAY_MTU}
                 ip addr add {address}/24 dev {UNDERLAY}"
            ));
        }
        // pasta copies what has the default route.
        host.sh(&format!("ip route add default via {SERVER}"));
        let to_server = |source| Ends {
            source,
            sink: server.clone(),
            address: SERVER,
        };
        let (ends, carrier) = match route {
            Route::Plain => (to_server(host), Carrier::Kernel),
            Route::Muslin => {
                let (pod, node) = pod_of_node(&lab, &host);
                (to_server(pod), Carrier::Node(node))
            }
            Route::Sidecar => by_sidecar(&lab, host, &server),
            Route::Slirp4netns | Route::Slirp4netnsLarge => {
                let pod = lab.namespace("pod");
                let child = slirp4netns(&host, &pod, route.mtu());
                (to_server(pod), Carrier::Program(child))
            }
            Route::Pasta | Route::PastaLarge => {
                let pod = lab.namespace("pod");
                let child = pasta(&lab, &host, &pod, route.mtu());
                (to_server(pod), Carrier::Program(child))
            }
        };
        Some(Self {
            ends,
            carrier,
            _lab: lab,
        })
    }

    /// Resident memory of the process that carries, if there is one, in bytes.
    pub(crate) fn resident_bytes(&self) -> Option<f64> {
        let pid = match &self.carrier {
            Carrier::Kernel => return None,
            Carrier::Node(node) => node.query("status")["pid"].as_u64().unwrap() as u32,
            Carrier::Program(child) | Carrier::Sidecar { child, .. } => child.id(),
        };
        Some(resident_bytes(pid))
    }
}

/// A program on the host, and a pod of the server's node, with VXLAN in between.
fn by_sidecar(lab: &Lab, host: Host, server: &Host) -> (Ends, Carrier) {
    let (pod, node) = pod_of_node(lab, server);
    // All that listens there listens on the port that the sidecar leads to.
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    pod.sh(&format!("echo {FORWARDED} {FORWARDED} >{range}"));
    let child = sidecar(lab, &host, node.address(2));
    node.wait_peers(1);
    let ends = Ends {
        source: host,
        sink: pod,
        address: Ipv4Addr::LOCALHOST,
    };
    (ends, Carrier::Sidecar { child, _far: node })
}

/// A node on a host, and its first pod.
fn pod_of_node(lab: &Lab, host: &Host) -> (Host, Node) {
    let node = NodeConfig::on_interface("node", UNDERLAY, &lab.store()).start(host);
    assert_eq!(node.mtu(), POD_MTU);
    (attached_pod(lab, &node, "pod").0, node)
}

/// A sidecar that leads a port of the host to a pod. It is a node of its own, and its pod's address
/// is in its process.
fn sidecar(lab: &Lab, host: &Host, pod: Ipv4Addr) -> Child {
    let log = lab.directory().join("sidecar.log");
    let mut command = host.command(muslin_bin());
    command
        .args(["sidecar", "--level", "process", "--name", "sidecar"])
        .args(["--store", &lab.store(), "--iface", UNDERLAY, "--state-dir"])
        .arg(lab.directory().join("sidecar"))
        .args(["--forward", &format!("{FORWARDED}={pod}:{FORWARDED}")])
        .stdin(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap());
    let mut child = command.spawn().unwrap();
    poll_until(SOON, "a sidecar that leads to the pod", || {
        let told = std::fs::read_to_string(&log).unwrap();
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {told}");
        told.contains("leads to").then_some(())
    });
    child
}

/// slirp4netns as rootless containers have it, but for the MTU.
fn slirp4netns(host: &Host, pod: &Host, mtu: u16) -> Child {
    let mut command = host.command("slirp4netns");
    command
        .args(["--configure", "--disable-host-loopback", "--mtu"])
        .arg(mtu.to_string())
        .args(["--netns-type", "path"])
        .arg(format!("/proc/{}/ns/net", pod.pid()))
        .arg("tap0");
    started(command, pod)
}

/// pasta with an address of its own for the pod. It gives up its privileges before it opens the
/// pod's namespace, which must have a name for it then.
fn pasta(lab: &Lab, host: &Host, pod: &Host, mtu: u16) -> Child {
    let script = r#"touch "$1"; mount --bind "/proc/$2/ns/net" "$1"
                    exec pasta --netns-only --netns "$1" --mtu "$3" --runas 0:0 --foreground \
                        --config-net --ipv4-only --address 10.0.2.100 --netmask 24 \
                        --gateway 10.0.2.2 --tcp-ports none --udp-ports none \
                        --tcp-ns none --udp-ns none"#;
    let mut command = host.command("sh");
    command
        .args(["-e", "-c", script, "sh"])
        .arg(lab.directory().join("netns"))
        .args([pod.pid().to_string(), mtu.to_string()]);
    started(command, pod)
}

/// Starts it and waits until the pod has a way out.
fn started(mut command: Command, pod: &Host) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    poll_until(SOON, "a default route of the pod", || {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{command:?}: {ended:?}");
        let routes = pod.run(&["ip", "route", "show", "default"]);
        (!routes.is_empty()).then_some(())
    });
    child
}
