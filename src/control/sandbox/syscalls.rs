//! Which system calls each thread may make: seccomp.
//!
//! A thread starts with all filters of the one that starts it, and what any of them
//! refuses is refused. So the lists below contain each other as threads start each
//! other: the start of the program everything, the main thread what runners and the thread
//! of messages need, that one what queues need. The threads that make the disk larger, and
//! rings, are started by the start of the program, so that no other may do what they may.
//!
//! What is called most is allowed whatever its arguments are: the kernel then lets it
//! pass without running a filter.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::io;
use std::sync::OnceLock;

use clap::ValueEnum;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{SandboxError, SandboxOptions};
use crate::threads::{self, Role};

/// What happens at a system call that a thread has no use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SeccompMode {
    /// The program ends at once, as at a power cut.
    Kill,
    /// The call is done, and noted in the kernel's log (type SECCOMP in the audit log):
    /// to find out what is missing.
    Log,
    /// Nothing is restricted.
    None,
}

/// What any thread may need at any time: memory, waiting, waking others, its own end.
const ALWAYS: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// To look at a file.
const LOOK: &[i64] = &[
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statfs,
    libc::SYS_statx,
];

/// To read and write the image.
const TRANSFER: &[i64] = &[
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_io_uring_enter,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev2,
];

/// To take space for the image and to give it back.
const SPACE: &[i64] = &[libc::SYS_fallocate, libc::SYS_ftruncate];

/// For the moment when the guest's memory vanishes: to hang up on the front-end, or to end as
/// that moment would without a handler.
const GUEST_MEMORY: &[i64] = &[libc::SYS_rt_sigaction, libc::SYS_shutdown];

/// To name the opening of the image, and to see what name it has.
const OPENING: &[i64] = &[libc::SYS_fgetxattr, libc::SYS_fsetxattr];

/// To talk to a front-end, to map its memory, and to start a queue.
const MESSAGES: &[i64] = &[
    libc::SYS_eventfd2,
    libc::SYS_getsockopt,
    libc::SYS_memfd_create,
    libc::SYS_readlinkat,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
];

/// To accept front-ends, to close the image, to remove the socket; and to go on after
/// another process could not take over.
const MAIN: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_unlinkat,
];

/// To make a file, or put one in the place of another, with the same owner, and a lock that a
/// server may take away; and to give up, with the first steps, what of files and privileges the
/// start has left.
const CARETAKER: &[i64] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_eventfd2,
    libc::SYS_fchown,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_landlock_restrict_self,
    libc::SYS_linkat,
    libc::SYS_lseek,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
];

/// Before the first front-end: to open the image, make the socket, and give all the
/// rest up.
const START: &[i64] = &[
    libc::SYS_bind,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_connect,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getsockname,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_linkat,
    libc::SYS_listen,
    libc::SYS_mkdirat,
    libc::SYS_openat,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_setsockopt,
    libc::SYS_socket,
    libc::SYS_socketpair,
];

/// To become another user. The C library makes every thread do it, with a signal.
const RUN_AS: &[i64] = &[
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_setuid,
    libc::SYS_tgkill,
];

/// What older architectures have besides.
#[cfg(target_arch = "x86_64")]
mod legacy {
    pub const MESSAGES: &[i64] = &[libc::SYS_readlink];
    pub const MAIN: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_unlink];
    pub const CARETAKER: &[i64] = &[libc::SYS_renameat];
    pub const START: &[i64] = &[libc::SYS_open];
}
#[cfg(not(target_arch = "x86_64"))]
mod legacy {
    #[cfg(target_arch = "aarch64")]
    pub const CARETAKER: &[i64] = &[libc::SYS_renameat];
    #[cfg(not(target_arch = "aarch64"))]
    pub const CARETAKER: &[i64] = &[];
    pub const MESSAGES: &[i64] = &[];
    pub const MAIN: &[i64] = &[];
    pub const START: &[i64] = &[];
}

/// Registrations of io_uring_register(2): what a ring is made with, what comes later, and
/// the question what a ring can do.
const REGISTER_FILES: u64 = 2;
const REGISTER_FILES_UPDATE: u64 = 6;
const REGISTER_PROBE: u64 = 8;
const REGISTER_RESTRICTIONS: u64 = 11;
const REGISTER_ENABLE_RINGS: u64 = 12;

/// System calls, and what their arguments must be.
struct Allowed(BTreeMap<i64, Vec<SeccompRule>>);

