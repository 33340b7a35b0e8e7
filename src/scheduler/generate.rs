//! A generating model's lane: who waits, who runs, and how a step's rows are picked. Knows no
//! other lane; pages, seats and the cost model are given in.

use std::collections::VecDeque;

use super::blocks::GroupUse;
use super::notes::ScheduledNote;
use super::pages::Pages;
use super::seats::Seats;
use super::sequence::{Sequence, State};
use super::slab::Slab;
use super::step::{BLOCK_TOKENS, BlockCopy, Input, Output, Span, StepKind};
use super::turn::{CommitTurn, PlanTurn};
use crate::request::{Event, Generate, Micros, Request};

/// Rows in a block.
const ROWS: u32 = BLOCK_TOKENS as u32;

/// Sequences of one generating model.
///
/// A step takes one row of every decoding sequence, then prompt chunks: of running sequences,
/// oldest first, then of waiting ones in order of arrival, as far as rows, time and blocks go.
#[derive(Debug)]
pub(super) struct GenerateLane {
    pub(super) lane: usize,
    rows_max: u32,
    /// Longest text, prompt and answer.
    context: u32,
    pub(super) sequences: Slab<Sequence>,
    /// Oldest first; a preempted sequence is older than all that never ran.
    pub(super) waiting: VecDeque<u32>,
    /// Oldest first.
    pub(super) running: Vec<u32>,
    pub(super) preemptions: u64,
    /// Running sequences that are to be preempted at their next commit.
    pub(super) leaving: u32,
    /// Known tokens of waiting sequences, and new tokens that they may still generate.
    pub(super) waiting_tokens: u64,
    pub(super) waiting_new: u64,
    /// Learned: generated / `max_tokens`.
    pub(super) answered: f64,
    /// Age of the waiting sequence that found no room, and the pages' releases at that moment.
    no_room: Option<(u64, u64)>,
    next_age: u64,
    /// Age of the sequence that the next step's decode rows begin with.
    turn: u64,
    /// Who may get a decode row in the step being planned; empty between steps.
    decoding: Vec<u32>,
    /// Running sequences that are not decoding yet, likewise.
    prefilling: Vec<u32>,
}

impl GenerateLane {
    /// A lane with nothing to do.
    pub(super) fn new(lane: usize, rows_max: u32, context: u32) -> Self {
        Self {
            lane,
            rows_max,
            context,
            sequences: Slab::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            preemptions: 0,
            leaving: 0,
            waiting_tokens: 0,
            waiting_new: 0,
            answered: 0.5,
            no_room: None,
            next_age: 0,
            turn: 0,
            decoding: Vec::new(),
            prefilling: Vec::new(),
        }
    }

    /// Whether any sequence waits or runs.
    pub(super) fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Whether somebody waits for a next token: an answer has begun, or a step in flight begins
    /// it.
    pub(super) fn speaks(&self) -> bool {
        self.running.iter().any(|&index| {
            let sequence = &self.sequences[index];
            sequence.length() > sequence.task.prompt.len() as u32
        })
    }

    /// Takes a request in, to wait; returns its index.
    pub(super) fn admit(&mut self, request: &Request, task: Generate) -> u32 {
        let longest = task.prompt.len() as u64 + u64::from(task.max_tokens);
        let (fits, asks) = (longest <= u64::from(self.context), task.max_tokens > 0);
        assert!(fits && asks && !task.prompt.is_empty(), "admission checks limits: {longest}");
        let sequence = Sequence::new(request, task, self.next_age);
        self.next_age += 1;
        let index = self.sequences.insert(sequence);
        self.wait(index);
        index
    }

