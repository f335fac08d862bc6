//! What a container runtime says to the CNI plugin: variables of its environment and a
//! configuration. Whatever they are, the plugin answers with a result that reads as it was printed,
//! or with an error that a runtime understands; what is taken keeps its bounds.
#![cfg_attr(fuzzing, no_main)]

use std::net::IpAddr;

use muslin_fuzz::Seed;
use muslin_stack::api::cni::config::{Config, MAX_ADDRESSES, MAX_ALIASES, MAX_NAME};
use muslin_stack::api::cni::environment::{Command, Environment, MAX_CONTAINER, MAX_INTERFACE};
use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::request::{parts, reserve};
use muslin_stack::api::cni::result::{Added, Dns, Interface, Ip, MAX_ENTRIES, MAX_ROUTES};
use muslin_stack::api::cni::version::Version;
use muslin_stack::api::cni::{Call, Key, NetworkNamespace, deletion};
use muslin_stack::api::control::Request;
use muslin_stack::api::published::MAX_PORTS;
use serde_json::Value;

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        b"CNI_COMMAND=",
        b"CNI_CONTAINERID=",
        b"CNI_NETNS=",
        b"CNI_IFNAME=",
        b"CNI_ARGS=",
        b"CNI_PATH=",
        b"CNI_NETNS_OVERRIDE=1",
        b"ADD",
        b"CHECK",
        b"DEL",
        b"GC",
        b"STATUS",
        b"VERSION",
        b"IP=10.1.0.3/24;",
        b"MAC=02:00:5e:00:53:01;",
        b"K8S_POD_NAMESPACE=a;",
        b"K8S_POD_NAME=a;",
        b"K8S_POD_UID=a;",
        b"\"cniVersion\":\"1.1.0\"",
        b"\"cniVersion\":\"0.4.0\"",
        b"\"name\":\"a\"",
        b"\"runtimeConfig\":{}",
        b"\"portMappings\":[]",
        b"{\"HostPort\":1,\"ContainerPort\":1,\"Protocol\":\"udp\",\"HostIP\":\"::\"}",
        b"{\"hostPort\":1,\"containerPort\":1}",
        b"\"bandwidth\":{\"ingressRate\":1,\"ingressBurst\":4294967295}",
        b"\"bandwidth\":{\"EgressRate\":1,\"EgressBurst\":34359738359}",
        b"\"ips\":[\"10.1.0.3/24\"]",
        b"\"mac\":\"02:00:5e:00:53:01\"",
        b"\"aliases\":[\"a\"]",
        b"\"aliases\":{\"a\":[\"b\"]}",
        b"\"dns\":{\"Servers\":[\"10.0.0.1\"]}",
        b"\"io.kubernetes.cri.pod-annotations\":{}",
        b"\"args\":{\"cni\":{\"ips\":[]}}",
        b"\"prevResult\":{\"interfaces\":[],\"ips\":[],\"routes\":[],\"dns\":{}}",
        b"{\"name\":\"eth0\",\"mac\":\"\",\"sandbox\":\"/n\"}",
        b"{\"address\":\"10.0.0.2/24\",\"gateway\":\"10.0.0.1\",\"interface\":0}",
        b"{\"dst\":\"0.0.0.0/0\",\"gw\":\"10.0.0.1\"}",
        b"\"cni.dev/valid-attachments\":[]",
        b"\"cni.dev/attachments\":[]",
        b"{\"containerID\":\"a\",\"ifname\":\"eth0\"}",
        b"\"ipam\":{\"type\":\"host-local\"}",
        b"\"socket\":\"/s\"",
        b"\"mtu\":1400",
    ],
    inputs: 100_000,
    max_len: 1200,
}

