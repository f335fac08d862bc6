//! Metrics for Prometheus: families of samples of one moment, in its text format and in OpenMetrics.

mod bounded;
mod process;

use std::fmt;
use std::sync::Arc;

pub(crate) use bounded::{Both, MOST, Shares};
pub(crate) use process::{process, workers};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

/// Labels of a sample: names and values.
pub(crate) type Labels = Vec<(&'static str, String)>;

/// What a sample says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// A count since the node's process began.
    Counter(u64),
    /// A sum since then.
    Sum(f64),
    /// What is so now.
    Gauge(f64),
    /// Nothing but its labels.
    Info,
    /// How often which values were seen.
    Histogram {
        /// The sum of all values.
        sum: f64,
        /// Each class' upper bound with the number of values in it alone, the last one without a bound.
        classes: Vec<(f64, u64)>,
    },
}

/// Metrics of one name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Family {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    samples: Vec<(Labels, Value)>,
}

/// A family that counts; `_total` is added to its name, and the unit, if it has one.
pub(crate) fn counter(name: &'static str, help: &'static str) -> Family {
    Family::new(name, help, MetricType::Counter)
}

/// A family of values of now.
pub(crate) fn gauge(name: &'static str, help: &'static str) -> Family {
    Family::new(name, help, MetricType::Gauge)
}

/// A family of which the labels are all; `_info` is added to its name.
pub(crate) fn info(name: &'static str, help: &'static str) -> Family {
    Family::new(name, help, MetricType::Info)
}

/// A family of histograms.
pub(crate) fn histogram(name: &'static str, help: &'static str) -> Family {
    Family::new(name, help, MetricType::Histogram)
}

/// A truth, as Prometheus has it.
pub(crate) fn truth(is_true: bool) -> Value {
    Value::Gauge(f64::from(u8::from(is_true)))
}

/// A number of things that are there. Beyond 2^53 it is not exact.
pub(crate) fn number(count: u64) -> Value {
    Value::Gauge(count as f64)
}

impl Family {
    fn new(name: &'static str, help: &'static str, kind: MetricType) -> Self {
        Self {
            name,
            help,
            unit: None,
            kind,
            samples: Vec::new(),
        }
    }

    /// The same in bytes.
    pub(crate) fn bytes(mut self) -> Self {
        self.unit = Some(Unit::Bytes);
        self
    }

    /// The same in seconds.
    pub(crate) fn seconds(mut self) -> Self {
        self.unit = Some(Unit::Seconds);
        self
    }

    /// With one sample that has no labels.
    pub(crate) fn is(self, value: Value) -> Self {
        self.with([(Labels::new(), value)])
    }

    /// The same, if there is one.
    pub(crate) fn may_be(self, value: Option<Value>) -> Self {
        self.with(value.map(|value| (Labels::new(), value)))
    }

    /// With these samples.
    pub(crate) fn with(mut self, samples: impl IntoIterator<Item = (Labels, Value)>) -> Self {
        self.samples.extend(samples);
        self
    }

    /// Whether there are no samples.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let unit = self.unit.as_ref();
        let mut family = encoder.encode_descriptor(self.name, self.help, unit, self.kind)?;
        for (labels, value) in &self.samples {
            // A family of labels alone takes them in another way.
            if let Value::Info = value {
                family.encode_info(labels)?;
            } else {
                value.encode(family.encode_family(labels)?)?;
            }
        }
        Ok(())
    }
}

impl Value {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        match self {
            Self::Counter(count) => ConstCounter::new(*count).encode(encoder),
            Self::Sum(sum) => ConstCounter::new(*sum).encode(encoder),
            Self::Gauge(value) => ConstGauge::new(*value).encode(encoder),
            Self::Info => Ok(()),
            Self::Histogram { sum, classes } => {
                let count = classes.iter().map(|(_, count)| count).sum();
                encoder.encode_histogram::<NoLabelSet>(*sum, count, classes, None)
            }
        }
    }
}

/// Classes of a histogram: these bounds with the values in each, and then those beyond them all.
pub(crate) fn classes(
    bounds: impl IntoIterator<Item = f64>,
    counts: impl IntoIterator<Item = u64>,
) -> Vec<(f64, u64)> {
    let bounds = bounds.into_iter().chain([f64::INFINITY]);
    bounds.zip(counts).collect()
}

/// How metrics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Prometheus' text format.
    Text,
    /// OpenMetrics.
    OpenMetrics,
}

/// OpenMetrics' type of content.
const OPEN_METRICS: &str = "application/openmetrics-text";

