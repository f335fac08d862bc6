//! Checks of this machine: namespaces, devices, directories, interfaces, ports and routes.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Command, Stdio};

use ipnet::Ipv4Net;
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::Format;
use muslin_encap::tunnel::vxlan;
use nix::net::if_::if_nametoindex;
use nix::sys::statfs::{FsType, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, statfs};
use serde::{Deserialize, Serialize};
use smoltcp::wire::IpVersion;
use socket2::{Domain, Protocol, Socket, Type};

use super::finding::{Finding, Verdict};
use super::subject::{DoctorOptions, NodeUnderTest};
use crate::confine;
use crate::daemon::{HOST_INTERFACE, Offload};
use crate::device::Tap;
use crate::error::{Context, Result};
use crate::init;
use crate::process::block_on;
use crate::state;
use crate::store::is_shared;
use crate::terminal::quantity::bytes;
use crate::underlay::{
    Audience, Conflict, KernelNetwork, TunnelSocket, choose_interface, forwards_ipv4,
};
use crate::wireguard_key;

/// MTU below which IPv6, and many a program, does not work (RFC 8200 section 5).
const SMALL_MTU: u16 = 1280;

/// Space in bytes that a node's state and the embedded store need at least.
const LEAST_SPACE: u64 = 1 << 20;

/// What became of an attempt to make a pod, without a node.
#[derive(Serialize, Deserialize)]
struct Probe {
    namespaces: Option<String>,
    device: Option<String>,
}

/// Tries in this process what `muslin run` does first, and prints what became of it; for the
/// doctor, who stays where he is.
///
/// # Errors
/// If that cannot be printed.
pub fn probe_namespace() -> Result<()> {
    let tried = init::start(init::InitSettings::without_command()).and_then(|starting| {
        block_on(async {
            let _init = starting.ready().await?;
            Ok(Tap::open("eth0", true, 1).err())
        })
    });
    let probe = match tried {
        Ok(device) => Probe {
            namespaces: None,
            device: device.map(|error| error.to_string()),
        },
        Err(error) => Probe {
            namespaces: Some(error.to_string()),
            device: None,
        },
    };
    let text = serde_json::to_string(&probe).context("cannot write JSON")?;
    crate::terminal::output::print(&text)
}

/// What stands in the way of a pod in namespaces of its own, if anything.
#[cfg(feature = "sidecar")]
pub(crate) fn obstacle_to_pods() -> Option<String> {
    match probe() {
        Ok(probe) => probe.namespaces.or(probe.device),
        Err(error) => Some(error),
    }
}

/// Tries to make a pod in another process.
fn probe() -> std::result::Result<Probe, String> {
    let output = std::env::current_exe().and_then(|program| {
        let mut command = Command::new(program);
        command
            .arg("probe-namespace")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
    });
    output
        .map_err(|error| error.to_string())
        .and_then(|output| {
            serde_json::from_slice::<Probe>(&output.stdout).map_err(|error| error.to_string())
        })
}

/// Whether pods can be made: user namespaces and TAP devices.
pub(super) fn namespaces() -> Vec<Finding> {
    let probe = match probe() {
        Ok(probe) => probe,
        Err(error) => return vec![Finding::new("user namespaces", Verdict::Unknown, error)],
    };
    if let Some(error) = probe.namespaces {
        let unknown = "requires user namespaces for the test";
        return vec![
            Finding::wrong("user namespaces", error),
            Finding::new("/dev/net/tun", Verdict::Unknown, unknown),
        ];
    }
    let device = match probe.device {
        Some(error) => Finding::wrong("/dev/net/tun", error),
        None => Finding::fine("/dev/net/tun", "a TAP device can be made"),
    };
    vec![
        Finding::fine("user namespaces", "a new one can be made"),
        device,
    ]
}

/// The ways in which `muslin sidecar` can give a pod its address here. `namespaces` is what
/// [`namespaces`] has found.
pub(super) fn sidecar_levels(namespaces: &[Finding]) -> Finding {
    const CHECK: &str = "sidecar levels";
    // It is gone again when this returns.
    let tap = Tap::open("muslin-probe", true, 1).err();
    let run = namespaces.iter().find(|it| it.verdict != Verdict::Fine);
    let mut possible = Vec::new();
    let mut obstacles = Vec::new();
    match tap {
        None => possible.push("tap"),
        Some(obstacle) => obstacles.push(format!("not tap: {obstacle}")),
    }
    match run {
        None => possible.push("run"),
        Some(obstacle) => obstacles.push(format!("not run: {}", obstacle.detail)),
    }
    possible.push("process");
    let detail = format!("possible here: {}", possible.join(", "));
    let finding = Finding::fine(CHECK, detail);
    if obstacles.is_empty() {
        finding
    } else {
        finding.advise(obstacles.join("; "))
    }
}

