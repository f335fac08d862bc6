//! The control plane: what the network's configuration and the nodes' leases mean for the data path.

pub mod peers;
pub mod pods;
pub mod tunnel;