/// Lines are variables up to an empty one, behind which the configuration is.
fn run(data: &[u8]) {
    let mut rest = data;
    let mut variables = Vec::new();
    let config = loop {
        let (line, behind) = match rest.iter().position(|byte| *byte == b'\n') {
            Some(end) => (&rest[..end], &rest[end + 1..]),
            None => (rest, &[][..]),
        };
        if line.is_empty() {
            break behind;
        }
        if let Some(equals) = line.iter().position(|byte| *byte == b'=') {
            variables.push((&line[..equals], &line[equals + 1..]));
        }
        rest = behind;
    };
    let variable = |name: &str| {
        let found = variables
            .iter()
            .rev()
            .find(|(it, _)| *it == name.as_bytes());
        found.map(|(_, value)| value.to_vec())
    };
    let environment = match Environment::read(variable) {
        Ok(Some(environment)) => environment,
        Ok(None) => return assert!(variable("CNI_COMMAND").unwrap_or_default().is_empty()),
        Err(error) => {
            assert_eq!(error.code(), 4);
            return is_told(&error, None, data.len());
        }
    };
    check_environment(&environment);
    let command = environment.command;
    match Config::read(config, command) {
        Ok(config) => check_config(&environment, &config),
        Err((error, version)) => {
            assert!(matches!(error.code(), 1 | 2 | 6 | 7), "{error:?}");
            is_told(&error, version, data.len());
        }
    }
}

/// Whether a runtime understands an error, which repeats no more than a little.
fn is_told(error: &Error, version: Option<Version>, len: usize) {
    let printed = error.print(version);
    assert!(!printed.contains('\n'));
    assert!(printed.len() <= 4096, "{printed} for {len} bytes");
    let told: Value = serde_json::from_str(&printed).expect("it is JSON");
    let code = told["code"].as_u64().expect("it has a code");
    assert_eq!(code, u64::from(error.code()));
    assert!(!told["msg"].as_str().expect("it has a message").is_empty());
    let version = told["cniVersion"].as_str().and_then(Version::named);
    assert!(version.is_some());
}

fn check_environment(environment: &Environment) {
    let has_container = matches!(
        environment.command,
        Command::Add | Command::Check | Command::Del
    );
    if !has_container {
        return assert!(environment.container.is_empty() && environment.netns.is_none());
    }
    let container = &environment.container;
    let plain = |c: char| c.is_ascii_alphanumeric();
    assert!(container.starts_with(plain) && container.len() <= MAX_CONTAINER);
    assert!(container.chars().all(|c| plain(c) || "_.-".contains(c)));
    assert!((1..=MAX_INTERFACE).contains(&environment.interface.len()));
    assert!(!environment.interface.contains(['/', ':', ' ', '\t']));
    assert!(environment.alias().len() < 256, "an alias has room for it");
    assert!(environment.netns.is_some() || environment.command == Command::Del);
}

fn check_config(environment: &Environment, config: &Config) {
    assert!(!config.name.is_empty() && config.name.len() <= MAX_NAME);
    assert!(!config.name.contains('/'));
    assert!(config.socket.starts_with('/') && config.socket.len() <= 107);
    let delegate = config.delegate.as_deref().unwrap_or("x");
    assert!(!delegate.contains('/') && delegate != "." && delegate != "..");
    let wanted = &config.wanted;
    assert!(wanted.publish.len() <= usize::from(MAX_PORTS));
    assert!(
        wanted
            .publish
            .iter()
            .all(|it| it.host_port > 0 && it.pod_port > 0)
    );
    assert!(wanted.addresses.len() <= MAX_ADDRESSES && wanted.aliases.len() <= MAX_ALIASES);
    for rate in [wanted.ingress, wanted.egress].into_iter().flatten() {
        assert!(rate.bits_per_second > 0 && rate.burst_bits > 0);
    }
    if let Some(previous) = &config.previous {
        assert!(previous.interfaces.len() <= MAX_ENTRIES && previous.routes.len() <= MAX_ROUTES);
        is_printed(previous);
    }
    if let Some(valid) = &config.valid {
        assert_eq!(environment.command, Command::Gc);
        let told = parts(valid.clone(), 60_000);
        assert_eq!(told.concat(), *valid);
        assert!(told.iter().all(|part| part.len() <= 60_000 / 50));
    }
    let key = config.key(&environment.container, &environment.interface);
    is_left(&key);
    if environment.command == Command::Add {
        is_added(environment, config);
    }
}

/// Whether word of an attachment is read as it is left, by a name that is a file's.
fn is_left(key: &Key) {
    let printed = deletion::print(key);
    assert!(printed.len() <= deletion::MAX_LEN);
    assert_eq!(deletion::read(printed.as_bytes()).as_ref(), Some(key));
    let name = deletion::file_name(key);
    assert!(
        name.len() == 37
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'.')
    );
}

