//! The CNI plugin as runtimes start it: without a node, and with one that a test plays.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv6Net};
use muslin::control::Connection;
use muslin::device::Tap;
use muslin_lab::skip::skip;
use muslin_lab::{Host, Lab, SOON, cni_bin, poll_until};
use muslin_stack::api::cni::{
    Call, Key, Missing, NetworkNamespace, Reply, Reserve, Reserved, deletion,
};
use muslin_stack::api::control::{Answer, Attached, Code, Link, Refusal, Request, Welcome};
use serde_json::{Value, json};
use tokio_seqpacket::UnixSeqpacketListener;

/// Where Debian and others have the reference plugins.
const REFERENCE: [&str; 2] = ["/usr/lib/cni/bridge", "/opt/cni/bin/bridge"];

/// A user that the labs' user namespace does not have.
const STRANGER: u32 = 12_345;

/// Variables in place of a container's.
type Changes<'a> = &'a [(&'a str, &'a str)];

/// Runs a plugin to its end.
fn run(mut command: Command, variables: &[(&str, &str)], input: &str) -> Output {
    command.envs(variables.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    // It need not read it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn alone(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    command
}

const CONTAINER: [(&str, &str); 4] = [
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/run/netns/none"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_PATH", "/usr/lib/cni"),
];

/// A command with a container's variables, some of them changed.
fn call(program: &str, command: &str, changes: &[(&str, &str)], input: &str) -> Output {
    let mut variables = CONTAINER.to_vec();
    variables.push(("CNI_COMMAND", command));
    variables.extend(changes);
    run(alone(program), &variables, input)
}

/// What a plugin has said against it: the only thing on standard output.
#[track_caller]
fn error(output: &Output) -> Value {
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    let told: Value = serde_json::from_str(&stdout).unwrap();
    assert!(
        stdout.ends_with("}\n") && stdout.lines().count() == 1,
        "{stdout}"
    );
    told
}

#[track_caller]
fn succeeds(output: &Output) {
    let texts = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{texts:?}");
    assert!(output.stdout.is_empty(), "{texts:?}");
}

fn config(changes: Value) -> String {
    let mut config = json!({"cniVersion": "1.1.0", "name": "muslin", "type": "muslin-cni"});
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.to_string()
}

