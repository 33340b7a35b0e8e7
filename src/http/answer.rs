//! Engine events become text: incremental decoding, stop strings, several choices at once, and
//! which tokens' log-probabilities belong to which text. Knows no wire format.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::error::{Error, ErrorKind, Result};
use crate::request::{Event, Events, Finish, Logprobs, TokenId, Usage};
use crate::text::{DecodeStream, StopStrings, Tokenizer};

/// What one event adds to the answer.
#[derive(Debug, PartialEq)]
pub(super) struct Piece {
    /// Which choice.
    pub(super) index: u32,
    /// Text to show now; may be empty.
    pub(super) text: String,
    /// Tokens whose text begins in `text`, where log-probabilities are asked for.
    pub(super) tokens: Vec<ScoredToken>,
    /// Set with a choice's last piece.
    pub(super) finish: Option<&'static str>,
}

/// A token with its log-probability and others'.
#[derive(Debug, PartialEq)]
pub(super) struct ScoredToken {
    pub(super) token: TokenId,
    pub(super) logprobs: Box<Logprobs>,
    /// Characters of its choice's text before it.
    pub(super) offset: u32,
}

/// What every choice of a request has in common.
#[derive(Debug)]
pub(super) struct Manner<'a> {
    pub(super) tokenizer: &'a Arc<Tokenizer>,
    pub(super) stops: &'a [String],
    /// Whether tokens come with log-probabilities.
    pub(super) scored: bool,
    /// Choices for each prompt.
    pub(super) choices: usize,
}

/// A prompt, and what of it goes before each of its answers.
#[derive(Debug, Clone)]
pub(super) struct Prompt {
    pub(super) tokens: Arc<[TokenId]>,
    pub(super) echo: Option<String>,
}

/// The answers to one HTTP request: some choices for each prompt. Dropping it drops the receivers,
/// which cancels what is not finished.
#[derive(Debug)]
pub(super) struct Answers {
    choices: Vec<Choice>,
    /// Choices for each prompt.
    per_prompt: usize,
    /// Pieces that were looked at before they were asked for.
    ahead: VecDeque<Piece>,
    open: usize,
    /// Which choice to look at first, so that a busy one does not starve the others.
    turn: usize,
}

/// One answer on its way.
#[derive(Debug)]
struct Choice {
    /// None once nothing more is wanted or said.
    events: Option<Events>,
    decode: DecodeStream,
    stops: Option<StopStrings>,
    /// Set where log-probabilities are asked for.
    scores: Option<Scores>,
    /// Goes before the first piece.
    echo: Option<String>,
    prompt_tokens: u32,
    usage: Usage,
}

/// Scored tokens whose text is not shown yet, and how far the text has come.
#[derive(Debug, Default)]
struct Scores {
    /// Each with the place in the text, in bytes, where it begins.
    waiting: VecDeque<(usize, ScoredToken)>,
    /// Bytes and characters decoded; the characters of an echo count.
    decoded: usize,
    characters: u32,
    /// Bytes shown.
    shown: usize,
}

impl Answers {
    /// The choices of `prompts` in their order, with the events of each.
    pub(super) fn new(prompts: &[Prompt], events: Vec<Events>, manner: &Manner<'_>) -> Self {
        let Manner { tokenizer, stops, scored, choices: per_prompt } = *manner;
        let of = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, per_prompt));
        let choice = |(Prompt { tokens, echo }, events): (&Prompt, Events)| {
            let characters = echo.as_ref().map_or(0, |echo| echo.chars().count()) as u32;
            Choice {
                events: Some(events),
                decode: tokenizer.stream(),
                stops: (!stops.is_empty()).then(|| StopStrings::new(stops.to_vec())),
                scores: scored.then(|| Scores { characters, ..Scores::default() }),
                echo: echo.clone(),
                prompt_tokens: tokens.len() as u32,
                usage: Usage::default(),
            }
        };
        let choices: Vec<Choice> = of.zip(events).map(choice).collect();
        Self { open: choices.len(), choices, per_prompt, ahead: VecDeque::new(), turn: 0 }
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
            while let Some(events) = &mut choice.events
                && let Poll::Ready(event) = events.poll_recv(context)
            {
                let taken = event.ok_or_else(gone).and_then(|event| choice.take(event));
                let Some(taken) = taken.transpose() else { continue };
                self.turn = (index + 1) % count;
                return Poll::Ready(Some(taken.map(|piece| {
                    self.open -= usize::from(piece.finish.is_some());
                    Piece { index: index as u32, ..piece }
                })));
            }
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

    /// Tokens of all choices until now. A prompt counts once, from when it came to the device,
    /// and so do its cached tokens: further choices find what the first one computed.
    pub(super) fn usage(&self) -> Usage {
        let mut sum = Usage::default();
        for choices in self.choices.chunks(self.per_prompt) {
            let started = choices.iter().map(|choice| choice.usage.prompt_tokens).max();
            sum.prompt_tokens += started.unwrap_or(0);
            sum.cached_tokens += choices[0].usage.cached_tokens;
            sum.generated_tokens +=
                choices.iter().map(|choice| choice.usage.generated_tokens).sum::<u32>();
        }
        sum
    }

    /// Number of choices.
    pub(super) fn len(&self) -> usize {
        self.choices.len()
    }
}

