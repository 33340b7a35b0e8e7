//! Lowers a program to kernel launches: uploads its weights, gives its buffers their places, and
//! fills in every launch's arguments. Done once, at load.

mod attention;
pub(super) mod products;

use std::collections::HashSet;

use self::products::{gating_of, is_for_product};
use super::arguments as args;
use super::arguments::View;
use super::details::detail_bytes;
use super::launches::{Call, Grid, NORMED_ROWS, ProductNames};
use super::matrices::{MatrixFormat, Uploads};
use super::places::{Place, Places};
use super::shared::Shared;
use super::tables::{Counts, Tiling};
use crate::device::cuda::fault::GpuError;
use crate::device::cuda::{Address, Gpu};
use crate::kernels::ops::{
    Activation, Embed, GatedSilu, Gather, HeadNorm, Norm, Op, Pool, PoolKind, Program, Rows, Vector,
};

/// Memory of a lane that others write to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own {
    /// Where its pages lie.
    pub(super) pages: Address,
    /// What some draws are asked for besides.
    pub(super) details: Address,
}

/// A program that the device can run.
#[derive(Debug)]
pub(super) struct Lowered {
    /// In order.
    pub(super) calls: Vec<Call>,
    /// After the others, where tokens are chosen.
    pub(super) choose: Option<Choose>,
    /// How query rows are cut.
    pub(super) tiling: Tiling,
    /// Where answers are: one f32 row each.
    pub(super) output: Place,
    /// Where the last hidden states are: one f32 row for each of the step's.
    pub(super) hidden: Option<Place>,
    /// What it holds of the device's memory.
    pub(super) uploads: Uploads,
    pub(super) rows_max: usize,
    pub(super) gathered_max: usize,
    /// Positions that its tables have.
    pub(super) positions: u32,
    /// Token types that it knows.
    pub(super) types: u32,
}

/// Launches that choose tokens.
#[derive(Debug)]
pub(super) struct Choose {
    /// Every draw, by its logits alone.
    pub(super) sample: Call,
    /// Then those that are asked for more.
    pub(super) refine: Call,
}

impl Lowered {
    /// Gives all launches of a step of this size, details apart.
    ///
    /// # Errors
    /// A launch is refused.
    pub(super) fn launch(&self, gpu: &mut dyn Gpu, counts: &Counts) -> Result<(), GpuError> {
        let sample = self.choose.iter().map(|choose| &choose.sample);
        for call in self.calls.iter().chain(sample) {
            call.launch(gpu, counts)?;
        }
        Ok(())
    }
}

/// A program that this device cannot run.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    /// An op or a shape without a kernel.
    #[error("the CUDA kernels cannot run this model: {0}")]
    Unsupported(String),
    /// The device failed, or has too little memory.
    #[error(transparent)]
    Device(#[from] GpuError),
}

impl LowerError {
    /// What failed, if it is the device.
    pub fn device(&self) -> Option<&GpuError> {
        match self {
            LowerError::Unsupported(_) => None,
            LowerError::Device(error) => Some(error),
        }
    }
}

const ROW_THREADS: u32 = 256;
const ROW_SHARED: u32 = 32;
const SAMPLE_THREADS: u32 = 1024;
/// `SampleShared` in `sample.cu`.
const SAMPLE_SHARED: u32 = 8 * 2048 + 256 + 128 + 128 + 32;

/// No draw looks back at more tokens.
const CONTEXT_MAX: usize = 1 << 22;

struct Lowering<'p> {
    program: &'p Program,
    gpu: &'p mut dyn Gpu,
    shared: Shared,
    own: Own,
    places: Places,
    uploads: Uploads,
    calls: Vec<Call>,
    /// Buffers whose bf16 copy is up to date.
    fresh: HashSet<usize>,
    /// Known from the first attention on.
    tiling: Option<Tiling>,
    /// Scratch of split attention: sums, and their limits.
    splits: Option<(Address, Address)>,
    /// What the rotation that comes next does first.
    head_norm: Option<HeadNorm>,
    /// What the product that comes next does first where rows are few.
    normed: Option<Normed>,
}

