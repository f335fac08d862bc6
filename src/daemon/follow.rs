//! A node on a host whose interface changes.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use muslin_stack::api::events::EventKind;
use tokio::sync::watch;

use super::front::Front;
use super::underlay::LOOK_AGAIN;
use crate::journal::Journal;
use crate::underlay::{self, Audience, InterfaceChoice, PublicInterface};

/// Takes the underlay and the lease along when the interface gets another address, as laptops and
/// virtual machines do, or comes back after it was gone. Until the node runs `seen` has the
/// interface as it is.
pub(super) async fn follow(
    front: Arc<Front>,
    wanted: InterfaceChoice,
    audience: Audience,
    seen: watch::Sender<PublicInterface>,
    public_ip: watch::Sender<Ipv4Addr>,
    public_ipv6: watch::Sender<Option<Ipv6Addr>>,
) {
    let mut changes = underlay::Changes::listen();
    let mut complaint = String::new();
    let journal = front.journal.clone();
    loop {
        changes.wait(LOOK_AGAIN).await;
        // Between two addresses there may be none for a while.
        let Ok(mut now) = underlay::choose_interface(&wanted, audience).await else {
            continue;
        };
        follow_ipv6(&wanted, &mut now, &public_ipv6, &journal).await;
        let Some(running) = front.running() else {
            public_ip.send_if_modified(|it| std::mem::replace(it, now.public_ip) != now.public_ip);
            seen.send_if_modified(|it| {
                *it != now && {
                    *it = now;
                    true
                }
            });
            continue;
        };
        let followed = match running.follow(&now) {
            Ok(followed) => followed,
            Err(error) => {
                let text = error.to_string();
                if text != complaint {
                    let why = format!("the underlay cannot follow {}: {text}", now.name);
                    journal.note(EventKind::InterfaceAway, &now.name, why);
                    complaint = text;
                }
                continue;
            }
        };
        if followed.is_moved {
            let text = format!(
                "the public address is now {}, on {}",
                now.public_ip, now.name
            );
            journal.note(EventKind::AddressChanged, now.public_ip, text);
            public_ip.send_replace(now.public_ip);
        } else if followed.has_uplink {
            let text = format!("the uplink on {} is reopened", now.name);
            journal.note(EventKind::InterfaceBack, &now.name, text);
        }
        if let Some(mtu) = followed.mtu {
            let text = format!(
                "the MTU of {} is {}, the pods' is now {mtu}",
                now.name, now.mtu
            );
            journal.note(EventKind::MtuChanged, &now.name, text);
        }
        if !std::mem::take(&mut complaint).is_empty() {
            let text = format!("the underlay follows {} again", now.name);
            journal.note(EventKind::InterfaceBack, &now.name, text);
        }
    }
}

/// The lease follows the address of IPv6 if there is another one. The last one is not taken back:
/// without one a lease with an IPv6 subnet would stop flannel's nodes.
async fn follow_ipv6(
    wanted: &InterfaceChoice,
    interface: &mut PublicInterface,
    public_ipv6: &watch::Sender<Option<Ipv6Addr>>,
    journal: &Journal,
) {
    let before = *public_ipv6.borrow();
    let now = underlay::ipv6::choose(wanted, interface, before).await;
    interface.address_v6 = now.or(before);
    interface.link_v6 = underlay::ipv6::link(interface).await;
    let Some(address) = now.filter(|_| now != before) else {
        return;
    };
    public_ipv6.send_replace(now);
    let text = format!("the public IPv6 address is now {address}");
    journal.note(EventKind::AddressChanged, address, text);
}
