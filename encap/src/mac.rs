//! MAC addresses as text, the way Linux and Go write them.

use std::fmt;

use smoltcp::wire::EthernetAddress;

/// Shows a MAC address in lower-case hex with colons (smoltcp's own text has dashes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Colons(pub EthernetAddress);

impl fmt::Display for Colons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
