//! Which files can be reached: Landlock.

use std::fs::File;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    PathFdError, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::{Reached, SandboxError};

/// The newest set of rights that this was written against. An older kernel restricts
/// what it can.
const NEWEST: ABI = ABI::V6;

/// That nothing can be reached.
fn nothing() -> Result<RulesetCreated, SandboxError> {
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    Ok(rules)
}

/// To make files in this folder, a new top or a descriptor in the place of the old one, and
/// nothing else. There are no rights to one name in a folder, so it is all files there. What
/// may be cut later has to be opened by who may cut.
pub(super) fn in_folder(folder: Option<&File>) -> Result<RulesetCreated, SandboxError> {
    let rules = nothing()?;
    let Some(folder) = folder else {
        return Ok(rules);
    };
    let access = AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile;
    Ok(rules.add_rule(PathBeneath::new(folder, access))?)
}

/// Files that are open already stay so. To open one again takes a rule, as does making
/// the socket and removing it.
pub(super) fn restrict(reached: Reached<'_>, folders: &[PathBuf]) -> Result<(), SandboxError> {
    let mut rules = nothing()?;
    if let Some(bundle) = reached.bundle {
        // The descriptor is read; which of the images is the top then, nobody knows.
        let mut access = AccessFs::ReadFile | AccessFs::ReadDir;
        if reached.files.iter().any(|file| file.writable) {
            access |= AccessFs::WriteFile | AccessFs::Truncate;
        }
        rules = rules.add_rule(PathBeneath::new(bundle, access))?;
    }
    for file in reached.files {
        let mut access: BitFlags<AccessFs> = AccessFs::ReadFile.into();
        if file.writable {
            access |= AccessFs::WriteFile | AccessFs::Truncate;
        }
        rules = rules.add_rule(PathBeneath::new(&file.file, access))?;
    }
    for folder in folders {
        // A link within the folder counts as making a socket.
        let access: BitFlags<AccessFs> = AccessFs::MakeSock | AccessFs::RemoveFile;
        let opened = PathFd::new(folder).map_err(|error| unreachable_folder(folder, error))?;
        rules = rules.add_rule(PathBeneath::new(opened, access))?;
    }
    let status = rules.restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced {
        log::warn!(
            "this kernel has no Landlock (Linux 5.13 and later have, unless it is switched off): \
             access to files is restricted by permissions alone"
        );
    }
    Ok(())
}

fn unreachable_folder(folder: &Path, error: PathFdError) -> SandboxError {
    let PathFdError::OpenCall { source, .. } = error else {
        return SandboxError::Path {
            path: folder.to_owned(),
            source: std::io::Error::other(error),
        };
    };
    SandboxError::Path {
        path: folder.to_owned(),
        source,
    }
}
