//! Quantities as people read them.

/// A number of bytes in the unit that people read best.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// How many of something there are in a second, with the prefix that people read best.
pub(crate) fn rate(per_second: f64) -> String {
    const PREFIXES: [&str; 5] = ["", " k", " M", " G", " T"];
    let (mut value, mut prefix) = (per_second, 0);
    // What is rounded up to a thousand has the next prefix.
    while value >= 999.95 && prefix + 1 < PREFIXES.len() {
        value /= 1000.0;
        prefix += 1;
    }
    match prefix {
        0 if value == 0.0 || value >= 9.95 => format!("{value:.0}"),
        _ => format!("{value:.1}{}", PREFIXES[prefix]),
    }
}

/// Seconds as people say them.
pub(crate) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min {} s", seconds % 60),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// How many there are of something: `1 lease`, `2 leases`.
pub(crate) fn count(count: u64, one: &str) -> String {
    match count {
        1 => format!("1 {one}"),
        _ => format!("{count} {}", plural(one)),
    }
}

/// A word for several of what an English noun stands for.
fn plural(one: &str) -> String {
    match one.strip_suffix('y') {
        Some(stem) if !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{stem}ies"),
        _ => format!("{one}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_short() {
        assert_eq!(
            [bytes(0), bytes(999), bytes(1500), bytes(25_000_000)].join(" "),
            "0 B 999 B 1.5 kB 25.0 MB"
        );
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(3725), "1 h 2 min");
        assert_eq!(duration(90_000), "1 d 1 h");
    }

    #[test]
    fn rates_have_a_prefix() {
        for (per_second, expected) in [
            (0.0, "0"),
            (0.04, "0.0"),
            (1.25, "1.2"),
            (9.94, "9.9"),
            (10.4, "10"),
            (999.0, "999"),
            (999.96, "1.0 k"),
            (1234.0, "1.2 k"),
            (25_000_000.0, "25.0 M"),
            (1e16, "10000.0 T"),
        ] {
            assert_eq!(rate(per_second), expected, "{per_second}");
        }
    }

    #[test]
    fn one_is_not_several() {
        assert_eq!(count(0, "lease"), "0 leases");
        assert_eq!(count(1, "lease"), "1 lease");
        assert_eq!(count(2, "lease"), "2 leases");
        assert_eq!(count(2, "query"), "2 queries");
    }
}