    /// Finds out who may get rows, and returns how many blocks they and the first in the waiting
    /// list need beyond those they have, prefix reuse not counted.
    pub(super) fn survey(&mut self, may_admit: bool) -> u32 {
        self.decoding.clear();
        self.prefilling.clear();
        let mut blocks = 0;
        let first = self.running.partition_point(|&index| self.sequences[index].age < self.turn);
        let (before, after) = self.running.split_at(first);
        for &index in after.iter().chain(before) {
            let sequence = &self.sequences[index];
            if !sequence.wants_rows() {
                continue;
            }
            if sequence.is_decoding() {
                self.decoding.push(index);
                blocks += u32::from(sequence.lacks_block());
            } else {
                self.prefilling.push(index);
            }
        }
        self.prefilling.sort_unstable_by_key(|&index| self.sequences[index].age);
        match self.waiting.front() {
            Some(&head) if may_admit && self.leaving == 0 => {
                blocks + self.sequences[head].blocks_for_text()
            }
            _ => blocks,
        }
    }

    /// Fills the step with rows of those whom [`survey`](Self::survey) found, and of waiting ones.
    ///
    /// Decode rows go together as long as the step is expected to stay within its target, or
    /// within twice the time of a single row: splitting them further would cost more device time
    /// than the others gain. Those left over go first in the next step. A step always leaves room
    /// for one prompt chunk of a block if there is a prompt to compute.
    pub(super) fn plan(&mut self, turn: &mut PlanTurn) {
        let rows_max = self.rows_max.min(turn.allowed);
        let may_admit = !self.waiting.is_empty() && turn.seats.available(self.lane);
        let chunk_min =
            if may_admit || !self.prefilling.is_empty() { ROWS.min(rows_max / 4) } else { 0 };
        let lone = turn.cost.predict(StepKind::Decode, 1);
        let limit = turn.target.max(Micros(2 * lone.0));
        let decode_max = turn.cost.rows_within(StepKind::Decode, limit);
        let preemptions = self.preemptions;
        let enough = self.plan_decodes(turn, decode_max.min(rows_max - chunk_min));

        let decodes = turn.step.rows() as u32;
        turn.step.kind = if decodes == 0 { StepKind::Prefill } else { StepKind::Mixed };
        let within = turn.cost.rows_within(turn.step.kind, turn.target).saturating_sub(decodes);
        let mut budget = within.max(chunk_min.max(1)).min(rows_max - decodes);
        self.plan_chunks(turn, &mut budget);
        // Blocks that running sequences wait for are not given to new ones.
        if enough && self.leaving == 0 && self.preemptions == preemptions {
            self.plan_waiting(turn, &mut budget);
        }
        if turn.step.rows() as u32 == decodes {
            turn.step.kind = StepKind::Decode;
        }
    }

    /// One row of each decoding sequence, at most `rows_max`; false if one lacked a block.
    fn plan_decodes(&mut self, turn: &mut PlanTurn, rows_max: u32) -> bool {
        let mut enough = true;
        let mut decoding = std::mem::take(&mut self.decoding);
        let mut left_over = None;
        for &index in &decoding {
            if turn.step.rows() as u32 == rows_max {
                left_over = Some(index);
                break;
            }
            // Somebody before it may have had it preempted.
            if !self.sequences[index].wants_rows() {
                continue;
            }
            if self.sequences[index].lacks_block() && !self.take_block(turn, index) {
                enough = false;
                continue;
            }
            self.push_span(turn, index, 1);
        }
        self.turn = left_over.map_or(0, |index| self.sequences[index].age);
        decoding.clear();
        self.decoding = decoding;
        enough
    }

    /// Prompt chunks of running sequences, oldest first.
    fn plan_chunks(&mut self, turn: &mut PlanTurn, budget: &mut u32) {
        let mut prefilling = std::mem::take(&mut self.prefilling);
        for &index in &prefilling {
            if self.sequences[index].wants_rows() {
                self.push_chunk(turn, index, budget);
            }
        }
        prefilling.clear();
        self.prefilling = prefilling;
    }

