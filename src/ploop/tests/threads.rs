//! Threads of the engine that panic: whoever waits for them must not wait for ever.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command as Process, Stdio};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Instant;

use rustix::process::Signal;

use super::*;
use crate::ploop::preempt;
use crate::ploop::running::{run_md, run_runner};

/// Set in the process that is to end.
const IS_CHILD: &str = "PLOOP_TEST_PANICS";
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `child` in a process of its own, as the same test: it ends by an abort.
fn aborts(test: &str, child: impl FnOnce()) {
    if env::var_os(IS_CHILD).is_some() {
        child();
        panic!("a thread has panicked, and this one goes on");
    }
    let me = env::current_exe().unwrap();
    let mut process = Process::new(me)
        .args(["--exact", &format!("ploop::tests::threads::{test}")])
        .env(IS_CHILD, "yes")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            process.kill().unwrap();
            process.wait().unwrap();
            panic!("who waits for a thread that has panicked waits for ever");
        }
        thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{status}");
}

/// From now on the calling thread panics as soon as it comes to this point.
fn panic_at(point: &'static str) -> preempt::Hook {
    preempt::once(point, || panic!("as the test wants it"))
}

#[test]
fn a_panic_of_the_metadata_thread_ends_the_process() {
    aborts("a_panic_of_the_metadata_thread_ends_the_process", || {
        let disk = empty_image(Medium::default(), 1, 4 * CLUSTER);
        let chain = Chain {
            levels: vec![Level::Ploop],
        };
        let Opened { engine, md, .. } = Engine::open(disk, &chain, options()).unwrap();
        thread::spawn(move || {
            let _hook = panic_at("heard");
            run_md(md);
        });
        let _ = engine.settle();
    });
}

#[test]
fn a_panic_of_a_runner_ends_the_process() {
    aborts("a_panic_of_a_runner_ends_the_process", || {
        let mut rig = Rig::new(4 * CLUSTER);
        for runner in rig.runners.drain(..) {
            thread::spawn(move || {
                let _hook = panic_at("published");
                run_runner(runner.into_inner(), &AtomicBool::new(false));
            });
        }
        let tag = rig.push_write_to(0, 0, &[1; 512]);
        while rig.ended(tag).is_none() {
            rig.turn();
        }
    });
}
