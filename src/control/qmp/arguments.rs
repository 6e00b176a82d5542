//! The arguments of a command: each is of its kind, and there are no others.

use serde_json::{Map, Value};

use super::message::Failure;

/// Taken one by one; see [`Self::end`].
#[derive(Debug)]
pub(super) struct Arguments {
    all: Map<String, Value>,
    /// Of what they are a part, as in `actions[0].`.
    place: String,
}

impl Arguments {
    pub fn new(arguments: Map<String, Value>) -> Self {
        Self {
            all: arguments,
            place: String::new(),
        }
    }

    /// Of a part of others.
    pub fn within(place: &str, arguments: Map<String, Value>) -> Self {
        Self {
            all: arguments,
            place: format!("{place}."),
        }
    }

    /// Another is one too many.
    pub fn end(&self) -> Result<(), Failure> {
        match self.all.keys().next() {
            Some(name) => Err(Failure::generic(format!(
                "Parameter '{}{name}' is unexpected",
                self.place
            ))),
            None => Ok(()),
        }
    }

    /// A number of 32 bits.
    pub fn uint32(&mut self, name: &str) -> Result<Option<u32>, Failure> {
        let Some(value) = self.all.remove(name) else {
            return Ok(None);
        };
        let expects = |kind: &str| {
            let name = self.full_name(name);
            Failure::generic(format!("Parameter '{name}' expects {kind}"))
        };
        if value.as_i64().is_none() && value.as_u64().is_none() {
            return Err(expects("uint64"));
        }
        let narrow = value.as_u64().map(u32::try_from);
        match narrow {
            Some(Ok(number)) => Ok(Some(number)),
            _ => Err(expects("uint32_t")),
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Self>, Failure> {
        let map = self.take(name, "object", |value| value.as_object().cloned())?;
        Ok(map.map(|map| Self::within(&self.full_name(name), map)))
    }

    pub fn required_object(&mut self, name: &str) -> Result<Self, Failure> {
        let object = self.object(name)?;
        object.ok_or_else(|| self.missing(name))
    }

    /// Each with its place.
    pub fn required_list(&mut self, name: &str) -> Result<Vec<(String, Value)>, Failure> {
        let list = self.take(name, "array", |value| value.as_array().cloned())?;
        let list = list.ok_or_else(|| self.missing(name))?;
        let name = self.full_name(name);
        let place = |(index, value)| (format!("{name}[{index}]"), value);
        Ok(list.into_iter().enumerate().map(place).collect())
    }

    pub fn required_objects(&mut self, name: &str) -> Result<Vec<Self>, Failure> {
        let object = |(place, value): (String, Value)| match value {
            Value::Object(map) => Ok(Self::within(&place, map)),
            _ => Err(wrong_type(&place, "object")),
        };
        self.required_list(name)?.into_iter().map(object).collect()
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.place)
    }

    fn missing(&self, name: &str) -> Failure {
        missing(&self.full_name(name))
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
        number.ok_or_else(|| self.missing(name))
    }

    /// A number that is not negative, and may be as large as 64 bits can say.
    pub fn required_size(&mut self, name: &str) -> Result<u64, Failure> {
        match self.all.remove(name) {
            // What is larger is read as a fraction.
            Some(value) => value
                .as_u64()
                .ok_or_else(|| Failure::generic(format!("Parameter '{name}' expects uint64"))),
            None => Err(self.missing(name)),
        }
    }

    /// A number of either sign.
    pub fn integer(&mut self, name: &str) -> Result<Option<i64>, Failure> {
        self.take(name, "integer", Value::as_i64)
    }

    /// The same, which has to be there.
    pub fn required_integer(&mut self, name: &str) -> Result<i64, Failure> {
        let number = self.integer(name)?;
        number.ok_or_else(|| self.missing(name))
    }

    pub fn required_text(&mut self, name: &str) -> Result<String, Failure> {
        let text = self.text(name)?;
        text.ok_or_else(|| self.missing(name))
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
        let Some(value) = self.all.remove(name) else {
            return Ok(None);
        };
        let read = read(&value).map(Some);
        read.ok_or_else(|| wrong_type(&self.full_name(name), kind))
    }
}

pub(super) fn missing(name: &str) -> Failure {
    Failure::generic(format!("Parameter '{name}' is missing"))
}

pub(super) fn wrong_type(name: &str, kind: &str) -> Failure {
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
