//! The search for a path MTU: which size is to be tried next.
//!
//! It starts with what the node says its pods may send, follows what routers say, and halves what is left
//! where nobody says anything.

/// Bytes of the longest IPv4 packet.
const LONGEST: u16 = u16::MAX;

/// What became of packets of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// One was answered.
    Fits,
    /// None was: it is too long for an MTU of so many bytes, if anybody said so.
    Exceeds(Option<u16>),
}

/// Sizes of IP packets in bytes between which the path MTU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Search {
    /// The longest that was answered.
    fits: u16,
    /// The shortest that was not; one more than the longest packet at first.
    exceeds: u32,
    /// The size to try, and whether it is likely to be the MTU itself.
    next: u16,
    is_likely: bool,
}

impl Search {
    /// Begins with a size that fits, and one that is likely to be the longest that does.
    pub(super) fn new(fits: u16, likely: u16) -> Self {
        Self {
            fits,
            exceeds: u32::from(LONGEST) + 1,
            next: likely.max(fits.saturating_add(1)),
            is_likely: true,
        }
    }

    /// The size to try, unless the MTU is known.
    pub(super) fn next(&self) -> Option<u16> {
        (u32::from(self.fits) + 1 < self.exceeds).then_some(self.next)
    }

    /// The longest size that was answered: in the end the MTU.
    pub(super) const fn fits(&self) -> u16 {
        self.fits
    }

    /// Takes what became of the size that was to be tried.
    pub(super) fn learn(&mut self, outcome: Outcome) {
        let told = match outcome {
            Outcome::Fits => {
                self.fits = self.next;
                None
            }
            Outcome::Exceeds(told) => {
                self.exceeds = self.next.into();
                told.filter(|told| *told > self.fits && u32::from(*told) < self.exceeds)
            }
        };
        let one_more = self.fits.saturating_add(1);
        let middle = (u32::from(self.fits) + self.exceeds) / 2;
        let middle = u16::try_from(middle).unwrap_or(LONGEST);
        (self.next, self.is_likely) = match (told, outcome) {
            (Some(told), _) => (told, true),
            (None, Outcome::Fits) if self.is_likely => (one_more, false),
            (None, _) => (middle.max(one_more), false),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches on a path of this MTU, where routers say it or not; the result and the sizes tried.
    fn search(mtu: u16, likely: u16, is_told: bool) -> (u16, Vec<u16>) {
        let mut search = Search::new(84, likely);
        let mut tried = Vec::new();
        while let Some(size) = search.next() {
            assert!(!tried.contains(&size), "{size} twice: {tried:?}");
            tried.push(size);
            search.learn(match size <= mtu {
                true => Outcome::Fits,
                false => Outcome::Exceeds(is_told.then_some(mtu)),
            });
        }
        (search.fits(), tried)
    }

    #[test]
    fn each_mtu_is_found_whatever_is_likely() {
        for mtu in (84..1600).chain([8950, 9000, 65_534, 65_535]) {
            for likely in [0, 85, 1450, 1500, 65_535] {
                for is_told in [false, true] {
                    let (found, tried) = search(mtu, likely, is_told);
                    assert_eq!(found, mtu, "{likely} {is_told}");
                    assert!(tried.len() <= 20, "{mtu} {likely}: {tried:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_likely_or_told_needs_few_packets() {
        assert_eq!(search(1450, 1450, false).1, [1450, 1451]);
        assert_eq!(search(1300, 1450, true).1, [1450, 1300, 1301]);
        // One that says what cannot be is as good as one that says nothing.
        let mut search = Search::new(84, 1450);
        search.learn(Outcome::Exceeds(Some(1450)));
        let silent = search.next();
        assert_eq!(silent, Some(767));
        search.learn(Outcome::Exceeds(Some(20)));
        assert_eq!(search.next(), Some(425));
    }
}
