//! What `deploy/` gives to others: manifests that Kubernetes and systemd can read, whose flags the
//! program has, and whose parts fit each other.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

const MUSLIN: &str = env!("CARGO_BIN_EXE_muslin");
/// Volumes that "restricted" permits.
const VOLUMES: [&str; 8] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

fn read(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("deploy")
        .join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A manifest of one pod.
struct Manifest {
    name: String,
    pod: Value,
}

impl Manifest {
    fn named(name: &str) -> Self {
        let text = read(&format!("kubernetes/{name}"));
        let pod: Value = serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            (&pod["apiVersion"], &pod["kind"]),
            (&"v1".into(), &"Pod".into())
        );
        Self {
            name: name.to_owned(),
            pod,
        }
    }

    fn all() -> Vec<Self> {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes");
        let entries = std::fs::read_dir(directory).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let names = names.filter(|name| name.starts_with("sidecar-"));
        let all: Vec<_> = names.map(|name| Self::named(&name)).collect();
        assert!(!all.is_empty());
        all
    }

    fn spec(&self) -> &Value {
        &self.pod["spec"]
    }

    fn containers(&self) -> impl Iterator<Item = &Value> {
        let kinds = ["initContainers", "containers"].iter();
        kinds.flat_map(|kind| list(&self.spec()[*kind]))
    }

    fn sidecar(&self) -> &Value {
        let mut all = self.containers();
        let is_it = |container: &&Value| container["name"] == "muslin";
        all.find(is_it)
            .unwrap_or_else(|| panic!("{}: no sidecar", self.name))
    }

    /// The sidecar's arguments, as Kubernetes gives them.
    fn arguments(&self) -> Vec<String> {
        let sidecar = self.sidecar();
        let variables: BTreeMap<_, _> = list(&sidecar["env"])
            .iter()
            .map(|variable| {
                let path = &variable["valueFrom"]["fieldRef"]["fieldPath"];
                let value = match path.as_str() {
                    Some("metadata.name") => text(&self.pod["metadata"]["name"]),
                    Some("status.podIP") => "10.0.0.7",
                    _ => text(&variable["value"]),
                };
                (format!("$({})", text(&variable["name"])), value)
            })
            .collect();
        let written = list(&sidecar["args"]).iter().map(text);
        let whole = written.map(|argument| {
            let mut argument = argument.to_owned();
            for (name, value) in &variables {
                argument = argument.replace(name, value);
            }
            assert!(!argument.contains("$("), "{}: {argument}", self.name);
            argument
        });
        whole.collect()
    }

    /// The value of one of the sidecar's flags.
    fn flag(&self, name: &str) -> Option<String> {
        let begin = format!("{name}=");
        let arguments = self.arguments();
        let mut values = arguments.iter().filter_map(|it| it.strip_prefix(&begin));
        values.next().map(str::to_owned)
    }

    /// What the Pod Security Standard "restricted" refuses of it.
    fn refused(&self) -> Vec<String> {
        let mut refused = Vec::new();
        let spec = self.spec();
        for namespace in ["hostNetwork", "hostPID", "hostIPC"] {
            if spec[namespace] == true {
                refused.push(namespace.to_owned());
            }
        }
        for volume in list(&spec["volumes"]) {
            let kinds = volume.as_object().unwrap().keys();
            let kinds = kinds.filter(|kind| *kind != "name" && !VOLUMES.contains(&kind.as_str()));
            refused.extend(kinds.map(|kind| format!("volume {}: {kind}", text(&volume["name"]))));
        }
        for container in self.containers() {
            let name = text(&container["name"]);
            let faults = faults(&spec["securityContext"], container).into_iter();
            refused.extend(faults.map(|fault| format!("{name}: {fault}")));
        }
        refused
    }

    /// What is left open of what "restricted" says nothing about.
    fn lax(&self) -> Vec<String> {
        let mut lax = Vec::new();
        let mut check = |is_well: bool, fault: String| {
            if !is_well {
                lax.push(fault);
            }
        };
        let spec = self.spec();
        let token = &spec["automountServiceAccountToken"];
        check(token == false, "has a token of the cluster".to_owned());
        for container in self.containers() {
            let name = text(&container["name"]);
            let context = &container["securityContext"];
            let is_kept = context["readOnlyRootFilesystem"] == true;
            check(is_kept, format!("{name}: a root that can be written"));
            let limit = &container["resources"]["limits"]["memory"];
            check(limit.is_string(), format!("{name}: no limit of memory"));
        }
        for volume in list(&spec["volumes"]) {
            let directory = &volume["emptyDir"];
            let is_limited = directory.is_null() || directory["sizeLimit"].is_string();
            check(is_limited, format!("{}: no limit of size", volume["name"]));
        }
        let etcd = self.flag("--etcd-endpoints").unwrap();
        let is_tls = etcd.split(',').all(|it| it.starts_with("https://"));
        check(is_tls, format!("{etcd}: no TLS"));
        for flag in ["--etcd-cafile", "--etcd-certfile", "--etcd-keyfile"] {
            let file = self.flag(flag);
            let is_secret = file.is_some_and(|file| self.is_secret(&file));
            check(is_secret, format!("{flag}: not from a secret"));
        }
        lax
    }

    /// Whether a file of the sidecar is from a secret that no other container has.
    fn is_secret(&self, file: &str) -> bool {
        let mounts = |container: &Value| list(&container["volumeMounts"]).to_vec();
        let own = mounts(self.sidecar());
        let from = own.iter().find(|mount| {
            let rest = file.strip_prefix(text(&mount["mountPath"]));
            rest.is_some_and(|rest| rest.starts_with('/'))
        });
        let Some(from) = from else { return false };
        let volumes = list(&self.spec()["volumes"]);
        let volume = volumes.iter().find(|it| it["name"] == from["name"]);
        let others = self.containers().filter(|it| it["name"] != "muslin");
        let mut others = others.flat_map(mounts);
        from["readOnly"] == true
            && volume.is_some_and(|it| it["secret"].is_object())
            && !others.any(|mount| mount["name"] == from["name"])
    }
}

