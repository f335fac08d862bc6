//! What is measured, how it is summed up, and what it must be.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::stage::{Case, Route, Underlay};

/// What one number says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Figure {
    TcpX1,
    TcpX4,
    Udp64,
    Udp64Lost,
    Udp1400,
    Udp1400Lost,
    AskTcpP50,
    AskTcpP99,
    AskUdpP50,
    AskUdpP99,
    CpuPerGigabyte,
    Memory,
}

impl Figure {
    pub(crate) const ALL: [Self; 12] = [
        Self::TcpX1,
        Self::TcpX4,
        Self::Udp64,
        Self::Udp64Lost,
        Self::Udp1400,
        Self::Udp1400Lost,
        Self::AskTcpP50,
        Self::AskTcpP99,
        Self::AskUdpP50,
        Self::AskUdpP99,
        Self::CpuPerGigabyte,
        Self::Memory,
    ];

    /// What it is called in JSON.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::TcpX1 => "tcp_x1_gbit_per_second",
            Self::TcpX4 => "tcp_x4_gbit_per_second",
            Self::Udp64 => "udp_64_delivered_per_second",
            Self::Udp64Lost => "udp_64_lost_percent",
            Self::Udp1400 => "udp_1400_delivered_per_second",
            Self::Udp1400Lost => "udp_1400_lost_percent",
            Self::AskTcpP50 => "tcp_round_trip_p50_us",
            Self::AskTcpP99 => "tcp_round_trip_p99_us",
            Self::AskUdpP50 => "udp_round_trip_p50_us",
            Self::AskUdpP99 => "udp_round_trip_p99_us",
            Self::CpuPerGigabyte => "tcp_x1_cpu_seconds_per_gigabyte",
            Self::Memory => "idle_memory_megabytes",
        }
    }

    /// What it is called for people, and its unit.
    pub(crate) fn title(self) -> (&'static str, &'static str) {
        match self {
            Self::TcpX1 => ("TCP x1", "Gbit/s"),
            Self::TcpX4 => ("TCP x4", "Gbit/s"),
            Self::Udp64 => ("UDP 64 B", "k/s"),
            Self::Udp64Lost => ("UDP 64 B lost", "%"),
            Self::Udp1400 => ("UDP 1400 B", "k/s"),
            Self::Udp1400Lost => ("UDP 1400 B lost", "%"),
            Self::AskTcpP50 => ("TCP req/resp p50", "us"),
            Self::AskTcpP99 => ("TCP req/resp p99", "us"),
            Self::AskUdpP50 => ("UDP req/resp p50", "us"),
            Self::AskUdpP99 => ("UDP req/resp p99", "us"),
            Self::CpuPerGigabyte => ("CPU, TCP x1", "s/GB"),
            Self::Memory => ("idle, 10 pods", "MB"),
        }
    }

    /// Whether less of it is better.
    pub(crate) fn is_cost(self) -> bool {
        !matches!(
            self,
            Self::TcpX1 | Self::TcpX4 | Self::Udp64 | Self::Udp1400
        )
    }

    /// A value in the unit for people, with as many digits as it is worth.
    pub(crate) fn show(self, value: f64) -> String {
        let value = match self {
            Self::Udp64 | Self::Udp1400 => value / 1e3,
            _ => value,
        };
        let digits = match value {
            value if value >= 100.0 => 0,
            value if value >= 10.0 => 1,
            _ => 2,
        };
        format!("{value:.digits$}")
    }
}

/// All rounds' values of one figure.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    values: Vec<f64>,
}

impl Summary {
    fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted[sorted.len() / 2];
        let lower = sorted[(sorted.len() - 1) / 2];
        Some(Self {
            median: f64::midpoint(lower, upper),
            min,
            max,
            values: values.to_vec(),
        })
    }
}

/// All values of a run, and what went wrong.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    values: BTreeMap<(Case, Figure), Vec<f64>>,
    failures: Vec<String>,
}

