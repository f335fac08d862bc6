//! The machine: what it is, and how busy.

use std::fmt;
use std::fs::read_to_string;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

/// How long to look whether others are busy.
const LOOK: Duration = Duration::from_millis(300);

/// What figures depend on.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub(crate) kernel: String,
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) load: String,
}

impl Machine {
    pub fn look() -> Self {
        let text = |path: &str| read_to_string(path).unwrap_or_default().trim().to_owned();
        let cpuinfo = text("/proc/cpuinfo");
        let processor = cpuinfo.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then(|| value.trim().to_owned())
        });
        Self {
            kernel: text("/proc/sys/kernel/osrelease"),
            processor: processor.unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            load: text("/proc/loadavg"),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kernel,
            processor,
            cores,
            load,
        } = self;
        write!(
            f,
            "Linux {kernel}, {cores} cores ({processor}), load {load}"
        )
    }
}

/// Resident memory of a process.
pub fn resident_bytes(pid: u32) -> f64 {
    let text = read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
    kibibytes.parse::<f64>().unwrap() * 1024.0
}

/// Processor time of the whole machine since it was started, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct CpuTime {
    busy: f64,
    idle: f64,
}

impl CpuTime {
    pub fn now() -> Self {
        let text = read_to_string("/proc/stat").unwrap();
        let ticks: Vec<f64> = text
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .map(|word| word.parse().unwrap())
            .collect();
        // User, nice, system, idle, waiting, interrupts, soft interrupts; later ones are no work of
        // this machine or counted already.
        let [user, nice, system, idle, waiting, hard, soft, ..] = ticks[..] else {
            panic!("/proc/stat: {text}");
        };
        let per_second = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap() as f64;
        Self {
            busy: (user + nice + system + hard + soft) / per_second,
            idle: (idle + waiting) / per_second,
        }
    }

    /// Seconds in which processors worked since then.
    pub fn busy_since(self, earlier: Self) -> f64 {
        self.busy - earlier.busy
    }

    /// The share of all processors' time that was work since then.
    pub fn share_since(self, earlier: Self) -> f64 {
        let (busy, idle) = (self.busy - earlier.busy, self.idle - earlier.idle);
        if busy + idle > 0.0 {
            busy / (busy + idle)
        } else {
            0.0
        }
    }
}

/// Looks what others do while nothing is measured, says so if it is more than that share, and
/// returns it.
pub fn warn_if_busy(share: f64) -> f64 {
    let before = CpuTime::now();
    std::thread::sleep(LOOK);
    let others = CpuTime::now().share_since(before);
    if others > share {
        eprintln!(
            "warning: others keep the machine busy ({:.0} %): figures are not worth much",
            others * 100.0
        );
    }
    others
}
