//! A guest under QEMU that runs one shell script.
//!
//! The guest is the one of `qemu/guest`. Its script talks to the test through
//! the serial console: `report NAME VALUE` hands over a value, `meet_host NAME`
//! waits until the test says to go on. The processor is emulated, so that the
//! tests need no right to use the machine's virtualisation.
//!
//! `tests/replay` has it too, and neither uses everything here.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Stdio},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use crate::common::{left_out, require_file, require_tool, tool};

/// How long a guest may run. Most need seconds, but the machine may be small
/// and busy.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long the console is silent when the guest's kernel has written all that it was
/// asked for.
const SILENCE: Duration = Duration::from_secs(5);

/// What the guest's kernel says when a disk did not behave.
const COMPLAINTS: [&str; 8] = [
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "JBD2: ",
    "Kernel panic",
    "BUG:",
    "Call Trace",
    "blocked for more than",
];

/// What the guest's first process says before it does anything for the test.
const SCRIPT_BEGINS: &str = "guest: script begins";

/// What the guest's kernel says when the timer of one of its processors does not fire. On
/// a busy host that has happened to two guests with two emulated processors at once, from
/// their first second on: whatever sleeps on such a processor then sleeps for 21 s, which
/// is when the kernel looks after it. Others have seen the same
/// (<https://github.com/abiosoft/colima/issues/787>).
const TIMER_IS_DEAD: &str = "timer wakeup didn't happen";

/// What QEMU (10.0.2) has once ended with while a guest with two processors booted on a busy
/// host. Most likely each of its threads believes what it has looked up of a device's registers
/// even when it has waited for another one that maps a device meanwhile
/// (<https://github.com/espressif/qemu/issues/174>). It is no failure of a disk; what else QEMU
/// asserts may be one.
const EMULATOR_IS_LOST: &str = "msix_table_mmio_write: Assertion";

/// How many machines a guest may have, one after another, because of these.
const MACHINES: usize = 3;

/// The guest's kernel and initramfs.
pub struct Image {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Image {
    /// Finds what `qemu/guest/build.sh` made; `None`, said aloud, if this
    /// machine can't run guests.
    pub fn find() -> Option<Self> {
        // cargo's folder for the files of tests is target/tmp.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .parent()
            .expect("target/tmp has a parent")
            .join("guest");
        let image = Self {
            kernel: folder.join("vmlinuz"),
            initramfs: folder.join("initrd.cpio"),
        };
        let maker = "qemu/guest/build.sh";
        let here = require_tool("qemu-system-x86_64")
            && require_tool("qemu-img")
            && require_file(&image.kernel, maker)
            && require_file(&image.initramfs, maker)
            && (cfg!(target_arch = "x86_64") || left_out("the guest is an x86_64 one"));
        here.then_some(image)
    }
}

/// A guest to be: its processors, disks and script.
pub struct Guest<'a> {
    image: &'a Image,
    folder: &'a Path,
    cpus: u32,
    memory_mib: u32,
    devices: Vec<OsString>,
    disks: u32,
    /// By the paths that it finds them under: files of the host.
    files: BTreeMap<PathBuf, PathBuf>,
    may_reboot: bool,
    incoming: Option<PathBuf>,
    patience: Duration,
    script: String,
}

impl<'a> Guest<'a> {
    /// A guest with one processor that runs `script`, and keeps its files in
    /// `folder`.
    pub fn new(image: &'a Image, folder: &'a Path, script: &str) -> Self {
        Self {
            image,
            folder,
            cpus: 1,
            memory_mib: 512,
            devices: Vec::new(),
            disks: 0,
            files: BTreeMap::new(),
            may_reboot: false,
            incoming: None,
            patience: PATIENCE,
            script: script.to_owned(),
        }
    }

