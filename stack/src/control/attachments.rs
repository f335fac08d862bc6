//! Attachments of container runtimes: which pod a container's interface belongs to, from the moment
//! that a place is reserved for it.
//!
//! Runtimes call for the end of an attachment several times, late, never, or after a successor has
//! the pod's name. So an attachment is known by its container and interface, and whoever asks for the
//! end of one that is not there has what it wants.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::api::cni::{Key, NetworkNamespace, Reserve};
use crate::control::ipam::PodName;
use crate::{Duration, Instant};

/// The age below which an attachment is never collected: the runtime's list may be older.
const TOO_YOUNG: Duration = Duration::from_secs(60);
/// Letters of a container's identity that tell it from others, as in `docker ps`.
const SHORT_ID: usize = 12;
/// Letters of a pod's name.
const MAX_NAME: usize = 63;
/// The interface that most containers have alone.
const FIRST_INTERFACE: &str = "eth0";

/// The attachments of a node.
#[derive(Debug, Clone, Default)]
pub struct Attachments {
    entries: BTreeMap<Key, RuntimeAttachment>,
}

/// An attachment of a container runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeAttachment {
    /// Its pod.
    pub pod: PodName,
    /// The namespace that its interface is in.
    pub netns: NetworkNamespace,
    state: State,
    since: Instant,
    /// Whether its namespace can be looked at. It cannot where its runtime has mounts of its own.
    is_visible: bool,
    /// Whether its namespace was gone at the last look.
    was_gone: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// For the connection of this number.
    Reserved(u64),
    Attached,
    /// An earlier process of the node had its device.
    Missing,
    /// Its interface was removed.
    Gone,
}

/// Why something cannot be done with an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AttachmentError {
    /// There is one already.
    #[error("the interface {0} is attached already")]
    Present(Key),
    /// There is none.
    #[error("the interface {0} is not attached")]
    Absent(Key),
    /// This connection has not reserved it.
    #[error("the interface {0} was not reserved by this connection")]
    NotReserved(Key),
    /// It is in another namespace.
    #[error("the interface {0} is attached in another network namespace")]
    OtherNamespace(Key),
    /// An earlier process of the node had its device.
    #[error("the node was restarted and has no device of the interface {0} yet")]
    DeviceMissing(Key),
    /// Its device is not missing.
    #[error("the device of the interface {0} is not missing")]
    HasDevice(Key),
    /// Its interface was removed.
    #[error("the interface {0} was removed")]
    DeviceGone(Key),
}

impl Attachments {
    /// Whether a place may be reserved, and the pod whose place it is to have: a container that is
    /// started again has its former identity and another namespace.
    ///
    /// # Errors
    /// If there is one in this namespace, or one that is being made.
    pub fn admit(&self, reserve: &Reserve) -> Result<Option<PodName>, AttachmentError> {
        match self.entries.get(&reserve.key) {
            None => Ok(None),
            Some(entry) => match entry.state {
                State::Attached | State::Missing | State::Gone
                    if !entry.netns.is_same(&reserve.netns) =>
                {
                    Ok(Some(entry.pod.clone()))
                }
                _ => Err(AttachmentError::Present(reserve.key.clone())),
            },
        }
    }

    /// Reserves a place for the connection of this number.
    pub fn reserve(&mut self, reserve: &Reserve, pod: PodName, connection: u64, now: Instant) {
        let entry = RuntimeAttachment {
            pod,
            netns: reserve.netns.clone(),
            state: State::Reserved(connection),
            since: now,
            is_visible: false,
            was_gone: false,
        };
        self.entries.insert(reserve.key.clone(), entry);
    }

    /// Adds an attachment of an earlier process, whose device is missing, and whose namespace that
    /// process could see or not.
    pub fn remember(
        &mut self,
        key: Key,
        netns: NetworkNamespace,
        pod: PodName,
        is_visible: bool,
        now: Instant,
    ) {
        let entry = RuntimeAttachment {
            pod,
            netns,
            state: State::Missing,
            since: now,
            is_visible,
            was_gone: false,
        };
        self.entries.insert(key, entry);
    }

