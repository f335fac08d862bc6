//! Several workers: each has flows of all pods, and what comes back finds the one that has its flow.

use super::*;

const PODS: u16 = 4;
const STREAMS: u64 = 12;
const EACH: u64 = 200_000;
/// After which the kernel no longer remembers to which queue of a device a flow was written.
const FORGETS: std::time::Duration = std::time::Duration::from_secs(4);

impl Bed {
    /// How many sockets of flows each worker watches.
    fn flows_of_workers(&self) -> Vec<usize> {
        let pid = self.node.query("status")["pid"].as_u64().unwrap();
        let infos = format!("cat /proc/{pid}/fdinfo/* 2>/dev/null || true");
        let infos = self.node_host.sh(&infos);
        // Each descriptor's information has its flags before its events.
        let all = infos.split("flags:").map(|info| {
            let events = info.lines().filter(|line| line.starts_with("tfd:"));
            let data = events.filter_map(|line| line.split_whitespace().nth(5));
            let data = data.filter_map(|word| u64::from_str_radix(word, 16).ok());
            data.filter(|data| data >> 62 == 0b10).count()
        });
        all.filter(|count| *count > 0).collect()
    }
}

/// All that a pod sends to a port of the server comes back as it was, also after a pause.
fn speak(pod: &mut Agent, port: u16) {
    let to = SocketAddrV4::new(SERVER, port);
    let ids: Vec<_> = (0..STREAMS).map(|_| pod.open(to).unwrap()).collect();
    for pause in [std::time::Duration::ZERO, FORGETS] {
        std::thread::sleep(pause);
        for id in &ids {
            let echoed = pod.exchange(*id, EACH, *id).unwrap();
            assert!(echoed.intact && echoed.bytes == EACH, "{echoed:?}");
        }
    }
    for size in [0, 1000, 9000, 65_507] {
        let echoed = pod.udp(to, 30, size).unwrap();
        assert_eq!((echoed.sent, echoed.intact), (30, 30), "{size} bytes");
    }
    traffic::ping(pod, SERVER);
    let long = traffic::ping_of_size(pod, SERVER, 4028, false);
    assert!(long.is_perfect(1), "{long:?}");
}

#[test]
fn each_worker_has_flows_of_all_pods() {
    let Some(mut bed) = Bed::new(&[("--workers", "2")]) else {
        return;
    };
    bed.node_host
        .sh("echo 0 0 >/proc/sys/net/ipv4/ping_group_range");
    let mut pods: Vec<_> = (0..PODS)
        .map(|index| {
            let port = PORT + 1 + index;
            bed.server.listen(port).unwrap();
            (bed.node.pod(&format!("pod{index}")), port)
        })
        .collect();
    std::thread::scope(|scope| {
        for (pod, port) in &mut pods {
            scope.spawn(|| speak(pod, *port));
        }
    });

    let rows = bed.node.query("flows");
    let rows = rows.as_array().unwrap();
    for (index, (_, port)) in pods.iter().enumerate() {
        let (pod, remote) = (format!("pod{index}"), format!("{SERVER}:{port}"));
        let its = rows.iter().filter(|row| row["pod"] == pod.as_str());
        let streams: Vec<_> = its.filter(|row| row["protocol"] == "tcp").collect();
        assert_eq!(streams.len() as u64, STREAMS, "{rows:?}");
        for row in streams {
            assert_eq!(row["remote"], remote.as_str());
            // A connection of the agents begins with a byte of its own.
            let (sent, received) = (2 * EACH + 1, 2 * EACH);
            assert_eq!(row["sent_bytes"], sent, "{row}");
            assert_eq!(row["received_bytes"], received, "{row}");
        }
    }
    let shares = bed.flows_of_workers();
    assert_eq!(shares.len(), 2, "{shares:?}");
    assert_eq!(shares.iter().sum::<usize>() as u64, bed.flows("open"));
    assert_eq!(bed.node.losses(), [].into(), "{}", bed.node.log());
    drop(pods);
    poll_until(SOON, "the end of all flows of the pods", || {
        (bed.flows("open") == 0).then_some(())
    });
}
