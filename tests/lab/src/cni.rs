//! Networks of CNI plugins, and a runtime's side of the protocol: plugins are called as libcni does
//! it, in the orders that are runtimes' habits.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::skip::skip;
use super::watch::{stretched, waits_for};
use super::{Host, Node, cni_bin};

/// Where plugins are on a machine.
pub const BIN_DIR: &str = "/opt/cni/bin";
/// Where the networks' configurations are.
pub const CONF_DIR: &str = "/etc/cni/net.d";
/// Where distributions put the plugins of containernetworking.
const REFERENCE: [&str; 2] = ["/usr/lib/cni", "/usr/libexec/cni"];
/// Plugins that have not ended then are killed.
const PATIENCE: Duration = Duration::from_secs(20);

/// A network for containers: plugins, and a configuration that names them.
#[derive(Clone)]
pub struct Network {
    /// Programs to be found by their names, besides the reference plugins.
    pub plugins: Vec<PathBuf>,
    /// A list as libcni reads it, with at least `cniVersion`, `name` and `plugins`.
    pub conflist: Value,
}

impl Network {
    /// The reference: a bridge, with addresses of this subnet by host-local. `None`, and a line that
    /// says so, where the plugins are not installed.
    ///
    /// # Panics
    /// In CI where they are not installed.
    pub fn bridge(subnet: &str) -> Option<Self> {
        if !has_reference() {
            return None;
        }
        let conflist = json!({
            "cniVersion": "0.4.0",
            "name": "reference",
            "plugins": [{
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": subnet}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }],
        });
        Some(Self {
            plugins: Vec::new(),
            conflist,
        })
    }

    /// A node's, by the plugin of this project.
    pub fn muslin(node: &Node) -> Self {
        let conflist = json!({
            "cniVersion": "0.4.0",
            "name": "muslin",
            "plugins": [{
                "type": "muslin-cni",
                "socket": node.socket(),
                "capabilities": {
                    "portMappings": true,
                    "bandwidth": true,
                    "ips": true,
                    "mac": true,
                    "aliases": true,
                },
            }],
        });
        Self {
            plugins: vec![cni_bin().into()],
            conflist,
        }
    }

    /// Puts the plugins where runtimes on the host find them; it gets directories of its own.
    pub fn install(&self, host: &Host) {
        host.furnish();
        let references = reference().into_iter().flat_map(|directory| {
            let entries = fs::read_dir(directory).unwrap();
            entries.map(|entry| entry.unwrap().path())
        });
        let mut script = format!("mkdir -p {BIN_DIR}\n");
        for plugin in references.chain(self.plugins.iter().cloned()) {
            script += &format!("ln -sf '{}' {BIN_DIR}\n", plugin.display());
        }
        host.sh(&script);
    }

    /// Writes the configuration to a directory of the host, as an installer has to do it for
    /// containerd, which looks at what is written and what is renamed, and not at what is created.
    pub fn configure(&self, host: &Host) {
        let script = format!(
            r#"mkdir -p {CONF_DIR}
            printf %s "$0" >{CONF_DIR}/new
            mv {CONF_DIR}/new {CONF_DIR}/10-muslin.conflist
            printf %s "$0" | dd of={CONF_DIR}/10-muslin.conflist conv=notrunc status=none"#
        );
        host.run(&["sh", "-e", "-c", &script, &self.conflist.to_string()]);
    }

    /// Removes it.
    pub fn unconfigure(host: &Host) {
        host.sh(&format!("rm -f {CONF_DIR}/10-muslin.conflist"));
    }

    fn name(&self) -> &str {
        self.conflist["name"].as_str().unwrap()
    }
}

/// Whether the reference plugins are there; if not, a line says so.
pub(crate) fn has_reference() -> bool {
    let has = reference().is_some();
    if !has {
        skip("CNI plugins are missing (Debian has them in containernetworking-plugins)");
    }
    has
}

fn reference() -> Option<&'static Path> {
    let mut paths = REFERENCE.iter().map(Path::new);
    paths.find(|path| path.join("bridge").is_file() && path.join("host-local").is_file())
}

/// A network namespace that outlives its processes, where runtimes have theirs.
#[derive(Clone)]
pub struct Netns {
    host: Host,
    path: String,
}

impl Netns {
    /// Its path on the host, for `CNI_NETNS`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A command in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.host.command("nsenter");
        command.arg(format!("--net={}", self.path)).arg("--");
        command.arg(program);
        command
    }

