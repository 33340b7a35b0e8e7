//! The CUDA kernels against f64 and against the CPU's reference set, on the emulator, or, with
//! `SCONCE_TEST_GPU=1` and the feature `cuda`, on the GPU of this machine.

mod attention;
mod generator;
mod products;
mod rows;
mod sample;

use super::emulator::Emulator;
use super::executor::{Answers, Executor, Options, RunError};
use super::tables::{Loan, SeatDraw, Work};
use crate::device::arena::Region;
use crate::device::cuda::Gpu;
use crate::device::threads::Team;
use crate::kernels::batch::{Batch, BatchSpan, KvMap};
use crate::kernels::cpu::executor::Executor as Reference;
use crate::kernels::cpu::isa::SetKind;
use crate::kernels::ops::Program;
use crate::kernels::packed::Packed;
use crate::request::Sampling;
use crate::scheduler::step::BLOCK_TOKENS;

/// Blocks of a super-page in these tests.
const BLOCKS_PER_PAGE: usize = 10;
/// Page groups of the lane, and one page that nobody has.
const GROUPS: usize = 3;

/// A small generator of test data (xorshift).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 33) as usize % end
    }

    /// Uniform in -1..1, exact in bf16.
    fn floats(&mut self, count: usize) -> Vec<f32> {
        let float = |bits: u64| {
            let x = (bits >> 40) as f32 / (1 << 23) as f32 - 1.0;
            half::bf16::from_f32(x).to_f32()
        };
        (0..count).map(|_| float(self.next())).collect()
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// A matrix of f32 values that bf16 holds exactly; `size` is a power of two.
fn dense(random: &mut Random, n: usize, k: usize, size: f32) -> std::sync::Arc<Packed> {
    let values = random.floats(n * k);
    let values: Vec<f32> = values.into_iter().map(|x| x * size).collect();
    Packed::from_f32(n, k, &values).unwrap().into()
}

fn on_gpu() -> bool {
    std::env::var_os("SCONCE_TEST_GPU").is_some()
}

/// The device of these tests.
fn gpu() -> Box<dyn Gpu> {
    if on_gpu() {
        return crate::device::cuda::open(super::IMAGE).expect("a GPU");
    }
    Box::new(Emulator::new())
}

/// A sequence's piece in a step: which one, from where, its tokens; whether it yields something.
#[derive(Clone)]
struct Piece {
    sequence: usize,
    start: usize,
    tokens: Vec<u32>,
    yields: bool,
}

/// The step of some pieces; a sequence has the same blocks wherever it appears.
fn work(pieces: &[Piece]) -> Work {
    let mut work = Work::default();
    let batch = &mut work.batch;
    for (index, piece) in pieces.iter().enumerate() {
        let first = batch.tokens.len() as u32;
        let rows = first..first + piece.tokens.len() as u32;
        let end = piece.start + piece.tokens.len();
        let blocks = batch.blocks.len() as u32;
        for block in 0..end.div_ceil(BLOCK_TOKENS) {
            let slot = piece.sequence + block / GROUPS * 2;
            batch.blocks.push(((block % GROUPS) as u32, slot as u32));
        }
        let blocks = blocks..batch.blocks.len() as u32;
        let start = piece.start as u32;
        batch.spans.push(BatchSpan { rows: rows.clone(), start, blocks });
        batch.tokens.extend(&piece.tokens);
        batch.positions.extend(start..end as u32);
        batch.span_of.extend(rows.clone().map(|_| index as u32));
        if piece.yields {
            let row = batch.gather.len() as u32;
            batch.gather.push(rows.end - 1);
            let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
            let (seat, position) = (piece.sequence as u32, end as u32);
            work.draws.push(SeatDraw { row, seat, position, sampling });
        }
    }
    work
}

/// One span after the other, all rows gathered; for programs without KV.
fn spans(lengths: &[usize], vocabulary: usize) -> Work {
    let mut random = Random::new(lengths.iter().sum::<usize>() as u64 + 77);
    let pieces = lengths.iter().enumerate().map(|(sequence, length)| Piece {
        sequence,
        start: 0,
        tokens: (0..*length).map(|_| random.below(vocabulary) as u32).collect(),
        yields: false,
    });
    let mut work = work(&pieces.collect::<Vec<_>>());
    work.batch.gather = (0..work.batch.tokens.len() as u32).collect();
    work
}

/// The same program on the reference and on the device, step by step.
struct Pair {
    program: Program,
    reference: Reference,
    map: KvMap,
    kv: Region,
    workspace: Region,
    device: Executor,
    loans: Vec<Loan>,
}

impl Pair {
    fn new(program: Program) -> Self {
        Self::with(program, gpu(), false)
    }

    fn with(program: Program, gpu: Box<dyn Gpu>, deterministic: bool) -> Self {
        let block = program.kv.map_or(64, |kv| kv.block_bytes());
        let layers = program.kv.map_or(0, |kv| kv.layers);
        let (pages, page_bytes) = (GROUPS * layers + 1, block * BLOCKS_PER_PAGE);
        // Pages of all groups and layers, shuffled over the region.
        let page = |place: usize| (place * 3 + 1) % pages;
        let offsets = (0..GROUPS * layers).map(|place| page(place) * page_bytes).collect();
        let loans = (0..GROUPS * layers)
            .map(|place| Loan { place: place as u32, page: page(place) as u32 })
            .collect();
        let options = Options { pages: pages as u32, page_bytes, lanes: 1, deterministic };
        let mut device = Executor::new(gpu, options).unwrap();
        device.install(0, &program).unwrap();
        let team = Team::new(1).unwrap();
        Self {
            reference: Reference::new(team, SetKind::detect()),
            map: KvMap { layers, offsets },
            kv: Region::new(pages * page_bytes).unwrap(),
            workspace: Region::new(program.workspace_bytes).unwrap(),
            device,
            loans,
            program,
        }
    }

    fn step(&mut self, work: &Work) -> Result<Answers, RunError> {
        let mut work = work.clone();
        work.loans = std::mem::take(&mut self.loans);
        self.device.submit(0, &work)?;
        let mut answers = Answers::default();
        self.device.collect(&mut answers)?;
        Ok(answers)
    }

    /// Runs a step on both; returns `rows` rows of output of each.
    fn both(&mut self, work: &Work, rows: usize) -> (Vec<f32>, Vec<f32>) {
        self.step(work).unwrap();
        let device = self.device.output(0, rows).unwrap();
        (device, self.expected(&work.batch, rows))
    }

    fn expected(&mut self, batch: &Batch, rows: usize) -> Vec<f32> {
        let Self { program, reference, map, kv, workspace, .. } = self;
        reference.execute(program, batch, map, kv, workspace).unwrap();
        let output = program.output.unwrap();
        (0..rows).flat_map(|row| output.row(workspace, row).to_vec()).collect()
    }
}

/// `‖a - e‖ / ‖e‖`
fn error(actual: &[f32], expected: impl IntoIterator<Item = f64>) -> f64 {
    let (mut off, mut size, mut count) = (0.0, 0.0, 0);
    for (a, e) in actual.iter().zip(expected) {
        off += (f64::from(*a) - e).powi(2);
        size += e * e;
        count += 1;
    }
    assert_eq!(count, actual.len());
    let error = (off / size).sqrt();
    assert!(error.is_finite(), "the device gave something that is no number");
    error
}

#[track_caller]
fn assert_near(actual: &[f32], expected: &[f32], tolerance: f64) {
    let error = error(actual, expected.iter().map(|x| f64::from(*x)));
    assert!(error <= tolerance, "relative error {error}");
}