#[test]
fn what_is_malformed_is_told_in_one_line() {
    let plain = &config(json!({}));
    let cases: &[(&str, Changes<'_>, &str, &str)] = &[
        (
            "ADD",
            &[
                ("CNI_CONTAINERID", ""),
                ("CNI_NETNS", ""),
                ("CNI_IFNAME", ""),
                ("CNI_PATH", ""),
            ],
            plain,
            r#"{"cniVersion":"1.1.0","code":4,"msg":"required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing"}"#,
        ),
        (
            "DEL",
            &[("CNI_IFNAME", "")],
            plain,
            r#"{"cniVersion":"1.1.0","code":4,"msg":"required env variables [CNI_IFNAME] missing"}"#,
        ),
        (
            "FROB",
            &[],
            plain,
            r#"{"cniVersion":"1.1.0","code":4,"msg":"unknown CNI_COMMAND: FROB"}"#,
        ),
        (
            "ADD",
            &[("CNI_CONTAINERID", "-a")],
            plain,
            r#"{"cniVersion":"1.1.0","code":4,"msg":"invalid characters in containerID","details":"-a"}"#,
        ),
        (
            "ADD",
            &[("CNI_IFNAME", "0123456789012345")],
            plain,
            r#"{"cniVersion":"1.1.0","code":4,"msg":"interface name is too long","details":"interface name should be less than 16 characters"}"#,
        ),
        (
            "ADD",
            &[("CNI_IFNAME", "a/b")],
            plain,
            r#"{"cniVersion":"1.1.0","code":4,"msg":"interface name contains / or : or whitespace characters"}"#,
        ),
        (
            "ADD",
            &[("CNI_ARGS", "a")],
            plain,
            r#"{"cniVersion":"1.1.0","code":4,"msg":"CNI_ARGS: invalid pair \"a\""}"#,
        ),
        (
            "ADD",
            &[],
            r#"{"cniVersion":"1.0.0"}"#,
            r#"{"cniVersion":"1.1.0","code":7,"msg":"missing network name"}"#,
        ),
        (
            "ADD",
            &[],
            r#"{"name":"a b"}"#,
            r#"{"cniVersion":"1.1.0","code":7,"msg":"invalid characters found in network name","details":"a b"}"#,
        ),
        (
            "ADD",
            &[],
            r#"{"name":"a","cniVersion":"9.0.0"}"#,
            r#"{"cniVersion":"1.1.0","code":1,"msg":"incompatible CNI versions","details":"config is \"9.0.0\", plugin supports [\"0.3.0\" \"0.3.1\" \"0.4.0\" \"1.0.0\" \"1.1.0\"]"}"#,
        ),
        (
            "CHECK",
            &[],
            r#"{"name":"a","cniVersion":"0.3.1"}"#,
            r#"{"cniVersion":"0.3.1","code":1,"msg":"config version does not allow CHECK"}"#,
        ),
        (
            "GC",
            &[],
            r#"{"name":"a","cniVersion":"1.0.0"}"#,
            r#"{"cniVersion":"1.0.0","code":1,"msg":"config version does not allow GC"}"#,
        ),
        (
            "ADD",
            &[],
            r#"{"name":"a","cniVersion":"0.4.0","runtimeConfig":{"bandwidth":{"IngressRate":1}}}"#,
            r#"{"cniVersion":"0.4.0","code":7,"msg":"invalid network config: runtimeConfig.bandwidth: if rate is set, burst must also be set"}"#,
        ),
        (
            "ADD",
            &[],
            plain,
            r#"{"cniVersion":"1.1.0","code":8,"msg":"the network namespace /run/netns/none cannot be opened: No such file or directory (os error 2)"}"#,
        ),
        (
            "ADD",
            &[("CNI_NETNS", "/dev/null")],
            plain,
            r#"{"cniVersion":"1.1.0","code":8,"msg":"the network namespace /dev/null cannot be opened: it is no namespace"}"#,
        ),
        (
            "ADD",
            &[("CNI_NETNS", "/proc/self/ns/net")],
            plain,
            r#"{"cniVersion":"1.1.0","code":8,"msg":"plugin's netns and netns from CNI_NETNS should not be the same"}"#,
        ),
    ];
    for (command, changes, input, expected) in cases {
        let output = call(cni_bin(), command, changes, input);
        assert_eq!(output.status.code(), Some(1), "{expected}");
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert_eq!(stdout, format!("{expected}\n"));
        assert!(output.stderr.is_empty());
    }
    for input in ["", "{", "[]", r#"{"name":7}"#] {
        let told = error(&call(cni_bin(), "ADD", &[], input));
        assert_eq!(told["code"], 6);
        let message = told["msg"].as_str().unwrap();
        assert!(
            message.starts_with("error unmarshall network config: "),
            "{message}"
        );
    }
}

#[test]
fn it_says_what_the_reference_says() {
    let Some(reference) = REFERENCE.into_iter().find(|it| Path::new(it).exists()) else {
        return skip("there is none of the reference plugins (containernetworking-plugins)");
    };
    let plain = r#"{"cniVersion":"1.0.0","name":"a","type":"x"}"#;
    let cases: &[(&str, Changes<'_>, &str)] = &[
        ("ADD", &[("CNI_CONTAINERID", ""), ("CNI_NETNS", "")], plain),
        (
            "CHECK",
            &[
                ("CNI_CONTAINERID", ""),
                ("CNI_NETNS", ""),
                ("CNI_IFNAME", ""),
                ("CNI_PATH", ""),
            ],
            plain,
        ),
        (
            "DEL",
            &[
                ("CNI_CONTAINERID", ""),
                ("CNI_NETNS", ""),
                ("CNI_IFNAME", ""),
                ("CNI_PATH", ""),
            ],
            plain,
        ),
        ("FROB", &[], plain),
        ("ADD", &[("CNI_CONTAINERID", "a/b")], plain),
        (
            "ADD",
            &[("CNI_CONTAINERID", "-a"), ("CNI_IFNAME", "..")],
            plain,
        ),
        ("ADD", &[("CNI_IFNAME", "0123456789012345")], plain),
        ("ADD", &[("CNI_IFNAME", ".")], plain),
        ("ADD", &[("CNI_IFNAME", "a b")], plain),
        ("ADD", &[("CNI_IFNAME", "a:b")], plain),
        ("ADD", &[], r#"{"cniVersion":"1.0.0"}"#),
        ("ADD", &[], r#"{"name":"-"}"#),
        ("CHECK", &[], r#"{"name":"a","cniVersion":"0.3.1"}"#),
    ];
    for (command, changes, input) in cases {
        let theirs = error_of(&call(reference, command, changes, input));
        let ours = error_of(&call(cni_bin(), command, changes, input));
        assert_eq!(ours, theirs, "{command} {changes:?} {input}");
    }
    // What is from the parsers of JSON, and the lists of versions, differ.
    for input in ["", "{", r#"{"name":"a","cniVersion":"9.0.0"}"#] {
        let code = |program: &str| error_of(&call(program, "ADD", &[], input)).0;
        assert_eq!(code(cni_bin()), code(reference), "{input}");
    }
}

/// Code, message and details, in whatever lines.
fn error_of(output: &Output) -> (Value, Value, Value) {
    assert_eq!(output.status.code(), Some(1));
    let mut told: Value = serde_json::from_slice(&output.stdout).unwrap();
    (
        told["code"].take(),
        told["msg"].take(),
        told["details"].take(),
    )
}

#[test]
fn version_reads_nothing() {
    let expected = concat!(
        r#"{"cniVersion":"1.1.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}"#,
        "\n"
    );
    let mut closed = alone("/bin/sh");
    closed.args(["-c", "exec \"$0\" <&-", cni_bin()]);
    closed.env("CNI_COMMAND", "VERSION");
    let output = closed.output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    assert!(output.stderr.is_empty());
    // A pipe at whose other end nobody writes.
    let mut open = alone(cni_bin());
    open.env("CNI_COMMAND", "VERSION").stdin(Stdio::piped());
    let mut child = open.stdout(Stdio::piped()).spawn().unwrap();
    let stdin = child.stdin.take();
    assert!(child.wait().unwrap().success());
    drop(stdin);
}

#[test]
fn people_are_told_what_it_is() {
    let output = run(alone(cni_bin()), &[], "");
    assert!(output.status.success() && output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    let versions = "CNI protocol versions supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n";
    assert!(
        text.starts_with("muslin-cni ") && text.ends_with(versions),
        "{text}"
    );
}

#[test]
fn without_a_node_status_says_so_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let began = Instant::now();
    let output = call(cni_bin(), "STATUS", &[], &config(json!({"socket": socket})));
    let taken = began.elapsed();
    let told = error(&output);
    assert_eq!(told["code"], 50);
    let message = told["msg"].as_str().unwrap();
    assert!(message.starts_with("no node listens at "), "{message}");
    assert!(taken < Duration::from_secs(1), "{taken:?}");
}

#[test]
fn without_a_node_del_succeeds_and_leaves_word() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let config = config(json!({"socket": socket, "ipam": {}}));
    for netns in ["", "/run/netns/none", "/proc/self/ns/net"] {
        for _ in 0..2 {
            succeeds(&call(cni_bin(), "DEL", &[("CNI_NETNS", netns)], &config));
        }
    }
    let folder = directory.path().join(deletion::DIRECTORY);
    let files: Vec<_> = std::fs::read_dir(&folder).unwrap().collect();
    assert_eq!(files.len(), 1);
    let path = folder.join(deletion::file_name(&key()));
    assert_eq!(deletion::read(&std::fs::read(path).unwrap()), Some(key()));
    // Where no node ever was, nothing is to be ended.
    let nowhere = self::config(json!({"socket": "/nowhere/control.sock"}));
    succeeds(&call(cni_bin(), "DEL", &[], &nowhere));
    // A delegate that is gone is an error, but not one that containerd takes for success.
    let delegated = self::config(json!({"socket": socket, "ipam": {"type": "gone"}}));
    let told = error(&call(cni_bin(), "DEL", &[], &delegated));
    assert!(!told.to_string().contains("not found"), "{told}");
}

#[test]
fn without_a_node_gc_fails_unless_there_is_nothing_to_do() {
    let config = |valid: Value| {
        config(json!({"socket": "/nowhere/control.sock", "cni.dev/valid-attachments": valid}))
    };
    succeeds(&call(cni_bin(), "GC", &[], &config(Value::Null)));
    let told = error(&call(cni_bin(), "GC", &[], &config(json!([]))));
    assert_eq!(told["code"], 11);
}

fn key() -> Key {
    Key::new("muslin", "c1", "eth0")
}

/// What a played node does.
#[derive(Debug, Default)]
struct Script {
    /// Why it is not ready.
    not_ready: Option<String>,
    /// Ends the connection instead of an answer to this.
    ends_at: Option<&'static str>,
    /// Devices whose queues it has lost.
    missing: Vec<Missing>,
    /// Whether its lease has an IPv6 subnet, too.
    has_ipv6: bool,
    /// What it was asked.
    calls: Vec<String>,
    /// The last place that was asked for.
    reserve: Option<Reserve>,
    /// Queues it has.
    taps: Vec<Tap>,
}

/// A node that a test plays.
struct Played {
    socket: PathBuf,
    script: Arc<Mutex<Script>>,
}

impl Played {
    fn start(directory: &Path) -> Self {
        let path = directory.join("control.sock");
        let script = Arc::new(Mutex::new(Script::default()));
        let played = Self {
            socket: path.clone(),
            script: Arc::clone(&script),
        };
        let (is_bound, bound) = std::sync::mpsc::channel();
        // It ends with the test's process.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            runtime.block_on(async move {
                let mut listener = UnixSeqpacketListener::bind(&path).unwrap();
                is_bound.send(()).unwrap();
                while let Ok(client) = listener.accept().await {
                    tokio::spawn(serve(Connection::new(client), Arc::clone(&script)));
                }
            });
        });
        bound.recv().unwrap();
        played
    }

    fn script<T>(&self, change: impl FnOnce(&mut Script) -> T) -> T {
        change(&mut self.script.lock().unwrap())
    }

    fn calls(&self) -> Vec<String> {
        self.script(|it| std::mem::take(&mut it.calls))
    }
}

