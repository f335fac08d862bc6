//! A real containerd on a host of a lab, with runc, that starts containers in the lab's user
//! namespace.
//!
//! It has a PID namespace of its own, the end of which is that of all it has started, and of all
//! mounts; what it writes is in the host's own directories (`Host::furnish`), in memory. It uses no
//! cgroups, which belong to the machine. The test speaks to it by sockets, which have names in the
//! file system that both see.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use super::cni::{BIN_DIR, CONF_DIR, Network, has_reference};
use super::cri::{self, Cri};
use super::skip::skip;
use super::watch::waits_for;
use super::{Host, LAB, SOON, image, poll_for, poll_until};

/// The only image there is: busybox. It is that of sandboxes, too.
pub const IMAGE: &str = "muslin.test/busybox:1";
/// What has to be installed, and Debian's packages.
const TOOLS: [(&str, &str); 3] = [
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
];
/// The namespaces of `ctr`, and of the container runtime interface.
const NAMESPACES: [&str; 2] = ["default", "k8s.io"];

/// runc, where the user namespace has but one id and cgroups cannot be written: a bundle's
/// specification names another group for terminals, and limits.
const RUNC: &str = r#"#!/usr/bin/perl
use strict; use warnings;
for my $at (0 .. $#ARGV - 1) {
    next unless $ARGV[$at] eq "--bundle";
    my $path = "$ARGV[$at + 1]/config.json";
    open(my $file, "<", $path) or next;
    my $text = do { local $/; <$file> };
    $text =~ s/,"gid=5"//;
    $text =~ s/"resources":(\{(?:[^{}"]|"(?:\\.|[^"\\])*"|(?1))*\})/"resources":{}/;
    open($file, ">", $path) or die "$path: $!"; print $file $text; close($file) or die "$path: $!";
}
exec "runc", @ARGV;
"#;

/// The first process of the PID namespace: tells its number outside, and takes all that lose their
/// parents.
const INIT: &str = r#"
    read -r pid rest </proc/self/stat
    mount --make-private /proc && mount -t proc proc /proc || exit
    trap "" CHLD
    echo "$pid"
    exec cat
"#;

/// A containerd; it ends with the test, and all that it has started.
pub struct Containerd {
    host: Host,
    directory: TempDir,
    /// `unshare`, the parent of the first process of the PID namespace.
    holder: Child,
    /// That process.
    init: u32,
    process: Option<Child>,
    cri: Cri,
}

impl Containerd {
    /// A containerd on a host, which gets directories of its own by that, with a network's plugins
    /// and its configuration; without one, it has no network until one is configured. `None`, and a
    /// line that says so, where a program is not installed.
    ///
    /// # Panics
    /// If it does not come up, and in CI where a program is not installed.
    pub fn start(host: &Host, network: Option<&Network>) -> Option<Self> {
        let mut missing = TOOLS.iter().filter(|(tool, _)| {
            let output = host.output(&["sh", "-c", &format!("command -v {tool}")]);
            !output.status.success()
        });
        if let Some((tool, package)) = missing.next() {
            skip(format_args!(
                "'{tool}' is missing (Debian has it in {package})"
            ));
            return None;
        }
        let busybox = match image::busybox() {
            Ok(busybox) => busybox,
            Err(why) => {
                skip(why);
                return None;
            }
        };
        // It runs `loopback` itself.
        if !has_reference() {
            return None;
        }
        host.furnish();
        host.sh(&format!("mkdir -p {CONF_DIR}"));
        if let Some(network) = network {
            network.install(host);
            network.configure(host);
        }
        let directory = tempfile::tempdir().unwrap();
        let (holder, init) = hold(host);
        let mut containerd = Self {
            cri: Cri::new(&directory.path().join("socket")),
            host: host.clone(),
            directory,
            holder,
            init,
            process: None,
        };
        containerd.write_configuration();
        containerd.start_again();
        containerd.import(&busybox);
        Some(containerd)
    }

    /// Ends the daemon without a warning; containers go on.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It ends with `nsenter`, whose child it is.
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Starts the daemon, if it does not run, and waits until it serves.
    pub fn start_again(&mut self) {
        self.kill();
        let mut options = fs::File::options();
        let log = options.create(true).append(true).open(self.path("log"));
        let log = log.unwrap();
        let mut command = self.command("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--", "containerd", "--config"])
            .arg(self.path("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.process = Some(command.spawn().unwrap());
        waits_for("containerd");
        let serves = || {
            let process = self.process.as_mut().unwrap();
            let is_over = process.try_wait().unwrap().is_some();
            (is_over || self.cri.status().is_ok()).then_some(!is_over)
        };
        if poll_for(SOON, serves) != Ok(true) {
            panic!("containerd does not serve{}", self.log());
        }
    }

    /// Waits until it knows whether it has a network, that is whether it has read a configuration.
    pub fn wait_network(&self, is_ready: bool) {
        let what = format!(
            "whether the network is ready to be {is_ready}{}",
            self.log()
        );
        poll_until(SOON, &what, || {
            let network = self.cri.network().ok()?;
            (network.is_met == is_ready).then_some(())
        });
    }

    /// What kubelet does.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Its host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// A command where it is itself: with its processes, mounts and network.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.init.to_string()])
            .args(["--user", "--preserve-credentials"])
            .args(["--net", "--mount", "--pid", "--", program])
            .env(LAB, &self.host.holder.lab)
            .env("TMPDIR", self.directory.path());
        command
    }

    /// A command of `ctr`.
    pub fn ctr(&self, words: &[&str]) -> Command {
        let mut command = self.command("ctr");
        command.arg("--address").arg(self.path("socket"));
        command.args(words).stdin(Stdio::null());
        command
    }

    /// A container by `ctr run --cni`, of which plugins know as `default-` and its name, and waits
    /// until its command runs. It is removed with its network once it ends.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn container(&self, name: &str, command: &[&str]) -> Container<'_> {
        let words = ["run", "--rm", "--cni", "--cgroup", ""];
        let mut run = self.ctr(&words);
        run.args(["--snapshotter", "native", "--runc-binary"])
            .arg(self.path("runc"))
            .args([IMAGE, name])
            .args(command)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut container = Container {
            containerd: self,
            name: name.to_owned(),
            run: Some(run.spawn().unwrap()),
        };
        waits_for(format!("the container {name}"));
        let is_up = || {
            let is_over = container
                .run
                .as_mut()
                .unwrap()
                .try_wait()
                .unwrap()
                .is_some();
            (is_over || self.runs(name)).then_some(!is_over)
        };
        if poll_for(SOON, is_up) != Ok(true) {
            let mut run = container.run.take().unwrap();
            let _ = run.kill();
            let output = run.wait_with_output();
            panic!("the container {name}: {output:?}{}", self.log());
        }
        container
    }

    fn runs(&self, name: &str) -> bool {
        let output = self.ctr(&["task", "list"]).output().unwrap();
        let table = String::from_utf8_lossy(&output.stdout);
        let mut rows = table.lines().map(|row| row.split_whitespace());
        rows.any(|mut row| row.next() == Some(name) && row.nth(1) == Some("RUNNING"))
    }

    /// A pod's sandbox by the container runtime interface, and a container in it that does nothing.
    ///
    /// # Panics
    /// If they do not come up.
    pub fn pod(&self, pod: &cri::Pod) -> Pod<'_> {
        let started = self.cri.run(pod).and_then(|sandbox| {
            let command = ["sleep", "1000000"];
            let container = self.cri.start((&sandbox, pod), IMAGE, &command)?;
            Ok((sandbox, container))
        });
        let (sandbox, container) =
            started.unwrap_or_else(|why| panic!("no pod: {why}{}", self.log()));
        Pod {
            containerd: self,
            sandbox,
            container,
        }
    }

    /// What it has logged, for messages.
    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        format!("\n--- log of containerd:\n{log}---")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write_configuration(&self) {
        let (socket, runc) = (self.path("socket"), self.path("runc"));
        fs::write(&runc, RUNC).unwrap();
        fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).unwrap();
        let cri = r#"plugins."io.containerd.grpc.v1.cri""#;
        let text = format!(
            r#"version = 2
            root = "/var/lib/containerd"
            state = "/run/containerd"
            [grpc]
            address = {socket:?}
            [{cri}]
            disable_apparmor = true
            disable_cgroup = true
            disable_hugetlb_controller = true
            restrict_oom_score_adj = true
            sandbox_image = "{IMAGE}"
            [{cri}.cni]
            bin_dir = "{BIN_DIR}"
            conf_dir = "{CONF_DIR}"
            [{cri}.containerd]
            snapshotter = "native"
            [{cri}.containerd.runtimes.runc]
            runtime_type = "io.containerd.runc.v2"
            [{cri}.containerd.runtimes.runc.options]
            BinaryName = {runc:?}
            "#
        );
        fs::write(self.path("config.toml"), text).unwrap();
    }

    fn import(&self, busybox: &Path) {
        let image = image::write(self.directory.path(), IMAGE, busybox);
        for namespace in NAMESPACES {
            let words = ["--namespace", namespace, "images", "import"];
            let mut command = self.ctr(&words);
            command.args(["--snapshotter", "native"]).arg(&image);
            let output = command.output().unwrap();
            assert!(output.status.success(), "{output:?}{}", self.log());
        }
        let what = "the image that containerd has for sandboxes";
        poll_until(SOON, what, || self.cri.has_image(IMAGE).then_some(()));
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        // The kernel ends the namespace's first process with its parent, and all others with it,
        // before it is gone itself.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        if let Some(mut process) = self.process.take() {
            let _ = process.wait();
        }
        // Whoever is its parent now may take its time to look at it.
        let init = format!("/proc/{}/status", self.init);
        let is_gone = || {
            let status = fs::read_to_string(&init).unwrap_or_default();
            (status.is_empty() || status.contains("State:\tZ")).then_some(())
        };
        if poll_for(SOON, is_gone).is_err() && !std::thread::panicking() {
            panic!("containerd's processes do not end");
        }
    }
}

