//! How a scene is measured: what a pod that does no harm sees while another floods.

use std::net::Ipv4Addr;
use std::time::Duration;

use muslin_bench::figures::Figure;
use muslin_bench::floods::{Flood, Targets};
use muslin_bench::load::RoundTrips;
use muslin_bench::samples::Samples;
use muslin_bench::window::{Ends, Process, sink, streams};
use muslin_lab::Host;

use crate::stage::{Scene, Stage};

/// Until a flood has filled what it fills.
const RISE: Duration = Duration::from_millis(500);
/// How long a flood goes on beside what is measured.
const RESERVE: Duration = Duration::from_secs(3);

/// Sets a scene up, measures it and takes it down; `false` where this machine has no labs.
pub(crate) fn scene(scene: Scene, duration: Duration, samples: &mut Samples<Scene>) -> bool {
    let Some(stage) = Stage::new(scene.system) else {
        return false;
    };
    match measure(&stage, scene.flood, duration) {
        Ok(values) => {
            for (figure, value) in values {
                samples.add(scene, figure, value);
            }
        }
        Err(why) => samples.fail(scene, &why),
    }
    true
}

fn measure(stage: &Stage, flood: Flood, duration: Duration) -> Result<Vec<(Figure, f64)>, String> {
    let Targets { here, there, .. } = stage.targets;
    let here = ends(&stage.victim, &stage.here, here);
    let there = ends(&stage.victim, &stage.there, there);
    // Everybody knows where everybody is before it begins.
    streams(&here, 1, Duration::from_millis(100))?;
    streams(&there, 1, Duration::from_millis(100))?;
    let seconds = RISE + duration * 2 + RESERVE;
    let mut flooder = start(&stage.flooder, flood, &stage.targets, seconds);
    std::thread::sleep(RISE);
    let (here_trips, there_trips) = round_trips(&here, &there, duration)?;
    let (rate, _) = streams(&here, 1, duration)?;
    if flooder.has_ended() {
        return Err("the flood ended before its time".to_owned());
    }
    let sent: u64 = flooder.hear()?;
    let lost = |trips: RoundTrips| trips.lost as f64 / (trips.lost + trips.count) as f64 * 100.0;
    Ok(vec![
        (Figure::HereP99, here_trips.p99),
        (Figure::HereLost, lost(here_trips)),
        (Figure::ThereP99, there_trips.p99),
        (Figure::ThereLost, lost(there_trips)),
        (Figure::TcpHere, rate),
        (Figure::Flooded, sent as f64 / seconds.as_secs_f64()),
    ])
}

fn ends(source: &Host, sink: &Host, address: Ipv4Addr) -> Ends {
    Ends {
        source: source.clone(),
        sink: sink.clone(),
        address,
    }
}

fn start(flooder: &Host, flood: Flood, to: &Targets, duration: Duration) -> Process {
    let addresses = [to.own, to.gateway, to.here, to.there, to.outside];
    let addresses = addresses.map(|address| address.to_string());
    let (kind, seconds) = (flood.name(), duration.as_secs_f64().to_string());
    let words = ["flood", &kind].into_iter();
    let words = words.chain(addresses.iter().map(String::as_str));
    let words: Vec<_> = words.chain([seconds.as_str()]).collect();
    Process::start(flooder, &words)
}

/// To both at once.
fn round_trips(
    here: &Ends,
    there: &Ends,
    duration: Duration,
) -> Result<(RoundTrips, RoundTrips), String> {
    let seconds = duration.as_secs_f64().to_string();
    let (_sinks, mut sources): (Vec<_>, Vec<_>) = [here, there]
        .into_iter()
        .map(|ends| {
            let (sink, address) = sink(ends, "echo-udp")?;
            let words = ["pace-udp", &address, &seconds];
            Ok((sink, Process::start(&ends.source, &words)))
        })
        .collect::<Result<Vec<_>, String>>()?
        .into_iter()
        .unzip();
    let mut hear = |index: usize| sources[index].hear();
    Ok((hear(0)?, hear(1)?))
}
