//! Lowers a program to kernel launches: uploads its weights, gives its buffers their places, and
//! fills in every launch's arguments. Done once, at load.

mod products;

use std::collections::HashSet;

use super::arguments as args;
use super::arguments::View;
use super::launches::{Call, Grid, ProductNames};
use super::matrices::{MatrixFormat, Uploads};
use super::places::{Place, Places};
use super::tables::Tiling;
use crate::device::cuda::fault::GpuError;
use crate::device::cuda::{Address, Gpu};
use crate::kernels::ops::{
    Activation, Embed, GatedSilu, Gather, KvShape, Norm, Op, PackedAttention, PagedAttention, Pool,
    PoolKind, Program, RopeStore, Rows, Vector,
};

/// What all lanes of a device share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared {
    /// The step's tables.
    pub(super) step: Address,
    /// The KV region.
    pub(super) kv: Address,
    /// Tokens by seat.
    pub(super) seats: Address,
    /// The lane's own table: where its pages lie.
    pub(super) pages: Address,
    /// Chosen tokens.
    pub(super) tokens: Address,
    /// Products of more than 64 rows by the same kernels as of fewer: slower, and a row's bits do
    /// not depend on its company.
    pub(super) deterministic: bool,
}

/// A program that the device can run.
#[derive(Debug)]
pub(super) struct Lowered {
    /// In order.
    pub(super) calls: Vec<Call>,
    /// After the others, where tokens are chosen.
    pub(super) sample: Option<Call>,
    /// How query rows are cut.
    pub(super) tiling: Tiling,
    /// Where answers are: one f32 row each.
    pub(super) output: Place,
    /// What it holds of the device's memory.
    pub(super) uploads: Uploads,
    pub(super) rows_max: usize,
    pub(super) gathered_max: usize,
    /// Positions that its tables have.
    pub(super) positions: u32,
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
const ROPE_THREADS: u32 = 128;
const SAMPLE_THREADS: u32 = 1024;
/// `SampleShared` in `sample.cu`.
const SAMPLE_SHARED: u32 = 2048 + 256 + 128 + 128 + 32;
const SPLITS_MAX: usize = 16;

struct Lowering<'p> {
    program: &'p Program,
    gpu: &'p mut dyn Gpu,
    shared: Shared,
    places: Places,
    uploads: Uploads,
    calls: Vec<Call>,
    /// Buffers whose bf16 copy is up to date.
    fresh: HashSet<usize>,
    tiling: Tiling,
    /// Scratch of split attention: sums, and their limits.
    splits: Option<(Address, Address)>,
}

/// Lowers `program` and uploads what it needs.
///
/// # Errors
/// Something has no kernel, or does not fit: what was reserved is given back.
pub(super) fn lower(
    program: &Program,
    gpu: &mut dyn Gpu,
    shared: Shared,
) -> Result<Lowered, LowerError> {
    let mut uploads = Uploads::default();
    let workspace = uploads.reserve(gpu, workspace_bytes(program))?;
    let places = Places::new(program, workspace);
    let output = program.output.ok_or_else(|| unsupported("a program without output"))?;
    let tiling = Tiling { group: 1, paged: false, small_max: 0 };
    let mut this = Lowering {
        program,
        gpu,
        shared,
        places,
        uploads,
        calls: Vec::new(),
        fresh: HashSet::new(),
        tiling,
        splits: None,
    };
    let lowered = this.ops().and_then(|()| this.sample());
    let sample = match lowered {
        Ok(sample) => sample,
        Err(error) => {
            for address in this.uploads.reserved {
                this.gpu.release(address)?;
            }
            return Err(error);
        }
    };
    Ok(Lowered {
        calls: this.calls,
        sample,
        tiling: this.tiling,
        output: this.places.of(&output),
        uploads: this.uploads,
        rows_max: program.rows_max,
        gathered_max: program.gathered_max,
        positions: positions(program),
    })
}

/// Bytes of workspace that a program's buffers take on the device.
pub(super) fn workspace_bytes(program: &Program) -> usize {
    Places::new(program, Address(0)).bytes
}

/// The shortest table of positions.
fn positions(program: &Program) -> u32 {
    let lengths = program.ops.iter().filter_map(|op| match op {
        Op::Embed(op) => Some(op.positions.as_ref()?.len() / op.output.width),
        Op::RopeStore(op) => Some(op.table.len() / op.kv.head_dim),
        _ => None,
    });
    lengths.min().map_or(u32::MAX, |length| length as u32)
}