    /// Sets the number of processors.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Sets the memory, half of which the guest's files can take.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Adds a disk, /dev/vda first, served on `socket`. The number of queues is
    /// QEMU's own choice unless `properties` (of `vhost-user-blk-pci`, each
    /// after a comma) say otherwise.
    pub fn disk(self, socket: &Path, properties: &str) -> Self {
        self.disk_on(socket, "", properties)
    }

    /// Adds a disk that QEMU connects to again when the back-end went away.
    pub fn reconnecting_disk(self, socket: &Path) -> Self {
        self.disk_on(socket, reconnect_option(), "")
    }

    fn disk_on(mut self, socket: &Path, chardev_options: &str, properties: &str) -> Self {
        let id = format!("disk{}", self.disks);
        self.disks += 1;
        let socket = socket.to_str().expect("test paths are UTF-8");
        self.devices.push("-chardev".into());
        self.devices
            .push(format!("socket,id={id},path={socket}{chardev_options}").into());
        self.devices.push("-device".into());
        self.devices
            .push(format!("vhost-user-blk-pci,chardev={id}{properties}").into());
        self
    }

    /// Lets a reset restart the guest where it would end QEMU.
    pub fn may_reboot(mut self) -> Self {
        self.may_reboot = true;
        self
    }

    /// Does not boot: it waits for a guest that is migrated to it through this socket.
    pub fn incoming(mut self, socket: &Path) -> Self {
        self.incoming = Some(socket.to_owned());
        self
    }

    /// Lets it run for longer than others may.
    pub fn patience(mut self, more: Duration) -> Self {
        self.patience += more;
        self
    }

    /// Adds a slot that a device can be plugged into, by this name.
    pub fn slot(mut self, name: &str) -> Self {
        self.devices.push("-device".into());
        self.devices
            .push(format!("pcie-root-port,id={name}").into());
        self
    }

    /// Adds a disk that QEMU itself serves from a raw file, /dev/vda first. What the
    /// guest flushes need not get any further than to the host's page cache.
    pub fn raw_disk(mut self, file: &Path) -> Self {
        let id = format!("disk{}", self.disks);
        self.disks += 1;
        let file = file.to_str().expect("test paths are UTF-8");
        self.devices.push("-drive".into());
        self.devices
            .push(format!("if=none,id={id},format=raw,cache=unsafe,file={file}").into());
        self.devices.push("-device".into());
        self.devices
            .push(format!("virtio-blk-pci,drive={id}").into());
        self
    }

    /// Gives the guest a program of the host, under this path, with the libraries that it
    /// needs.
    pub fn program(mut self, file: &Path, path: &Path) -> Self {
        let libraries = libraries(file).into_iter();
        self.files
            .extend(libraries.map(|library| (library.clone(), library)));
        self.files.insert(path.to_owned(), file.to_owned());
        self
    }

    /// The archive with the script and what else this guest has of its own.
    fn archive(&self) -> Vec<u8> {
        let mut archive = Archive::default();
        for (path, file) in &self.files {
            let content = fs::read(file).expect("a program can be read");
            archive.add(path, 0o755, &content);
        }
        let script = format!("set -x\n{}\n", self.script);
        archive.add(Path::new("/script"), 0o644, script.as_bytes());
        archive.finish()
    }

    /// Starts QEMU. For tests that do something to the guest while it boots; others
    /// [boot](Guest::boot) it.
    pub fn start(self) -> Running {
        self.launch()
    }

    /// Starts QEMU and waits until the script begins. An emulated machine that is broken by
    /// then is replaced by another.
    pub fn boot(self) -> Running {
        for machine in 1..MACHINES {
            let mut running = self.launch();
            match running.wait_for_script() {
                Boot::Done => return running,
                Boot::Broken(how) => {
                    eprintln!("machine {machine} of {MACHINES} is broken, another try: {how}");
                }
            }
        }
        self.launch()
    }

