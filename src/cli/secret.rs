//! Secrets: in files, since others see a command line, and children a variable.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::attach::CREDENTIALS;
use crate::error::{Context, Error, Result};

/// Bytes of the longest secret.
const MAX_LEN: u64 = 4096;

/// The secret in a file, or else in the credential of this name that systemd gives, if it does.
pub(super) fn read(file: Option<&Path>, credential: &str) -> Result<Option<String>> {
    let directory = std::env::var_os(CREDENTIALS).map(PathBuf::from);
    let given = directory.map(|directory| directory.join(credential));
    let path = match (file, &given) {
        (Some(file), _) => file,
        (None, Some(given)) if given.exists() => given,
        (None, _) => return Ok(None),
    };
    let at = path.display();
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_LEN + 1).read_to_string(&mut text))
        .context(format!("cannot read the secret in {at}"))?;
    // Editors end a line.
    let secret = text.strip_suffix('\n').unwrap_or(&text);
    if secret.is_empty() || text.len() as u64 > MAX_LEN || secret.contains(['\n', '\0']) {
        return Err(Error::usage(format!(
            "{at} must contain the secret as a single line of at most {MAX_LEN} bytes"
        )));
    }
    Ok(Some(secret.to_owned()))
}

/// Warns of a secret among this program's own words.
pub(super) fn warn_of_words(flag: &str, variable: &str) {
    let mut words = std::env::args_os().take_while(|word| word != "--");
    if words.any(|word| is_flag(&word.to_string_lossy(), flag)) {
        warn!(
            "--{flag}: other users of this machine see it in the list of processes: give a file \
             with --{flag}-file, or use the variable {variable}"
        );
    }
}

fn is_flag(word: &str, flag: &str) -> bool {
    let name = word.strip_prefix('-').unwrap_or_default();
    let name = name.strip_prefix('-').unwrap_or(name);
    name.split('=').next() == Some(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            super::read(Some(&file), "none")
        };
        for text in ["a b:ü", "a b:ü\n"] {
            assert_eq!(read(text).unwrap().as_deref(), Some("a b:ü"));
        }
        for text in ["", "\n", "a\nb", "a\0", &"x".repeat(5000)] {
            assert_eq!(read(text).unwrap_err().exit_code(), 2, "{text:?}");
        }
        let error = super::read(Some(&directory.path().join("x")), "none");
        assert_eq!(error.unwrap_err().exit_code(), 1);
        assert_eq!(super::read(None, "none").unwrap(), None);
    }

    #[test]
    fn a_secret_is_found_among_words() {
        for word in ["--etcd-password", "-etcd-password=x", "--etcd-password="] {
            assert!(is_flag(word, "etcd-password"), "{word}");
        }
        for word in ["etcd-password", "--etcd-password-file", "---etcd-password"] {
            assert!(!is_flag(word, "etcd-password"), "{word}");
        }
    }
}
