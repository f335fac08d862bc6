//! The file with a node's private key of WireGuard, as flannel has it: one line of base64, which nobody
//! else may read.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use muslin_stack::secret::Secret;
use nix::fcntl::OFlag;
use nix::unistd::{Uid, geteuid};
use tracing::info;
use zeroize::Zeroizing;

use crate::error::{Context, Error, Result};
use crate::random::random;
use crate::replace::{self, replace};

/// Bytes of the longest file: a key, and the end of its line.
const MAX_LEN: u64 = 64;

/// The key in a file, or a new one, which is written there.
///
/// # Errors
/// If others may read the file, it has no key, or it cannot be read or written.
pub(crate) fn read_or_make(file: &Path) -> Result<Secret> {
    if let Some(key) = read(file)? {
        return Ok(key);
    }
    let key = make()?;
    let directory = replace::directory(file);
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory);
    let written = made.and_then(|()| replace(file, key.to_text().as_bytes(), 0o600));
    written.context(format!("cannot write the WireGuard key {}", file.display()))?;
    info!("this node has a new WireGuard key in {}", file.display());
    Ok(key)
}

/// The key in a file; nothing if there is no such file.
///
/// # Errors
/// As of [`read_or_make`].
pub(crate) fn read(file: &Path) -> Result<Option<Secret>> {
    let at = file.display();
    let cannot = format!("cannot read the WireGuard key {at}");
    // Nobody is waited for who might write into a pipe.
    let flags = OFlag::O_NONBLOCK.bits();
    let opened = match File::options().read(true).custom_flags(flags).open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.context(&cannot)?,
    };
    check_rights(&opened, file)?;
    let mut text = Zeroizing::new(String::new());
    let read = opened.take(MAX_LEN).read_to_string(&mut text);
    let is_text = match read {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => false,
        Err(error) => return Err(error).context(cannot),
    };
    let line = text.strip_suffix('\n').unwrap_or(&text);
    match line.parse() {
        Ok(key) if is_text => Ok(Some(key)),
        _ => Err(Error::failed(format!(
            "{at} has no WireGuard key, which is 32 bytes in base64 as 'wg genkey' makes them: remove it, \
             and the node makes a new one"
        ))),
    }
}

/// Refuses what others may read, or could have written.
fn check_rights(opened: &File, file: &Path) -> Result<()> {
    let at = file.display();
    let metadata = opened.metadata();
    let metadata = metadata.context(format!("cannot look at {at}"))?;
    if !metadata.is_file() {
        return Err(Error::failed(format!("{at} is not a regular file")));
    }
    let (owner, own) = (Uid::from_raw(metadata.uid()), geteuid());
    if owner != own && !owner.is_root() {
        return Err(Error::failed(format!(
            "the WireGuard key {at} belongs to the user {owner}, not to {own}, the user of this node: run \
             'chown {own} {at}', or choose another with --wireguard-key-file"
        )));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(Error::failed(format!(
            "others may read the WireGuard key {at} (mode {:o}): run 'chmod 600 {at}', or remove it if they \
             may have, and the node makes a new one",
            metadata.mode() & 0o7777
        )));
    }
    Ok(())
}

fn make() -> Result<Secret> {
    let mut bytes: Zeroizing<[u8; 32]> = Zeroizing::new(random()?);
    // As 'wg genkey' does it (RFC 7748 section 5).
    bytes[0] &= 248;
    bytes[31] = bytes[31] & 127 | 64;
    Ok(Secret::from(*bytes))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const KEY: &str = "YAnPbJtvTdgwXSCVnkHbAvVRzp0BvgzkVDZ7jNFhPFY=";

    #[test]
    fn a_key_is_made_once_and_is_nobody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("run/flannel/wgkey");
        assert!(read(&file).unwrap().is_none());
        let key = read_or_make(&file).unwrap();
        assert_eq!(read_or_make(&file).unwrap(), key);
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!((text.len(), text.parse().ok()), (44, Some(key.clone())));
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        let other = read_or_make(&directory.path().join("other")).unwrap();
        assert_ne!(other, key);
        assert_eq!((key.bytes()[0] & 7, key.bytes()[31] >> 6), (0, 1));
    }

    #[test]
    fn a_key_that_is_none_or_is_known_to_others_is_refused_and_not_repeated() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("wgkey");
        let of = |text: &[u8], mode| {
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            read_or_make(&file)
        };
        let key: Secret = KEY.parse().unwrap();
        for mode in [0o600, 0o400] {
            assert_eq!(of(KEY.as_bytes(), mode).unwrap(), key);
            fs::remove_file(&file).unwrap();
        }
        assert_eq!(of(format!("{KEY}\n").as_bytes(), 0o600).unwrap(), key);
        let twice = KEY.repeat(2);
        for text in [
            &b""[..],
            b"\n",
            &KEY.as_bytes()[..43],
            twice.as_bytes(),
            &[0xff; 44],
        ] {
            let error = of(text, 0o600).unwrap_err().to_string();
            assert!(error.contains("has no WireGuard key"), "{error}");
            assert!(!error.contains(&KEY[..8]), "{error}");
        }
        for mode in [0o640, 0o604, 0o620] {
            let error = of(KEY.as_bytes(), mode).unwrap_err().to_string();
            assert!(error.contains("chmod 600"), "{error}");
        }
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        let error = read_or_make(&file).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
}
