//! Command lines that a program does not understand.
//!
//! Both programs end in the same way then: with status 1, as `qemu-img` does, where clap
//! alone would exit with 2, which is what `ploop-img check` says of corruption.

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use crate::printable::{Printable, PrintableLines, is_obeyed};

/// What the command line says. Where it is wrong, or asks for help, that has been printed,
/// and the program is to exit with the code.
pub fn parse<P: Parser>() -> Result<P, ExitCode> {
    P::try_parse().map_err(|error| {
        let args: Vec<_> = env::args_os().collect();
        match printable::<P>(&args) {
            // Names of files may be given where none are expected.
            Some(said) => eprint!("{}", PrintableLines(said)),
            None => drop(error.print()),
        }
        ExitCode::from(u8::from(error.use_stderr()))
    })
}

/// What is said of arguments that a terminal would obey, in words that it would not;
/// nothing if there are none. (Rendered without colours, a message has lost some of what
/// it would obey already, and with them it has colours of its own.)
fn printable<P: Parser>(args: &[OsString]) -> Option<String> {
    let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    if !args.iter().any(|arg| arg.contains(is_obeyed)) {
        return None;
    }
    let shown = args.iter().map(|arg| Printable(arg).to_string());
    let said = match P::try_parse_from(shown) {
        Err(error) => error.render().to_string(),
        Ok(_) => "error: an argument has control characters\n".to_owned(),
    };
    Some(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct One {
        #[arg(value_parser = |text: &str| match text {
            "\\u{7}" | "1" => Ok(()),
            _ => Err("is not 1"),
        })]
        one: (),
    }

    fn said(args: &[&str]) -> Option<String> {
        let args: Vec<_> = args.iter().map(OsString::from).collect();
        printable::<One>(&args)
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        let text = said(&["one", "1", "\u{1b}[31m\u{1b}]0;x\u{7}\n"]).unwrap();
        assert!(
            text.contains(r"'\u{1b}[31m\u{1b}]0;x\u{7}\n'"),
            "what was given is not shown: {text:?}"
        );
        assert!(!text.contains(|c| c != '\n' && is_obeyed(c)), "{text:?}");
        // What would be right if it were what is shown of it.
        let text = said(&["one", "\u{7}"]).unwrap();
        assert!(text.contains("control characters"), "{text:?}");
    }

    #[test]
    fn what_is_harmless_stays_as_it_is() {
        assert_eq!(said(&["one", "2"]), None);
        assert_eq!(said(&["one", "1", "ä"]), None);
    }
}
