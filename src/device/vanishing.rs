//! Memory that vanishes while it is mapped.
//!
//! The memory of a guest is a file of the front-end's. It can be cut short at any moment,
//! and one of huge pages may find none when it is touched: then the kernel sends SIGBUS to
//! whoever touches it, which would end the process and everything that it serves. No look
//! before can exclude that. So there is a handler: for an address in memory that is being
//! [`Watch`]ed it puts zero pages where that was, and rings the [`Alarm`] of the connection
//! that the memory belongs to. The access goes on with zeros, and the connection ends.
//! Transfers by the kernel fail with `EFAULT` instead. Any other SIGBUS does what it would
//! have done.
//!
//! The handler runs in the midst of anything, so it takes no lock and allocates nothing: it
//! reads a table of fixed size, makes two system calls, and returns.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};

use libc::{c_int, c_void, siginfo_t};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// How much memory can be watched at a time: all regions of a front-end, and more of
/// tables that were replaced while requests still use them.
const SLOTS: usize = 2048;

/// Ends a connection whose memory has vanished.
#[derive(Debug)]
pub(super) struct Alarm {
    has_rung: AtomicBool,
    socket: Arc<UnixStream>,
}

impl Alarm {
    /// Of the connection with this socket.
    pub fn new(socket: Arc<UnixStream>) -> Self {
        Self {
            has_rung: AtomicBool::new(false),
            socket,
        }
    }

    /// Whether memory of the connection has vanished.
    pub fn has_rung(&self) -> bool {
        self.has_rung.load(SeqCst)
    }

    /// From the handler.
    fn ring(&self) {
        self.has_rung.store(true, SeqCst);
        // A single system call: it wakes who waits for a message.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// A range of memory that is watched.
struct Slot {
    /// Whether it belongs to a [`Watch`].
    is_taken: AtomicBool,
    /// Odd while the rest is being changed; another number afterwards.
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    alarm: AtomicPtr<Alarm>,
}

static TABLE: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];

/// What was done about SIGBUS before.
static FORMER_ACTION: OnceLock<libc::sigaction> = OnceLock::new();

impl Slot {
    const fn new() -> Self {
        Self {
            is_taken: AtomicBool::new(false),
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            alarm: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// By the one who has taken it only.
    fn set(&self, start: usize, len: usize, alarm: *mut Alarm) {
        self.version.fetch_add(1, SeqCst);
        self.start.store(start, SeqCst);
        self.len.store(len, SeqCst);
        self.alarm.store(alarm, SeqCst);
        self.version.fetch_add(1, SeqCst);
    }

    /// What it watches, if `address` is in that. While the memory at the address is mapped,
    /// the slot with it does not change; one that does is another's.
    fn find(&self, address: usize) -> Option<Watched> {
        let version = self.version.load(SeqCst);
        let watched = Watched {
            start: self.start.load(SeqCst),
            len: self.len.load(SeqCst),
            alarm: self.alarm.load(SeqCst),
        };
        let is_whole = version.is_multiple_of(2) && self.version.load(SeqCst) == version;
        let is_in = address.wrapping_sub(watched.start) < watched.len;
        (is_whole && is_in).then_some(watched)
    }
}

/// What a slot says.
struct Watched {
    start: usize,
    len: usize,
    alarm: *const Alarm,
}

/// Memory is being watched as long as this is there. It has to go before the mapping.
#[derive(Debug)]
pub(super) struct Watch {
    slot: &'static Slot,
    /// The slot points to it.
    _alarm: Arc<Alarm>,
}

impl Watch {
    /// Watches `len` bytes from `start` on.
    ///
    /// # Errors
    /// Any of `sigaction(2)`; `OutOfMemory` if there is too much to be watched.
    ///
    /// # Safety
    /// That has to be a mapping of its own, all of it, which stays until the watch has
    /// gone, and which may become anonymous memory.
    pub unsafe fn start(start: *const u8, len: usize, alarm: Arc<Alarm>) -> io::Result<Self> {
        install()?;
        let is_free = |slot: &&Slot| !slot.is_taken.swap(true, SeqCst);
        let slot = TABLE.iter().find(is_free);
        let slot = slot.ok_or_else(|| {
            io::Error::new(io::ErrorKind::OutOfMemory, "too much is mapped already")
        })?;
        slot.set(start as usize, len, Arc::as_ptr(&alarm).cast_mut());
        Ok(Self {
            slot,
            _alarm: alarm,
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.slot.set(0, 0, ptr::null_mut());
        self.slot.is_taken.store(false, SeqCst);
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot")
            .field("start", &self.start)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Sets the handler, the first time.
fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), c_int>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: all fields of the structure may be zero.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        // On the stack for signals, as Rust's own handler for overflows of the stack.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: as above.
        let mut former: libc::sigaction = unsafe { std::mem::zeroed() };
        // First what the handler wants to know.
        // SAFETY: `former` is valid for writes, and nothing is changed.
        if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &mut former) } != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
        }
        let _ = FORMER_ACTION.set(former);
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does nothing
        // that is not allowed in one: see the module's text.
        if unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
        }
        Ok(())
    });
    installed.map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel gives a valid one to handlers with SA_SIGINFO.
    let info = unsafe { &*info };
    // Not sent by a process, and not told of memory that nobody has touched yet.
    let is_access = matches!(info.si_code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR);
    // SAFETY: a SIGBUS of that kind comes with the address.
    let address = is_access.then(|| unsafe { info.si_addr() } as usize);
    let watched = address.and_then(|at| TABLE.iter().find_map(|slot| slot.find(at)));
    match watched {
        Some(watched) if watched.put_zeros() => {
            // SAFETY: the thread has accessed memory that is watched. So that is mapped, and
            // its `Watch` has not gone, which holds the alarm.
            unsafe { &*watched.alarm }.ring();
        }
        _ => give_up(signal),
    }
}