/// What "restricted" refuses of a container in a pod with this security context.
fn faults(of_pod: &Value, container: &Value) -> Vec<String> {
    let own = &container["securityContext"];
    // What the container says itself counts.
    let effective = |key: &str| match &own[key] {
        Value::Null => &of_pod[key],
        value => value,
    };
    let mut faults = Vec::new();
    let mut check = |is_well: bool, fault: &str| {
        if !is_well {
            faults.push(fault.to_owned());
        }
    };
    check(
        effective("runAsNonRoot") == true && effective("runAsUser") != 0,
        "may be root",
    );
    let profile = &effective("seccompProfile")["type"];
    check(
        profile == "RuntimeDefault" || profile == "Localhost",
        "no seccomp profile",
    );
    check(own["privileged"] != true, "privileged");
    check(
        own["allowPrivilegeEscalation"] == false,
        "may gain privileges",
    );
    let dropped = list(&own["capabilities"]["drop"]);
    check(dropped.contains(&"ALL".into()), "keeps capabilities");
    for added in list(&own["capabilities"]["add"]) {
        check(
            added == "NET_BIND_SERVICE",
            &format!("adds {}", text(added)),
        );
    }
    for port in list(&container["ports"]) {
        check(port["hostPort"].is_null(), "a port of the host");
    }
    faults
}