    /// Brings waiting sequences to the device, in order, and plans their first chunks.
    fn plan_waiting(&mut self, turn: &mut PlanTurn, budget: &mut u32) {
        while *budget > 0 && turn.seats.available(self.lane) {
            let Some(&index) = self.waiting.front() else { break };
            let sequence = &self.sequences[index];
            let age = sequence.age;
            let too_short = turn.chunked && *budget < ROWS.min(sequence.known());
            if too_short || self.no_room == Some((age, turn.pages.releases())) {
                break;
            }
            // The first choice computes the prompt; the others find it in the prefix cache.
            let awaits = |&other: &u32| sequence.awaits(&self.sequences[other]);
            if sequence.task.sampling.choice > 0 && self.running.iter().any(awaits) {
                break;
            }
            if !self.board(turn, index) {
                self.no_room = Some((age, turn.pages.releases()));
                break;
            }
            self.push_chunk(turn, index, budget);
        }
    }

    /// Gives a waiting sequence a seat, its cached prefix, and blocks for all of its text; false,
    /// and nothing changed, if the blocks cannot be had.
    ///
    /// All of them at once: a prompt that starts without them would sooner or later be preempted
    /// in the middle and computed again.
    fn board(&mut self, turn: &mut PlanTurn, index: u32) -> bool {
        let lane = self.lane;
        let sequence = &mut self.sequences[index];
        // The last token is always computed: it has to yield the next one.
        let reusable = (sequence.known() - 1) / ROWS;
        while sequence.registered < reusable {
            let tokens = sequence.block_tokens(sequence.registered);
            let Some((block, made)) = turn.pages.reuse(lane, sequence.prefix, &tokens) else {
                break;
            };
            sequence.blocks.push(block);
            sequence.registered += 1;
            sequence.prefix = made;
        }
        let part = turn.pages.reuse_part(lane, sequence.prefix, &sequence.next_tokens());
        sequence.source = part.map(|(source, _)| source);
        let wanted = sequence.blocks_for_text() - sequence.registered;
        // The source may be just the block that is lacking.
        let room = turn.pages.make_room(lane, wanted)
            || release_source(turn.pages, lane, sequence) && turn.pages.make_room(lane, wanted);
        if !room {
            release_blocks(turn.pages, lane, sequence);
            sequence.restart();
            return false;
        }
        let longest = sequence.task.prompt.len() + sequence.task.max_tokens as usize;
        sequence.blocks.reserve(longest.div_ceil(BLOCK_TOKENS));
        for _ in 0..wanted {
            sequence.blocks.push(turn.pages.take(lane).expect("room was made"));
        }
        sequence.seat = turn.seats.take(lane);
        let alike = sequence.source.and(part).map_or(0, |(_, alike)| alike);
        sequence.computed = sequence.registered * ROWS + alike;
        sequence.planned = sequence.computed;
        if !sequence.started {
            sequence.started = true;
            sequence.cached_tokens = sequence.computed.min(sequence.task.prompt.len() as u32);
            let (request, lane) = (sequence.id, turn.step.lane);
            let waited = turn.now.since(sequence.arrived);
            turn.notes.scheduled.push(ScheduledNote { request, lane, waited });
            let cached_tokens = sequence.cached_tokens;
            turn.said.push((sequence.id, Event::Started { cached_tokens }));
        }
        sequence.state = State::Running;
        self.waiting.pop_front();
        self.count_waiting(index, false);
        let age = self.sequences[index].age;
        let place = self.running.partition_point(|&other| self.sequences[other].age < age);
        self.running.insert(place, index);
        true
    }

    /// Plans as many rows of a prompt as the budget allows: to its end, or to a block boundary,
    /// or less than that if the step would carry no chunk otherwise.
    fn push_chunk(&mut self, turn: &mut PlanTurn, index: u32, budget: &mut u32) {
        let sequence = &self.sequences[index];
        let (start, remaining) = (sequence.planned, sequence.length() - sequence.planned);
        let boundary = (start + *budget) / ROWS * ROWS;
        let rows = match remaining {
            _ if remaining <= *budget => remaining,
            _ if boundary > start => boundary - start,
            _ if !turn.chunked => *budget,
            _ => 0,
        };
        if rows > 0 {
            self.push_span(turn, index, rows);
            turn.chunked = true;
        }
        // A chunk that was cut short is the last: later prompts wait their turn.
        *budget = if rows < remaining { 0 } else { *budget - rows };
    }

