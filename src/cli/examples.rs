//! Examples in `--help` and in the manual, one at least for each command.

use std::fmt::Write;

use clap::Command;

/// For the words of each command its examples.
const EXAMPLES: &[(&[&str], &[&str])] = &[
    (
        &[],
        &[
            "muslin demo",
            "muslin run -- ping -c 3 10.244.7.2",
            "muslin status",
        ],
    ),
    (&["demo"], &["muslin demo --megabytes 10"]),
    (
        &["node"],
        &[
            "muslin node",
            "muslin node --store etcd://10.9.0.1:2379 --public-ip 10.9.0.2",
            "muslin node --trace-secret-file /etc/muslin/trace-secret",
        ],
    ),
    (
        &["run"],
        &[
            "muslin run bash",
            "muslin run -d --name web -p 8080:80 -- python3 -m http.server 80",
        ],
    ),
    (&["exec"], &["muslin exec web ip address"]),
    (&["logs"], &["muslin logs --follow web"]),
    (&["stop"], &["muslin stop --time 3 web database"]),
    (&["rm"], &["muslin rm web"]),
    (
        &["sidecar"],
        &["muslin sidecar --store etcd://10.9.0.1:2379 --socks5 1080"],
    ),
    (&["attach"], &["muslin attach --pid 4711 --name web"]),
    (&["detach"], &["muslin detach web"]),
    (&["cni"], &["sudo muslin cni install"]),
    (&["cni", "install"], &["sudo muslin cni install --wait"]),
    (&["cni", "uninstall"], &["sudo muslin cni uninstall"]),
    (
        &["cni", "prepare"],
        &[
            "sudo muslin cni prepare --socket /run/muslin/node.sock --state-dir /var/lib/muslin --owner 1000",
        ],
    ),
    (&["cni", "reattach"], &["sudo muslin cni reattach"]),
    (&["keep"], &["muslin keep --socket /run/muslin/keep.sock"]),
    (&["host-interface"], &["sudo muslin host-interface"]),
    (
        &["status"],
        &["muslin status --watch", "muslin status --json"],
    ),
    (&["pods"], &["muslin pods --watch 5"]),
    (&["peers"], &["muslin peers"]),
    (
        &["leases"],
        &["muslin leases", "muslin leases --drop 10.244.7.0/24"],
    ),
    (&["routes"], &["muslin routes --json"]),
    (&["neighbours"], &["muslin neighbours"]),
    (
        &["drops"],
        &[
            "muslin drops --watch",
            "muslin drops --reason no-route --reason storm",
        ],
    ),
    (&["flows"], &["muslin flows --pod web"]),
    (&["groups"], &["muslin groups"]),
    (&["top"], &["muslin top -d 0.5"]),
    (
        &["ping"],
        &[
            "muslin ping db.n2",
            "muslin ping --from web --mtu 10.244.7.2",
        ],
    ),
    (
        &["events"],
        &[
            "muslin events --since 2h",
            "muslin events --follow --kind peer-lost --kind store-away",
        ],
    ),
    (
        &["trace"],
        &[
            "muslin trace web db",
            "muslin trace web db.n2 --dport 5432 --size 1500 --df",
            "muslin trace web 192.0.2.7 --proto udp --dport 53",
            "muslin trace web db --live --proto icmp --count 5",
        ],
    ),
    (
        &["capture"],
        &[
            "muslin capture -w web.pcapng --pod web tcp port 80",
            "muslin capture -w dropped.pcapng --dropped --duration 60",
            "muslin capture -w - --segments --hook to-tunnel | tshark -i -",
        ],
    ),
    (
        &["page"],
        &["muslin page", "muslin page --listen 127.0.0.1:9000"],
    ),
    (&["doctor"], &["muslin doctor"]),
    (&["leave"], &["muslin leave --node n1"]),
    (
        &["completions"],
        &["muslin completions bash > ~/.local/share/bash-completion/completions/muslin"],
    ),
    (&["man"], &["muslin man ~/.local/share/man/man1"]),
];

/// The same command with examples behind its options, and so its subcommands.
pub(super) fn add(command: Command) -> Command {
    add_below(command, &mut Vec::new())
}

fn add_below(command: Command, path: &mut Vec<String>) -> Command {
    let mut command = match examples(path) {
        [] => command,
        examples => with_examples(command, examples),
    };
    let names = command.get_subcommands().map(|it| it.get_name().to_owned());
    for name in names.collect::<Vec<_>>() {
        path.push(name.clone());
        command = command.mut_subcommand(name, |it| add_below(it, path));
        path.pop();
    }
    command
}

fn examples(path: &[String]) -> &'static [&'static str] {
    let found = EXAMPLES.iter().find(|(words, _)| path == *words);
    found.map_or(&[], |(_, examples)| examples)
}

fn with_examples(command: Command, examples: &[&str]) -> Command {
    let mut help = "Examples:".to_owned();
    for example in examples {
        let _ = write!(help, "\n  {example}");
    }
    if let Some(before) = command.get_after_help() {
        let _ = write!(help, "\n\n{before}");
    }
    command.after_help(help)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls it with each command that is not hidden, and its words.
    fn walk(
        command: &Command,
        path: &mut Vec<String>,
        visit: &mut impl FnMut(&Command, &[String]),
    ) {
        visit(command, path);
        for below in command.get_subcommands().filter(|it| !it.is_hide_set()) {
            path.push(below.get_name().to_owned());
            walk(below, path, visit);
            path.pop();
        }
    }

    #[test]
    fn each_command_has_an_example_in_its_help() {
        let mut count = 0;
        walk(
            &super::super::command(),
            &mut Vec::new(),
            &mut |command, path| {
                count += 1;
                let help = command.clone().render_long_help().to_string();
                assert!(help.contains("Examples:\n  "), "{path:?} has none:\n{help}");
            },
        );
        assert!(count > 25, "{count}");
    }

    #[test]
    fn examples_are_of_their_command_and_are_parsed() {
        for (path, examples) in EXAMPLES {
            for example in *examples {
                let line = example.split(" > ").next().unwrap();
                let line = line.strip_prefix("sudo ").unwrap_or(line);
                let words: Vec<_> = line.split(' ').collect();
                assert_eq!(words[0], "muslin");
                assert!(words[1..].starts_with(path), "{example}");
                let parsed = super::super::command().try_get_matches_from(words);
                assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
            }
        }
    }
}