/// A list that may be missing.
fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[track_caller]
fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// Whether the program knows these arguments and their values. It looks at them in turn until it is
/// asked for help, and does nothing else.
fn is_known(arguments: &[String]) -> Result<(), String> {
    let mut command = Command::new(MUSLIN);
    let output = command.args(arguments).arg("--help").output().unwrap();
    match output.status.code() {
        Some(0) => Ok(()),
        _ => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

#[test]
fn the_program_has_the_flags_of_the_manifests() {
    for manifest in Manifest::all() {
        let arguments = manifest.arguments();
        assert_eq!(arguments[0], "sidecar", "{}", manifest.name);
        let known = is_known(&arguments);
        assert_eq!(known, Ok(()), "{}", manifest.name);
        // It would be told otherwise.
        for wrong in ["--no-such-flag", "--healthz-port=x", "--public-ip=nowhere"] {
            let told = is_known(&[&arguments[..], &[wrong.to_owned()]].concat());
            let flag = wrong.split('=').next().unwrap();
            assert!(told.clone().is_err_and(|it| it.contains(flag)), "{told:?}");
        }
    }
}

#[test]
fn only_the_manifest_that_says_so_needs_more_than_restricted_permits() {
    let restricted = Manifest::named("sidecar-restricted.yaml");
    assert_eq!(restricted.refused(), [""; 0]);
    let privileged = Manifest::named("sidecar-net-admin.yaml");
    assert_eq!(
        privileged.refused(),
        [
            "volume tun: hostPath",
            "muslin: may be root",
            "muslin: adds NET_ADMIN"
        ]
    );
}

#[test]
fn no_container_has_more_than_it_needs() {
    for manifest in Manifest::all() {
        assert_eq!(manifest.lax(), [""; 0], "{}", manifest.name);
    }
}

#[test]
fn each_rule_of_a_manifest_is_looked_for() {
    for mut manifest in Manifest::all() {
        let mut places = vec![
            "/automountServiceAccountToken".to_owned(),
            "/securityContext/runAsNonRoot".to_owned(),
            "/securityContext/seccompProfile".to_owned(),
        ];
        for kind in ["initContainers", "containers"] {
            for index in 0..list(&manifest.spec()[kind]).len() {
                let rules = [
                    "securityContext/allowPrivilegeEscalation",
                    "securityContext/capabilities/drop",
                    "securityContext/readOnlyRootFilesystem",
                    "resources/limits/memory",
                ];
                places.extend(rules.map(|rule| format!("/{kind}/{index}/{rule}")));
            }
        }
        let volumes = 0..list(&manifest.spec()["volumes"]).len();
        places.extend(volumes.map(|index| format!("/volumes/{index}")));
        let faults = |manifest: &Manifest| manifest.refused().len() + manifest.lax().len();
        let before = faults(&manifest);
        for place in places {
            let whole = manifest.pod.clone();
            let rule = manifest.pod["spec"].pointer_mut(&place).unwrap();
            let host = json!({"name": rule["name"], "hostPath": {"path": "/"}, "emptyDir": {}});
            *rule = if rule["name"].is_null() {
                Value::Null
            } else {
                host
            };
            assert!(faults(&manifest) > before, "{}: {place}", manifest.name);
            manifest.pod = whole;
        }
        for (from, to) in [
            ("https://etcd", "http://etcd"),
            ("/etc/muslin/etcd/", "/tmp/"),
        ] {
            let whole = manifest.pod.clone();
            for argument in manifest.pod["spec"]["initContainers"][0]["args"]
                .as_array_mut()
                .unwrap()
            {
                *argument = text(argument).replace(from, to).into();
            }
            assert!(faults(&manifest) > before, "{}: {to}", manifest.name);
            manifest.pod = whole;
        }
    }
}

#[test]
fn the_sidecar_starts_before_the_others_and_ends_after_them() {
    for manifest in Manifest::all() {
        let sidecar = &manifest.spec()["initContainers"][0];
        assert_eq!(sidecar["name"], "muslin", "{}", manifest.name);
        assert_eq!(sidecar["restartPolicy"], "Always", "{}", manifest.name);
        assert!(sidecar["startupProbe"].is_object(), "{}", manifest.name);
    }
}

#[test]
fn probes_and_other_nodes_find_what_the_sidecar_opens() {
    for manifest in Manifest::all() {
        let sidecar = manifest.sidecar();
        let ports = list(&sidecar["ports"]);
        let port = |name: &str| {
            let mut named = ports.iter().filter(|port| port["name"] == name);
            named.next().unwrap_or_else(|| panic!("no port '{name}'"))
        };
        let health = manifest.flag("--healthz-port").unwrap();
        assert_eq!(port("health")["containerPort"].to_string(), health);
        // Kubelets come from outside.
        assert_eq!(manifest.flag("--healthz-ip").as_deref(), Some("0.0.0.0"));
        for (probe, path) in [
            ("startupProbe", "/readyz"),
            ("readinessProbe", "/readyz"),
            ("livenessProbe", "/healthz"),
        ] {
            let get = &sidecar[probe]["httpGet"];
            assert_eq!(get["path"], path, "{}: {probe}", manifest.name);
            assert_eq!(get["port"], "health", "{}: {probe}", manifest.name);
        }
        assert_eq!(manifest.flag("--port"), None);
        let vxlan = port("vxlan");
        assert_eq!(
            (&vxlan["containerPort"], &vxlan["protocol"]),
            (&8472.into(), &"UDP".into())
        );
    }
}

#[test]
fn what_is_mounted_is_there_and_the_state_is_kept_in_it() {
    for manifest in Manifest::all() {
        let volumes: Vec<_> = list(&manifest.spec()["volumes"])
            .iter()
            .map(|volume| &volume["name"])
            .collect();
        for container in manifest.containers() {
            for mount in list(&container["volumeMounts"]) {
                assert!(volumes.contains(&&mount["name"]), "{mount}");
            }
        }
        let state = manifest.flag("--state-dir").unwrap();
        let mounts = list(&manifest.sidecar()["volumeMounts"]);
        let mut paths = mounts.iter().map(|mount| text(&mount["mountPath"]));
        assert!(paths.any(|path| path == state), "{state}: {mounts:?}");
    }
}

#[test]
fn the_container_beside_the_sidecar_uses_what_it_opens() {
    let manifest = Manifest::named("sidecar-restricted.yaml");
    let web = &manifest.spec()["containers"][0];
    let exposed = manifest.flag("--expose").unwrap();
    let (_, local) = exposed.split_once('=').unwrap();
    assert!(list(&web["command"]).contains(&local.into()), "{local}");
    for (variable, scheme, flag) in [
        ("ALL_PROXY", "socks5h", "--socks5"),
        ("http_proxy", "http", "--http-proxy"),
    ] {
        let mut all = list(&web["env"]).iter();
        let url = all.find(|it| it["name"] == variable).unwrap();
        let port = manifest.flag(flag).unwrap();
        assert_eq!(url["value"], format!("{scheme}://127.0.0.1:{port}"));
    }
}

/// What every unit takes from the node before it starts.
const TAKEN: [&str; 12] = [
    "LimitCORE=0",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "NoNewPrivileges=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    "SystemCallErrorNumber=EPERM",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@keyring @privileged @resources",
    "UMask=0077",
];
/// What the service manager of the system can take besides.
const TAKEN_BY_ROOT: [&str; 15] = [
    "CapabilityBoundingSet=CAP_NET_RAW",
    "DevicePolicy=closed",
    "KeyringMode=private",
    "PrivateTmp=yes",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHome=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "ProtectSystem=strict",
    "RemoveIPC=yes",
    "StateDirectoryMode=0700",
];
/// Without these it waits too long, or is started again where that helps nobody.
const USUAL: [&str; 4] = [
    "Type=notify",
    "RestartPreventExitStatus=2 3",
    // It may wait for long, and fail often, before it can run.
    "TimeoutStartSec=infinity",
    "StartLimitIntervalSec=0",
];

/// All of them that a unit needs; only the system's manager has a capability to give.
fn rules(unit: &str) -> Vec<&'static str> {
    let of_system = ["AmbientCapabilities=CAP_NET_RAW", "User=muslin"];
    let of_system = TAKEN_BY_ROOT.into_iter().chain(of_system);
    let is_systems = unit == "muslin-system";
    let more = of_system.filter(|_| is_systems);
    TAKEN.into_iter().chain(USUAL).chain(more).collect()
}

/// What a unit does not say.
fn missing(unit: &str, text: &str) -> Vec<&'static str> {
    let mut rules = rules(unit);
    rules.retain(|rule| !text.lines().any(|line| line == *rule));
    rules
}