    /// Appends the sequence's next `rows` rows to the step; its blocks cover them.
    fn push_span(&mut self, turn: &mut PlanTurn, index: u32, rows: u32) {
        let sequence = &mut self.sequences[index];
        let step = &mut *turn.step;
        let (start, input, output) = (sequence.planned, sequence.input(), sequence.output(rows));
        let first_row = step.tokens.len() as u32;
        match input {
            Input::Seat(_) => step.tokens.push(0),
            Input::Known | Input::Pair { .. } => {
                step.tokens.extend(sequence.tokens(start..start + rows))
            }
        }
        if output != Output::None && !sequence.task.detail.is_empty() {
            sequence.push_detail(step, step.spans.len() as u32);
        }
        if let (Some(from), 0) = (sequence.source, sequence.in_flight) {
            let to = sequence.blocks[(start / ROWS) as usize];
            step.copies.push(BlockCopy { from, to });
        }
        let first_block = step.blocks.len() as u32;
        let covering = (start + rows).div_ceil(ROWS) as usize;
        step.blocks.extend_from_slice(&sequence.blocks[..covering]);
        step.spans.push(Span {
            request: sequence.id,
            tenant: sequence.tenant,
            part: 0,
            rows: first_row..first_row + rows,
            start,
            blocks: first_block..step.blocks.len() as u32,
            input,
            output,
        });
        sequence.planned += rows;
        sequence.ahead += u32::from(sequence.planned == sequence.length());
        sequence.in_flight += 1;
        turn.members.push(index);
    }

    /// One more block for a running sequence. If there is none, the youngest running sequence is
    /// preempted, at once or at its next commit; never the oldest, so that one always advances.
    /// Nobody is preempted while the lane's guarantee is still on its way to it.
    fn take_block(&mut self, turn: &mut PlanTurn, index: u32) -> bool {
        loop {
            if let Some(block) = turn.pages.take(self.lane) {
                self.sequences[index].blocks.push(block);
                return true;
            }
            if turn.pages.is_below_guarantee(self.lane) || self.leaving > 0 {
                return false;
            }
            let victim = *self.running.last().expect("the asking sequence runs");
            if victim == self.running[0] {
                return false;
            }
            self.preempt(victim, turn.pages, turn.seats);
            if victim == index || self.leaving > 0 {
                return false;
            }
        }
    }

    /// Takes a running sequence off the device, now or as soon as nothing of it is in flight.
    pub(super) fn preempt(&mut self, index: u32, pages: &mut Pages, seats: &mut Seats) {
        let sequence = &mut self.sequences[index];
        assert!(sequence.state == State::Running, "only running sequences are preempted");
        if sequence.in_flight > 0 {
            self.leaving += u32::from(!sequence.leaving);
            sequence.leaving = true;
            return;
        }
        self.leaving -= u32::from(sequence.leaving);
        self.stop_running(index);
        let sequence = &mut self.sequences[index];
        release_blocks(pages, self.lane, sequence);
        let seat = sequence.seat.take().expect("a running sequence has a seat");
        seats.put_back(self.lane, seat);
        sequence.restart();
        self.preemptions += 1;
        self.wait(index);
    }

    /// Of the groups that sequences hold, the one whose loss costs the fewest rows; one that the
    /// oldest sequence uses only if there is no other.
    pub(super) fn cheapest_group(&self, pages: &Pages) -> Option<u32> {
        let blocks = pages.blocks(self.lane);
        let held = |group| (blocks.group_use(group) == GroupUse::Held).then_some(0);
        let mut costs: Vec<Option<u64>> = blocks.group_numbers().map(held).collect();
        for (rank, &index) in self.running.iter().enumerate() {
            let sequence = &self.sequences[index];
            let cost = u64::from(sequence.computed) + if rank == 0 { 1 << 40 } else { 0 };
            let mut groups: Vec<u32> = sequence.blocks.iter().map(|block| block.group).collect();
            groups.sort_unstable();
            groups.dedup();
            for group in groups {
                costs[group as usize] = costs[group as usize].map(|sum| sum + cost);
            }
        }
        let costs = costs.into_iter().zip(blocks.group_numbers());
        costs.filter_map(|(cost, group)| Some((cost?, group))).min().map(|(_, group)| group)
    }

