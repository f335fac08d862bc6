//! How a path between pods is measured.

use std::time::Duration;

use clap::ValueEnum;
use muslin_bench::figures::Figure;
use muslin_bench::iperf3;
use muslin_bench::load::RoundTrips;
use muslin_bench::pods::UNDERLAY;
use muslin_bench::samples::Samples;
use muslin_bench::window::{Process, sink, streams, window};
use muslin_bench::wire::Way;
use muslin_lab::Host;

use crate::stage::{Case, IdleNode, Route, Stage};

/// Traffic to see how large frames of the underlay are.
const LOOK: Duration = Duration::from_millis(200);
/// What a wire carries: 1,500 bytes and an Ethernet header.
const LARGEST_FRAME: &str = "1514";
/// Between two loads, so that nothing of the first is under way.
const PAUSE: Duration = Duration::from_millis(50);
/// Pods of the idle node.
const IDLE_PODS: usize = 10;
/// Until a node that got pods is idle.
const REST: Duration = Duration::from_secs(1);
/// A share of lost requests that is still an answer.
const MAX_LOST: f64 = 0.01;

/// What is put on a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// One stream, and what it costs.
    TcpX1,
    /// Four streams.
    TcpX4,
    /// A request and its response after the other, on one connection.
    AskTcp,
    /// The same by datagrams.
    AskUdp,
    /// A flood of small datagrams.
    #[value(name = "udp-64")]
    Udp64,
    /// A flood of large ones.
    #[value(name = "udp-1400")]
    Udp1400,
}

/// Who makes streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Generator {
    /// The benchmark.
    Own,
    /// iperf3, which says nothing of what they cost.
    Iperf3,
}

impl Load {
    /// All, floods last: they leave full queues behind.
    pub(crate) const ALL: [Self; 6] = [
        Self::TcpX1,
        Self::TcpX4,
        Self::AskTcp,
        Self::AskUdp,
        Self::Udp64,
        Self::Udp1400,
    ];

    pub(crate) fn is_of_streams(self) -> bool {
        matches!(self, Self::TcpX1 | Self::TcpX4)
    }

    fn run_iperf3(self, stage: &Stage, duration: Duration) -> Result<Vec<(Figure, f64)>, String> {
        let (figure, count) = match self {
            Self::TcpX1 => (Figure::TcpX1, 1),
            Self::TcpX4 => (Figure::TcpX4, 4),
            _ => return Err("not a load of iperf3's".to_owned()),
        };
        let rate = iperf3::streams(&stage.ends, count, duration)?;
        Ok(vec![(figure, rate)])
    }

    fn run(self, stage: &Stage, duration: Duration) -> Result<Vec<(Figure, f64)>, String> {
        match self {
            Self::TcpX1 => {
                let (rate, cpu) = streams(&stage.ends, 1, duration)?;
                let cost = (Figure::CpuPerGigabyte, cpu);
                Ok(vec![(Figure::TcpX1, rate), cost])
            }
            Self::TcpX4 => {
                let (rate, _) = streams(&stage.ends, 4, duration)?;
                Ok(vec![(Figure::TcpX4, rate)])
            }
            Self::AskTcp => {
                let trips = ask(stage, "tcp", duration)?;
                Ok(vec![
                    (Figure::AskTcpP50, trips.p50),
                    (Figure::AskTcpP99, trips.p99),
                ])
            }
            Self::AskUdp => {
                let trips = ask(stage, "udp", duration)?;
                Ok(vec![
                    (Figure::AskUdpP50, trips.p50),
                    (Figure::AskUdpP99, trips.p99),
                ])
            }
            Self::Udp64 => {
                let (rate, lost) = datagrams(stage, 64, duration)?;
                Ok(vec![(Figure::Udp64, rate), (Figure::Udp64Lost, lost)])
            }
            Self::Udp1400 => {
                let (rate, lost) = datagrams(stage, 1400, duration)?;
                Ok(vec![(Figure::Udp1400, rate), (Figure::Udp1400Lost, lost)])
            }
        }
    }
}