/// Rows that are to be normalised.
#[derive(Debug, Clone, Copy)]
struct Normed {
    input: View,
    scales: Address,
    eps: f32,
}

/// Lowers `program` and uploads what it needs.
///
/// # Errors
/// Something has no kernel, or does not fit: what was reserved is given back.
pub(super) fn lower(
    program: &Program,
    gpu: &mut dyn Gpu,
    shared: Shared,
    own: Own,
) -> Result<Lowered, LowerError> {
    let mut uploads = Uploads::default();
    let workspace = uploads.reserve(gpu, buffer_bytes(program))?;
    let places = Places::new(program, workspace);
    let output = program.output.ok_or_else(|| unsupported("a program without output"))?;
    let mut this = Lowering {
        program,
        gpu,
        shared,
        own,
        places,
        uploads,
        calls: Vec::new(),
        fresh: HashSet::new(),
        tiling: None,
        splits: None,
        head_norm: None,
        normed: None,
    };
    let lowered = this.ops().and_then(|()| this.choose());
    let choose = match lowered {
        Ok(choose) => choose,
        Err(error) => {
            for address in this.uploads.reserved {
                this.gpu.release(address)?;
            }
            return Err(error);
        }
    };
    Ok(Lowered {
        calls: this.calls,
        choose,
        tiling: this.tiling.unwrap_or(Tiling { group: 1, paged: false, small_max: 0 }),
        output: this.places.of(&output),
        hidden: program.hidden.map(|hidden| this.places.of(&hidden)),
        uploads: this.uploads,
        rows_max: program.rows_max,
        gathered_max: program.gathered_max,
        positions: positions(program),
        types: types(program),
    })
}

/// Bytes that a program takes on the device beside its weights: buffers, and scratch.
pub(super) fn workspace_bytes(program: &Program) -> usize {
    let buffers = buffer_bytes(program);
    let (Some(output), true) = (program.output, program.kv.is_some()) else { return buffers };
    let weights = program.gathered_max * output.width * 4;
    buffers + attention::scratch_bytes(program) + weights + room_for(program)
}

fn buffer_bytes(program: &Program) -> usize {
    Places::new(program, Address(0)).bytes
}

/// Bytes of details that go to the device at a time.
pub(super) fn room_for(program: &Program) -> usize {
    detail_bytes(CONTEXT_MAX.min(positions(program) as usize))
}

/// The shortest table of positions.
fn positions(program: &Program) -> u32 {
    let lengths = program.ops.iter().filter_map(|op| match op {
        Op::Embed(op) => Some(op.positions.as_ref()?.len() / op.output.width),
        Op::RopeStore(op) => Some(op.table.len() / op.kv.head_dim),
        Op::Rope(op) => Some(op.table.len() / op.head_dim),
        _ => None,
    });
    lengths.min().map_or(u32::MAX, |length| length as u32)
}

/// Token types of the table; any where there is none.
fn types(program: &Program) -> u32 {
    let table = program.ops.iter().find_map(|op| match op {
        Op::Embed(Embed { types: Some(types), output, .. }) => Some(types.len() / output.width),
        _ => None,
    });
    table.map_or(u32::MAX, |rows| rows as u32)
}

fn unsupported(what: impl Into<String>) -> LowerError {
    LowerError::Unsupported(what.into())
}

fn gathered(rows: Rows) -> u32 {
    u32::from(rows == Rows::Gathered)
}

