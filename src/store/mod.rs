//! Stores: where the nodes of a network find each other.
//!
//! All three hold flannel's own keys and values, so that the rules know one kind of store only.

#[cfg(feature = "etcd")]
mod etcd;
mod file;
mod measured;
mod options;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(test)]
pub(crate) mod suite;

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
pub(crate) use measured::{BOUNDS, Measured, Timings};
use muslin_stack::control::lease::{Answer, Entry, LeaseRecord, Op, Revision, WatchEvent};
pub use options::EtcdOptions;
use thiserror::Error;

use crate::error::{Error, Result};

/// A small key-value store with revisions, expiry and watches.
#[async_trait]
pub trait Store: Send + Sync {
    /// Executes one operation.
    async fn execute(&self, op: Op) -> std::result::Result<Answer, StoreError>;

    /// Watches the keys that begin with `prefix`, from revision `from` on.
    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> std::result::Result<Box<dyn Watch>, StoreError>;

    /// The keys that begin with `prefix`, each with the time that it lives still. A list need not
    /// know that, because it can cost the store one question per key.
    async fn survey(&self, prefix: &str) -> std::result::Result<Vec<Entry>, StoreError> {
        match self.execute(Op::List(prefix.to_owned())).await? {
            Answer::Snapshot { entries, .. } => Ok(entries),
            other => Err(StoreError::Unavailable(format!("unexpected: {other:?}"))),
        }
    }

    /// Whether nodes can keep other keys in it than leases, for the names of their pods.
    fn keeps_names(&self) -> bool {
        true
    }

    /// Whether flannel's nodes can have their leases in it, too.
    fn is_shared_with_flannel(&self) -> bool {
        false
    }

    /// The URLs of its servers, where it has any.
    fn servers(&self) -> &[String] {
        &[]
    }

    /// What tells this store from others wherever it is, once it has answered; nothing for a list,
    /// which says itself who a node is.
    fn id(&self) -> Option<String> {
        None
    }

    /// What this store is, for people: `sqlite:/path`.
    fn describe(&self) -> String;

    /// The record that a static list has for a node; `None` where nodes write their own.
    fn listed(&self, _public_ip: Ipv4Addr) -> std::result::Result<Option<LeaseRecord>, StoreError> {
        Ok(None)
    }
}

/// A watch that is open.
#[async_trait]
pub trait Watch: Send {
    /// Waits for the next changes, in order; a call that is dropped loses none. After an error
    /// the watch has ended: there is a gap, or the store is away.
    async fn next(&mut self) -> std::result::Result<Vec<WatchEvent>, StoreError>;
}

/// Why a store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StoreError {
    /// It is away, or too busy; later it may work.
    #[error("{0}")]
    Unavailable(String),
    /// It has no more the changes that the watch should begin with: list again.
    #[error("changes are missing")]
    Gap,
    /// It answers, and does not do it until somebody mends something: rights, a damaged file, an
    /// entry of a list. It is asked again as if it were away.
    #[error("{0}")]
    Refused(String),
}

/// Opens a store by its address: `sqlite:PATH`, `file:PATH`, `etcd://HOST:PORT[,HOST:PORT]`, the
/// same with `etcds:` for TLS, or `etcd:http://HOST:PORT[,https://HOST:PORT]` with flannel's list.
/// An etcd server is not asked yet, and need not be there. The other kinds have no use for
/// `options`.
///
/// # Errors
/// Bad usage for another address and for a store that this build has not, a failure for a file that cannot be read, has mistakes or is no
/// store.
pub fn open(url: impl AsRef<OsStr>, options: &EtcdOptions) -> Result<Arc<dyn Store>> {
    let url = url.as_ref();
    let shown = url.display();
    let unknown = || {
        Error::usage(format!(
            "the store '{shown}' is unknown: use sqlite:PATH, file:PATH or \
             etcd://HOST:PORT[,HOST:PORT]"
        ))
    };
    // A path need not be UTF-8.
    let bytes = url.as_bytes();
    let colon = bytes.iter().position(|byte| *byte == b':');
    let (scheme, rest) = bytes.split_at(colon.ok_or_else(unknown)?);
    let rest = OsStr::from_bytes(&rest[1..]);
    let path = || {
        if rest.is_empty() {
            return Err(Error::usage(format!(
                "the store '{shown}' lacks a file name"
            )));
        }
        Ok(Path::new(rest))
    };
    match scheme {
        b"sqlite" => open_sqlite(path()?),
        b"file" => Ok(Arc::new(file::FileStore::open(path()?)?)),
        b"etcd" | b"etcds" => {
            let url = url.to_str().ok_or_else(unknown)?;
            let (scheme, rest) = url.split_once(':').ok_or_else(unknown)?;
            open_etcd(url, scheme, rest, options)
        }
        _ => Err(unknown()),
    }
}

