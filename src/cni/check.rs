//! CHECK: whether a pod is attached as ADD has said. Later plugins may have changed its MAC address
//! and MTU, and added addresses and routes.

use std::time::{Duration, Instant};

use muslin_stack::api::cni;
use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::result::Added;
use muslin_stack::api::control::{Code, Refusal};

use super::call::{Call, Result};
use super::delegate::Delegate;
use super::interface::{Found, index, look_at};
use super::namespace::Namespace;
use super::node::{Node, PATIENCE, Trouble};
use super::restore;

/// How long a node is waited for.
const CONNECT: Duration = Duration::from_secs(1);

pub(super) fn run(call: &Call) -> Result<()> {
    let Call {
        environment,
        config,
        ..
    } = call;
    let path = environment.netns.as_deref().unwrap_or_default();
    let namespace = Namespace::of_container(path, environment.may_be_own_netns)?;
    let previous = config.previous.as_ref().ok_or_else(|| Error::Invalid {
        key: "prevResult",
        problem: "CHECK needs it".to_owned(),
    })?;
    let mut node =
        Node::connect(&config.socket, Instant::now() + CONNECT).map_err(Trouble::into_error)?;
    // The node may have lost the device, and by this has it again.
    restore::run(&mut node);
    let check = cni::Call::Check {
        key: config.key(&environment.container, &environment.interface),
        netns: namespace.id.clone(),
    };
    node.command(check, Instant::now() + PATIENCE)
        .map_err(|trouble| match trouble {
            Trouble::Refused(Refusal {
                code: Code::NoSuchPod,
                message,
            }) => Error::UnknownContainer(message),
            other => other.into_error(),
        })?;
    let name = &environment.interface;
    let found = namespace.within(|| {
        let index = index(name).ok_or_else(|| Error::Failed(format!("there is no {name}")))?;
        look_at(index).map_err(|error| Error::Failed(format!("looking at {name}: {error}")))
    })?;
    compare(&found, previous, (name, path), &environment.alias())?;
    Delegate::of(call)?.map_or(Ok(()), |it| it.forward())
}

/// Compares what is there with what ADD has said.
fn compare(found: &Found, previous: &Added, (name, path): (&str, &str), alias: &str) -> Result<()> {
    let amiss = |what: String| Err(Error::Failed(format!("{name} {what}")));
    let Some((_, ips)) = previous.interface(name, path) else {
        return amiss("is not in prevResult".to_owned());
    };
    if !found.is_up {
        return amiss("is down".to_owned());
    }
    if found.alias.as_deref() != Some(alias) {
        return amiss(format!(
            "is not the interface that was made: its alias is not '{alias}'"
        ));
    }
    for ip in &ips {
        if !found.addresses.contains(&ip.address) {
            return amiss(format!("has no address {}", ip.address));
        }
    }
    for route in &previous.routes {
        // Those of other plugins, and of other interfaces, are their own.
        let is_ours = ips
            .iter()
            .any(|ip| ip.gateway.is_some() && ip.gateway == route.gw);
        if is_ours && !found.routes.contains(&route.dst.trunc()) {
            return amiss(format!("has no route to {}", route.dst));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_later_plugins_may_change_is_left_alone() {
        let previous = json!({
            "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/n"}],
            "ips": [{"address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 0}],
            "routes": [
                {"dst": "10.0.0.0/16", "gw": "10.0.0.1"},
                {"dst": "192.168.0.0/16", "gw": "10.9.9.9"},
            ],
        });
        let found = || Found {
            is_up: true,
            alias: Some("muslin:c1".to_owned()),
            addresses: vec![
                "10.0.0.2/24".parse().unwrap(),
                "fe80::1/64".parse().unwrap(),
            ],
            routes: vec![
                "10.0.0.0/24".parse().unwrap(),
                "10.0.0.0/16".parse().unwrap(),
            ],
        };
        let check = |found: &Found, previous: &Value| {
            let previous = Added::read(previous).unwrap();
            let compared = compare(found, &previous, ("eth0", "/n"), "muslin:c1");
            compared.map_err(|error| error.to_string())
        };
        assert_eq!(check(&found(), &previous), Ok(()));
        let mut down = found();
        down.is_up = false;
        let mut strange = found();
        strange.alias = None;
        let mut moved = found();
        moved.addresses = vec!["10.0.0.3/24".parse().unwrap()];
        let mut lost = found();
        lost.routes.pop();
        for (found, what) in [
            (down, "eth0 is down"),
            (
                strange,
                "eth0 is not the interface that was made: its alias is not 'muslin:c1'",
            ),
            (moved, "eth0 has no address 10.0.0.2/24"),
            (lost, "eth0 has no route to 10.0.0.0/16"),
        ] {
            assert_eq!(check(&found, &previous), Err(what.to_owned()));
        }
        let other = check(&found(), &json!({}));
        assert_eq!(other, Err("eth0 is not in prevResult".to_owned()));
    }
}
