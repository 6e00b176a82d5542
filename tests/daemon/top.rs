//! `ploop-img top` shows the disks of several processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::backend::Backend;
use crate::common::img::{Ran, ploop_img_command};
use crate::common::terminal::Terminal;
use crate::grow::create;
use crate::stat::VARIABLE;
use crate::{expect_service, start_front_end, wait_for};

/// Disks with a process each, in folders `a` and `b`.
struct Host {
    folder: TempDir,
    backends: Vec<Backend>,
}

impl Host {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("run")).unwrap();
        let mut host = Self {
            folder,
            backends: Vec::new(),
        };
        for name in ["a", "b"] {
            fs::create_dir(host.path(name)).unwrap();
            create(&host.path(name), "vm", &[]);
            host.serve(name, &[]);
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&mut self, name: &str, options: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        command.env(VARIABLE, self.path("run"));
        let socket = self.path(&format!("{name}.socket"));
        let image = self.path(name).join("vm");
        let backend = Backend::start_as(command, &image, &socket, options);
        self.backends.push(backend);
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = ploop_img_command();
        command
            .env(VARIABLE, self.path("run"))
            .arg("top")
            .args(args);
        command.stdin(Stdio::null());
        command
    }

    fn top(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    /// The disks that it shows, by their files.
    fn shown(&self, args: &[&str]) -> Vec<String> {
        let disks = reports(self.top(args));
        let file = |disk: &Value| disk["file"].as_str().unwrap_or("silent").to_owned();
        disks.iter().map(file).collect()
    }

    fn image(&self, name: &str) -> String {
        let image = self.path(name).join("vm/root.hds");
        image.to_str().unwrap().to_owned()
    }

    fn end(self) {
        self.backends.into_iter().for_each(Backend::stop);
    }
}

