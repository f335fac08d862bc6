//! What a node keeps on disk: who it is, which subnet it had, and which pod had which address.
//!
//! One directory holds all nodes of a user on a machine: `nodes/NAME/` has a node's own files and
//! its control socket, and the embedded store lies beside them.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_stack::control::ipam;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Uid, geteuid};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::error::{Context, Error, Result, errno};
use crate::random::random;
use crate::replace::{UNFINISHED, replace};

/// The error for a path that is not a regular file.
const IRREGULAR: &str = "it is not a regular file";

/// A Unix socket's path fits 107 bytes and a zero (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// The name of the file with a node's private key of WireGuard.
const WIREGUARD_KEY: &str = "wireguard.key";

/// Where state is kept unless the user says otherwise: `$XDG_STATE_HOME/muslin`, else
/// `~/.local/state/muslin`, else `/var/lib/muslin`.
#[must_use]
pub fn default_dir() -> PathBuf {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("XDG_STATE_HOME")
        .or_else(|| Some(variable("HOME")?.join(".local/state")))
        .map_or_else(|| "/var/lib/muslin".into(), |dir| dir.join("muslin"))
}

/// The embedded store of all nodes in a state directory.
#[must_use]
pub fn default_store(state_dir: &Path) -> OsString {
    let mut url = OsString::from("sqlite:");
    url.push(state_dir.join("store.db"));
    url
}

/// Checks a node's name: like a pod's, since it too is a part of host names.
///
/// # Errors
/// A usage error that says what a name may be.
pub fn node_name(text: &str) -> Result<String> {
    match text.parse::<ipam::PodName>() {
        Ok(name) => Ok(name.into()),
        Err(_) => Err(Error::usage(format!(
            "'{text}' is not a node name: use up to 63 of a-z, 0-9, '-' and '.', with a letter or \
             digit at both ends"
        ))),
    }
}

/// This machine's host name as a node's name.
#[must_use]
pub fn default_node_name() -> String {
    let host = nix::unistd::gethostname().unwrap_or_default();
    let host = host.to_string_lossy().to_ascii_lowercase();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let label: String = host
        .split('.')
        .next()
        .unwrap_or_default()
        .chars()
        .map(plain)
        .take(63)
        .collect();
    node_name(label.trim_matches('-')).unwrap_or_else(|_| "node".to_owned())
}

/// Where the node `name` listens for commands.
#[must_use]
pub fn socket_path(state_dir: &Path, name: &str) -> PathBuf {
    node_dir(state_dir, name).join("control.sock")
}

/// Where the node `name` has its private key of WireGuard, unless the user says otherwise.
#[must_use]
pub fn wireguard_key_file(state_dir: &Path, name: &str) -> PathBuf {
    node_dir(state_dir, name).join(WIREGUARD_KEY)
}

/// What is to be out of sight for whoever must not reach a node's socket, not even one that another
/// node makes in its place: the state directory that it is in, else its own directory if that is
/// nobody else's, else itself.
#[must_use]
pub fn directory_of(socket: &Path) -> PathBuf {
    let directory = socket.parent().unwrap_or(socket);
    let state_dir = directory
        .parent()
        .filter(|nodes| nodes.file_name() == Some("nodes".as_ref()))
        .and_then(Path::parent);
    let is_private = |it: fs::Metadata| it.uid() == geteuid().as_raw() && it.mode() & 0o077 == 0;
    match state_dir {
        Some(state_dir) => state_dir.to_owned(),
        None if directory.metadata().is_ok_and(is_private) => directory.to_owned(),
        None => socket.to_owned(),
    }
}

/// Names of the nodes that have a directory, in order.
#[must_use]
pub fn nodes(state_dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(state_dir.join("nodes")) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| node_name(name).is_ok())
        .collect();
    names.sort_unstable();
    names
}

fn node_dir(state_dir: &Path, name: &str) -> PathBuf {
    state_dir.join("nodes").join(name)
}

/// What makes a node the one it was before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its VTEP.
    pub vtep_mac: VtepMac,
    /// MAC address of its gateway.
    pub gateway_mac: VtepMac,
    /// The subnet it had.
    pub subnet: Option<Ipv4Net>,
    /// The IPv6 subnet it had.
    pub subnet_ipv6: Option<Ipv6Net>,
    /// The public IPv6 address that its lease named last.
    pub public_ipv6: Option<Ipv6Addr>,
    /// Where all that counts, once it had a lease.
    pub store: Option<StoreId>,
}

