//! Runs lowered programs: uploads a step's tables, launches the program, sends answers back. Two
//! steps may be on their way at once. In steady state a step allocates nothing, on neither side.
//! Knows rows and lanes by number, not requests.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::arguments as args;
use super::launches::{Call, Grid};
use super::lower::{LowerError, Lowered, Shared, lower, workspace_bytes};
use super::tables::{Counts, Tables, Work};
use crate::device::cuda::fault::{Fault, GpuError};
use crate::device::cuda::{Address, Gpu, GpuInfo, GraphId, HostId, TimerId};
use crate::kernels::ops::Program;
use crate::scheduler::step::MAX_SEATS;

/// Steps that can be on their way.
pub const DEPTH: usize = 2;

/// Bytes of a step's tables: rows take some 40 bytes each, KV blocks 8, so this is room for half
/// a million blocks.
const TABLE_BYTES: usize = 4 << 20;

/// A step that has not ended after this long never will.
const PATIENCE: Duration = Duration::from_secs(20);

/// Numbers of rows that decode steps are padded to when they run as a graph.
const BUCKETS: [u32; 16] =
    [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, MAX_SEATS as u32];

/// Numbers of splits that graphs are recorded for.
const SPLITS: [u32; 3] = [1, 4, 16];

/// How the device is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Super-pages of the KV region.
    pub pages: u32,
    /// Bytes of each.
    pub page_bytes: usize,
    /// Lanes.
    pub lanes: usize,
    /// A row's bits do not depend on its company: products of many rows are slower.
    pub deterministic: bool,
}

/// What a step gave.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    /// Device time.
    pub elapsed: Duration,
    /// One a draw.
    pub tokens: Vec<u32>,
    /// One a span, for encoders.
    pub vectors: Vec<Vec<f32>>,
}

/// A step that was not, or not wholly, run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// It does not fit the program.
    #[error("{0}")]
    Work(String),
    /// The device failed; it may be lost ([`Fault::is_sticky`]).
    #[error(transparent)]
    Device(#[from] GpuError),
}

/// Runs programs on a GPU.
#[derive(Debug)]
pub struct Executor {
    gpu: Box<dyn Gpu>,
    options: Options,
    step: Address,
    kv: Address,
    seats: Address,
    tokens: Address,
    lanes: Vec<Option<Lane>>,
    slots: [Slot; DEPTH],
    pending: VecDeque<usize>,
    tables: Tables,
}

#[derive(Debug)]
struct Lane {
    lowered: Lowered,
    take_in: Call,
    /// Entries of its table of pages.
    places: u32,
    graphs: HashMap<Counts, GraphId>,
}

#[derive(Debug)]
struct Slot {
    tables: HostId,
    answers: HostId,
    answer_bytes: usize,
    timer: TimerId,
    /// Tokens, or vectors and their width, that are on their way.
    expected: Expected,
}

#[derive(Debug, Clone, Copy, Default)]
struct Expected {
    tokens: usize,
    vectors: usize,
    width: usize,
}

impl Executor {
    /// Reserves the KV region and what steps share.
    ///
    /// # Errors
    /// There is too little memory, or the device failed.
    pub fn new(mut gpu: Box<dyn Gpu>, options: Options) -> Result<Self, GpuError> {
        let step = gpu.reserve(TABLE_BYTES)?;
        let kv = gpu.reserve((options.pages as usize * options.page_bytes).max(256))?;
        let seats = gpu.reserve(MAX_SEATS * 4)?;
        let tokens = gpu.reserve(MAX_SEATS * 4)?;
        let answer_bytes = MAX_SEATS * 4;
        let mut slot = || -> Result<Slot, GpuError> {
            Ok(Slot {
                tables: gpu.host_memory(TABLE_BYTES)?,
                answers: gpu.host_memory(answer_bytes)?,
                answer_bytes,
                timer: gpu.timer()?,
                expected: Expected::default(),
            })
        };
        let slots = [slot()?, slot()?];
        let lanes = (0..options.lanes).map(|_| None).collect();
        let (pending, tables) = (VecDeque::new(), Tables::default());
        Ok(Self { gpu, options, step, kv, seats, tokens, lanes, slots, pending, tables })
    }

