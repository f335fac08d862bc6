//! What flannel's unit tests show of its registry and its manager, by their numbers, with a real
//! server. Flannel watches its own lease apart; here it is in the one watch of all.

use etcd_client::PutOptions;
use muslin_stack::control::lease::{Change, LeaseRecord, ManagerSettings, OwnChange, WantedConfig};

use super::super::suite::{Node, Place, settings};
use super::tests::Server;
use super::*;

const DAY: i64 = 86_400;

fn record(last: u8) -> String {
    LeaseRecord::udp([192, 168, 0, last].into()).to_json()
}

/// Whatever network the store has.
fn any(prefix: &str, previous: Option<&str>) -> ManagerSettings {
    let mut settings = settings(prefix, 1);
    settings.wanted_config = WantedConfig::Any;
    settings.previous = previous.map(|subnet| subnet.replace("-24", "/24").parse().unwrap());
    settings
}

async fn configure(client: &mut Client, prefix: &str, config: &str) {
    let key = format!("{prefix}/config");
    client.put(key, config, None).await.unwrap();
}

/// The keys of a network's leases.
async fn leases(client: &mut Client, prefix: &str) -> Vec<String> {
    let prefix = format!("{prefix}/subnets/");
    let options = GetOptions::new().with_prefix();
    let answer = client.get(prefix.as_str(), Some(options)).await.unwrap();
    let keys = answer.kvs().iter().map(|kv| text(kv.key()));
    keys.map(|key| key.replace(&prefix, "")).collect()
}

/// The subnet that a node gets which then ends without giving it back.
async fn subnet(server: &Server, settings: ManagerSettings) -> String {
    let mut node = Node::start(server.open(), settings);
    let subnet = node.subnet().await;
    node.cancel().await;
    subnet
}

#[tokio::test]
async fn u02_u03_who_begins_below_the_horizon_gets_what_there_is_and_then_what_comes() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut client = server.client().await;
    let (old, new) = ("10.244.201.0-24", "10.244.202.0-24");
    let key = |subnet: &str| format!("/u02/subnets/{subnet}");
    client.put(key(old), record(8), None).await.unwrap();
    client.put("/x", "", None).await.unwrap();
    server.compact().await;

    // All leases, and one.
    for keys in ["/u02/subnets/".to_owned(), key(old)] {
        let store = server.open();
        let gap = match store.watch(&keys, 1).await {
            Ok(mut watch) => watch.next().await,
            Err(error) => Err(error),
        };
        assert_eq!(gap, Err(StoreError::Gap), "{keys}");
    }
    let mut node = Node::start(server.open(), settings("/u02", 1));
    assert_eq!(node.peer().await, format!("{old} 192.168.0.8"));
    node.subnet().await;
    client.put(key(new), record(9), None).await.unwrap();
    assert_eq!(node.peer().await, format!("{new} 192.168.0.9"));
}

#[tokio::test]
async fn u07_a_subnet_in_range_is_found_again_and_a_previous_one_counts_if_it_fits() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut client = server.client().await;
    let range = r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0"}"#;
    for prefix in ["/u07", "/u07-fits", "/u07-outside"] {
        configure(&mut client, prefix, range).await;
    }
    let all = ["10.3.5.0-24", "10.3.6.0-24", "10.3.7.0-24", "10.3.8.0-24"];
    let first = subnet(&server, any("/u07", None)).await;
    assert!(all.contains(&first.as_str()), "{first}");
    assert_eq!(subnet(&server, any("/u07", None)).await, first);
    assert_eq!(leases(&mut client, "/u07").await, [first]);

    for wanted in all {
        let got = subnet(&server, any("/u07-fits", Some(wanted))).await;
        assert_eq!(got, wanted);
        client
            .delete(format!("/u07-fits/subnets/{got}"), None)
            .await
            .unwrap();
    }
    let got = subnet(&server, any("/u07-outside", Some("10.4.5.0-24"))).await;
    assert!(all.contains(&got.as_str()), "{got}");
}

#[tokio::test]
async fn u08_another_network_is_another_subnet_and_the_old_lease_goes() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut client = server.client().await;
    configure(&mut client, "/u08", r#"{"Network":"10.3.0.0/16"}"#).await;
    let old = subnet(&server, any("/u08", None)).await;
    configure(&mut client, "/u08", r#"{"Network":"10.4.0.0/16"}"#).await;
    let new = subnet(&server, any("/u08", Some(&old))).await;
    assert!(
        old.starts_with("10.3.") && new.starts_with("10.4."),
        "{old} {new}"
    );
    assert_eq!(leases(&mut client, "/u08").await, [new]);
}

#[tokio::test]
async fn u09_the_own_lease_is_no_peer_and_another_is_one_change() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut client = server.client().await;
    let mut node = Node::start(server.open(), settings("/u09", 1));
    let own = format!("/u09/subnets/{}", node.subnet().await);
    let key = |last: u8| format!("/u09/subnets/10.244.{last}.0-24");
    for last in [201, 202] {
        // The own record goes and comes back meanwhile.
        client.delete(own.as_str(), None).await.unwrap();
        client.put(key(last), record(last), None).await.unwrap();
        let mut told = Vec::new();
        for _ in 0..2 {
            told.push(match node.next().await {
                Change::Peer(key, _) => key.to_string(),
                Change::Own(OwnChange::Renewed) | Change::Own(OwnChange::Acquired(_)) => {
                    "own".to_owned()
                }
                other => panic!("{other:?}"),
            });
        }
        told.sort();
        assert_eq!(told, [format!("10.244.{last}.0-24"), "own".to_owned()]);
    }
}

#[tokio::test]
async fn u11_a_peer_that_renews_is_no_news_and_one_that_is_deleted_goes() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut client = server.client().await;
    let mut node = Node::start(server.open(), settings("/u11", 1));
    node.subnet().await;
    let key = "/u11/subnets/10.244.200.0-24";
    for _ in 0..3 {
        let lease = client.lease_grant(DAY, None).await.unwrap().id();
        let options = PutOptions::new().with_lease(lease);
        client.put(key, record(9), Some(options)).await.unwrap();
    }
    client.delete(key, None).await.unwrap();
    assert_eq!(node.peer().await, "10.244.200.0-24 192.168.0.9");
    assert_eq!(node.peer().await, "10.244.200.0-24 gone");
}

#[tokio::test]
async fn u12_a_renewal_is_a_new_day_and_the_same_record() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut client = server.client().await;
    // Half a day, after which a lease is renewed, passes in a second.
    let mut node = Node::at_speed(server.open(), settings("/u12", 1), 43_200);
    let key = format!("/u12/subnets/{}", node.subnet().await);
    let mut get = async || client.get(key.as_str(), None).await.unwrap().kvs()[0].clone();
    let before = get().await;
    while node.next().await != Change::Own(OwnChange::Renewed) {}
    let after = get().await;
    assert!(text(before.value()).contains("VtepMAC"), "{before:?}");
    assert_eq!(after.value(), before.value());
    assert_ne!(after.lease(), before.lease());
    let life = client
        .lease_time_to_live(after.lease(), None)
        .await
        .unwrap();
    assert_eq!(life.granted_ttl(), DAY);
    assert!(life.ttl() >= DAY - 10, "{life:?}");
}
