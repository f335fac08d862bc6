//! What strangers say to a node, and what it writes for them, as bytes and text: requests of the
//! control socket, published ports, plugins of container runtimes, `subnet.env`, and messages of the sidecar's proxies.
//!
//! Nothing here does I/O. The feature `api` brings it.

pub mod capture;
pub mod cni;
pub mod control;
pub mod credentials;
pub mod events;
pub mod exchange;
pub mod http;
pub mod live;
pub mod netavark;
pub mod pcapng;
pub mod ping;
pub mod published;
pub mod socks5;
pub mod subnet_env;
pub mod trace;
