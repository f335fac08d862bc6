//! The system calls that a node makes (seccomp(2)).
//!
//! Three filters stand one behind the other, and the strictest answer counts. Calls that only
//! somebody else's code would make end the process. Of calls that are newer than the list this kernel
//! has none, so that libraries do without as they do on older ones. All others that are not on the
//! list are refused: a call that was forgotten is an error somewhere, and not the end of all pods.

use std::collections::BTreeMap;

use muslin_stack::api::control::Measure;
use nix::libc::{self, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::error::{Context, Result};

/// What takes over the process or the machine.
const FATAL: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_by_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// The first number after those of the list, from Linux 6.6, and one after those of years to come.
/// They are the same on all machines.
const NEWER: std::ops::Range<c_long> = 452..512;

/// What is made without conditions.
const USUAL: &[c_long] = &[
    // Descriptors.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // Files, of which Landlock says which.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_umask,
    // Sockets; which there are, see below.
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    // Memory. Name services of the C library are loaded as they are needed.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Threads; that they are no processes, see below. Of `clone3` there is none: its flags are where
    // no filter looks.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_gettid,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    // Signals, to this process alone.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_tkill,
    // Time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    // Who and where this is. Capabilities and limits can only become fewer.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_prlimit64,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_capget,
    libc::SYS_capset,
];

/// What these do on other machines is done by newer calls.
#[cfg(target_arch = "x86_64")]
const OLD: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_getdents,
    libc::SYS_getrlimit,
    libc::SYS_setrlimit,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[c_long] = &[];

/// Address families that there are sockets of.
const FAMILIES: [i32; 5] = [
    libc::AF_UNIX,
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
    libc::AF_PACKET,
];

/// Requests to devices: those of TUN, what interfaces are called, and whether stderr is a terminal.
const REQUESTS: &[u32] = &[
    0x400454ca, // TUNSETIFF
    0x400454cb, // TUNSETPERSIST
    0x400454d0, // TUNSETOFFLOAD
    0x800454d2, // TUNGETIFF
    0x400454d8, // TUNSETVNETHDRSZ
    0x400454d9, // TUNSETQUEUE
    libc::SIOCGIFHWADDR as u32,
    libc::SIOCGIFINDEX as u32,
    libc::SIOCGIFNAME as u32,
    libc::FIONBIO as u32,
    libc::FIOCLEX as u32,
    libc::FIONREAD as u32,
    libc::TCGETS as u32,
    libc::TIOCGWINSZ as u32,
];

/// Names of threads and of memory, and what status asks.
const PROCESS_CONTROLS: [i32; 4] = [
    libc::PR_SET_NAME,
    libc::PR_SET_VMA,
    libc::PR_GET_NO_NEW_PRIVS,
    libc::PR_GET_DUMPABLE,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Leaves this thread, and all that it starts, these calls and no others.
pub(super) fn limit() -> Result<Measure> {
    let Ok(machine) = TargetArch::try_from(std::env::consts::ARCH) else {
        let reason = format!(
            "there is no list of system calls for {}",
            std::env::consts::ARCH
        );
        return Ok(Measure::missing(reason));
    };
    let build = || -> std::result::Result<_, seccompiler::BackendError> {
        let errno = |errno| SeccompAction::Errno(errno as u32);
        let allow = || SeccompAction::Allow;
        // The last of them refuses to set up a fourth.
        let filters = [
            (all(FATAL), allow(), SeccompAction::KillProcess),
            (newer(), allow(), errno(libc::ENOSYS)),
            (known()?, errno(libc::EPERM), allow()),
        ];
        let compile = |(rules, otherwise, action)| {
            BpfProgram::try_from(SeccompFilter::new(rules, otherwise, action, machine)?)
        };
        filters
            .map(compile)
            .into_iter()
            .collect::<std::result::Result<Vec<_>, _>>()
    };
    for filter in build().context("cannot write the list of system calls")? {
        seccompiler::apply_filter(&filter).context("cannot restrict system calls")?;
    }
    Ok(Measure::full())
}

fn all(calls: &[c_long]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

fn newer() -> Rules {
    let mut rules: Rules = NEWER.map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_clone3, Vec::new());
    rules
}

fn known() -> std::result::Result<Rules, seccompiler::BackendError> {
    let is = |argument, value: u32| {
        let (len, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        SeccompRule::new(vec![SeccompCondition::new(
            argument,
            len,
            equal,
            value.into(),
        )?])
    };
    let mut rules = all(USUAL);
    rules.extend(all(OLD));
    let families = FAMILIES.iter().map(|family| is(0, family.unsigned_abs()));
    rules.insert(
        libc::SYS_socket,
        families.collect::<std::result::Result<_, _>>()?,
    );
    let pair = vec![is(0, libc::AF_UNIX.unsigned_abs())?];
    rules.insert(libc::SYS_socketpair, pair);
    let requests = REQUESTS.iter().map(|request| is(1, *request));
    rules.insert(
        libc::SYS_ioctl,
        requests.collect::<std::result::Result<_, _>>()?,
    );
    let controls = PROCESS_CONTROLS.iter().map(|it| is(0, it.unsigned_abs()));
    rules.insert(
        libc::SYS_prctl,
        controls.collect::<std::result::Result<_, _>>()?,
    );
    // A thread and no process, in the namespaces that are there.
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let new = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWPID;
    let mask = thread | u64::from(new.unsigned_abs());
    let is_thread = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::MaskedEq(mask),
        thread,
    )?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![is_thread])?]);
    Ok(rules)
}

/// Whether this kernel can filter calls so.
pub(super) fn is_offered() -> bool {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
    actions.is_ok_and(|actions| actions.split_whitespace().any(|it| it == "kill_process"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_on_two_lists() {
        let listed = known().unwrap();
        for call in FATAL.iter().copied().chain(NEWER) {
            assert!(!listed.contains_key(&call), "{call}");
        }
        assert_eq!(all(USUAL).len(), USUAL.len());
    }
}