/// Whether pods' pings to addresses outside the pod network can go on by sockets of the node.
pub(super) fn pings() -> Finding {
    const CHECK: &str = "pings";
    const SETTING: &str = "/proc/sys/net/ipv4/ping_group_range";
    match Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)) {
        Ok(_) => Finding::fine(CHECK, "pods can ping addresses outside the pod network"),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let range = std::fs::read_to_string(SETTING).unwrap_or_default();
            let range = range.split_whitespace().collect::<Vec<_>>().join(" ");
            let detail = format!(
                "pods cannot ping addresses outside the pod network: net.ipv4.ping_group_range is \
                 '{range}', without the group {}",
                nix::unistd::getegid()
            );
            Finding::new(CHECK, Verdict::Warning, detail)
                .advise("run 'sudo sysctl -w net.ipv4.ping_group_range=\"0 2147483647\"'")
        }
        Err(error) => {
            let detail = format!("cannot make a socket for pings: {error}");
            Finding::new(CHECK, Verdict::Unknown, detail)
        }
    }
}

/// What a node takes from itself, or could take on this machine.
pub(super) fn confinement(tested: Option<&NodeUnderTest>) -> Finding {
    const CHECK: &str = "confinement";
    if let Some(confinement) = tested.and_then(|it| it.status.confinement.as_ref()) {
        let is_whole = confinement.seccomp.in_force && confinement.landlock.in_force;
        let is_whole = is_whole && confinement.no_new_privileges && confinement.not_dumpable;
        let verdict = match is_whole {
            true => Verdict::Fine,
            false => Verdict::Warning,
        };
        return Finding::new(CHECK, verdict, format!("the node has {confinement}"));
    }
    let missing: Vec<_> = confine::offered()
        .into_iter()
        .filter_map(|(name, is_there)| (!is_there).then_some(name))
        .collect();
    match missing.as_slice() {
        [] => Finding::fine(CHECK, "a node can restrict its system calls and files"),
        names => Finding::new(
            CHECK,
            Verdict::Warning,
            format!("this kernel has no {}", names.join(" and no ")),
        )
        .advise("nodes run without; landlock may have to be listed in 'lsm=' at boot"),
    }
}

fn way_out(error: ErrorKind) -> &'static str {
    state::way_out(error).unwrap_or("choose another directory with --state-dir")
}

/// Whether the private keys of nodes are theirs alone.
pub(super) fn wireguard_keys(state_dir: &Path) -> Vec<Finding> {
    let names = state::nodes(state_dir).into_iter();
    let findings = names.filter_map(|name| {
        let file = state::wireguard_key_file(state_dir, &name);
        match wireguard_key::read(&file) {
            Ok(None) => None,
            Ok(Some(_)) => Some(Finding::fine(
                "keys",
                format!("node {name} has a private key of its own"),
            )),
            Err(error) => Some(Finding::wrong("keys", error)),
        }
    });
    findings.collect()
}

/// Whether nodes can keep their state.
pub(super) fn state_directory(directory: &Path) -> Vec<Finding> {
    const CHECK: &str = "state directory";
    let shown = directory.display();
    // The directory may be made later; then its nearest ancestor counts.
    let Some(existing) = directory.ancestors().find(|path| path.exists()) else {
        return vec![Finding::wrong(CHECK, format!("{shown} cannot be made"))];
    };
    let writable = nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK);
    if let Err(error) = writable {
        let finding = Finding::wrong(
            CHECK,
            format!("{} is not writable: {error}", existing.display()),
        );
        return vec![finding.advise(way_out(ErrorKind::PermissionDenied))];
    }
    let file_system = statfs(existing);
    if let Ok(found) = &file_system
        && let free = found.blocks_available() * u64::try_from(found.block_size()).unwrap_or(1)
        && free < LEAST_SPACE
    {
        let detail = format!("{} has {} of space left", existing.display(), bytes(free));
        return vec![Finding::wrong(CHECK, detail).advise(way_out(ErrorKind::StorageFull))];
    }
    let kind = file_system.map(|found| found.filesystem_type());
    if kind.is_ok_and(is_remote) {
        let finding = Finding::new(
            CHECK,
            Verdict::Warning,
            format!("{shown} is on a network file system"),
        );
        return vec![finding.advise(
            "the embedded store is for one machine: for several use etcd or a file, or choose a \
             local --state-dir",
        )];
    }
    vec![Finding::fine(CHECK, shown)]
}

