//! Taking a running node over: another process gets what the node has, and goes on with it.
//!
//! The new process asks at the control socket, and learns who the node is. From then on the old one
//! writes nothing to the store. The new one gets the lease as any node that is started again does, and
//! then asks for the rest: the old one stops to read, and sends the descriptors of everything that is
//! read with what it knows of pods. Packets wait in the kernel meanwhile. Until the new process says
//! that it runs, the old one can go on: it does if the connection ends. Afterwards it serves the flows
//! to and from outside that it has, whose packets the new one gives to it, and ends with them.

mod messages;
mod patience;
mod predecessor;

pub(crate) use messages::{About, Demand, Flow, FrontDoor, Part, PodState, VERSION};
pub(crate) use patience::{FLOWS_PATIENCE, LEASE_PATIENCE, PATIENCE};
pub(crate) use predecessor::{Estate, Inherited, InheritedPod, InheritedWorker, Predecessor};