impl Allowed {
    /// Those of every thread.
    fn always() -> Self {
        let new = Self(BTreeMap::new())
            .calls(ALWAYS)
            // Nothing that can be executed.
            .masked(libc::SYS_mmap, 2, libc::PROT_EXEC as u64, 0)
            .masked(libc::SYS_mprotect, 2, libc::PROT_EXEC as u64, 0)
            // To the other end, and nobody else.
            .equal(libc::SYS_sendto, 4, 0)
            .equal(libc::SYS_tgkill, 2, libc::SIGABRT as u64)
            .equal(libc::SYS_tgkill, 2, libc::SIGBUS as u64)
            .equal(libc::SYS_prctl, 0, libc::PR_SET_NAME as u64);
        let commands = [
            libc::F_GETFD,
            libc::F_SETFD,
            libc::F_GETFL,
            libc::F_SETFL,
            libc::F_DUPFD_CLOEXEC,
            libc::F_GET_SEALS,
            libc::F_ADD_SEALS,
        ];
        commands.iter().fold(new, |allowed, &command| {
            allowed.equal(libc::SYS_fcntl, 1, command as u64)
        })
    }

    fn clone_thread() -> Self {
        Self::always().clones()
    }

    fn watch() -> Self {
        Self::always().calls(LOOK)
    }

    /// Those of every thread with a ring.
    fn transfers() -> Self {
        Self::watch()
            .calls(TRANSFER)
            .opens_again()
            .registers(&[REGISTER_FILES_UPDATE])
    }

    fn lock_watch() -> Self {
        Self::always()
            .calls(LOOK)
            .calls(&[libc::SYS_pread64, libc::SYS_fgetxattr])
            .locks()
            .equal(libc::SYS_fcntl, 1, libc::F_OFD_GETLK as u64)
    }

    fn metadata() -> Self {
        Self::transfers().calls(SPACE).calls(OPENING)
    }

    fn queue() -> Self {
        Self::transfers().calls(GUEST_MEMORY)
    }

    /// It tells clones that are over by events.
    fn runner() -> Self {
        Self::queue()
            .calls(SPACE)
            .calls(&[libc::SYS_eventfd2])
            .clones()
            .starts_threads()
    }

    fn messages() -> Self {
        Self::queue()
            .calls(SPACE)
            .calls(OPENING)
            .calls(MESSAGES)
            .calls(legacy::MESSAGES)
            .ioctl(libc::FIONREAD)
            .starts_threads()
    }

    fn main() -> Self {
        let domain = libc::AF_UNIX as u64;
        let main = Self::messages().calls(MAIN).calls(legacy::MAIN);
        // Clones are for runners, which start again when nobody takes over.
        main.clones()
            .locks()
            .looks_at_locks()
            .equal(libc::SYS_socketpair, 0, domain)
            .ioctl(libc::FIONBIO)
    }

    /// To open the image and start the engine's threads, for who answers messages with
    /// `--lock=running`, and so for who starts that one.
    fn opens_image(self) -> Self {
        // The folder of a bundle is synced.
        self.calls(&[libc::SYS_fsync])
            .opens_by_path()
            .locks()
            .looks_at_locks()
            .clones()
    }

    fn looks_at_locks(self) -> Self {
        self.equal(libc::SYS_fcntl, 1, libc::F_OFD_GETLK as u64)
    }

    fn caretaker() -> Self {
        Self::watch()
            .calls(TRANSFER)
            .calls(SPACE)
            .calls(OPENING)
            .calls(CARETAKER)
            .calls(legacy::CARETAKER)
            .makes_files()
            .equal(libc::SYS_fcntl, 1, libc::F_OFD_SETLK as u64)
            .equal(libc::SYS_fcntl, 1, libc::F_OFD_GETLK as u64)
            .equal(libc::SYS_prctl, 0, libc::PR_CAP_AMBIENT as u64)
            .equal(libc::SYS_prctl, 0, libc::PR_SET_NO_NEW_PRIVS as u64)
    }

    fn start() -> Self {
        Self::main()
            .makes_rings()
            .calls(CARETAKER)
            .calls(legacy::CARETAKER)
            .calls(START)
            .calls(legacy::START)
            .ioctl(libc::TCGETS)
    }

    fn of(role: Role) -> Self {
        match role {
            Role::Log | Role::Deadline | Role::Sync => Self::always(),
            Role::Watch => Self::watch(),
            Role::LockWatch => Self::lock_watch(),
            Role::Rings => Self::always().makes_rings(),
            Role::Metadata => Self::metadata(),
            Role::Runner => Self::runner(),
            Role::Queue => Self::queue(),
            Role::Messages => Self::messages(),
            Role::Caretaker => Self::caretaker(),
            Role::Clone => Self::clone_thread(),
        }
    }

