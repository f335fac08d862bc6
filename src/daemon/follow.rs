//! A node on a host whose interface changes.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use muslin_stack::addresses::Nets;
use muslin_stack::api::events::EventKind;
use tokio::sync::watch;

use super::front::Front;
use super::running::{Followed, RunningNode};
use super::underlay::LOOK_AGAIN;
use crate::underlay::{self, Audience, InterfaceChoice, PublicInterface};

/// What follows a host's interface, and who is told.
pub(super) struct Follower {
    pub(super) front: Arc<Front>,
    pub(super) wanted: InterfaceChoice,
    pub(super) audience: Audience,
    /// The pod networks, once they are known.
    pub(super) networks: watch::Receiver<Option<Nets>>,
    /// Has the interface as it is, until the node runs.
    pub(super) seen: watch::Sender<PublicInterface>,
    /// Takes the address that the lease is to have.
    pub(super) public_ip: watch::Sender<Option<Ipv4Addr>>,
    /// The same of IPv6.
    pub(super) public_ipv6: watch::Sender<Option<Ipv6Addr>>,
    /// What was wrong when it was looked at last.
    pub(super) complaint: String,
}

impl Follower {
    /// Takes the underlay and the lease along when the interface gets another address, as laptops and
    /// virtual machines do, or comes back after it was gone.
    pub(super) async fn follow(mut self) {
        let mut changes = underlay::Changes::listen();
        loop {
            let are_networks_known = self.networks.borrow().is_some();
            tokio::select! {
                () = changes.wait(LOOK_AGAIN) => {}
                // Another interface may be the one.
                Ok(()) = self.networks.changed(), if !are_networks_known => {}
            }
            let (networks, published) = (*self.networks.borrow(), *self.public_ipv6.borrow());
            let wanted = &self.wanted;
            let chosen = underlay::choose_interface(wanted, self.audience, networks, published);
            // Between two addresses there may be none for a while.
            let Ok(now) = chosen.await else {
                continue;
            };
            match self.front.running().cloned() {
                Some(running) => self.take_along(&running, now),
                None => self.see(now),
            }
        }
    }

    /// The node does not run yet, and will have the interface as it is.
    fn see(&self, now: PublicInterface) {
        let public = now.public();
        self.public_ip
            .send_if_modified(|it| replace(it, public.ipv4()));
        self.public_ipv6
            .send_if_modified(|it| replace(it, public.ipv6()));
        self.seen.send_if_modified(|it| replace(it, now));
    }

    fn take_along(&mut self, running: &RunningNode, mut now: PublicInterface) {
        let before = running.interface();
        // The last address of an IP version is not taken back: without one a lease that has a subnet of
        // that version would stop flannel's nodes.
        now.keep_ends(&before);
        now.awaits_ipv6 = false;
        let followed = match running.follow(&now) {
            Ok(followed) => followed,
            Err(error) => return self.complain(&now, error.to_string()),
        };
        self.tell(&before, &now, followed);
        if !std::mem::take(&mut self.complaint).is_empty() {
            let text = format!("the underlay follows {} again", now.name);
            let journal = &self.front.journal;
            journal.note(EventKind::InterfaceBack, &now.name, text);
        }
    }

    fn complain(&mut self, now: &PublicInterface, text: String) {
        if text != self.complaint {
            let why = format!("the underlay cannot follow {}: {text}", now.name);
            let journal = &self.front.journal;
            journal.note(EventKind::InterfaceAway, &now.name, why);
            self.complaint = text;
        }
    }

    fn tell(&self, before: &PublicInterface, now: &PublicInterface, followed: Followed) {
        let journal = &self.front.journal;
        let (former, public) = (before.public(), now.public());
        if let Some(address) = public.ipv6().filter(|_| former.ipv6() != public.ipv6()) {
            self.public_ipv6.send_replace(Some(address));
            let text = format!("the public IPv6 address is now {address}");
            journal.note(EventKind::AddressChanged, address, text);
        }
        let is_moved =
            (former.ipv4(), before.addresses().ipv4()) != (public.ipv4(), now.addresses().ipv4());
        if let Some(public_ip) = public.ipv4().filter(|_| is_moved) {
            let text = format!("the public address is now {public_ip}, on {}", now.name);
            journal.note(EventKind::AddressChanged, public_ip, text);
            self.public_ip.send_replace(Some(public_ip));
        } else if followed.has_uplink && !followed.is_moved {
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
    }
}

/// Takes a value; whether it is another one.
fn replace<T: PartialEq>(place: &mut T, value: T) -> bool {
    let is_other = *place != value;
    *place = value;
    is_other
}
