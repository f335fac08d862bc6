//! Splitting and merging against the Linux kernel's, byte by byte.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod bridge;
mod rules;
mod trains;
mod tunnels;

use std::cell::Cell;

use bridge::Bridge;
use muslin_bed::packets::{L3, Shape, superpacket};
use muslin_encap::ip::transport::{ChecksumState, Protocol, Transport};
use muslin_encap::offload::split::{Checksums, HEADERS_LEN, Split, TrainLimits};
use muslin_lab::inside;
use rules::merges_agree;
use tunnels::Tunnels;

#[test]
fn superpackets_become_the_segments_that_the_kernel_makes_of_them() {
    inside::run("kernel_segments");
}

#[test]
#[ignore = "the part inside the lab"]
fn kernel_segments() {
    if !inside::is_inside() {
        return;
    }
    let bridge = Bridge::new();
    inside::cases(1000, &superpacket(), |shape| {
        segments_agree(&bridge, &shape)
    });
}

#[test]
fn segments_are_merged_as_the_kernel_merges_them() {
    inside::run("kernel_merges");
}

#[test]
#[ignore = "the part inside the lab"]
fn kernel_merges() {
    if !inside::is_inside() {
        return;
    }
    let tunnels = Tunnels::new();
    let merged = Cell::new(0);
    inside::cases(5000, &trains::batch(), |batch| {
        let made = merges_agree(&tunnels, &batch.frames());
        merged.set(merged.get() + made);
    });
    assert!(merged.get() > 4000, "{} have been merged", merged.get());
}

fn segments_agree(bridge: &Bridge, shape: &Shape) {
    let (mut header, frame) = shape.frame();
    let mut ours = split(shape, &frame);
    if let [lone] = &mut ours[..] {
        // The kernel drops some of those when they come as superpackets: it takes TCP options for
        // payload when it looks whether there is more than a segment (`virtio_net_hdr_to_skb`),
        // but not when it makes them (`tcp_gso_segment`).
        header.gso = None;
        finish_lone(lone);
    }
    let theirs = bridge.segment(&header, &frame);
    assert_eq!(theirs.len(), ours.len());
    for (index, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
        let differing: Vec<_> = (0..theirs.len().max(ours.len()))
            .filter(|at| theirs.get(*at) != ours.get(*at))
            .map(|at| (at, theirs.get(at), ours.get(at)))
            .take(20)
            .collect();
        assert!(differing.is_empty(), "{index}: {differing:02x?}");
    }
}

/// Makes zero what the kernel makes of it where it only finishes a checksum (`skb_checksum_help`):
/// 0xffff, in TCP too. Of segments it does so in UDP only, as Muslin does in all cases. Both forms
/// are right (RFC 1071).
fn finish_lone(segment: &mut [u8]) {
    let at = Transport::parse(segment, L3).unwrap();
    let field = at.checksum_offset()..at.checksum_offset() + 2;
    if at.protocol == Protocol::Tcp && segment[field.clone()] == [0, 0] {
        segment[field].fill(0xff);
    }
}

fn split(shape: &Shape, frame: &[u8]) -> Vec<Vec<u8>> {
    let mut split = Split::new(frame, L3, shape.gso(), Checksums::Complete).unwrap();
    let mut headers = vec![0; HEADERS_LEN];
    let mut segments = Vec::new();
    while let Some(train) = split
        .next_train(&mut headers, TrainLimits::UDP_SEGMENT)
        .unwrap()
    {
        segments.extend(
            train
                .segments()
                .map(|(header, payload)| [header, payload].concat()),
        );
    }
    for segment in &segments {
        let at = Transport::parse(segment, L3).unwrap();
        assert_ne!(at.checksum_state(segment), ChecksumState::Invalid);
    }
    segments
}
