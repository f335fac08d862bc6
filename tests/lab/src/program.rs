//! Where the programs under test are.

use std::sync::LazyLock;

static MUSLIN: LazyLock<String> = LazyLock::new(|| find("muslin"));
static PROBE: LazyLock<String> = LazyLock::new(|| find("muslin-probe"));
static CNI: LazyLock<String> = LazyLock::new(|| find("muslin-cni"));
static NETAVARK: LazyLock<String> = LazyLock::new(|| find("muslin-netavark"));

/// The program under test.
///
/// # Panics
/// If it has not been built.
pub fn muslin_bin() -> &'static str {
    &MUSLIN
}

/// The agent in pods and on hosts.
///
/// # Panics
/// If it has not been built.
pub fn probe_bin() -> &'static str {
    &PROBE
}

/// The plugin of container runtimes.
///
/// # Panics
/// If it has not been built.
pub fn cni_bin() -> &'static str {
    &CNI
}

/// The plugin of netavark.
///
/// # Panics
/// If it has not been built.
pub fn netavark_bin() -> &'static str {
    &NETAVARK
}

/// The path of a program of this project: cargo tells tests and benchmarks (since 1.94); where one is
/// started by hand, the program is in the directory above its own, `target/debug/deps`.
fn find(name: &str) -> String {
    let variable = format!("CARGO_BIN_EXE_{name}");
    if let Ok(path) = std::env::var(&variable) {
        return path;
    }
    let test = std::env::current_exe().unwrap();
    let above = test.parent().and_then(|deps| deps.parent());
    let path = above.map(|directory| directory.join(name));
    match path.filter(|path| path.is_file()) {
        Some(path) => path.to_str().unwrap().to_owned(),
        None => panic!(
            "{variable} is not set, and '{name}' is not in the directory above {}: run 'cargo build'",
            test.display()
        ),
    }
}
