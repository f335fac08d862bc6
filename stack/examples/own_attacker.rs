//! An attacker of one's own in the simulator: a pod that listens until it has heard of another, and
//! then takes that one's address, in ARP or in pings. Behind an ordinary port all that must hold
//! holds; behind one that guards against nothing, the simulator notices.
//!
//! ```text
//! cargo run -p muslin-stack --features sim --example own_attacker
//! ```

use std::error::Error;
use std::net::Ipv4Addr;

use etherparse::PacketBuilder;
use muslin_stack::control::lease::{Backend, NetworkConfig, VxlanOptions};
use muslin_stack::drops::DropReason;
use muslin_stack::sim::{
    Assigned, Device, DeviceKind, Event, Identity, Plan, Sent, Setup, run_with,
};
use muslin_stack::{Duration, Instant};

/// How the attacker takes an address.
#[derive(Debug, Clone, Copy)]
enum Attack {
    /// It says in ARP that the address is its own.
    Claim,
    /// It sends pings from there.
    Ping,
}

struct Attacker {
    /// What the simulator has given it: addresses, its gateway, a seed.
    assigned: Assigned,
    attack: Attack,
    victim: Option<Ipv4Addr>,
    next: Instant,
    pings: u64,
}

impl Attacker {
    fn new(assigned: &Assigned, attack: Attack) -> Self {
        Self {
            assigned: *assigned,
            attack,
            victim: None,
            next: Instant::ZERO,
            pings: 0,
        }
    }

    /// An ARP reply to all, in which the victim's address is at the attacker's MAC address.
    fn claim(&self, victim: Ipv4Addr) -> Vec<u8> {
        let (own, all, victim) = (self.assigned.mac.0, [0xff; 6], victim.octets());
        let header = [0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2];
        [&all[..], &own, &header, &own, &victim, &all, &victim].concat()
    }

    /// A ping to the victim from its own address. By what its payload begins with the simulator knows
    /// who has sent it, whatever its header says.
    fn ping(&mut self, victim: Ipv4Addr) -> Vec<u8> {
        self.pings += 1;
        let identity = Identity {
            ping: u64::MAX - self.pings,
            sender: self.assigned.sender,
        };
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(self.assigned.mac.0, self.assigned.gateway_mac.0)
            .ipv4(victim.octets(), victim.octets(), 64)
            .icmpv4_echo_request(1, 1)
            .write(&mut frame, &identity.payload(Identity::LEN))
            .unwrap_or_else(|error| unreachable!("a vector takes it: {error}"));
        frame
    }
}

impl Device for Attacker {
    fn receive(&mut self, _: Instant, frame: &[u8]) {
        // Whoever asks all for its gateway says in ARP who it is.
        if frame.get(12..14) == Some(&[0x08, 0x06])
            && let Some([a, b, c, d]) = frame.get(28..32)
        {
            let sender = Ipv4Addr::new(*a, *b, *c, *d);
            if sender != self.assigned.gateway && sender != self.assigned.address {
                self.victim = Some(sender);
            }
        }
    }

    fn poll(&mut self, now: Instant) -> Vec<Sent> {
        let Some(victim) = self.victim.filter(|_| now >= self.next) else {
            return Vec::new();
        };
        self.next = now + Duration::from_secs(1);
        let frame = match self.attack {
            Attack::Claim => self.claim(victim),
            Attack::Ping => self.ping(victim),
        };
        vec![frame.into()]
    }

    fn poll_at(&mut self, _: Instant) -> Option<Instant> {
        self.victim.map(|_| self.next)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let backend = Backend::Vxlan(VxlanOptions::default());
    let network = NetworkConfig::new("10.244.0.0/16".parse()?, None, backend)?;
    let setup = Setup::new(network, 2);
    let attach = |kind| Event::AttachDevice { machine: 0, kind };
    let (from, to, bytes) = (0, 1, 60_000);
    let spoofed = DropReason::SourceAddressSpoofed.describe();
    for attack in [Attack::Claim, Attack::Ping] {
        let attacker = DeviceKind::new(move |assigned: &Assigned| Attacker::new(assigned, attack));
        let kinds = [attacker.clone(), attacker.unguarded()];
        // A pod on each of two machines, which talk, and the attacker on the first. Events are so many
        // milliseconds apart. Behind them the simulator has all pods talk to all.
        let events = |kind| {
            let talk = Event::Talk { from, to, bytes };
            let joined = [(0, Event::Join(0)), (0, Event::Join(1))];
            let attached = [(1_000, Event::Attach(0)), (0, Event::Attach(1))];
            let rest = [(0, attach(kind)), (1_000, talk.clone()), (5_000, talk)];
            joined.into_iter().chain(attached).chain(rest)
        };
        for seed in 0..5 {
            let guarded = Plan::scripted(seed, setup.clone(), events(0));
            let summary = run_with(&guarded, &kinds, true).map_err(|failure| {
                let (violation, tables) = (failure.violation, failure.tables);
                format!("seed {seed}: {violation}\n{guarded}\n{tables}")
            })?;
            // Is it an attack at all? Its frames are lost, and for that reason.
            assert!(summary.log.iter().any(|line| line.contains(spoofed)));

            let unguarded = Plan::scripted(seed, setup.clone(), events(1));
            let failure = run_with(&unguarded, &kinds, false).err();
            let failure = failure.ok_or("an attack succeeds, and nobody notices")?;
            println!("{attack:?}, seed {seed}: nobody believes it, unless it is let through:");
            println!("  {}", failure.violation);
        }
    }
    Ok(())
}
