//! One generation: what is known of its text, how far its KV reaches, and what is in flight.
//! Knows no lane policy and no pool.

use std::ops::Range;
use std::sync::Arc;

use super::blocks::{BlockTokens, Prefix};
use super::step::{BLOCK_TOKENS, BlockId, Input, Output, Seat, SpanDetail, Step};
use crate::request::{Generate, Micros, Request, RequestId, TenantId, TokenId, Usage};

/// A generation between its admission and the commit of its last step.
///
/// Positions `0 .. computed` have their KV in committed steps, `computed .. planned` in steps in
/// flight. The text has `known` tokens on the host, and `ahead` more that steps in flight will
/// sample. A sequence decodes when only the last token of that text lacks its KV.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: RequestId,
    pub(super) tenant: TenantId,
    pub(super) arrived: Micros,
    /// Rank by age in its lane: smaller is older.
    pub(super) age: u64,
    pub(super) task: Generate,
    pub(super) generated: Vec<TokenId>,
    pub(super) state: State,
    pub(super) seat: Option<Seat>,
    pub(super) blocks: Vec<BlockId>,
    /// What its first block that is not reused is a copy of at first: held until the step that
    /// copies it has landed.
    pub(super) source: Option<BlockId>,
    /// Blocks of `blocks` that are registered or were reused, and the prefix they make.
    pub(super) registered: u32,
    pub(super) prefix: Prefix,
    pub(super) computed: u32,
    pub(super) planned: u32,
    /// Tokens that steps in flight sample.
    pub(super) ahead: u32,
    /// Uncommitted steps with rows of it.
    pub(super) in_flight: u32,
    /// To be preempted as soon as nothing of it is in flight; gets no more rows.
    pub(super) leaving: bool,
    /// Whether a step of it was not computed, so that those after it are worth nothing.
    pub(super) spoiled: bool,
    /// Positions computed before a preemption: rows below are computed again.
    pub(super) furthest: u32,
    pub(super) cached_tokens: u32,
    /// Whether it ever got rows.
    pub(super) started: bool,
    /// When its last token was emitted.
    pub(super) spoke: Option<Micros>,
}

/// Where a sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Off the device.
    Waiting,
    /// On the device.
    Running,
    /// Its answer is complete; rows of it are still in flight.
    Finished,
    /// Cancelled or failed; rows of it are still in flight.
    Dropped,
}

impl Sequence {
    /// A waiting sequence for `request`, whose task is `task`.
    pub(super) fn new(request: &Request, task: Generate, age: u64) -> Self {
        Self {
            id: request.id,
            tenant: request.tenant,
            arrived: request.arrived,
            age,
            task,
            generated: Vec::new(),
            state: State::Waiting,
            seat: None,
            blocks: Vec::new(),
            source: None,
            registered: 0,
            prefix: Prefix::empty(request.tenant),
            computed: 0,
            planned: 0,
            ahead: 0,
            in_flight: 0,
            leaving: false,
            spoiled: false,
            furthest: 0,
            cached_tokens: 0,
            started: false,
            spoke: None,
        }
    }

    /// Tokens of the text that the host knows.
    pub(super) fn known(&self) -> u32 {
        (self.task.prompt.len() + self.generated.len()) as u32
    }

    /// Tokens of the text, those in flight included.
    pub(super) fn length(&self) -> u32 {
        self.known() + self.ahead
    }

    /// Tokens that it may still generate, beyond those in flight.
    pub(super) fn remaining(&self) -> u32 {
        self.task.max_tokens - self.generated.len() as u32 - self.ahead
    }

    /// Whether it may get rows: not at its end, not about to leave. Where a token depends on the
    /// ones before, one of them may be in the seat, and no more than that unknown.
    pub(super) fn wants_rows(&self) -> bool {
        let unknown = self.ahead > 1 && self.task.detail.looks_back();
        self.state == State::Running && !self.leaving && self.remaining() > 0 && !unknown
    }

    /// Whether its next row continues an answer that has begun.
    pub(super) fn is_decoding(&self) -> bool {
        self.planned + 1 == self.length() && self.length() > self.task.prompt.len() as u32
    }

