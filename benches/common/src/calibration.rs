//! A fixed piece of work that says how fast the machine is at the moment.

use std::hint::black_box;
use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _, pipe};
use std::time::Instant;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::phases::Calibration;

/// Each part is done so often, and the lower quartile counts: an interruption is no phase, which slows
/// all of them.
const SLICES: usize = 9;
/// A superpacket's worth of bytes, and how often it is copied in one slice: about 2 ms.
const BLOCK: usize = 64 << 10;
const COPIES: usize = 1500;
/// Wake-ups there and back in one slice: about 3 ms between two processors.
const TURNS: usize = 75;

/// Does the work: copies within the cache, and one thread waking another on the next processor. It takes
/// about 50 ms.
pub(crate) fn calibrate() -> Calibration {
    [lower_quartile(copies()), lower_quartile(turns().unwrap())]
}

fn lower_quartile(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 4]
}

/// Times of slices, in seconds.
fn slices(mut slice: impl FnMut() -> io::Result<()>) -> io::Result<Vec<f64>> {
    let once = |_| {
        let start = Instant::now();
        slice()?;
        Ok(start.elapsed().as_secs_f64())
    };
    (0..SLICES).map(once).collect()
}

fn copies() -> Vec<f64> {
    let from = vec![1_u8; BLOCK];
    let mut to = vec![0_u8; BLOCK];
    let copy = || {
        for _ in 0..COPIES {
            black_box(&mut to[..]).copy_from_slice(black_box(&from));
        }
        Ok(())
    };
    slices(copy).unwrap()
}

/// The two threads have a processor each: left to the scheduler they share one at times, which is
/// another figure.
fn turns() -> io::Result<Vec<f64>> {
    let [(mut there, mut ask), (mut back, mut answer)] = [pipe()?, pipe()?];
    let [first, second] = processors()?;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            stay_on(second)?;
            while pass(&mut there, &mut answer)? {}
            Ok::<_, io::Error>(())
        });
        let asking = scope.spawn(move || {
            stay_on(first)?;
            // It ends the other when it drops its end.
            slices(|| {
                for _ in 0..TURNS {
                    ask.write_all(&[0])?;
                    back.read_exact(&mut [0])?;
                }
                Ok(())
            })
        });
        asking.join().unwrap()
    })
}

/// Hands a byte on; `false` at the end.
fn pass(from: &mut PipeReader, to: &mut PipeWriter) -> io::Result<bool> {
    let mut byte = [0];
    let is_there = from.read(&mut byte)? > 0;
    if is_there {
        to.write_all(&byte)?;
    }
    Ok(is_there)
}

/// Two processors on which this process may run, or twice the same.
fn processors() -> io::Result<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut all = (0..CpuSet::count()).filter(|index| allowed.is_set(*index) == Ok(true));
    let first = all.next().unwrap_or(0);
    Ok([first, all.next().unwrap_or(first)])
}

/// Has this thread run on one processor only.
fn stay_on(processor: usize) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(processor)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &only)?)
}