/// Answers one client until it goes.
async fn serve(client: Connection, script: Arc<Mutex<Script>>) {
    while let Ok(Some((request, beside))) = client.receive::<Request>().await {
        let answer = match request {
            Request::Hello(_) => {
                let mut welcome = Welcome::new("0", "played", 1);
                welcome.not_ready = script.lock().unwrap().not_ready.clone();
                Answer::Welcome(welcome)
            }
            Request::Cni(call) => {
                let taps = beside
                    .into_iter()
                    .map(|it| Tap::from_descriptor(it).unwrap());
                let taps: Vec<_> = taps.collect();
                match answer(&mut script.lock().unwrap(), call, taps) {
                    Some(answer) => answer,
                    None => return,
                }
            }
            other => panic!("{other:?}"),
        };
        client.send(&answer, &[]).await.unwrap();
    }
}

fn answer(script: &mut Script, call: Call, taps: Vec<Tap>) -> Option<Answer> {
    let name = match &call {
        Call::Reserve(_) => "reserve",
        Call::Commit { .. } => "commit",
        Call::Release { .. } => "release",
        Call::Check { .. } => "check",
        Call::Collect { more: true, .. } => "collect part",
        Call::Collect { .. } => "collect",
        Call::Ready => "ready",
        Call::Missing => "missing",
        Call::Restore { .. } => "restore",
        other => panic!("{other:?}"),
    };
    script.calls.push(format!("{name} {}", taps.len()));
    if script.ends_at == Some(name) {
        return None;
    }
    let refused = |code: Code, message: &str| {
        let message = message.to_owned();
        Answer::Refused(Refusal { code, message })
    };
    match call {
        Call::Reserve(reserve) => {
            let wanted = reserve.addresses.first().map(ToString::to_string);
            let wanted = wanted.unwrap_or_else(|| "10.244.1.2".to_owned());
            let (address, gateway) = match script.has_ipv6 {
                true => (format!("{wanted}/24,fd00:1::2/64"), "10.244.1.1,fd00:1::1"),
                false => (format!("{wanted}/24"), "10.244.1.1"),
            };
            let (address, gateway) = (address.parse().unwrap(), gateway.parse().unwrap());
            let link = Link {
                mtu: 1450,
                mtu_v6: script.has_ipv6.then_some(1430),
                gso_max_segs: 44,
            };
            let pod = "web".parse().unwrap();
            let mut attached = Attached::new(pod, "played".to_owned(), address, gateway, link);
            attached.routes.push("0.0.0.0/0".parse().unwrap());
            let ipv6 = script.has_ipv6.then(|| IpNet::V6(Ipv6Net::default()));
            attached.routes.extend(ipv6);
            attached.dns.push("10.244.1.1".parse().unwrap());
            let mac = "02:00:0a:f4:01:02".to_owned();
            script.reserve = Some(*reserve);
            let reserved = Reserved::new(attached, mac, STRANGER);
            return Some(Answer::Cni(Reply::Reserved(Box::new(reserved))));
        }
        Call::Commit { .. } => {
            taps[0].set_persistent(true).unwrap();
            script.taps = taps;
        }
        Call::Restore { key, .. } => {
            script.missing.retain(|it| it.key != key);
            script.taps = taps;
        }
        Call::Release { .. } => {
            for tap in script.taps.drain(..) {
                // Its interface may be gone by now.
                let _ = tap.set_persistent(false);
            }
        }
        Call::Missing => {
            let missing = script.missing.clone();
            return Some(Answer::Cni(Reply::Missing(missing)));
        }
        Call::Check { .. } if script.taps.is_empty() => {
            return Some(refused(Code::NoSuchPod, "there is no such pod"));
        }
        _ => {}
    }
    Some(Answer::Cni(Reply::Done))
}

