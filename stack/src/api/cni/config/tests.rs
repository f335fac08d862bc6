use serde_json::json;

use super::*;

fn config(command: Command, changes: Value) -> Result<Config, (Error, Option<Version>)> {
    let mut all = json!({"cniVersion": "1.1.0", "name": "muslin", "type": "muslin-cni"});
    let (Value::Object(all_of), Value::Object(changes)) = (&mut all, changes) else {
        panic!("an object");
    };
    all_of.extend(changes);
    Config::read(all.to_string().as_bytes(), command)
}

fn add(changes: Value) -> Config {
    config(Command::Add, changes).unwrap()
}

#[track_caller]
fn is_refused(command: Command, changes: Value, code: u32, message: &str) {
    let (error, _) = config(command, changes).unwrap_err();
    assert_eq!((error.code(), &*error.to_string()), (code, message));
}

#[test]
fn what_comes_first_is_told_first() {
    let refused = |text: &str| {
        let (error, version) = Config::read(text.as_bytes(), Command::Add).unwrap_err();
        (error.code(), error.print(version))
    };
    let (code, text) = refused("");
    assert_eq!(code, 6);
    assert!(
        text.starts_with(
            r#"{"cniVersion":"1.1.0","code":6,"msg":"error unmarshall network config: "#
        )
    );
    for bad in ["{", "[]", "7", "null", r#"{"name":"a"} x"#, r#"{"name":7}"#] {
        assert_eq!(refused(bad).0, 6, "{bad}");
    }
    // Neither too deep nor too long.
    assert_eq!(refused(&"[".repeat(100_000)).0, 6);
    assert_eq!(refused(&" ".repeat(MAX_CONFIG + 1)).0, 6);
    let cases = [
        (
            r#"{"cniVersion":"9.0.0"}"#,
            7,
            r#""msg":"missing network name"}"#,
        ),
        (r#"{"name":null}"#, 7, r#""msg":"missing network name"}"#),
        (
            r#"{"name":"a b"}"#,
            7,
            r#""msg":"invalid characters found in network name","details":"a b"}"#,
        ),
        (
            r#"{"name":"a","cniVersion":"9.0.0","ipam":7}"#,
            1,
            r#""msg":"incompatible CNI versions","details":"config is \"9.0.0\", plugin supports [\"0.3.0\" \"0.3.1\" \"0.4.0\" \"1.0.0\" \"1.1.0\"]"}"#,
        ),
        (
            r#"{"name":"a"}"#,
            1,
            r#""msg":"incompatible CNI versions","details":"config is \"0.1.0\", plugin supports [\"0.3.0\" \"0.3.1\" \"0.4.0\" \"1.0.0\" \"1.1.0\"]"}"#,
        ),
    ];
    for (text, code, end) in cases {
        let (told, printed) = refused(text);
        assert_eq!(told, code);
        assert_eq!(
            printed,
            format!(r#"{{"cniVersion":"1.1.0","code":{code},{end}"#)
        );
    }
}

#[test]
fn commands_begin_with_versions() {
    for (command, versions) in [
        (Command::Check, &["0.3.0", "0.3.1"][..]),
        (Command::Gc, &["0.3.1", "0.4.0", "1.0.0"]),
        (Command::Status, &["0.3.1", "0.4.0", "1.0.0"]),
    ] {
        for version in versions {
            let told = config(command, json!({"cniVersion": version})).unwrap_err();
            let (error, told) = told;
            assert_eq!(error.code(), 1);
            let text = format!("config version does not allow {command}");
            assert_eq!(error.to_string(), text);
            assert_eq!(told.unwrap().as_str(), *version);
        }
    }
    for version in Version::ALL {
        let read = add(json!({"cniVersion": version.as_str()}));
        assert_eq!(read.version, version);
    }
}

#[test]
fn what_is_wrong_is_named() {
    use Command::{Add, Check, Gc, Status};
    let runtime = |key: &str, value: Value| json!({"runtimeConfig": {key: value}});
    let ports = |entry: Value| runtime("portMappings", json!([entry]));
    let ports_key = "invalid network config: runtimeConfig.portMappings";
    let is_wrong = |changes: Value, code: u32, message: &str| {
        is_refused(Add, changes, code, message);
    };
    is_wrong(
        json!({"runtimeConfig": []}),
        6,
        "error unmarshall network config: runtimeConfig: invalid type: sequence, expected a map",
    );
    is_wrong(
        ports(json!({"hostPort": 70_000, "containerPort": 1})),
        7,
        &format!("{ports_key}: host port 70000 is not a number from 0 to 65535"),
    );
    is_wrong(
        ports(json!({"HostPort": 80, "ContainerPort": -1})),
        7,
        &format!("{ports_key}: container port -1 is not a number from 0 to 65535"),
    );
    is_wrong(
        ports(json!({"hostPort": 80})),
        7,
        &format!("{ports_key}: host port 80 leads to no port"),
    );
    is_wrong(
        ports(json!({"hostPort": 80, "containerPort": 80, "hostIP": "x"})),
        7,
        &format!("{ports_key}: 'x' is not an address"),
    );
    is_wrong(
        ports(json!({"hostPort": 80, "containerPort": 80, "protocol": "sctp"})),
        2,
        "unsupported field runtimeConfig.portMappings.protocol: sctp",
    );
    let one = json!({"hostPort": 80, "containerPort": 80});
    is_wrong(
        runtime("portMappings", vec![one; 257].into()),
        7,
        &format!("{ports_key}: a pod has at most 256 ports"),
    );
    for (limits, problem) in [
        (
            json!({"ingressRate": 1}),
            "if rate is set, burst must also be set",
        ),
        (
            json!({"EgressRate": 1}),
            "if rate is set, burst must also be set",
        ),
        (
            json!({"egressBurst": 1}),
            "if burst is set, rate must also be set",
        ),
        (
            json!({"ingressRate": 1, "ingressBurst": 8 * u64::from(u32::MAX)}),
            "burst cannot be more than 4GB",
        ),
    ] {
        let message = format!("invalid network config: runtimeConfig.bandwidth: {problem}");
        is_wrong(runtime("bandwidth", limits), 7, &message);
    }
    is_wrong(
        runtime("ips", json!(["10.0.0.1", "a"])),
        7,
        "invalid network config: runtimeConfig.ips: 'a' is not an address",
    );
    is_wrong(
        json!({"args": {"cni": {"ips": ["10.0.0.1/33"]}}}),
        7,
        "invalid network config: args.cni.ips: '10.0.0.1/33' is not an address",
    );
    let many: Vec<_> = (0..17).map(|it| format!("10.0.0.{it}")).collect();
    is_wrong(
        runtime("ips", many.into()),
        7,
        "invalid network config: runtimeConfig.ips: a pod has at most 16 addresses",
    );
    is_wrong(
        runtime("mac", json!("ff:ff:ff:ff:ff:ff")),
        7,
        "invalid network config: runtimeConfig.mac: 'ff:ff:ff:ff:ff:ff' is not the MAC address of \
         one interface",
    );
    is_wrong(
        runtime("aliases", vec!["a"; 65].into()),
        7,
        "invalid network config: runtimeConfig.aliases: a pod has at most 64 of them",
    );
    is_wrong(
        json!({"mtu": 67}),
        7,
        "invalid network config: mtu: 67 is not a number from 68 to 65535",
    );
    is_wrong(
        json!({"dns": {"search": vec!["x"; 65]}}),
        7,
        "invalid network config: dns: it is too long",
    );
    is_wrong(
        json!({"ipam": {"type": "../x"}}),
        7,
        "invalid network config: ipam.type: '../x' is not the name of a plugin",
    );
    for command in [Add, Check, Command::Del, Gc, Status] {
        is_refused(
            command,
            json!({"socket": "x"}),
            7,
            "invalid network config: socket: it is no absolute path of at most 107 bytes",
        );
    }
    is_wrong(
        json!({"prevResult": {"ips": [{"address": "10.0.0.1/24", "interface": 3}]}}),
        6,
        "error unmarshall network config: prevResult: an address is of interface 3, which is not \
         there",
    );
    let (error, _) = config(Gc, json!({"cni.dev/valid-attachments": "all"})).unwrap_err();
    assert_eq!(error.code(), 6);
}

#[test]
fn del_reads_no_more_than_it_needs() {
    let strange = json!({"runtimeConfig": 7, "mtu": -1, "prevResult": [], "args": 1, "dns": 2});
    let read = config(Command::Del, strange.clone()).unwrap();
    assert_eq!(read.key("c1", "eth0").to_string(), "eth0 of c1 in muslin");
    assert!(config(Command::Add, strange).is_err());
}

#[test]
fn runtimes_spell_in_two_ways() {
    let published = |text: &str| {
        let ports: crate::api::published::Ports = text.parse().unwrap();
        crate::api::published::Ports::all(&[ports])
    };
    let of_containerd = add(json!({"runtimeConfig": {
        "portMappings": [
            {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""},
            {"HostPort": 0, "ContainerPort": 81, "Protocol": "tcp", "HostIP": ""},
        ],
        "bandwidth": {
            "IngressRate": 1_000_000, "IngressBurst": u32::MAX,
            "EgressRate": 0, "EgressBurst": 0,
        },
        "dns": {"Servers": ["10.96.0.10"], "Searches": ["svc"], "Options": null},
        "ipRanges": [{"Subnet": "10.0.0.0/8"}],
        "cgroupPath": "/kubepods",
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
    }}));
    assert_eq!(of_containerd.wanted.publish, published("8080:80"));
    let rate = Rate {
        bits_per_second: 1_000_000,
        burst_bits: u32::MAX.into(),
    };
    assert_eq!(of_containerd.wanted.ingress, Some(rate));
    assert_eq!(of_containerd.wanted.egress, None);
    assert_eq!(of_containerd.dns.nameservers, ["10.96.0.10"]);
    assert_eq!(of_containerd.dns.search, ["svc"]);
    assert_eq!(of_containerd.wanted.annotations["a"], "b");

    let of_others = add(json!({
        "dns": {"nameservers": ["10.0.0.53"]},
        "runtimeConfig": {
            "portMappings": [
                {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "127.0.0.1"},
            ],
            "bandwidth": {"egressRate": 1, "egressBurst": 8 * u64::from(u32::MAX) - 1},
            "ips": ["10.1.2.3/24", "10.1.2.3"],
            "mac": "02:00:5E:00:53:01",
            "aliases": ["Web", "web", "no_name"],
            "portmappings": "another key",
        },
        "args": {"cni": {"ips": ["10.1.2.4"], "labels": [{"key": "a", "value": "b"}]}},
    }));
    assert_eq!(of_others.wanted.publish, published("127.0.0.1:53:5353/udp"));
    assert_eq!(of_others.wanted.egress.unwrap().burst_bits, 34_359_738_359);
    let addresses = ["10.1.2.3", "10.1.2.4"].map(|it| it.parse::<IpAddr>().unwrap());
    assert_eq!(of_others.wanted.addresses, addresses);
    assert_eq!(of_others.wanted.mac.as_deref(), Some("02:00:5e:00:53:01"));
    assert_eq!(of_others.wanted.aliases, ["web".parse().unwrap()]);
    assert_eq!(of_others.notes, ["the alias \"no_name\" is left out"]);
    assert_eq!(of_others.dns.nameservers, ["10.0.0.53"]);

    let aliases = json!({"muslin": ["db"], "other": ["x"]});
    let of_podman = add(json!({"runtimeConfig": {"aliases": aliases}}));
    assert_eq!(of_podman.wanted.aliases, ["db".parse().unwrap()]);
    let nulls = json!({"runtimeConfig": {"portMappings": null, "aliases": null}, "ipam": null});
    assert_eq!(add(nulls).wanted, Wanted::default());
}

#[test]
fn our_own_keys() {
    let plain = add(json!({"mtu": 0, "ipam": {}, "unknown": {"a": [1]}}));
    assert_eq!(plain.socket, SOCKET);
    assert_eq!((plain.mtu, plain.delegate), (None, None));
    let ours = add(json!({"ipam": {"type": "muslin"}, "socket": "/s", "mtu": 1400}));
    assert_eq!(
        (ours.mtu, ours.delegate, &*ours.socket),
        (Some(1400), None, "/s")
    );
    // As flannel's plugin writes it.
    let of_flannel = add(json!({
        "cniVersion": "0.3.1",
        "ipMasq": true,
        "mtu": 1450,
        "ipam": {
            "ranges": [[{"subnet": "10.244.1.0/24"}]],
            "routes": [{"dst": "10.244.0.0/16"}],
            "type": "host-local",
        },
    }));
    assert_eq!(of_flannel.delegate.as_deref(), Some("host-local"));
}

#[test]
fn an_empty_list_is_not_the_same_as_none() {
    let valid = |changes: Value| config(Command::Gc, changes).unwrap().valid;
    let one = json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "", "ifname": ""}]);
    assert_eq!(valid(json!({})), None);
    assert_eq!(valid(json!({"cni.dev/valid-attachments": null})), None);
    assert_eq!(
        valid(json!({"cni.dev/valid-attachments": []})),
        Some(vec![])
    );
    let key = Key::new("muslin", "c1", "eth0");
    let older = json!({"cni.dev/attachments": one});
    assert_eq!(valid(older.clone()), Some(vec![key]));
    let both = json!({"cni.dev/valid-attachments": [], "cni.dev/attachments": one});
    assert_eq!(valid(both), Some(vec![]));
}

#[test]
fn results_of_earlier_plugins_are_read() {
    let changes = json!({"prevResult": {"ips": [{"address": "10.0.0.2/24"}]}});
    for command in [Command::Add, Command::Check] {
        let previous = config(command, changes.clone()).unwrap().previous;
        assert_eq!(previous.unwrap().ips.len(), 1);
    }
    assert_eq!(add(json!({"prevResult": null})).previous, None);
}