fn unsupported(what: impl Into<String>) -> LowerError {
    LowerError::Unsupported(what.into())
}

fn gathered(rows: Rows) -> u32 {
    u32::from(rows == Rows::Gathered)
}

impl Lowering<'_> {
    fn ops(&mut self) -> Result<(), LowerError> {
        for op in &self.program.ops {
            match op {
                Op::Embed(op) => self.embed(op)?,
                Op::Norm(op) => self.norm(op)?,
                Op::Linear(op) => self.linear(op)?,
                Op::HalfLinear(op) => self.half_linear(op)?,
                Op::Convert(op) => self.convert(op)?,
                Op::HeadNorm(_) => return Err(unsupported("it normalises queries and keys")),
                Op::Rope(_) => return Err(unsupported("it embeds with a decoder")),
                Op::RopeStore(op) => self.rope_store(op)?,
                Op::PagedAttention(op) => self.paged(op)?,
                Op::PackedAttention(op) => self.packed(op)?,
                Op::GatedSilu(op) => self.gated_silu(op)?,
                Op::Gather(op) => self.gather(op)?,
                Op::Pool(op) => self.pool(op)?,
            }
        }
        Ok(())
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
            // Of one text: all its tokens are of type 0.
            constant: self.optional(op.types.as_ref())?,
            seats: self.shared.seats.0,
            output: self.places.of(&op.output).view,
        };
        self.fresh.remove(&op.output.offset);
        self.push(("embed", ROW_THREADS, 0), Grid::Rows { gathered: false }, &arguments)
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
        let grid = Grid::Rows { gathered: op.rows == Rows::Gathered };
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

    fn cache(&self, kv: KvShape, layer: usize) -> args::Cache {
        args::Cache {
            region: self.shared.kv.0,
            pages: self.shared.pages.0,
            layers: kv.layers as u32,
            layer: layer as u32,
            heads: kv.heads as u32,
            head_dim: kv.head_dim as u32,
        }
    }

    fn rope_store(&mut self, op: &RopeStore) -> Result<(), LowerError> {
        let arguments = args::RopeStore {
            step: self.shared.step.0,
            qkv: self.places.of(&op.qkv).view,
            cache: self.cache(op.kv, op.layer),
            table: self.uploads.vector(self.gpu, &op.table)?.0,
            heads: op.heads as u32,
            positions: (op.table.len() / op.kv.head_dim) as u32,
        };
        let heads = (op.heads + 2 * op.kv.heads) as u32;
        self.push(("rope_store", ROPE_THREADS, 0), Grid::Heads { heads }, &arguments)
    }

    fn paged(&mut self, op: &PagedAttention) -> Result<(), LowerError> {
        let size = head_size(op.kv.head_dim)?;
        let group = op.heads / op.kv.heads;
        let small_max = self.program.gathered_max * group.div_ceil(16);
        let tiling = Tiling { group, paged: true, small_max };
        if self.tiling.paged && self.tiling != tiling {
            return Err(unsupported("layers differ in how heads share keys"));
        }
        self.tiling = tiling;
        let (parts, limits) = match self.splits {
            Some(splits) => splits,
            None => {
                let cells = small_max * op.kv.heads * SPLITS_MAX * group.min(16);
                let parts = self.uploads.reserve(self.gpu, cells * op.kv.head_dim * 4)?;
                let limits = self.uploads.reserve(self.gpu, cells * 2 * 4)?;
                *self.splits.insert((parts, limits))
            }
        };
        let arguments = args::Attention {
            step: self.shared.step.0,
            qkv: self.places.of(&op.qkv).view,
            output: self.places.of_activation(&op.output).view,
            cache: self.cache(op.kv, op.layer),
            parts: parts.0,
            limits: limits.0,
            heads: op.heads as u32,
            scale: op.scale,
        };
        self.fresh.remove(&Places::name(&op.output));
        let heads = op.kv.heads as u32;
        self.push(size.small(), Grid::Small { heads }, &arguments)?;
        self.push(("attend_merge", 128, 0), Grid::Merge { heads }, &arguments)?;
        self.push(size.large(), Grid::Large { heads }, &arguments)
    }

    fn packed(&mut self, op: &PackedAttention) -> Result<(), LowerError> {
        let size = head_size(op.head_dim)?;
        let qkv = self.places.of(&op.qkv).view;
        if qkv.half == 0 {
            return Err(unsupported("attention over rows that something is added to"));
        }
        if op.causal || op.kv_heads != op.heads {
            return Err(unsupported("it embeds with a decoder"));
        }
        let kv = KvShape { layers: 1, heads: op.heads, head_dim: op.head_dim };
        let arguments = args::Attention {
            step: self.shared.step.0,
            qkv,
            output: self.places.of_activation(&op.output).view,
            cache: args::Cache { region: 0, pages: 0, ..self.cache(kv, 0) },
            parts: 0,
            limits: 0,
            heads: op.heads as u32,
            scale: op.scale,
        };
        self.fresh.remove(&Places::name(&op.output));
        self.push(size.packed(), Grid::Large { heads: op.heads as u32 }, &arguments)
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
    fn sample(&mut self) -> Result<Option<Call>, LowerError> {
        if self.program.kv.is_none() {
            return Ok(None);
        }
        let output = self.program.output.ok_or_else(|| unsupported("no logits"))?;
        let place = self.places.of(&output);
        let bytes = self.program.gathered_max * place.width * 4;
        let arguments = args::Sample {
            step: self.shared.step.0,
            logits: place.view,
            weights: self.uploads.reserve(self.gpu, bytes)?.0,
            seats: self.shared.seats.0,
            tokens: self.shared.tokens.0,
            vocabulary: place.width as u32,
            unused: 0,
        };
        let kernel = ("sample", SAMPLE_THREADS, SAMPLE_SHARED);
        Ok(Some(Call::plain(self.gpu, kernel, Grid::Draws, &arguments)?))
    }
}