    /// Runs a shell script in it of which every command must succeed.
    pub fn sh(&self, script: &str) -> String {
        let net = format!("--net={}", self.path);
        self.host
            .run(&["nsenter", &net, "--", "sh", "-e", "-c", script])
    }

    /// Removes it, with all of its interfaces.
    pub fn remove(&self) {
        Self::remove_all(std::slice::from_ref(self));
    }

    /// Removes all of these, which are of one host.
    pub fn remove_all(all: &[Self]) {
        let Some(first) = all.first() else { return };
        let paths: Vec<_> = all.iter().map(|it| it.path.as_str()).collect();
        let paths = paths.join(" ");
        first.host.sh(&format!("umount {paths}; rm {paths}"));
    }
}

/// An interface of a container, as runtimes describe it to plugins.
#[derive(Clone)]
pub struct Key {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_NETNS`, or nothing.
    pub netns: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// What the runtime knows for plugins' capabilities; a plugin gets in `runtimeConfig` what its
    /// configuration asks for.
    pub capabilities: Map<String, Value>,
}

impl Key {
    /// `eth0` of a container of this name in a namespace.
    pub fn new(container: &str, netns: &str) -> Self {
        Self {
            container: container.to_owned(),
            interface: "eth0".to_owned(),
            netns: netns.to_owned(),
            args: "IgnoreUnknown=1".to_owned(),
            capabilities: Map::new(),
        }
    }

    /// Another interface of the same container.
    pub fn interface(&self, name: &str) -> Self {
        Self {
            interface: name.to_owned(),
            ..self.clone()
        }
    }

    /// The same without a network namespace.
    pub fn without_netns(&self) -> Self {
        Self {
            netns: String::new(),
            ..self.clone()
        }
    }

    /// With `CNI_ARGS` as containerd and CRI-O write them for a pod.
    pub fn pod(mut self, namespace: &str, name: &str) -> Self {
        self.args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
             K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID=uid-of-{name}",
            self.container
        );
        self
    }

    /// With a value of a capability.
    pub fn with(mut self, capability: &str, value: Value) -> Self {
        self.capabilities.insert(capability.to_owned(), value);
        self
    }
}

/// What a plugin is asked for: `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are the specification's")]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// What a plugin has answered.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code; `None` if it was killed.
    pub code: Option<i32>,
    /// Its answer.
    pub stdout: String,
    /// What it tells an operator.
    pub stderr: String,
    /// From before it was started until it had ended and nobody had its output open.
    pub time: Duration,
}

impl Output {
    /// Whether it has done what it was asked for.
    pub fn is_success(&self) -> bool {
        self.code == Some(0)
    }

