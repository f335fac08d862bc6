//! `subnet.env`, where CNI plugins and Docker's helpers read the node's subnet, byte for byte as
//! flannel writes it.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_stack::api::subnet_env::{SubnetEnv, ipv6_subnet_of, subnet_of};
use tracing::warn;

use crate::error::{Context, Result};
use crate::replace::{directory, replace};

/// What is read of a file that should have a few lines.
const MAX_LENGTH: u64 = 64 << 10;

/// Replaces the file at once, and makes its directory where it is missing.
///
/// # Errors
/// If it cannot be written; what was there stays.
pub(super) fn write(env: &SubnetEnv, path: &Path) -> Result<()> {
    let write = || -> io::Result<()> {
        let dir = directory(path);
        DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        replace(path, env.to_string().as_bytes(), 0o644)
    };
    write().context(format!("cannot write {}", path.display()))
}

/// Writes the file, if it says what it said before.
///
/// # Errors
/// If it cannot be written.
pub(super) fn rewrite(env: &SubnetEnv, before: &SubnetEnv, path: &Path) -> Result<()> {
    match is_in(before, path) {
        true => write(env, path),
        false => Ok(()),
    }
}

/// Removes the file, if it says this still.
///
/// # Errors
/// If it cannot be removed.
pub(super) fn remove(env: &SubnetEnv, path: &Path) -> Result<()> {
    if !is_in(env, path) {
        return Ok(());
    }
    fs::remove_file(path).context(format!("cannot remove {}", path.display()))
}

fn is_in(env: &SubnetEnv, path: &Path) -> bool {
    matches!(fs::read_to_string(path), Ok(text) if text == env.to_string())
}

/// The subnet that a file names; nothing if there is no file, or none or several in it.
pub(super) fn previous_subnet(path: &Path) -> Option<Ipv4Net> {
    subnet_of(&read(path)?)
}