impl Identity {
    /// One that nobody had before.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub fn fresh() -> Result<Self> {
        Ok(Self {
            vtep_mac: VtepMac::from_random(random()?),
            gateway_mac: VtepMac::from_random(random()?),
            subnet: None,
            subnet_ipv6: None,
            public_ipv6: None,
            store: None,
        })
    }
}

/// Which store a node's state belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StoreId {
    /// Its address.
    pub url: String,
    /// Its identity, wherever it is.
    pub id: String,
    /// What its keys begin with.
    pub prefix: String,
}

impl StoreId {
    /// Whether a node of that store is one of this: it may have moved, or have been made anew at the
    /// same address.
    #[must_use]
    pub fn continues(&self, other: &Self) -> bool {
        self.prefix == other.prefix && (self.id == other.id || self.url == other.url)
    }
}

impl std::fmt::Display for StoreId {
    /// With the prefix, which alone may distinguish two networks.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (prefix {})", self.url, self.prefix)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct IdentityFile {
    vtep_mac: String,
    gateway_mac: String,
    subnet: Option<Ipv4Net>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subnet_ipv6: Option<Ipv6Net>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public_ipv6: Option<Ipv6Addr>,
    store: Option<StoreId>,
}

/// A running node's directory, locked against a second one of the same name.
#[derive(Debug)]
pub struct StateDir {
    dir: PathBuf,
    lock: File,
}

impl StateDir {
    /// Makes the directory where it is missing, and locks it.
    ///
    /// # Errors
    /// If a node of that name runs, or the directory cannot be used.
    pub fn open(state_dir: &Path, name: &str) -> Result<Self> {
        let dir = node_dir(state_dir, name);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|error| unusable("make the directory", &dir, &error))?;
        check(state_dir)?;
        check_directory(&state_dir.join("nodes"), false)?;
        check_directory(&dir, false)?;
        let path = dir.join("lock");
        let mut options = File::options();
        options.create(true).truncate(false).read(true).write(true);
        let file = open_regular(options.mode(0o600), &path);
        let file = file.map_err(|error| unusable("open", &path, &error))?;
        file.try_lock().map_err(|error| {
            Error::failed(match error {
                TryLockError::WouldBlock => {
                    format!(
                        "a node named '{name}' is already running: give this one another --name"
                    )
                }
                TryLockError::Error(error) => format!("cannot lock {}: {error}", path.display()),
            })
        })?;
        sweep(&dir);
        Ok(Self { dir, lock: file })
    }

    /// The directory of a node that runs, by the lock that its process has.
    #[must_use]
    pub fn inherit(state_dir: &Path, name: &str, lock: OwnedFd) -> Self {
        Self {
            dir: node_dir(state_dir, name),
            lock: lock.into(),
        }
    }

    /// Another descriptor of the lock, for another process: it is locked for as long as one of them has
    /// it open.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn copy_lock(&self) -> io::Result<OwnedFd> {
        self.lock.as_fd().try_clone_to_owned()
    }

    /// The node's own place for its control socket, or for one that can do less.
    #[must_use]
    pub fn socket_named(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where the node has its private key, unless the user says otherwise.
    #[must_use]
    pub fn wireguard_key_file(&self) -> PathBuf {
        self.dir.join(WIREGUARD_KEY)
    }

    /// The node's default path of the subnet file.
    #[must_use]
    pub fn subnet_file(&self) -> PathBuf {
        self.dir.join("subnet.env")
    }

    /// Who the node was before, or a new identity, which is written down.
    ///
    /// # Errors
    /// If the file cannot be read or written, or is damaged.
    pub fn identity(&self) -> Result<Identity> {
        if let Some(file) = self.read::<IdentityFile>("identity.json")? {
            let at = self.dir.join("identity.json");
            let mac = |text: &str| {
                text.parse()
                    .map_err(|error| Error::failed(format!("{}: {error}", at.display())))
            };
            return Ok(Identity {
                vtep_mac: mac(&file.vtep_mac)?,
                gateway_mac: mac(&file.gateway_mac)?,
                subnet: file.subnet,
                subnet_ipv6: file.subnet_ipv6,
                public_ipv6: file.public_ipv6,
                store: file.store,
            });
        }
        let identity = Identity::fresh()?;
        self.write_identity(&identity)?;
        Ok(identity)
    }

    /// Writes down who the node is.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_identity(&self, identity: &Identity) -> Result<()> {
        let file = IdentityFile {
            vtep_mac: identity.vtep_mac.to_string(),
            gateway_mac: identity.gateway_mac.to_string(),
            subnet: identity.subnet,
            subnet_ipv6: identity.subnet_ipv6,
            public_ipv6: identity.public_ipv6,
            store: identity.store.clone(),
        };
        self.write("identity.json", &file)
    }

    /// Which pod had which address; nothing, with a warning, if that cannot be read.
    #[must_use]
    pub fn addresses(&self) -> Option<ipam::Memory> {
        self.read("pods.json").unwrap_or_else(|error| {
            warn!("addresses of earlier pods are lost: {error}");
            None
        })
    }

    /// Writes down which pod has which address.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_addresses(&self, memory: &ipam::Memory) -> Result<()> {
        self.write("pods.json", memory)
    }

    /// Forgets which pod had which address.
    ///
    /// # Errors
    /// If the file cannot be removed.
    pub fn forget_addresses(&self) -> Result<()> {
        let path = self.dir.join("pods.json");
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(unusable("remove", &path, &error))
            }
            _ => Ok(()),
        }
    }

    fn read<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>> {
        let path = self.dir.join(file);
        match read_regular(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).context(format!(
                "{} is damaged (remove it to start afresh)",
                path.display()
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context(format!("cannot read {}", path.display())),
        }
    }

    fn write(&self, file: &str, value: &impl Serialize) -> Result<()> {
        write_json(&self.dir, file, value)
    }
}

