//! A client of the control socket, made by hand.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// How long an answer or an event may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// One that has introduced itself.
pub struct Qmp {
    pub socket: UnixStream,
    lines: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, and hears the greeting.
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).expect("somebody listens");
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(socket.try_clone().unwrap());
        let mut qmp = Self {
            socket,
            lines,
            events: VecDeque::new(),
        };
        let greeting = qmp.hear().expect("it is greeted");
        assert!(greeting["QMP"]["version"]["qemu"].is_object(), "{greeting}");
        assert_eq!(qmp.ask("qmp_capabilities", json!({})), json!({}));
        qmp
    }

    /// The next line; `None` at the end.
    pub fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        let len = self.lines.read_line(&mut line).expect("a line in time");
        (len > 0).then(|| {
            assert!(line.ends_with("\r\n") && line.is_ascii(), "{line:?}");
            serde_json::from_str(&line).expect("it is JSON")
        })
    }

    /// What is said until the server goes, as it may at any time.
    pub fn last_words(&mut self) -> Vec<Value> {
        let lines = (&mut self.lines).lines().map_while(Result::ok);
        let parse = |line: String| serde_json::from_str(&line).ok();
        lines.filter_map(parse).collect()
    }

    /// What is answered to a command, whichever way.
    pub fn answer(&mut self, command: &str, arguments: Value) -> Value {
        self.begin(command, arguments);
        self.end(command)
    }

    /// Sends a command.
    pub fn begin(&mut self, command: &str, arguments: Value) {
        let request = json!({ "execute": command, "arguments": arguments, "id": command });
        // As other clients do: nothing ends it.
        self.socket
            .write_all(request.to_string().as_bytes())
            .unwrap();
    }

    /// What is answered to an object that has no name for it.
    pub fn answer_to(&mut self, object: &Value) -> Value {
        self.socket
            .write_all(object.to_string().as_bytes())
            .unwrap();
        self.hear().expect("an answer")
    }

    /// What is answered next, which is to be to this command.
    #[track_caller]
    pub fn end(&mut self, command: &str) -> Value {
        loop {
            let line = self.hear().expect("an answer");
            if line["event"].is_string() {
                self.events.push_back(line);
                continue;
            }
            assert_eq!(line["id"], command);
            return line;
        }
    }

    /// What a command returns.
    #[track_caller]
    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.answer(command, arguments);
        assert!(answer["error"].is_null(), "{answer}");
        answer["return"].clone()
    }

    /// The next event of this name; others before it are dropped.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        let start = Instant::now();
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.hear().expect("an event"),
            };
            assert!(start.elapsed() < PATIENCE, "{name} does not come");
            if event["event"] == name {
                assert!(event["timestamp"]["seconds"].as_u64() > Some(1_500_000_000));
                return event["data"].clone();
            }
        }
    }
}