fn is_remote(kind: FsType) -> bool {
    kind == NFS_SUPER_MAGIC || kind == SMB_SUPER_MAGIC
}

/// Whether other nodes can send to this one: address, MTU and port.
pub(super) async fn underlay(
    options: &DoctorOptions,
    tested: Option<&NodeUnderTest>,
) -> Vec<Finding> {
    const CHECK: &str = "public address";
    if let Some(NodeUnderTest { status, .. }) = tested {
        let detail = format!("{} on {}", status.public_ip, status.interface);
        let mut findings = vec![Finding::fine(CHECK, detail)];
        if status.port != 0 {
            let port = format!("UDP {} is the node's", status.port);
            findings.push(Finding::fine("port", port));
            let end = status.tunnel_ip.iter().next();
            findings.extend(end.map(offload));
        }
        if status.uplink.as_deref() == Some("packet") {
            findings.push(forwarding(&status.interface));
        }
        findings.push(pods_mtu(status.mtu));
        return findings;
    }
    let audience = match options.store.as_deref().is_some_and(is_shared) {
        true => Audience::Others,
        false => Audience::Machine,
    };
    let chosen = choose_interface(&options.underlay, audience, None, None).await;
    let interface = match chosen {
        Ok(interface) => interface,
        Err(error) => return vec![Finding::wrong(CHECK, error)],
    };
    let (public, addresses) = (interface.public(), interface.addresses());
    let detail = if interface.is_translated() {
        format!("{public}, translated to {addresses} on {}", interface.name)
    } else {
        format!("{addresses} on {}", interface.name)
    };
    let is_loopback = addresses
        .iter()
        .all(|address: IpAddr| address.is_loopback());
    let first = if is_loopback {
        Finding::new(
            CHECK,
            Verdict::Warning,
            format!("{detail}: other machines cannot send to it"),
        )
        .advise("choose an address or interface with --public-ip or --iface")
    } else {
        Finding::fine(CHECK, detail)
    };
    let mut findings = vec![first];
    let mut version = IpVersion::Ipv4;
    if let Some(end) = addresses.iter::<IpAddr>().next() {
        findings.extend([port(end).await, offload(end)]);
        version = match end {
            IpAddr::V4(_) => IpVersion::Ipv4,
            IpAddr::V6(_) => IpVersion::Ipv6,
        };
    }
    let outer = Mtu::new(interface.mtu.min(u16::MAX.into()));
    let inner = outer.and_then(|outer| Format::Vxlan.inner_mtu(outer, version));
    findings.push(match inner {
        Ok(mtu) => pods_mtu(mtu.get()),
        Err(error) => Finding::wrong("MTU", format!("{}: {error}", interface.name)),
    });
    findings
}

/// Whether the kernel leaves bare packets for pods to the node.
fn forwarding(interface: &str) -> Finding {
    const CHECK: &str = "forwarding";
    match forwards_ipv4(interface) {
        Some(false) => Finding::fine(CHECK, format!("the kernel leaves {interface} to the node")),
        Some(true) => Finding::new(
            CHECK,
            Verdict::Warning,
            format!("the kernel forwards packets that arrive on {interface}, including the pods'"),
        )
        .advise(format!(
            "it answers for the pods, or forwards their packets a second time: run 'sysctl \
             net.ipv4.conf.{interface}.forwarding=0'"
        )),
        None => Finding::new(
            CHECK,
            Verdict::Unknown,
            format!("cannot read whether the kernel forwards packets that arrive on {interface}"),
        ),
    }
}

async fn port(address: IpAddr) -> Finding {
    const CHECK: &str = "port";
    let port = vxlan::PORT;
    let options = Offload::default().sockets(Format::Vxlan, 0);
    let error = match TunnelSocket::bind((address, port).into(), options, 1) {
        Ok(_) => return Finding::fine(CHECK, format!("UDP {port} is free")),
        Err(error) => error,
    };
    let kernel = KernelNetwork::read().await.unwrap_or_default();
    match kernel.vxlan_on(port) {
        Some(conflict) => Finding::wrong(CHECK, conflict.detail).advise(conflict.advice),
        None => Finding::wrong(CHECK, format!("UDP {port} of {address}: {error}")).advise(
            "another node or flannel uses it: stop that one, or use another --port on all nodes",
        ),
    }
}