    /// What the device is.
    pub fn info(&self) -> &GpuInfo {
        self.gpu.info()
    }

    /// Bytes that a program's rows take on the device, weights and attention's scratch apart.
    pub fn workspace_bytes(program: &Program) -> usize {
        workspace_bytes(program)
    }

    /// Uploads a program; returns the bytes of device memory that it takes.
    ///
    /// # Errors
    /// There is no kernel for something, or too little memory: nothing is kept then.
    pub fn install(&mut self, lane: usize, program: &Program) -> Result<usize, LowerError> {
        let layers = program.kv.map_or(0, |kv| kv.layers);
        let places = self.options.pages as usize + layers;
        let pages = self.gpu.reserve(places * 8)?;
        let shared = Shared {
            step: self.step,
            kv: self.kv,
            seats: self.seats,
            pages,
            tokens: self.tokens,
            deterministic: self.options.deterministic,
        };
        let mut lowered = match lower(program, &mut *self.gpu, shared) {
            Ok(lowered) => lowered,
            Err(error) => {
                self.gpu.release(pages)?;
                return Err(error);
            }
        };
        lowered.uploads.reserved.push(pages);
        let page_bytes = self.options.page_bytes as u64;
        let arguments = args::TakeIn { step: self.step.0, pages: pages.0, page_bytes };
        let take_in = Call::plain(&mut *self.gpu, ("take_in", 256, 0), Grid::Loans, &arguments)?;
        if lowered.sample.is_none() {
            self.make_room(program.gathered_max * lowered.output.width * 4)?;
        }
        let bytes = lowered.uploads.bytes + places * 8;
        let lane = &mut self.lanes[lane];
        if let Some(old) = lane.take() {
            for address in old.lowered.uploads.reserved {
                self.gpu.release(address)?;
            }
        }
        let places = places as u32;
        *lane = Some(Lane { lowered, take_in, places, graphs: HashMap::new() });
        Ok(bytes)
    }

    /// Lets answers of `bytes` go through. What was too small stays reserved: a matter of
    /// kilobytes, while a model is loaded.
    fn make_room(&mut self, bytes: usize) -> Result<(), GpuError> {
        for slot in &mut self.slots {
            if slot.answer_bytes < bytes {
                slot.answers = self.gpu.host_memory(bytes)?;
                slot.answer_bytes = bytes;
            }
        }
        Ok(())
    }

    /// Records the lane's decode steps as graphs. Until then, and for all other steps, launches
    /// are given one by one.
    ///
    /// # Errors
    /// The device failed.
    pub fn record(&mut self, lane: usize) -> Result<usize, GpuError> {
        let Some(Lane { lowered, graphs, .. }) = &mut self.lanes[lane] else { return Ok(0) };
        if lowered.sample.is_none() {
            return Ok(0);
        }
        let most = lowered.gathered_max as u32;
        for rows in BUCKETS.into_iter().filter(|rows| bucket(&BUCKETS, most) >= Some(*rows)) {
            for splits in SPLITS {
                let counts = decode_counts(rows, splits, lowered);
                self.gpu.begin_graph()?;
                let launched = launch(lowered, &mut *self.gpu, &counts);
                let graph = self.gpu.end_graph();
                launched?;
                graphs.insert(counts, graph?);
            }
        }
        Ok(graphs.len())
    }