/// A pod's namespace in a lab, and a node that is played beside it.
struct Stage {
    lab: Lab,
    pod: Host,
    node: Played,
}

impl Stage {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        let pod = lab.namespace("pod");
        let node = Played::start(lab.directory());
        Some(Self { lab, pod, node })
    }

    fn netns(&self) -> String {
        format!("/proc/{}/ns/net", self.pod.pid())
    }

    fn call(&self, command: &str, changes: &[(&str, &str)], config: Value) -> Output {
        let netns = self.netns();
        let mut variables = CONTAINER.to_vec();
        variables.extend([("CNI_COMMAND", command), ("CNI_NETNS", &netns)]);
        variables.extend(changes);
        let mut all = config;
        all["socket"] = self.node.socket.to_str().unwrap().into();
        let config = self::config(all);
        run(self.lab.root().command(cni_bin()), &variables, &config)
    }

    #[track_caller]
    fn add(&self, config: Value) -> Value {
        let output = self.call("ADD", &[], config);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{stdout}{stderr}");
        serde_json::from_str(&stdout).unwrap()
    }

    fn has_interface(&self) -> bool {
        let shown = self.pod.output(&["ip", "link", "show", "eth0"]);
        shown.status.success()
    }
}

#[test]
fn a_pod_is_added_checked_and_deleted() {
    let Some(stage) = Stage::new() else {
        return;
    };
    let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=u";
    let runtime = json!({"portMappings": [{"HostPort": 8080, "ContainerPort": 80}]});
    let output = stage.call(
        "ADD",
        &[("CNI_ARGS", arguments)],
        json!({"runtimeConfig": runtime, "mtu": 1400}),
    );
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{
            "name": "eth0",
            "mac": "02:00:0a:f4:01:02",
            "mtu": 1400,
            "sandbox": stage.netns(),
        }],
        "ips": [{"interface": 0, "address": "10.244.1.2/24", "gateway": "10.244.1.1"}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.244.1.1"}],
        "dns": {"nameservers": ["10.244.1.1"]},
    });
    assert_eq!(result, expected);
    assert!(output.stderr.is_empty());
    assert_eq!(stage.node.calls(), ["reserve 0", "commit 1", "missing 0"]);
    let place = stage.node.script(|it| it.reserve.take()).unwrap();
    assert_eq!(place.pod.unwrap().namespace, "default");
    assert_eq!(place.publish.len(), 1);
    let link: Value =
        serde_json::from_str(&stage.pod.run(&["ip", "-j", "-d", "addr", "show", "eth0"])).unwrap();
    let link = &link[0];
    for (key, value) in [
        ("ifalias", json!("muslin:c1")),
        ("address", json!("02:00:0a:f4:01:02")),
        ("mtu", json!(1400)),
        ("gso_max_segs", json!(44)),
    ] {
        assert_eq!(link[key], value, "{link}");
    }
    assert_eq!(link["addr_info"][0]["local"], "10.244.1.2");
    // The node's user is not known here.
    assert_eq!(link["linkinfo"]["info_data"]["user"], "root", "{link}");
    let routes = stage.pod.run(&["ip", "route"]);
    assert!(
        routes.contains("default via 10.244.1.1 dev eth0"),
        "{routes}"
    );

    let check = || stage.call("CHECK", &[], json!({"prevResult": expected}));
    succeeds(&check());
    // Whoever is called next may change these.
    stage.pod.sh(
        "ip link set eth0 mtu 1300 address 02:00:00:00:00:07; ip route add 10.9.0.0/16 dev eth0",
    );
    succeeds(&check());
    let again = error(&stage.call("ADD", &[], json!({})));
    assert_eq!(
        again["msg"],
        "an interface 'eth0' is in the container already"
    );
    stage.pod.sh("ip route del default");
    assert_eq!(error(&check())["msg"], "eth0 has no route to 0.0.0.0/0");
    stage.node.calls();

    for _ in 0..2 {
        succeeds(&stage.call("DEL", &[], json!({})));
        assert!(!stage.has_interface());
    }
    assert_eq!(stage.node.calls(), ["release 0", "release 0"]);
    assert_eq!(error(&check())["code"], 3);
}

