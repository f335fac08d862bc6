//! How a path to a server is measured.

use std::time::Duration;

use clap::ValueEnum;
use muslin_bench::figures::Figure;
use muslin_bench::load::Count;
use muslin_bench::samples::Samples;
use muslin_bench::window::{Process, sink, streams, streams_back};

use crate::stage::{Route, Stage};

/// Between two loads, so that nothing of the first is under way.
const PAUSE: Duration = Duration::from_millis(50);
/// Clients that open short connections.
const CLIENTS: &str = "4";
/// Connections that are open and idle. glibc's `fd_set`, which others may use, has 1,024.
const IDLE_FLOWS: u32 = 900;

/// What is put on a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// One stream to the server, and what it costs.
    UpX1,
    /// Four streams to the server.
    UpX4,
    /// One stream from the server, and what it costs.
    DownX1,
    /// Four streams from the server.
    DownX4,
    /// Connections for one request each.
    Flows,
    /// Idle connections.
    Idle,
}

impl Load {
    pub(crate) const ALL: [Self; 6] = [
        Self::UpX1,
        Self::UpX4,
        Self::DownX1,
        Self::DownX4,
        Self::Flows,
        Self::Idle,
    ];

    fn run(self, stage: &Stage, duration: Duration) -> Result<Vec<(Figure, f64)>, String> {
        let ends = &stage.ends;
        Ok(match self {
            Self::UpX1 => {
                let (rate, cpu) = streams(ends, 1, duration)?;
                vec![(Figure::TcpUpX1, rate), (Figure::CpuUp, cpu)]
            }
            Self::UpX4 => vec![(Figure::TcpUpX4, streams(ends, 4, duration)?.0)],
            Self::DownX1 => {
                let (rate, cpu) = streams_back(ends, 1, duration)?;
                vec![(Figure::TcpDownX1, rate), (Figure::CpuDown, cpu)]
            }
            Self::DownX4 => vec![(Figure::TcpDownX4, streams_back(ends, 4, duration)?.0)],
            Self::Flows => vec![(Figure::FlowRate, short_flows(stage, duration)?)],
            Self::Idle => idle(stage)?
                .map(|bytes| (Figure::FlowMemory, bytes / 1e3))
                .into_iter()
                .collect(),
        })
    }
}

/// Sets a path up, measures it and takes it down; `false` where this machine has no labs.
pub(crate) fn route(
    route: Route,
    loads: &[Load],
    duration: Duration,
    samples: &mut Samples<Route>,
) -> bool {
    let Some(mut stage) = Stage::new(route) else {
        return false;
    };
    for load in loads {
        std::thread::sleep(PAUSE);
        if *load == Load::Idle {
            // Memory that others have left behind would be used again.
            let Some(fresh) = Stage::new(route) else {
                return false;
            };
            stage = fresh;
        }
        match load.run(&stage, duration) {
            Ok(values) => {
                for (figure, value) in values {
                    samples.add(route, figure, value);
                }
            }
            Err(why) => samples.fail(route, &format!("{load:?}: {why}")),
        }
    }
    true
}

/// Connections per second, each with a request and its response.
fn short_flows(stage: &Stage, duration: Duration) -> Result<f64, String> {
    let (_sink, address) = sink(&stage.ends, "answer-tcp")?;
    let seconds = duration.as_secs_f64().to_string();
    let words = ["flows", &address, CLIENTS, &seconds];
    let count: Count = Process::start(&stage.ends.source, &words).hear()?;
    Ok(count.units as f64 / count.seconds)
}

/// Bytes of the carrier's memory that each idle connection takes, if there is a carrier.
fn idle(stage: &Stage) -> Result<Option<f64>, String> {
    let (_sink, address) = sink(&stage.ends, "echo-tcp")?;
    let before = stage.resident_bytes();
    let words = ["hold", &address, &IDLE_FLOWS.to_string()];
    let mut client = Process::start(&stage.ends.source, &words);
    let _: bool = client.hear()?;
    let after = stage.resident_bytes();
    let _: bool = client.finish()?;
    let grown = after.zip(before).map(|(after, before)| after - before);
    Ok(grown.map(|bytes| bytes / f64::from(IDLE_FLOWS)))
}