    /// Starts a step of `lane`. At most [`DEPTH`] can be uncollected.
    ///
    /// # Errors
    /// The step does not fit, or the device failed; nothing is to be collected then.
    pub fn submit(&mut self, lane: usize, work: &Work) -> Result<(), RunError> {
        let slot = (0..DEPTH).find(|slot| !self.pending.contains(slot));
        let slot = slot.ok_or_else(|| RunError::Work("too many steps at once".into()))?;
        let Some(Lane { lowered, take_in, places, graphs }) = &self.lanes[lane] else {
            return Err(RunError::Work(format!("lane {lane} has no model yet")));
        };
        check(work, lowered, (*places, self.options.pages)).map_err(RunError::Work)?;
        let gpu = &mut *self.gpu;
        let (tables, counts) = self.tables.fill(work, lowered.tiling, self.step);
        if tables.len() > TABLE_BYTES {
            let bytes = tables.len();
            let message = format!("a step with {bytes} bytes of tables, {TABLE_BYTES} fit");
            return Err(RunError::Work(message));
        }
        let Slot { tables: host, answers, timer, expected, .. } = &mut self.slots[slot];
        gpu.host(*host)?[..tables.len()].copy_from_slice(tables);
        gpu.start_timer(*timer)?;
        gpu.copy_in(*host, tables.len(), self.step)?;
        take_in.launch(gpu, &counts)?;
        match decode_key(&counts, lowered).and_then(|key| graphs.get(&key)) {
            Some(graph) => gpu.replay(*graph)?,
            None => launch(lowered, gpu, &counts)?,
        }
        *expected = Expected::default();
        if lowered.sample.is_some() {
            expected.tokens = work.draws.len();
            gpu.copy_out(self.tokens, *answers, expected.tokens * 4)?;
        } else {
            (expected.vectors, expected.width) = (work.batch.spans.len(), lowered.output.width);
            let from = Address(lowered.output.view.data);
            gpu.copy_out(from, *answers, expected.vectors * expected.width * 4)?;
        }
        gpu.stop_timer(*timer)?;
        self.pending.push_back(slot);
        Ok(())
    }

    /// Waits for the oldest step and fills `answers`.
    ///
    /// # Errors
    /// The device failed, or does not finish.
    ///
    /// # Panics
    /// If nothing was submitted.
    pub fn collect(&mut self, answers: &mut Answers) -> Result<(), RunError> {
        let slot = self.pending.pop_front().expect("collect follows submit");
        let Slot { answers: host, timer, expected, .. } = &self.slots[slot];
        answers.elapsed = self.gpu.await_timer(*timer, PATIENCE)?;
        let bytes = self.gpu.host(*host)?;
        let words = |count: usize| bytes[..count * 4].as_chunks::<4>().0.iter();
        answers.tokens.clear();
        answers.tokens.extend(words(expected.tokens).map(|word| u32::from_le_bytes(*word)));
        answers.vectors.clear();
        if expected.width > 0 {
            let values: Vec<f32> = words(expected.vectors * expected.width)
                .map(|word| f32::from_le_bytes(*word))
                .collect();
            answers.vectors.extend(values.chunks_exact(expected.width).map(<[f32]>::to_vec));
        }
        Ok(())
    }

    /// The logits, or vectors, of the last step: `rows` of them. Waits for all work.
    ///
    /// # Errors
    /// The device failed.
    pub fn output(&mut self, lane: usize, rows: usize) -> Result<Vec<f32>, GpuError> {
        let Some(Lane { lowered, .. }) = &self.lanes[lane] else { return Ok(Vec::new()) };
        let mut bytes = vec![0; rows * lowered.output.width * 4];
        self.gpu.download(Address(lowered.output.view.data), &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect())
    }

    /// Overwrites the KV region.
    #[cfg(test)]
    pub(super) fn fill_kv(&mut self, bytes: &[u8]) {
        self.gpu.upload(self.kv, bytes).expect("the device works");
    }
}

impl RunError {
    /// Whether the device is lost.
    pub fn is_sticky(&self) -> bool {
        matches!(self, RunError::Device(error) if error.fault.is_sticky())
    }

    /// What kind of failure of the device it is.
    pub fn fault(&self) -> Option<Fault> {
        match self {
            RunError::Work(_) => None,
            RunError::Device(error) => Some(error.fault),
        }
    }
}