#[test]
fn a_pod_has_addresses_of_both_ip_versions() {
    let Some(stage) = Stage::new() else {
        return;
    };
    stage.node.script(|it| it.has_ipv6 = true);
    let result = stage.add(json!({"cniVersion": "1.1.0"}));
    let ips = json!([
        {"interface": 0, "address": "10.244.1.2/24", "gateway": "10.244.1.1"},
        {"interface": 0, "address": "fd00:1::2/64", "gateway": "fd00:1::1"},
    ]);
    assert_eq!(result["ips"], ips);
    let routes = json!([
        {"dst": "0.0.0.0/0", "gw": "10.244.1.1"},
        {"dst": "::/0", "gw": "fd00:1::1", "mtu": 1430},
    ]);
    assert_eq!(result["routes"], routes);
    let shown = |words: &[&str]| -> Value {
        let all = [&["ip", "-j"], words].concat();
        serde_json::from_str(&stage.pod.run(&all)).unwrap()
    };
    let link = shown(&["-6", "addr", "show", "eth0"]);
    let infos = link[0]["addr_info"].as_array().unwrap();
    assert_eq!(infos.len(), 2, "and a link-local one: {infos:?}");
    for info in infos {
        assert!(info["tentative"].is_null(), "{info}");
    }
    let default = shown(&["-6", "route", "show", "default"]);
    assert_eq!(default[0]["gateway"], "fd00:1::1");
    assert_eq!(default[0]["metrics"][0]["mtu"], 1430, "{default}");
    let read = "cat /proc/sys/net/ipv6/conf/eth0/accept_ra";
    assert_eq!(stage.pod.sh(read).trim(), "0");

    let check = || stage.call("CHECK", &[], json!({"prevResult": result}));
    succeeds(&check());
    stage.pod.sh("ip -6 route del default");
    assert_eq!(error(&check())["msg"], "eth0 has no route to ::/0");
    stage.pod.sh("ip addr del fd00:1::2/64 dev eth0");
    let amiss = error(&check())["msg"].clone();
    assert_eq!(amiss, "eth0 has no address fd00:1::2/64");
}

