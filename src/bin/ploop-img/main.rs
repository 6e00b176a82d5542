//! `ploop-img` makes, checks and changes ploop disk images.
//!
//! Reads the command line, calls the library, shows what comes back.

mod args;
mod show;
mod size;

use std::process::ExitCode;

use clap::Parser;
use vhost_user_ploop::image::{self, Access, ImageError, OpenMode};

use crate::args::{Cli, Command, Disk};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Clap would exit with 2, which is what `check` says of corruption.
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ploop-img: {error}");
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
    }
    Ok(ExitCode::SUCCESS)
}

fn read_mode(disk: &Disk) -> OpenMode {
    OpenMode::new(Access::Read)
        .snapshot(disk.snapshot)
        .force_share(disk.force_share)
}