impl Watched {
    /// All of it, since a mapping of huge pages cannot be replaced in smaller parts.
    fn put_zeros(&self) -> bool {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // Only pages that are touched take memory.
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let start = self.start as *mut c_void;
        // SAFETY: who watches it has said that this is a mapping of its own that may become
        // anonymous. It is guest memory: nobody has references to it.
        unsafe { mmap_anonymous(start, self.len, protection, flags) }.is_ok()
    }
}

/// Does what would have been done without this module.
fn give_up(signal: c_int) {
    if let Some(former) = FORMER_ACTION.get() {
        // SAFETY: it is what the kernel had said.
        unsafe { libc::sigaction(signal, former, ptr::null_mut()) };
    }
    // Comes when this handler returns.
    // SAFETY: it has no conditions.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

    fn alarm() -> (Arc<Alarm>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Arc::new(Alarm::new(Arc::new(ours))), theirs)
    }

    fn mapped(file: &File, len: usize) -> MmapRegion {
        let file = FileOffset::new(file.try_clone().unwrap(), 0);
        MmapRegion::from_file(file, len).unwrap()
    }

    #[test]
    fn vanished_memory_reads_as_zeros_and_rings_its_alarm() {
        const LEN: usize = 0x3000;
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN as u64).unwrap();
        let (gone, other) = (mapped(&file, LEN), mapped(&file, LEN));
        let ((alarm, mut theirs), (other_alarm, _their_other)) = (self::alarm(), self::alarm());
        // SAFETY: the mappings are dropped after the watches.
        let _watch = unsafe { Watch::start(gone.as_ptr(), LEN, Arc::clone(&alarm)) }.unwrap();
        // SAFETY: the same.
        let _other = unsafe { Watch::start(other.as_ptr(), LEN, Arc::clone(&other_alarm)) };
        let byte = |at| gone.get_ref::<u8>(at).unwrap();
        byte(0x2000).store(7);
        file.set_len(0x1000).unwrap();
        assert_eq!(byte(0).load(), 0);
        assert!(!alarm.has_rung(), "that part is there");
        assert_eq!(byte(0x2000).load(), 0);
        assert!(alarm.has_rung() && !other_alarm.has_rung());
        // It can be written as well, and only once was there anything to do.
        byte(0x2fff).store(9);
        assert_eq!(byte(0x2fff).load(), 9);
        let read = io::Read::read(&mut theirs, &mut [0]).unwrap();
        assert_eq!(read, 0, "the front-end is hung up on");
    }

    #[test]
    fn what_is_not_watched_any_more_is_not_found() {
        let memory = MmapRegion::<()>::new(0x1000).unwrap();
        let at = memory.as_ptr() as usize;
        let find = |at| TABLE.iter().find_map(|slot| slot.find(at)).is_some();
        let (alarm, _theirs) = alarm();
        // SAFETY: the mapping is dropped after the watch.
        let watch = unsafe { Watch::start(memory.as_ptr(), 0x1000, alarm) }.unwrap();
        assert!(find(at) && find(at + 0xfff) && !find(at + 0x1000) && !find(at - 1));
        drop(watch);
        assert!(!find(at));
    }
}
