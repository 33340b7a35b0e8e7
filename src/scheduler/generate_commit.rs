//! A generating lane, continued: what becomes of its sequences when a step commits or fails, and
//! when they are cancelled. Knows no other lane.

use super::generate::{GenerateLane, release_source};
use super::notes::TokenNote;
use super::sequence::State;
use super::step::{BLOCK_TOKENS, Output, Span, SpanDetail};
use super::turn::{CommitTurn, Result};
use crate::error::Error;
use crate::request::{Event, Finish, LaneId, Logprobs, TokenId};

/// How much of the learned answer length one finished request is.
const ANSWER_GAIN: f64 = 0.05;

/// What a sampling span gave.
#[derive(Debug, Clone, Copy)]
struct Sampled<'a> {
    token: TokenId,
    logprobs: Option<&'a Logprobs>,
}

impl GenerateLane {
    /// Takes in what a step gave; `members` are the sequences behind its spans.
    pub(super) fn commit(&mut self, result: Result, members: &[u32], turn: &mut CommitTurn) {
        let mut tokens = result.outcome.tokens.iter();
        let mut logprobs = result.outcome.logprobs.iter();
        let asking = |detail: &&SpanDetail| detail.detail.logprobs.is_some();
        let mut details = result.step.details.iter().filter(asking).peekable();
        for (number, (span, &index)) in result.step.spans.iter().zip(members).enumerate() {
            let token = match span.output {
                Output::Sample { .. } => {
                    Some(*tokens.next().expect("an outcome has a token for each sampling span"))
                }
                Output::None => None,
                Output::Answer | Output::Hidden => unreachable!("not a generation's"),
            };
            let asks = details.next_if(|detail| detail.span as usize == number).is_some();
            let logprobs = asks.then(|| logprobs.next().expect("one for each that asks"));
            let sampled = token.map(|token| Sampled { token, logprobs });
            if self.land(index, span, turn) {
                self.advance(result, index, span, sampled, turn);
            }
        }
        assert!(tokens.next().is_none(), "an outcome has one token for each sampling span");
        assert!(logprobs.next().is_none(), "and log-probabilities for each that asks");
    }

    /// Takes in that a step failed: its sequences end with `error`.
    pub(super) fn abandon(
        &mut self,
        spans: &[Span],
        members: &[u32],
        error: &Error,
        turn: &mut CommitTurn,
    ) {
        for (span, &index) in spans.iter().zip(members) {
            if self.land(index, span, turn) {
                turn.fail(span.request, error);
                self.end(index, State::Dropped, turn);
            }
        }
    }

    /// Takes in that a step was not computed: its sequences wait again.
    pub(super) fn put_back(&mut self, spans: &[Span], members: &[u32], turn: &mut CommitTurn) {
        for (span, &index) in spans.iter().zip(members) {
            if self.land(index, span, turn) {
                self.spoil(index, span, turn);
            }
        }
    }

    /// Ends a live sequence about which nothing more is to be said.
    pub(super) fn drop_request(&mut self, index: u32, turn: &mut CommitTurn) {
        self.end(index, State::Dropped, turn);
    }

    /// Fails every live sequence.
    pub(super) fn fail_all(&mut self, error: &Error, turn: &mut CommitTurn) {
        let live =
            |&index: &u32| matches!(self.sequences[index].state, State::Waiting | State::Running);
        let live: Vec<u32> = self.sequences.indices().filter(live).collect();
        for index in live {
            turn.fail(self.sequences[index].id, error);
            self.end(index, State::Dropped, turn);
        }
    }

    /// One step less in flight; false if its rows no longer matter.
    fn land(&mut self, index: u32, span: &Span, turn: &mut CommitTurn) -> bool {
        let sequence = &mut self.sequences[index];
        assert!(sequence.id == span.request, "a sequence stays while it is in flight");
        sequence.in_flight -= 1;
        match sequence.state {
            State::Running if sequence.spoiled => {
                turn.notes.overrun_rows += span.len() as u32;
                self.spoil(index, span, turn);
                return false;
            }
            State::Running => return true,
            State::Finished => turn.notes.overrun_rows += span.len() as u32,
            State::Dropped => turn.notes.cancelled_rows += span.len() as u32,
            State::Waiting => panic!("a waiting sequence has nothing in flight"),
        }
        if sequence.in_flight == 0 {
            self.forget(index, turn);
        }
        false
    }