/// Whether a place that is asked for is understood by the node, and its result by the runtime.
fn is_added(environment: &Environment, config: &Config) {
    let netns = NetworkNamespace {
        path: environment.netns.clone().unwrap_or_default(),
        device: 4,
        inode: 7,
    };
    let place = match reserve(environment, config, netns, &[]) {
        Ok(place) => place,
        Err(error) => return is_told(&error, Some(config.version), 0),
    };
    assert!(place.addresses.len() <= MAX_ADDRESSES);
    let wanted: Vec<IpAddr> = place.addresses.clone();
    let request = Request::Cni(Call::Reserve(Box::new(place)));
    let printed = serde_json::to_vec(&request).expect("it can be printed");
    assert!(printed.len() <= 64 << 10, "it fits one message");
    let again: Request = serde_json::from_slice(&printed).expect("it is understood");
    assert_eq!(again, request);

    let mut added = config.previous.clone().unwrap_or_default();
    let sandbox = environment.netns.as_deref().unwrap_or_default();
    let interface = Interface::new(&environment.interface, "02:00:5e:00:53:01", 1450, sandbox);
    let ips = wanted
        .iter()
        .map(|address| Ip::new((*address).into(), None));
    let before = added.interfaces.len();
    added.add(interface, ips.collect(), Vec::new(), Dns::default());
    assert_eq!(added.interfaces.len(), before + 1);
    let is_ours = |ip: &&Ip| ip.interface == Some(before);
    assert_eq!(added.ips.iter().filter(is_ours).count(), wanted.len());
    if before < MAX_ENTRIES && added.ips.len() <= MAX_ENTRIES {
        is_printed(&added);
    }
}

/// Whether a result reads as it was printed: whole in the newest version, and as much of it as they
/// have in older ones.
fn is_printed(added: &Added) {
    let read = |text: &str| {
        let value = serde_json::from_str(text).expect("it is JSON");
        Added::read(&value).expect("it is a result")
    };
    for version in Version::ALL {
        let printed = added.print(version);
        assert!(!printed.contains('\n'));
        let again = read(&printed);
        assert_eq!(again.print(version), printed);
        if version == Version::NEWEST {
            assert_eq!(again, *added);
        }
        let value: Value = serde_json::from_str(&printed).expect("it is JSON");
        assert_eq!(value["cniVersion"], version.as_str());
        for ip in value["ips"].as_array().into_iter().flatten() {
            assert_eq!(ip.get("version").is_some(), version < Version::V1_0_0);
        }
    }
}

/// A command's variables, changed, and its configuration.
fn seed(command: &str, changes: &[&str], config: &str) -> Vec<u8> {
    let mut text = format!(
        "CNI_COMMAND={command}\nCNI_CONTAINERID=c1\nCNI_NETNS=/run/netns/c1\nCNI_IFNAME=eth0\n\
         CNI_PATH=/opt/cni/bin\n"
    );
    for change in changes {
        text.push_str(change);
        text.push('\n');
    }
    text.push('\n');
    text.push_str(config);
    text.into_bytes()
}

