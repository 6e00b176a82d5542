//! Messages: what a client may ask, and how it is answered.
//!
//! The words of the errors are QEMU's, since programs look at some of them.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::names::DISK;

/// Of an error, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Class {
    GenericError,
    CommandNotFound,
    DeviceNotActive,
    DeviceNotFound,
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    class: Class,
    desc: String,
}

impl Failure {
    /// Of no kind of its own.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(Class::GenericError, desc)
    }

    pub(super) fn no_device(name: &str) -> Self {
        Self::new(Class::DeviceNotFound, format!("Device '{name}' not found"))
    }

    /// There is no such job of the kind that QEMU calls block jobs.
    pub(in crate::control) fn no_block_job(id: &str) -> Self {
        Self::new(
            Class::DeviceNotActive,
            format!("Block job '{id}' not found"),
        )
    }

    pub(super) fn new(class: Class, desc: impl Into<String>) -> Self {
        let desc = desc.into();
        Self { class, desc }
    }

    /// For people.
    #[cfg(test)]
    pub fn desc(&self) -> &str {
        &self.desc
    }
}

/// What QEMU says if there is no snapshot of this ID and name.
pub(in crate::control) fn no_such_snapshot(id: Option<&str>, name: Option<&str>) -> String {
    let [id, name] = [id, name].map(|it| it.unwrap_or("null"));
    format!("Snapshot with id '{id}' and name '{name}' does not exist on device '{DISK}'")
}

/// What a command comes to.
pub(super) type Answer = Result<Value, Failure>;

/// A command as it was asked for.
#[derive(Debug)]
pub(super) struct Request {
    pub command: String,
    pub arguments: Map<String, Value>,
}

/// Takes an object apart: the request, and the client's name for it, which belongs into
/// every answer.
pub(super) fn parse(object: &[u8]) -> (Option<Value>, Result<Request, Failure>) {
    let object = match serde_json::from_slice(object) {
        Ok(Value::Object(object)) => object,
        Ok(_) => {
            return (
                None,
                Err(Failure::generic("QMP input must be a JSON object")),
            );
        }
        Err(error) => {
            let desc = format!("JSON parse error, {error}");
            return (None, Err(Failure::generic(desc)));
        }
    };
    request(object)
}

fn request(mut object: Map<String, Value>) -> (Option<Value>, Result<Request, Failure>) {
    let id = object.remove("id");
    let member =
        |name: &str, what: &str| Failure::generic(format!("QMP input member '{name}' {what}"));
    let command = match object.remove("execute") {
        Some(Value::String(command)) => command,
        Some(_) => return (id, Err(member("execute", "must be a string"))),
        None => {
            let unknown = object.keys().find(|name| *name != "arguments");
            let failure = match unknown {
                Some(name) => member(name, "is unexpected"),
                None => Failure::generic("QMP input lacks member 'execute'"),
            };
            return (id, Err(failure));
        }
    };
    let arguments = match object.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return (id, Err(member("arguments", "must be an object"))),
        None => Map::new(),
    };
    if let Some(name) = object.keys().next() {
        return (id, Err(member(name, "is unexpected")));
    }
    (id, Ok(Request { command, arguments }))
}

/// The line that answers a request.
pub(super) fn reply(id: Option<Value>, answer: Answer) -> String {
    let mut reply = match answer {
        Ok(value) => json!({ "return": value }),
        Err(failure) => json!({ "error": failure }),
    };
    if let Some(id) = id {
        reply["id"] = id;
    }
    line(&reply)
}

/// A message as it goes out: on a line of its own, in ASCII.
pub(super) fn line(message: &Value) -> String {
    let text = message.to_string();
    let mut line = String::with_capacity(text.len() + 2);
    for character in text.chars() {
        // Others than these stand in strings only.
        if matches!(character, ' '..='~') {
            line.push(character);
        } else {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                line += &format!("\\u{unit:04x}");
            }
        }
    }
    line += "\r\n";
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(object: &str) -> (Option<Value>, String) {
        let (id, request) = parse(object.as_bytes());
        (id, request.unwrap_err().desc)
    }

    #[test]
    fn what_is_wrong_with_a_request_is_said_in_qemus_words() {
        for (object, expected) in [
            ("{}", "QMP input lacks member 'execute'"),
            (r#"{"arguments":{}}"#, "QMP input lacks member 'execute'"),
            (r#"{"x":1}"#, "QMP input member 'x' is unexpected"),
            (
                r#"{"execute":"a","x":1}"#,
                "QMP input member 'x' is unexpected",
            ),
            (
                r#"{"exec-oob":"a"}"#,
                "QMP input member 'exec-oob' is unexpected",
            ),
            (
                r#"{"execute":1}"#,
                "QMP input member 'execute' must be a string",
            ),
            (
                r#"{"execute":"a","arguments":[]}"#,
                "QMP input member 'arguments' must be an object",
            ),
        ] {
            assert_eq!(failure(object), (None, expected.to_owned()));
        }
        for broken in ["{]", "{,}", r#"{"a":}"#, r#"{"execute":'a'}"#, "{\"\u{7f}"] {
            let (_, desc) = failure(broken);
            assert!(desc.starts_with("JSON parse error"), "{desc}");
        }
        let (_, request) = parse(b"{\"execute\":\"\xc3\x28\"}");
        let desc = request.unwrap_err().desc;
        assert!(desc.starts_with("JSON parse error"), "{desc}");
    }

    #[test]
    fn the_name_of_a_request_comes_back_whatever_it_is() {
        for id in ["1", "\"a\"", "null", "[1,{}]", "{\"a\":[]}", "-1.5"] {
            let (found, request) = parse(format!(r#"{{"id":{id}}}"#).as_bytes());
            let line = reply(found, request.map(|_| Value::Null));
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(answer["id"].to_string(), id);
            assert_eq!(answer["error"]["class"], "GenericError");
        }
        assert_eq!(reply(None, Ok(json!({}))), "{\"return\":{}}\r\n");
    }

    #[test]
    fn lines_are_ascii() {
        let text = "ü \u{1f600} \u{7f} \" \n";
        let line = line(&json!({ "a": text }));
        assert!(line.is_ascii() && line.ends_with("\r\n"), "{line}");
        assert!(
            line.trim_end()
                .bytes()
                .all(|byte| (b' '..=b'~').contains(&byte))
        );
        let back: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(back["a"], text);
    }
}
