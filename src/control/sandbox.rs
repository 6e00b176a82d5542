//! What the process gives up, so that a guest that takes it over gains little.
//!
//! In this order: system calls that are never needed, before there are threads;
//! the user, capabilities, files other than the disk's and its socket's, and the eyes of
//! other processes, once the image is open; the rest of what only a start needs, before the
//! first front-end. Each thread gives up more with its first step. The one that works in the
//! folder of the disk starts before files and capabilities are given up, and gives them up
//! for itself: it alone reaches that folder, and it reaches nothing else.
//! `docs/sandbox.md` says what is left, and why.
//!
//! Knows how Linux takes rights away. Must not know what is served.

mod files;
mod privileges;
mod syscalls;

use std::fs::File;
use std::io;
use std::path::PathBuf;

use landlock::RulesetCreated;
use rustix::thread::CapabilitySet;
use thiserror::Error;

pub use privileges::RunAs;
pub use syscalls::SeccompMode;

use crate::image::Bundle;
use crate::storage::HostFile;

/// Why the process could not give something up. It then serves nobody.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// `PR_SET_NO_NEW_PRIVS`, without which nobody may restrict himself.
    #[error("cannot give up the right to gain privileges")]
    NoNewPrivileges(#[source] io::Error),
    /// The kernel took no filter.
    #[error("cannot restrict system calls; --seccomp none does without that")]
    Seccomp(#[source] seccompiler::Error),
    /// The kernel took no rules, though it has Landlock.
    #[error("cannot restrict access to files; --sandbox none does without that")]
    Landlock(#[from] landlock::RulesetError),
    /// What the rules are about cannot be opened.
    #[error("cannot restrict access to {}", path.display())]
    Path {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Capabilities stayed.
    #[error("cannot drop capabilities")]
    Capabilities(#[source] io::Error),
    /// The process is still who it was.
    #[error("cannot become another user or group (only root can)")]
    RunAs(#[source] io::Error),
    /// Others can still look into the process.
    #[error("cannot keep other processes from inspecting this one")]
    Dumpable(#[source] io::Error),
}

/// What is to be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SandboxOptions {
    /// System calls.
    pub seccomp: SeccompMode,
    /// Files, capabilities, visibility.
    pub confines: bool,
    /// Who to be from then on.
    pub run_as: RunAs,
    /// Whether the image is opened when a ring is to run, by who answers the messages of the
    /// front-end.
    pub opens_for_rings: bool,
}

/// The process, on its way to fewer rights.
#[derive(Debug)]
#[must_use = "the rest is given up later"]
pub struct Sandbox(SandboxOptions);

impl Sandbox {
    /// The first step, to be done before there are threads.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn begin(options: SandboxOptions) -> Result<Self, SandboxError> {
        rustix::thread::set_no_new_privs(true)
            .map_err(|errno| SandboxError::NoNewPrivileges(errno.into()))?;
        syscalls::begin(options)?;
        Ok(Self(options))
    }

    /// The second, once the image is open: the process is somebody else. To be done before
    /// there are threads that serve.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn become_user(&self) -> Result<(), SandboxError> {
        if self.0.seccomp != SeccompMode::None && !syscalls::is_supported() {
            log::warn!("system calls are not restricted on this kind of machine");
        }
        self.0.run_as.apply().map_err(SandboxError::RunAs)
    }

    /// What a thread keeps that works in the folder of a bundle, or of none, looks at these
    /// files by their paths, and is started before [`Self::confine`].
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn keeping_to(
        &self,
        bundle: Option<&Bundle>,
        files: &[HostFile],
    ) -> Result<KeepTo, SandboxError> {
        if !self.0.confines {
            return Ok(KeepTo::what_all_have());
        }
        let folder = bundle.map(|bundle| bundle.folder().file());
        let rules = files::in_folder(folder)?;
        let to_replace = privileges::to_replace_in(folder).map_err(SandboxError::Capabilities)?;
        let capabilities = to_replace | privileges::to_look_at(files);
        Ok(KeepTo(Some((rules, capabilities))))
    }

    /// The third: these files are reached from now on, as are the folders of the
    /// sockets; others are not. To be done before there are threads that serve.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn confine(
        &self,
        reached: Reached<'_>,
        folders: &[PathBuf],
        gives_socket_away: bool,
    ) -> Result<(), SandboxError> {
        if !self.0.confines {
            return Ok(());
        }
        let own = privileges::are_all_ours(reached.files, folders);
        privileges::drop_capabilities(own, gives_socket_away)
            .map_err(SandboxError::Capabilities)?;
        privileges::hide().map_err(SandboxError::Dumpable)?;
        files::restrict(reached, folders)
    }

    /// The last: the start is over.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn settle(&self) -> Result<(), SandboxError> {
        syscalls::settle(self.0)
    }
}

/// Files of the disk that stay within reach.
#[derive(Clone, Copy, Debug)]
pub struct Reached<'a> {
    /// Those that are open.
    pub files: &'a [HostFile],
    /// The folder of its bundle, if all files there are to be opened by name that the disk
    /// may consist of one day: another host may have made them.
    pub bundle: Option<&'a File>,
}

/// What a thread keeps; see [`Sandbox::keeping_to`].
#[derive(Debug)]
#[must_use = "it restricts nothing by itself"]
pub struct KeepTo(Option<(RulesetCreated, CapabilitySet)>);

impl KeepTo {
    /// Nothing is given up that is left when it is applied.
    pub fn what_all_have() -> Self {
        Self(None)
    }

    /// Gives up the rest, for the calling thread.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn apply(self) -> Result<(), SandboxError> {
        let Some((rules, capabilities)) = self.0 else {
            return Ok(());
        };
        privileges::keep(capabilities).map_err(SandboxError::Capabilities)?;
        rules.restrict_self()?;
        Ok(())
    }
}