    fn calls(mut self, calls: &[i64]) -> Self {
        // No rule for its arguments: any will do.
        self.0.extend(calls.iter().map(|&call| (call, Vec::new())));
        self
    }

    fn clones(self) -> Self {
        self.ioctl(libc::FICLONERANGE)
    }

    /// A file that is open, for a description of the thread's own; makes none.
    fn opens_again(self) -> Self {
        let makes = libc::O_CREAT | (libc::O_TMPFILE & !libc::O_DIRECTORY);
        self.masked(libc::SYS_openat, 2, makes as u64, 0).locks()
    }

    /// A description, as every other one of a file on a network is.
    fn locks(self) -> Self {
        self.equal(libc::SYS_fcntl, 1, libc::F_OFD_SETLK as u64)
    }

    /// The same for files of the disk that another host may have made; makes none.
    fn opens_by_path(self) -> Self {
        #[cfg(target_arch = "x86_64")]
        let opens = {
            let makes = libc::O_CREAT | (libc::O_TMPFILE & !libc::O_DIRECTORY);
            self.masked(libc::SYS_open, 1, makes as u64, 0)
        };
        #[cfg(not(target_arch = "x86_64"))]
        let opens = self;
        opens
    }

    /// Files that run as nobody else but who runs them: without a set-user-ID, a
    /// set-group-ID, or a sticky bit.
    fn makes_files(self) -> Self {
        let special = u64::from(libc::S_ISUID | libc::S_ISGID | libc::S_ISVTX);
        let made =
            self.masked(libc::SYS_fchmod, 1, special, 0)
                .masked(libc::SYS_openat, 3, special, 0);
        #[cfg(target_arch = "x86_64")]
        let made = made.masked(libc::SYS_open, 2, special, 0);
        made
    }

    fn registers(self, what: &[u64]) -> Self {
        what.iter().fold(self, |allowed, &what| {
            allowed.equal(libc::SYS_io_uring_register, 1, what)
        })
    }

    /// Of which this filter sees no more than that they are made.
    fn makes_rings(self) -> Self {
        self.calls(&[libc::SYS_io_uring_setup]).registers(&[
            REGISTER_FILES,
            REGISTER_PROBE,
            REGISTER_RESTRICTIONS,
            REGISTER_ENABLE_RINGS,
        ])
    }

    fn ioctl(self, request: libc::Ioctl) -> Self {
        self.equal(libc::SYS_ioctl, 1, request as u32 as u64)
    }

    /// Threads of this process, which restrict themselves further; no processes.
    fn starts_threads(self) -> Self {
        let thread = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
        self.masked(libc::SYS_clone, 0, thread, thread)
            // It is refused in another way: see `no_clone3`.
            .calls(&[libc::SYS_clone3, libc::SYS_seccomp])
            .equal(libc::SYS_prctl, 0, libc::PR_SET_NO_NEW_PRIVS as u64)
    }

    fn equal(self, call: i64, argument: u8, value: u64) -> Self {
        self.when(call, argument, SeccompCmpOp::Eq, value)
    }

    fn masked(self, call: i64, argument: u8, mask: u64, value: u64) -> Self {
        self.when(call, argument, SeccompCmpOp::MaskedEq(mask), value)
    }

    fn when(mut self, call: i64, argument: u8, operator: SeccompCmpOp, value: u64) -> Self {
        // The kernel looks at 32 bits of all arguments here but a pointer.
        let len = match call {
            libc::SYS_sendto => SeccompCmpArgLen::Qword,
            _ => SeccompCmpArgLen::Dword,
        };
        let rules = self.0.entry(call);
        let condition = SeccompCondition::new(argument, len, operator, value);
        // Neither fails: arguments are numbered from 0 to 5, and there is a condition.
        if let Ok(rule) = condition.and_then(|condition| SeccompRule::new(vec![condition])) {
            rules
                .and_modify(|rules| {
                    if !rules.is_empty() {
                        rules.push(rule.clone());
                    }
                })
                .or_insert_with(|| vec![rule]);
        }
        self
    }

