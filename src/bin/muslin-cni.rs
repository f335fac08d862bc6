//! The CNI plugin, which container runtimes start: small, and without an asynchronous runtime.

use std::process::ExitCode;

fn main() -> ExitCode {
    muslin::cni::main()
}
