//! The control plane: what the network's configuration, the nodes' leases and requests of those who
//! attach pods mean for the data path.
//!
//! A source of leases reports a stream of [`Change`](crate::control::lease::Change);
//! [`ControlPlane`](plane::ControlPlane) turns them into operations on a node's tables.
//! [`TunnelPlan`](tunnel::TunnelPlan) says what a network's backend means for this node, and
//! [`Pods`](pods::Pods) who has which address. Nodes and the simulator drive all of these.

#[cfg(feature = "api")]
pub mod attachments;
pub mod ipam;
mod kv;
pub mod lease;
pub mod names;
pub mod peers;
pub mod plane;
pub mod pods;
pub mod tunnel;
