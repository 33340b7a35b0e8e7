//! A device that keeps what a real one keeps: KV by page, and a token buffer by seat. Its "model"
//! makes each position depend on every earlier one through the block table, so a wrong table, a
//! page reused too early, a stale seat or a bad prefix changes the text.

use std::collections::{HashMap, HashSet};

use super::rng::mix;
use crate::request::{Generate, LaneId, Logprobs, RequestId, Sampling, TenantId, TokenId};
use crate::scheduler::step::{
    BLOCK_TOKENS, BlockCopy, Grant, Input, MAX_SEATS, Outcome, Output, Seat, Span, Step, StepId,
};

/// Tokens of the model's vocabulary.
pub(super) const VOCABULARY: u64 = 61;

/// One position's KV in one layer.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    value: u64,
    tenant: Option<TenantId>,
}

/// Groups of each lane: the pages of each.
type Loans = HashMap<(LaneId, u32), Vec<u32>>;

/// The fake device.
#[derive(Debug)]
pub(super) struct Device {
    /// By page: `slot × BLOCK_TOKENS + offset`.
    pages: Vec<Vec<Cell>>,
    seats: Vec<TokenId>,
    /// Loans as planned, and as taken in by executed steps.
    planned: Loans,
    taken: Loans,
    /// Pages that steps in flight touch.
    in_flight: HashMap<StepId, (LaneId, Vec<u32>)>,
    tenants: HashMap<RequestId, TenantId>,
    /// Requests with rows in a failed step: what their later rows read was never written.
    failed: HashSet<RequestId>,
}

impl Device {
    pub(super) fn new(pages: u32, blocks_per_page: u32) -> Self {
        let cells = blocks_per_page as usize * BLOCK_TOKENS;
        Self {
            pages: vec![vec![Cell::default(); cells]; pages as usize],
            seats: vec![TokenId::MAX; MAX_SEATS],
            planned: Loans::new(),
            taken: Loans::new(),
            in_flight: HashMap::new(),
            tenants: HashMap::new(),
            failed: HashSet::new(),
        }
    }

    /// Says whose a request is.
    pub(super) fn introduce(&mut self, request: RequestId, tenant: TenantId) {
        self.tenants.insert(request, tenant);
    }

    /// A step was planned: its pages belong to its lane and no other lane's step in flight.
    pub(super) fn dispatch(&mut self, step: &Step) {
        for Grant { pages, .. } in &step.grants {
            // In the order of plans, a page leaves whichever group had it.
            self.planned.retain(|_, others| !others.iter().any(|page| pages.contains(page)));
        }
        take_in(&mut self.planned, step);
        let mut touched: Vec<u32> = Vec::new();
        for block in &step.blocks {
            touched.extend(&self.planned[&(step.lane, block.group)]);
        }
        for BlockCopy { from, .. } in &step.copies {
            touched.extend(&self.planned[&(step.lane, from.group)]);
        }
        for (lane, pages) in self.in_flight.values() {
            let clash = *lane != step.lane && pages.iter().any(|page| touched.contains(page));
            assert!(!clash, "a page changed lanes while a step in flight used it");
        }
        self.in_flight.insert(step.id, (step.lane, touched));
    }

    /// A step failed before or after it took in its grants.
    pub(super) fn fail(&mut self, step: &Step, took_grants: bool) {
        self.in_flight.remove(&step.id);
        self.failed.extend(step.spans.iter().map(|span| span.request));
        if took_grants {
            take_in(&mut self.taken, step);
        }
    }

    /// Computes a step.
    pub(super) fn run(&mut self, step: &Step, outcome: &mut Outcome) {
        self.in_flight.remove(&step.id);
        take_in(&mut self.taken, step);
        for copy in &step.copies {
            self.copy(step.lane, copy);
        }
        for span in &step.spans {
            match span.output {
                Output::Answer | Output::Hidden => {
                    let tokens = &step.tokens[span.rows.start as usize..span.rows.end as usize];
                    let second = match span.input {
                        Input::Pair { second } => Some(second),
                        _ => None,
                    };
                    let each = span.output == Output::Hidden;
                    outcome.vectors.push(vector(tokens, second, each));
                }
                _ => self.run_span(step, span, outcome),
            }
        }
    }

    fn copy(&mut self, lane: LaneId, BlockCopy { from, to }: &BlockCopy) {
        let [froms, tos] = [from, to].map(|block| self.taken[&(lane, block.group)].clone());
        for (source, page) in froms.into_iter().zip(tos) {
            let [start, place] = [from, to].map(|block| block.slot as usize * BLOCK_TOKENS);
            let cells = self.pages[source as usize][start..start + BLOCK_TOKENS].to_vec();
            self.pages[page as usize][place..place + BLOCK_TOKENS].copy_from_slice(&cells);
        }
    }

