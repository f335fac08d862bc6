//! Giving a lease back for a node that does not do it itself any more.
//!
//! A lease lasts for a day, and an unused subnet is missing elsewhere. But a node that is
//! alive must not lose its own: it is probed before, and the store deletes the
//! record only if it has not been written since.

use ipnet::IpNet;
use muslin_stack::addresses::Nets;
use muslin_stack::api::control::{Code, DropLease, Dropped, Lease};
use muslin_stack::control::lease::{Answer, Entry, Op, Standing, SubnetKey, read_entry};
use muslin_stack::control::names::names_key;

use super::table::{Viewer, row, standing, survey, unusable};
use crate::error::{Error, Result};
use crate::store::{Store, StoreError};

/// Gives a lease back, and removes the record with the names of its pods.
///
/// # Errors
/// Bad usage if there is no such lease, or it is this node's own; a failure if its node is alive, or
/// may be, and `force` is not set, or if the store does not do it.
pub async fn release(
    store: &dyn Store,
    viewer: Viewer<'_>,
    request: &DropLease,
) -> Result<Dropped> {
    let entries = survey(store, viewer.prefix).await?;
    let (entry, lease) = find(&entries, viewer, &request.lease)?;
    let subnet = lease.subnet.ok_or_else(|| nothing(&request.lease))?;
    if SubnetKey::from(subnet) == viewer.own {
        return Err(Error::usage(format!(
            "{subnet} is this node's own lease: use 'muslin leave' to give it back"
        )));
    }
    if let Some(objection) = objection(&entry, &lease, viewer)
        && !request.force
    {
        let message = format!("{} is not given back: {objection}", title(subnet, &lease));
        return Err(Error::refused(Code::Busy, message));
    }
    delete(store, &entry).await.map_err(|reason| {
        Error::failed(format!(
            "{} is not given back: {reason}",
            title(subnet, &lease)
        ))
    })?;
    Ok(Dropped {
        subnet,
        names_removed: remove_names(store, viewer.prefix, subnet).await,
        node: lease.node,
        public_ip: lease.public_ip,
        state: lease.state,
        seconds_left: lease.seconds_left,
    })
}

/// The lease that a subnet, a key or a node's name stands for.
fn find(entries: &[Entry], viewer: Viewer<'_>, wanted: &str) -> Result<(Entry, Lease)> {
    let subnet = wanted.parse::<IpNet>().ok().map(|subnet| subnet.trunc());
    let subnet = subnet.or_else(|| Some(wanted.parse::<SubnetKey>().ok()?.first()));
    let all = entries
        .iter()
        .map(|entry| (entry, row(entry, read_entry(viewer.prefix, entry), viewer)));
    let mut found: Vec<_> = all
        .filter(|(_, lease)| match subnet {
            Some(subnet) => {
                let mut all = lease.subnet.iter().flat_map(Nets::iter::<IpNet>);
                all.any(|it| it == subnet)
            }
            None => lease.node.as_deref() == Some(wanted),
        })
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some((entry, lease)), true) => Ok((entry.clone(), lease)),
        (None, _) => Err(nothing(wanted)),
        (Some(last), false) => {
            found.push(last);
            let subnets = found.iter().filter_map(|(_, lease)| lease.subnet);
            let subnets: Vec<_> = subnets.map(|subnet| subnet.to_string()).collect();
            Err(Error::usage(format!(
                "'{wanted}' has several leases, name one of them: {}",
                subnets.join(", ")
            )))
        }
    }
}

fn nothing(wanted: &str) -> Error {
    let message = format!(
        "'{wanted}' is neither the subnet of a lease nor the name of a node that has one: 'muslin \
         leases' shows them"
    );
    Error::refused(Code::NoSuchLease, message)
}

/// `the lease 10.244.7.0/24 of node n2 (192.168.0.12)`
fn title(subnet: Nets, lease: &Lease) -> String {
    match (&lease.node, lease.public_ip) {
        (Some(node), Some(ip)) => format!("the lease {subnet} of node {node} ({ip})"),
        (None, Some(ip)) => format!("the lease {subnet} of {ip}"),
        (_, None) => format!("the key of {subnet}"),
    }
}

/// What speaks against giving a lease back, if anything does.
fn objection(entry: &Entry, lease: &Lease, viewer: Viewer<'_>) -> Option<String> {
    let Ok((key, record)) = read_entry(viewer.prefix, entry) else {
        return Some(format!(
            "it is not a lease ({}); --force removes it",
            lease.state
        ));
    };
    if entry.ttl.is_none() {
        let reservation = "it is reserved, since it does not expire; --force gives it back";
        return Some(reservation.to_owned());
    }
    if let Some(reason) = unusable(key, &record, viewer) {
        return Some(format!(
            "its node cannot be probed ({reason}); --force gives it back \
             nevertheless"
        ));
    }
    let Some(signs) = (viewer.known)(key.first()).signs else {
        return Some(
            "this node does not know it as a peer, and cannot probe it; --force \
             gives it back nevertheless"
                .to_owned(),
        );
    };
    (standing(entry, signs) == Standing::Alive).then(|| {
        "its node is alive: run 'muslin leave' there; --force gives it back nevertheless".to_owned()
    })
}

/// Deletes a key, if it is as it was read.
async fn delete(store: &dyn Store, entry: &Entry) -> std::result::Result<(), String> {
    let op = Op::CompareAndDelete {
        key: entry.key.clone(),
        expected: entry.revision,
    };
    match store.execute(op).await {
        Ok(Answer::Done(_)) => Ok(()),
        Ok(_) => Err("it was written a moment ago, so that its node may be alive".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Removes the record of a node's pods; false if there is none, or that is not possible.
async fn remove_names(store: &dyn Store, prefix: &str, subnet: Nets) -> bool {
    let found: std::result::Result<_, StoreError> =
        store.execute(Op::Get(names_key(prefix, subnet))).await;
    match found {
        Ok(Answer::Value(Some(entry))) => delete(store, &entry).await.is_ok(),
        _ => false,
    }
}