impl Samples {
    pub(crate) fn add(&mut self, case: Case, figure: Figure, value: f64) {
        self.values.entry((case, figure)).or_default().push(value);
    }

    pub(crate) fn fail(&mut self, why: String) {
        self.failures.push(why);
    }

    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }

    pub(crate) fn summary(&self, case: Case, figure: Figure) -> Option<Summary> {
        Summary::of(self.values.get(&(case, figure))?)
    }

    pub(crate) fn has(&self, case: Case) -> bool {
        self.values.keys().any(|(of, _)| *of == case)
    }
}

/// A figure that is compared with another, or with a number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Comparison {
    pub(crate) figure: Figure,
    pub(crate) ours: Case,
    /// Without it the figure counts as it is.
    pub(crate) theirs: Option<Case>,
    /// What it must be, and what it is to become.
    pub(crate) goal: Option<(f64, f64)>,
}

impl Comparison {
    /// The ratio of medians, if all was measured.
    pub(crate) fn value(&self, samples: &Samples) -> Option<f64> {
        let ours = samples.summary(self.ours, self.figure)?.median;
        match self.theirs {
            Some(theirs) => Some(ours / samples.summary(theirs, self.figure)?.median),
            None => Some(ours),
        }
    }

    /// Whether a value is what it must be.
    pub(crate) fn is_met(&self, value: f64) -> Option<bool> {
        let (must, _) = self.goal?;
        Some(if self.figure.is_cost() {
            value <= must
        } else {
            value >= must
        })
    }

    /// All that are of interest.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for underlay in [Underlay::Veth, Underlay::DumbWire] {
            all.extend(against_kernel(underlay));
        }
        for underlay in [Underlay::Veth, Underlay::DumbWire] {
            let ours = Route::MuslinHostGw.on(underlay);
            all.extend(beside_kernel(ours, Route::KernelHostGw.on(underlay)));
        }
        for underlay in [Underlay::Veth, Underlay::DumbWire] {
            let ours = Route::MuslinUdp.on(underlay);
            let theirs = Some(Route::MuslinVxlan.on(underlay));
            all.push(Self {
                figure: Figure::TcpX1,
                ours,
                theirs,
                goal: Some((0.95, 1.05)),
            });
        }
        all.extend(beside_kernel(
            Route::MuslinNode.alone(),
            Route::KernelBridge.alone(),
        ));
        all.push(Self {
            figure: Figure::Memory,
            ours: Route::Memory.alone(),
            theirs: None,
            goal: Some((40.0, 15.0)),
        });
        all
    }
}

/// VXLAN by muslin and by the kernel.
fn against_kernel(underlay: Underlay) -> impl Iterator<Item = Comparison> {
    let is_veth = underlay == Underlay::Veth;
    let goals = [
        (Figure::TcpX1, Some((0.5, 1.0))),
        (Figure::TcpX4, is_veth.then_some((0.5, 1.0))),
        (Figure::Udp64, Some((1.0, 1.5))),
        (Figure::Udp1400, None),
        (Figure::AskTcpP50, Some((3.0, 1.5))),
        (Figure::AskUdpP50, None),
        (Figure::CpuPerGigabyte, None),
    ];
    goals.into_iter().map(move |(figure, goal)| Comparison {
        figure,
        ours: Route::MuslinVxlan.on(underlay),
        theirs: Some(Route::KernelVxlan.on(underlay)),
        goal,
    })
}

/// A path without a tunnel, by muslin and by the kernel.
fn beside_kernel(ours: Case, theirs: Case) -> impl Iterator<Item = Comparison> {
    let goals = [
        (Figure::TcpX1, Some((0.5, 1.0))),
        (Figure::TcpX4, None),
        (Figure::Udp64, None),
        (Figure::AskTcpP50, None),
        (Figure::CpuPerGigabyte, None),
    ];
    goals.into_iter().map(move |(figure, goal)| Comparison {
        figure,
        ours,
        theirs: Some(theirs),
        goal,
    })
}
