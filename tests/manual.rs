//! Pages of the manual and what shells complete: there for each command, and accepted by who reads them.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use muslin_lab::muslin_bin;
use muslin_lab::skip::skip;
use tempfile::TempDir;

fn muslin(words: &[&str]) -> String {
    let output = Command::new(muslin_bin()).args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The commands in the help of another.
fn below(words: &[&str]) -> Vec<String> {
    let help = muslin(&[words, &["--help"]].concat());
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = lines.take_while(|line| !line.is_empty());
    // A description may go on in the next line, further to the right.
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names = names.filter(|name| !name.is_empty() && *name != "help");
    names.map(str::to_owned).collect()
}

/// Gives a program a text to read.
fn feed(program: &str, words: &[&str], text: &str) -> std::io::Result<Output> {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::piped());
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().unwrap().write_all(text.as_bytes())?;
    child.wait_with_output()
}

#[test]
fn each_command_has_a_page() {
    let directory = TempDir::new().unwrap();
    let man = directory.path().join("man1");
    muslin(&["man", man.to_str().unwrap()]);
    let commands = below(&[]);
    assert!(commands.len() > 20, "{commands:?}");
    let cni = below(&["cni"]);
    let cni = cni.iter().map(|name| format!("cni-{name}"));
    let mut pages = vec!["muslin.1".to_owned()];
    for name in commands.iter().cloned().chain(cni) {
        pages.push(format!("muslin-{name}.1"));
    }
    for page in &pages {
        let text = std::fs::read_to_string(man.join(page)).unwrap();
        for part in [".SH NAME", ".SH SYNOPSIS", "Examples:"] {
            assert!(text.contains(part), "{page} has no {part}");
        }
        match feed("groff", &["-man", "-ww", "-z", "-Tutf8"], &text) {
            Ok(output) => assert!(output.stderr.is_empty(), "{page}: {output:?}"),
            Err(_) => skip("'groff' is missing"),
        }
    }
    let written = std::fs::read_dir(&man).unwrap().count();
    assert_eq!(written, pages.len(), "nothing else has one");
}

#[test]
fn each_command_is_completed() {
    let commands = below(&[]);
    for shell in ["bash", "zsh", "fish"] {
        let script = muslin(&["completions", shell]);
        for name in &commands {
            assert!(script.contains(name.as_str()), "{shell}: {name}");
        }
        assert!(!script.contains("attach-inside"), "{shell}: it is hidden");
        match feed(shell, &["-n"], &script) {
            Ok(output) => {
                assert!(output.status.success(), "{shell}: {output:?}");
                assert!(output.stderr.is_empty(), "{shell}: {output:?}");
            }
            Err(_) => skip(format!("'{shell}' is missing")),
        }
    }
}

#[test]
fn bash_completes_commands_options_and_values() {
    let script = muslin(&["completions", "bash"]);
    for (words, last, expected) in [
        ("muslin ev", "ev", "events"),
        ("muslin events --fo", "--fo", "--follow"),
        ("muslin events --kind pod-att", "pod-att", "pod-attached"),
        ("muslin cni uni", "uni", "uninstall"),
    ] {
        let before = words.split(' ').rev().nth(1).unwrap();
        let ask = format!(
            "{script}\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n\
             _muslin muslin '{last}' '{before}'; echo \"${{COMPREPLY[*]}}\""
        );
        let output = feed("bash", &["--norc", "-s"], &ask).unwrap();
        let completed = String::from_utf8_lossy(&output.stdout);
        assert_eq!(completed.trim(), expected, "{words}: {output:?}");
    }
}