    /// The pod for which this connection has reserved the attachment.
    ///
    /// # Errors
    /// If it has not.
    pub fn reserved(
        &self,
        key: &Key,
        connection: u64,
    ) -> Result<&RuntimeAttachment, AttachmentError> {
        let entry = self.entries.get(key);
        entry
            .filter(|entry| entry.state == State::Reserved(connection))
            .ok_or_else(|| AttachmentError::NotReserved(key.clone()))
    }

    /// Gives a reservation up, if it is still one, and returns its pod.
    pub fn give_up(&mut self, key: &Key, connection: u64) -> Option<PodName> {
        self.reserved(key, connection).ok()?;
        self.release(key)
    }

    /// Ends an attachment and returns its pod, if there is one.
    pub fn release(&mut self, key: &Key) -> Option<PodName> {
        self.entries.remove(key).map(|entry| entry.pod)
    }

    /// The attachment has its device.
    pub fn set_attached(&mut self, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.state = State::Attached;
        }
    }

    /// The attachment's interface was removed, if it had one.
    pub fn set_gone(&mut self, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.state == State::Attached
        {
            entry.state = State::Gone;
        }
    }

    /// An attachment in this namespace.
    ///
    /// # Errors
    /// If there is none, or it is in another namespace.
    pub fn find(
        &self,
        key: &Key,
        netns: &NetworkNamespace,
    ) -> Result<&RuntimeAttachment, AttachmentError> {
        match self.entries.get(key) {
            Some(entry) if entry.netns.is_same(netns) => Ok(entry),
            Some(_) => Err(AttachmentError::OtherNamespace(key.clone())),
            None => Err(AttachmentError::Absent(key.clone())),
        }
    }

    /// Whether an attachment is as it is to be.
    ///
    /// # Errors
    /// What is amiss.
    pub fn check(
        &self,
        key: &Key,
        netns: &NetworkNamespace,
    ) -> Result<&RuntimeAttachment, AttachmentError> {
        let entry = self.find(key, netns)?;
        match entry.state {
            State::Attached => Ok(entry),
            State::Missing => Err(AttachmentError::DeviceMissing(key.clone())),
            State::Gone => Err(AttachmentError::DeviceGone(key.clone())),
            State::Reserved(_) => Err(AttachmentError::Absent(key.clone())),
        }
    }

    /// Those of a network that are none of these. What is young, or being made, is left alone.
    #[must_use]
    pub fn stale(&self, network: &str, valid: &[Key], now: Instant) -> Vec<Key> {
        let entries = self.entries.iter();
        let stale = entries.filter(|(key, entry)| {
            key.network == network
                && !matches!(entry.state, State::Reserved(_))
                && now >= entry.since + TOO_YOUNG
                && !valid.contains(key)
        });
        stale.map(|(key, _)| key.clone()).collect()
    }

    /// The namespace of an attachment can be looked at.
    pub fn set_visible(&mut self, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.is_visible = true;
        }
    }

    /// Looks whether the namespaces are still there, and returns the attachments whose namespace was
    /// gone the last time, too. Those that cannot be looked at are left alone.
    pub fn look(&mut self, is_there: impl Fn(&NetworkNamespace) -> bool) -> Vec<Key> {
        let mut gone = Vec::new();
        for (key, entry) in &mut self.entries {
            if matches!(entry.state, State::Reserved(_)) || !entry.is_visible {
                continue;
            }
            let is_gone = !is_there(&entry.netns);
            if is_gone && entry.was_gone {
                gone.push(key.clone());
            }
            entry.was_gone = is_gone;
        }
        gone
    }

    /// Whether there is such an attachment.
    #[must_use]
    pub fn contains(&self, key: &Key) -> bool {
        self.entries.contains_key(key)
    }

    /// Whether one is being made.
    #[must_use]
    pub fn is_reserving(&self) -> bool {
        let mut entries = self.entries.values();
        entries.any(|entry| matches!(entry.state, State::Reserved(_)))
    }

    /// An attachment in this namespace whose device is missing.
    ///
    /// # Errors
    /// If there is none, or its device is not missing.
    pub fn without_device(
        &self,
        key: &Key,
        netns: &NetworkNamespace,
    ) -> Result<&RuntimeAttachment, AttachmentError> {
        match self.find(key, netns)? {
            entry if entry.state == State::Missing => Ok(entry),
            _ => Err(AttachmentError::HasDevice(key.clone())),
        }
    }

    /// Those whose device is missing.
    pub fn missing(&self) -> impl Iterator<Item = (&Key, &RuntimeAttachment)> {
        let entries = self.entries.iter();
        entries.filter(|(_, entry)| entry.state == State::Missing)
    }
}

