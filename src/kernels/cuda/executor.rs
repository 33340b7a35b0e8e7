//! Runs lowered programs: uploads a step's tables, launches the program, sends answers back. Two
//! steps may be on their way at once. In steady state a step allocates nothing, on neither side.
//! Knows rows and lanes by number, not requests.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::arguments as args;
use super::check::{Room, check};
use super::details::{DetailTables, SCORE_BYTES, read_scores, scored};
use super::graphs::{GRAPH_BYTES, Graphs};
use super::launches::{Call, Grid};
use super::lower::{LowerError, Lowered, Own, lower, room_for, workspace_bytes};
use super::places::Place;
use super::shared::{Shared, TABLE_BYTES};
use super::tables::{Counts, Tables, Work};
use crate::device::cuda::fault::{Fault, GpuError};
use crate::device::cuda::{Address, Gpu, GpuInfo, HostId, TimerId};
use crate::kernels::ops::Program;
use crate::request::Logprobs;
use crate::scheduler::step::MAX_SEATS;

/// Steps that can be on their way.
pub const DEPTH: usize = 2;

/// A step that has not ended after this long never will.
const PATIENCE: Duration = Duration::from_secs(20);

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
    /// One for each detail that asks for them.
    pub logprobs: Vec<Logprobs>,
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
    device: Shared,
    lanes: Vec<Option<Lane>>,
    slots: [Slot; DEPTH],
    pending: VecDeque<usize>,
    tables: Tables,
    details: DetailTables,
}

/// What is launched before a step's rows where there is anything of it.
#[derive(Debug)]
struct Prepare {
    take_in: Call,
    copy_blocks: Call,
}

#[derive(Debug)]
struct Lane {
    lowered: Lowered,
    prepare: Prepare,
    room: Room,
    graphs: Graphs,
    /// Where details go.
    details: Address,
}

/// What a step on its way needs for itself.
#[derive(Debug)]
struct Slot {
    tables: HostId,
    details: Pinned,
    /// Tokens, or vectors.
    answers: Pinned,
    /// Last hidden states.
    states: Pinned,
    scores: HostId,
    timer: TimerId,
    expected: Expected,
}

/// Host memory that grows while models are loaded. What was too small stays reserved: a matter of
/// kilobytes.
#[derive(Debug, Clone, Copy)]
struct Pinned {
    host: HostId,
    bytes: usize,
}

/// What is on its way.
#[derive(Debug)]
struct Expected {
    /// Where answers and states come to: a model that is installed meanwhile may need larger ones.
    hosts: [HostId; 2],
    tokens: usize,
    scores: usize,
    /// Vectors of one value a place.
    sources: Vec<Source>,
    /// Values of a vector, and of a state.
    widths: [usize; 2],
}

/// Where a span's vector comes from.
#[derive(Debug)]
enum Source {
    /// This one of the answers.
    Answer(usize),
    /// These of the states.
    States(Range<usize>),
}

impl Pinned {
    fn new(gpu: &mut dyn Gpu, bytes: usize) -> Result<Self, GpuError> {
        Ok(Self { host: gpu.host_memory(bytes)?, bytes })
    }

    fn make_room(&mut self, gpu: &mut dyn Gpu, bytes: usize) -> Result<(), GpuError> {
        if self.bytes < bytes {
            *self = Self::new(gpu, bytes)?;
        }
        Ok(())
    }
}

impl Slot {
    fn new(gpu: &mut dyn Gpu) -> Result<Self, GpuError> {
        let (answers, states) = (Pinned::new(gpu, MAX_SEATS * 4)?, Pinned::new(gpu, 0)?);
        let hosts = [answers.host, states.host];
        Ok(Self {
            tables: gpu.host_memory(TABLE_BYTES)?,
            details: Pinned::new(gpu, 0)?,
            answers,
            states,
            scores: gpu.host_memory(MAX_SEATS * SCORE_BYTES)?,
            timer: gpu.timer()?,
            expected: Expected { hosts, tokens: 0, scores: 0, sources: Vec::new(), widths: [0; 2] },
        })
    }
}

