//! An encoding model's lane: whole inputs, packed into steps in order of arrival. Knows no other
//! lane, and no state between steps.

use std::collections::VecDeque;

use super::notes::ScheduledNote;
use super::slab::Slab;
use super::step::{Input, Output, Span, StepKind};
use super::turn::{CommitTurn, PlanTurn, Result};
use crate::error::Error;
use crate::request::{
    Encode, Event, Finish, Micros, Request, RequestId, TenantId, Text, Usage, Yield,
};

/// Requests of one encoding model.
///
/// A step packs whole inputs as long as it is expected to stay within its target; one always
/// goes. The inputs of a request may spread over several steps.
#[derive(Debug)]
pub(super) struct EncodeLane {
    pub(super) rows_max: u32,
    pub(super) requests: Slab<Encoding>,
    /// Requests with inputs that are not planned yet, in order of arrival.
    queue: VecDeque<u32>,
    /// Inputs (request and number) that were planned and not computed; they go first.
    again: VecDeque<(u32, u32)>,
    /// Requests without rows so far, requests with some, and tokens not planned yet.
    pub(super) waiting: u32,
    pub(super) running: u32,
    pub(super) waiting_tokens: u64,
}

/// One request.
#[derive(Debug)]
pub(super) struct Encoding {
    pub(super) id: RequestId,
    tenant: TenantId,
    pub(super) arrived: Micros,
    inputs: Vec<Text>,
    yields: Yield,
    /// Inputs planned, and committed, so far.
    planned: u32,
    committed: u32,
    /// Of those planned: to be planned once more.
    again: u32,
    /// Whether anything is still to be said about it.
    live: bool,
}

impl EncodeLane {
    /// A lane with nothing to do.
    pub(super) fn new(rows_max: u32) -> Self {
        Self {
            rows_max,
            requests: Slab::new(),
            queue: VecDeque::new(),
            again: VecDeque::new(),
            waiting: 0,
            running: 0,
            waiting_tokens: 0,
        }
    }

    /// Whether any request waits or runs.
    pub(super) fn has_work(&self) -> bool {
        self.waiting + self.running > 0
    }

    /// Arrival of the oldest waiting request.
    pub(super) fn oldest(&self) -> Option<Micros> {
        let waiting = |&&index: &&u32| self.requests[index].planned == 0;
        self.queue.iter().find(waiting).map(|&index| self.requests[index].arrived)
    }

    /// Whether the request has had no rows yet.
    pub(super) fn is_waiting(&self, index: u32) -> bool {
        self.requests[index].planned == 0
    }

    /// Takes a request in, to wait; returns its index.
    pub(super) fn admit(&mut self, request: &Request, task: Encode) -> u32 {
        assert!(!task.inputs.is_empty(), "an encoder is given inputs");
        for Text { tokens, .. } in &task.inputs {
            let fits = !tokens.is_empty() && tokens.len() <= self.rows_max as usize;
            assert!(fits, "an input of {} tokens, of at most {}", tokens.len(), self.rows_max);
        }
        let encoding = Encoding {
            id: request.id,
            tenant: request.tenant,
            arrived: request.arrived,
            inputs: task.inputs,
            yields: task.yields,
            planned: 0,
            committed: 0,
            again: 0,
            live: true,
        };
        self.waiting += 1;
        self.waiting_tokens += encoding.tokens(0);
        let index = self.requests.insert(encoding);
        self.queue.push_back(index);
        index
    }

    /// Fills the step with whole inputs, in order.
    pub(super) fn plan(&mut self, turn: &mut PlanTurn) {
        turn.step.kind = StepKind::Encode;
        let within = turn.cost.rows_within(StepKind::Encode, turn.target);
        let budget = within.min(self.rows_max).min(turn.allowed);
        loop {
            let (index, again) = match (self.again.front(), self.queue.front()) {
                (Some(&(index, part)), _) => (index, Some(part)),
                (None, Some(&index)) => (index, None),
                (None, None) => break,
            };
            let encoding = &mut self.requests[index];
            let part = again.unwrap_or(encoding.planned);
            let Text { tokens, second } = &encoding.inputs[part as usize];
            let (first, rows) = (turn.step.rows() as u32, tokens.len() as u32);
            if first > 0 && first + rows > budget {
                break;
            }
            if encoding.planned == 0 {
                self.waiting -= 1;
                self.running += 1;
                let waited = turn.now.since(encoding.arrived);
                let (request, lane) = (encoding.id, turn.step.lane);
                turn.notes.scheduled.push(ScheduledNote { request, lane, waited });
            }
            turn.step.tokens.extend_from_slice(tokens);
            turn.step.spans.push(Span {
                request: encoding.id,
                tenant: encoding.tenant,
                part,
                rows: first..first + rows,
                start: 0,
                blocks: 0..0,
                input: second.map_or(Input::Known, |second| Input::Pair { second }),
                output: match encoding.yields {
                    Yield::Answer => Output::Answer,
                    Yield::Tokens => Output::Hidden,
                },
            });
            turn.members.push(index);
            self.waiting_tokens -= u64::from(rows);
            if again.is_some() {
                encoding.again -= 1;
                self.again.pop_front();
                continue;
            }
            encoding.planned += 1;
            if encoding.planned as usize == encoding.inputs.len() {
                self.queue.pop_front();
            }
        }
    }

