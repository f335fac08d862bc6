//! Slow phases of the machine: which measurements fell into one, and are made again. A decision by
//! numbers alone; `calibration` makes them.

/// Parts of a calibration, each of which counts by itself: copies and wake-ups.
const PARTS: usize = 2;
/// What each part may take of its reference: about twice what it differs by within a phase, which is up
/// to 7 % for copies and up to 20 % for wake-ups.
const LIMITS: [f64; PARTS] = [1.15, 1.4];
/// How often one measurement is made again at most.
pub(crate) const REPEATS: usize = 2;

/// How long each part of a fixed piece of work took, in seconds.
pub(crate) type Calibration = [f64; PARTS];

/// The calibrations of a run so far.
#[derive(Debug, Default)]
pub(crate) struct Phases {
    /// In ascending order.
    seen: [Vec<f64>; PARTS],
}

impl Phases {
    /// Learns from a calibration how fast the machine is.
    pub(crate) fn learn(&mut self, calibration: Calibration) {
        for (seen, took) in self.seen.iter_mut().zip(calibration) {
            let at = seen.partition_point(|before| *before < took);
            seen.insert(at, took);
        }
    }

    /// What the slowest part of these calibrations took of what it may take: 1 is its limit, a multiple
    /// of its reference. That is the lower quartile of what the run has seen: a lucky calibration does not move it, as it would the
    /// least, and a machine that is slow for most of the run does not hide it, as from the median.
    pub(crate) fn slowness(&self, calibrations: &[Calibration]) -> f64 {
        let ratios = calibrations.iter().flat_map(|calibration| {
            let parts = self.seen.iter().zip(calibration).zip(LIMITS);
            parts.filter_map(|((seen, took), limit)| {
                let reference = seen.get(seen.len().saturating_sub(1) / 4)?;
                Some(took / (reference * limit))
            })
        });
        ratios.fold(0.0, f64::max)
    }

    /// Whether they say that the machine was in a slow phase.
    pub(crate) fn is_slow(&self, calibrations: &[Calibration]) -> bool {
        self.slowness(calibrations) > 1.0
    }

    /// Which of several attempts, each between its calibrations, was made while the machine was
    /// fastest. What they measured does not count, or the choice would favour good figures.
    pub(crate) fn fastest<const N: usize>(&self, attempts: &[[Calibration; N]]) -> Option<usize> {
        let slowness = |index: &usize| self.slowness(&attempts[*index]);
        (0..attempts.len()).min_by(|a, b| slowness(a).total_cmp(&slowness(b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(took: &[Calibration]) -> Phases {
        let mut phases = Phases::default();
        for calibration in took {
            phases.learn(*calibration);
        }
        phases
    }

    #[test]
    fn nothing_is_slow_that_differs_by_little() {
        let phases = of(&[[1.0, 5.0], [1.1, 5.2], [1.05, 5.1], [1.02, 5.5]]);
        assert!(!phases.is_slow(&[[1.1, 5.5], [1.0, 5.0]]));
    }

    #[test]
    fn one_slow_part_before_or_after_is_enough() {
        let phases = of(&[[1.0, 5.0], [1.0, 5.0], [1.0, 5.0], [1.0, 5.0]]);
        assert!(phases.is_slow(&[[1.0, 5.0], [1.2, 5.0]]));
        assert!(phases.is_slow(&[[1.0, 7.5], [1.0, 5.0]]));
        assert!(!phases.is_slow(&[[1.0, 6.5], [1.0, 5.0]]));
        assert!(!phases.is_slow(&[[1.0, 5.0], [1.0, 5.0]]));
    }

    #[test]
    fn a_machine_that_is_mostly_slow_is_slow() {
        // The median is 1.5.
        let phases = of(&[[1.5, 1.0], [1.5, 1.0], [1.5, 1.0], [1.0, 1.0], [1.0, 1.0]]);
        assert!(phases.is_slow(&[[1.5, 1.0]]));
    }

    #[test]
    fn one_lucky_calibration_makes_the_rest_not_slow() {
        let usual = [[1.0, 1.0]; 8];
        let mut phases = of(&usual);
        phases.learn([0.5, 0.5]);
        assert!(!phases.is_slow(&usual));
    }

    #[test]
    fn the_first_calibration_is_its_own_reference() {
        assert!(!of(&[[3.0, 4.0]]).is_slow(&[[3.0, 4.0]]));
        assert!(!Phases::default().is_slow(&[[3.0, 4.0]]));
    }

    #[test]
    fn the_fastest_attempt_counts() {
        let phases = of(&[[1.0, 1.0]; 4]);
        let attempts = [
            [[1.0, 1.7], [1.0, 1.0]],
            [[1.2, 1.0], [1.3, 1.0]],
            [[1.5, 1.0], [1.0, 1.0]],
        ];
        assert_eq!(phases.fastest(&attempts), Some(1));
        assert_eq!(phases.fastest::<2>(&[]), None);
    }
}