/// Refuses a state directory that cannot be trusted, if it is there.
///
/// # Errors
/// What is wrong with it.
pub fn check(state_dir: &Path) -> Result<()> {
    match state_dir.exists() {
        // Where it is a mount of a container it is root's, and open to all.
        true => check_directory(state_dir, true),
        false => Ok(()),
    }
}

/// Refuses a directory in which others could put what this node would believe, as ssh(1) does.
fn check_directory(path: &Path, may_be_roots: bool) -> Result<()> {
    let at = path.display();
    let metadata = fs::metadata(path).context(format!("cannot look at {at}"))?;
    let (owner, mode) = (Uid::from_raw(metadata.uid()), metadata.mode());
    let own = geteuid();
    if owner.is_root() && may_be_roots {
        return Ok(());
    }
    if owner != own {
        return Err(Error::failed(format!(
            "{at} belongs to the user {owner}, not to {own}, the user of this node: choose a directory of your \
             own with --state-dir"
        )));
    }
    if mode & 0o022 != 0 {
        return Err(Error::failed(format!(
            "others may write in {at} (mode {:o}): run 'chmod go-w {at}'",
            mode & 0o7777
        )));
    }
    Ok(())
}

/// Opens a file of the state directory: no link to another, and nothing that must be waited for.
fn open_regular(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = options.custom_flags(flags.bits()).open(path);
    let file = file.map_err(|error| match errno(&error) {
        Errno::ELOOP => io::Error::other("it is a symbolic link"),
        // Nobody reads a pipe.
        Errno::ENXIO => io::Error::other(IRREGULAR),
        _ => error,
    })?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(IRREGULAR));
    }
    Ok(file)
}

/// Reads a file: no link to another, and nothing that must be waited for.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(File::options().read(true), path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Removes what a killed process has not finished writing. The directory is this process' alone.
fn sweep(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let is_unfinished = name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes());
        if is_unfinished && entry.file_type().is_ok_and(|it| it.is_file()) {
            // It is in nobody's way.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Why a file of the state directory cannot be had, and what to do.
fn unusable(verb: &str, path: &Path, error: &io::Error) -> Error {
    let error = with_way_out(error, error.kind());
    Error::failed(format!("cannot {verb} {}: {error}", path.display()))
}

/// An error of the state directory with what to do.
pub(crate) fn with_way_out(error: &impl std::fmt::Display, kind: io::ErrorKind) -> String {
    match way_out(kind) {
        Some(way_out) => format!("{error}: {way_out}"),
        None => error.to_string(),
    }
}

/// What to do where the state directory cannot be written, if anything.
pub(crate) fn way_out(error: io::ErrorKind) -> Option<&'static str> {
    match error {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Some("free some space there, or choose another directory with --state-dir")
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            if std::env::var_os("HOME").is_none_or(|home| home.is_empty()) =>
        {
            Some("HOME is not set: set it, or choose a directory of your own with --state-dir")
        }
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::NotADirectory => Some("choose another directory with --state-dir"),
        _ => None,
    }
}

