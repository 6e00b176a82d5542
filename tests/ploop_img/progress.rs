//! Progress: a bar on a terminal, lines where they are asked for, else nothing.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::common::img::{ploop_img, ploop_img_command};
use super::common::terminal::Terminal;

fn command(args: &[&str]) -> Command {
    let mut command = ploop_img_command();
    command.args(args).env("TERM", "xterm");
    command
}

/// Runs `ploop-img` with standard error on a terminal; gives back what it says
/// there.
fn on_a_terminal(args: &[&str]) -> String {
    let (terminal, line) = Terminal::new(100, 24);
    let mut command = command(args);
    let output = command.stderr(line).output().unwrap();
    // It holds the last descriptor of the terminal.
    drop(command);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    terminal.end()
}

fn raw_file(folder: &Path) -> String {
    let raw = folder.join("a.raw");
    fs::write(&raw, vec![7; 40 << 20]).unwrap();
    raw.to_str().unwrap().to_owned()
}

#[test]
fn a_terminal_shows_a_bar_that_is_gone_in_the_end() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let raw = raw_file(folder.path());
    let (disk, copy, back) = (path("disk"), path("copy.hds"), path("back.raw"));
    let convert = [
        on_a_terminal(&["convert", &raw, &disk]),
        on_a_terminal(&["convert", &disk, &copy]),
        on_a_terminal(&["convert", "-p", &disk, &back]),
    ];
    let guid = ploop_img(["snapshot", "create", &disk]).ok();
    let delete = on_a_terminal(&["snapshot", "delete", &disk, guid.trim()]);
    ploop_img(["snapshot", "create", &disk]).ok();
    let merge = on_a_terminal(&["snapshot", "merge", &disk]);
    let compact = on_a_terminal(&["compact", &disk]);
    for said in convert.iter().chain([&delete, &merge, &compact]) {
        assert!(said.contains('%') && said.contains('\r'), "{said:?}");
        // The line is erased, and nothing follows.
        assert!(said.ends_with("\r\u{1b}[2K"), "{said:?}");
        assert!(!said.contains('\n'), "{said:?}");
    }
    for said in convert {
        assert!(said.contains("40.00 MiB"), "{said:?}");
    }
}

#[test]
fn a_repair_shows_the_merge_that_it_finishes() {
    if !cfg!(debug_assertions) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let disk = folder.path().join("disk").to_str().unwrap().to_owned();
    ploop_img(["convert", &raw_file(folder.path()), &disk]).ok();
    ploop_img(["snapshot", "create", &disk]).ok();
    let clean = on_a_terminal(&["check", "--repair=all", &disk]);
    assert!(!clean.contains('%'), "{clean:?}");
    // Once the descriptor says that there is something to merge.
    let killed = ploop_img_command()
        .args(["snapshot", "merge", &disk])
        .env("PLOOP_IMG_KILL_AT", "6")
        .output()
        .unwrap();
    assert_eq!(killed.status.code(), None, "{killed:?}");
    let list = ploop_img(["snapshot", "list", &disk]).ok();
    assert!(list.contains("to be merged"), "{list}");
    let said = on_a_terminal(&["check", "--repair=leaks", &disk]);
    assert!(said.contains('%'), "{said:?}");
    ploop_img(["check", &disk]).ok();
}

#[test]
fn nothing_is_shown_where_standard_error_is_no_terminal() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let raw = raw_file(folder.path());
    let ran = ploop_img(["convert", &raw, &path("b")]);
    assert_eq!(ran.code, Some(0));
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""));
    // Not even where standard output is one.
    let (terminal, line) = Terminal::new(100, 24);
    let mut command = command(&["convert", &raw, &path("c")]);
    let child = command.stdout(line).stderr(Stdio::piped()).spawn().unwrap();
    drop(command);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(0), vec![]));
    assert_eq!(terminal.end(), "");
}

#[test]
fn lines_are_printed_where_they_are_asked_for() {
    let folder = TempDir::new().unwrap();
    let raw = raw_file(folder.path());
    let copy = folder.path().join("b");
    let ran = ploop_img(["convert", "-p", &raw, copy.to_str().unwrap()]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""));
    assert!(ran.stderr.ends_with("100%\n"), "{ran:?}");
    assert!(ran.stderr.lines().count() > 3, "{ran:?}");
    assert!(!ran.stderr.contains(['\r', '\u{1b}']), "{ran:?}");
}

/// Asks a conversion that waits for its input how far it is.
#[test]
fn sigusr1_is_answered_at_once() {
    let folder = TempDir::new().unwrap();
    let copy = folder.path().join("b.hds");
    let mut child = ploop_img_command()
        .args(["convert", "-q", "-", copy.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It is at work once it has taken more than a pipe holds.
    stdin.write_all(&vec![7; 9 << 20]).unwrap();
    let pid = Pid::from_child(&child);
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    for _ in 0..2 {
        kill_process(pid, Signal::USR1).unwrap();
        line.clear();
        said.read_line(&mut line).unwrap();
        assert_eq!(line, format!("    ({} bytes)\n", 8 << 20));
    }
    drop(stdin);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    line.clear();
    said.read_to_string(&mut line).unwrap();
    assert_eq!(line, "");
}

#[test]
fn sigusr1_tells_the_share_that_is_done() {
    let folder = TempDir::new().unwrap();
    let raw = raw_file(folder.path());
    let mut child = ploop_img_command()
        .args(["convert", &raw, "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Then the pipe is full, and it waits for a reader.
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut vec![0; 10 << 20]).unwrap();
    kill_process(Pid::from_child(&child), Signal::USR1).unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(
        line == "    (20.00/100%)\n" || line == "    (10.00/100%)\n",
        "{line:?}"
    );
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