    /// The result of what must have succeeded; null if it is empty.
    ///
    /// # Panics
    /// If it has failed, or has said something else than JSON.
    pub fn result(&self) -> Value {
        assert!(self.is_success(), "{self:?}");
        if self.stdout.is_empty() {
            return Value::Null;
        }
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The code and the message of what must have failed.
    ///
    /// # Panics
    /// If it has succeeded, or does not say why it failed.
    pub fn error(&self) -> (u64, String) {
        assert!(!self.is_success(), "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).unwrap_or_default();
        let parts = (error["code"].as_u64(), error["msg"].as_str());
        match parts {
            (Some(code), Some(message)) => (code, message.to_owned()),
            _ => panic!("no error by the specification: {self:?}"),
        }
    }
}

/// The address of an interface by a result, without its prefix's length.
///
/// # Panics
/// If there is none.
pub fn address(result: &Value) -> std::net::IpAddr {
    let address = result["ips"][0]["address"].as_str();
    let address = address.unwrap_or_else(|| panic!("no address: {result}"));
    address.split('/').next().unwrap().parse().unwrap()
}

/// A runtime that calls a network's plugins on a host.
pub struct Runtime {
    host: Host,
    network: Network,
    version: String,
    /// The results of what was added: `/var/lib/cni/results`.
    results: RefCell<BTreeMap<(String, String), Value>>,
    caller: RefCell<Caller>,
    namespaces: Cell<usize>,
}

impl Runtime {
    /// A runtime on a host, on which the plugins are installed by that. It speaks the version that
    /// the network has in `cniVersion`, as libcni before 1.2 does.
    pub fn new(host: &Host, network: &Network) -> Self {
        network.install(host);
        let version = network.conflist["cniVersion"].as_str().unwrap();
        Self {
            host: host.clone(),
            network: network.clone(),
            version: version.to_owned(),
            results: RefCell::default(),
            caller: RefCell::new(Caller::start(host)),
            namespaces: Cell::new(0),
        }
    }

    /// The same with another version of the specification, such as the highest that is in
    /// `cniVersions`, as libcni does since 1.2.
    pub fn speaks(mut self, version: &str) -> Self {
        version.clone_into(&mut self.version);
        self
    }

    /// A new network namespace where containerd makes them.
    pub fn netns(&self) -> Netns {
        self.all_netns(1).remove(0)
    }

    /// So many network namespaces.
    pub fn all_netns(&self, count: usize) -> Vec<Netns> {
        let first = self.namespaces.replace(self.namespaces.get() + count);
        let mut script = String::new();
        let namespaces = (first..first + count).map(|index| {
            let mut random = [0; 16];
            getrandom::fill(&mut random).unwrap();
            let path = format!(
                "/run/netns/cni-{:032x}-{index}",
                u128::from_ne_bytes(random)
            );
            script += &format!("touch {path}; unshare --net={path} true\n");
            Netns {
                host: self.host.clone(),
                path,
            }
        });
        let namespaces = namespaces.collect();
        self.host.sh(&script);
        namespaces
    }

    /// Adds an interface, by all plugins of the list in order. The answer is the last one's, or of
    /// the first that fails; the time is of all together.
    pub fn add(&self, key: &Key) -> Output {
        let mut all: Option<Output> = None;
        for plugin in self.plugins() {
            let previous = all.as_ref().map(Output::result);
            let output = self.call(Verb::Add, key, &self.config(plugin, key, previous));
            let time = all.map_or(Duration::ZERO, |all| all.time) + output.time;
            let is_success = output.is_success();
            all = Some(Output { time, ..output });
            if !is_success {
                break;
            }
        }
        let output = all.expect("a network has plugins");
        self.remember(key, &output);
        output
    }

    /// Adds many interfaces at once, for which the list must have one plugin.
    pub fn add_at_once(&self, keys: &[Key]) -> Vec<Output> {
        let calls: Vec<_> = keys.iter().map(|key| (Verb::Add, key.clone())).collect();
        self.at_once(&calls)
    }

    /// Deletes an interface, by all plugins in reverse order until one fails.
    pub fn del(&self, key: &Key) -> Output {
        let plugins: Vec<_> = self.plugins().iter().rev().collect();
        let output = self.in_turn(Verb::Del, key, &plugins);
        if output.is_success() {
            self.results.borrow_mut().remove(&names(key));
        }
        output
    }

    /// Deletes many interfaces at once, for which the list must have one plugin.
    pub fn del_at_once(&self, keys: &[Key]) -> Vec<Output> {
        let calls: Vec<_> = keys.iter().map(|key| (Verb::Del, key.clone())).collect();
        self.at_once(&calls)
    }

    /// Adds and deletes interfaces, all at once, for which the list must have one plugin.
    pub fn at_once(&self, calls: &[(Verb, Key)]) -> Vec<Output> {
        let [_] = self.plugins() else {
            panic!("a list of one plugin is needed")
        };
        let prepared = calls
            .iter()
            .map(|(verb, key)| self.prepare(*verb, Some(key), &self.first_config(*verb, key)));
        let prepared: Vec<_> = prepared.collect();
        let outputs = self.caller.borrow_mut().run(&prepared);
        for ((verb, key), output) in calls.iter().zip(&outputs) {
            match verb {
                Verb::Add => self.remember(key, output),
                Verb::Del if output.is_success() => {
                    self.results.borrow_mut().remove(&names(key));
                }
                _ => {}
            }
        }
        outputs
    }

    /// Checks an interface, by all plugins in order until one fails.
    pub fn check(&self, key: &Key) -> Output {
        let plugins: Vec<_> = self.plugins().iter().collect();
        self.in_turn(Verb::Check, key, &plugins)
    }

    /// Lets the plugins collect all but these interfaces, in order until one fails.
    pub fn gc(&self, valid: &[Key]) -> Output {
        let valid = valid
            .iter()
            .map(|key| json!({"containerID": key.container, "ifname": key.interface}));
        let valid = Value::Array(valid.collect());
        self.without_key(Verb::Gc, |config| {
            // Some versions of libcni give both.
            config.insert("cni.dev/attachments".to_owned(), valid.clone());
            config.insert("cni.dev/valid-attachments".to_owned(), valid.clone());
        })
    }

    /// Asks the plugins whether they can add interfaces, in order until one says no.
    pub fn status(&self) -> Output {
        self.without_key(Verb::Status, |_| ())
    }

    /// Asks the first plugin for the versions that it supports.
    pub fn version(&self) -> Output {
        let config = json!({"cniVersion": self.version});
        let plugin = &self.plugins()[0];
        let call = self.prepare(Verb::Version, None, &with_type(&config, plugin));
        self.caller.borrow_mut().run(&[call]).remove(0)
    }

    /// Calls one plugin with a configuration of the test's, which has its name in `type`.
    pub fn call(&self, verb: Verb, key: &Key, config: &Value) -> Output {
        let call = self.prepare(verb, Some(key), config);
        self.caller.borrow_mut().run(&[call]).remove(0)
    }

    /// What the first plugin gets for an interface, with what is cached of it.
    pub fn first_config(&self, verb: Verb, key: &Key) -> Value {
        let previous = (verb != Verb::Add).then(|| self.result(key)).flatten();
        self.config(&self.plugins()[0], key, previous)
    }

    /// The result of an interface that has been added.
    pub fn result(&self, key: &Key) -> Option<Value> {
        self.results.borrow().get(&names(key)).cloned()
    }

    /// CRI-O: checks the version when it loads the network, and each interface as soon as it is
    /// added.
    pub fn add_as_crio(&self, key: &Key) -> [Output; 3] {
        let version = self.version();
        let versions = version.result()["supportedVersions"].clone();
        let has = |versions: &Vec<Value>| versions.iter().any(|known| *known == self.version);
        assert!(
            versions.as_array().is_some_and(has),
            "the network is ignored: {versions}"
        );
        [version, self.add(key), self.check(key)]
    }

    /// nerdctl: deletes what a lost container of the same name may have left, without a namespace,
    /// and adds then.
    pub fn add_as_nerdctl(&self, key: &Key) -> [Output; 2] {
        [self.del(&key.without_netns()), self.add(key)]
    }

    /// containerd: adds loopback by the reference plugin and the interface at the same time, and
    /// nothing more.
    pub fn add_as_containerd(&self, key: &Key) -> [Output; 2] {
        let [plugin] = self.plugins() else {
            panic!("a list of one plugin is needed")
        };
        let loopback = self.loopback(Verb::Add, key);
        let interface = self.prepare(Verb::Add, Some(key), &self.config(plugin, key, None));
        let mut outputs = self.caller.borrow_mut().run(&[loopback, interface]);
        let interface = outputs.remove(1);
        self.remember(key, &interface);
        [outputs.remove(0), interface]
    }

    /// containerd: deletes loopback and then the interface, in a namespace that may be closed.
    pub fn del_as_containerd(&self, key: &Key) -> [Output; 2] {
        let loopback = self.loopback(Verb::Del, key);
        let loopback = self.caller.borrow_mut().run(&[loopback]).remove(0);
        [loopback, self.del(key)]
    }

    fn loopback(&self, verb: Verb, key: &Key) -> Call {
        let config = json!({"cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback"});
        self.prepare(verb, Some(&key.interface("lo")), &config)
    }

    fn plugins(&self) -> &[Value] {
        let plugins = self.network.conflist["plugins"].as_array();
        plugins.expect("a network has plugins")
    }

    fn in_turn(&self, verb: Verb, key: &Key, plugins: &[&Value]) -> Output {
        let mut time = Duration::ZERO;
        let mut last = None;
        for plugin in plugins {
            let config = self.config(plugin, key, self.result(key));
            let output = self.call(verb, key, &config);
            time += output.time;
            let is_success = output.is_success();
            last = Some(Output { time, ..output });
            if !is_success {
                break;
            }
        }
        last.expect("a network has plugins")
    }

    fn without_key(&self, verb: Verb, change: impl Fn(&mut Map<String, Value>)) -> Output {
        let mut last = None;
        for plugin in self.plugins() {
            let mut config = self.bare_config(plugin);
            change(&mut config);
            let call = self.prepare(verb, None, &Value::Object(config));
            let output = self.caller.borrow_mut().run(&[call]).remove(0);
            let is_success = output.is_success();
            last = Some(output);
            if !is_success {
                break;
            }
        }
        last.expect("a network has plugins")
    }

    /// libcni's `buildOneConfig`.
    fn config(&self, plugin: &Value, key: &Key, previous: Option<Value>) -> Value {
        let mut config = self.bare_config(plugin);
        let asked = plugin["capabilities"].as_object();
        let is_asked = |name: &str| asked.is_some_and(|all| all.get(name) == Some(&json!(true)));
        let known = key.capabilities.iter();
        let given: Map<_, _> = known
            .filter(|(name, _)| is_asked(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !given.is_empty() {
            config.insert("runtimeConfig".to_owned(), Value::Object(given));
        }
        if let Some(previous) = previous {
            config.insert("prevResult".to_owned(), previous);
        }
        Value::Object(config)
    }

    fn bare_config(&self, plugin: &Value) -> Map<String, Value> {
        let mut config = plugin.as_object().expect("a plugin is an object").clone();
        config.insert("name".to_owned(), self.network.name().into());
        config.insert("cniVersion".to_owned(), self.version.clone().into());
        config
    }

    fn remember(&self, key: &Key, output: &Output) {
        if output.is_success() {
            let mut results = self.results.borrow_mut();
            results.insert(names(key), output.result());
        }
    }

    fn prepare(&self, verb: Verb, key: Option<&Key>, config: &Value) -> Call {
        let plugin = config["type"].as_str().expect("a plugin has a type");
        let mut environment = vec![
            format!("CNI_COMMAND={}", verb.name()),
            format!("CNI_PATH={BIN_DIR}"),
        ];
        if let Some(key) = key {
            environment.extend([
                format!("CNI_CONTAINERID={}", key.container),
                format!("CNI_NETNS={}", key.netns),
                format!("CNI_IFNAME={}", key.interface),
                format!("CNI_ARGS={}", key.args),
            ]);
        }
        Call {
            program: format!("{BIN_DIR}/{plugin}"),
            environment,
            input: config.to_string(),
        }
    }
}

fn with_type(config: &Value, plugin: &Value) -> Value {
    let mut config = config.clone();
    config["type"] = plugin["type"].clone();
    config
}

fn names(key: &Key) -> (String, String) {
    (key.container.clone(), key.interface.clone())
}

/// A plugin that is to be run.
struct Call {
    program: String,
    environment: Vec<String>,
    input: String,
}

/// Runs calls at once and tells how they end: a line of how many, and for each its program, a line
/// of its environment's length and that, and a line of its input's length and that. The answers are
/// lines of exit code or -1, microseconds and both outputs' lengths, each with the outputs behind.
/// Like libcni it waits until nobody has a plugin's output open.
const CALLER: &str = r#"
    use strict; $| = 1; $SIG{PIPE} = "IGNORE";
    my ($patience) = @ARGV;
    my $clock = (`uname -m` =~ /x86_64/) ? 228 : 113;
    sub now {
        my $time = "\0" x 16; syscall($clock, 1, $time);
        my ($seconds, $nanoseconds) = unpack("qq", $time);
        return $seconds * 1e6 + $nanoseconds / 1e3;
    }
    sub line { my $line = <STDIN> // exit; chomp $line; return $line; }
    sub block { read(STDIN, my $block, line()); return $block; }
    while (1) {
        my @calls = map { +{ program => line(), environment => block(), input => block() } }
            1 .. line();
        my %readers;
        for my $call (@calls) {
            # Small enough for a pipe.
            pipe(my $in, my $to) or die; pipe(my $from, my $out) or die; pipe(my $told, my $err) or die;
            $call->{began} = now();
            my $pid = fork() // die "fork: $!";
            if ($pid == 0) {
                for (split /\n/, $call->{environment}) { my ($k, $v) = split /=/, $_, 2; $ENV{$k} = $v; }
                open(STDIN, "<&", $in); open(STDOUT, ">&", $out); open(STDERR, ">&", $err);
                exec { $call->{program} } $call->{program};
                print STDERR "$call->{program}: $!"; exit 127;
            }
            $call->{pid} = $pid; $call->{texts} = ["", ""];
            syswrite($to, $call->{input});
            close($in); close($to); close($out); close($err);
            $readers{fileno $from} = [$from, $call, 0]; $readers{fileno $told} = [$told, $call, 1];
            $call->{open} = 2;
        }
        my $end = now() + $patience * 1e6;
        while (%readers) {
            my $ready = ""; vec($ready, $_, 1) = 1 for keys %readers;
            my $left = ($end - now()) / 1e6;
            my $count = $left > 0 ? select($ready, undef, undef, $left) : 0;
            if ($count <= 0) { kill "KILL", $_->[1]{pid} for values %readers; last; }
            for my $number (keys %readers) {
                next unless vec($ready, $number, 1);
                my ($file, $call, $which) = @{$readers{$number}};
                next if sysread($file, $call->{texts}[$which], 65536, length $call->{texts}[$which]);
                delete $readers{$number};
                next if --$call->{open};
                waitpid($call->{pid}, 0);
                $call->{code} = $? & 127 ? -1 : $? >> 8;
                $call->{time} = now() - $call->{began};
            }
        }
        for my $call (@calls) {
            unless (exists $call->{time}) {
                waitpid($call->{pid}, 0); $call->{code} = -1; $call->{time} = now() - $call->{began};
            }
            my ($output, $errors) = @{$call->{texts}};
            printf "%d %d %d %d\n%s%s", $call->{code}, $call->{time}, length $output, length $errors,
                $output, $errors;
        }
    }
"#;

/// A process on the host that starts plugins, since whatever enters a namespace takes longer for that
/// than a plugin for its work.
struct Caller {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Caller {
    fn start(host: &Host) -> Self {
        let patience = stretched(PATIENCE).as_secs().to_string();
        let mut child = host
            .command("perl")
            .args(["-e", CALLER, &patience])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn run(&mut self, calls: &[Call]) -> Vec<Output> {
        waits_for("the end of plugins");
        let mut request = format!("{}\n", calls.len());
        for call in calls {
            let environment = call.environment.join("\n");
            request += &format!(
                "{}\n{}\n{environment}{}\n{}",
                call.program,
                environment.len(),
                call.input.len(),
                call.input
            );
        }
        self.input.write_all(request.as_bytes()).unwrap();
        calls.iter().map(|_| self.answer()).collect()
    }

    fn answer(&mut self) -> Output {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        let numbers = line.split_whitespace().map(|word| word.parse::<i64>());
        let numbers: Vec<_> = numbers.map(Result::unwrap).collect();
        let [code, time, output, errors] = numbers[..] else {
            panic!("the caller has ended: {:?}", self.child.try_wait())
        };
        let mut text = |len: i64| {
            let mut bytes = vec![0; len.try_into().unwrap()];
            self.output.read_exact(&mut bytes).unwrap();
            String::from_utf8(bytes).unwrap()
        };
        Output {
            code: i32::try_from(code).ok().filter(|code| *code >= 0),
            stdout: text(output),
            stderr: text(errors),
            time: Duration::from_micros(time.try_into().unwrap()),
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
