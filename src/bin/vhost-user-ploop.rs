//! The daemon: parses its arguments and calls the library.

use std::env;
use std::error::Error;
use std::process::ExitCode;

use vhost_user_ploop::control::{self, Args, Logging, Sandbox, args};
use vhost_user_ploop::usage;

fn main() -> ExitCode {
    if args::asks_for_capabilities(env::args_os()) {
        println!("{}", args::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    let args: Args = match usage::parse() {
        Ok(args) => args,
        Err(code) => return code,
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
            ExitCode::from(error.exit_status())
        }
    };
    logging.finish();
    status
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
