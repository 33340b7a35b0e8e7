//! Runs programs on a team: every member walks the ops in lockstep and claims units of each. Knows
//! no model and no scheduler.

#![allow(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use super::attention::{packed::PackedTask, paged::PagedTask};
use super::halves::{ConvertTask, HalfLinearTask};
use super::head_norm::HeadNormTask;
use super::isa::{Set, SetKind, Task};
use super::linear::LinearTask;
use super::rescore::RescoreTask;
use super::rope::{RopeStoreTask, RopeTask};
use super::rows::{EmbedTask, GatedSiluTask, GatherTask, NormTask, PoolTask};
use super::views::Memory;
use crate::device::arena::Region;
use crate::device::threads::{Aborted, Member, Panicked, Team};
use crate::kernels::batch::{Batch, KvMap};
use crate::kernels::ops::{Buf, Op, Program, Rows};
use crate::kernels::sample::Sampler;
use crate::kernels::sample::adjust::Past;
use crate::request::{Detail, Logprobs, Sampling, TokenId};

/// Nanoseconds of work below which an op is left to one member: what a barrier with all of them
/// costs, a few times over.
const ALONE_BELOW_NANOS: usize = 2_000;

/// Claims that a member makes of an op, on average: enough that the last one, which the others wait
/// for, is a small part, and few enough to cost nothing.
const CLAIMS: usize = 16;

/// Runs programs on a team of threads.
#[derive(Debug)]
pub struct Executor {
    team: Team,
    set: Set,
    /// One a member.
    samplers: Vec<Mutex<Sampler>>,
}

/// One token to be chosen from a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Which row of the logits.
    pub row: usize,
    /// How.
    pub sampling: Sampling,
    /// Position of the new token in its sequence.
    pub position: u32,
}

/// A draw that was asked for in more detail.
#[derive(Debug, Clone, Copy)]
pub struct Refine<'a> {
    /// The draw.
    pub draw: Draw,
    /// What else.
    pub detail: &'a Detail,
    /// What the penalties look at.
    pub past: Past<'a>,
    /// The token that was drawn without adjustment.
    pub plain: TokenId,
}

/// What a [`Refine`] gives.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Refined {
    /// The token, adjusted or else the plain one.
    pub token: TokenId,
    /// If they were asked for.
    pub logprobs: Option<Logprobs>,
}

/// A program that was not, or not wholly, executed; KV blocks and workspace rows that this step
/// writes hold anything. The executor stays usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExecuteError {
    /// The step does not fit the program.
    #[error("{0}")]
    Batch(String),
    /// A kernel found something out of place: a defect of whoever made program, batch or map.
    #[error("a kernel failed: {0}")]
    Kernel(#[from] Panicked),
}

impl Executor {
    /// An executor with the instructions of `set`; [`SetKind::detect`] names the fastest.
    ///
    /// # Panics
    /// If this processor does not run `set`.
    pub fn new(team: Team, set: SetKind) -> Self {
        let sampler = || Mutex::new(Sampler::new(set, 0));
        let samplers = std::iter::repeat_with(sampler).take(team.threads()).collect();
        let set = Set::new(set).unwrap_or_else(|| panic!("no {} here", set.as_str()));
        Self { team, set, samplers }
    }

    /// The instructions in use.
    pub fn set(&self) -> SetKind {
        self.set.kind()
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// Runs one step of `program`. Its input is `batch`; `map` says where in `kv` blocks lie (both
    /// may be empty for encoders); everything between ops is in `workspace`, and so is the result:
    /// read it with `program.output` and [`Buf::row`](crate::kernels::ops::Buf::row).
    ///
    /// # Errors
    /// The batch is larger than the program's workspace or contradicts itself, or a kernel
    /// panicked (a token, position or block that is out of range).
    pub fn execute(
        &mut self,
        program: &Program,
        batch: &Batch,
        map: &KvMap,
        kv: &mut Region,
        workspace: &mut Region,
    ) -> Result<(), ExecuteError> {
        check(program, batch).map_err(ExecuteError::Batch)?;
        copy_blocks(program, batch, map, kv).map_err(ExecuteError::Batch)?;
        let load = Load::of(batch);
        let shared = program.ops.iter().any(|op| load.nanos(op) >= ALONE_BELOW_NANOS);
        // SAFETY: both regions are borrowed until all members have left the job.
        let (kv, workspace) = unsafe { (Memory::new(kv), Memory::new(workspace)) };
        let set = self.set;
        let job = |member: &Member<'_>| {
            let members = member.members();
            let around = Surroundings { batch, map, kv, workspace, members };
            Walk { set, member, around, load }.run(program)
        };
        if shared {
            self.team.run(&job)?
        } else {
            self.team.run_alone(&job)?
        }
        Ok(())
    }