/// The product kernels of a format.
fn names(format: MatrixFormat, deterministic: bool) -> ProductNames {
    match format {
        MatrixFormat::Bf16 => ProductNames {
            few: ["linear_bf16_16", "linear_bf16_32", "linear_bf16_64"],
            many: (!deterministic).then_some("product_bf16"),
        },
        MatrixFormat::Q4 => {
            ProductNames { few: ["linear_q4_16", "linear_q4_32", "linear_q4_64"], many: None }
        }
        MatrixFormat::Q8 => {
            ProductNames { few: ["linear_q8_16", "linear_q8_32", "linear_q8_64"], many: None }
        }
    }
}

/// Attention kernels for heads of up to so many values.
#[derive(Debug, Clone, Copy)]
enum HeadSize {
    To32,
    To64,
    To128,
    To256,
}

fn head_size(head_dim: usize) -> Result<HeadSize, LowerError> {
    match head_dim {
        _ if !head_dim.is_multiple_of(16) => {}
        1..=32 => return Ok(HeadSize::To32),
        33..=64 => return Ok(HeadSize::To64),
        65..=128 => return Ok(HeadSize::To128),
        129..=256 => return Ok(HeadSize::To256),
        _ => {}
    }
    Err(unsupported(format!("head size {head_dim} is not a multiple of 16 up to 256")))
}

impl HeadSize {
    /// Name, threads and bytes of shared memory: a tile of keys and values for each warp.
    fn small(self) -> (&'static str, u32, u32) {
        match self {
            HeadSize::To32 => ("attend_small_32", 128, 4 * 32 * 128),
            HeadSize::To64 => ("attend_small_64", 128, 4 * 64 * 128),
            HeadSize::To128 => ("attend_small_128", 128, 4 * 128 * 128),
            HeadSize::To256 => ("attend_small_256", 64, 2 * 256 * 128),
        }
    }

    /// Two tiles of keys and values.
    fn large(self) -> (&'static str, u32, u32) {
        match self {
            HeadSize::To32 => ("attend_large_32", 128, 2 * 32 * 128),
            HeadSize::To64 => ("attend_large_64", 128, 2 * 64 * 128),
            HeadSize::To128 => ("attend_large_128", 128, 2 * 128 * 128),
            HeadSize::To256 => ("attend_large_256", 128, 2 * 256 * 128),
        }
    }

    fn packed(self) -> (&'static str, u32, u32) {
        match self {
            HeadSize::To32 => ("attend_packed_32", 128, 2 * 32 * 128),
            HeadSize::To64 => ("attend_packed_64", 128, 2 * 64 * 128),
            HeadSize::To128 => ("attend_packed_128", 128, 2 * 128 * 128),
            HeadSize::To256 => ("attend_packed_256", 128, 2 * 256 * 128),
        }
    }
}
