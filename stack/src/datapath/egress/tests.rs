//! A pod with smoltcp's TCP and a host that does as it is told, with egress between them.

use super::*;

mod bed;
mod datagram;
mod flows;
mod fragments;
mod fragments_v6;
mod inbound;
mod nat64;
mod path;
mod succession;
mod tcp;
mod workers;