    /// Chooses a token for each of `draws` from rows of `logits`, into the same place of `tokens`.
    /// Allocates for the first row of a larger vocabulary than before only.
    ///
    /// # Errors
    /// A row is not in the workspace.
    ///
    /// # Panics
    /// If there are not as many `tokens` as `draws`.
    pub fn sample(
        &mut self,
        logits: &Buf,
        workspace: &Region,
        draws: &[Draw],
        tokens: &mut [TokenId],
    ) -> Result<(), ExecuteError> {
        assert_eq!(draws.len(), tokens.len(), "one token a draw");
        let (samplers, tokens) = (&self.samplers, Mutex::new(tokens));
        let job = |member: &Member<'_>| {
            let mut sampler =
                samplers[member.index()].lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(range) = member.claim(draws.len(), 1) {
                for index in range {
                    let Draw { row, sampling, position } = &draws[index];
                    let token = sampler.sample(logits.row(workspace, *row), sampling, *position);
                    tokens.lock().unwrap_or_else(PoisonError::into_inner)[index] = token;
                }
            }
            Ok(())
        };
        // About a nanosecond a logit; a single row is not divided.
        let shared = draws.len() > 1 && draws.len() * logits.width >= ALONE_BELOW_NANOS;
        if shared {
            self.team.run(&job)?
        } else {
            self.team.run_alone(&job)?
        }
        Ok(())
    }
}

impl Executor {
    /// Draws again what is to be adjusted, and computes log-probabilities, for each of `wanted`
    /// into the same place of `results`.
    ///
    /// # Errors
    /// A row is not in the workspace.
    ///
    /// # Panics
    /// If there are not as many `results` as `wanted`.
    pub fn refine(
        &mut self,
        logits: &Buf,
        workspace: &Region,
        wanted: &[Refine<'_>],
        results: &mut [Refined],
    ) -> Result<(), ExecuteError> {
        assert_eq!(wanted.len(), results.len(), "one result each");
        let (samplers, results) = (&self.samplers, Mutex::new(results));
        let job = |member: &Member<'_>| {
            let mut sampler =
                samplers[member.index()].lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(range) = member.claim(wanted.len(), 1) {
                for index in range {
                    let Refine { draw, detail, past, plain } = wanted[index];
                    let row = logits.row(workspace, draw.row);
                    let token = detail.adjustment.as_deref().map_or(plain, |adjustment| {
                        let how = (adjustment, past);
                        sampler.sample_adjusted(row, how, &draw.sampling, draw.position)
                    });
                    let logprobs = detail.logprobs.map(|top| sampler.logprobs(row, token, top));
                    let refined = Refined { token, logprobs };
                    results.lock().unwrap_or_else(PoisonError::into_inner)[index] = refined;
                }
            }
            Ok(())
        };
        if wanted.len() > 1 {
            self.team.run(&job)?
        } else {
            self.team.run_alone(&job)?
        }
        Ok(())
    }
}

/// What every op of a step sees.
#[derive(Clone, Copy)]
pub(super) struct Surroundings<'a> {
    pub(super) batch: &'a Batch,
    pub(super) map: &'a KvMap,
    pub(super) kv: Memory,
    pub(super) workspace: Memory,
    /// Members of the team that share the work.
    pub(super) members: usize,
}

impl Surroundings<'_> {
    /// Number of rows that an op works on.
    pub(super) fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::All => self.batch.tokens.len(),
            Rows::Gathered => self.batch.gather.len(),
        }
    }
}

/// One member's way through a program.
struct Walk<'a> {
    set: Set,
    member: &'a Member<'a>,
    around: Surroundings<'a>,
    load: Load,
}

