//! The plugin that netavark starts for Podman's networks.

use std::process::ExitCode;

fn main() -> ExitCode {
    muslin::cni::netavark::main()
}