#[test]
fn a_unit_starts_the_program_with_as_little_as_it_needs() {
    for unit in ["muslin", "muslin-system"] {
        let text = read(&format!("systemd/{unit}.service"));
        assert_eq!(missing(unit, &text), [""; 0], "{unit}");
        for rule in rules(unit) {
            let without = text.replace(rule, "");
            assert_eq!(missing(unit, &without), [rule], "{unit}");
        }
        let mut lines = text.lines();
        let start = lines
            .find_map(|line| line.strip_prefix("ExecStart="))
            .unwrap();
        let (program, words) = start.split_once(' ').unwrap();
        assert!(program.ends_with("/muslin"), "{program}");
        let words: Vec<_> = words.split_whitespace().map(str::to_owned).collect();
        assert_eq!(words[0], "node");
        assert_eq!(is_known(&words), Ok(()));
        // What it needs after all.
        for needed in [
            "AF_UNIX",
            "AF_INET",
            "AF_INET6",
            "AF_NETLINK",
            "capset",
            "seccomp",
        ] {
            let mut words = text.split([' ', '=', '\n']);
            assert!(words.any(|word| word == needed), "{unit}: {needed}");
        }
    }
    let of_user = read("systemd/muslin.service");
    assert!(!of_user.contains("AmbientCapabilities"), "{of_user}");
}

#[test]
fn units_make_the_host_interface_with_what_that_takes() {
    let of_system = read("systemd/muslin-system.service");
    let of_user = read("systemd/muslin-host-interface@.service");
    for (text, key, words) in [
        (
            of_system,
            "ExecStartPost=-+",
            ["--state-dir", "/var/lib/muslin"],
        ),
        (of_user.clone(), "ExecStart=", ["--wait", "--watch"]),
    ] {
        let start = text.lines().find_map(|line| line.strip_prefix(key));
        let start = start.unwrap_or_else(|| panic!("no {key}"));
        let (program, arguments) = start.split_once(' ').unwrap();
        assert!(program.ends_with("/muslin"), "{program}");
        let arguments: Vec<_> = arguments.split_whitespace().map(str::to_owned).collect();
        assert_eq!(arguments[0], "host-interface");
        assert!(
            words
                .iter()
                .all(|word| arguments.iter().any(|it| it == word))
        );
        assert_eq!(is_known(&arguments), Ok(()));
    }
    let capabilities = "CapabilityBoundingSet=CAP_NET_ADMIN CAP_DAC_OVERRIDE";
    assert!(
        of_user.lines().any(|line| line == capabilities),
        "{of_user}"
    );
}

