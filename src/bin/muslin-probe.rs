//! The agent of the end-to-end tests, which sends and shows frames as they are. It belongs to no
//! installation, and must be given no capabilities.

use std::process::ExitCode;

fn main() -> ExitCode {
    match muslin::agent::probe() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muslin-probe: {error}");
            ExitCode::FAILURE
        }
    }
}
