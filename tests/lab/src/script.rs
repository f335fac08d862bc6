//! Perl scripts that are clients and servers, and say by lines how far they are.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::Host;
use super::watch::{stretched, waits_for};

/// Until a line must have come; thousands of connections take their time.
const PATIENCE: Duration = Duration::from_secs(50);

/// A running script; killed on drop.
pub struct Script {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Script {
    /// Starts a script on a host and waits until it says that it is there.
    pub fn serve(host: &Host, script: &str, arguments: &[&str]) -> Self {
        let mut server = Self::start(host.command("perl"), script, arguments);
        server.expect("READY");
        server
    }

    /// Starts a script by a command of which only the arguments of `perl` are missing.
    pub fn start(mut command: Command, script: &str, arguments: &[&str]) -> Self {
        command.args(["-MSocket", "-e", script]).args(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // Nobody may listen any more.
                let _ = sender.send(line);
            }
        });
        Self {
            input: child.stdin.take().unwrap(),
            lines,
            child,
        }
    }

    /// Its next line.
    pub fn line(&mut self) -> String {
        waits_for("a line of a script");
        let line = self.lines.recv_timeout(stretched(PATIENCE));
        line.unwrap_or_else(|_| panic!("no line of a script: {:?}", self.child.try_wait()))
    }

    /// Waits for this line, which must be the next.
    pub fn expect(&mut self, wanted: &str) {
        assert_eq!(self.line(), wanted);
    }

    /// Lets it go on.
    pub fn go_on(&mut self) {
        self.input.write_all(b"\n").unwrap();
    }

    /// Ends it without a warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// 40 connections to a port of a host from itself, which say nothing and end with the script.
pub fn crowd(host: &Host, port: u16) -> Script {
    let script = r#"
        $| = 1; my @all;
        for (1 .. 40) {
            socket(my $s, PF_INET, SOCK_STREAM, 0); push @all, $s;
            connect($s, pack_sockaddr_in($ARGV[0], INADDR_LOOPBACK)) or die "connect: $!";
        }
        print "READY\n"; <STDIN>;"#;
    Script::serve(host, script, &[&port.to_string()])
}

impl Drop for Script {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
