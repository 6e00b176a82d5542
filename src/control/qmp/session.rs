//! One client's talk with the server, without the socket.

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::commands::{self, Context, NEGOTIATE, Wish};
use super::framing::{Frame, Framer};
use super::message::{self, Answer, Class, Failure, Request};
use crate::control::subject::Subject;

/// What a client has come to.
#[derive(Debug, Default)]
pub struct Session {
    framer: Framer,
    is_negotiated: bool,
    /// A command that is answered later, with the client's name for it.
    pending: Option<Option<Value>>,
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

    /// Whether a command has not been answered: then no other is obeyed, as answers come in
    /// the order of the commands.
    #[must_use]
    pub fn awaits_answer(&self) -> bool {
        self.pending.is_some()
    }

    /// Answers the command that [waits](Self::awaits_answer) for it; nothing if none does.
    pub fn answer(&mut self, answer: Result<Value, Failure>) -> String {
        match self.pending.take() {
            Some(id) => message::reply(id, answer),
            None => String::new(),
        }
    }

    /// Takes bytes from the front of `input` until something is complete that is to be
    /// answered, and answers it: with nothing if the wish
    /// [says so](Wish::is_answered_later). `None` if all were taken and nothing is complete,
    /// or while a command [waits](Self::awaits_answer) for its answer.
    pub fn answer_next(
        &mut self,
        input: &mut &[u8],
        subject: &dyn Subject,
    ) -> Option<(String, Wish)> {
        if self.awaits_answer() {
            return None;
        }
        let frame = self.framer.next(input)?;
        let mut context = Context {
            subject,
            wish: Wish::Nothing,
        };
        let (id, answer) = match frame {
            Frame::Invalid(why) => (None, Err(Failure::generic(why))),
            Frame::Object(object) => self.obey(&object, &mut context),
        };
        if context.wish.is_answered_later() {
            self.pending = Some(id);
            return Some((String::new(), context.wish));
        }
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
