//! Engine events become text: incremental decoding, stop strings, several choices at once.
//! Knows no wire format.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::error::{Error, ErrorKind, Result};
use crate::request::{Event, Events, Finish, Usage};
use crate::text::{DecodeStream, StopStrings, Tokenizer};

/// What one event adds to the answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which choice.
    pub(super) index: u32,
    /// Text to show now; may be empty.
    pub(super) text: String,
    /// Set with a choice's last piece.
    pub(super) finish: Option<&'static str>,
}

/// The answers to one HTTP request: a choice for each submitted prompt. Dropping it drops the
/// receivers, which cancels what is not finished.
#[derive(Debug)]
pub(super) struct Answers {
    choices: Vec<Choice>,
    /// Pieces that were looked at before they were asked for.
    ahead: VecDeque<Piece>,
    open: usize,
    /// Which choice to look at first, so that a busy one does not starve the others.
    turn: usize,
}

/// One prompt's answer on its way.
#[derive(Debug)]
struct Choice {
    /// None once nothing more is wanted or said.
    events: Option<Events>,
    decode: DecodeStream,
    stops: Option<StopStrings>,
    usage: Usage,
}

impl Answers {
    /// One choice for each of `prompts`: its length in tokens and its events.
    pub(super) fn new(
        prompts: Vec<(u32, Events)>,
        tokenizer: &Arc<Tokenizer>,
        stops: &[String],
    ) -> Self {
        let choices: Vec<Choice> = prompts
            .into_iter()
            .map(|(prompt_tokens, events)| Choice {
                events: Some(events),
                decode: tokenizer.stream(),
                stops: (!stops.is_empty()).then(|| StopStrings::new(stops.to_vec())),
                usage: Usage { prompt_tokens, ..Usage::default() },
            })
            .collect();
        Self { open: choices.len(), choices, ahead: VecDeque::new(), turn: 0 }
    }

    /// The next piece; none when every choice has ended.
    ///
    /// # Errors
    /// What the engine says, or `DeviceFailed` if it goes without a word.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Piece>>> {
        if let Some(piece) = self.ahead.pop_front() {
            return Poll::Ready(Some(Ok(piece)));
        }
        if self.open == 0 {
            return Poll::Ready(None);
        }
        let count = self.choices.len();
        for step in 0..count {
            let index = (self.turn + step) % count;
            let choice = &mut self.choices[index];
            let Some(events) = &mut choice.events else { continue };
            let Poll::Ready(event) = events.poll_recv(context) else { continue };
            self.turn = (index + 1) % count;
            let piece = event.ok_or_else(gone).and_then(|event| choice.take(event));
            return Poll::Ready(Some(piece.map(|(text, finish)| {
                self.open -= usize::from(finish.is_some());
                Piece { index: index as u32, text, finish }
            })));
        }
        Poll::Pending
    }

    /// The next piece; none when every choice has ended.
    ///
    /// # Errors
    /// As [`Answers::poll_next`].
    pub(super) async fn next(&mut self) -> Option<Result<Piece>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// Waits until the first piece is there, without taking it.
    ///
    /// # Errors
    /// As [`Answers::poll_next`].
    pub(super) async fn begin(&mut self) -> Result<()> {
        if let Some(piece) = self.next().await {
            self.ahead.push_front(piece?);
        }
        Ok(())
    }

    /// Tokens of all choices until now.
    pub(super) fn usage(&self) -> Usage {
        self.choices.iter().fold(Usage::default(), |sum, choice| Usage {
            prompt_tokens: sum.prompt_tokens + choice.usage.prompt_tokens,
            cached_tokens: sum.cached_tokens + choice.usage.cached_tokens,
            generated_tokens: sum.generated_tokens + choice.usage.generated_tokens,
        })
    }

    /// Number of choices.
    pub(super) fn len(&self) -> usize {
        self.choices.len()
    }
}

impl Choice {
    fn take(&mut self, event: Event) -> Result<(String, Option<&'static str>)> {
        match event {
            Event::Token(token) => {
                self.usage.generated_tokens += 1;
                let text = self.decode.push(token);
                let (text, stopped) = self.show(text);
                if stopped {
                    // Tells the engine that nobody wants the rest.
                    self.events = None;
                }
                Ok((text, stopped.then_some("stop")))
            }
            Event::Done { finish, usage } => {
                self.events = None;
                self.usage = usage;
                let rest = self.decode.finish();
                let (mut text, stopped) = self.show(rest);
                if !stopped && let Some(stops) = &mut self.stops {
                    text += &stops.finish();
                }
                let length = finish == Finish::Length && !stopped;
                Ok((text, Some(if length { "length" } else { "stop" })))
            }
            Event::Failed(error) => {
                self.events = None;
                Err(error)
            }
            Event::Vector { .. } => {
                self.events = None;
                Err(Error::new(ErrorKind::Internal, "a vector came for a generation"))
            }
        }
    }

    fn show(&mut self, text: String) -> (String, bool) {
        match &mut self.stops {
            Some(stops) if !text.is_empty() => stops.push(&text),
            _ => (text, false),
        }
    }
}

/// The error for an engine that went without a last word.
pub(super) fn gone() -> Error {
    Error::new(ErrorKind::DeviceFailed, "the engine has stopped; try another replica")
}