/// Replaces a file at once, so that a crash leaves the old or the new one.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write_json(directory: &Path, file: &str, value: &impl Serialize) -> Result<()> {
    let path = directory.join(file);
    let write = || -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(value)?;
        text.push(b'\n');
        replace(&path, &text, 0o600)
    };
    write().map_err(|error| unusable("write", &path, &error))
}

/// Removes a socket that a dead node left, and checks that a new one can have its path.
///
/// # Errors
/// If the path is too long for a socket, a node listens there, or what is there is no socket or
/// cannot be removed.
pub fn vacate(path: &Path) -> Result<()> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(Error::usage(format!(
            "the path {} is too long for a socket (at most {MAX_SOCKET_PATH} bytes): use a shorter \
             --state-dir or --socket",
            path.display()
        )));
    }
    let at = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context(format!("cannot look at {at}")),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(Error::usage(format!(
                "{at} exists and is not a socket: choose another path"
            )));
        }
        Ok(_) => {}
    }
    if is_listening(path) {
        return Err(Error::failed(format!("a node already listens at {at}")));
    }
    fs::remove_file(path).context(format!("cannot remove the old socket {at}"))
}

/// Whether a process listens at a control socket.
#[must_use]
pub fn is_listening(socket: &Path) -> bool {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket as open};
    // One whose queue is full listens, too, and must not be waited for.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connected = open(AddressFamily::Unix, SockType::SeqPacket, flags, None)
        .and_then(|fd| connect(fd.as_raw_fd(), &UnixAddr::new(socket)?));
    matches!(connected, Ok(()) | Err(nix::errno::Errno::EAGAIN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replace::tests::{file_on_a_full_disk, is_replaced, on_a_full_disk};

    #[test]
    fn an_identity_stays() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), "n1").unwrap();
        let mut identity = state.identity().unwrap();
        assert_ne!(identity.vtep_mac, identity.gateway_mac);
        identity.subnet = Some("10.244.3.0/24".parse().unwrap());
        identity.subnet_ipv6 = Some("fd00:244:0:3::/64".parse().unwrap());
        identity.public_ipv6 = Some("fd01::3".parse().unwrap());
        identity.store = Some(store("etcd://h:1", "a", "/x"));
        state.write_identity(&identity).unwrap();
        assert_eq!(state.identity().unwrap(), identity);
        fs::write(dir.path().join("nodes/n1/identity.json"), "{").unwrap();
        assert!(
            state
                .identity()
                .unwrap_err()
                .to_string()
                .contains("damaged")
        );
    }

    fn store(url: &str, id: &str, prefix: &str) -> StoreId {
        let [url, id, prefix] = [url, id, prefix].map(str::to_owned);
        StoreId { url, id, prefix }
    }

    #[test]
    fn a_store_that_moves_or_is_made_anew_is_the_same() {
        let known = store("etcd://h:1", "a", "/x");
        for (url, id, prefix, is_same) in [
            ("etcd://h:1", "a", "/x", true),
            ("etcd://g:1", "a", "/x", true),
            ("etcd://h:1", "b", "/x", true),
            ("etcd://g:1", "b", "/x", false),
            ("etcd://h:1", "a", "/y", false),
        ] {
            let now = store(url, id, prefix);
            assert_eq!(now.continues(&known), is_same, "{now}");
        }
    }

    #[test]
    fn what_an_earlier_version_wrote_belongs_to_any_store() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), "n1").unwrap();
        let text = r#"{"vtep-mac": "02:00:00:00:00:01", "gateway-mac": "02:00:00:00:00:02",
            "subnet": "10.244.3.0/24"}"#;
        fs::write(dir.path().join("nodes/n1/identity.json"), text).unwrap();
        assert_eq!(state.identity().unwrap().store, None);
    }

    #[test]
    fn who_reads_an_identity_finds_it_whole() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), "n1").unwrap();
        let mut other = state.identity().unwrap();
        other.subnet = Some("10.244.3.0/24".parse().unwrap());
        let one = state.identity().unwrap();
        is_replaced(&dir.path().join("nodes/n1/identity.json"), |which| {
            let identity = if which { &one } else { &other };
            state.write_identity(identity).unwrap();
        });
    }

    #[test]
    fn a_full_disk_leaves_the_old_identity() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), "n1").unwrap();
        state.identity().unwrap();
        drop(state);
        let path = dir.path().join("nodes/n1/identity.json");
        on_a_full_disk("state::tests::an_identity_on_a_full_disk", &path);
    }

    #[test]
    #[ignore = "the part in a process that cannot write"]
    fn an_identity_on_a_full_disk() {
        let Some(path) = file_on_a_full_disk() else {
            return;
        };
        let state = StateDir::open(path.ancestors().nth(3).unwrap(), "n1").unwrap();
        let mut identity = state.identity().unwrap();
        identity.subnet = Some("10.244.3.0/24".parse().unwrap());
        let error = state.write_identity(&identity).unwrap_err().to_string();
        assert!(error.contains("identity.json"), "{error}");
    }

    #[test]
    fn what_others_can_write_is_not_believed() {
        use std::os::unix::fs::{PermissionsExt, chown};
        let root = tempfile::tempdir().unwrap();
        drop(StateDir::open(root.path(), "n1").unwrap());
        let node = root.path().join("nodes/n1");
        let refused = || StateDir::open(root.path(), "n1").unwrap_err().to_string();
        for path in [root.path(), &root.path().join("nodes"), &node] {
            let mode = |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            let is_roots = path == root.path() && geteuid().is_root();
            for open in [0o770, 0o707].into_iter().filter(|_| !is_roots) {
                mode(open);
                let error = refused();
                assert!(error.contains("chmod go-w"), "{error}");
            }
            mode(0o700);
            if geteuid().is_root() {
                chown(path, Some(1001), None).unwrap();
                let error = refused();
                assert!(error.contains("belongs to the user 1001"), "{error}");
                chown(path, Some(0), None).unwrap();
            }
        }
        StateDir::open(root.path(), "n1").unwrap();
    }

    #[test]
    fn what_is_no_file_is_not_opened() {
        use nix::sys::stat::Mode;
        let root = tempfile::tempdir().unwrap();
        drop(StateDir::open(root.path(), "n1").unwrap());
        let node = root.path().join("nodes/n1");
        let (lock, identity) = (node.join("lock"), node.join("identity.json"));
        fs::remove_file(&lock).unwrap();
        std::os::unix::fs::symlink(root.path().join("made"), &lock).unwrap();
        let error = StateDir::open(root.path(), "n1").unwrap_err().to_string();
        assert!(error.contains("lock: it is a symbolic link"), "{error}");
        assert!(!root.path().join("made").exists());
        fs::remove_file(&lock).unwrap();
        let state = StateDir::open(root.path(), "n1").unwrap();
        nix::unistd::mkfifo(&identity, Mode::S_IRWXU).unwrap();
        let error = state.identity().unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }

    #[test]
    fn what_a_killed_process_has_begun_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::open(root.path(), "n1").unwrap();
        state.identity().unwrap();
        drop(state);
        let node = root.path().join("nodes/n1");
        for name in [".tmpAbC123", ".other"] {
            fs::write(node.join(name), "{").unwrap();
        }
        StateDir::open(root.path(), "n1").unwrap();
        let names = fs::read_dir(&node).unwrap();
        let mut names: Vec<_> = names.map(|it| it.unwrap().file_name()).collect();
        names.sort_unstable();
        assert_eq!(names, [".other", "identity.json", "lock"]);
    }

    #[test]
    fn a_name_belongs_to_one_node_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), "n1").unwrap();
        let error = StateDir::open(dir.path(), "n1").unwrap_err().to_string();
        assert!(error.contains("'n1' is already running"), "{error}");
        StateDir::open(dir.path(), "n2").unwrap();
        drop(state);
        StateDir::open(dir.path(), "n1").unwrap();
        assert_eq!(nodes(dir.path()), ["n1", "n2"]);
    }

    #[tokio::test]
    async fn only_a_dead_nodes_socket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        vacate(&path).unwrap();
        let listener = tokio_seqpacket::UnixSeqpacketListener::bind(&path).unwrap();
        assert!(is_listening(&path));
        let error = vacate(&path).unwrap_err().to_string();
        assert!(error.contains("listens at"), "{error}");
        drop(listener);
        assert!(!is_listening(&path));
        vacate(&path).unwrap();
        assert!(!path.exists());
        fs::write(&path, "a letter to my aunt").unwrap();
        assert_eq!(vacate(&path).unwrap_err().exit_code(), 2);
        assert!(path.exists());
    }

    #[test]
    fn a_socket_needs_a_short_path() {
        let error = vacate(Path::new(&format!("/{}", "x".repeat(107)))).unwrap_err();
        assert_eq!(error.exit_code(), 2);
    }
}
