//! What can happen to a server, to the way there, and to what it has.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use muslin_stack::control::lease::{Change, LeaseRecord, Loss, OwnChange, WantedConfig};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;

use super::super::open;
use super::super::suite::{Node, Place, settings, soon};
use super::tests::Server;
use super::*;

/// The way to a server, which can be cut.
struct Way {
    address: SocketAddr,
    is_cut: watch::Sender<bool>,
}

impl Way {
    async fn to(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (is_cut, cut) = watch::channel(false);
        let port = server.client;
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut cut = cut.clone();
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(("127.0.0.1", port)).await?;
                    tokio::select! {
                        result = copy_bidirectional(&mut near, &mut far) => result.map(|_| ()),
                        _ = cut.wait_for(|cut| *cut) => Ok(()),
                    }
                });
            }
        });
        Self { address, is_cut }
    }

    fn open(&self) -> Arc<dyn Store> {
        open(format!("etcd://{}", self.address), &EtcdOptions::default()).unwrap()
    }

    fn cut(&self, is_cut: bool) {
        self.is_cut.send_replace(is_cut);
    }
}

fn record(last: u8) -> String {
    LeaseRecord::udp([192, 168, 0, last].into()).to_json()
}

/// Waits until a key has a value other than that of `revision`.
async fn rewritten(server: &Server, key: &str, revision: Revision) -> Entry {
    let store = server.open();
    soon("the record", async {
        loop {
            if let Ok(Answer::Value(Some(entry))) = store.execute(Op::Get(key.to_owned())).await
                && entry.revision != revision
            {
                return entry;
            }
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

#[tokio::test]
async fn u06_compactions_and_a_restart_while_connected_change_nothing() {
    let Some(mut server) = Server::start().await else {
        return;
    };
    let mut node = Node::start(server.open(), settings("/u06", 1));
    node.subnet().await;
    let mut client = server.client().await;
    for round in 0..3u8 {
        let mut expected = BTreeSet::new();
        for last in 10..20 {
            let key = format!("10.244.{}.0-24", 100 + last);
            expected.insert(format!("{key} 192.168.0.{}", last + round));
            let key = format!("/u06/subnets/{key}");
            client.put(key, record(last + round), None).await.unwrap();
        }
        while !expected.is_empty() {
            let peer = node.peer().await;
            assert!(expected.remove(&peer), "{peer}");
        }
        server.compact().await;
    }
    server.stop();
    server.start_again().await;
    // Known state is not reported again: the next event is a new one.
    let mut client = server.client().await;
    let key = "/u06/subnets/10.244.200.0-24";
    client.put(key, record(9), None).await.unwrap();
    assert_eq!(node.peer().await, "10.244.200.0-24 192.168.0.9");
}

#[tokio::test]
async fn u04_what_a_compaction_hides_from_a_cut_off_node_is_told_afterwards() {
    let Some(server) = Server::start().await else {
        return;
    };
    let way = Way::to(&server).await;
    let mut node = Node::start(way.open(), settings("/u04", 1));
    let own = format!("/u04/subnets/{}", node.subnet().await);
    let key = |last: u8| format!("/u04/subnets/10.244.{last}.0-24");
    let mut client = server.client().await;
    for last in [201, 202, 203] {
        client.put(key(last), record(last), None).await.unwrap();
        node.peer().await;
    }
    way.cut(true);
    client.delete(key(201), None).await.unwrap();
    client.put(key(202), record(222), None).await.unwrap();
    client.put(key(203), record(203), None).await.unwrap();
    client.put(key(204), record(204), None).await.unwrap();
    client.delete(own.as_str(), None).await.unwrap();
    server.compact().await;
    way.cut(false);
    let mut told = Vec::new();
    for _ in 0..3 {
        told.push(node.peer().await);
    }
    told.sort();
    assert_eq!(
        told,
        [
            "10.244.201.0-24 gone",
            "10.244.202.0-24 192.168.0.222",
            "10.244.204.0-24 192.168.0.204"
        ]
    );
    rewritten(&server, &own, 0).await;
    client.delete(key(203), None).await.unwrap();
    assert_eq!(node.peer().await, "10.244.203.0-24 gone");
}

#[tokio::test]
async fn a_server_that_freezes_holds_up_nothing() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut node = Node::start(server.open(), settings("/frozen", 1));
    let own = node.subnet().await;
    let store = server.open();
    let get = || store.execute(Op::Get("/x".to_owned()));
    get().await.unwrap();
    let process = Pid::from_raw(server.process.id().try_into().unwrap());
    kill(process, Signal::SIGSTOP).unwrap();
    // The signal is not yet the stop of all its threads.
    waitpid(process, Some(WaitPidFlag::WUNTRACED)).unwrap();
    let mut late = Node::start(server.open(), settings("/frozen", 2));
    for _ in 0..2 {
        let begun = Instant::now();
        let error = get().await.unwrap_err().to_string();
        assert!(error.contains("does not answer"), "{error}");
        assert!(begun.elapsed() < PATIENCE * 5, "{:?}", begun.elapsed());
    }
    kill(process, Signal::SIGCONT).unwrap();
    let second = late.subnet().await;
    assert_eq!(node.peer().await, format!("{second} 192.168.0.2"));
    late.sees(&own).await;
}

#[tokio::test]
async fn a_lease_is_renewed_by_another_server_when_one_is_gone() {
    let Some(server) = Server::start().await else {
        return;
    };
    let ways = [Way::to(&server).await, Way::to(&server).await];
    let url = format!("etcd://{},{}", ways[0].address, ways[1].address);
    let store = open(&url, &EtcdOptions::default()).unwrap();
    // Half a day, after which a lease is renewed, passes in a second.
    let mut node = Node::at_speed(store, settings("/renewed", 1), 43_200);
    let key = format!("/renewed/subnets/{}", node.subnet().await);
    let mut before = rewritten(&server, &key, 0).await;
    for way in ways.iter().chain(&ways) {
        way.cut(true);
        for _ in 0..2 {
            let after = rewritten(&server, &key, before.revision).await;
            assert_eq!(after.value, before.value);
            before = after;
        }
        way.cut(false);
    }
}

#[tokio::test]
async fn what_was_wiped_or_revoked_is_published_again() {
    let Some(mut server) = Server::start().await else {
        return;
    };
    let mut node = Node::start(server.open(), settings("/wiped", 1));
    let key = format!("/wiped/subnets/{}", node.subnet().await);
    let before = rewritten(&server, &key, 0).await;

    // Revoked by hand.
    let mut client = server.client().await;
    let lease = client.get(key.as_str(), None).await.unwrap().kvs()[0].lease();
    client.lease_revoke(lease).await.unwrap();
    let after = rewritten(&server, &key, before.revision).await;
    assert_eq!(after.value, before.value);

    // Another history, whose revisions begin anew.
    server.stop();
    server.wipe();
    server.start_again().await;
    let after = rewritten(&server, &key, after.revision).await;
    assert_eq!(after.value, before.value);
    // And the node hears what happens there.
    let mut client = server.client().await;
    let peer = "/wiped/subnets/10.244.200.0-24";
    client.put(peer, record(9), None).await.unwrap();
    assert_eq!(node.peer().await, "10.244.200.0-24 192.168.0.9");
}

#[tokio::test]
async fn of_two_that_want_the_last_subnet_one_has_it() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut client = server.client().await;
    let config = r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.5.0","SubnetMax":"10.1.5.0",
        "Backend":{"Type":"vxlan"}}"#;
    let stores = [server.open(), server.open()];
    for round in 0..100 {
        let prefix = format!("/last-{round}");
        client
            .put(format!("{prefix}/config"), config, None)
            .await
            .unwrap();
        let mut nodes: Vec<_> = (1..=2u8)
            .map(|last| {
                let mut settings = settings(&prefix, last);
                settings.wanted_config = WantedConfig::Any;
                Node::start(stores[usize::from(last) - 1].clone(), settings)
            })
            .collect();
        let mut owners = Vec::new();
        for (index, node) in nodes.iter_mut().enumerate() {
            loop {
                match node.next().await {
                    Change::Own(OwnChange::Acquired(_)) => break owners.push(index),
                    Change::Own(OwnChange::Lost(Loss::OutOfSubnets(1))) => break,
                    Change::Own(OwnChange::Lost(loss)) => panic!("{loss}"),
                    _ => {}
                }
            }
        }
        let [owner] = owners[..] else {
            panic!("round {round}: {owners:?}")
        };
        let key = format!("{prefix}/subnets/10.1.5.0-24");
        let entry = rewritten(&server, &key, 0).await;
        let address = format!("\"192.168.0.{}\"", owner + 1);
        assert!(entry.value.contains(&address), "{}", entry.value);
    }
}

/// A record that is one of many kinds, and whether it is a lease that can be used.
fn strange(index: usize) -> (String, String, bool) {
    let subnet = format!("10.{}.{}.0-24", 16 + index / 250, index % 250);
    let good = format!(
        r#"{{"PublicIP":"172.16.{}.{}"}}"#,
        index / 250,
        index % 250 + 1
    );
    match index % 20 {
        0 => (subnet, "not JSON".to_owned(), false),
        1 => (subnet, r#"{"PublicIP":null}"#.to_owned(), false),
        2 => (format!("{subnet}hi"), good, false),
        3 => (subnet, "[".repeat(10_000), false),
        4 => (
            subnet,
            format!(r#"{{"PublicIP":"{}"}}"#, "9".repeat(20_000)),
            false,
        ),
        5 => (subnet, r#"{"PublicIP":"224.0.0.1"}"#.to_owned(), false),
        6 => (subnet.replace("10.", "11."), good, false),
        7 => (format!("0{subnet}"), good, false),
        8 => (format!("{subnet}&fd00:{index:x}::-64"), good, true),
        9 => (
            subnet,
            good.replace('}', r#","BackendType":"host-gw"}"#),
            true,
        ),
        10 => (
            subnet,
            good.replace('}', r#","BackendData":{"x":[{}]}}"#),
            true,
        ),
        _ => (subnet, good, true),
    }
}

#[tokio::test]
async fn thousands_of_strange_records_are_each_told_once() {
    const COUNT: usize = 5_000;
    let Some(server) = Server::start().await else {
        return;
    };
    let way = Way::to(&server).await;
    let mut client = server.client().await;
    let config = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
    client.put("/many/config", config, None).await.unwrap();
    let lease = client.lease_grant(600, None).await.unwrap().id();
    let records: Vec<_> = (0..COUNT).map(strange).collect();
    for chunk in records.chunks(100) {
        let puts: Vec<_> = chunk
            .iter()
            .map(|(key, value, _)| {
                let options = PutOptions::new().with_lease(lease);
                let key = format!("/many/subnets/{key}");
                TxnOp::put(key, value.as_str(), Some(options))
            })
            .collect();
        client.txn(Txn::new().and_then(puts)).await.unwrap();
    }
    let store = server.open();
    store.execute(Op::Get("/x".to_owned())).await.unwrap();
    let begun = Instant::now();
    let Ok(Answer::Snapshot { entries, .. }) =
        store.execute(Op::List("/many/subnets".to_owned())).await
    else {
        panic!()
    };
    assert_eq!(entries.len(), COUNT);
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(store.survey("/many/subnets").await.unwrap().len(), COUNT);

    let mut settings = settings("/many", 1);
    settings.wanted_config = WantedConfig::Any;
    let mut node = Node::start(way.open(), settings);
    let (mut peers, mut skipped) = (BTreeSet::new(), BTreeSet::new());
    loop {
        match node.next().await {
            Change::Peer(key, _) => assert!(peers.insert(key), "{key} twice"),
            Change::Own(OwnChange::Skipped { key, reason }) => {
                assert!(key.len() + reason.len() < 500, "{key}: {reason}");
                assert!(skipped.insert(key.clone()), "{key} twice");
            }
            Change::Own(OwnChange::Acquired(_)) => break,
            Change::Own(OwnChange::Lost(loss)) => panic!("{loss}"),
            _ => {}
        }
    }
    let usable = records.iter().filter(|(.., usable)| *usable).count();
    assert_eq!((peers.len(), skipped.len()), (usable, COUNT - usable));
    // After a gap nothing is told again: the next is what happens then.
    way.cut(true);
    client
        .put("/many/subnets/10.200.0.0-24", record(9), None)
        .await
        .unwrap();
    way.cut(false);
    loop {
        match node.next().await {
            Change::Own(OwnChange::Renewed) => {}
            Change::Peer(key, _) if key.to_string() == "10.200.0.0-24" => break,
            other => panic!("{other:?}"),
        }
    }
}
