#!/bin/sh
# Does the simulator detect bugs? Breaks one line of a copy of the tree at a time and runs seeds until
# one fails. Each line of the list below is a file, what it has, what it gets instead, and what that
# means. With a word, only lines that have it. Fails if something is not in its file any more, or if a
# mutant survives. MINUTES ends it after that many, and SEED, a number, lets it begin somewhere else.
set -eu
root="$(cd "$(dirname "$0")/../.." && pwd)"
tree="$root/target/mutants"
seeds="${SEEDS:-0..20000}"
export CARGO_TARGET_DIR="$root/target/mutants-build"

mutants() {
    cat <<'LIST'
stack/src/drops.rs @ self.drops[reason as usize] += packets; @ let _ = (reason, packets); @ drops are not counted
stack/src/datapath/guard.rs @ if attachment.guarded && source != attachment.mac { @ if false { @ a pod may send from any MAC address
stack/src/datapath/guard.rs @ !attachment.guarded || attachment.addresses @ !attachment.addresses.is_empty() || attachment.addresses @ a pod may send from any IP address
stack/src/control/peers.rs @ *unused - 1 @ (*unused - 1) / 2 @ peers share an identity
stack/src/control/lease/manager.rs @ Some(record) => self.taken(own.key, record.node_address()), @ Some(_) => {} @ a node keeps a subnet that another holds now
stack/src/control/lease/manager.rs @ self.phase = if self.relist.is_required() { @ self.phase = if false { @ what happened during an operation is not looked into
stack/src/control/lease/manager.rs @ let reservation = entry.ttl.is_none(); @ let reservation = held.reservation; @ a reservation made during an outage becomes a lease
stack/src/control/lease/manager.rs @ let rest = ttl.min(LEASE_TTL).saturating_sub(margin); @ let rest = ttl.max(LEASE_TTL).saturating_add(margin); @ leases are renewed when it is too late
stack/src/control/lease/manager/backoff.rs @ if self.old_lists > 1 { @ if false { @ lists that lag behind the watch are asked for in a loop
stack/src/control/lease/manager.rs @ self.relist.require(); @ {} @ a store that did not answer is taken for what it was
stack/src/control/lease/manager.rs @ if self.repeats { @ if false { @ a record that a node of flannel's has missed stays unknown to it
stack/src/datapath/node/resolve.rs @ Some(until) = self.awaited.until(now, address) @ Some(until) = self.awaited.until(now, address).filter(|_| false) @ pods are refused while their node starts anew
stack/src/datapath/egress/tcp.rs @ Ok(len) => (len.min(bytes.len()), Ok(len)), @ Ok(len) => (bytes.len(), Ok(len)), @ what a socket outside does not take is lost
stack/src/datapath/egress/tcp.rs @ host.shutdown(id)?; @ let _ = id; @ a server outside does not hear that the stream has ended
stack/src/datapath/egress/mod.rs @ ready.writable |= event.writable; @ {} @ room that a socket outside has again is not seen
stack/src/datapath/egress/mod.rs @ self.ends.refuse(now, syn, out); @ let _ = &syn; @ pods are not told of a refusal
stack/src/datapath/egress/mod.rs @ host.close(id, reset); @ let _ = (&host, reset); @ sockets outlive their flows
stack/src/datapath/egress/mod.rs @ self.give_up(id, HostError::HostUnreachable, host); @ let _ = (id, &host); @ flows outlive their pod
stack/src/datapath/egress/mod.rs @ flow.is_some_and(|(_, flow)| flow.is_delivered()) @ flow.is_some_and(|(_, flow)| flow.is_delivered() && false) @ what a pod has said is thrown away when it goes
stack/src/datapath/egress/mod.rs @ if !is_verified && at.checksum_state @ if !is_verified && protocol == Protocol::Tcp && at.checksum_state @ datagrams go out with wrong checksums
stack/src/datapath/egress/mod.rs @ self.flows.victim(now, EVICTABLE, pod, direction)? @ self.flows.victim(now, EVICTABLE / 10, pod, direction)? @ flows in use make room for others
stack/src/datapath/egress/datagram.rs @ message[IDENTIFIER].copy_from_slice(&pod.port().to_be_bytes()); @ let _ = IDENTIFIER; @ the answer to a ping has the number of the host's socket
stack/src/datapath/egress/policy.rs @ [LINK_LOCAL.into(), WELL_KNOWN.into(), LOCAL_USE.into()] @ [WELL_KNOWN.into(), LOCAL_USE.into()] @ pods reach the machine's secrets
stack/src/datapath/egress/table.rs @ if most > its + 1 @ if most > its + 1000 @ pods with few flows get no more while others have all
stack/src/datapath/egress/table.rs @ if self.len() < self.limit { @ if self.len() <= self.limit { @ egress has one flow more than it may
stack/src/datapath/egress/table.rs @ slot.generation = (slot.generation + 1) % FlowId::GENERATIONS; @ {} @ a flow has the number of one that has just ended
encap/src/ip/v4.rs @ let new = be16(header, field::TTL); @ let new = old; @ the checksum does not fit the time to live
LIST
}

prepare() { # file from to
    mkdir -p "$tree"
    (cd "$root" && tar -cf - --exclude=./target --exclude=./.git .) | tar -xf - -C "$tree"
    # Cargo compares times, and a file that is whole again is as old as it was.
    find "$tree/stack/src" "$tree/encap/src" -name '*.rs' -exec touch {} +
    FROM="$2" TO="$3" awk '
        !done && (at = index($0, ENVIRON["FROM"])) {
            $0 = substr($0, 1, at - 1) ENVIRON["TO"] substr($0, at + length(ENVIRON["FROM"]))
            done = 1
        }
        { print }
        END { exit !done }' "$root/$1" >"$tree/$1" || {
        echo "mutants: $1 has not: $2" >&2
        exit 1
    }
}

mutants | grep -- "${1:-}" | awk -v seed="${SEED:-0}" '
    { lines[NR] = $0 }
    END { for (i = 0; i < NR; i++) print lines[(i + seed) % NR + 1] }' | {
    survivors=0 tried=0
    start=$(date +%s)
    while read -r line; do
        if [ -n "${MINUTES:-}" ] && [ $(($(date +%s) - start)) -ge $((MINUTES * 60)) ]; then
            break
        fi
        tried=$((tried + 1))
        file="${line%% @ *}" line="${line#* @ }"
        from="${line%% @ *}" line="${line#* @ }"
        to="${line%% @ *}" what="${line#* @ }"
        prepare "$file" "$from" "$to"
        (cd "$tree" && cargo build --quiet --release -p muslin-stack --features sim --example simulate)
        started=$(date +%s)
        if result=$("$CARGO_TARGET_DIR/release/examples/simulate" --seeds "$seeds" --minutes 1 --no-shrink); then
            echo "SURVIVES: $what"
            survivors=$((survivors + 1))
        else
            ended=$(date +%s)
            echo "found in $((ended - started)) s: $what: $(echo "$result" | head -1)"
        fi
    done
    echo "$tried mutants tried, $survivors survive"
    exit "$((survivors > 0))"
}