/// Whether the kernel keeps its word about trains of datagrams.
fn offload(address: IpAddr) -> Finding {
    const CHECK: &str = "offload";
    let socket = TunnelSocket::bind(
        (address, 0).into(),
        Offload::default().sockets(Format::Vxlan, 0),
        1,
    )
    .map(|mut groups| groups.pop());
    let socket = match socket {
        Ok(Some(socket)) => socket,
        Ok(None) => return Finding::new(CHECK, Verdict::Unknown, "there is no socket"),
        Err(error) => return Finding::new(CHECK, Verdict::Unknown, error),
    };
    let missing = match (socket.has_gso(), socket.has_gro()) {
        (true, true) => {
            let detail = "the kernel segments UDP sends and coalesces receives";
            return Finding::fine(CHECK, detail);
        }
        (false, true) => "segment UDP sends",
        (true, false) => "coalesce UDP receives",
        (false, false) => "segment UDP sends or coalesce receives",
    };
    let detail = format!("this kernel does not {missing}, or corrupts the data");
    Finding::new(CHECK, Verdict::Warning, detail)
        .advise("nodes run without, which is slower: other versions of the kernel support it")
}

fn pods_mtu(mtu: u16) -> Finding {
    if mtu < SMALL_MTU {
        Finding::new("MTU", Verdict::Warning, format!("pods have {mtu} bytes"))
            .advise("many programs expect 1280 at least: raise the underlay's MTU if you can")
    } else {
        Finding::fine("MTU", format!("pods have {mtu} bytes"))
    }
}

/// The name of the interface by which the host and pods reach each other.
pub(super) fn host_interface_name(tested: Option<&NodeUnderTest>) -> &str {
    let interface = tested.and_then(|tested| tested.status.host_interface.as_ref());
    interface.map_or(HOST_INTERFACE, |interface| interface.name.as_str())
}

/// Whether the host reaches pods.
pub(super) fn host_interface(tested: Option<&NodeUnderTest>) -> Finding {
    const CHECK: &str = "host interface";
    const WITHOUT: &str = "kubelet's probes, programs in this machine's own network and its shell do \
                           not reach pods";
    let name = host_interface_name(tested);
    let used = tested.map(|tested| tested.status.host_interface.is_some());
    let is_there = if_nametoindex(name).is_ok();
    match (used, is_there) {
        (Some(true), _) => {
            let detail = format!("this machine and pods reach each other by {name}");
            Finding::fine(CHECK, detail)
        }
        (None, true) => Finding::fine(CHECK, format!("{name} is there for a node")),
        (Some(false), true) => {
            let detail = format!("the node does not use {name}: {WITHOUT}");
            Finding::new(CHECK, Verdict::Warning, detail).advise(
                "the node's log says why; 'sudo muslin host-interface' makes it for its user",
            )
        }
        (_, false) => {
            let detail = format!("there is none: {WITHOUT}");
            // Many nodes need none.
            Finding::fine(CHECK, detail)
                .advise("where that is needed, run 'sudo muslin host-interface' once the node runs")
        }
    }
}

/// What the kernel has of the pod network by itself. Pods do not see it, but it takes the place of
/// some, and programs outside pods, and peers whose public addresses it covers, miss packets.
pub(super) async fn kernel(
    network: Ipv4Net,
    subnet: Option<Ipv4Net>,
    pods: &[Ipv4Addr],
    host_interface: &str,
) -> Vec<Finding> {
    const OWN: &str = "own subnet";
    const ROUTES: &str = "routes";
    let kernel = match KernelNetwork::read().await {
        Ok(kernel) => kernel.without(host_interface),
        Err(error) => return vec![Finding::new(ROUTES, Verdict::Unknown, error)],
    };
    let mut findings = Vec::new();
    if let Some(subnet) = subnet {
        let conflicts = kernel.in_own_subnet(subnet, pods);
        if conflicts.is_empty() {
            let detail = format!("no interface of this machine has addresses of {subnet}");
            findings.push(Finding::fine(OWN, detail));
        }
        let wrong = |it: Conflict| Finding::wrong(OWN, it.detail).advise(it.advice);
        findings.extend(conflicts.into_iter().map(wrong));
    }
    let conflicts = kernel.routes_overlapping(network, subnet);
    if conflicts.is_empty() {
        let detail = format!("none of this machine's overlaps {network}");
        findings.push(Finding::fine(ROUTES, detail));
    }
    let warning =
        |it: Conflict| Finding::new(ROUTES, Verdict::Warning, it.detail).advise(it.advice);
    findings.extend(conflicts.into_iter().map(warning));
    findings
}
