//! The arguments of a command: each is of its kind, and there are no others.

use serde_json::{Map, Value};

use super::message::Failure;

/// Taken one by one; see [`Self::end`].
#[derive(Debug)]
pub(super) struct Arguments(Map<String, Value>);

impl Arguments {
    pub fn new(arguments: Map<String, Value>) -> Self {
        Self(arguments)
    }

    /// Another is one too many.
    pub fn end(&self) -> Result<(), Failure> {
        match self.0.keys().next() {
            Some(name) => Err(Failure::generic(format!(
                "Parameter '{name}' is unexpected"
            ))),
            None => Ok(()),
        }
    }

    pub fn bool(&mut self, name: &str) -> Result<Option<bool>, Failure> {
        self.take(name, "boolean", |value| value.as_bool())
    }

    pub fn text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        self.take(name, "string", |value| value.as_str().map(str::to_owned))
    }

    /// A number that is not negative.
    pub fn count(&mut self, name: &str) -> Result<Option<u64>, Failure> {
        let number = self.take(name, "integer", Value::as_i64)?;
        number
            .map(|number| {
                u64::try_from(number)
                    .map_err(|_| Failure::generic(format!("Parameter '{name}' is negative")))
            })
            .transpose()
    }

    pub fn required_count(&mut self, name: &str) -> Result<u64, Failure> {
        let number = self.count(name)?;
        number.ok_or_else(|| missing(name))
    }

    /// A number that is not negative, and may be as large as 64 bits can say.
    pub fn required_size(&mut self, name: &str) -> Result<u64, Failure> {
        match self.0.remove(name) {
            // What is larger is read as a fraction.
            Some(value) => value
                .as_u64()
                .ok_or_else(|| Failure::generic(format!("Parameter '{name}' expects uint64"))),
            None => Err(missing(name)),
        }
    }

    /// A number of either sign.
    pub fn integer(&mut self, name: &str) -> Result<Option<i64>, Failure> {
        self.take(name, "integer", Value::as_i64)
    }

    /// The same, which has to be there.
    pub fn required_integer(&mut self, name: &str) -> Result<i64, Failure> {
        let number = self.integer(name)?;
        number.ok_or_else(|| missing(name))
    }

    pub fn required_text(&mut self, name: &str) -> Result<String, Failure> {
        let text = self.text(name)?;
        text.ok_or_else(|| missing(name))
    }

    /// Numbers that are not negative.
    pub fn counts(&mut self, name: &str) -> Result<Option<Vec<u64>>, Failure> {
        let list = self.take(name, "array", |value| value.as_array().cloned())?;
        let number = |(index, value): (usize, Value)| {
            let number = value.as_u64();
            number.ok_or_else(|| wrong_type(&format!("{name}[{index}]"), "integer"))
        };
        let numbers = |list: Vec<Value>| list.into_iter().enumerate().map(number).collect();
        list.map(numbers).transpose()
    }

    /// Texts.
    pub fn texts(&mut self, name: &str) -> Result<Option<Vec<String>>, Failure> {
        let list = self.take(name, "array", |value| value.as_array().cloned())?;
        let text = |(index, value): (usize, Value)| {
            let text = value.as_str().map(str::to_owned);
            text.ok_or_else(|| wrong_type(&format!("{name}[{index}]"), "string"))
        };
        let texts = |list: Vec<Value>| list.into_iter().enumerate().map(text).collect();
        list.map(texts).transpose()
    }

    fn take<T>(
        &mut self,
        name: &str,
        kind: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, Failure> {
        let Some(value) = self.0.remove(name) else {
            return Ok(None);
        };
        read(&value).map(Some).ok_or_else(|| wrong_type(name, kind))
    }
}

pub(super) fn missing(name: &str) -> Failure {
    Failure::generic(format!("Parameter '{name}' is missing"))
}

fn wrong_type(name: &str, kind: &str) -> Failure {
    Failure::generic(format!(
        "Invalid parameter type for '{name}', expected: {kind}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn arguments(value: Value) -> Arguments {
        let Value::Object(map) = value else {
            panic!("no object");
        };
        Arguments::new(map)
    }

    #[test]
    fn each_is_of_its_kind_and_there_are_no_others() {
        let mut given = arguments(json!({ "a": 1, "b": "x", "c": true, "d": [1, 2] }));
        assert_eq!(given.count("a"), Ok(Some(1)));
        assert_eq!(given.text("b"), Ok(Some("x".into())));
        assert_eq!(given.bool("c"), Ok(Some(true)));
        assert_eq!(
            given.end().unwrap_err().desc(),
            "Parameter 'd' is unexpected"
        );
        assert_eq!(given.counts("d"), Ok(Some(vec![1, 2])));
        assert_eq!(given.end(), Ok(()));
        assert_eq!(given.count("a"), Ok(None));
        let missing = given.required_count("a").unwrap_err();
        assert_eq!(missing.desc(), "Parameter 'a' is missing");
        for odd in [
            json!("1"),
            json!(1.5),
            json!(null),
            json!([]),
            json!(u64::MAX),
        ] {
            let failure = arguments(json!({ "a": odd })).count("a").unwrap_err();
            let expected = "Invalid parameter type for 'a', expected: integer";
            assert_eq!(failure.desc(), expected);
        }
        let failure = arguments(json!({ "a": -1 })).count("a").unwrap_err();
        assert_eq!(failure.desc(), "Parameter 'a' is negative");
        let failure = arguments(json!({ "a": [1, "x"] })).counts("a").unwrap_err();
        assert!(failure.desc().contains("'a[1]'"), "{failure:?}");
    }
}
