//! The daemon: parses its arguments and calls the library.

use std::env;
use std::error::Error;
use std::io::Write;
use std::panic;
use std::process::{self, ExitCode};

use clap::Parser;
use env_logger::{Builder, Env};
use log::LevelFilter;
use vhost_user_ploop::control::{self, Args, args};
use vhost_user_ploop::printable::{Printable, PrintableLines, is_obeyed};

fn main() -> ExitCode {
    if args::asks_for_capabilities(env::args_os()) {
        println!("{}", args::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return refuse(&error),
    };
    start_log(args.log_level);
    abort_on_panic();
    match control::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let causes = chain_of_causes(&error);
            eprintln!("vhost-user-ploop: {}", Printable(causes));
            ExitCode::FAILURE
        }
    }
}

/// Says what is wrong with the command line, or the help that was asked for.
fn refuse(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    match text.chars().any(|c| c != '\n' && is_obeyed(c)) {
        true => eprint!("{}", PrintableLines(text)),
        false => drop(error.print()),
    }
    // Clap would exit with 2; ploop-img, as qemu-img, says 1 of wrong usage.
    ExitCode::from(u8::from(error.use_stderr()))
}

fn start_log(level: Option<LevelFilter>) {
    let mut builder = Builder::from_env(Env::default().default_filter_or("info"));
    // As it is by default, but for what would not stay on its line.
    builder.format(|out, record| {
        let style = out.default_level_style(record.level());
        let time = out.timestamp();
        let (level, target) = (record.level(), record.target());
        let message = Printable(record.args());
        writeln!(
            out,
            "[{time} {style}{level:<5}{style:#} {target}] {message}"
        )
    });
    if let Some(level) = level {
        builder.filter(None, level);
    }
    builder.init();
}

/// A thread that panics and is gone would leave its queue hanging for ever. The
/// image survives the end of the whole program as it survives a power cut, and
/// the front-end notices it.
fn abort_on_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        report(info);
        process::abort();
    }));
}

/// What went wrong, and why. Some errors name their cause in their own words:
/// then it is not said again.
fn chain_of_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}
