//! A bounded number of time series: of many pods or peers the first have series of their own, and the
//! rest is summed up.
//!
//! A counter must not fall, or it looks as if the node had begun anew. So whoever was summed up once
//! stays among those, and is not forgotten when it goes.

use std::collections::{HashMap, HashSet};

use muslin_stack::api::control::Traffic;

/// Who has series of its own at most: as many as a subnet of /24 has pods.
pub(crate) const MOST: usize = 256;

/// What all others are called together. No pod can have this name.
const OTHERS: &str = "_other";

/// What came from somebody, and what went there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Both {
    /// What came from it.
    pub(crate) from: Traffic,
    /// What went to it.
    pub(crate) to: Traffic,
}

/// Who has series of its own, and who has not.
#[derive(Debug)]
pub(crate) struct Shares {
    most: usize,
    /// Those who have, by name.
    own: HashSet<String>,
    /// What was seen last of each of those who have not.
    others: HashMap<String, Both>,
    /// What had those of them who are gone.
    gone: Both,
}

impl Shares {
    /// So many may have series of their own.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            own: HashSet::new(),
            others: HashMap::new(),
            gone: Both::default(),
        }
    }

    /// Whether somebody has series of its own.
    pub(crate) fn has_own(&self, name: &str) -> bool {
        self.own.contains(name)
    }

    /// Those who have series of their own, in the order given, and behind them, as [`OTHERS`], the sum of
    /// all who have not and had not, if there were any. `all` are those that are there now.
    pub(crate) fn share(&mut self, all: Vec<(String, Both)>) -> Vec<(String, Both)> {
        let now: HashSet<_> = all.iter().map(|(name, _)| name.clone()).collect();
        self.own.retain(|name| now.contains(name));
        for (_, both) in self.others.extract_if(|name, _| !now.contains(name)) {
            add(&mut self.gone, &both);
        }
        let mut shown = Vec::new();
        for (name, both) in all {
            let may = !self.others.contains_key(&name) && self.own.len() < self.most;
            if may || self.own.contains(&name) {
                self.own.insert(name.clone());
                shown.push((name, both));
            } else {
                self.others.insert(name, both);
            }
        }
        let mut sum = self.gone;
        self.others.values().for_each(|both| add(&mut sum, both));
        if !self.others.is_empty() || self.gone != Both::default() {
            shown.push((OTHERS.to_owned(), sum));
        }
        shown
    }
}

fn add(sum: &mut Both, more: &Both) {
    for (sum, more) in [(&mut sum.from, more.from), (&mut sum.to, more.to)] {
        sum.packets += more.packets;
        sum.bytes += more.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(packets: u64) -> Both {
        let traffic = |packets| Traffic {
            packets,
            bytes: 100 * packets,
        };
        Both {
            from: traffic(packets),
            to: traffic(2 * packets),
        }
    }

    /// Who is shown, and the packets of all others.
    fn share(shares: &mut Shares, all: &[(&str, u64)]) -> (Vec<String>, Option<u64>) {
        let all = all
            .iter()
            .map(|(name, packets)| ((*name).to_owned(), both(*packets)));
        let all: Vec<_> = all.collect();
        let mut shown = shares.share(all.clone());
        let others = shown.pop_if(|(name, _)| name == OTHERS);
        assert!(
            shown
                .iter()
                .all(|it| all.contains(it) && shares.has_own(&it.0))
        );
        let others = others.map(|(_, sum)| {
            assert_eq!(sum, both(sum.from.packets));
            sum.from.packets
        });
        (shown.into_iter().map(|(name, _)| name).collect(), others)
    }

    #[test]
    fn the_sum_of_others_never_falls() {
        let mut shares = Shares::new(2);
        let mut check = |all: &[(&str, u64)], own: &[&str], others| {
            let own: Vec<_> = own.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(share(&mut shares, all), (own, others));
        };
        check(&[("a", 5)], &["a"], None);
        let four = [("a", 5), ("b", 6), ("c", 10), ("d", 20)];
        check(&four, &["a", "b"], Some(30));
        // A place becomes free, and who was summed up stays so.
        check(&[("b", 6), ("c", 11), ("d", 20)], &["b"], Some(31));
        check(&[("b", 6), ("d", 21), ("e", 1)], &["b", "e"], Some(32));
        check(&[], &[], Some(32));
        // Who comes again comes with new counters.
        check(&[("c", 1)], &["c"], Some(32));
    }
}