    fn filter(self, mode: SeccompMode, arch: TargetArch) -> Result<BpfProgram, SandboxError> {
        let refusal = match mode {
            SeccompMode::Kill => SeccompAction::KillProcess,
            SeccompMode::Log | SeccompMode::None => SeccompAction::Log,
        };
        compile(self.0, refusal, SeccompAction::Allow, arch)
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
    arch: TargetArch,
) -> Result<BpfProgram, SandboxError> {
    let filter = SeccompFilter::new(rules, others, these, arch);
    let program = filter.and_then(BpfProgram::try_from);
    program.map_err(|error| SandboxError::Seccomp(error.into()))
}

/// What a filter sees of clone3(2) is a pointer. Where that call is unknown, the C
/// library makes threads with clone(2), whose flags can be seen.
fn no_clone3(arch: TargetArch) -> Result<BpfProgram, SandboxError> {
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    compile(rules, SeccompAction::Allow, unknown, arch)
}

/// Made once, since threads start at any time.
struct Filters {
    roles: Vec<(Role, BpfProgram)>,
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Whether filters can be made for this kind of machine.
pub(super) fn is_supported() -> bool {
    TargetArch::try_from(ARCH).is_ok()
}

/// Restricts the program to what it needs for its start and for serving, and each
/// thread from then on to what it needs.
pub(super) fn begin(options: SandboxOptions) -> Result<(), SandboxError> {
    let mode = options.seccomp;
    let (false, Ok(arch)) = (mode == SeccompMode::None, TargetArch::try_from(ARCH)) else {
        return Ok(());
    };
    let run_as = if options.run_as.is_other() {
        RUN_AS
    } else {
        &[]
    };
    let roles = Role::ALL
        .into_iter()
        .map(|role| {
            // Only one thread is there when the program becomes another user.
            let besides = if role == Role::Log { run_as } else { &[] };
            let mut allowed = Allowed::of(role).calls(besides);
            if role == Role::Messages && options.opens_for_rings {
                allowed = allowed.opens_image();
            }
            let filter = allowed.filter(mode, arch)?;
            Ok((role, filter))
        })
        .collect::<Result<_, SandboxError>>()?;
    let _ = FILTERS.set(Filters { roles });
    threads::restrict_with(restrict);
    apply(&no_clone3(arch)?)?;
    apply(&Allowed::start().calls(run_as).filter(mode, arch)?)
}

/// Restricts the main thread to what it needs from now on.
pub(super) fn settle(options: SandboxOptions) -> Result<(), SandboxError> {
    let mode = options.seccomp;
    let (false, Ok(arch)) = (mode == SeccompMode::None, TargetArch::try_from(ARCH)) else {
        return Ok(());
    };
    let mut allowed = Allowed::main();
    if options.opens_for_rings {
        allowed = allowed.opens_image();
    }
    apply(&allowed.filter(mode, arch)?)
}

fn restrict(role: Role) -> io::Result<()> {
    let filters = FILTERS.get().into_iter().flat_map(|all| &all.roles);
    for (_, filter) in filters.filter(|(of, _)| *of == role) {
        seccompiler::apply_filter(filter).map_err(io::Error::other)?;
    }
    Ok(())
}

fn apply(filter: &BpfProgram) -> Result<(), SandboxError> {
    seccompiler::apply_filter(filter).map_err(SandboxError::Seccomp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_starts_a_thread_may_do_what_the_thread_may() {
        let (start, main, messages) = (Allowed::start(), Allowed::main(), Allowed::messages());
        let (queue, runner) = (Allowed::queue(), Allowed::runner());
        let [rings, metadata, clone, caretaker] = [
            Allowed::of(Role::Rings),
            Allowed::metadata(),
            Allowed::clone_thread(),
            Allowed::caretaker(),
        ];
        let opens = [Allowed::messages(), Allowed::main()].map(Allowed::opens_image);
        let [messages_opens, main_opens] = opens;
        let pairs = [
            (&start, &main_opens),
            (&main_opens, &messages_opens),
            (&messages_opens, &metadata),
            (&messages_opens, &runner),
            (&start, &main),
            (&start, &caretaker),
            (&start, &rings),
            (&main, &metadata),
            (&main, &runner),
            (&main, &messages),
            (&messages, &queue),
            (&runner, &clone),
        ];
        for (starts, started) in pairs {
            for (call, rules) in &started.0 {
                let more = starts.0.get(call);
                let contains = |more: &Vec<SeccompRule>| {
                    more.is_empty()
                        || (!rules.is_empty() && rules.iter().all(|rule| more.contains(rule)))
                };
                assert!(more.is_some_and(contains), "system call {call}");
            }
        }
    }
}