    fn launch(&self) -> Running {
        let initramfs = self.folder.join("initramfs");
        let mut bytes = fs::read(&self.image.initramfs).expect("the initramfs can be read");
        bytes.extend(self.archive());
        fs::write(&initramfs, bytes).expect("the initramfs can be written");
        let monitor = self.folder.join("monitor");
        // A former guest's, which QEMU would not replace.
        let _ = fs::remove_file(&monitor);

        let mut command = tool("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-accel", "tcg", "-cpu", "max"])
            .args(["-smp", &self.cpus.to_string()])
            // The back-end reads and writes the guest's memory itself.
            .args(["-machine", "q35,memory-backend=mem"])
            .args(["-m", &format!("{}M", self.memory_mib), "-object"])
            .arg(format!(
                "memory-backend-memfd,id=mem,size={}M,share=on",
                self.memory_mib
            ))
            .args(["-serial", "stdio", "-monitor"])
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .arg("-kernel")
            .arg(&self.image.kernel)
            .arg("-initrd")
            .arg(&initramfs)
            // An emulated timer may seem dead while the machine is busy.
            .args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check"])
            .args(&self.devices)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if !self.may_reboot {
            command.arg("-no-reboot");
        }
        if let Some(incoming) = &self.incoming {
            command.arg("-incoming");
            command.arg(format!("unix:{}", incoming.display()));
        }
        let mut child = command.spawn().expect("QEMU can be started");
        let (sender, lines) = mpsc::channel();
        let sender = Arc::new(sender);
        forward_lines(child.stdout.take().expect("it is piped"), sender.clone());
        forward_lines(child.stderr.take().expect("it is piped"), sender);
        Running {
            stdin: child.stdin.take().expect("it is piped"),
            child,
            monitor,
            lines,
            console: Vec::new(),
            tail: 60,
            deadline: Instant::now() + self.patience,
        }
    }

    /// Boots the guest and waits until its script has ended well; see
    /// [`Running::finish`].
    pub fn run(self) -> Outcome {
        self.boot().finish()
    }
}

/// How the boot of a machine ended.
enum Boot {
    /// The script begins, or QEMU has ended: whoever waits for the script's end will tell.
    Done,
    /// The emulation has a fault, which it has said.
    Broken(String),
}

/// A guest that runs. Dropped, it is killed.
pub struct Running {
    child: Child,
    stdin: ChildStdin,
    monitor: PathBuf,
    lines: Receiver<String>,
    console: Vec<String>,
    /// How many of the console's last lines a failure shows.
    tail: usize,
    deadline: Instant,
}

impl Running {
    fn wait_for_script(&mut self) -> Boot {
        while let Some(line) = self.next_line() {
            if line == SCRIPT_BEGINS {
                break;
            }
            if [TIMER_IS_DEAD, EMULATOR_IS_LOST]
                .iter()
                .any(|it| line.contains(it))
            {
                return Boot::Broken(line);
            }
        }
        Boot::Done
    }

    /// Waits until the script calls `meet_host point`. Let it go on with
    /// [`Running::go_on`].
    ///
    /// # Panics
    ///
    /// If the guest ends first or takes too long.
    pub fn wait_at(&mut self, point: &str) {
        let wanted = format!("guest: at {point}");
        while let Some(line) = self.next_line() {
            if line == wanted {
                return;
            }
            assert!(
                !line.starts_with("guest: script ended"),
                "the script did not come to {point}"
            );
        }
        panic!("QEMU ended before the script came to {point}");
    }

    /// Lets the script go on after `meet_host`.
    pub fn go_on(&mut self) {
        self.stdin.write_all(b"\n").expect("the guest listens");
    }

    /// Resets the machine, as its button would.
    pub fn reset(&self) {
        self.command("system_reset");
    }

    /// Stops the processors and the disks, which takes every queue from the
    /// back-end.
    pub fn pause(&self) {
        self.command("stop");
    }

    /// Undoes [`Running::pause`].
    pub fn resume(&self) {
        self.command("cont");
    }

