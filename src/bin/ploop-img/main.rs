//! `ploop-img` makes, checks and changes ploop disk images.
//!
//! Reads the command line, calls the library, shows what comes back.

mod args;
mod bitmap;
mod notes;
mod picture;
mod progress;
mod sample;
mod served;
mod show;
mod size;
mod stat;
mod throttle;
mod top;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use vhost_user_ploop::format::{ClusterSize, Guid};
use vhost_user_ploop::image::{
    self, Access, CheckReport, CompareError, Conversion, Destination, ImageError, OpenMode, Origin,
    Shrink, Side,
};
use vhost_user_ploop::storage::ease_limits;
use vhost_user_ploop::usage;

use crate::args::{Cli, Command, Convert, Disk, Format, Letters, Output, Snapshot, Verbosity};
use crate::picture::{Kind, terminal};
use crate::progress::Bar;
use crate::served::Refusal;

/// Of `qemu-img compare`, for what is neither alike nor different.
const CANNOT_OPEN: u8 = 2;
const CANNOT_READ: u8 = 4;

fn main() -> ExitCode {
    let cli: Cli = match usage::parse() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    notes::start();
    ease_limits();
    progress::outlive_questions();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn complain(error: &ImageError) {
    notes::say(format_args!("{error}{}", hint(error)));
}

fn run(command: Command) -> Result<ExitCode, ImageError> {
    match command {
        Command::Create {
            path,
            size,
            cluster,
            quiet,
            format: _,
        } => {
            let cluster = cluster.size().unwrap_or(ClusterSize::DEFAULT);
            let size = image::create(&path, size, cluster)?;
            if !quiet {
                show::new_disk(&path, size, cluster);
            }
        }
        Command::Info {
            disk,
            backing_chain,
            picture,
            format,
        } => {
            if picture && let Err(why) = picture::require_human(format.output) {
                return Ok(end(Err(why)));
            }
            let mut mode = read_mode(&disk);
            let info = match image::info(&disk.path, mode) {
                // Who can be asked can be believed to keep it in order.
                Err(ImageError::Locked { .. }) if served::is_served(&disk.path) => {
                    mode = mode_for(disk.snapshot, true);
                    image::info(&disk.path, mode)?
                }
                info => info?,
            };
            show::info(&info, backing_chain, format.output);
            if picture {
                let columns = terminal::bar_width() as u64;
                let layout = image::layout(&disk.path, mode, columns, columns)?;
                let lines = terminal::lines(&layout, terminal::is_utf8());
                lines.iter().for_each(show::print);
            }
        }
        Command::Check {
            disk,
            repair,
            control,
            quiet,
            source_cache: _,
            format,
        } => {
            let mode = read_mode(&disk);
            let repair = repair.map(Into::into);
            // Only a repair may take long; a check ends at once when it is asked to.
            let report = match repair {
                Some(_) => image::check(&disk.path, repair, mode, &Bar::new(false, quiet))?,
                None => match image::check(&disk.path, repair, mode, &()) {
                    Err(locked @ ImageError::Locked { .. }) => {
                        let check = || image::check_served(&disk.path, mode);
                        match served::read(&disk.path, control.as_deref(), check) {
                            Ok(report) => report,
                            Err(refusal) => return refused(refusal, locked),
                        }
                    }
                    report => report?,
                },
            };
            if !quiet {
                show::check(&report, format.output);
            }
            return Ok(check_code(&report));
        }
        Command::Compare {
            first,
            second,
            first_format,
            second_format,
            snapshot,
            second_snapshot,
            strict,
            force_share,
            source_cache: _,
            verbosity,
        } => {
            let side = |path, format: Option<Format>, snapshot| Side {
                path,
                format: format.map(Into::into),
                mode: mode_for(snapshot, force_share),
            };
            let sides = [
                side(first, first_format, snapshot),
                side(second, second_format, second_snapshot),
            ];
            return Ok(compare(&sides, strict, &verbosity));
        }
        Command::Measure {
            source,
            size,
            source_format,
            target_format,
            cluster,
            snapshot,
            force_share,
            format,
        } => {
            let (target, cluster) = (target_format.into(), cluster.size());
            let mode = mode_for(snapshot, force_share);
            let measure = match (size, source) {
                (Some(size), _) => image::measure_new(size, target, cluster)?,
                // The command line requires one of the two.
                (None, source) => image::measure_copy(
                    &source.unwrap_or_default(),
                    source_format.map(Into::into),
                    mode,
                    target,
                    cluster,
                )?,
            };
            show::measure(&measure, format.output);
        }
        Command::Map {
            disk,
            since,
            picture,
            control,
            format,
        } => {
            let drawn = picture.map(|file| {
                picture::require_human(format.output)?;
                Kind::of(&file).map(|kind| (file, kind))
            });
            let drawn = match drawn.transpose() {
                Ok(drawn) => drawn,
                Err(why) => return Ok(end(Err(why))),
            };
            let map = |mode| match (&drawn, since) {
                (Some((file, kind)), _) => {
                    let (parts, stretches) = (picture::PARTS, picture::STRETCHES);
                    let layout = image::layout(&disk.path, mode, parts, stretches)?;
                    picture::save(file, *kind, &disk.path, &layout)
                }
                (None, Some(then)) => show::map(format.output, |each| {
                    image::map_since(&disk.path, mode, then, each)
                }),
                (None, None) => show::map(format.output, |each| image::map(&disk.path, mode, each)),
            };
            match map(read_mode(&disk)) {
                Err(locked @ ImageError::Locked { .. }) => {
                    let map = || map(mode_for(disk.snapshot, true));
                    if let Err(refusal) = served::read(&disk.path, control.as_deref(), map) {
                        return refused(refusal, locked);
                    }
                }
                shown => shown?,
            }
        }
        Command::Convert(convert) => match convert.format_version {
            Some(version) => image::change_version(&convert.source, version)?,
            None => {
                let bar = Bar::of(&convert.verbosity);
                conversion(*convert).run(&bar)?;
            }
        },
        Command::Resize {
            path,
            size,
            shrink,
            control,
            quiet,
            format: _,
            preallocation: _,
        } => {
            let shrink = match shrink {
                true => Shrink::Allowed,
                false => Shrink::Refused,
            };
            let size = match image::resize(&path, size, shrink) {
                Err(locked @ ImageError::Locked { .. }) => {
                    match served::resize(&path, size, shrink, control.as_deref()) {
                        Ok(size) => size,
                        Err(refusal) => return refused(refusal, locked),
                    }
                }
                resized => resized?,
            };
            if !quiet {
                show::resized(size);
            }
        }
        Command::Snapshot {
            what: Some(what), ..
        } => return snapshot(what),
        Command::Snapshot {
            what: None,
            letters,
        } => return snapshot_by_letter(letters),
        Command::Bitmap { what } => {
            return Ok(match bitmap::run(what)? {
                Ok(()) => ExitCode::SUCCESS,
                Err(Refusal::Image(error)) => return Err(error),
                // It was said.
                Err(_) => ExitCode::FAILURE,
            });
        }
        Command::Stat {
            path,
            control,
            watch,
            format,
        } => {
            let watch = watch.map(Duration::from_secs);
            let shown = stat::run(&path, control.as_deref(), watch, format.output);
            return Ok(end(shown));
        }
        Command::Top {
            paths,
            control,
            sort,
            reverse,
            interval,
            format,
        } => {
            return Ok(end(top::run(top::Options {
                paths,
                controls: control,
                sort,
                is_reversed: reverse,
                interval_seconds: interval,
                output: format.output,
            })));
        }
        Command::Throttle {
            path,
            control,
            none,
            limits,
            format,
        } => {
            let control = control.as_deref();
            let changed = throttle::run(&path, control, none, &limits.0, format.output);
            return Ok(end(changed));
        }
        Command::Compact {
            path,
            control,
            verbosity,
        } => {
            let bar = Bar::of(&verbosity);
            let gained = match image::compact(&path, &bar) {
                Err(locked @ ImageError::Locked { .. }) => {
                    match served::compact(&path, control.as_deref(), &bar) {
                        Ok(gained) => gained,
                        Err(refusal) => return refused(refusal, locked),
                    }
                }
                compacted => compacted?,
            };
            drop(bar);
            if !verbosity.quiet {
                show::compacted(gained);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How a command ends that the process that serves a disk was not asked for, or has refused.
fn refused(refusal: Refusal, locked: ImageError) -> Result<ExitCode, ImageError> {
    match refusal {
        Refusal::Unserved => Err(locked),
        Refusal::Image(error) => Err(error),
        Refusal::Said => Ok(ExitCode::FAILURE),
    }
}

/// Says why something was not done, if it was not.
fn end(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            notes::say(why);
            ExitCode::FAILURE
        }
    }
}

/// Two disks, and the exit codes of `qemu-img compare`.
fn compare([first, second]: &[Side; 2], strict: bool, verbosity: &Verbosity) -> ExitCode {
    let compared = image::compare(first, second, strict, &Bar::of(verbosity));
    match compared {
        Ok(comparison) => {
            if !verbosity.quiet {
                show::comparison(&comparison, strict);
            }
            ExitCode::from(u8::from(comparison.difference.is_some()))
        }
        Err(CompareError::Open(error)) => {
            complain(&error);
            ExitCode::from(CANNOT_OPEN)
        }
        Err(CompareError::Read(error)) => {
            complain(&error);
            ExitCode::from(CANNOT_READ)
        }
    }
}

fn conversion(convert: Convert) -> Conversion {
    let is_stream = |path: &PathBuf| path.as_os_str() == "-";
    // The command line requires it here.
    let target = convert.target.unwrap_or_default();
    Conversion {
        source: match is_stream(&convert.source) {
            true => Origin::StandardInput,
            false => Origin::Path(convert.source),
        },
        source_format: convert.source_format.map(Into::into),
        mode: mode_for(convert.snapshot, convert.force_share),
        target: match (is_stream(&target), convert.no_create) {
            (true, _) => Destination::StandardOutput,
            (false, true) => Destination::Existing(target),
            (false, false) => Destination::New(target),
        },
        target_format: convert.target_format.map(Into::into),
        cluster: convert.cluster.size(),
        keep_zeros: convert.sparse_size == Some(0),
    }
}

/// A snapshot of a disk, whether it is being served or not.
fn create_snapshot(
    path: &Path,
    guid: Option<Guid>,
    description: Option<&str>,
    control: Option<&Path>,
    quiet: bool,
) -> Result<ExitCode, ImageError> {
    let guid = match image::create_snapshot(path, guid, description) {
        Err(locked @ ImageError::Locked { .. }) => {
            match served::create_snapshot(path, guid, description, control) {
                Ok(guid) => guid,
                Err(refusal) => return refused(refusal, locked),
            }
        }
        created => created?,
    };
    if !quiet {
        show::created(guid);
    }
    Ok(ExitCode::SUCCESS)
}

/// The same when one goes.
fn delete_snapshot(
    path: &Path,
    guid: Guid,
    control: Option<&Path>,
    bar: &Bar,
) -> Result<ExitCode, ImageError> {
    match image::delete_snapshot(path, guid, bar) {
        Err(locked @ ImageError::Locked { .. }) => {
            match served::delete_snapshot(path, guid, control, bar) {
                Ok(()) => {}
                Err(refusal) => return refused(refusal, locked),
            }
        }
        deleted => deleted?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The same when the disk goes back to one.
fn switch_snapshot(
    path: &Path,
    guid: Guid,
    control: Option<&Path>,
) -> Result<ExitCode, ImageError> {
    match image::switch_snapshot(path, guid) {
        Err(locked @ ImageError::Locked { .. }) => {
            match served::switch_snapshot(path, guid, control) {
                Ok(()) => {}
                Err(refusal) => return refused(refusal, locked),
            }
        }
        switched => switched?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The same when a range of them goes.
fn merge_snapshots(
    path: &Path,
    (from, to): (Option<Guid>, Option<Guid>),
    control: Option<&Path>,
    bar: &Bar,
) -> Result<ExitCode, ImageError> {
    match image::merge_snapshots(path, from, to, bar) {
        Err(locked @ ImageError::Locked { .. }) => {
            match served::merge_snapshots(path, (from, to), control, bar) {
                Ok(()) => {}
                Err(refusal) => return refused(refusal, locked),
            }
        }
        merged => merged?,
    }
    Ok(ExitCode::SUCCESS)
}

fn snapshot(what: Snapshot) -> Result<ExitCode, ImageError> {
    match what {
        Snapshot::Create {
            path,
            guid,
            description,
            control,
        } => {
            let (description, control) = (description.as_deref(), control.as_deref());
            return create_snapshot(&path, guid, description, control, false);
        }
        Snapshot::List { path, format } => {
            show::snapshots(&image::list_snapshots(&path)?, format.output);
        }
        Snapshot::Delete {
            path,
            guid,
            control,
            verbosity,
        } => return delete_snapshot(&path, guid, control.as_deref(), &Bar::of(&verbosity)),
        Snapshot::Switch {
            path,
            guid,
            control,
        } => return switch_snapshot(&path, guid, control.as_deref()),
        Snapshot::Merge {
            path,
            from,
            to,
            control,
            verbosity,
        } => {
            let (control, bar) = (control.as_deref(), Bar::of(&verbosity));
            return merge_snapshots(&path, (from, to), control, &bar);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn snapshot_by_letter(letters: Letters) -> Result<ExitCode, ImageError> {
    // The command line requires it here.
    let path = letters.path.unwrap_or_default();
    match (letters.create, letters.apply, letters.delete) {
        (Some(name), _, _) => {
            let (guid, description) = match name.parse() {
                Ok(guid) => (Some(guid), None),
                Err(_) => (None, Some(name.as_str())),
            };
            return create_snapshot(&path, guid, description, None, letters.quiet);
        }
        (_, Some(name), _) => {
            return switch_snapshot(&path, image::find_snapshot(&path, &name)?, None);
        }
        (_, _, Some(name)) => {
            let guid = image::find_snapshot(&path, &name)?;
            return delete_snapshot(&path, guid, None, &Bar::new(false, letters.quiet));
        }
        (None, None, None) => {
            let list = image::list_snapshots(&path)?;
            if !letters.quiet {
                show::snapshots(&list, Output::Human);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What this program has an option for.
fn hint(error: &ImageError) -> &'static str {
    match error {
        ImageError::Locked {
            shareable: true, ..
        } => ", or read it all the same with --force-share",
        _ => "",
    }
}

/// The exit codes of `qemu-img check`; 1, that the check failed, is an error.
fn check_code(report: &CheckReport) -> ExitCode {
    match report {
        CheckReport {
            corruptions: 1.., ..
        } => ExitCode::from(2),
        CheckReport { leaks: 1.., .. } => ExitCode::from(3),
        _ => ExitCode::SUCCESS,
    }
}

fn read_mode(disk: &Disk) -> OpenMode {
    mode_for(disk.snapshot, disk.force_share)
}

fn mode_for(snapshot: Option<Guid>, force_share: bool) -> OpenMode {
    OpenMode::new(Access::Read)
        .snapshot(snapshot)
        .force_share(force_share)
}