impl Choice {
    /// What an event adds; nothing if it is no text and no end.
    fn take(&mut self, event: Event) -> Result<Option<Piece>> {
        match event {
            Event::Started { cached_tokens } => {
                let prompt_tokens = self.prompt_tokens;
                self.usage = Usage { prompt_tokens, cached_tokens, ..self.usage };
                Ok(None)
            }
            Event::Token(token) => Ok(Some(self.take_token(token, None))),
            Event::Scored { token, logprobs } => Ok(Some(self.take_token(token, Some(logprobs)))),
            Event::Done { finish, usage } => {
                self.events = None;
                self.usage = usage;
                let rest = self.decode.finish();
                let (mut text, stopped) = self.show(rest);
                if !stopped && let Some(stops) = &mut self.stops {
                    text += &stops.finish();
                }
                let length = finish == Finish::Length && !stopped;
                let scores = self.scores.as_mut();
                let tokens = scores.map_or_else(Vec::new, |scores| match stopped {
                    true => scores.show(&text),
                    false => scores.rest(),
                });
                let finish = Some(if length { "length" } else { "stop" });
                Ok(Some(self.piece(text, tokens, finish)))
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

    fn take_token(&mut self, token: TokenId, logprobs: Option<Box<Logprobs>>) -> Piece {
        self.usage.generated_tokens += 1;
        let text = self.decode.push(token);
        if let (Some(scores), Some(logprobs)) = (&mut self.scores, logprobs) {
            scores.add(token, logprobs, &text);
        }
        let (text, stopped) = self.show(text);
        if stopped {
            // Tells the engine that nobody wants the rest.
            self.events = None;
        }
        let scores = self.scores.as_mut();
        let tokens = scores.map_or_else(Vec::new, |scores| scores.show(&text));
        self.piece(text, tokens, stopped.then_some("stop"))
    }

    fn piece(
        &mut self,
        text: String,
        tokens: Vec<ScoredToken>,
        finish: Option<&'static str>,
    ) -> Piece {
        let text = match self.echo.take() {
            None => text,
            Some(echo) => echo + &text,
        };
        Piece { index: 0, text, tokens, finish }
    }

    fn show(&mut self, text: String) -> (String, bool) {
        match &mut self.stops {
            Some(stops) if !text.is_empty() => stops.push(&text),
            _ => (text, false),
        }
    }
}

impl Scores {
    /// Takes in a token that adds `text`. One that completes no character begins where the
    /// character will.
    fn add(&mut self, token: TokenId, logprobs: Box<Logprobs>, text: &str) {
        let scored = ScoredToken { token, logprobs, offset: self.characters };
        self.waiting.push_back((self.decoded, scored));
        self.decoded += text.len();
        self.characters += text.chars().count() as u32;
    }

    /// The tokens whose text begins in `text`, which follows what was shown before.
    fn show(&mut self, text: &str) -> Vec<ScoredToken> {
        self.shown += text.len();
        let count = self.waiting.partition_point(|&(start, _)| start < self.shown);
        self.waiting.drain(..count).map(|(_, scored)| scored).collect()
    }

    /// All other tokens.
    fn rest(&mut self) -> Vec<ScoredToken> {
        self.waiting.drain(..).map(|(_, scored)| scored).collect()
    }
}

/// The error for an engine that went without a last word.
pub(super) fn gone() -> Error {
    Error::new(ErrorKind::DeviceFailed, "the engine has stopped; try another replica")
}