    /// Blocks for its text and the next token.
    pub(super) fn blocks_for_text(&self) -> u32 {
        (self.length() + 1).div_ceil(BLOCK_TOKENS as u32)
    }

    /// Whether its next row needs one more block.
    pub(super) fn lacks_block(&self) -> bool {
        self.planned as usize == self.blocks.len() * BLOCK_TOKENS
    }

    /// The token at a known position.
    pub(super) fn token(&self, position: u32) -> TokenId {
        let (position, prompt) = (position as usize, &self.task.prompt);
        prompt.get(position).copied().unwrap_or_else(|| self.generated[position - prompt.len()])
    }

    /// The tokens at known positions.
    pub(super) fn tokens(&self, positions: Range<u32>) -> impl Iterator<Item = TokenId> {
        positions.map(|at| self.token(at))
    }

    /// Known tokens of the block after those that are registered; the last of the text is not
    /// among them.
    pub(super) fn next_tokens(&self) -> Vec<TokenId> {
        let start = self.registered * BLOCK_TOKENS as u32;
        let end = (self.known() - 1).min(start + BLOCK_TOKENS as u32 - 1);
        self.tokens(start..end).collect()
    }

    /// Computed tokens of the block after those that are registered.
    pub(super) fn last_tokens(&self) -> Vec<TokenId> {
        self.tokens(self.registered * BLOCK_TOKENS as u32..self.computed).collect()
    }

    /// The tokens of its `index`-th block, all known.
    pub(super) fn block_tokens(&self, index: u32) -> BlockTokens {
        let start = index * BLOCK_TOKENS as u32;
        std::array::from_fn(|offset| self.token(start + offset as u32))
    }

    /// Where the input of the rows from `planned` on is.
    pub(super) fn input(&self) -> Input {
        if self.ahead == 0 {
            return Input::Known;
        }
        Input::Seat(self.seat.expect("a running sequence has a seat"))
    }

    /// What `rows` more rows yield: a token if they reach the end of the text.
    pub(super) fn output(&self, rows: u32) -> Output {
        let end = self.planned + rows;
        if end < self.length() {
            return Output::None;
        }
        Output::Sample {
            seat: self.seat.expect("a running sequence has a seat"),
            sampling: self.task.sampling,
            position: end,
        }
    }

    /// Appends to `step` what span `span`, which samples the next token, needs besides.
    pub(super) fn push_detail(&self, step: &mut Step, span: u32) {
        let detail = &self.task.detail;
        let first = step.history.len() as u32;
        if detail.looks_back() {
            step.history.extend_from_slice(&self.generated);
        }
        step.details.push(SpanDetail {
            span,
            detail: detail.clone(),
            prompt: Arc::clone(&self.task.prompt),
            generated: first..step.history.len() as u32,
        });
    }

    /// Whether `other` computes what this one, another choice of the same prompt, can reuse: the
    /// full blocks of the prompt, all but its last token.
    pub(super) fn awaits(&self, other: &Sequence) -> bool {
        let shared = (self.task.prompt.len() as u32 - 1) / BLOCK_TOKENS as u32;
        Arc::ptr_eq(&self.task.prompt, &other.task.prompt)
            && self.tenant == other.tenant
            && other.computed < shared * BLOCK_TOKENS as u32
    }

    /// What the request took so far.
    pub(super) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.task.prompt.len() as u32,
            cached_tokens: self.cached_tokens,
            generated_tokens: self.generated.len() as u32,
        }
    }

    /// Forgets all that was computed; the text stays. Its blocks and seat were given back.
    pub(super) fn restart(&mut self) {
        assert!(self.in_flight == 0 && self.ahead == 0, "a step in flight uses the blocks");
        self.state = State::Waiting;
        self.leaving = false;
        self.spoiled = false;
        self.furthest = self.furthest.max(self.computed);
        self.computed = 0;
        self.planned = 0;
        self.registered = 0;
        self.prefix = Prefix::empty(self.tenant);
    }

    /// Whether `token` ends the answer.
    pub(super) fn is_stop(&self, token: TokenId) -> bool {
        let stop: &Arc<[TokenId]> = &self.task.stop_tokens;
        stop.contains(&token)
    }
}
