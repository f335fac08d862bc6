//! Capabilities (capabilities(7)): all go but those in use.

use caps::{CapSet, CapsHashSet};

pub(crate) use caps::Capability;

use crate::error::{Context, Result};

/// Gives up all capabilities but those of these which this thread has, and with them the way to get
/// others back by starting programs, as far as that is allowed.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn keep_only(kept: &[Capability]) -> Result<()> {
    // Afterwards the right to do this is gone.
    if read(CapSet::Effective)?.contains(&Capability::CAP_SETPCAP) {
        let gone = |it: &Capability| !kept.contains(it);
        for capability in read(CapSet::Bounding)?.into_iter().filter(gone) {
            let dropped = caps::drop(None, CapSet::Bounding, capability);
            dropped.context("cannot restrict the capabilities of other programs")?;
        }
    }
    hold_only(kept)
}

/// Gives up all capabilities but those of these which this thread has. Programs that it starts as
/// user 0 have theirs again.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn hold_only(kept: &[Capability]) -> Result<()> {
    let kept: CapsHashSet = kept.iter().copied().collect();
    let mut steps = vec![(CapSet::Inheritable, CapsHashSet::new())];
    // The effective ones come first: each of them must be permitted at any moment.
    for set in [CapSet::Effective, CapSet::Permitted] {
        steps.push((set, read(set)?.intersection(&kept).copied().collect()));
    }
    for (set, capabilities) in steps {
        caps::set(None, set, &capabilities).context("cannot give up capabilities")?;
    }
    Ok(())
}

fn read(set: CapSet) -> Result<CapsHashSet> {
    caps::read(None, set).context("cannot read the capabilities")
}

/// Gives up one capability. Threads that start later do not have it either.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn without(capability: Capability) -> Result<()> {
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::drop(None, set, capability).context(format!("cannot give up {capability}"))?;
    }
    Ok(())
}

/// The capabilities of this thread as `net_raw`, in order.
pub(super) fn names() -> Vec<String> {
    let permitted = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let name = |it: Capability| it.to_string().to_ascii_lowercase().replacen("cap_", "", 1);
    let mut names: Vec<_> = permitted.into_iter().map(name).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_use_is_given_up() {
        // A thread has capabilities of its own.
        let thread = std::thread::spawn(|| {
            let before = names();
            let raw = Capability::CAP_NET_RAW;
            keep_only(&[raw]).unwrap();
            let had = before.contains(&"net_raw".to_owned());
            assert_eq!(names(), if had { vec!["net_raw"] } else { Vec::new() });
            for set in [CapSet::Inheritable, CapSet::Ambient] {
                assert!(caps::read(None, set).unwrap().is_empty(), "{set:?}");
            }
            if before.contains(&"setpcap".to_owned()) {
                let bounding = caps::read(None, CapSet::Bounding).unwrap();
                assert!(bounding.iter().all(|it| *it == raw), "{bounding:?}");
            }
            without(raw).unwrap();
            assert!(names().is_empty());
        });
        thread.join().unwrap();
    }
}