fn reports(ran: Ran) -> Vec<Value> {
    serde_json::from_str(&ran.ok()).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_disks_of_all_processes_are_shown_or_those_that_are_asked_for() {
    let mut host = Host::new();
    let (a, b) = (host.image("a"), host.image("b"));
    let by_name = ["--output=json", "--sort=disk"];
    let shown = |host: &Host, more: &[&str]| host.shown(&[&by_name[..], more].concat());
    assert_eq!(shown(&host, &[]), [&*a, &*b]);
    assert_eq!(shown(&host, &["--reverse"]), [&*b, &*a]);
    let (folder_a, folder) = (host.path("a"), host.folder.path().to_owned());
    assert_eq!(shown(&host, &[text(&folder_a)]), [&*a]);
    assert_eq!(shown(&host, &[text(&folder_a.join("vm"))]), [&*a]);
    assert_eq!(shown(&host, &[text(&folder)]), [&*a, &*b]);
    assert_eq!(shown(&host, &[text(&host.path("run"))]), [""; 0]);
    let said = host
        .top(&["--output=json", text(&host.path("none"))])
        .fails();
    assert!(said.contains("none"), "{said}");
    // One that is not where it would be looked for.
    host.backends.remove(0).stop();
    let socket = host.path("control");
    host.serve("a", &[&format!("--control={}", text(&socket))]);
    assert_eq!(shown(&host, &[]), [&*b]);
    let option = format!("--control={}", text(&socket));
    assert_eq!(shown(&host, &[&option]), [&*a]);
    assert_eq!(shown(&host, &[&option, text(&host.path("b"))]), [&*a, &*b]);
    let said = host
        .top(&["--output=json", text(&folder_a.join("vm"))])
        .fails();
    assert!(said.contains("no process that serves"), "{said}");
    // What a dead process has left is no disk, and one that stands still is none to wait for.
    host.backends.pop().unwrap().kill();
    assert_eq!(shown(&host, &[&option]), [""; 0]);
    let pid = Pid::from_raw(host.backends[0].pid() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let silent = reports(host.top(&by_name));
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(silent[0]["status"], "no answer");
    assert!(text(Path::new(silent[0]["control"].as_str().unwrap())).ends_with("/control"));
    host.end();
}

#[test]
fn what_disks_do_is_shown_once_for_programs() {
    let host = Host::new();
    let mut front_end = start_front_end(host.backends[1].socket());
    let mut command = host.command(&["--output=json", "--sort=bytes"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    while child.try_wait().unwrap().is_none() {
        expect_service(&mut front_end);
    }
    let disks = reports(child.wait_with_output().unwrap().into());
    assert_eq!(disks.len(), 2);
    let (busy, idle) = (&disks[0], &disks[1]);
    assert_eq!(busy["file"], host.image("b"));
    assert!(
        busy["reads"]["operations-per-second"].as_f64() > Some(0.0),
        "{busy}"
    );
    assert!(busy["writes"]["p99-ns"].as_u64() > Some(0), "{busy}");
    assert!(busy["queue-depth"].as_f64() > Some(0.0), "{busy}");
    assert_eq!(
        (&busy["status"], &idle["status"]),
        (&"running".into(), &"running".into())
    );
    assert_eq!(idle["reads"]["operations-per-second"], 0.0);
    assert_eq!(idle["virtual-size"], 64 << 20);
    drop(front_end);
    host.end();
}

/// Shows the picture on a terminal.
fn on_a_terminal(host: &Host, term: &str) -> (Terminal, Child) {
    let (terminal, line) = Terminal::new(200, 30);
    // Not the terminal of who runs the tests.
    let child = Command::new("setsid")
        .arg("--ctty")
        .arg(env!("CARGO_BIN_EXE_ploop-img"))
        .arg("top")
        .env(VARIABLE, host.path("run"))
        .env("TERM", term)
        .stdin(line.try_clone().unwrap())
        .stdout(line)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (terminal, child)
}

#[test]
fn a_terminal_shows_disks_live_and_is_as_before_in_the_end() {
    let mut host = Host::new();
    for signal in [None, Some(Signal::TERM)] {
        let mut front_end = start_front_end(host.backends[1].socket());
        let (mut terminal, child) = on_a_terminal(&host, "xterm");
        let (a, b) = (host.image("a"), host.image("b"));
        wait_for("both disks, the busier one above", || {
            expect_service(&mut front_end);
            let shown = terminal.shown();
            let line = |name: &str| shown.lines().position(|line| line.contains(name));
            let lines = [line("2 disks"), line("DEPTH"), line(&b), line(&a)];
            lines.iter().all(Option::is_some) && lines.is_sorted()
        });
        terminal.enter("h");
        wait_for("the help", || terminal.shown().contains(" Keys "));
        terminal.enter("h");
        wait_for("its end", || !terminal.shown().contains(" Keys "));
        // One that comes and goes.
        fs::create_dir_all(host.path("c")).unwrap();
        if signal.is_none() {
            create(&host.path("c"), "vm", &[]);
        }
        host.serve("c", &[]);
        let c = host.image("c");
        wait_for("the third one", || terminal.shown().contains(&c));
        host.backends.pop().unwrap().stop();
        wait_for("its end", || !terminal.shown().contains(&c));
        match signal {
            None => terminal.enter("q"),
            Some(signal) => kill_process(Pid::from_child(&child), signal).unwrap(),
        }
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        let said = terminal.end();
        let (enters, leaves) = ("\x1b[?1049h", "\x1b[?1049l");
        assert!(said.rfind(leaves) > said.find(enters), "{said:?}");
        drop(front_end);
    }
    host.end();
}

/// It waits for the other half.
#[test]
fn half_a_key_keeps_nobody_from_ending_it() {
    let host = Host::new();
    let (mut terminal, child) = on_a_terminal(&host, "xterm");
    wait_for("the disks", || terminal.shown().contains("2 disks"));
    terminal.enter("\x1b[");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    drop(terminal);
    host.end();
}

#[test]
fn where_there_is_no_terminal_there_is_an_error() {
    let host = Host::new();
    let said = host.top(&[]).fails();
    assert!(
        said.contains("needs a terminal") && said.contains("--output json"),
        "{said}"
    );
    for term in ["dumb", ""] {
        let (terminal, child) = on_a_terminal(&host, term);
        let ran: Ran = child.wait_with_output().unwrap().into();
        assert!(ran.fails().contains("TERM"));
        assert_eq!(terminal.end(), "", "nothing is drawn");
    }
    host.end();
}