    /// Begins to migrate the guest to a QEMU that listens on this socket.
    pub fn migrate(&self, to: &Path) {
        self.command(&format!("migrate -d unix:{}", to.display()));
    }

    /// What QEMU's monitor says of the migration.
    pub fn migration(&self) -> String {
        self.command("info migrate")
    }

    /// Whether the processors run.
    pub fn runs(&self) -> bool {
        self.command("info status").contains("running")
    }

    /// Ends QEMU, as its operator would, without a word to the guest.
    pub fn quit(mut self) -> Outcome {
        self.command("quit");
        self.wait_for_exit();
        self.outcome()
    }

    /// Kills QEMU.
    pub fn kill(mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Waits until the guest has powered itself off.
    ///
    /// # Panics
    ///
    /// If the script fails or takes too long, QEMU fails, or the guest's kernel
    /// complained about anything.
    pub fn finish(self) -> Outcome {
        let outcome = self.finish_with_complaints();
        let complaints = outcome.complaints();
        assert!(complaints.is_empty(), "the kernel says: {complaints:#?}");
        outcome
    }

    /// Like [`Running::finish`], for a test in which the kernel has reason to
    /// complain.
    pub fn finish_with_complaints(mut self) -> Outcome {
        self.wait_for_exit();
        let ended_well = "guest: script ended with status 0";
        assert!(
            self.console.iter().any(|line| line == ended_well),
            "the script failed"
        );
        self.outcome()
    }

    fn wait_for_exit(&mut self) {
        while self.next_line().is_some() {}
        let status = self.child.wait().expect("a child can be waited for");
        assert!(status.success(), "QEMU's {status}");
    }

    fn outcome(&mut self) -> Outcome {
        Outcome {
            console: std::mem::take(&mut self.console),
        }
    }

    /// The next line of the console or of QEMU itself; `None` when QEMU has
    /// closed both.
    fn next_line(&mut self) -> Option<String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                self.console.push(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                self.have_tasks_listed();
                panic!("the guest takes too long")
            }
        }
    }

    /// Has the guest's kernel write to the console what each of its tasks waits for, by
    /// which a request that nobody answers is told from a program that hangs by itself.
    fn have_tasks_listed(&mut self) {
        // That of -serial, by the name that QEMU gives it.
        let console_break = "chardev-send-break serial0";
        // All messages get to the console; blocked tasks; all tasks.
        let before = self.console.len();
        for key in *b"8wt" {
            self.command(console_break);
            self.stdin
                .write_all(&[key])
                .expect("QEMU listens to its standard input");
            while let Ok(line) = self.lines.recv_timeout(SILENCE) {
                self.console.push(line);
            }
        }
        self.tail += self.console.len() - before;
    }

    /// Tells QEMU's monitor to do one thing after the other, and waits for none of it.
    pub fn tell(&self, commands: &[&str]) {
        let mut monitor = UnixStream::connect(&self.monitor).expect("QEMU's monitor answers");
        read_prompt(&mut monitor);
        let commands: String = commands.iter().flat_map(|text| [text, "\n"]).collect();
        monitor
            .write_all(commands.as_bytes())
            .expect("QEMU's monitor listens");
        // It would drop what it has not read yet.
        thread::sleep(Duration::from_millis(50));
    }

    /// Has QEMU's monitor do something. Returns what it said, the command and what a
    /// terminal needs among it.
    pub fn command(&self, command: &str) -> String {
        let mut monitor = UnixStream::connect(&self.monitor).expect("QEMU's monitor answers");
        monitor
            .set_read_timeout(Some(PATIENCE))
            .expect("a time-out can be set");
        // The monitor drops what comes before its prompt.
        read_prompt(&mut monitor);
        writeln!(monitor, "{command}").expect("QEMU's monitor listens");
        if command == "quit" {
            return String::new();
        }
        read_prompt(&mut monitor)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if thread::panicking() {
            self.console.extend(self.lines.try_iter());
            let tail = self.console.len().saturating_sub(self.tail);
            eprintln!("the console's end:\n{}", self.console[tail..].join("\n"));
        }
        // Fails if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a guest left.
pub struct Outcome {
    console: Vec<String>,
}

impl Outcome {
    /// The value that the script reported last under `name`.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn value(&self, name: &str) -> &str {
        let prefix = format!("guest: {name}=");
        self.console
            .iter()
            .rev()
            .find_map(|line| line.strip_prefix(&prefix))
            .unwrap_or_else(|| panic!("the script reported no {name}: {:#?}", self.console))
    }

    /// [`Outcome::value`] as a number.
    pub fn number(&self, name: &str) -> u64 {
        let value = self.value(name);
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {value:?}, not a number"))
    }

    /// Lines in which the guest's kernel complains.
    pub fn complaints(&self) -> Vec<&str> {
        self.console
            .iter()
            .map(String::as_str)
            // Neither what the script does nor what it reports.
            .filter(|line| !line.starts_with('+') && !line.starts_with("guest: "))
            .filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
            .collect()
    }
}