    /// Takes in what a step gave; `members` are the requests behind its spans.
    pub(super) fn commit(&mut self, result: Result, members: &[u32], turn: &mut CommitTurn) {
        let vectors = &result.outcome.vectors;
        assert!(vectors.len() == members.len(), "an outcome has one vector for each input");
        for ((span, &index), values) in result.step.spans.iter().zip(members).zip(vectors) {
            if !self.land(index, span, turn) {
                continue;
            }
            turn.say(span.request, Event::Vector { index: span.part, values: values.clone() });
            let encoding = &self.requests[index];
            if encoding.committed as usize == encoding.inputs.len() {
                let prompt_tokens = encoding.tokens(0) as u32;
                let usage = Usage { prompt_tokens, ..Usage::default() };
                turn.finish(span.request, Finish::Complete, usage);
                self.drop_request(index);
            }
        }
    }

    /// Takes in that a step failed: its requests end with `error`.
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
                self.drop_request(index);
            }
        }
    }

    /// Takes in that a step was not computed: its inputs wait again.
    pub(super) fn put_back(&mut self, spans: &[Span], members: &[u32], turn: &mut CommitTurn) {
        for (span, &index) in spans.iter().zip(members) {
            let encoding = &mut self.requests[index];
            if encoding.live {
                encoding.again += 1;
                self.again.push_back((index, span.part));
                self.waiting_tokens += span.len() as u64;
            } else {
                self.land(index, span, turn);
            }
        }
    }

    /// Ends a live request about which nothing more is to be said.
    pub(super) fn drop_request(&mut self, index: u32) {
        let encoding = &mut self.requests[index];
        assert!(encoding.live, "a request ends once");
        encoding.live = false;
        if encoding.planned == 0 {
            self.waiting -= 1;
        } else {
            self.running -= 1;
        }
        self.waiting_tokens -= encoding.tokens(encoding.planned);
        self.again.retain(|&(other, part)| {
            if other == index {
                self.waiting_tokens -= encoding.inputs[part as usize].tokens.len() as u64;
            }
            other != index
        });
        if (encoding.planned as usize) < encoding.inputs.len() {
            self.queue.retain(|&other| other != index);
        }
        if encoding.has_landed() {
            self.requests.remove(index);
        }
    }

    /// Fails every live request.
    pub(super) fn fail_all(&mut self, error: &Error, turn: &mut CommitTurn) {
        let live: Vec<u32> =
            self.requests.indices().filter(|&index| self.requests[index].live).collect();
        for index in live {
            turn.fail(self.requests[index].id, error);
            self.drop_request(index);
        }
    }

    /// One input less in flight; false if its result no longer matters.
    fn land(&mut self, index: u32, span: &Span, turn: &mut CommitTurn) -> bool {
        let encoding = &mut self.requests[index];
        assert!(encoding.id == span.request, "a request stays while it is in flight");
        encoding.committed += 1;
        if encoding.live {
            return true;
        }
        turn.notes.cancelled_rows += span.len() as u32;
        if encoding.has_landed() {
            self.requests.remove(index);
        }
        false
    }
}

impl Encoding {
    /// Whether nothing of it is in flight.
    fn has_landed(&self) -> bool {
        self.committed + self.again == self.planned
    }

    /// Tokens of all inputs from the `first`-th on.
    fn tokens(&self, first: u32) -> u64 {
        self.inputs[first as usize..].iter().map(|input| input.tokens.len() as u64).sum()
    }
}
