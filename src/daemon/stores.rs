//! Whether the store is where it was: its name may lead elsewhere, and this machine may get addresses.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::info;

use super::running::RunningNode;
use super::underlay;
use crate::host::Endpoints;

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(30);

/// Keeps egress closed to the store wherever it is, for as long as the node runs. It was `known` there
/// before.
pub(super) async fn follow(
    mut endpoints: Endpoints,
    mut known: Vec<SocketAddr>,
    running: Arc<RunningNode>,
) {
    while !endpoints.is_empty() {
        sleep(LOOK).await;
        let looked = tokio::task::spawn_blocking(move || {
            let own: Vec<_> = underlay::kernel().addresses().map(IpAddr::from).collect();
            let found = endpoints.look(&own);
            (endpoints, found)
        });
        let Ok((same, found)) = looked.await else {
            return;
        };
        endpoints = same;
        if found == known {
            continue;
        }
        if running.workers.set_stores(&found).is_err() {
            return;
        }
        let all: Vec<_> = found.iter().map(ToString::to_string).collect();
        info!("egress to the store is closed: {}", all.join(", "));
        known = found;
    }
}
