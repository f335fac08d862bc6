//! Attaching a pod's device to a node, keeping it attached, and running the pod's command: what
//! `muslin run`, `muslin attach` and `muslin sidecar` share.

#[cfg(feature = "sidecar")]
mod child;
mod command;
mod device;
mod inside;
mod stay;

#[cfg(feature = "sidecar")]
pub(crate) use child::{start, wait};
pub(crate) use command::{
    CREDENTIALS, Environment, become_command, command, exit_code, guard, or_shell, result_of,
    variables,
};
pub(crate) use device::{Device, assignment, queues};
pub(crate) use inside::{InsideProcess, serve};
pub(crate) use stay::stay_attached;

pub(crate) use crate::signals::Signals;
