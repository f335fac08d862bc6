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
    fn one_is_not_several() {
        assert_eq!(count(0, "lease"), "0 leases");
        assert_eq!(count(1, "lease"), "1 lease");
        assert_eq!(count(2, "lease"), "2 leases");
        assert_eq!(count(2, "query"), "2 queries");
    }
}