impl Lowering<'_> {
    fn ops(&mut self) -> Result<(), LowerError> {
        let mut ops = self.program.ops.as_slice();
        while let [op, later @ ..] = ops {
            if let Op::Norm(norm) = op
                && is_for_product(self.program, norm, later)
            {
                self.normed = self.rows_to_norm(norm)?;
            }
            let gating = gating_of(op, later.first());
            ops = &later[usize::from(gating.is_some())..];
            match op {
                Op::Embed(op) => self.embed(op)?,
                Op::Norm(op) => self.norm(op)?,
                Op::Linear(op) => self.linear(op, gating)?,
                Op::HalfLinear(op) => self.half_linear(op, gating)?,
                Op::Convert(op) => self.convert(op)?,
                Op::HeadNorm(op) => self.head_norm(op)?,
                Op::Rope(op) => self.rope(op)?,
                Op::RopeStore(op) => self.rope_store(op)?,
                Op::PagedAttention(op) => self.paged(op)?,
                Op::PackedAttention(op) => self.packed(op)?,
                Op::GatedSilu(op) => self.gated_silu(op)?,
                Op::Gather(op) => self.gather(op)?,
                Op::Pool(op) => self.pool(op)?,
            }
        }
        match self.head_norm {
            None => Ok(()),
            Some(_) => Err(unsupported("it normalises heads without turning them")),
        }
    }

    fn push<A: bytemuck::Pod>(
        &mut self,
        kernel: (&str, u32, u32),
        grid: Grid,
        arguments: &A,
    ) -> Result<(), LowerError> {
        self.calls.push(Call::plain(self.gpu, kernel, grid, arguments)?);
        Ok(())
    }

    fn optional(&mut self, vector: Option<&Vector>) -> Result<u64, GpuError> {
        vector.map_or(Ok(0), |vector| Ok(self.uploads.vector(self.gpu, vector)?.0))
    }

    fn embed(&mut self, op: &Embed) -> Result<(), LowerError> {
        let arguments = args::Embed {
            step: self.shared.step.0,
            table: self.uploads.matrix(self.gpu, &op.table)?,
            positions: self.optional(op.positions.as_ref())?,
            types: self.optional(op.types.as_ref())?,
            seats: self.shared.seats.0,
            output: self.places.of(&op.output).view,
        };
        self.fresh.remove(&op.output.offset);
        self.push(("embed", ROW_THREADS, 0), Grid::Rows { gathered: false, beyond: 0 }, &arguments)
    }

    fn norm(&mut self, op: &Norm) -> Result<(), LowerError> {
        let output = self.places.of_activation(&op.output);
        let arguments = args::Norm {
            step: self.shared.step.0,
            input: self.places.of(&op.input).view,
            weight: self.uploads.vector(self.gpu, &op.weight)?.0,
            bias: self.optional(op.bias.as_ref())?,
            output: output.view,
            copy: output.copy,
            width: op.input.width as u32,
            gathered: gathered(op.rows),
            eps: op.eps,
            unused: 0,
        };
        self.fresh.insert(Places::name(&op.output));
        // With few rows the product does it.
        let beyond = if self.normed.is_some() { NORMED_ROWS } else { 0 };
        let grid = Grid::Rows { gathered: op.rows == Rows::Gathered, beyond };
        self.push(("norm_rows", ROW_THREADS, ROW_SHARED), grid, &arguments)
    }

    /// The bf16 rows that a product reads, brought up to date.
    fn multiplied(&mut self, input: &Activation, rows: Rows) -> Result<View, LowerError> {
        let place = self.places.of_activation(input);
        if place.view.half == 1 {
            return Ok(place.view);
        }
        if self.fresh.insert(Places::name(input)) {
            let (rows, gathered) = match rows {
                Rows::All => (args::COPY_ALL, false),
                Rows::Gathered => (args::COPY_GATHERED, true),
            };
            self.copy(place.view, place.copy, (place.width, rows), gathered)?;
        }
        Ok(place.copy)
    }

    fn copy(
        &mut self,
        input: View,
        output: View,
        (width, rows): (usize, u32),
        gathered: bool,
    ) -> Result<(), LowerError> {
        let step = self.shared.step.0;
        let arguments = args::CopyRows { step, input, output, width: width as u32, rows };
        let grid = Grid::Columns { blocks: (width as u32).div_ceil(ROW_THREADS), gathered };
        self.push(("copy_rows", ROW_THREADS, 0), grid, &arguments)
    }

    fn gated_silu(&mut self, op: &GatedSilu) -> Result<(), LowerError> {
        let output = self.places.of_activation(&op.output);
        let width = output.width as u32;
        let arguments = args::GatedSilu {
            step: self.shared.step.0,
            input: self.places.of(&op.input).view,
            output: output.view,
            width,
            unused: 0,
        };
        self.fresh.remove(&Places::name(&op.output));
        let grid = Grid::Columns { blocks: width.div_ceil(ROW_THREADS), gathered: false };
        self.push(("gated_silu", ROW_THREADS, 0), grid, &arguments)
    }

    fn gather(&mut self, op: &Gather) -> Result<(), LowerError> {
        let (input, output) = (self.places.of(&op.input), self.places.of(&op.output));
        self.fresh.remove(&op.output.offset);
        self.copy(input.view, output.view, (op.output.width, args::COPY_GATHER), true)
    }

    fn pool(&mut self, op: &Pool) -> Result<(), LowerError> {
        let arguments = args::Pool {
            step: self.shared.step.0,
            input: self.places.of(&op.input).view,
            output: self.places.of(&op.output).view,
            width: op.output.width as u32,
            kind: match op.kind {
                PoolKind::Mean => 0,
                PoolKind::Cls => 1,
                PoolKind::Last => 2,
            },
            normalize: u32::from(op.normalize),
            unused: 0,
        };
        self.fresh.remove(&op.output.offset);
        self.push(("pool", ROW_THREADS, ROW_SHARED), Grid::Spans, &arguments)
    }

    /// Choosing tokens from the program's output, for generators.
    fn choose(&mut self) -> Result<Option<Choose>, LowerError> {
        if self.program.kv.is_none() {
            return Ok(None);
        }
        let output = self.program.output.ok_or_else(|| unsupported("no logits"))?;
        let Place { view: logits, width, .. } = self.places.of(&output);
        let weights = self.program.gathered_max * width * 4;
        let weights = self.uploads.reserve(self.gpu, weights)?.0;
        let (Shared { step, seats, tokens, scores, .. }, details) = (self.shared, self.own.details);
        let (step, seats, tokens) = (step.0, seats.0, tokens.0);
        let (vocabulary, unused) = (width as u32, 0);
        let sample = args::Sample { step, logits, weights, seats, tokens, vocabulary, unused };
        let (details, scores) = (details.0, scores.0);
        let refine = args::Refine {
            step,
            details,
            logits,
            weights,
            seats,
            tokens,
            scores,
            vocabulary,
            unused,
        };
        let kernel = |name| (name, SAMPLE_THREADS, SAMPLE_SHARED);
        Ok(Some(Choose {
            sample: Call::plain(self.gpu, kernel("sample"), Grid::Draws, &sample)?,
            refine: Call::plain(self.gpu, kernel("refine"), Grid::Details, &refine)?,
        }))
    }
}