#[test]
fn what_fails_leaves_nothing() {
    let Some(stage) = Stage::new() else {
        return;
    };
    for end in ["reserve", "commit"] {
        stage.node.script(|it| it.ends_at = Some(end));
        let told = error(&stage.call("ADD", &[], json!({})));
        assert_eq!(told["code"], 11, "{end}");
        assert!(!stage.has_interface(), "{end}");
    }
    stage.node.script(|it| it.ends_at = None);
    stage.pod.sh("ip link add eth0 type veth peer name other");
    let told = error(&stage.call("ADD", &[], json!({})));
    assert_eq!(
        told["msg"],
        "an interface 'eth0' is in the container already"
    );
    // And another's interface stays.
    succeeds(&stage.call("DEL", &[], json!({})));
    assert!(stage.has_interface());
}

#[test]
fn a_node_that_is_not_ready_is_waited_for() {
    let Some(stage) = Stage::new() else {
        return;
    };
    let why = "the node a has no lease yet: etcd refuses";
    stage.node.script(|it| it.not_ready = Some(why.to_owned()));
    let told = error(&stage.call("STATUS", &[], json!({})));
    assert_eq!((&told["code"], &told["msg"]), (&json!(50), &json!(why)));
    let began = Instant::now();
    let told = error(&stage.call("ADD", &[], json!({})));
    assert_eq!((&told["code"], &told["msg"]), (&json!(11), &json!(why)));
    assert!(began.elapsed() >= Duration::from_secs(4));
    let script = Arc::clone(&stage.node.script);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        script.lock().unwrap().not_ready = None;
    });
    stage.add(json!({}));
    succeeds(&stage.call("STATUS", &[], json!({})));
    succeeds(&stage.call("DEL", &[], json!({})));
}

