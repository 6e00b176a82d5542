//! A guest under QEMU with one disk, that runs a script.
//!
//! Knows QEMU and the guest of `qemu/guest`. Must not know servers or what is
//! measured.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::server;

/// How long the guest may take for anything. Its processor is emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often to look at its console.
const TICK: Duration = Duration::from_millis(20);

/// A guest that runs. Killed when dropped.
pub struct Guest {
    child: Child,
    stdin: ChildStdin,
    console: PathBuf,
}

/// # Errors
/// There is no guest in `folder`.
pub fn check(folder: &Path) -> Result<()> {
    for file in [kernel(folder), initramfs(folder)] {
        ensure!(
            file.exists(),
            "{} is missing: qemu/guest/build.sh makes it (or --guest)",
            file.display()
        );
    }
    Ok(())
}

fn kernel(folder: &Path) -> PathBuf {
    folder.join("vmlinuz")
}

fn initramfs(folder: &Path) -> PathBuf {
    folder.join("initrd.cpio")
}

impl Guest {
    /// Boots the guest in `folder` with the disk that is served on `socket`. It runs
    /// `script`, as `qemu/guest/init` says. Its files go to `dir`. What `chardev` says,
    /// after a comma, is for QEMU's end of the socket.
    ///
    /// # Errors
    /// QEMU or cpio cannot be started, or a file operation.
    pub fn boot(
        folder: &Path,
        dir: &Path,
        socket: &Path,
        chardev: &str,
        script: &str,
    ) -> Result<Self> {
        let initramfs = with_script(folder, dir, script)?;
        let console = dir.join("console");
        let output = File::create(&console).context("creating the guest's console")?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-serial", "stdio"])
            .args(["-accel", "tcg", "-cpu", "max"])
            .args(["-machine", "q35,memory-backend=mem", "-m", "512M"])
            .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
            .arg("-kernel")
            .arg(kernel(folder))
            .arg("-initrd")
            .arg(initramfs)
            // An emulated timer may seem dead while the machine is busy.
            .args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check"])
            .arg("-chardev")
            .arg(format!("socket,id=disk,path={}{chardev}", socket.display()))
            .args(["-device", "vhost-user-blk-pci,chardev=disk"])
            .stdin(Stdio::piped())
            .stderr(output.try_clone()?)
            .stdout(output);
        server::tie(&mut command);
        let mut child = command.spawn().context("starting qemu-system-x86_64")?;
        let stdin = child.stdin.take().context("a pipe to the guest")?;
        Ok(Self {
            child,
            stdin,
            console,
        })
    }

    /// Waits until the script calls `meet_host point`.
    ///
    /// # Errors
    /// It ends before, or does not come there in time; with what it said last.
    pub fn wait_at(&mut self, point: &str) -> Result<()> {
        let wanted = format!("guest: at {point}");
        let start = Instant::now();
        while !self.has_said(&wanted)? {
            if self.child.try_wait()?.is_some() || start.elapsed() > PATIENCE {
                bail!("the guest did not come to {point}\n{}", self.last_words());
            }
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// Lets the script go on after `meet_host`.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn go_on(&mut self) -> Result<()> {
        self.stdin.write_all(b"\n").context("talking to the guest")
    }

    /// Waits until the script has ended well. Returns all that was said on the console.
    ///
    /// # Errors
    /// The script fails, or QEMU, or it takes too long; with what it said last.
    pub fn finish(mut self) -> Result<String> {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if start.elapsed() > PATIENCE {
                bail!("the guest does not end\n{}", self.last_words());
            }
            thread::sleep(TICK);
        };
        let is_well = status.success() && self.has_said("guest: script ended with status 0")?;
        ensure!(
            is_well,
            "the guest failed (QEMU's {status})\n{}",
            self.last_words()
        );
        self.said()
    }

    fn has_said(&self, line: &str) -> Result<bool> {
        Ok(self.said()?.lines().any(|it| it.trim_end() == line))
    }

    fn said(&self) -> Result<String> {
        let console = fs::read(&self.console).context("reading the guest's console")?;
        Ok(String::from_utf8_lossy(&console).into_owned())
    }

    fn last_words(&self) -> String {
        tail(&self.console).unwrap_or_else(|_| "its console cannot be read".into())
    }
}

fn tail(file: &Path) -> Result<String> {
    const LEN: u64 = 4000;
    let mut file = File::open(file)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LEN)))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail)?;
    Ok(String::from_utf8_lossy(&tail).into_owned())
}

/// The guest's initramfs with `script` in a second archive behind it.
fn with_script(folder: &Path, dir: &Path, script: &str) -> Result<PathBuf> {
    fs::write(dir.join("script"), script).context("writing the guest's script")?;
    let path = dir.join("initrd");
    fs::copy(initramfs(folder), &path).context("copying the initramfs")?;
    let archive = File::options().append(true).open(&path)?;
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "-o", "-H", "newc"])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(archive)
        .spawn()
        .context("starting cpio")?;
    let mut names = cpio.stdin.take().context("a pipe to cpio")?;
    names.write_all(b"script\n")?;
    drop(names);
    ensure!(cpio.wait()?.success(), "cpio failed");
    Ok(path)
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