/// The product kernels of a format: if deterministic, those of a few rows take many.
fn names(format: MatrixFormat, normed: bool, deterministic: bool) -> ProductNames {
    let norm = usize::from(normed);
    macro_rules! few {
        ($of:literal) => {
            [
                [concat!("linear_", $of, "_16x8"), concat!("linear_", $of, "_16x8_norm")][norm],
                [concat!("linear_", $of, "_16x16"), concat!("linear_", $of, "_16x16_norm")][norm],
                concat!("linear_", $of, "_32x16"),
                concat!("linear_", $of, "_64x16"),
            ]
        };
    }
    macro_rules! names {
        ($of:literal $(, $largest:literal)?) => {
            (
                few!($of),
                &[
                    concat!("product_", $of, "_64x64"),
                    concat!("product_", $of, "_64x128"),
                    $($largest)?
                ],
            )
        };
    }
    let (few, many): (_, &[_]) = match format {
        MatrixFormat::Bf16 => names!("bf16", "product_bf16_128x128"),
        MatrixFormat::Q4 => names!("q4"),
        MatrixFormat::Q4Halves => names!("q4h"),
        MatrixFormat::Q8 => names!("q8"),
        MatrixFormat::Q8Minimum => names!("q8m"),
        MatrixFormat::Q8Halves => names!("q8h"),
    };
    let many = if deterministic { &[] } else { many };
    ProductNames { few, many }
}
