//! The files in reach (landlock(7)).

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
};
use muslin_stack::api::control::Measure;

use crate::error::{Context, Result};
use crate::replace::directory;

/// What is limited, where the kernel can: its latest part is from Linux 6.12.
const KNOWN: ABI = ABI::V6;

/// What name resolution, certificates and the C library read, on common systems. `/run` has what
/// `/etc/resolv.conf` and its like lead to.
const READ: [&str; 12] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/nix/store",
    "/proc",
    "/dev/urandom",
    "/run/nscd",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/mnt/wsl",
];
const DEVICES: [&str; 2] = ["/dev/null", "/dev/net/tun"];

/// Where a process has its files, besides what all need.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places {
    /// Directories that it only reads.
    read: Vec<PathBuf>,
    /// Directories that it writes.
    written: Vec<PathBuf>,
    /// Directories in which it makes sockets, and removes what is its own.
    cleared: Vec<PathBuf>,
}

impl Places {
    /// Reads a file, also one that takes its place later.
    pub(crate) fn read(&mut self, file: &Path) {
        self.read.push(directory(file).to_owned());
        // Or it leads elsewhere.
        let target = file.canonicalize();
        self.read
            .extend(target.ok().map(|target| directory(&target).to_owned()));
    }

    /// Writes in a directory, which is made with this mode where it is missing: afterwards it could
    /// not be.
    pub(crate) fn write(&mut self, directory: &Path, mode: u32) {
        // Who needs it later says why it is not there.
        let _ = DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(directory);
        self.written.push(directory.to_owned());
    }

    /// Writes a file, and others that belong to it, in its directory.
    pub(crate) fn write_beside(&mut self, file: &Path, mode: u32) {
        self.write(directory(file), mode);
        if let Ok(target) = file.canonicalize() {
            self.write(directory(&target), mode);
        }
    }

    /// Makes a socket, and removes it, or a directory, in the end.
    pub(crate) fn clear(&mut self, path: &Path) {
        self.cleared.push(directory(path).to_owned());
    }

    /// Where the links end through which names are resolved.
    fn resolution() -> Option<PathBuf> {
        let file = Path::new("/etc/resolv.conf").canonicalize().ok()?;
        Some(directory(&file).to_owned())
    }
}

/// Leaves these files in reach, and no others.
pub(super) fn limit(places: &Places) -> Result<Measure> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let cleared = AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::RemoveDir;
    let written = read
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSock;
    let fixed = READ.iter().map(PathBuf::from);
    let reads = fixed
        .chain(Places::resolution())
        .chain(places.read.iter().cloned());
    let rules: [(Vec<PathBuf>, BitFlags<AccessFs>); 4] = [
        (reads.collect(), read),
        (DEVICES.iter().map(PathBuf::from).collect(), device),
        (places.written.clone(), written),
        (places.cleared.clone(), cleared),
    ];
    let limited = || -> std::result::Result<_, landlock::RulesetError> {
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(KNOWN))?
            .scope(scopes())?
            .create()?;
        for (paths, access) in rules {
            // What is not there needs no rule.
            ruleset = ruleset.add_rules(path_beneath_rules(paths, access))?;
        }
        ruleset.restrict_self()
    };
    let status = limited().context("cannot restrict access to files")?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced, _) => Measure::full(),
        (RulesetStatus::PartiallyEnforced, LandlockStatus::Available { effective_abi, .. }) => {
            Measure::partial(format!("this kernel has version {}", effective_abi as i32))
        }
        (RulesetStatus::PartiallyEnforced, _) => Measure::partial(
            "this kernel supports only part \
                                                                   of it",
        ),
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Measure::missing("this kernel has it switched off: add 'landlock' to 'lsm=' at boot")
        }
        (RulesetStatus::NotEnforced, _) => Measure::missing("this kernel has none"),
    })
}

/// What cannot be reached of processes that were there before.
fn scopes() -> BitFlags<Scope> {
    // systemd may listen at an abstract name for what a service has to say (sd_notify(3)).
    let is_abstract = std::env::var_os("NOTIFY_SOCKET")
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"@"));
    if is_abstract {
        Scope::Signal.into()
    } else {
        Scope::Signal | Scope::AbstractUnixSocket
    }
}

/// Whether this kernel can limit files.
pub(super) fn is_offered() -> bool {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1));
    ruleset.and_then(Ruleset::create).is_ok()
}
