//! Keeping a pod attached: whenever its node is gone, its device is attached to the successor.

use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;

use muslin_stack::api::control::{Attach, Attached, Code};
use tracing::{info, warn};

use super::device::Device;
use crate::control::Client;
use crate::error::{Error, Result};

/// How often a node that is gone is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long to wait after a node has refused.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Attaches the pod's device again whenever the node is gone and comes back. `follow` is called when
/// the pod is given something else than it has, and again after it has failed; `resize` when nothing
/// but its MTU is another one.
pub(crate) async fn stay_attached(
    mut client: Client,
    socket: &Path,
    device: &Device<'_>,
    mut attached: Attached,
    follow: impl AsyncFn(&Attached) -> Result<()>,
    resize: impl AsyncFn(&Attached) -> Result<()>,
) -> Infallible {
    let mut is_followed = true;
    loop {
        while let Some(link) = client.changed().await {
            attached.link = link;
            match resize(&attached).await {
                Ok(()) => info!("the pod's MTU is now {}", link.mtu),
                Err(error) => warn!("the pod keeps its MTU, not {}: {error}", link.mtu),
            }
        }
        info!("the node is gone; waiting for its successor");
        let (mut heard, mut complained) = (String::new(), String::new());
        client = loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            let (client, again) = match Client::reach(socket).await {
                Ok(None) => continue,
                Ok(Some(client)) => {
                    let again = attach_again(&client, device, &attached).await;
                    (Some(client), again)
                }
                Err(error) => (None, Err(error)),
            };
            let taken = match again {
                Ok(now) if now == attached && is_followed => Ok(()),
                Ok(now) => {
                    if now.address != attached.address {
                        warn!("the pod's address is now {}", now.address);
                    }
                    attached = now;
                    let followed = follow(&attached).await;
                    is_followed = followed.is_ok();
                    followed
                }
                Err(error) => Err(error),
            };
            match (taken, client) {
                (Ok(()), Some(client)) => break client,
                (Ok(()), None) => {}
                (Err(error), _) => {
                    let text = error.to_string();
                    // One that has just begun is ready the next time.
                    if text == heard && text != complained {
                        warn!("the node refuses to reattach the pod: {text}");
                        complained.clone_from(&text);
                    }
                    heard = text;
                    tokio::time::sleep(ASK_AGAIN).await;
                }
            }
        };
    }
}

/// Asks for what a pod had; a node that has another subnet now gives another address.
async fn attach_again(
    client: &Client,
    device: &Device<'_>,
    attached: &Attached,
) -> Result<Attached> {
    let request = |address| {
        let mut request = Attach::new(Some(attached.pod.clone()), address);
        request.publish.clone_from(&attached.published);
        request
    };
    let same = request(Some(attached.address.addresses()));
    match device.attach(client, same).await {
        Err(Error::Refused {
            code: Code::AddressNotAvailable,
            ..
        }) => device.attach(client, request(None)).await,
        other => other,
    }
}
