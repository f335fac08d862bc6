//! Kinds of devices: those of the simulator's own, and those that its users bring.

use std::fmt;
use std::rc::Rc;

use super::device::{Assigned, Device};
use super::pod::Pod;
use super::rogue::Rogue;

/// A kind of device, of which an [`Event`](super::Event) attaches one.
///
/// The node of a machine has a port for it, and the simulator holds what it sends and gets against
/// what must be true: see [the list](super#what-must-hold).
#[derive(Clone)]
pub struct DeviceKind {
    pub(super) answers: bool,
    pub(super) is_guarded: bool,
    make: Rc<Make>,
}

type Make = dyn Fn(&Assigned) -> Box<dyn Device>;

impl DeviceKind {
    /// A kind of device that owes nobody an answer and may send whatever it likes, behind a port that
    /// guards against it. `make` is called each time that one is attached.
    pub fn new<D: Device + 'static>(make: impl Fn(&Assigned) -> D + 'static) -> Self {
        Self {
            answers: false,
            is_guarded: true,
            make: Rc::new(move |assigned| Box::new(make(assigned))),
        }
    }

    /// The same kind, if its devices do all that pods do: they follow orders, answer pings, and
    /// listen at TCP port 5000 for the number of a flow and a number of bytes, eight bytes each in
    /// network byte order, and send what follows back as it came. Everybody must reach them when all
    /// is mended.
    #[must_use]
    pub fn that_answers(self) -> Self {
        Self {
            answers: true,
            ..self
        }
    }

    /// The same kind, behind a port from which any address may be sent. What must be true need not be
    /// then.
    #[must_use]
    pub fn unguarded(self) -> Self {
        Self {
            is_guarded: false,
            ..self
        }
    }

    /// The simulator's own, by their numbers: pods and rogues.
    pub(super) fn own() -> Vec<Self> {
        vec![Self::new(Pod::new).that_answers(), Self::new(Rogue::new)]
    }

    pub(super) fn make(&self, assigned: &Assigned) -> Box<dyn Device> {
        (self.make)(assigned)
    }
}

/// The number of the pods' kind.
pub(super) const POD: usize = 0;
/// That of the kind that does what pods must not do.
pub(super) const ROGUE: usize = 1;
/// That of the first kind of others.
pub(super) const FIRST: usize = 2;

impl fmt::Debug for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            answers,
            is_guarded,
            make: _,
        } = self;
        f.debug_struct("DeviceKind")
            .field("answers", answers)
            .field("is_guarded", is_guarded)
            .finish_non_exhaustive()
    }
}
