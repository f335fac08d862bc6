//! What a build can leave out, by Cargo features of the same names.

use crate::error::{Error, Result};

/// A part of the program that is there by a Cargo feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Feature {
    /// Leases in etcd.
    Etcd,
    /// The embedded store.
    Sqlite,
    /// `muslin sidecar`.
    Sidecar,
}

impl Feature {
    const ALL: [Self; 3] = [Self::Etcd, Self::Sqlite, Self::Sidecar];

    /// Its name in Cargo.toml.
    const fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Sqlite => "sqlite",
            Self::Sidecar => "sidecar",
        }
    }

    /// Whether this program has it.
    pub(crate) const fn is_built(self) -> bool {
        match self {
            Self::Etcd => cfg!(feature = "etcd"),
            Self::Sqlite => cfg!(feature = "sqlite"),
            Self::Sidecar => cfg!(feature = "sidecar"),
        }
    }

    /// Checks that this program has it.
    ///
    /// # Errors
    /// Bad usage that says what is missing.
    pub(crate) fn require(self) -> Result<()> {
        match self.is_built() {
            true => Ok(()),
            false => Err(self.missing()),
        }
    }

    /// What is said where it is asked for and missing.
    pub(crate) fn missing(self) -> Error {
        let name = self.name();
        Error::usage(format!(
            "this muslin was built without {name} (cargo feature `{name}`)"
        ))
    }
}

/// The program's version, and on a second line its features.
pub(crate) fn version() -> String {
    let built: Vec<_> = Feature::ALL
        .into_iter()
        .filter(|feature| feature.is_built())
        .map(Feature::name)
        .collect();
    let built = match built.as_slice() {
        [] => "none".to_owned(),
        names => names.join(" "),
    };
    format!("{}\nfeatures: {built}", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_in_one_line_as_wrong_usage() {
        for (feature, line) in [
            (
                Feature::Etcd,
                "this muslin was built without etcd (cargo feature `etcd`)",
            ),
            (
                Feature::Sqlite,
                "this muslin was built without sqlite (cargo feature `sqlite`)",
            ),
            (
                Feature::Sidecar,
                "this muslin was built without sidecar (cargo feature `sidecar`)",
            ),
        ] {
            let error = feature.missing();
            assert_eq!(error.to_string(), line);
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn the_default_features_are_all() {
        // Tests are always built with them.
        for feature in Feature::ALL {
            assert!(feature.require().is_ok(), "{feature:?}");
        }
        let version = version();
        assert!(
            version.ends_with("features: etcd sqlite sidecar"),
            "{version}"
        );
    }
}