impl Executor {
    /// Reserves the KV region and what steps share.
    ///
    /// # Errors
    /// There is too little memory, or the device failed.
    pub fn new(mut gpu: Box<dyn Gpu>, options: Options) -> Result<Self, GpuError> {
        let device = Shared::reserve(&mut *gpu, options)?;
        let slots = [Slot::new(&mut *gpu)?, Slot::new(&mut *gpu)?];
        let lanes = (0..options.lanes).map(|_| None).collect();
        let pending = VecDeque::with_capacity(DEPTH);
        let (tables, details) = (Tables::default(), DetailTables::default());
        Ok(Self { gpu, options, device, lanes, slots, pending, tables, details })
    }

    /// What the device is.
    pub fn info(&self) -> &GpuInfo {
        self.gpu.info()
    }

    /// Bytes that all programs share on such a device, the KV region apart.
    pub fn shared_bytes(info: &GpuInfo) -> u64 {
        Shared::bytes(info) as u64
    }

    /// Bytes that a program takes on the device, weights apart.
    pub fn workspace_bytes(program: &Program) -> u64 {
        let graphs = if program.kv.is_some() { GRAPH_BYTES } else { 0 };
        workspace_bytes(program) as u64 + graphs
    }

    /// Uploads a program, in place of the lane's last one, if any; returns the bytes of device
    /// memory that it takes.
    ///
    /// # Errors
    /// There is no kernel for something, or too little memory: nothing is kept then.
    pub fn install(&mut self, lane: usize, program: &Program) -> Result<usize, LowerError> {
        self.uninstall(lane)?;
        let Options { pages, page_bytes, .. } = self.options;
        let shape = program.kv.unwrap_or_default();
        let layers = shape.layers as u32;
        let room = Room {
            places: pages + layers,
            pages,
            layers,
            slots: page_bytes.checked_div(shape.block_bytes()).unwrap_or(0) as u32,
            details: program.kv.map_or(0, |_| room_for(program)),
        };
        let mut held = Vec::new();
        let lowered = self.lower(program, room, &mut held);
        let (mut lowered, prepare, details) = match lowered {
            Ok(lowered) => lowered,
            Err(error) => {
                for address in held {
                    self.gpu.release(address)?;
                }
                return Err(error);
            }
        };
        lowered.uploads.reserved.extend(held);
        let bytes = lowered.uploads.bytes + room.places as usize * 8 + room.details;
        let graphs = Graphs::default();
        self.lanes[lane] = Some(Lane { lowered, prepare, room, graphs, details });
        Ok(bytes)
    }

    /// Gives back what a lane's program took: two copies might not fit.
    fn uninstall(&mut self, lane: usize) -> Result<(), GpuError> {
        let Some(Lane { lowered, graphs, .. }) = self.lanes[lane].take() else { return Ok(()) };
        graphs.release(&mut *self.gpu)?;
        for address in lowered.uploads.reserved {
            self.gpu.release(address)?;
        }
        Ok(())
    }

    /// Lowers a program; what is reserved beside its own memory goes into `held`.
    fn lower(
        &mut self,
        program: &Program,
        room: Room,
        held: &mut Vec<Address>,
    ) -> Result<(Lowered, Prepare, Address), LowerError> {
        let gpu = &mut *self.gpu;
        let mut reserve = |bytes: usize| -> Result<Address, GpuError> {
            let address = gpu.reserve(bytes)?;
            held.push(address);
            Ok(address)
        };
        let (pages, details) = (reserve(room.places as usize * 8)?, reserve(room.details)?);
        let Shared { step, kv, .. } = self.device;
        let page_bytes = self.options.page_bytes as u64;
        let arguments = args::TakeIn { step: step.0, pages: pages.0, page_bytes };
        let take_in = Call::plain(gpu, ("take_in", 256, 0), Grid::Loans, &arguments)?;
        let layers = room.layers;
        let arguments = args::CopyBlocks {
            step: step.0,
            region: kv.0,
            pages: pages.0,
            layers,
            block_bytes: program.kv.unwrap_or_default().block_bytes() as u32,
        };
        let grid = Grid::Copies { layers };
        let copy_blocks = Call::plain(gpu, ("copy_blocks", 256, 0), grid, &arguments)?;
        for slot in &mut self.slots {
            slot.details.make_room(gpu, room.details)?;
            if let (None, Some(output)) = (program.kv, program.output) {
                slot.answers.make_room(gpu, program.gathered_max * output.width * 4)?;
            }
            if let Some(hidden) = program.hidden {
                slot.states.make_room(gpu, program.rows_max * hidden.width * 4)?;
            }
        }
        let prepare = Prepare { take_in, copy_blocks };
        let own = Own { pages, details };
        Ok((lower(program, gpu, self.device, own)?, prepare, details))
    }