/// Gives all launches of a step.
fn launch(lowered: &Lowered, gpu: &mut dyn Gpu, counts: &Counts) -> Result<(), GpuError> {
    for call in lowered.calls.iter().chain(&lowered.sample) {
        call.launch(gpu, counts)?;
    }
    Ok(())
}

/// The smallest of `sizes` that holds `count`.
fn bucket(sizes: &[u32], count: u32) -> Option<u32> {
    sizes.iter().copied().find(|size| *size >= count)
}

/// A decode step of `rows` rows.
fn decode_counts(rows: u32, splits: u32, lowered: &Lowered) -> Counts {
    let small_tiles = rows * lowered.tiling.group.div_ceil(16) as u32;
    Counts {
        rows,
        gathered: rows,
        spans: rows,
        draws: rows,
        small_tiles,
        large_tiles: 0,
        splits,
        loans: 0,
    }
}

/// The graph that a step of this size can run as: kernels read the true counts from the tables,
/// so a larger grid does no harm. None unless every row is a sequence's next.
fn decode_key(counts: &Counts, lowered: &Lowered) -> Option<Counts> {
    let rows = counts.rows;
    let decode = [counts.gathered, counts.spans, counts.draws] == [rows; 3];
    if !decode || counts.large_tiles > 0 {
        return None;
    }
    let (rows, splits) = (bucket(&BUCKETS, rows)?, bucket(&SPLITS, counts.splits)?);
    Some(decode_counts(rows, splits, lowered))
}

/// Whether the step fits the program: kernels trust their tables.
fn check(work: &Work, lowered: &Lowered, (places, pages): (u32, u32)) -> Result<(), String> {
    let batch = &work.batch;
    let rows = batch.tokens.len();
    if batch.positions.len() != rows || batch.span_of.len() != rows {
        let (positions, spans) = (batch.positions.len(), batch.span_of.len());
        return Err(format!("{rows} tokens, {positions} positions, {spans} span numbers"));
    }
    if rows > lowered.rows_max {
        return Err(format!("{rows} rows, the workspace is for {}", lowered.rows_max));
    }
    let vectors = if lowered.sample.is_some() { 0 } else { batch.spans.len() };
    let answers = batch.gather.len().max(vectors);
    if answers > lowered.gathered_max || work.draws.len() > answers.min(MAX_SEATS) {
        let (most, draws) = (lowered.gathered_max, work.draws.len());
        return Err(format!("{answers} answers and {draws} draws, the limit is {most}"));
    }
    let positions = lowered.positions;
    if let Some(position) = batch.positions.iter().find(|position| **position >= positions) {
        return Err(format!("position {position}, the model has {positions}"));
    }
    let mut next = 0;
    for (index, span) in batch.spans.iter().enumerate() {
        let (first, end) = (span.rows.start as usize, span.rows.end as usize);
        let whole = first == next && first < end && end <= rows;
        if !whole || batch.span_of[first..end].iter().any(|of| *of as usize != index) {
            return Err(format!("span {index} does not tile the rows"));
        }
        let seen = span.start as usize + end - first;
        let blocks = span.blocks.len() * crate::scheduler::step::BLOCK_TOKENS;
        let there = span.blocks.end as usize <= batch.blocks.len();
        if lowered.tiling.paged && (blocks < seen || !there) {
            return Err(format!("span {index} has {blocks} positions of KV, {seen} are needed"));
        }
        next = end;
    }
    let outside = batch.gather.iter().any(|row| *row as usize >= rows)
        || work.draws.iter().any(|draw| draw.row as usize >= batch.gather.len())
        || work.draws.iter().any(|draw| draw.seat as usize >= MAX_SEATS)
        || work.loans.iter().any(|loan| loan.place >= places || loan.page >= pages);
    if next != rows || outside {
        return Err("the step's tables contradict each other".into());
    }
    Ok(())
}