#[test]
fn what_a_node_has_lost_it_is_given_again() {
    let Some(stage) = Stage::new() else {
        return;
    };
    stage.add(json!({}));
    let netns = stage.node.script(|it| {
        // As if its process had ended.
        it.taps.clear();
        it.reserve.take().unwrap().netns
    });
    let missing = |netns: NetworkNamespace, interface: &str| Missing {
        key: Key::new("muslin", "c1", interface),
        netns,
        queues: 1,
        offloads: false,
    };
    let other = NetworkNamespace {
        inode: 1,
        ..netns.clone()
    };
    stage.node.script(|it| {
        it.missing = vec![
            missing(other, "eth1"),
            missing(netns.clone(), "lo"),
            missing(netns, "eth0"),
        ];
    });
    stage.node.calls();
    let output = stage.call("STATUS", &[], json!({}));
    assert!(output.status.success() && output.stdout.is_empty());
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        log,
        "muslin-cni: the node has eth0 of c1 in muslin again
"
    );
    let calls = stage.node.calls();
    assert_eq!(calls, ["ready 0", "missing 0", "restore 1", "missing 0"]);
    // The interface is alive.
    poll_until(SOON, "a carrier", || {
        let shown = stage.pod.run(&["ip", "link", "show", "eth0"]);
        shown.contains("LOWER_UP").then_some(())
    });
    succeeds(&stage.call("DEL", &[], json!({})));
}

#[test]
fn all_that_is_valid_is_told_in_parts() {
    let Some(stage) = Stage::new() else {
        return;
    };
    let valid: Vec<_> = (0..1000)
        .map(|i| json!({"containerID": format!("{i:064}"), "ifname": "eth0"}))
        .collect();
    succeeds(&stage.call("GC", &[], json!({"cni.dev/valid-attachments": valid})));
    let calls = stage.node.calls();
    assert!(calls.len() > 1, "{calls:?}");
    assert_eq!(calls.last().unwrap(), "collect 0");
    assert!(
        calls[..calls.len() - 1]
            .iter()
            .all(|it| it == "collect part 0")
    );
}

#[test]
fn addresses_may_be_chosen_by_another_plugin() {
    let folder = Path::new("/usr/lib/cni");
    if !folder.join("host-local").exists() {
        return skip("there is no host-local (containernetworking-plugins)");
    }
    let Some(stage) = Stage::new() else {
        return;
    };
    let memory = stage.lab.directory().join("host-local");
    let of_flannel = json!({
        "cniVersion": "0.3.1",
        "ipMasq": true,
        "mtu": 1450,
        "ipam": {
            "type": "host-local",
            "dataDir": memory,
            "ranges": [[{"subnet": "10.244.1.0/24", "rangeStart": "10.244.1.77"}]],
            "routes": [{"dst": "10.244.0.0/16"}],
        },
    });
    let kept = || {
        let entries = std::fs::read_dir(memory.join("muslin")).unwrap();
        let names = entries.map(|it| it.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("10.")).count()
    };
    stage.node.script(|it| it.ends_at = Some("commit"));
    let told = error(&stage.call("ADD", &[], of_flannel.clone()));
    assert_eq!(told["code"], 11);
    assert_eq!(kept(), 0, "what failed gives its address back");
    stage.node.script(|it| it.ends_at = None);
    let result = stage.add(of_flannel.clone());
    assert_eq!(result["ips"][0]["version"], "4");
    let address = result["ips"][0]["address"].as_str().unwrap();
    assert!(address.starts_with("10.244.1.7"), "{address}");
    let route = json!({"dst": "10.244.0.0/16", "gw": "10.244.1.1"});
    assert!(
        result["routes"].as_array().unwrap().contains(&route),
        "{result}"
    );
    assert_eq!(kept(), 1);
    let routes = stage.pod.run(&["ip", "route"]);
    assert!(
        routes.contains("10.244.0.0/16 via 10.244.1.1 dev eth0"),
        "{routes}"
    );
    succeeds(&stage.call("DEL", &[], of_flannel));
    assert_eq!(kept(), 0);
}
