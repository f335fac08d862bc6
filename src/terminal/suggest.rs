//! What somebody may have meant by a name that is not there.

use strsim::osa_distance;

/// ` (did you mean 'NAME'?)` for the name that is written most alike, if one is enough so; else nothing.
pub(crate) fn hint<N: AsRef<str>>(wrong: &str, names: impl IntoIterator<Item = N>) -> String {
    let wrong = wrong.to_lowercase();
    // A letter in three may be wrong.
    let most = wrong.chars().count().div_ceil(3);
    let distance = |name: &N| osa_distance(&wrong, &name.as_ref().to_lowercase());
    let near = names.into_iter().map(|name| (distance(&name), name));
    let nearest = near
        .filter(|(distance, _)| *distance <= most)
        .min_by_key(|(distance, _)| *distance);
    nearest.map_or_else(String::new, |(_, name)| {
        format!(" (did you mean '{}'?)", name.as_ref())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested() {
        let names = ["web", "web-1", "database", "x"];
        for (wrong, expected) in [
            ("wbe", "web"),
            ("Web", "web"),
            ("databse", "database"),
            ("web-2", "web-1"),
        ] {
            let hint = hint(wrong, names);
            assert_eq!(hint, format!(" (did you mean '{expected}'?)"));
        }
        for wrong in ["nobody", "cache", "postgresql"] {
            assert_eq!(hint(wrong, names), "", "{wrong}");
        }
        assert_eq!(hint("web", [""; 0]), "");
    }
}