/// The same of IPv6.
pub(super) fn previous_ipv6_subnet(path: &Path) -> Option<Ipv6Net> {
    ipv6_subnet_of(&read(path)?)
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).and_then(|file| file.take(MAX_LENGTH).read_to_end(&mut bytes));
    if let Err(error) = file {
        if error.kind() != io::ErrorKind::NotFound {
            warn!(
                "cannot read the earlier subnet from {}: {error}",
                path.display()
            );
        }
        return None;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use muslin_stack::addresses::Dual;
    use proptest::prelude::*;

    use super::*;
    use crate::replace::tests::{file_on_a_full_disk, is_replaced, on_a_full_disk};

    fn ipv4() -> (Ipv4Net, Ipv4Net) {
        ["10.5.0.0/16", "10.5.72.0/24"]
            .map(|net| net.parse().unwrap())
            .into()
    }

    fn sample() -> SubnetEnv {
        SubnetEnv {
            subnets: Dual::with_ipv4(ipv4(), None),
            mtu: 1450,
            ip_masq: true,
        }
    }

    fn subnet(text: &str) -> Option<String> {
        subnet_of(text.as_bytes()).map(|subnet| subnet.to_string())
    }

    #[test]
    fn bytes_are_flannels() {
        assert_eq!(
            sample().to_string(),
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\n\
             FLANNEL_IPMASQ=true\n"
        );
    }

    #[test]
    fn lines_of_ipv6_are_where_flannel_has_them() {
        let mut env = sample();
        let (network, subnet) = ("fd00:5::/48", "fd00:5:0:72::/64");
        let ipv6 = (network.parse().unwrap(), subnet.parse().unwrap());
        env.subnets = Dual::with_ipv4(ipv4(), Some(ipv6));
        let text = env.to_string();
        assert_eq!(
            text,
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\n\
             FLANNEL_IPV6_NETWORK=fd00:5::/48\nFLANNEL_IPV6_SUBNET=fd00:5:0:72::1/64\n\
             FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(ipv6_subnet_of(text.as_bytes()), subnet.parse().ok());
        assert_eq!(ipv6_subnet_of(sample().to_string().as_bytes()), None);
        assert_eq!(subnet_of(text.as_bytes()), Some(ipv4().1));
        env.subnets = Dual::with_ipv6(ipv6);
        let text = env.to_string();
        assert_eq!(
            text,
            "FLANNEL_IPV6_NETWORK=fd00:5::/48\nFLANNEL_IPV6_SUBNET=fd00:5:0:72::1/64\n\
             FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(subnet_of(text.as_bytes()), None);
    }

    #[test]
    fn another_mtu_is_written_where_nobody_else_has_written() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("subnet.env");
        let (before, mut now) = (sample(), sample());
        now.mtu = 8950;
        write(&before, &path).unwrap();
        rewrite(&now, &before, &path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), now.to_string());
        rewrite(&before, &before, &path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), now.to_string());
    }

    #[test]
    fn what_is_written_is_read() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("run/flannel/subnet.env");
        assert_eq!(previous_subnet(&path), None);
        write(&sample(), &path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o644);
        assert_eq!(mode(path.parent().unwrap()) & 0o700, 0o700);
        assert_eq!(previous_subnet(&path), Some(ipv4().1));
        let mut other = sample();
        other.ip_masq = false;
        write(&other, &path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), other.to_string());
        let beside = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(beside, 1, "nothing is left beside it");
    }

    #[test]
    fn only_its_own_file_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("subnet.env");
        remove(&sample(), &path).unwrap();
        let mut other = sample();
        other.mtu = 1400;
        write(&other, &path).unwrap();
        remove(&sample(), &path).unwrap();
        assert!(path.exists());
        remove(&other, &path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_old_one() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("subnet.env");
        fs::create_dir(&path).unwrap();
        let error = write(&sample(), &path).unwrap_err().to_string();
        assert!(error.contains("subnet.env"), "{error}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        assert_eq!(previous_subnet(&path), None);
    }

    #[test]
    fn who_reads_it_finds_it_whole() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("subnet.env");
        let mut other = sample();
        let (network, _) = ipv4();
        other.subnets = Dual::with_ipv4((network, "10.5.7.0/24".parse().unwrap()), None);
        is_replaced(&path, |which| {
            let env = if which { sample() } else { other.clone() };
            write(&env, &path).unwrap();
        });
    }

    #[test]
    fn a_full_disk_leaves_the_old_file() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("subnet.env");
        write(&sample(), &path).unwrap();
        on_a_full_disk("flannel::subnet_env::tests::writing_on_a_full_disk", &path);
    }

    #[test]
    #[ignore = "the part in a process that cannot write"]
    fn writing_on_a_full_disk() {
        let Some(path) = file_on_a_full_disk() else {
            return;
        };
        let mut other = sample();
        other.mtu = 1400;
        let error = write(&other, &path).unwrap_err().to_string();
        assert!(error.contains("subnet.env"), "{error}");
    }

    #[test]
    fn u17_one_valid_subnet_counts() {
        for (text, expected) in [
            ("FLANNEL_SUBNET=10.5.72.1/24", Some("10.5.72.0/24")),
            ("FLANNEL_SUBNET=\"10.5.72.1/24\"\r\n", Some("10.5.72.0/24")),
            (
                "export FLANNEL_SUBNET='10.5.72.1/24' # ours\n",
                Some("10.5.72.0/24"),
            ),
            (
                "FLANNEL_SUBNET=10.5.72.1/24,nonsense,",
                Some("10.5.72.0/24"),
            ),
            (
                "FLANNEL_SUBNET=fd00::1/64,10.5.72.1/24",
                Some("10.5.72.0/24"),
            ),
            (
                "no line\n=\nFLANNEL_SUBNET=10.5.72.1/24\n",
                Some("10.5.72.0/24"),
            ),
            (
                "FLANNEL_SUBNET=10.1.1.1/24\nFLANNEL_SUBNET=10.2.2.1/24",
                Some("10.2.2.0/24"),
            ),
            ("FLANNEL_SUBNET=10.1.1.1/24,10.2.2.1/24", None),
            ("FLANNEL_SUBNET=nonsense,10.300.0.1/24", None),
            ("FLANNEL_SUBNET=10.5.72.1/33", None),
            ("FLANNEL_SUBNET=10.5.72.1", None),
            ("FLANNEL_SUBNET=", None),
            ("FLANNEL_SUBNET", None),
            ("FLANNEL_NETWORK=10.5.0.0/16", None),
            ("", None),
        ] {
            assert_eq!(subnet(text).as_deref(), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn u17_no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = subnet_of(&bytes);
        }

        #[test]
        fn u17_no_value_makes_it_panic(value in r#"[0-9./,"'\\$\{\}# \n=a-f:-]{0,60}"#) {
            let _ = subnet_of(format!("FLANNEL_SUBNET={value}\n").as_bytes());
        }

        #[test]
        fn what_is_written_is_always_read(base: u32, len in 2u8..=30, mtu: u16, ip_masq: bool) {
            let subnet = Ipv4Net::new(base.into(), len).unwrap().trunc();
            let env = SubnetEnv { subnets: Dual::with_ipv4((subnet, subnet), None), mtu, ip_masq };
            prop_assert_eq!(subnet_of(env.to_string().as_bytes()), Some(subnet));
        }
    }
}
