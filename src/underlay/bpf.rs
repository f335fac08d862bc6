//! Instructions of classic BPF (Linux, Documentation/networking/filter.rst), and how a socket gets them.

use std::io;

use nix::libc::{self, sock_filter};
use socket2::{SockFilter, Socket};

/// Ends a program: nothing of the packet passes.
pub(super) const NOTHING: sock_filter = statement(libc::BPF_RET, 0);

/// Has a program decide what a socket receives.
pub(super) fn attach_filter(socket: &Socket, program: &[sock_filter]) -> io::Result<()> {
    let program = program.iter();
    let program: Vec<_> = program
        .map(|it| SockFilter::new(it.code, it.jt, it.jf, it.k))
        .collect();
    socket.attach_filter(&program)
}

/// Loads from this offset of the packet into the accumulator.
pub(super) const fn load(size: u32, offset: u32) -> sock_filter {
    statement(libc::BPF_LD | size | libc::BPF_ABS, offset)
}

/// The offset of something in the packet's IP header, wherever that is.
pub(super) const fn in_ip_header(offset: u32) -> u32 {
    libc::SKF_NET_OFF.cast_unsigned() + offset
}

/// The offset at which the kernel answers a question instead of loading from the packet.
pub(super) const fn ancillary(question: libc::c_int) -> u32 {
    (libc::SKF_AD_OFF + question).cast_unsigned()
}

/// Computes with the accumulator and a number.
pub(super) const fn alu(operation: u32, operand: u32) -> sock_filter {
    statement(libc::BPF_ALU | operation | libc::BPF_K, operand)
}

/// Computes with the accumulator and the index register.
pub(super) const fn alu_x(operation: u32) -> sock_filter {
    statement(libc::BPF_ALU | operation | libc::BPF_X, 0)
}

/// Copies the accumulator to the index register.
pub(super) const fn x_from_a() -> sock_filter {
    statement(libc::BPF_MISC | libc::BPF_TAX, 0)
}

/// One with no jumps.
pub(super) const fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        // Codes have eight bits.
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}