    /// A running sequence lost the rows of a step: those in flight after them are worth nothing,
    /// and it begins again when they have landed.
    fn spoil(&mut self, index: u32, span: &Span, turn: &mut CommitTurn) {
        let sequence = &mut self.sequences[index];
        sequence.ahead -= u32::from(matches!(span.output, Output::Sample { .. }));
        sequence.spoiled = true;
        self.preempt(index, turn.pages, turn.seats);
    }

    /// A running sequence has its rows computed, and perhaps one more token.
    fn advance(
        &mut self,
        result: Result,
        index: u32,
        span: &Span,
        sampled: Option<Sampled>,
        turn: &mut CommitTurn,
    ) {
        let sequence = &mut self.sequences[index];
        assert!(sequence.computed == span.start, "rows are computed in order");
        release_source(turn.pages, self.lane, sequence);
        let end = span.start + span.len() as u32;
        turn.notes.recomputed_rows += sequence.furthest.min(end).saturating_sub(span.start);
        sequence.computed = end;
        while (sequence.registered + 1) * BLOCK_TOKENS as u32 <= end {
            let tokens = sequence.block_tokens(sequence.registered);
            let block = sequence.blocks[sequence.registered as usize];
            sequence.prefix = turn.pages.register(self.lane, block, sequence.prefix, tokens);
            sequence.registered += 1;
        }
        let finish = sampled.and_then(|sampled| self.take_token(result, index, sampled, turn));
        let sequence = &self.sequences[index];
        if let Some(finish) = finish {
            turn.finish(sequence.id, finish, sequence.usage());
            let share = sequence.generated.len() as f64 / f64::from(sequence.task.max_tokens);
            self.answered += ANSWER_GAIN * (share - self.answered);
            self.end(index, State::Finished, turn);
        } else if sequence.leaving && sequence.in_flight == 0 {
            self.preempt(index, turn.pages, turn.seats);
        }
    }

    /// Appends a sampled token to the text, unless it ends it.
    fn take_token(
        &mut self,
        result: Result,
        index: u32,
        Sampled { token, logprobs }: Sampled,
        turn: &mut CommitTurn,
    ) -> Option<Finish> {
        let sequence = &mut self.sequences[index];
        sequence.ahead -= 1;
        if sequence.is_stop(token) {
            return Some(Finish::Stop);
        }
        sequence.generated.push(token);
        turn.say(
            sequence.id,
            match logprobs {
                None => Event::Token(token),
                Some(logprobs) => Event::Scored { token, logprobs: Box::new(logprobs.clone()) },
            },
        );
        let first = sequence.spoke.is_none();
        let since = sequence.spoke.replace(result.now).unwrap_or(sequence.arrived);
        let (request, lane) = (sequence.id, LaneId(self.lane as u16));
        let after = result.now.since(since);
        turn.notes.tokens.push(TokenNote { request, lane, first, after });
        let is_last = sequence.generated.len() as u32 == sequence.task.max_tokens;
        is_last.then_some(Finish::Length)
    }

    /// A live sequence is over; what it holds goes back with its last step in flight.
    fn end(&mut self, index: u32, state: State, turn: &mut CommitTurn) {
        match self.sequences[index].state {
            State::Waiting => self.stop_waiting(index),
            State::Running => self.stop_running(index),
            State::Finished | State::Dropped => panic!("a sequence ends once"),
        }
        let sequence = &mut self.sequences[index];
        self.leaving -= u32::from(sequence.leaving);
        sequence.leaving = false;
        sequence.state = state;
        if sequence.in_flight == 0 {
            self.forget(index, turn);
        }
    }
}
