//! Checks of what container runtimes find on this machine: configurations and plugins (docs/cni.md).

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::finding::{Finding, Verdict};
use super::subject::NodeUnderTest;
use crate::cni::install::{CONF_DIR, PLUGIN, configurations};

/// Bytes of the longest configuration, and of what a plugin says of itself.
const MAX_LEN: u64 = 1 << 20;

/// Plugins that cannot do their work behind a TAP device, and why.
const USELESS: [(&str, Verdict, &str); 3] = [
    (
        "bandwidth",
        Verdict::Wrong,
        "it limits a veth of the host, and there is none: muslin-cni does it by the capability \
         'bandwidth'",
    ),
    (
        "portmap",
        Verdict::Wrong,
        "it translates in the host's kernel, which has no way to pods: muslin-cni does it by the \
         capability 'portMappings'",
    ),
    (
        "firewall",
        Verdict::Warning,
        "it has no effect: packets of pods do not pass through the host's kernel",
    ),
];

/// A configuration that starts our plugin.
struct Configuration {
    name: String,
    /// The plugins that it starts, in order.
    plugins: Vec<Value>,
}

impl Configuration {
    fn types(&self) -> impl Iterator<Item = &str> {
        self.plugins.iter().filter_map(|it| it["type"].as_str())
    }

    /// Programs that it needs: those and the ones that choose addresses.
    fn programs(&self) -> Vec<&str> {
        let ipam = self
            .plugins
            .iter()
            .filter_map(|it| it["ipam"]["type"].as_str());
        let all = self.types().chain(ipam.filter(|it| *it != "muslin"));
        all.filter(|it| !it.is_empty() && !it.contains('/'))
            .collect()
    }

    /// The node's socket that our plugin is told.
    fn socket(&self) -> Option<&str> {
        let ours = self.plugins.iter().find(|it| is_ours(it))?;
        let settings = match ours["type"] == PLUGIN {
            true => ours,
            false => &ours["delegate"],
        };
        Some(
            settings["socket"]
                .as_str()
                .unwrap_or(muslin_stack::api::cni::config::SOCKET),
        )
    }
}

/// Looks at the configurations of a directory: of one that is given, or of the usual one where ours is
/// there.
pub(super) fn examine(
    conf_dir: Option<&Path>,
    bin_dir: &Path,
    tested: Option<&NodeUnderTest>,
) -> Vec<Finding> {
    const CHECK: &str = "CNI configuration";
    let directory = conf_dir.unwrap_or(Path::new(CONF_DIR));
    let names = configurations(directory);
    let Some(ours) = names.iter().find_map(|name| read(directory, name)) else {
        return match conf_dir {
            None => Vec::new(),
            Some(_) => {
                let detail = format!("none in {} starts {PLUGIN}", directory.display());
                vec![Finding::wrong(CHECK, detail).advise("install it with 'muslin cni install'")]
            }
        };
    };
    let mut findings = Vec::new();
    let earlier: Vec<_> = names
        .iter()
        .take_while(|name| **name != ours.name)
        .collect();
    let path = directory.join(&ours.name);
    findings.push(match earlier.first() {
        None => Finding::fine(CHECK, path.display()),
        Some(first) => Finding::wrong(
            CHECK,
            format!(
                "container runtimes take {first}, which comes before {}",
                ours.name
            ),
        )
        .advise("remove it, or install ours by another name: 'muslin cni install --conf-name'"),
    });
    if let (Some(tested), Some(socket)) = (tested, ours.socket())
        && !is_same(&tested.socket, Path::new(socket))
    {
        let detail = format!("{} names the socket {socket}", ours.name);
        let advice = format!("the socket of this node is {}", tested.socket.display());
        findings.push(Finding::new("CNI socket", Verdict::Warning, detail).advise(advice));
    }
    findings.push(plugin(bin_dir));
    for program in ours.programs() {
        let path = bin_dir.join(program);
        if program != PLUGIN && !path.is_file() {
            let detail = format!("{} needs {}, which is not there", ours.name, path.display());
            let advice = "no pod can be attached, and none detached: install it, or leave it out";
            findings.push(Finding::wrong("CNI plugin", detail).advise(advice));
        }
    }
    for name in ours.types() {
        if let Some((_, verdict, why)) = USELESS.iter().find(|(useless, _, _)| *useless == name) {
            let detail = format!("{} has the plugin '{name}': {why}", ours.name);
            let finding = Finding::new("CNI chain", *verdict, detail);
            findings.push(finding.advise("leave it out"));
        }
    }
    findings
}

/// Reads a configuration, if it starts our plugin.
fn read(directory: &Path, name: &str) -> Option<Configuration> {
    let mut text = Vec::new();
    let file = fs::File::open(directory.join(name)).ok()?;
    file.take(MAX_LEN).read_to_end(&mut text).ok()?;
    let mut read: Value = serde_json::from_slice(&text).ok()?;
    let plugins = match read["plugins"].take() {
        Value::Array(plugins) => plugins,
        // As it was before there were lists.
        _ => vec![read],
    };
    plugins.iter().any(is_ours).then(|| Configuration {
        name: name.to_owned(),
        plugins,
    })
}

/// Whether it is our plugin, or flannel's that starts ours.
fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN || plugin["delegate"]["type"] == PLUGIN
}

fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

/// Whether the plugin that runtimes start is this program's.
fn plugin(bin_dir: &Path) -> Finding {
    const CHECK: &str = "CNI plugin";
    let path = bin_dir.join(PLUGIN);
    let install = "install it with 'muslin cni install'";
    // Without a command it says what it is.
    let mut command = Command::new(&path);
    command.env_clear().stdin(Stdio::null());
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            let detail = format!("{} cannot be started: {error}", path.display());
            return Finding::wrong(CHECK, detail).advise(install);
        }
    };
    let told = String::from_utf8_lossy(&output.stderr);
    let version = told.split([' ', ':']).nth(1).unwrap_or_default();
    let own = env!("CARGO_PKG_VERSION");
    match told.starts_with(PLUGIN) && version == own {
        true => Finding::fine(CHECK, format!("{} is of {own}", path.display())),
        false => {
            let detail = format!(
                "{} is of {version:?}, this program of {own}",
                path.display()
            );
            Finding::wrong(CHECK, detail).advise(install)
        }
    }
}
