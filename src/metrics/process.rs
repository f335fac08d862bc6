//! What the kernel says of this process, under the names that all of Prometheus' clients have for it, and
//! of its packet threads.

use std::fs;
use std::time::Duration;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeVal;
use nix::unistd::{SysconfVar, sysconf};

use super::{Family, Value, counter, gauge, number};

/// How the packet threads are called, before their numbers.
const WORKER: &str = "worker-";

/// The process: processor time, memory, descriptors, threads and its start.
pub(crate) fn process() -> Vec<Family> {
    let stat = Stat::read();
    let value = |of: fn(&Stat) -> f64| stat.as_ref().map(|stat| Value::Gauge(of(stat)));
    let limit = getrlimit(Resource::RLIMIT_NOFILE);
    vec![
        counter(
            "process_cpu",
            "User and system CPU time of the process in seconds.",
        )
        .seconds()
        .may_be(cpu_time().map(Value::Sum)),
        gauge(
            "process_resident_memory",
            "Memory of the process that is resident, in bytes.",
        )
        .bytes()
        .may_be(value(|stat| stat.resident)),
        gauge(
            "process_virtual_memory",
            "Virtual memory of the process in bytes.",
        )
        .bytes()
        .may_be(value(|stat| stat.size)),
        gauge("process_open_fds", "Descriptors that are open.").may_be(descriptors().map(number)),
        gauge("process_max_fds", "Descriptors that may be open.")
            .may_be(limit.ok().map(|(soft, _)| number(soft))),
        gauge("process_threads", "Threads of the process.").may_be(value(|stat| stat.threads)),
        gauge(
            "process_start_time",
            "When the process began, in seconds since 1970.",
        )
        .seconds()
        .may_be(stat.as_ref().and_then(Stat::began).map(Value::Gauge)),
    ]
}

/// The processor time of each packet thread, busy polling included.
pub(crate) fn workers() -> Family {
    let family = counter(
        "muslin_worker_cpu",
        "CPU time of a packet thread in seconds, busy polling included.",
    );
    let mut times = worker_times();
    times.sort_unstable_by_key(|(worker, _)| *worker);
    family
        .seconds()
        .with(times.into_iter().map(|(worker, time)| {
            let labels = vec![("worker", worker.to_string())];
            (labels, Value::Sum(time.as_secs_f64()))
        }))
}

/// The packet threads by their numbers, with the time that each was on a processor.
fn worker_times() -> Vec<(u8, Duration)> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
    let times = tasks.flatten().filter_map(|task| {
        let read = |name| fs::read_to_string(task.path().join(name)).ok();
        let number = read("comm")?
            .trim_end()
            .strip_prefix(WORKER)?
            .parse()
            .ok()?;
        // Its first number; the kernel may have been built without it.
        let nanos = read("schedstat")?.split(' ').next()?.parse().ok()?;
        Some((number, Duration::from_nanos(nanos)))
    });
    times.collect()
}

fn cpu_time() -> Option<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Some(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// How many descriptors are open, without the one by which they are counted.
fn descriptors() -> Option<u64> {
    let all = fs::read_dir("/proc/self/fd").ok()?.count();
    u64::try_from(all.checked_sub(1)?).ok()
}

/// What `/proc/self/stat` says (proc_pid_stat(5)).
#[derive(Debug, PartialEq)]
struct Stat {
    threads: f64,
    /// Ticks of the clock since the machine began.
    started: f64,
    /// Bytes.
    size: f64,
    /// Bytes.
    resident: f64,
}

impl Stat {
    fn read() -> Option<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE).ok()??;
        Self::parse(&fs::read_to_string("/proc/self/stat").ok()?, page as f64)
    }

    fn parse(text: &str, page: f64) -> Option<Self> {
        // The second field is a name in parentheses, which may have both in it.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<_> = rest.split_whitespace().collect();
        // The first of these is the third of all.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self {
            threads: field(20)?,
            started: field(22)?,
            size: field(23)?,
            resident: field(24)? * page,
        })
    }

    /// When the process began, in seconds since 1970.
    fn began(&self) -> Option<f64> {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        let boot = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
        let ticks = sysconf(SysconfVar::CLK_TCK).ok()??;
        Some(boot.trim().parse::<f64>().ok()? + self.started / ticks as f64)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_name_with_a_parenthesis_is_no_field() {
        let text =
            "7 (a) R (b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 9 0 1234 4096000 300 18 1 1\n";
        let stat = Stat {
            threads: 9.0,
            started: 1234.0,
            size: 4_096_000.0,
            resident: 300.0 * 4096.0,
        };
        assert_eq!(Stat::parse(text, 4096.0), Some(stat));
        assert_eq!(Stat::parse("7 (a) R 1", 4096.0), None);
    }

    #[test]
    fn this_process_began_before_now_and_has_used_something() {
        let stat = Stat::read().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let began = stat.began().unwrap();
        assert!(
            (0.0..86_400.0).contains(&(now.as_secs_f64() + 1.0 - began)),
            "{began}"
        );
        assert!(
            stat.resident > 1e6 && stat.size >= stat.resident,
            "{stat:?}"
        );
        assert!(cpu_time().unwrap() > 0.0 && descriptors().unwrap() >= 3);
    }

    #[test]
    fn a_packet_thread_is_known_by_its_name() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name(format!("{WORKER}63"));
        let thread = thread.spawn(move || wait.recv()).unwrap();
        // A thread gives itself its name.
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !worker_times().iter().any(|(worker, _)| *worker == 63) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        drop(go);
        assert!(thread.join().unwrap().is_err());
    }
}