impl Walk<'_> {
    fn run(&self, program: &Program) -> Result<(), Aborted> {
        let Batch { greedy, gather, .. } = self.around.batch;
        let coarse = program.coarse.as_ref().filter(|_| *greedy && !gather.is_empty());
        let Some(coarse) = coarse else { return self.ops(&program.ops) };
        self.ops(&program.ops[..program.ops.len() - 1])?;
        self.member.barrier()?;
        self.task(&LinearTask::new(&coarse.linear, &self.around), false);
        self.member.barrier()?;
        self.task(&RescoreTask::new(coarse, &self.around), false);
        Ok(())
    }

    /// Links are cut where members must wait for each other. What is too little to share is done
    /// by the member that comes to a barrier last, while the others wait there anyway.
    fn ops(&self, ops: &[Op]) -> Result<(), Aborted> {
        let mut rest = ops;
        while !rest.is_empty() {
            let small = rest.iter().take_while(|op| !self.is_shared(op)).count();
            let (alone, shared) = rest.split_at(small);
            let run_alone = || alone.iter().for_each(|op| self.op(op, true));
            if rest.len() < ops.len() {
                self.member.barrier_after(run_alone)?;
            } else if small > 0 {
                // At the start the caller is there and the others are still waking up.
                if self.member.index() == 0 {
                    run_alone();
                }
                self.member.barrier()?;
            }
            let chain = chain(shared);
            match &shared[..chain] {
                [] => {}
                [op] => self.op(op, false),
                ops => self.rows(ops),
            }
            rest = &shared[chain..];
        }
        Ok(())
    }

    fn is_shared(&self, op: &Op) -> bool {
        self.member.members() > 1 && self.load.nanos(op) >= ALONE_BELOW_NANOS
    }

    /// Takes ops of which a row depends on the same row only, row by row through all of them.
    fn rows(&self, ops: &[Op]) {
        let around = &self.around;
        let rows = by_row(&ops[0]).map_or(0, |rows| around.rows(rows));
        let chunk = rows.div_ceil(CLAIMS * self.member.members()).max(1);
        while let Some(range) = self.member.claim(rows, chunk) {
            for op in ops {
                let range = range.clone();
                match op {
                    Op::Embed(op) => self.set.run(&EmbedTask::new(op, around), range),
                    Op::Norm(op) => self.set.run(&NormTask::new(op, around), range),
                    Op::Convert(op) => self.set.run(&ConvertTask::new(op, around), range),
                    _ => unreachable!("`by_row` knows these"),
                }
            }
        }
    }

    fn op(&self, op: &Op, alone: bool) {
        let around = &self.around;
        match op {
            Op::Embed(op) => self.task(&EmbedTask::new(op, around), alone),
            Op::Norm(op) => self.task(&NormTask::new(op, around), alone),
            Op::Linear(op) => self.task(&LinearTask::new(op, around), alone),
            Op::HeadNorm(op) => self.task(&HeadNormTask::new(op, around), alone),
            Op::HalfLinear(op) => self.task(&HalfLinearTask::new(op, around), alone),
            Op::Convert(op) => self.task(&ConvertTask::new(op, around), alone),
            Op::RopeStore(op) => self.task(&RopeStoreTask::new(op, around), alone),
            Op::Rope(op) => self.task(&RopeTask::new(op, around), alone),
            Op::PagedAttention(op) => self.task(&PagedTask::new(op, around), alone),
            Op::PackedAttention(op) => self.task(&PackedTask::new(op, around), alone),
            Op::GatedSilu(op) => self.task(&GatedSiluTask::new(op, around), alone),
            Op::Gather(op) => self.task(&GatherTask::new(op, around), alone),
            Op::Pool(op) => self.task(&PoolTask::new(op, around), alone),
        }
    }

    fn task<T: Task>(&self, task: &T, alone: bool) {
        let units = task.units();
        if alone {
            return self.set.run(task, 0..units);
        }
        let chunk = units.div_ceil(CLAIMS * self.member.members()).max(1);
        while let Some(range) = self.member.claim(units, chunk) {
            self.set.run(task, range);
        }
    }
}

/// Number of ops from the first on that one member can take a row through without waiting.
fn chain(ops: &[Op]) -> usize {
    let Some(first) = ops.first() else { return 0 };
    let Some(rows) = by_row(first) else { return 1 };
    ops.iter().take_while(|op| by_row(op) == Some(rows)).count()
}

