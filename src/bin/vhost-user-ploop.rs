//! The daemon: parses its arguments and calls the library.

use std::env;
use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use vhost_user_ploop::control::{self, Args, Logging, Sandbox, args};
use vhost_user_ploop::printable::{PrintableLines, is_obeyed};

fn main() -> ExitCode {
    if args::asks_for_capabilities(env::args_os()) {
        println!("{}", args::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return refuse(&error),
    };
    let sandbox = match Sandbox::begin(args.sandbox_options()) {
        Ok(sandbox) => sandbox,
        Err(error) => {
            eprintln!("vhost-user-ploop: {}", chain_of_causes(&error));
            return ExitCode::FAILURE;
        }
    };
    let logging = match Logging::start(args.log_level, args.log_format) {
        Ok(logging) => logging,
        Err(error) => {
            eprintln!("vhost-user-ploop: cannot start the log: {error}");
            return ExitCode::FAILURE;
        }
    };
    logging.abort_on_panic();
    let status = match control::run(&args, &sandbox) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging.say_failure(&chain_of_causes(&error));
            ExitCode::FAILURE
        }
    };
    logging.finish();
    status
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