/// Makes the PID namespace, and returns its holder and its first process.
fn hold(host: &Host) -> (Child, u32) {
    let mut command = host.command("unshare");
    command
        .args(["--mount", "--propagation", "unchanged"])
        .args(["--pid", "--fork", "--kill-child", "sh", "-c", INIT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut holder = command.spawn().unwrap();
    let mut line = String::new();
    let output = holder.stdout.as_mut().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    let init = line.trim().parse();
    (holder, init.expect("a PID namespace can be made"))
}

/// A container that `ctr` has started.
pub struct Container<'a> {
    containerd: &'a Containerd,
    name: String,
    run: Option<Child>,
}

impl Container<'_> {
    /// Runs a command in it to its end.
    pub fn exec(&self, command: &[&str]) -> Output {
        waits_for(format!("the end in {} of {command:?}", self.name));
        let words = ["task", "exec", "--exec-id", &unique(), &self.name];
        let mut exec = self.containerd.ctr(&words);
        exec.args(command).output().unwrap()
    }

    /// Ends its command and waits until it is removed, with its network.
    ///
    /// # Panics
    /// If that fails; `ctr` only tells that a network is left, which is a failure, too.
    pub fn stop(mut self) {
        let words = ["task", "kill", "--signal", "KILL", &self.name];
        let output = self.containerd.ctr(&words).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        waits_for(format!("the end of the container {}", self.name));
        let output = self.run.take().unwrap().wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(
            !told.contains("failed to"),
            "{told}{}",
            self.containerd.log()
        );
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if let Some(mut run) = self.run.take() {
            let _ = run.kill();
            let _ = run.wait();
        }
    }
}