/// The rows of an op whose output rows depend on nothing but the same input row.
fn by_row(op: &Op) -> Option<Rows> {
    match op {
        Op::Embed(_) => Some(Rows::All),
        Op::Norm(op) => Some(op.rows),
        Op::Convert(op) => Some(op.rows),
        _ => None,
    }
}

/// What the cost of a step depends on.
#[derive(Clone, Copy)]
struct Load {
    rows: usize,
    gathered: usize,
    spans: usize,
    /// Positions that each row sees, summed up.
    seen: usize,
}

impl Load {
    fn of(batch: &Batch) -> Self {
        let seen = batch.spans.iter().map(|span| {
            let rows = span.rows.len();
            rows * (span.start as usize + rows)
        });
        Self {
            rows: batch.tokens.len(),
            gathered: batch.gather.len(),
            spans: batch.spans.len(),
            seen: seen.sum(),
        }
    }

    /// About how long one member takes for an op, give or take a factor of two (2 Zen 5 cores,
    /// 2026-11). Only decides whether others help.
    fn nanos(&self, op: &Op) -> usize {
        let rows = |rows| match rows {
            Rows::All => self.rows,
            Rows::Gathered => self.gathered,
        };
        match op {
            Op::Embed(op) => self.rows * op.output.width,
            Op::Norm(op) => rows(op.rows) * op.input.width / 8,
            Op::Linear(op) => {
                let products = rows(op.rows) * op.weight.n * op.weight.k;
                let read = if products == 0 { 0 } else { op.weight.bytes() };
                products / 100 + read / 20
            }
            Op::HalfLinear(op) => {
                let products = rows(op.rows) * op.weight.n * op.weight.k;
                let read = if products == 0 { 0 } else { op.weight.bytes() };
                products / 150 + read / 20
            }
            Op::Convert(op) => rows(op.rows) * op.input.width / 16,
            Op::HeadNorm(op) => self.rows * op.qkv.width / 8,
            Op::RopeStore(op) => self.rows * op.qkv.width / 2,
            Op::Rope(op) => self.rows * op.qkv.width / 4,
            Op::PagedAttention(op) => self.seen * op.output.width() / 16,
            Op::PackedAttention(op) => self.seen * op.output.width() / 16,
            Op::GatedSilu(op) => self.rows * op.output.width() / 4,
            Op::Gather(op) => self.gathered * op.output.width / 16,
            Op::Pool(op) => self.spans.max(self.rows) * op.output.width / 16,
        }
    }
}

/// Makes the batch's copies of blocks. Memory is copied faster than it is worth sharing: one block
/// of a small model is less than a megabyte.
fn copy_blocks(
    program: &Program,
    batch: &Batch,
    map: &KvMap,
    kv: &mut Region,
) -> Result<(), String> {
    let shape = program.kv.unwrap_or_default();
    let bytes = shape.block_bytes();
    for copy in &batch.copies {
        for layer in 0..shape.layers {
            let place =
                |block| map.start(layer, block, bytes).filter(|start| start + bytes <= kv.len());
            let [Some(from), Some(to)] = copy.map(place) else {
                return Err(format!("no blocks {copy:?} to copy"));
            };
            kv.as_bytes_mut().copy_within(from..from + bytes, to);
        }
    }
    Ok(())
}

/// Whether `batch` fits `program` and is whole; what only one op looks at is checked there.
fn check(program: &Program, batch: &Batch) -> Result<(), String> {
    let rows = batch.tokens.len();
    if batch.positions.len() != rows || batch.span_of.len() != rows {
        let (positions, spans) = (batch.positions.len(), batch.span_of.len());
        return Err(format!("{rows} tokens, {positions} positions, {spans} span numbers"));
    }
    if !batch.types.is_empty() && batch.types.len() != rows {
        return Err(format!("{rows} tokens, {} token types", batch.types.len()));
    }
    if rows > program.rows_max {
        return Err(format!("{rows} rows, the workspace is for {}", program.rows_max));
    }
    let gathered = batch.gather.len();
    if gathered > program.gathered_max {
        return Err(format!("{gathered} gathered rows, the limit is {}", program.gathered_max));
    }
    Ok(())
}
