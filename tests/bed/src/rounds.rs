//! Times several things in turns, so that whatever else the machine does hits all alike.

use std::time::Instant;

/// A name and the call to be timed.
pub type Case<'a> = (String, Box<dyn FnMut() + 'a>);

/// What one call of a case took, in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct Figure {
    /// Half of all rounds took less.
    pub median: f64,
    /// A quarter of them took less: nearer to what an idle machine would show.
    pub quartile: f64,
}

/// How often things are called.
#[derive(Debug, Clone, Copy)]
pub struct Turns {
    /// How often each case has its turn.
    pub rounds: usize,
    /// Measurements in a turn. Each is best shorter than the slice of time a busy machine gives.
    pub batches: usize,
    /// Calls in a measurement.
    pub calls: u32,
}

/// Calls the cases in turns, each of which begins with a call that is not measured.
pub fn time(cases: &mut [Case<'_>], turns: Turns) -> Vec<Figure> {
    let count = turns.rounds * turns.batches;
    let mut times = vec![Vec::with_capacity(count); cases.len()];
    for _ in 0..turns.rounds {
        for ((_, run), times) in cases.iter_mut().zip(&mut times) {
            run();
            for _ in 0..turns.batches {
                let start = Instant::now();
                (0..turns.calls).for_each(|_| run());
                times.push(start.elapsed().as_nanos() as f64 / f64::from(turns.calls));
            }
        }
    }
    let figures = times.iter_mut().map(|times| {
        times.sort_unstable_by(f64::total_cmp);
        Figure {
            median: times[count / 2],
            quartile: times[count / 4],
        }
    });
    figures.collect()
}