    /// Preempts every sequence that holds a block of the group.
    pub(super) fn preempt_holders(&mut self, group: u32, pages: &mut Pages, seats: &mut Seats) {
        let holds =
            |index: &u32| self.sequences[*index].blocks.iter().any(|block| block.group == group);
        let holders: Vec<u32> = self.running.iter().copied().filter(holds).collect();
        for index in holders {
            self.preempt(index, pages, seats);
        }
    }

    /// Share of the waiting sequences that begin only when others have ended: with `seats` free
    /// for them, or with no room for the first of them.
    pub(super) fn held_up(&self, seats: u32) -> f64 {
        let Some(&first) = self.waiting.front() else { return 0.0 };
        // One that has begun waits again for lack of memory.
        let Sequence { age, started, .. } = self.sequences[first];
        let no_room = started || self.no_room.is_some_and(|(found, _)| found == age);
        let waiting = self.waiting.len() as f64;
        if no_room { 1.0 } else { (waiting - f64::from(seats)).max(0.0) / waiting }
    }

    /// Puts a sequence into the waiting list, by age.
    fn wait(&mut self, index: u32) {
        let age = self.sequences[index].age;
        let place = self.waiting.partition_point(|&other| self.sequences[other].age < age);
        self.waiting.insert(place, index);
        self.count_waiting(index, true);
    }

    /// Takes a sequence off the waiting list.
    pub(super) fn stop_waiting(&mut self, index: u32) {
        let age = self.sequences[index].age;
        let place = self.waiting.partition_point(|&other| self.sequences[other].age < age);
        assert!(self.waiting.remove(place) == Some(index), "the sequence waits");
        self.count_waiting(index, false);
    }

    /// Takes a sequence off the running list.
    pub(super) fn stop_running(&mut self, index: u32) {
        let age = self.sequences[index].age;
        let place = self.running.partition_point(|&other| self.sequences[other].age < age);
        assert!(self.running.remove(place) == index, "the sequence runs");
    }

    fn count_waiting(&mut self, index: u32, comes: bool) {
        let sequence = &self.sequences[index];
        let (tokens, new) = (u64::from(sequence.known()), u64::from(sequence.remaining()));
        if comes {
            self.waiting_tokens += tokens;
            self.waiting_new += new;
        } else {
            self.waiting_tokens -= tokens;
            self.waiting_new -= new;
        }
    }

    /// Gives back what a sequence that is over held, and forgets it.
    pub(super) fn forget(&mut self, index: u32, turn: &mut CommitTurn) {
        let mut sequence = self.sequences.remove(index);
        assert!(sequence.in_flight == 0, "a step in flight uses the blocks");
        release_blocks(turn.pages, self.lane, &mut sequence);
        if let Some(seat) = sequence.seat.take() {
            turn.seats.put_back(self.lane, seat);
        }
    }
}

/// Gives all blocks of a sequence back, the last first: of its cached blocks the end of the text
/// is evicted before the beginning, without which it could not be found.
fn release_blocks(pages: &mut Pages, lane: usize, sequence: &mut Sequence) {
    // What was to be copied may never have been.
    let copied = !release_source(pages, lane, sequence);
    let last = sequence.last_tokens();
    if copied && !last.is_empty() {
        let block = sequence.blocks[sequence.registered as usize];
        pages.register_part(lane, block, sequence.prefix, &last);
    }
    while let Some(block) = sequence.blocks.pop() {
        pages.release(lane, block);
    }
}

/// Gives back what a sequence's block is a copy of; false if there is nothing.
pub(super) fn release_source(pages: &mut Pages, lane: usize, sequence: &mut Sequence) -> bool {
    let source = sequence.source.take();
    if let Some(block) = source {
        pages.release(lane, block);
    }
    source.is_some()
}