    /// Records the lane's decode steps as graphs. Until then, and for all other steps, launches
    /// are given one by one.
    ///
    /// # Errors
    /// The device failed.
    pub fn record(&mut self, lane: usize) -> Result<usize, GpuError> {
        let Some(Lane { lowered, graphs, .. }) = &mut self.lanes[lane] else { return Ok(0) };
        graphs.record(lowered, &mut *self.gpu)?;
        Ok(graphs.len())
    }

    /// Starts a step of `lane`. At most [`DEPTH`] can be uncollected.
    ///
    /// # Errors
    /// The step does not fit, or the device failed; nothing is to be collected then.
    pub fn submit(&mut self, lane: usize, work: &Work) -> Result<(), RunError> {
        let index = (0..DEPTH).find(|slot| !self.pending.contains(slot));
        let index = index.ok_or_else(|| RunError::Work("too many steps at once".into()))?;
        let Some(lane) = &self.lanes[lane] else {
            return Err(RunError::Work(format!("lane {lane} has no model yet")));
        };
        let Lane { lowered, prepare, room, graphs, details } = lane;
        check(work, lowered, room).map_err(RunError::Work)?;
        let (gpu, device, slot) = (&mut *self.gpu, &self.device, &mut self.slots[index]);
        let (tables, counts) = self.tables.fill(work, lowered.tiling, device.step);
        if tables.len() > TABLE_BYTES {
            let bytes = tables.len();
            let message = format!("a step with {bytes} bytes of tables, {TABLE_BYTES} fit");
            return Err(RunError::Work(message));
        }
        gpu.host(slot.tables)?[..tables.len()].copy_from_slice(tables);
        gpu.start_timer(slot.timer)?;
        gpu.copy_in(slot.tables, tables.len(), device.step)?;
        prepare.take_in.launch(gpu, &counts)?;
        prepare.copy_blocks.launch(gpu, &counts)?;
        match graphs.of(&counts, lowered) {
            Some(graph) => gpu.replay(graph)?,
            None => lowered.launch(gpu, &counts)?,
        }
        slot.expect(work, lowered);
        if let Some(choose) = &lowered.choose {
            let mut from = 0;
            // Nearly always none, else one round: the room is for a whole context.
            while from < work.details.len() {
                let (bytes, count) = self.details.fill(work, from, (*details, room.details));
                gpu.host(slot.details.host)?[..bytes.len()].copy_from_slice(bytes);
                gpu.copy_in(slot.details.host, bytes.len(), *details)?;
                let counts = Counts { details: count as u32, ..counts };
                choose.refine.launch(gpu, &counts)?;
                from += count;
            }
        }
        slot.fetch(work, lowered, device, gpu)?;
        gpu.stop_timer(slot.timer)?;
        self.pending.push_back(index);
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
        let Slot { scores, timer, expected, .. } = &self.slots[slot];
        let [host, states] = expected.hosts;
        let gpu = &mut *self.gpu;
        answers.elapsed = gpu.await_timer(*timer, PATIENCE)?;
        let words = gpu.host(host)?.as_chunks::<4>().0;
        answers.tokens.clear();
        let tokens = words[..expected.tokens].iter();
        answers.tokens.extend(tokens.map(|word| u32::from_le_bytes(*word)));
        answers.vectors.clear();
        let floats = |words: &[[u8; 4]]| -> Vec<f32> {
            words.iter().map(|word| f32::from_le_bytes(*word)).collect()
        };
        let [width, state_width] = expected.widths;
        for source in &expected.sources {
            let vector = match source {
                Source::Answer(place) => {
                    let words = gpu.host(host)?.as_chunks::<4>().0;
                    floats(&words[place * width..][..width])
                }
                Source::States(rows) => {
                    let words = gpu.host(states)?.as_chunks::<4>().0;
                    floats(&words[rows.start * state_width..rows.end * state_width])
                }
            };
            answers.vectors.push(vector);
        }
        answers.logprobs.clear();
        let bytes = &gpu.host(*scores)?[..expected.scores * SCORE_BYTES];
        answers.logprobs.extend(read_scores(bytes));
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

    /// Bytes of memory that nobody uses.
    #[cfg(test)]
    pub(crate) fn free_bytes(&mut self) -> u64 {
        self.gpu.free_bytes().expect("the device works")
    }

    /// Lets fewer details go to the device at a time.
    #[cfg(test)]
    pub(super) fn narrow_details(&mut self, lane: usize, room: usize) {
        self.lanes[lane].as_mut().expect("installed").room.details = room;
    }

    /// Overwrites the KV region.
    #[cfg(test)]
    pub(super) fn fill_kv(&mut self, bytes: &[u8]) {
        self.gpu.upload(self.device.kv, bytes).expect("the device works");
    }
}

impl Slot {
    /// Notes what comes back of a step.
    fn expect(&mut self, work: &Work, lowered: &Lowered) {
        let Expected { hosts, tokens, scores, sources, widths } = &mut self.expected;
        *hosts = [self.answers.host, self.states.host];
        sources.clear();
        (*tokens, *scores) = (work.draws.len(), scored(&work.details));
        *widths = [lowered.output.width, lowered.hidden.map_or(0, |hidden| hidden.width)];
        if lowered.choose.is_some() {
            return;
        }
        let first = first_state(work);
        let mut states = work.states.iter().peekable();
        sources.extend(work.batch.spans.iter().enumerate().map(|(index, span)| {
            match states.next_if(|of| **of as usize == index) {
                Some(_) => {
                    Source::States(span.rows.start as usize - first..span.rows.end as usize - first)
                }
                None => Source::Answer(index),
            }
        }));
    }

