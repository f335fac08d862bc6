//! Certificates for tests.

use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tempfile::TempDir;

/// A CA, and a certificate for the loopback that it has signed.
pub struct Certificates {
    /// Where its files are: `ca.pem`, `cert.pem` and `key.pem`.
    pub directory: TempDir,
}

impl Certificates {
    /// Makes both, with new keys.
    pub fn generate() -> Self {
        let directory = TempDir::new().unwrap();
        let write = |name: &str, text: String| {
            std::fs::write(directory.path().join(name), text).unwrap();
        };
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(DnType::CommonName, "the CA");
        let ca_key = KeyPair::generate().unwrap();
        write("ca.pem", ca.self_signed(&ca_key).unwrap().pem());
        let mut leaf = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let leaf = leaf.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
        write("cert.pem", leaf.pem());
        write("key.pem", key.serialize_pem());
        Self { directory }
    }

    /// One of the files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}
