use super::*;

use std::sync::mpsc;

const NASTY: &str = "disk\u{1b}[2J\nforged\u{9b}\u{202e}";

#[test]
fn control_characters_reach_nobody_raw() {
    for format in [LogFormat::Text, LogFormat::Journal, LogFormat::Json] {
        let line = format.line(Level::Warn, "x", NASTY);
        assert!(!line.contains(is_obeyed), "{format:?}: {line:?}");
        assert!(line.contains("forged"), "{format:?}: {line}");
    }
}

#[test]
fn json_gives_the_message_back() {
    let line = LogFormat::Json.line(Level::Warn, "some::target", NASTY);
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(value["level"], "warn");
    assert_eq!(value["target"], "some::target");
    assert_eq!(value["message"], NASTY);
    let timestamp = value["timestamp"].as_str().unwrap();
    let age = Timestamp::now() - timestamp.parse::<Timestamp>().unwrap();
    assert!(age.total(jiff::Unit::Second).unwrap().abs() < 60.0);
}

#[test]
fn the_journal_gets_priorities() {
    let line = |level| LogFormat::Journal.line(level, "x", "words");
    assert_eq!(line(Level::Error), "<3>words");
    assert_eq!(line(Level::Warn), "<4>words");
    assert_eq!(line(Level::Info), "<6>words");
    assert_eq!(line(Level::Debug), "<7>words");
}

#[test]
fn a_long_message_is_cut_between_characters() {
    let line = LogFormat::Journal.line(Level::Info, "x", &"ä".repeat(MAX_MESSAGE_LEN));
    assert_eq!(line.len(), "<6>".len() + MAX_MESSAGE_LEN);
    let line = LogFormat::Journal.line(Level::Info, "x", &("a".to_owned() + &"ä".repeat(9999)));
    assert_eq!(line.len(), "<6>".len() + MAX_MESSAGE_LEN - 1);
}

#[test]
fn lines_that_found_no_room_are_counted_where_they_are_missing() {
    let queue = Queue::default();
    let push = |number: usize| queue.push(number.to_string());
    (0..MAX_LINES + 5).for_each(push);
    let mut out = Vec::new();
    let mut write_next = || queue.write_next(&mut out, |lost| format!("{lost} lost"));
    write_next();
    push(9999);
    // There is room again only for what comes after the next.
    push(10_000);
    (0..MAX_LINES).for_each(|_| write_next());
    write_next();
    write_next();
    let said = String::from_utf8(out).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[MAX_LINES - 1], (MAX_LINES - 1).to_string());
    assert_eq!(lines[MAX_LINES..], ["5 lost", "9999", "1 lost"]);
    assert!(queue.lock().is_idle());
}

#[test]
fn nobody_waits_for_a_reader_for_ever() {
    /// Blocks in `write` until it is let go.
    struct Stuck(mpsc::Receiver<()>);
    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let queue = Queue::default();
    let (let_go, stuck) = mpsc::channel();
    thread::scope(|scope| {
        queue.push("first".to_owned());
        scope.spawn(|| queue.write_next(&mut Stuck(stuck), |_| unreachable!()));
        while !queue.lock().is_writing {
            thread::yield_now();
        }
        for number in 0..10 * MAX_LINES {
            queue.push(number.to_string());
        }
        queue.wait_until_written(Duration::from_millis(10));
        assert!(!queue.lock().is_idle());
        drop(let_go);
    });
    assert!(!queue.lock().is_writing);
    assert!(queue.lock().lost >= 9 * MAX_LINES as u64 - 1);
}