impl Format {
    /// The one that a client prefers who accepts these types of content (RFC 9110 section 12.5.1); who
    /// says nothing of OpenMetrics gets text, as does who likes both as well: that is what all read.
    pub(crate) fn accepted(accept: &str) -> Self {
        let quality = |wanted: &str| {
            let ranges = accept.split(',').filter_map(|range| {
                let mut parts = range.split(';').map(str::trim);
                let is_it = parts.next()?.eq_ignore_ascii_case(wanted);
                let version = |it: &&str| it.strip_prefix("version=").is_some();
                let (versions, others): (Vec<_>, Vec<_>) = parts.partition(version);
                let is_known = versions
                    .iter()
                    .all(|it| matches!(*it, "version=1.0.0" | "version=0.0.1" | "version=0.0.4"));
                let weight = others.iter().find_map(|it| it.strip_prefix("q="));
                let weight = weight.map_or(Some(1.0), |weight| weight.parse::<f32>().ok())?;
                (is_it && is_known).then_some(weight)
            });
            ranges.fold(0.0, f32::max)
        };
        let others = ["text/plain", "text/*", "*/*"].map(quality);
        let others = others.into_iter().fold(0.0, f32::max);
        match quality(OPEN_METRICS) {
            open if open > others => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    /// Its type of content.
    pub(crate) const fn content_type(self) -> &'static str {
        match self {
            Self::Text => prometheus_text::CONTENT_TYPE,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Writes families in it.
    ///
    /// # Errors
    /// If one of them is no metric by its rules.
    pub(crate) fn write(self, families: Arc<Vec<Family>>) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Snapshot(families)));
        let mut written = String::new();
        match self {
            Self::Text => prometheus_text::encode(&mut written, &registry)?,
            Self::OpenMetrics => text::encode(&mut written, &registry)?,
        }
        Ok(written)
    }
}

#[derive(Debug)]
struct Snapshot(Arc<Vec<Family>>);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|family| family.encode(&mut encoder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn families() -> Arc<Vec<Family>> {
        let label = |value: &str| vec![("pod", value.to_owned())];
        Arc::new(vec![
            counter("muslin_packets", "Packets.").with([(label("a"), Value::Counter(7))]),
            counter("muslin_pod", "Bytes.")
                .bytes()
                .is(Value::Counter(1 << 60)),
            gauge("muslin_end", "The end.").seconds().may_be(None),
            info("muslin_node", "The node.").with([(label("x\"\\\ny"), Value::Info)]),
            histogram("muslin_store", "How long.")
                .seconds()
                .is(Value::Histogram {
                    sum: 2.5,
                    classes: classes([0.5, 1.0], [3, 0, 1]),
                }),
        ])
    }

    #[test]
    fn the_same_is_written_in_both_formats() {
        let text = Format::Text.write(families()).unwrap();
        assert_eq!(
            text,
            r#"# HELP muslin_packets_total Packets.
# TYPE muslin_packets_total counter
muslin_packets_total{pod="a"} 7
# HELP muslin_pod_bytes_total Bytes.
# TYPE muslin_pod_bytes_total counter
muslin_pod_bytes_total 1152921504606846976
# HELP muslin_end_seconds The end.
# TYPE muslin_end_seconds gauge
# HELP muslin_node_info The node.
# TYPE muslin_node_info gauge
muslin_node_info{pod="x\"\\\ny"} 1
# HELP muslin_store_seconds How long.
# TYPE muslin_store_seconds histogram
muslin_store_seconds_bucket{le="0.5"} 3
muslin_store_seconds_bucket{le="1"} 3
muslin_store_seconds_bucket{le="+Inf"} 4
muslin_store_seconds_sum 2.5
muslin_store_seconds_count 4
"#
        );
        let open = Format::OpenMetrics.write(families()).unwrap();
        for line in [
            "# TYPE muslin_packets counter",
            "# UNIT muslin_pod_bytes bytes",
            "muslin_pod_bytes_total 1152921504606846976",
            "# TYPE muslin_node info",
            r#"muslin_node_info{pod="x\"\\\ny"} 1"#,
        ] {
            assert!(open.lines().any(|it| it == line), "{line}: {open}");
        }
        assert!(open.ends_with("# EOF\n"), "{open}");
    }

    #[test]
    fn a_client_gets_what_it_prefers() {
        // As Prometheus 2.42 and 3 ask.
        let old = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;\
                   version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let newer = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                     text/plain;version=0.0.4;q=0.4,*/*;q=0.2";
        for accept in [
            old,
            newer,
            "application/openmetrics-text",
            "Application/OpenMetrics-Text; q=0.1",
        ] {
            assert_eq!(Format::accepted(accept), Format::OpenMetrics, "{accept}");
        }
        for accept in [
            "",
            "*/*",
            "text/plain",
            "text/html, */*",
            "application/openmetrics-text; q=0",
            "application/openmetrics-text; q=0.3, text/*; q=0.4",
            "application/openmetrics-text; version=2.0.0, */*;q=0.1",
            "application/openmetrics-text; q=x",
            ";;,=;q",
        ] {
            assert_eq!(Format::accepted(accept), Format::Text, "{accept}");
        }
    }
}
