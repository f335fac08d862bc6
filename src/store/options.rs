//! What a node is told of etcd, whether or not this build can ask it.

use std::fmt;
use std::path::PathBuf;

/// How a node proves to etcd who it is, and etcd to the node.
#[derive(Clone, Default)]
pub struct EtcdOptions {
    /// The CA that has signed the servers' certificates; those of the system otherwise.
    pub cafile: Option<PathBuf>,
    /// The node's certificate, for servers that ask for one.
    pub certfile: Option<PathBuf>,
    /// The key of that certificate.
    pub keyfile: Option<PathBuf>,
    /// The user of servers with users.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<String>,
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("cafile", &self.cafile)
            .field("certfile", &self.certfile)
            .field("keyfile", &self.keyfile)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}