/// A pod that was started as kubelet does it.
pub struct Pod<'a> {
    containerd: &'a Containerd,
    sandbox: String,
    container: String,
}

impl Pod<'_> {
    /// The sandbox' name, which plugins get as `CNI_CONTAINERID`.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// How the sandbox is.
    pub fn status(&self) -> cri::Sandbox {
        let status = self.containerd.cri.sandbox(&self.sandbox);
        status.unwrap_or_else(|why| panic!("{why}{}", self.containerd.log()))
    }

    /// Runs a command in its container to its end.
    pub fn exec(&self, command: &[&str]) -> cri::Output {
        let output = self.containerd.cri.exec(&self.container, command);
        output.unwrap_or_else(|why| panic!("{why}{}", self.containerd.log()))
    }

    /// Stops and removes it.
    pub fn stop(self) {
        let cri = &self.containerd.cri;
        let stopped = cri.stop(&self.sandbox);
        let removed = stopped.and_then(|()| cri.remove(&self.sandbox));
        removed.unwrap_or_else(|why| panic!("{why}{}", self.containerd.log()));
    }
}

/// A name that nothing else has.
fn unique() -> String {
    let mut random = [0; 8];
    getrandom::fill(&mut random).unwrap();
    format!("exec-{:016x}", u64::from_ne_bytes(random))
}