#[cfg(feature = "sqlite")]
fn open_sqlite(path: &Path) -> Result<Arc<dyn Store>> {
    Ok(Arc::new(sqlite::SqliteStore::open(path)?))
}

#[cfg(not(feature = "sqlite"))]
fn open_sqlite(_: &Path) -> Result<Arc<dyn Store>> {
    Err(crate::features::Feature::Sqlite.missing())
}

#[cfg(feature = "etcd")]
fn open_etcd(url: &str, scheme: &str, rest: &str, options: &EtcdOptions) -> Result<Arc<dyn Store>> {
    Ok(Arc::new(etcd::EtcdStore::new(url, scheme, rest, options)?))
}

#[cfg(not(feature = "etcd"))]
fn open_etcd(_: &str, _: &str, _: &str, _: &EtcdOptions) -> Result<Arc<dyn Store>> {
    Err(crate::features::Feature::Etcd.missing())
}

/// The file of a store by its address, if it is one, and whether nodes write it.
pub(crate) fn file_of(url: &OsStr) -> Option<(&Path, bool)> {
    let path = |rest| Path::new(OsStr::from_bytes(rest));
    match url.as_bytes() {
        [b's', b'q', b'l', b'i', b't', b'e', b':', rest @ ..] => Some((path(rest), true)),
        [b'f', b'i', b'l', b'e', b':', rest @ ..] => Some((path(rest), false)),
        _ => None,
    }
}

/// Whether nodes of other machines use a store too, by its address: to them a lease for 127.0.0.1
/// means nothing, and they may mend what is wrong with it.
#[must_use]
pub fn is_shared(url: impl AsRef<OsStr>) -> bool {
    !url.as_ref().as_bytes().starts_with(b"sqlite:")
}

/// What a store says that does not know the user, or not with this password or right.
const REFUSES_USER: &str = "refuses the user";

/// Whether a store is well, and only refuses this user this key.
pub(crate) fn is_permission(error: &StoreError) -> bool {
    let text = error.to_string();
    text.contains(REFUSES_USER) && text.contains("permission denied")
}

/// Runs what blocks on a thread where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, StoreError> + Send + 'static,
) -> std::result::Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::Unavailable(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(url: &str) -> Error {
        open(url, &EtcdOptions::default()).map(|_| ()).unwrap_err()
    }

    #[test]
    fn an_unknown_address_is_told_the_three_forms() {
        for url in ["", "x", "redis://h:1", "SQLITE:/x", "/tmp/x.db"] {
            let error = error(url);
            assert_eq!(error.exit_code(), 2);
            let text = error.to_string();
            for form in ["sqlite:PATH", "file:PATH", "etcd://HOST:PORT"] {
                assert!(text.contains(form), "{text}");
            }
        }
        for url in [
            "sqlite:",
            "file:",
            "etcd:",
            "etcd:h:1",
            "etcd://",
            "etcd://h:",
            "etcd://h:0",
            "etcd://h:65536",
            "etcd://h:1,",
            "etcd://a b:1",
            "etcd://:1",
            "etcd://h:1/x",
            "etcd://u@h:1",
            "etcd://http://h:1",
            "etcds:",
            "etcds:https://h:1",
            "etcd:http://h:1,h:2",
            "etcd:ftp://h:1",
            "etcd:http://h:1/x",
        ] {
            assert_eq!(error(url).exit_code(), 2, "{url}");
        }
        for url in [
            "etcd://h:1",
            "etcd://10.0.0.1:2379,[fd00::1]:2379",
            "etcd://h",
            "etcds://h:1,g:1",
            "etcd:http://h:1,https://g:1",
            "etcd:http://127.0.0.1:4001/",
        ] {
            assert!(open(url, &EtcdOptions::default()).is_ok(), "{url}");
        }
    }
}
