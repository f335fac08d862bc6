//! What happened to a node, for people and programs that look later.

use serde::{Deserialize, Serialize};

macro_rules! kinds {
    ($($variant:ident, $name:literal, $is_trouble:literal, $text:literal;)*) => {
        /// What kind of thing happened. Further kinds may come: go through [`Self::ALL`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum EventKind {
            $(#[doc = $text] $variant,)*
        }

        impl EventKind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// A stable name for machines.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// Whether somebody may have to do something.
            #[must_use]
            pub const fn is_trouble(self) -> bool {
                match self { $(Self::$variant => $is_trouble,)* }
            }
        }
    };
}

kinds! {
    LeaseTaken, "lease-taken", false, "The node has its lease, and its pods are served.";
    LeaseMoved, "lease-moved", false, "The lease has another public address.";
    LeaseDisputed, "lease-disputed", true, "Somebody else changed the node's lease, or had it.";
    LeaseLost, "lease-lost", true, "The node has no lease any more, and ends.";
    LeaseReturned, "lease-returned", false, "The node gave its lease back.";
    LeaseDropped, "lease-dropped", false, "Another node's lease was given back for it.";
    ConfigRefused, "config-refused", true, "The network's configuration cannot be used.";
    IdentityChanged, "identity-changed", true, "The store is another one, and the node starts afresh in it.";
    StoreAway, "store-away", true, "The store of leases does not work.";
    StoreBack, "store-back", false, "The store of leases works again.";
    PeerJoined, "peer-joined", false, "Another node has a lease.";
    PeerChanged, "peer-changed", false, "Another node's lease says something else.";
    PeerRefused, "peer-refused", true, "Nothing can be sent to another node that has a lease.";
    PeerLost, "peer-lost", false, "Another node has no lease any more.";
    PodAttached, "pod-attached", false, "A pod was attached.";
    PodDetached, "pod-detached", false, "A pod was detached.";
    PodRestored, "pod-restored", false, "A pod that was without its device has it again.";
    AddressChanged, "address-changed", false, "The node's public address is another one.";
    MtuChanged, "mtu-changed", false, "Pods have another MTU.";
    InterfaceAway, "interface-away", true, "The underlay's interface cannot be used.";
    InterfaceBack, "interface-back", false, "The underlay's interface can be used again.";
    HostInterfaceOpen, "host-interface-open", false, "The host and pods reach each other.";
    HostInterfaceGone, "host-interface-gone", false, "The host and pods do not reach each other any more.";
    LimitReached, "limit-reached", true, "Something was lost because a limit was reached.";
    TakenOver, "taken-over", false, "Another process is the node.";
    TakeOverFailed, "take-over-failed", true, "Another process wanted to be the node, and is not.";
    HealthLost, "health-lost", true, "A thread that moves packets hangs.";
    HealthBack, "health-back", false, "All threads move packets again.";
}

/// Something that happened to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Event {
    /// Its number. Each is one more than the one before; what is missing between two was forgotten.
    pub sequence: u64,
    /// When it happened, in milliseconds of Unix time.
    pub time_ms: u64,
    /// When it happened last, if it happened several times in a row.
    #[serde(default)]
    pub last_ms: Option<u64>,
    /// How many times it happened.
    #[serde(default = "once")]
    pub times: u64,
    /// The name of an [`EventKind`].
    pub kind: String,
    /// What it happened to: a pod, a peer's address, a subnet, a store, an interface, a drop reason.
    pub subject: String,
    /// A sentence for people.
    pub text: String,
}

const fn once() -> u64 {
    1
}

impl Event {
    /// One that has happened once.
    #[must_use]
    pub fn new(
        sequence: u64,
        time_ms: u64,
        kind: EventKind,
        subject: String,
        text: String,
    ) -> Self {
        Self {
            sequence,
            time_ms,
            last_ms: None,
            times: once(),
            kind: kind.name().to_owned(),
            subject,
            text,
        }
    }

    /// When it happened last, in milliseconds of Unix time.
    #[must_use]
    pub fn latest_ms(&self) -> u64 {
        self.last_ms.unwrap_or(self.time_ms)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn kinds_have_names_of_their_own() {
        let names: HashSet<_> = EventKind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), EventKind::ALL.len());
        let is_plain = |name: &str| name.chars().all(|it| it.is_ascii_lowercase() || it == '-');
        for kind in EventKind::ALL {
            assert!(is_plain(kind.name()), "{kind:?}");
            assert!(kind.describe().ends_with('.'), "{kind:?}");
        }
    }

    #[test]
    fn an_event_of_a_node_that_knows_less_is_read() {
        let text = r#"{"sequence":7,"time_ms":5,"kind":"x","subject":"s","text":"t"}"#;
        let event: Event = serde_json::from_str(text).unwrap();
        assert_eq!((event.times, event.latest_ms()), (1, 5));
    }
}