/// Sets a path up, measures it and takes it down; `false` where this machine has no labs.
pub(crate) fn case(
    case: Case,
    loads: &[Load],
    generator: Generator,
    duration: Duration,
    samples: &mut Samples<Case>,
) -> bool {
    if case.route == Route::Memory {
        let Some(idle) = IdleNode::new(IDLE_PODS) else {
            return false;
        };
        std::thread::sleep(REST);
        samples.add(case, Figure::Memory, idle.resident_megabytes());
        return true;
    }
    let Some(stage) = Stage::new(case) else {
        return false;
    };
    if let Err(why) = check(&stage, case) {
        samples.fail(case, &why);
        return true;
    }
    for load in loads {
        std::thread::sleep(PAUSE);
        let run = match generator {
            Generator::Own => Load::run,
            Generator::Iperf3 => Load::run_iperf3,
        };
        match run(*load, &stage, duration) {
            Ok(values) => {
                for (figure, value) in values {
                    samples.add(case, figure, value);
                }
            }
            Err(why) => samples.fail(case, &format!("{load:?}: {why}")),
        }
    }
    true
}

/// Datagrams per second that arrived, and the share in percent of those sent that did not.
fn datagrams(stage: &Stage, size: usize, duration: Duration) -> Result<(f64, f64), String> {
    let window = window(&stage.ends, "udp", &size.to_string(), duration)?;
    let arrived = window.sink.per_second();
    let sent = window.source.ok_or("the source does not count")?;
    // The two count one after the other, and what waited in queues before arrives as well.
    let lost = (1.0 - arrived / sent.per_second()).max(0.0);
    Ok((arrived, lost * 100.0))
}

fn ask(stage: &Stage, kind: &str, duration: Duration) -> Result<RoundTrips, String> {
    let (_sink, address) = sink(&stage.ends, &format!("echo-{kind}"))?;
    let seconds = duration.as_secs_f64().to_string();
    let question = format!("ask-{kind}");
    let words = [question.as_str(), &address, &seconds];
    let trips: RoundTrips = Process::start(&stage.ends.source, &words).hear()?;
    let asked = trips.count + trips.lost;
    if trips.count == 0 || trips.lost as f64 > asked as f64 * MAX_LOST {
        return Err(format!("{} of {asked} requests were lost", trips.lost));
    }
    Ok(trips)
}

/// Sends a little to warm up, and looks whether superpackets cross the underlay.
fn check(stage: &Stage, case: Case) -> Result<(), String> {
    let Some(underlay) = case.underlay else {
        return window(&stage.ends, "tcp", "1", LOOK).map(drop);
    };
    let [mut left, mut arrived] = [
        count_giants(&stage.hosts[0], Way::Out)?,
        count_giants(&stage.hosts[1], Way::In)?,
    ];
    window(&stage.ends, "tcp", "1", LOOK)?;
    let (left, arrived): (u64, u64) = (left.finish()?, arrived.finish()?);
    if !underlay.lets_giants_leave() && left > 0 {
        return Err(format!("{left} frames above the MTU left the sender"));
    }
    if !underlay.has_giants_arrive() && arrived > 0 {
        return Err(format!("{arrived} frames above the MTU crossed the wire"));
    }
    // It is known for the kernel's: who sees none of them would see none where none may be. On a card
    // they say that its receiver merges.
    let is_known = matches!(case.route, Route::KernelVxlan | Route::KernelHostGw);
    let is_missed =
        underlay.lets_giants_leave() && left == 0 || underlay.has_giants_arrive() && arrived == 0;
    if is_known && is_missed {
        return Err("no frame above the MTU was seen where they must be".to_owned());
    }
    Ok(())
}

/// Starts to count frames above the MTU on a host's end of the underlay.
fn count_giants(host: &Host, way: Way) -> Result<Process, String> {
    let words = ["count-giants", UNDERLAY, way.name(), LARGEST_FRAME];
    let mut counter = Process::start(host, &words);
    let _: bool = counter.hear()?;
    Ok(counter)
}
