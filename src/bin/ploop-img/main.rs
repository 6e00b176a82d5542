//! `ploop-img` makes, checks and changes ploop disk images.
//!
//! Reads the command line, calls the library, shows what comes back.

mod args;
mod progress;
mod show;
mod size;

use std::process::ExitCode;

use clap::Parser;
use vhost_user_ploop::image::{self, Access, CheckReport, Conversion, ImageError, OpenMode};
use vhost_user_ploop::storage::ease_limits;

use crate::args::{Cli, Command, Disk, Snapshot};
use crate::progress::Bar;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Clap would exit with 2, which is what `check` says of corruption.
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    ease_limits();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ploop-img: {error}{}", hint(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode, ImageError> {
    match command {
        Command::Create {
            path,
            size,
            cluster_size,
        } => image::create(&path, size, cluster_size)?,
        Command::Info {
            disk,
            backing_chain,
            format,
        } => {
            let info = image::info(&disk.path, read_mode(&disk))?;
            show::info(&info, backing_chain, format.output);
        }
        Command::Check {
            disk,
            repair,
            format,
        } => {
            let mode = read_mode(&disk);
            let repair = repair.map(Into::into);
            // Only a repair may take long; a check ends at once when it is asked to.
            let report = match repair {
                Some(_) => image::check(&disk.path, repair, mode, &Bar::new(false))?,
                None => image::check(&disk.path, repair, mode, &())?,
            };
            show::check(&report, format.output);
            return Ok(check_code(&report));
        }
        Command::Map { disk, format } => show::map(format.output, |each| {
            image::map(&disk.path, read_mode(&disk), each)
        })?,
        Command::Convert {
            source,
            format_version: Some(version),
            ..
        } => image::change_version(&source, version)?,
        Command::Convert {
            source,
            target,
            format_version: None,
            source_format,
            target_format,
            cluster_size,
            snapshot,
            force_share,
            progress,
        } => {
            let conversion = Conversion {
                source,
                source_format: source_format.map(Into::into),
                mode: OpenMode::new(Access::Read)
                    .snapshot(snapshot)
                    .force_share(force_share),
                // The command line requires it here.
                target: target.unwrap_or_default(),
                target_format: target_format.map(Into::into),
                cluster: cluster_size,
            };
            conversion.run(&Bar::new(progress))?;
        }
        Command::Resize { path, size } => {
            let size = image::resize(&path, size)?;
            show::resized(size);
        }
        Command::Snapshot { what } => snapshot(what)?,
        Command::Compact { path, progress } => {
            let gained = image::compact(&path, &Bar::new(progress))?;
            show::compacted(gained);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn snapshot(what: Snapshot) -> Result<(), ImageError> {
    match what {
        Snapshot::Create { path, guid } => {
            let guid = image::create_snapshot(&path, guid)?;
            show::created(guid);
            Ok(())
        }
        Snapshot::List { path, format } => {
            show::snapshots(&image::list_snapshots(&path)?, format.output);
            Ok(())
        }
        Snapshot::Delete {
            path,
            guid,
            progress,
        } => image::delete_snapshot(&path, guid, &Bar::new(progress)),
        Snapshot::Switch { path, guid } => image::switch_snapshot(&path, guid),
        Snapshot::Merge {
            path,
            from,
            to,
            progress,
        } => image::merge_snapshots(&path, from, to, &Bar::new(progress)),
    }
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
    OpenMode::new(Access::Read)
        .snapshot(disk.snapshot)
        .force_share(disk.force_share)
}
