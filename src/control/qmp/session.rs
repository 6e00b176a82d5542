//! One client's talk with the server, without the socket.

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::commands::{self, Context, NEGOTIATE, Wish};
use super::framing::{Frame, Framer};
use super::message::{self, Answer, Class, Failure, Request};
use super::subject::Subject;

/// What a client has come to.
#[derive(Debug, Default)]
pub struct Session {
    framer: Framer,
    is_negotiated: bool,
}

impl Session {
    /// What it hears first.
    #[must_use]
    pub fn greeting() -> String {
        let greeting = json!({ "version": commands::version(), "capabilities": [] });
        message::line(&json!({ "QMP": greeting }))
    }

    /// Whether it is told of events.
    #[must_use]
    pub fn hears_events(&self) -> bool {
        self.is_negotiated
    }

    /// Takes bytes from the front of `input` until something is complete that is to be
    /// answered, and answers it. `None` if all were taken and nothing is.
    pub fn answer_next(
        &mut self,
        input: &mut &[u8],
        subject: &dyn Subject,
    ) -> Option<(String, Wish)> {
        let frame = self.framer.next(input)?;
        let mut context = Context {
            subject,
            wish: Wish::Nothing,
        };
        let (id, answer) = match frame {
            Frame::Invalid(why) => (None, Err(Failure::generic(why))),
            Frame::Object(object) => self.obey(&object, &mut context),
        };
        Some((message::reply(id, answer), context.wish))
    }

    fn obey(&mut self, object: &[u8], context: &mut Context<'_>) -> (Option<Value>, Answer) {
        let (id, request) = message::parse(object);
        let answer = request.and_then(|request| self.run(request, context));
        (id, answer)
    }

    fn run(&mut self, request: Request, context: &mut Context<'_>) -> Answer {
        let negotiates = request.command == NEGOTIATE;
        let refuse = |why: &str| Err(Failure::new(Class::CommandNotFound, why));
        match (negotiates, self.is_negotiated) {
            (true, false) => {
                let answer = commands::negotiate(Arguments::new(request.arguments));
                self.is_negotiated = answer.is_ok();
                answer
            }
            (false, true) => commands::run(request, context),
            (true, true) => refuse("Capabilities negotiation is already complete, command ignored"),
            (false, false) => refuse("Expecting capabilities negotiation with 'qmp_capabilities'"),
        }
    }
}