    fn run_span(&mut self, step: &Step, span: &Span, outcome: &mut Outcome) {
        let tenant = self.tenants[&span.request];
        let table = step.table(span);
        let groups: Vec<&Vec<u32>> =
            table.iter().map(|block| &self.taken[&(step.lane, block.group)]).collect();
        let mut last = 0;
        for (offset, row) in span.rows.clone().enumerate() {
            let position = span.start as usize + offset;
            let token = match span.input {
                Input::Known | Input::Pair { .. } => step.tokens[row as usize],
                Input::Seat(Seat(seat)) => self.seats[seat as usize],
            };
            last = u64::from(token);
            let layers = groups[0].len() as u64;
            for layer in 0..layers {
                let cell = |at: usize| {
                    let block = at / BLOCK_TOKENS;
                    let slot = table[block].slot as usize;
                    (
                        groups[block][layer as usize] as usize,
                        slot * BLOCK_TOKENS + at % BLOCK_TOKENS,
                    )
                };
                let mut seen = layer;
                for at in 0..position {
                    let (page, index) = cell(at);
                    let Cell { value, tenant: whose } = self.pages[page][index];
                    let right = whose == Some(tenant) || self.failed.contains(&span.request);
                    assert!(right, "KV of {whose:?}, not of {tenant:?}");
                    seen = attend(seen, value);
                }
                last = mix(seen ^ last);
                let (page, index) = cell(position);
                self.pages[page][index] = Cell { value: last, tenant: Some(tenant) };
            }
        }
        if let Output::Sample { seat, sampling, position } = span.output {
            let index = step.spans.iter().position(|other| other.rows == span.rows);
            let detail = step.details.iter().find(|detail| Some(detail.span as usize) == index);
            let past = detail.filter(|detail| detail.detail.looks_back()).map(|detail| {
                let known =
                    &step.history[detail.generated.start as usize..][..detail.generated.len()];
                let in_seat = match span.input {
                    Input::Seat(Seat(seat)) => Some(self.seats[seat as usize]),
                    Input::Known | Input::Pair { .. } => None,
                };
                known.iter().copied().chain(in_seat).collect::<Vec<TokenId>>()
            });
            let token = sample(last, sampling, position, past.as_deref());
            if detail.is_some_and(|detail| detail.detail.logprobs.is_some()) {
                outcome.logprobs.push(logprobs(token));
            }
            self.seats[seat.0 as usize] = token;
            outcome.tokens.push(token);
        }
    }
}

/// What the model generates for a prompt when nothing else is on the device, without an end.
pub(super) struct Alone {
    layers: Vec<Vec<u64>>,
    /// What each layer saw so far: the fold over its values.
    seen: Vec<u64>,
    last: u64,
    sampling: Sampling,
    /// What was generated, for those whose penalties look back.
    past: Option<Vec<TokenId>>,
}

impl Alone {
    pub(super) fn new(layers: u32, task: &Generate) -> Self {
        let mut alone = Self {
            layers: vec![Vec::new(); layers as usize],
            seen: (0..u64::from(layers)).collect(),
            last: 0,
            sampling: task.sampling,
            past: task.detail.looks_back().then(Vec::new),
        };
        task.prompt.iter().for_each(|&token| alone.push(token));
        alone
    }

    fn push(&mut self, token: TokenId) {
        self.last = u64::from(token);
        for (layer, values) in self.layers.iter_mut().enumerate() {
            self.last = mix(self.seen[layer] ^ self.last);
            values.push(self.last);
            self.seen[layer] = attend(self.seen[layer], self.last);
        }
    }

    /// The next token.
    pub(super) fn next(&mut self) -> TokenId {
        let position = self.layers[0].len() as u32;
        let token = sample(self.last, self.sampling, position, self.past.as_deref());
        self.past.iter_mut().for_each(|past| past.push(token));
        self.push(token);
        token
    }
}

/// What an encoder makes of its input.
pub(super) fn vector(tokens: &[TokenId], second: Option<u32>, each: bool) -> Vec<f32> {
    let fold = tokens.iter().fold(0, |seen, &token| mix(seen ^ u64::from(token)));
    let second = second.map_or(-1.0, |second| second as f32);
    let answer = [(fold >> 40) as f32, tokens.len() as f32, second];
    answer.repeat(if each { tokens.len() } else { 1 })
}

fn attend(seen: u64, value: u64) -> u64 {
    seen.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ value
}

/// The choice counts, and so do the tokens generated before where penalties look back at them.
fn sample(state: u64, sampling: Sampling, position: u32, past: Option<&[TokenId]>) -> TokenId {
    let past =
        past.map_or(0, |past| past.iter().fold(1, |seen, &token| mix(seen ^ u64::from(token))));
    let counter = u64::from(sampling.choice) << 32 | u64::from(position);
    (mix(state ^ past ^ mix(sampling.seed ^ counter)) % VOCABULARY) as TokenId
}

/// What the device says of the token that it chose.
pub(super) fn logprobs(token: TokenId) -> Logprobs {
    Logprobs { chosen: -(token as f32), top: Vec::new() }
}

fn take_in(loans: &mut Loans, step: &Step) {
    for Grant { group, pages } in &step.grants {
        loans.insert((step.lane, *group), pages.clone());
    }
}
