//! The daemon as one that a guest has taken over: its own threads are made to ask the
//! kernel for what they never ask for themselves.

use std::collections::BTreeSet;
use std::ffi::c_long;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::grow::{rig_of, with_snapshots};
use super::{FrontEnd, NOBODY, Rig, expect_service, start_front_end, tasks};
use crate::common::backend::Backend;
use crate::common::qmp::Qmp;
use crate::control::{control, serve};

/// What became of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The kernel has ended the process.
    Killed,
    Returned(i64),
}
use Outcome::{Killed, Returned};

/// A system call and its arguments.
type Call<'a> = (c_long, [Argument<'a>; 6]);

#[derive(Clone, Copy)]
enum Argument<'a> {
    Number(i64),
    Text(&'a str),
}
use Argument::{Number, Text};

const NOTHING: Argument<'static> = Number(0);

/// The thread of that name, which must be asleep in a system call.
fn thread_of(process: u32, name: &str) -> Pid {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let found = tasks.map(|task| task.unwrap()).find(|task| {
        let comm = fs::read_to_string(task.path().join("comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    });
    let id = found.unwrap_or_else(|| panic!("there is no thread {name}"));
    Pid::from_raw(id.file_name().to_str().unwrap().parse().unwrap())
}

fn wait_for_stop(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap()
}

/// Stops a thread where it has made a system call. A queue's thread works on for a moment
/// after it has served.
fn attach_asleep(thread: Pid) -> libc::user_regs_struct {
    /// `syscall`, where a thread that sleeps has come from.
    const SYSCALL: u16 = u16::from_le_bytes([0x0f, 0x05]);
    loop {
        ptrace::attach(thread).unwrap();
        wait_for_stop(thread);
        let regs = ptrace::getregs(thread).unwrap();
        let there = ptrace::read(thread, (regs.rip - 2) as ptrace::AddressType).unwrap();
        if there as u16 == SYSCALL {
            return regs;
        }
        ptrace::detach(thread, None).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Makes a thread of the daemon do this.
fn inject(process: u32, thread: &str, (number, arguments): Call<'_>) -> Outcome {
    /// Below what the thread has on its stack.
    const SCRATCH: u64 = 4096;
    let thread = thread_of(process, thread);
    let before = attach_asleep(thread);
    let mut regs = before;
    regs.rip -= 2;
    let mut scratch = (before.rsp - SCRATCH) & !7;
    let mut values = arguments.map(|argument| match argument {
        Number(number) => number as u64,
        Text(text) => {
            let at = scratch;
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(bytes.len() + 8 - bytes.len() % 8, 0);
            for word in bytes.chunks(8) {
                let word = i64::from_le_bytes(word.try_into().unwrap());
                ptrace::write(thread, scratch as ptrace::AddressType, word).unwrap();
                scratch += 8;
            }
            at
        }
    });
    regs.orig_rax = u64::MAX;
    regs.rax = number as u64;
    let targets = [
        &mut regs.rdi,
        &mut regs.rsi,
        &mut regs.rdx,
        &mut regs.r10,
        &mut regs.r8,
        &mut regs.r9,
    ];
    for (target, value) in targets.into_iter().zip(&mut values) {
        *target = *value;
    }
    ptrace::setregs(thread, regs).unwrap();
    ptrace::step(thread, None).unwrap();
    match wait_for_stop(thread) {
        WaitStatus::Stopped(_, Signal::SIGTRAP) => {
            let result = ptrace::getregs(thread).unwrap().rax as i64;
            ptrace::setregs(thread, before).unwrap();
            ptrace::detach(thread, None).unwrap();
            Returned(result)
        }
        WaitStatus::Signaled(_, Signal::SIGSYS, _) => Killed,
        // The first thread's end is its parent's to see.
        WaitStatus::Exited(..) | WaitStatus::Signaled(..) => Killed,
        other => {
            // Else nobody could wait for the process.
            let _ = ptrace::detach(thread, None);
            panic!("{other:?}")
        }
    }
}

/// A daemon that serves a front-end with one queue, and what keeps it so.
fn served(rig: &Rig, options: &[&str]) -> (Backend, FrontEnd) {
    let backend = rig.serve(options);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    (backend, front_end)
}

/// What `call` leads to in each of these threads.
fn expect(options: &[&str], threads: &[&str], call: Call<'_>, outcome: Outcome) {
    for thread in threads {
        let rig = Rig::new();
        let (backend, front_end) = served(&rig, options);
        let is = inject(backend.pid(), thread, call);
        assert_eq!(is, outcome, "system call {} in {thread}", call.0);
        if is != Killed {
            drop(front_end);
            backend.stop();
        }
    }
}

/// One of each kind that serves, but for the first thread.
const THREADS: [&str; 7] = ["messages", "vq0", "runner0", "md", "watch", "rings", "log"];

/// The first thread, as the kernel cuts its name short.
const FIRST: &str = "vhost-user-ploo";

#[test]
fn no_thread_is_forgotten_here() {
    let rig = Rig::new();
    let (backend, _front_end) = served(&rig, &[]);
    let kind = |task: &String| task.trim_end_matches(char::is_numeric).to_owned();
    let kinds: BTreeSet<_> = tasks(backend.pid()).iter().map(kind).collect();
    let known = THREADS.iter().chain([&FIRST]);
    let known = known.map(|name| kind(&(*name).to_owned())).collect();
    assert_eq!(kinds, known);
}

#[test]
fn no_thread_can_start_a_program_or_reach_another_process() {
    let text = Text("/bin/true");
    let execve = (
        libc::SYS_execve,
        [text, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING],
    );
    expect(&[], &THREADS, execve, Killed);
    let own = i64::from(std::process::id());
    let attach = i64::from(libc::PTRACE_ATTACH);
    let calls = [
        (libc::SYS_ptrace, [Number(attach), Number(own)]),
        (libc::SYS_kill, [Number(own), Number(0)]),
        (libc::SYS_tgkill, [Number(own), Number(own)]),
        (libc::SYS_process_vm_readv, [Number(own), NOTHING]),
        (libc::SYS_clone, [Number(i64::from(libc::SIGCHLD)), NOTHING]),
    ];
    for (number, [first, second]) in calls {
        let call = (number, [first, second, NOTHING, NOTHING, NOTHING, NOTHING]);
        expect(&[], &["vq0"], call, Killed);
    }
}

#[test]
fn no_thread_can_reach_the_network_or_other_sockets() {
    let unix = Number(i64::from(libc::AF_UNIX));
    let stream = Number(i64::from(libc::SOCK_STREAM));
    let socket = (
        libc::SYS_socket,
        [unix, stream, NOTHING, NOTHING, NOTHING, NOTHING],
    );
    expect(&[], &["messages", "vq0", "watch", "rings"], socket, Killed);
    let connect = (
        libc::SYS_connect,
        [
            NOTHING,
            Text("\u{1}"),
            Number(16),
            NOTHING,
            NOTHING,
            NOTHING,
        ],
    );
    expect(&[], &["messages", "vq0"], connect, Killed);
    let ring = (
        libc::SYS_io_uring_setup,
        [Number(8), NOTHING, NOTHING, NOTHING, NOTHING, NOTHING],
    );
    // By a ring that nothing restricts it could be had.
    expect(&[], &[FIRST, "messages", "vq0", "runner0"], ring, Killed);
    let enter = (
        libc::SYS_io_uring_enter,
        [Number(-1), NOTHING, NOTHING, NOTHING, NOTHING, NOTHING],
    );
    expect(&[], &["rings"], enter, Killed);
}

/// What a guest writes is read by the threads of queues, so these have less than others with
/// a ring; and nobody has what only the start of the program or nobody needs.
#[test]
fn a_thread_cannot_do_what_another_one_is_for() {
    let call = |number, arguments: [i64; 2]| {
        let [first, second] = arguments.map(Number);
        (number, [first, second, NOTHING, NOTHING, NOTHING, NOTHING])
    };
    let thread = i64::from(libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND);
    let clone = call(libc::SYS_clone, [thread, 0]);
    let share = call(libc::SYS_ioctl, [-1, libc::FICLONERANGE as i64]);
    let allocate = call(libc::SYS_fallocate, [-1, 0]);
    let cut = call(libc::SYS_ftruncate, [-1, 0]);
    for of_others in [clone, share, allocate, cut] {
        expect(&[], &["vq0"], of_others, Killed);
    }
    expect(&[], &["md"], share, Killed);
    expect(&[], &["md"], call(libc::SYS_shutdown, [-1, 0]), Killed);
    // To have signals sent to another process.
    let owner = call(libc::SYS_fcntl, [0, i64::from(libc::F_SETOWN)]);
    let lock = call(libc::SYS_flock, [0, i64::from(libc::LOCK_EX)]);
    for of_nobody in [owner, lock] {
        expect(&[], &[FIRST, "messages"], of_nobody, Killed);
    }
    // What is allowed comes to the kernel.
    let no_descriptor = Returned(-i64::from(libc::EBADF));
    expect(&[], &["runner0", "md"], allocate, no_descriptor);
}

#[test]
fn no_memory_can_be_made_executable() {
    let access = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let kind = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let map = (
        libc::SYS_mmap,
        [
            NOTHING,
            Number(4096),
            Number(access),
            Number(kind),
            Number(-1),
            NOTHING,
        ],
    );
    expect(&[], &["messages", "vq0"], map, Killed);
}

fn open<'a>(path: &'a str, flags: i32) -> Call<'a> {
    let here = Number(i64::from(libc::AT_FDCWD));
    let flags = Number(i64::from(flags));
    (
        libc::SYS_openat,
        [here, Text(path), flags, Number(0o600), NOTHING, NOTHING],
    )
}

#[test]
fn other_files_are_out_of_reach() {
    let refused = Returned(-i64::from(libc::EACCES));
    let rig = Rig::new();
    let (backend, front_end) = served(&rig, &[]);
    let pid = backend.pid();
    let image = rig.image.to_str().unwrap().to_owned();
    let beside = rig.folder.path().join("beside");
    fs::write(&beside, "other").unwrap();
    let beside = beside.to_str().unwrap();
    for thread in ["vq0", "messages", "runner0", "watch"] {
        let read = |path| inject(pid, thread, open(path, libc::O_RDONLY));
        assert_eq!(read("/etc/passwd"), refused);
        assert_eq!(read("/proc/self/mem"), refused);
        assert_eq!(read(beside), refused);
        match thread {
            "watch" => assert_eq!(read(&image), refused),
            _ => assert!(matches!(read(&image), Returned(fd) if fd >= 0)),
        }
    }
    expect_service(&mut { front_end });
    backend.stop();
    let new = open("/tmp/new", libc::O_RDWR | libc::O_CREAT);
    expect(&[], &["vq0", "messages"], new, Killed);
    expect(&[], &["log"], open("/etc/passwd", 0), Killed);
    // Nor does the other half do without this one.
    expect(&["--seccomp=none"], &["vq0"], new, refused);
}

#[test]
fn one_thread_alone_reaches_the_folder_of_the_disk_and_nothing_else() {
    let refused = Returned(-i64::from(libc::EACCES));
    let rig = rig_of(|folder| Some(with_snapshots(folder))).unwrap();
    let (backend, mut front_end) = served(&rig, &[]);
    let pid = backend.pid();
    let in_folder = |name: &str| rig.image.join(name).to_str().unwrap().to_owned();
    let base = in_folder("root.hds");
    let descriptor = in_folder("DiskDescriptor.xml");
    for thread in ["vq0", "messages", "runner0", "md", FIRST] {
        for path in [&base, &descriptor] {
            let written = inject(pid, thread, open(path, libc::O_RDWR));
            assert_eq!(written, refused, "{path} by {thread}");
        }
        assert!(matches!(inject(pid, thread, open(&base, 0)), Returned(fd) if fd >= 0));
        assert_eq!(inject(pid, thread, open(&descriptor, 0)), refused);
    }
    let watch = |path, flags| inject(pid, "watch", open(path, flags));
    assert!(matches!(watch(&descriptor, libc::O_RDWR), Returned(fd) if fd >= 0));
    let beside = rig.folder.path().join("new").to_str().unwrap().to_owned();
    assert_eq!(watch(&beside, libc::O_RDWR | libc::O_CREAT), refused);
    assert_eq!(watch("/etc/passwd", 0), refused);
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
    // No other can be made to make a file there, or to start such a thread.
    let new = in_folder("new");
    for thread in ["vq0", FIRST] {
        let (backend, _front_end) = served(&rig, &[]);
        let made = inject(
            backend.pid(),
            thread,
            open(&new, libc::O_RDWR | libc::O_CREAT),
        );
        assert!(made == Killed || made == refused, "{thread}: {made:?}");
        let _ = fs::remove_file(&rig.socket);
    }
    // Of a disk without a bundle it reaches nothing.
    let rig = Rig::new();
    let (backend, front_end) = served(&rig, &[]);
    let image = open(rig.image.to_str().unwrap(), libc::O_RDWR);
    assert_eq!(inject(backend.pid(), "watch", image), refused);
    drop(front_end);
    backend.stop();
    // Of one that is only read it does not even try.
    let rig = rig_of(|folder| Some(with_snapshots(folder))).unwrap();
    let descriptor = rig.image.join("DiskDescriptor.xml");
    let backend = rig.serve(&["--read-only"]);
    let tried = inject(
        backend.pid(),
        "watch",
        open(descriptor.to_str().unwrap(), 0),
    );
    assert_eq!(tried, Killed);
}

#[test]
fn no_thread_makes_a_file_that_runs_as_somebody_else() {
    let rig = rig_of(|folder| Some(with_snapshots(folder))).unwrap();
    let descriptor = rig.image.join("DiskDescriptor.xml");
    let descriptor = descriptor.to_str().unwrap();
    let made = rig.image.join("made").to_str().unwrap().to_owned();
    let here = Number(i64::from(libc::AT_FDCWD));
    let create = Number(i64::from(libc::O_RDWR | libc::O_CREAT));
    let open_as = |mode| {
        let arguments = [here, Text(&made), create, Number(mode), NOTHING, NOTHING];
        (libc::SYS_openat, arguments)
    };
    let legacy_open_as = |mode| {
        let arguments = [Text(&made), create, Number(mode), NOTHING, NOTHING, NOTHING];
        (libc::SYS_open, arguments)
    };
    let change_to = |fd, mode| {
        let arguments = [Number(fd), Number(mode), NOTHING, NOTHING, NOTHING, NOTHING];
        (libc::SYS_fchmod, arguments)
    };
    let (backend, front_end) = served(&rig, &[]);
    let pid = backend.pid();
    let Returned(fd) = inject(pid, "watch", open(descriptor, libc::O_RDWR)) else {
        panic!("it may open it");
    };
    assert_eq!(inject(pid, "watch", change_to(fd, 0o640)), Returned(0));
    assert!(matches!(inject(pid, "watch", open_as(0o777)), Returned(fd) if fd >= 0));
    fs::remove_file(&made).unwrap();
    drop(front_end);
    backend.stop();
    for special in [0o4755, 0o2755, 0o1644] {
        for call in [
            open_as(special),
            legacy_open_as(special),
            change_to(0, special),
        ] {
            let (backend, _front_end) = served(&rig, &[]);
            assert_eq!(inject(backend.pid(), "watch", call), Killed, "{special:o}");
            drop(backend);
            fs::remove_file(&rig.socket).unwrap();
        }
    }
    assert!(!rig.image.join("made").exists());
}

/// `CAP_IPC_LOCK`, for a root who may not lift the limit.
const ONLY_LOCKED_MEMORY: &str = "CapPrm:0000000000004000";

#[test]
fn nothing_can_be_had_by_way_of_privileges() {
    let rig = Rig::new();
    let (backend, front_end) = served(&rig, &[]);
    let pid = backend.pid();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    for task in tasks {
        let task = task.unwrap().path();
        let status = fs::read_to_string(task.join("status")).unwrap();
        let is = |line: &str| status.lines().any(|it| it.replace('\t', "") == line);
        assert!(is("NoNewPrivs:1") && is("Seccomp:2"), "{status}");
        // The log's was there before; it may write, and that is all.
        let name = fs::read_to_string(task.join("comm")).unwrap();
        let has_none = is("CapPrm:0000000000000000") || is(ONLY_LOCKED_MEMORY);
        assert!(has_none || name.trim_end() == "log", "{name}{status}");
    }
    drop(front_end);
    backend.stop();
}

#[test]
fn what_is_switched_off_is_off() {
    let rig = Rig::new();
    let options = ["--seccomp=none", "--sandbox=none"];
    let (backend, front_end) = served(&rig, &options);
    let opened = inject(backend.pid(), "vq0", open("/etc/passwd", libc::O_RDONLY));
    assert!(matches!(opened, Returned(fd) if fd >= 0), "{opened:?}");
    drop(front_end);
    backend.stop();
    let (backend, front_end) = served(&rig, &["--seccomp=log"]);
    let own = (libc::SYS_getppid, [NOTHING; 6]);
    assert!(matches!(inject(backend.pid(), "vq0", own), Returned(id) if id > 0));
    drop(front_end);
    backend.stop();
}

#[test]
fn files_in_a_folder_of_another_user_are_watched_and_not_read() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tried: only root can give files away");
        return;
    }
    let rig = Rig::new();
    for path in [rig.folder.path(), &rig.image] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    fs::set_permissions(rig.folder.path(), Permissions::from_mode(0o700)).unwrap();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let image = open(rig.image.to_str().unwrap(), libc::O_RDONLY);
    let refused = Returned(-i64::from(libc::EACCES));
    assert_eq!(inject(backend.pid(), "watch", image), refused);
    fs::rename(&rig.image, rig.folder.path().join("elsewhere")).unwrap();
    assert_eq!(qmp.event("IMAGE_VANISHED")["how"], "moved");
    backend.stop();
}

#[test]
fn another_user_can_serve() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tried: only root can become another user");
        return;
    }
    const USER: u32 = 54321;
    let rig = Rig::new();
    chown(rig.folder.path(), Some(USER), None).unwrap();
    let user = format!("--user={USER}");
    let group = format!("--group={USER}");
    // The image is root's, and open before.
    let (backend, front_end) = served(&rig, &[&user, &group]);
    let owner = fs::metadata(&rig.socket).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (USER, USER));
    let status = fs::read_to_string(format!("/proc/{}/status", backend.pid())).unwrap();
    let line = |name: &str| status.lines().find(|it| it.starts_with(name)).unwrap();
    let ids = format!("\t{USER}").repeat(4);
    assert_eq!(line("Uid:"), format!("Uid:{ids}"));
    assert_eq!(line("Gid:"), format!("Gid:{ids}"));
    assert_eq!(line("Groups:").trim(), "Groups:");
    drop(front_end);
    backend.stop();

    let said = rig.refused(&["--user=nobody-of-this-name"]);
    assert!(said.contains("no such user"), "{said}");
}