    /// Starts to copy answers back.
    fn fetch(
        &self,
        work: &Work,
        lowered: &Lowered,
        device: &Shared,
        gpu: &mut dyn Gpu,
    ) -> Result<(), GpuError> {
        let Expected { hosts, tokens, scores, sources, widths: [width, _] } = &self.expected;
        let [answers, states] = *hosts;
        if lowered.choose.is_some() {
            gpu.copy_out(device.tokens, answers, tokens * 4)?;
        } else if sources.len() > work.states.len() {
            let from = Address(lowered.output.view.data);
            gpu.copy_out(from, answers, sources.len() * width * 4)?;
        }
        if let (Some(Place { view, width, .. }), Some(last)) = (lowered.hidden, work.states.last())
        {
            // With the rows between them: spans that ask for states stand together as a rule.
            let first = first_state(work);
            let rows = work.batch.spans[*last as usize].rows.end as usize - first;
            let from = Address(view.data).plus(first * width * 4);
            gpu.copy_out(from, states, rows * width * 4)?;
        }
        if *scores > 0 {
            gpu.copy_out(device.scores, self.scores, scores * SCORE_BYTES)?;
        }
        Ok(())
    }
}

/// The first row whose state is an answer.
fn first_state(work: &Work) -> usize {
    let first = work.states.first();
    first.map_or(0, |span| work.batch.spans[*span as usize].rows.start as usize)
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
