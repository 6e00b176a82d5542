//! What is asked, and how it is answered: as little of HTTP/1.1 as a server may know that
//! has one page.
//!
//! One question is answered, and then the connection ends: nothing has to be known of
//! bodies, and nobody stays because he has been here.

use std::fmt::{self, Write};

use httparse::{EMPTY_HEADER, Header, Status};
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;
use prometheus_client::encoding::prometheus_text;

/// Most bytes of a question.
pub(super) const MAX_HEAD: usize = 8 << 10;

/// Most fields in it.
const MAX_FIELDS: usize = 64;

/// Where the page is.
const PATH: &str = "/metrics";

/// How the page is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus' own text, 0.0.4: older than the other, and all that some programs read.
    Text,
}

impl Format {
    fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => prometheus_text::CONTENT_TYPE,
        }
    }
}

/// A question, whose end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// What of the answer is wanted: all but its body.
    pub is_head: bool,
    /// The page in this format, or nothing that there is.
    pub wants: Result<Format, Refusal>,
}

/// Why there is no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is no HTTP.
    Nonsense,
    /// There is one page.
    NoSuchPage,
    /// Nothing can be changed here.
    WrongMethod,
    /// Its head is longer than [`MAX_HEAD`], or has more than [`MAX_FIELDS`].
    TooLong,
    /// HTTP/2 begins like that.
    WrongVersion,
    /// The page could not be written.
    NoPage,
}

impl Refusal {
    fn status(self) -> &'static str {
        match self {
            Self::Nonsense => "400 Bad Request",
            Self::NoSuchPage => "404 Not Found",
            Self::WrongMethod => "405 Method Not Allowed",
            Self::TooLong => "431 Request Header Fields Too Large",
            Self::WrongVersion => "505 HTTP Version Not Supported",
            Self::NoPage => "500 Internal Server Error",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Nonsense => "This is not a valid request of HTTP/1.1.\n",
            Self::NoSuchPage => "The metrics are at /metrics.\n",
            Self::WrongMethod => "Only GET and HEAD are answered.\n",
            Self::TooLong => "The request is too long.\n",
            Self::WrongVersion => "Only HTTP/1.1 and HTTP/1.0 are spoken.\n",
            Self::NoPage => "The metrics cannot be written.\n",
        }
    }
}

/// Reads a question. `None`: its end has not come.
pub(super) fn read(bytes: &[u8]) -> Option<Question> {
    let mut fields = [EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let refused = |refusal| {
        Some(Question {
            is_head: false,
            wants: Err(refusal),
        })
    };
    match request.parse(bytes) {
        Ok(Status::Complete(_)) => {}
        Ok(Status::Partial) if bytes.len() < MAX_HEAD => return None,
        Ok(Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return refused(Refusal::TooLong);
        }
        Err(httparse::Error::Version) => return refused(Refusal::WrongVersion),
        Err(_) => return refused(Refusal::Nonsense),
    }
    let method = request.method.unwrap_or_default();
    let wants = match path_of(request.path.unwrap_or_default()) {
        _ if !is_host_named(request.version, request.headers) => Err(Refusal::Nonsense),
        PATH if matches!(method, "GET" | "HEAD") => Ok(preferred(request.headers)),
        PATH => Err(Refusal::WrongMethod),
        _ => Err(Refusal::NoSuchPage),
    };
    Some(Question {
        is_head: method == "HEAD",
        wants,
    })
}

/// HTTP/1.1 wants it named once.
fn is_host_named(version: Option<u8>, fields: &[Header<'_>]) -> bool {
    let names = fields.iter().map(|field| field.name);
    let hosts = names
        .filter(|name| name.eq_ignore_ascii_case("host"))
        .count();
    hosts == 1 || (version == Some(0) && hosts == 0)
}

/// Without a host, as a proxy is asked, and without a query.
fn path_of(target: &str) -> &str {
    const SCHEME: &str = "http://";
    let path = match target.split_at_checked(SCHEME.len()) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case(SCHEME) => {
            rest.find('/').map_or("/", |at| &rest[at..])
        }
        _ => target,
    };
    path.split('?').next().unwrap_or_default()
}

/// Whoever does not ask for OpenMetrics may not know it.
fn preferred(fields: &[Header<'_>]) -> Format {
    let accepts = fields
        .iter()
        .filter(|field| field.name.eq_ignore_ascii_case("accept"));
    let accepts = accepts.filter_map(|field| str::from_utf8(field.value).ok());
    let ranges = accepts.flat_map(|value| value.split(',')).map(Range::read);
    let (mut open_metrics, mut text) = (0.0_f32, 0.0_f32);
    for Range { kind, version, q } in ranges {
        match (kind, version) {
            ("application/openmetrics-text", None | Some("1.0.0")) => {
                open_metrics = open_metrics.max(q);
            }
            ("text/plain", None | Some("0.0.4")) => text = text.max(q),
            _ => {}
        }
    }
    match open_metrics > 0.0 && open_metrics >= text {
        true => Format::OpenMetrics,
        false => Format::Text,
    }
}

/// One of the kinds that are accepted.
struct Range<'a> {
    kind: &'a str,
    version: Option<&'a str>,
    /// How much it is liked, from 0 to 1.
    q: f32,
}

impl<'a> Range<'a> {
    fn read(text: &'a str) -> Self {
        let mut parts = text.split(';').map(str::trim);
        let mut range = Self {
            kind: parts.next().unwrap_or_default(),
            version: None,
            q: 1.0,
        };
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            let value = value.trim_matches('"');
            match name {
                "version" => range.version = Some(value),
                // What is no number is not liked.
                "q" => range.q = value.parse().unwrap_or_default(),
                _ => {}
            }
        }
        range
    }
}