#[test]
fn the_network_is_as_large_as_the_table_says() {
    use muslin_stack::control::ipam::AddressPool;
    use muslin_stack::control::lease::{Backend, NetworkConfig};

    let text = read("README.md");
    let rows = text
        .lines()
        .filter(|line| line.starts_with("| 10.") && line.matches('|').count() == 5);
    let rows: Vec<Vec<_>> = rows
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert!(rows.len() > 4, "{rows:?}");
    for row in rows {
        let number = |text: &str| text.replace(',', "").parse::<usize>().unwrap();
        let len = row[1].split(' ').next().unwrap();
        let network = row[0].parse().unwrap();
        let config = NetworkConfig::new(network, len.parse().ok(), Backend::HostGw).unwrap();
        let is_default = row[1].contains("default");
        let default = NetworkConfig::new(network, None, Backend::HostGw).unwrap();
        assert!(!is_default || config == default, "{row:?}");
        assert_eq!(config.subnets().count(), number(row[2]), "{row:?}");
        let mut pool = AddressPool::new(config.subnets().next().unwrap().into());
        let pods = (0..).map_while(|i| {
            let name = format!("pod-{i}").parse().unwrap();
            pool.allocate(&name, None).ok()
        });
        assert_eq!(pods.count(), number(row[3]), "{row:?}");
    }
}

/// What a DaemonSet's pods are, as a manifest of one.
fn node_manifest() -> Manifest {
    let set: Value = serde_saphyr::from_str(&read("kubernetes/node.yaml")).unwrap();
    assert_eq!(
        (&set["apiVersion"], &set["kind"]),
        (&"apps/v1".into(), &"DaemonSet".into())
    );
    let template = &set["spec"]["template"];
    assert_eq!(
        set["spec"]["selector"]["matchLabels"],
        template["metadata"]["labels"]
    );
    Manifest {
        name: "node.yaml".to_owned(),
        pod: template.clone(),
    }
}

#[test]
fn the_program_has_the_flags_of_the_node_and_its_installer() {
    let manifest = node_manifest();
    let (mut sockets, mut keepers) = (Vec::new(), Vec::new());
    for container in manifest.containers() {
        let arguments = list(&container["args"]).iter().map(text);
        let arguments = arguments.map(|it| {
            let it = it.replace("$(NODE_NAME)", "n1");
            it.replace("$(HOST_IP)", "10.0.0.7")
        });
        let arguments: Vec<_> = arguments.collect();
        assert_eq!(is_known(&arguments), Ok(()), "{}", container["name"]);
        let socket = |flag: &str| {
            let value = arguments.iter().find_map(|it| it.strip_prefix(flag));
            value.map(str::to_owned)
        };
        match text(&container["name"]) {
            "keeper" => keepers.extend(socket("--socket=")),
            _ => sockets.extend(socket("--socket=")),
        }
        keepers.extend(socket("--keeper="));
        for mount in list(&container["volumeMounts"]) {
            let volumes = list(&manifest.spec()["volumes"]);
            let is_there = volumes.iter().any(|it| it["name"] == mount["name"]);
            assert!(is_there, "{mount}");
        }
    }
    assert_eq!((sockets.len(), keepers.len()), (4, 2));
    for mut sockets in [sockets, keepers] {
        sockets.dedup();
        assert_eq!(sockets.len(), 1, "all mean one socket: {sockets:?}");
    }
}

#[test]
fn the_node_has_no_privileges_and_its_installer_few() {
    let manifest = node_manifest();
    let faults: BTreeMap<_, _> = manifest
        .containers()
        .map(|container| {
            let faults = faults(&manifest.spec()["securityContext"], container);
            assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
            (text(&container["name"]), faults)
        })
        .collect();
    assert_eq!(faults["muslin"], [""; 0]);
    assert_eq!(faults["keeper"], [""; 0]);
    assert_eq!(faults["directories"], ["may be root", "adds CHOWN"]);
    assert_eq!(
        faults["host-interface"],
        ["may be root", "adds DAC_OVERRIDE", "adds NET_ADMIN"]
    );
    assert_eq!(
        faults["configuration"],
        ["may be root", "adds DAC_OVERRIDE"]
    );
}
