//! Devices: where pods' frames come from and go to.

mod frame;
mod now;
mod pod;
mod socket;
mod tap;
mod tun;

pub use frame::FrameDevice;
pub(crate) use now::send_frame;
pub use pod::PodDevice;
pub use socket::FrameSocket;
pub use tap::{OpenError, Tap};
pub use tun::Tun;
