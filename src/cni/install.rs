//! The plugin and its configuration where container runtimes look for them.
//!
//! Runtimes start the plugin, and read the configuration, at any moment: each is there whole or not
//! at all. What containerd notices is a write in the directory of configurations, not that a file came
//! there under its name (containerd's cni_conf_syncer.go looks at WRITE, RENAME and REMOVE).

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::error::{Context, Error, Result};
use crate::replace::{directory, replace};

/// The plugin's name among others.
pub(crate) const PLUGIN: &str = "muslin-cni";
/// Where runtimes have their plugins.
pub(crate) const BIN_DIR: &str = "/opt/cni/bin";
/// Where they have their configurations.
pub(crate) const CONF_DIR: &str = "/etc/cni/net.d";
/// What the names of configurations end with, as libcni reads them.
const CONFIGURATIONS: [&str; 3] = ["conf", "conflist", "json"];

/// Where a runtime looks for both.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// The directory of plugins.
    pub(crate) bin_dir: PathBuf,
    /// The directory of configurations.
    pub(crate) conf_dir: PathBuf,
    /// The configuration's name there.
    pub(crate) conf_name: String,
}

/// What to install, and where.
#[derive(Debug, Clone)]
pub(crate) struct Installation {
    /// Where it is to be.
    pub(crate) places: Places,
    /// The program to copy.
    pub(crate) plugin: PathBuf,
    /// The network's name.
    pub(crate) network: String,
    /// The node's control socket.
    pub(crate) socket: PathBuf,
}

/// Something that was not as it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mended {
    /// Nothing.
    Nothing,
    /// It was missing, or another one, and is there now.
    Written,
}

impl Places {
    /// Where the plugin is to be.
    fn binary(&self) -> PathBuf {
        self.bin_dir.join(PLUGIN)
    }

    /// Where the configuration is to be.
    fn configuration(&self) -> PathBuf {
        self.conf_dir.join(&self.conf_name)
    }

    /// Removes both, the configuration first: a runtime that has it starts the plugin.
    ///
    /// # Errors
    /// If one is there and cannot be removed.
    pub(crate) fn uninstall(&self) -> Result<()> {
        for path in [self.configuration(), self.binary()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).context(format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Other configurations that a runtime would take in place of this one, which are read in the order
    /// of their names.
    pub(crate) fn earlier_configurations(&self) -> Vec<String> {
        let mut names = configurations(&self.conf_dir);
        names.retain(|name| *name < self.conf_name);
        names
    }
}

impl Installation {
    /// The plugin that comes with this program: beside it.
    ///
    /// # Errors
    /// If it is not there.
    pub(crate) fn own_plugin() -> Result<PathBuf> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let plugin = directory(&program).join(PLUGIN);
        if plugin.is_file() {
            return Ok(plugin);
        }
        Err(Error::failed(format!(
            "there is no {}: name the plugin with --plugin",
            plugin.display()
        )))
    }

    /// Copies the plugin, unless it is there.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub(crate) fn install_plugin(&self) -> Result<Mended> {
        let (from, to) = (&self.plugin, self.places.binary());
        let program = fs::read(from).context(format!("cannot read {}", from.display()))?;
        if fs::read(&to).is_ok_and(|there| there == program) {
            return Ok(Mended::Nothing);
        }
        make_directory(&self.places.bin_dir)?;
        // One that is being executed cannot be written (ETXTBSY), but replaced.
        replace(&to, &program, 0o755).context(format!("cannot write {}", to.display()))?;
        Ok(Mended::Written)
    }

    /// Writes the configuration, unless it is there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn install_configuration(&self) -> Result<Mended> {
        let (text, to) = (self.text(), self.places.configuration());
        if fs::read(&to).is_ok_and(|there| there == text.as_bytes()) {
            return Ok(Mended::Nothing);
        }
        make_directory(&self.places.conf_dir)?;
        let write = || {
            replace(&to, text.as_bytes(), 0o644)?;
            File::open(&self.places.conf_dir)?.sync_all()?;
            touch(&to)
        };
        write().context(format!("cannot write {}", to.display()))?;
        Ok(Mended::Written)
    }

    /// The configuration. Old runtimes read the first version alone, new ones take the highest that
    /// they know (libcni 1.2).
    fn text(&self) -> String {
        let configuration = json!({
            "cniVersion": "0.4.0",
            "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
            "name": self.network,
            "plugins": [{
                "type": PLUGIN,
                "socket": self.socket,
                "capabilities": {
                    "portMappings": true,
                    "bandwidth": true,
                    "ips": true,
                    "mac": true,
                    "aliases": true,
                    "io.kubernetes.cri.pod-annotations": true,
                },
            }],
        });
        format!("{configuration:#}\n")
    }
}

/// The configurations in a directory, in the order in which runtimes read them: by name.
pub(crate) fn configurations(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut configurations: Vec<_> = names
        .filter(|name| {
            let ending = Path::new(name).extension().and_then(|it| it.to_str());
            ending.is_some_and(|ending| CONFIGURATIONS.contains(&ending))
        })
        .collect();
    configurations.sort_unstable();
    configurations
}

/// Makes a directory where it is missing, as the runtime's packages do.
fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).context(format!("cannot make the directory {}", path.display()))
}

/// Writes the last byte of a file once more.
fn touch(path: &Path) -> io::Result<()> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let Some(last) = file.seek(SeekFrom::End(0))?.checked_sub(1) else {
        return Ok(());
    };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    file.seek(SeekFrom::Start(last))?;
    file.write_all(&byte)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn installation(root: &Path) -> Installation {
        let plugin = root.join("program");
        fs::write(&plugin, "#!/bin/sh\n").unwrap();
        Installation {
            places: Places {
                bin_dir: root.join("opt/cni/bin"),
                conf_dir: root.join("etc/cni/net.d"),
                conf_name: "10-muslin.conflist".to_owned(),
            },
            plugin,
            network: "muslin".to_owned(),
            socket: "/run/muslin/control.sock".into(),
        }
    }

    #[test]
    fn what_is_there_already_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let it = installation(root.path());
        let places = &it.places;
        for expected in [Mended::Written, Mended::Nothing] {
            assert_eq!(it.install_plugin().unwrap(), expected);
            assert_eq!(it.install_configuration().unwrap(), expected);
        }
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(places.binary()), 0o755);
        assert_eq!(mode(places.configuration()), 0o644);
        fs::write(places.binary(), "old").unwrap();
        fs::write(places.configuration(), "{}").unwrap();
        assert_eq!(it.install_plugin().unwrap(), Mended::Written);
        assert_eq!(it.install_configuration().unwrap(), Mended::Written);
        let text = fs::read(places.configuration()).unwrap();
        let text: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(text["plugins"][0]["socket"], "/run/muslin/control.sock");
        places.uninstall().unwrap();
        places.uninstall().unwrap();
        assert!(!places.binary().exists() && !places.configuration().exists());
    }

    #[test]
    fn a_configuration_that_comes_first_is_named() {
        let root = tempfile::tempdir().unwrap();
        let it = installation(root.path());
        assert!(it.places.earlier_configurations().is_empty());
        it.install_configuration().unwrap();
        for name in [
            "05-cilium.conf",
            "87-podman.conflist",
            "00-notes.txt",
            ".tmpX",
        ] {
            fs::write(it.places.conf_dir.join(name), "").unwrap();
        }
        assert_eq!(it.places.earlier_configurations(), ["05-cilium.conf"]);
    }
}
