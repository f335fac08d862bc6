//! What is measured.

/// What one number says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    TcpX1,
    TcpX4,
    TcpUpX1,
    TcpUpX4,
    TcpDownX1,
    TcpDownX4,
    FlowRate,
    Udp64,
    Udp64Lost,
    Udp1400,
    Udp1400Lost,
    AskTcpP50,
    AskTcpP99,
    AskUdpP50,
    AskUdpP99,
    CpuPerGigabyte,
    CpuUp,
    CpuDown,
    Memory,
    FlowMemory,
    HereP99,
    HereLost,
    ThereP99,
    ThereLost,
    TcpHere,
    Flooded,
}

impl Figure {
    pub const ALL: [Self; 26] = [
        Self::TcpX1,
        Self::TcpX4,
        Self::TcpUpX1,
        Self::TcpUpX4,
        Self::TcpDownX1,
        Self::TcpDownX4,
        Self::FlowRate,
        Self::Udp64,
        Self::Udp64Lost,
        Self::Udp1400,
        Self::Udp1400Lost,
        Self::AskTcpP50,
        Self::AskTcpP99,
        Self::AskUdpP50,
        Self::AskUdpP99,
        Self::CpuPerGigabyte,
        Self::CpuUp,
        Self::CpuDown,
        Self::Memory,
        Self::FlowMemory,
        Self::HereP99,
        Self::HereLost,
        Self::ThereP99,
        Self::ThereLost,
        Self::TcpHere,
        Self::Flooded,
    ];

    /// What it is called in JSON.
    pub fn key(self) -> &'static str {
        match self {
            Self::TcpX1 => "tcp_x1_gbit_per_second",
            Self::TcpX4 => "tcp_x4_gbit_per_second",
            Self::TcpUpX1 => "tcp_up_x1_gbit_per_second",
            Self::TcpUpX4 => "tcp_up_x4_gbit_per_second",
            Self::TcpDownX1 => "tcp_down_x1_gbit_per_second",
            Self::TcpDownX4 => "tcp_down_x4_gbit_per_second",
            Self::FlowRate => "short_flows_per_second",
            Self::FlowMemory => "memory_per_idle_flow_kilobytes",
            Self::CpuUp => "tcp_up_x1_cpu_seconds_per_gigabyte",
            Self::CpuDown => "tcp_down_x1_cpu_seconds_per_gigabyte",
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
            Self::HereP99 => "here_round_trip_p99_us",
            Self::HereLost => "here_lost_percent",
            Self::ThereP99 => "there_round_trip_p99_us",
            Self::ThereLost => "there_lost_percent",
            Self::TcpHere => "tcp_here_gbit_per_second",
            Self::Flooded => "flood_packets_per_second",
        }
    }

    /// What it is called for people, and its unit.
    pub fn title(self) -> (&'static str, &'static str) {
        match self {
            Self::TcpX1 => ("TCP x1", "Gbit/s"),
            Self::TcpX4 => ("TCP x4", "Gbit/s"),
            Self::TcpUpX1 => ("TCP up x1", "Gbit/s"),
            Self::TcpUpX4 => ("TCP up x4", "Gbit/s"),
            Self::TcpDownX1 => ("TCP down x1", "Gbit/s"),
            Self::TcpDownX4 => ("TCP down x4", "Gbit/s"),
            Self::FlowRate => ("short flows", "k/s"),
            Self::FlowMemory => ("idle flow", "kB"),
            Self::CpuUp => ("CPU, TCP up x1", "s/GB"),
            Self::CpuDown => ("CPU, TCP down x1", "s/GB"),
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
            Self::HereP99 => ("here p99", "us"),
            Self::HereLost => ("here lost", "%"),
            Self::ThereP99 => ("there p99", "us"),
            Self::ThereLost => ("there lost", "%"),
            Self::TcpHere => ("TCP here", "Gbit/s"),
            Self::Flooded => ("flood", "k/s"),
        }
    }

    /// The load that it is a figure of, by its name on the command line; the rest is measured without
    /// one.
    pub fn load(self) -> &'static str {
        match self {
            Self::TcpX1 | Self::CpuPerGigabyte => "tcp-x1",
            Self::TcpX4 => "tcp-x4",
            Self::TcpUpX1 | Self::CpuUp => "up-x1",
            Self::TcpUpX4 => "up-x4",
            Self::TcpDownX1 | Self::CpuDown => "down-x1",
            Self::TcpDownX4 => "down-x4",
            Self::FlowRate => "flows",
            Self::FlowMemory => "idle",
            Self::Udp64 | Self::Udp64Lost => "udp-64",
            Self::Udp1400 | Self::Udp1400Lost => "udp-1400",
            Self::AskTcpP50 | Self::AskTcpP99 => "ask-tcp",
            Self::AskUdpP50 | Self::AskUdpP99 => "ask-udp",
            Self::HereP99 | Self::HereLost | Self::ThereP99 | Self::ThereLost => "pace-udp",
            Self::TcpHere => "tcp-here",
            Self::Flooded => "flood",
            Self::Memory => "",
        }
    }

    /// Whether less of it is better.
    pub fn is_cost(self) -> bool {
        !matches!(
            self,
            Self::TcpX1
                | Self::TcpX4
                | Self::TcpUpX1
                | Self::TcpUpX4
                | Self::TcpDownX1
                | Self::TcpDownX4
                | Self::FlowRate
                | Self::Udp64
                | Self::Udp1400
                | Self::TcpHere
                | Self::Flooded
        )
    }

    /// What is better, for people.
    pub(crate) fn better(self) -> &'static str {
        if self.is_cost() { "less" } else { "more" }
    }

    /// A value in the unit for people.
    pub(crate) fn scale(self, value: f64) -> f64 {
        match self {
            Self::Udp64 | Self::Udp1400 | Self::FlowRate | Self::Flooded => value / 1e3,
            _ => value,
        }
    }

    /// The same with as many digits as it is worth.
    pub fn show(self, value: f64) -> String {
        let value = self.scale(value);
        let digits = match value {
            value if value >= 100.0 => 0,
            value if value >= 10.0 => 1,
            _ => 2,
        };
        format!("{value:.digits$}")
    }
}