/// The option that makes QEMU connect again: renamed in 9.2, the old name is on
/// its way out.
fn reconnect_option() -> &'static str {
    let output = tool("qemu-system-x86_64")
        .arg("--version")
        .output()
        .expect("QEMU can be started");
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split("version ").nth(1).unwrap_or_default();
    let major = version.split('.').next().unwrap_or_default();
    if major.parse::<u32>().is_ok_and(|major| major < 10) {
        ",reconnect=1"
    } else {
        ",reconnect-ms=500"
    }
}

/// Sends on what a stream says, line by line, until it ends.
fn forward_lines(stream: impl Read + Send + 'static, lines: Arc<mpsc::Sender<String>>) {
    thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if lines.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
}

fn read_prompt(monitor: &mut UnixStream) -> String {
    let mut said = Vec::new();
    let mut byte = [0];
    while !said.ends_with(b"(qemu) ") {
        let n = monitor.read(&mut byte).expect("QEMU's monitor talks");
        assert_eq!(n, 1, "QEMU's monitor closed after {said:?}");
        said.push(byte[0]);
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// An initramfs archive (cpio, "newc"). The kernel unpacks archives that follow each
/// other one after the other.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    /// Adds a file, and the folders that it is in.
    fn add(&mut self, path: &Path, mode: usize, content: &[u8]) {
        let path = path.strip_prefix("/").unwrap_or(path);
        let folders: Vec<_> = path.ancestors().skip(1).collect();
        for folder in folders.into_iter().rev().filter(|f| *f != Path::new("")) {
            self.entry(folder, 0o040_755, &[]);
        }
        self.entry(path, 0o100_000 | mode, content);
    }

    fn entry(&mut self, path: &Path, mode: usize, content: &[u8]) {
        let name = path.to_str().expect("test paths are UTF-8");
        let fields = [
            0, // inode
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // mtime
            content.len(),
            0,
            0, // device
            0,
            0, // device that this is
            name.len() + 1,
            0, // checksum: none
        ];
        let archive = &mut self.0;
        archive.extend(b"070701");
        archive.extend(fields.iter().flat_map(|n| format!("{n:08x}").into_bytes()));
        archive.extend(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }

    /// All of it, with its end.
    fn finish(mut self) -> Vec<u8> {
        self.entry(Path::new("TRAILER!!!"), 0, &[]);
        self.0
    }
}

/// The libraries that the dynamic linker loads for a program, itself included.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = tool("ldd")
        .arg(program)
        .output()
        .expect("ldd can be started");
    assert!(output.status.success(), "{}: {output:?}", program.display());
    let said = String::from_utf8_lossy(&output.stdout);
    let words = said.split_ascii_whitespace();
    words
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}