/// All that is sent in answer to a question.
pub(super) fn answer(
    question: Question,
    page: impl FnOnce(Format) -> Result<String, fmt::Error>,
) -> Vec<u8> {
    let wants = question.wants;
    let written = wants.and_then(|format| match page(format) {
        Ok(page) => Ok((format, page)),
        Err(fmt::Error) => Err(Refusal::NoPage),
    });
    let (status, content_type, body) = match written {
        Ok((format, page)) => ("200 OK", format.content_type(), page),
        Err(refusal) => (
            refusal.status(),
            "text/plain; charset=utf-8",
            refusal.words().to_owned(),
        ),
    };
    let mut answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
         Connection: close\r\n",
        body.len()
    );
    if wants == Err(Refusal::WrongMethod) {
        answer.push_str("Allow: GET, HEAD\r\n");
    }
    // A clock that is far off may have no such date.
    if let Ok(date) = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now()) {
        // A string takes everything.
        let _ = write!(answer, "Date: {date}\r\n");
    }
    answer.push_str("\r\n");
    if !question.is_head {
        answer.push_str(&body);
    }
    answer.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_text(text: &str) -> Option<Question> {
        read(text.as_bytes())
    }

    fn wants(text: &str) -> Result<Format, Refusal> {
        read_text(text).expect("it has an end").wants
    }

    /// Of somebody who accepts this.
    fn format_for(accept: &str) -> Format {
        let text = format!("GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\n\r\n");
        wants(&text).unwrap()
    }

    #[test]
    fn who_knows_openmetrics_gets_it_and_all_others_the_older_text() {
        for accept in [
            // Prometheus 2.42 and 3.
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;\
             version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
             application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;\
             escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            "application/openmetrics-text",
            "text/plain;q=0.2 , application/openmetrics-text; version=\"1.0.0\"; q=0.9",
        ] {
            assert_eq!(format_for(accept), Format::OpenMetrics, "{accept}");
        }
        for accept in [
            "",
            "*/*",
            "text/plain",
            "text/html, image/png",
            "application/openmetrics-text;version=2.0.0",
            "application/openmetrics-text;version=1.0.0;q=0",
            "application/openmetrics-text;version=1.0.0;q=much",
            "application/openmetrics-text;version=1.0.0;q=NaN",
            "application/openmetrics-text;q=0.3,text/plain;version=0.0.4;q=0.5",
            ";;;=,=;q",
        ] {
            assert_eq!(format_for(accept), Format::Text, "{accept}");
        }
    }

    #[test]
    fn there_is_one_page_under_its_names() {
        for target in [
            "/metrics",
            "/metrics?a=b",
            "/metrics?",
            "http://disk.example:9620/metrics",
            "HTTP://[::1]/metrics?x",
        ] {
            for version in ["1.0", "1.1"] {
                let text = format!("GET {target} HTTP/{version}\r\nhost: a\r\n\r\n");
                assert_eq!(wants(&text), Ok(Format::Text), "{text}");
            }
        }
        assert_eq!(wants("GET /metrics HTTP/1.0\n\n"), Ok(Format::Text));
        for target in [
            "/",
            "/metrics/",
            "/Metrics",
            "//metrics",
            "*",
            "http://metrics",
        ] {
            let text = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
            assert_eq!(wants(&text), Err(Refusal::NoSuchPage), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_refused_as_what_it_is() {
        let fields = "a: b\r\n".repeat(MAX_FIELDS + 1);
        for (text, refusal) in [
            (
                "POST /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
                Refusal::WrongMethod,
            ),
            (
                "get /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
                Refusal::WrongMethod,
            ),
            ("POST / HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::NoSuchPage),
            ("GET /metrics HTTP/1.1\r\n\r\n", Refusal::Nonsense),
            (
                "GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
                Refusal::Nonsense,
            ),
            (
                "GET /metrics HTTP/1.1\r\nHost : a\r\n\r\n",
                Refusal::Nonsense,
            ),
            ("GET /metrics\r\n\r\n", Refusal::Nonsense),
            ("{\"execute\":\"quit\"}", Refusal::Nonsense),
            ("\u{16}\u{3}\u{1}", Refusal::Nonsense),
            ("PRI * HTTP/2.0\r\n\r\n", Refusal::WrongVersion),
            (&format!("GET / HTTP/1.1\r\n{fields}\r\n"), Refusal::TooLong),
        ] {
            assert_eq!(wants(text), Err(refusal), "{text}");
        }
    }

    #[test]
    fn a_question_is_waited_for_until_it_is_too_long() {
        let text = "HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n";
        for len in 0..text.len() {
            assert_eq!(read_text(&text[..len]), None, "{len}");
        }
        let question = read_text(text).unwrap();
        assert!(question.is_head && question.wants.is_ok());
        // What comes behind it is not looked at.
        assert_eq!(read_text(&format!("{text}\0\0\0")), Some(question));
        let endless = |len| format!("GET /{}", "x".repeat(len - 5));
        assert_eq!(read_text(&endless(MAX_HEAD - 1)), None);
        assert_eq!(wants(&endless(MAX_HEAD)), Err(Refusal::TooLong));
        // httparse skips lines before a request.
        assert_eq!(wants(&"\r\n".repeat(MAX_HEAD / 2)), Err(Refusal::TooLong));
    }

    /// Its head and its body.
    fn answer_to(question: &str, page: Result<&str, fmt::Error>) -> (String, String) {
        let question = read_text(question).expect("it has an end");
        let answer = answer(question, |_| page.map(str::to_owned));
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.to_owned(), body.to_owned())
    }

    #[test]
    fn an_answer_says_what_it_is() {
        let (head, body) = answer_to("GET /metrics HTTP/1.0\r\n\r\n", Ok("a 1\n"));
        let lines: Vec<_> = head.split("\r\n").collect();
        let [status, kind, len, connection, date] = lines[..] else {
            panic!("{head}");
        };
        assert_eq!(status, "HTTP/1.1 200 OK");
        assert_eq!(
            kind,
            "Content-Type: text/plain; version=0.0.4; charset=utf-8"
        );
        assert_eq!(len, "Content-Length: 4");
        assert_eq!(connection, "Connection: close");
        assert!(
            date.starts_with("Date: ") && date.ends_with(" GMT"),
            "{date}"
        );
        assert_eq!(body, "a 1\n");
        let (head, body) = answer_to("HEAD /metrics HTTP/1.0\r\n\r\n", Ok("a 1\n"));
        assert!(head.contains("Content-Length: 4\r\n") && body.is_empty());
        let (head, body) = answer_to("PUT /metrics HTTP/1.0\r\n\r\n", Ok("a 1\n"));
        assert!(head.starts_with("HTTP/1.1 405 ") && head.contains("Allow: GET, HEAD\r\n"));
        assert!(!body.contains("a 1"), "{body}");
        let (head, _) = answer_to("GET /metrics HTTP/1.0\r\n\r\n", Err(fmt::Error));
        assert!(head.starts_with("HTTP/1.1 500 "), "{head}");
    }

    proptest! {
        #[test]
        fn whatever_comes_is_answered_or_waited_for(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            at in 0_usize..60,
            is_inside in any::<bool>(),
        ) {
            let mut text = b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: a/b\r\n\r\n".to_vec();
            if is_inside {
                let at = at.min(text.len());
                text.splice(at..at, bytes);
            } else {
                text = bytes;
            }
            if let Some(question) = read(&text) {
                let answer = answer(question, |_| Ok(String::new()));
                prop_assert!(answer.starts_with(b"HTTP/1.1 "));
                prop_assert!(answer.windows(4).any(|end| end == b"\r\n\r\n"));
            }
        }
    }
}