/// Names for the pod of a container, the best first: its own, and the same with the container's
/// identity where another pod has that already.
pub fn names(reserve: &Reserve) -> impl Iterator<Item = PodName> {
    let container = plain(&reserve.key.container, SHORT_ID);
    let own = match &reserve.pod {
        Some(pod) if !pod.namespace.is_empty() && !pod.name.is_empty() => {
            plain(&format!("{}.{}", pod.name, pod.namespace), MAX_NAME)
        }
        Some(pod) if !pod.name.is_empty() => plain(&pod.name, MAX_NAME),
        _ => container.clone(),
    };
    let suffix = match reserve.key.interface.as_str() {
        FIRST_INTERFACE => String::new(),
        other => format!("-{}", plain(other, MAX_NAME)),
    };
    let name = move |ends: &[&str]| {
        let end = ends.concat();
        let begin = plain(&own, MAX_NAME.saturating_sub(end.len()));
        format!("{begin}{end}").parse().ok()
    };
    let both = [name(&[&suffix]), name(&["-", &container, &suffix])];
    both.into_iter().flatten()
}

/// Text in the letters of a pod's name, at most so many.
fn plain(text: &str, max: usize) -> String {
    let letter = |c: char| match c.to_ascii_lowercase() {
        c if c.is_ascii_alphanumeric() || c == '.' => c,
        _ => '-',
    };
    let plain: String = text.chars().map(letter).take(max).collect();
    plain.trim_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::cni::KubernetesPod;

    const NOW: Instant = Instant::from_micros_const(100_000_000);

    fn key(container: &str) -> Key {
        Key::new("muslin", container, "eth0")
    }

    fn netns(inode: u64) -> NetworkNamespace {
        NetworkNamespace {
            path: format!("/run/netns/{inode}"),
            device: 4,
            inode,
        }
    }

    fn pod(name: &str) -> PodName {
        name.parse().unwrap()
    }

    /// One attachment `a` in the namespace 1 with the pod `a`.
    fn attached() -> Attachments {
        let mut all = Attachments::default();
        let reserve = Reserve::new(key("a"), netns(1));
        assert_eq!(all.admit(&reserve), Ok(None));
        all.reserve(&reserve, pod("a"), 7, NOW);
        assert_eq!(all.reserved(&key("a"), 7).unwrap().pod, pod("a"));
        all.set_attached(&key("a"));
        all.set_visible(&key("a"));
        all
    }

    #[test]
    fn a_reservation_is_the_connections_that_made_it() {
        let mut all = Attachments::default();
        all.reserve(&Reserve::new(key("a"), netns(1)), pod("a"), 7, NOW);
        let not_reserved = AttachmentError::NotReserved(key("a"));
        assert_eq!(all.reserved(&key("a"), 8), Err(not_reserved));
        assert_eq!(all.give_up(&key("a"), 8), None);
        let again = Reserve::new(key("a"), netns(2));
        let present = AttachmentError::Present(key("a"));
        assert_eq!(all.admit(&again), Err(present), "it is being made");
        assert_eq!(all.give_up(&key("a"), 7), Some(pod("a")));
        assert_eq!(all.give_up(&key("a"), 7), None);
        let mut all = attached();
        assert_eq!(all.give_up(&key("a"), 7), None, "it is attached by now");
        assert_eq!(all.release(&key("a")), Some(pod("a")));
        assert_eq!(all.release(&key("a")), None);
    }

    #[test]
    fn a_container_that_starts_again_takes_its_former_place() {
        let all = attached();
        let present = AttachmentError::Present(key("a"));
        let same = Reserve::new(key("a"), netns(1));
        assert_eq!(all.admit(&same), Err(present));
        let other = Reserve::new(key("a"), netns(2));
        assert_eq!(all.admit(&other), Ok(Some(pod("a"))));
    }

    #[test]
    fn a_check_finds_what_is_amiss() {
        let mut all = attached();
        all.check(&key("a"), &netns(1)).unwrap();
        let moved = NetworkNamespace {
            path: "/proc/1/ns/net".to_owned(),
            ..netns(1)
        };
        all.check(&key("a"), &moved).unwrap();
        let other = AttachmentError::OtherNamespace(key("a"));
        assert_eq!(all.check(&key("a"), &netns(2)), Err(other));
        let absent = AttachmentError::Absent(key("b"));
        assert_eq!(all.check(&key("b"), &netns(1)), Err(absent));
        all.set_gone(&key("a"));
        let gone = AttachmentError::DeviceGone(key("a"));
        assert_eq!(all.check(&key("a"), &netns(1)), Err(gone));
        all.remember(key("a"), netns(1), pod("a"), true, NOW);
        let missing = AttachmentError::DeviceMissing(key("a"));
        assert_eq!(all.check(&key("a"), &netns(1)), Err(missing));
        assert_eq!(all.missing().count(), 1);
        assert!(all.without_device(&key("a"), &netns(1)).is_ok());
        assert!(all.without_device(&key("a"), &netns(2)).is_err());
        all.set_attached(&key("a"));
        let has = AttachmentError::HasDevice(key("a"));
        assert_eq!(all.without_device(&key("a"), &netns(1)), Err(has));
        assert_eq!(all.missing().count(), 0);
    }

    #[test]
    fn what_the_runtime_does_not_name_is_stale_once_it_is_old() {
        let mut all = attached();
        let later = NOW + TOO_YOUNG;
        assert!(all.stale("muslin", &[], NOW).is_empty());
        assert!(all.stale("muslin", &[key("a")], later).is_empty());
        assert!(all.stale("other", &[], later).is_empty());
        assert_eq!(all.stale("muslin", &[key("b")], later), [key("a")]);
        all.reserve(&Reserve::new(key("c"), netns(3)), pod("c"), 7, NOW);
        assert_eq!(all.stale("muslin", &[], later), [key("a")]);
    }

    #[test]
    fn a_namespace_is_gone_when_it_is_gone_twice() {
        let mut all = attached();
        assert!(all.look(|_| false).is_empty());
        assert!(all.look(|_| true).is_empty());
        assert!(all.look(|_| false).is_empty());
        assert_eq!(all.look(|_| false), [key("a")]);
        all.remember(key("a"), netns(1), pod("a"), false, NOW);
        assert!(all.look(|_| false).is_empty());
        assert!(all.look(|_| false).is_empty(), "it was never seen");
    }

    #[test]
    fn pods_are_named_as_their_runtime_names_them() {
        let names = |namespace: &str, name: &str, container: &str, interface: &str| {
            let key = Key::new("muslin", container, interface);
            let mut reserve = Reserve::new(key, netns(1));
            reserve.pod = (!name.is_empty()).then(|| KubernetesPod {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                uid: String::new(),
            });
            let all: Vec<_> = super::names(&reserve).map(String::from).collect();
            all
        };
        let id = "0123456789abcdef";
        let both = ["web-0.default", "web-0.default-0123456789ab"];
        assert_eq!(names("default", "web-0", id, "eth0"), both);
        let second = ["web-0.default-net1", "web-0.default-0123456789ab-net1"];
        assert_eq!(names("default", "web-0", id, "net1"), second);
        assert_eq!(names("", "Web_0", id, "eth0")[0], "web-0");
        assert_eq!(names("", "", id, "eth0")[0], "0123456789ab");
        assert_eq!(names("", "", "My_Container.", "eth0")[0], "my-container");
        let long = names("kube-system", &"x".repeat(253), id, "eth0");
        assert_eq!(long[0], "x".repeat(63));
        assert_eq!(long[1], format!("{}-0123456789ab", "x".repeat(50)));
        assert!(
            names("", "...", "-", "eth0").is_empty(),
            "the node names it"
        );
    }
}