fn seeds() -> Vec<Seed> {
    let containerd = concat!(
        r#"{"cniVersion":"1.1.0","name":"muslin","type":"muslin-cni","capabilities":{"portMappings":true},"#,
        r#""runtimeConfig":{"portMappings":[{"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":""}],"#,
        r#""bandwidth":{"IngressRate":1000000,"IngressBurst":4294967295,"EgressRate":0,"EgressBurst":0},"#,
        r#""dns":{"Servers":["10.96.0.10"],"Searches":["svc.cluster.local"],"Options":["ndots:5"]},"#,
        r#""io.kubernetes.cri.pod-annotations":{"a":"b"}}}"#
    );
    let kubernetes = "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;\
                      K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u";
    let crio = concat!(
        r#"{"cniVersion":"1.0.0","name":"muslin","type":"muslin-cni","runtimeConfig":{"#,
        r#""bandwidth":{"egressRate":1,"egressBurst":34359738359},"aliases":["web"],"#,
        r#""ips":["10.1.0.3/24"],"mac":"02:00:5e:00:53:01"}}"#
    );
    let podman = concat!(
        r#"{"cniVersion":"0.4.0","name":"muslin","mtu":1400,"socket":"/run/user/1000/s","#,
        r#""args":{"cni":{"ips":["10.1.0.4"]}},"runtimeConfig":{"aliases":{"muslin":["db"]},"#,
        r#""portMappings":[{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"127.0.0.1"}]}}"#
    );
    let flannel = concat!(
        r#"{"cniVersion":"0.3.1","name":"cbr0","type":"muslin-cni","ipMasq":true,"mtu":1450,"#,
        r#""ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"}}"#
    );
    let chained = concat!(
        r#"{"cniVersion":"1.1.0","name":"muslin","prevResult":{"cniVersion":"1.1.0","#,
        r#""interfaces":[{"name":"eth0","mac":"02:00:5e:00:53:01","mtu":1450,"sandbox":"/run/netns/c1","#,
        r#""socketPath":"/s","pciID":"0000:00:1f.6"}],"ips":[{"interface":0,"address":"10.1.0.2/24","#,
        r#""gateway":"10.1.0.1"},{"address":"fd00::2/64"}],"routes":[{"dst":"0.0.0.0/0","gw":"10.1.0.1","#,
        r#""mtu":1400,"advmss":1360,"priority":1,"table":254,"scope":0}],"dns":{"nameservers":["10.1.0.1"],"#,
        r#""domain":"cluster.local","search":["a"],"options":["ndots:2"]}}}"#
    );
    let attachments = concat!(
        r#"{"cniVersion":"1.1.0","name":"muslin","cni.dev/valid-attachments":["#,
        r#"{"containerID":"c1","ifname":"eth0"},{"containerID":"-","ifname":""}]}"#
    );
    let older = r#"{"cniVersion":"1.1.0","name":"muslin","cni.dev/attachments":[]}"#;
    let plain = r#"{"cniVersion":"1.1.0","name":"muslin","type":"muslin-cni"}"#;
    vec![
        ("add-containerd", seed("ADD", &[kubernetes], containerd)),
        ("add-crio", seed("ADD", &[kubernetes], crio)),
        (
            "add-podman",
            seed(
                "ADD",
                &["CNI_ARGS=IP=10.1.0.3;MAC=02:00:5e:00:53:02"],
                podman,
            ),
        ),
        ("add-flannel", seed("ADD", &[], flannel)),
        (
            "add-chained",
            seed("ADD", &["CNI_NETNS_OVERRIDE=1"], chained),
        ),
        ("add-bad-arguments", seed("ADD", &["CNI_ARGS=IP"], plain)),
        ("check", seed("CHECK", &[], chained)),
        ("check-too-old", seed("CHECK", &[], flannel)),
        ("del", seed("DEL", &[], plain)),
        ("del-nowhere", seed("DEL", &["CNI_NETNS="], plain)),
        ("gc", seed("GC", &[], attachments)),
        ("gc-older", seed("GC", &[], older)),
        ("status", seed("STATUS", &[], plain)),
        ("version", b"CNI_COMMAND=VERSION\n\n".to_vec()),
        ("nothing", Vec::new()),
        ("unknown", seed("FROB", &[], plain)),
        ("missing", b"CNI_COMMAND=ADD\n\n{}".to_vec()),
        ("bad-container", seed("ADD", &["CNI_CONTAINERID=-a"], plain)),
        ("bad-interface", seed("ADD", &["CNI_IFNAME=a/b"], plain)),
        ("no-json", seed("ADD", &[], "{")),
        ("no-name", seed("ADD", &[], r#"{"cniVersion":"1.0.0"}"#)),
        ("bad-name", seed("ADD", &[], r#"{"name":"a b"}"#)),
        (
            "bad-version",
            seed("ADD", &[], r#"{"name":"a","cniVersion":"9.0.0"}"#),
        ),
        (
            "sctp",
            seed(
                "ADD",
                &[],
                r#"{"cniVersion":"1.0.0","name":"a","runtimeConfig":{"portMappings":[{"hostPort":1,"containerPort":1,"protocol":"sctp"}]}}"#,
            ),
        ),
    ]
}
