//! The `muslin` command.

fn main() -> std::process::ExitCode {
    muslin::cli::main()
}
