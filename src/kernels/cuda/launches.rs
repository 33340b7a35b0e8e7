//! One kernel launch of a lowered program: which kernel, its arguments, and how its grid follows
//! from the step. Knows no op.

use bytemuck::{Pod, bytes_of};

use super::tables::Counts;
use crate::device::cuda::fault::GpuError;
use crate::device::cuda::{Gpu, KernelId, Launch};

/// How blocks follow from a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grid {
    /// One block a row, if there are more than `beyond`.
    Rows { gathered: bool, beyond: u32 },
    /// So many blocks for each row.
    Columns { blocks: u32, gathered: bool },
    /// One block a span.
    Spans,
    /// One block a row and head.
    Heads { heads: u32 },
    /// Splits, KV heads, small tiles.
    Small { heads: u32 },
    /// KV heads, small tiles.
    Merge { heads: u32 },
    /// Large tiles, heads.
    Large { heads: u32 },
    /// One block a draw.
    Draws,
    /// One block a draw that is asked for more.
    Details,
    /// 256 loans a block.
    Loans,
    /// Layers, copies.
    Copies { layers: u32 },
}

/// A kernel that takes rows by the tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiled {
    kernel: KernelId,
    threads: u32,
    shared: u32,
    /// Rows and outputs a block.
    tile: (u32, u32),
}

/// A launch that waits for a step.
#[derive(Debug, Clone)]
pub(super) enum Call {
    /// One kernel.
    Plain { kernel: KernelId, threads: u32, shared: u32, grid: Grid, arguments: Box<[u8]> },
    /// A product: the kernel depends on the number of rows.
    Product { kernels: Kernels, outputs: u32, gathered: bool, arguments: Box<[u8]> },
}

/// Names of a product's kernels, in the order of [`FEW_TILES`], and of those for more rows, in the
/// order of [`MANY_TILES`].
#[derive(Debug, Clone, Copy)]
pub(super) struct ProductNames {
    pub(super) few: [&'static str; FEW_TILES.len()],
    pub(super) many: Option<[&'static str; MANY_TILES.len()]>,
}

/// Rows and outputs of a block of `linear.cu`.
const FEW_TILES: [(u32, u32); 4] = [(16, 8), (16, 16), (32, 16), (64, 16)];

/// Rows up to which products can normalise what they multiply.
pub(super) const NORMED_ROWS: u32 = 16;

/// Rows and outputs of a block of `product.cu`.
const MANY_TILES: [(u32, u32); 3] = [(64, 64), (64, 128), (128, 128)];

/// What a product's grid depends on besides the step.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProductShape {
    pub(super) outputs: u32,
    pub(super) gathered: bool,
    /// Half of the outputs are gates, of which a block takes one for each of the other half.
    pub(super) gated: bool,
}

/// A product's kernels, smaller tiles first.
#[derive(Debug, Clone)]
pub(super) struct Kernels {
    few: Vec<Tiled>,
    /// None if those for few rows take many, too.
    many: Vec<Tiled>,
    /// Blocks that the device runs at once, at least.
    processors: u32,
}

impl Call {
    /// A kernel with a fixed block.
    ///
    /// # Errors
    /// There is no such kernel on this device.
    pub(super) fn plain<A: Pod>(
        gpu: &mut dyn Gpu,
        (name, threads, shared): (&str, u32, u32),
        grid: Grid,
        arguments: &A,
    ) -> Result<Self, GpuError> {
        let kernel = gpu.kernel(name, shared)?;
        let arguments = bytes_of(arguments).into();
        Ok(Call::Plain { kernel, threads, shared, grid, arguments })
    }

    /// A product.
    ///
    /// # Errors
    /// As [`Call::plain`].
    pub(super) fn product<A: Pod>(
        gpu: &mut dyn Gpu,
        names: ProductNames,
        ProductShape { outputs, gathered, gated }: ProductShape,
        arguments: &A,
    ) -> Result<Self, GpuError> {
        let mut tiled = |name, tile: (u32, u32), shared| -> Result<Tiled, GpuError> {
            Ok(Tiled { kernel: gpu.kernel(name, shared)?, threads: 256, shared, tile })
        };
        let mut few = Vec::with_capacity(FEW_TILES.len());
        for (name, tile) in names.few.into_iter().zip(FEW_TILES) {
            // Eight warps' sums, and one of squares for each row: `linear.cu`.
            few.push(tiled(name, tile, 8 * tile.0 * (tile.1 + 1) * 4)?);
        }
        let mut many = Vec::with_capacity(MANY_TILES.len());
        for (name, tile) in names.many.into_iter().flatten().zip(MANY_TILES) {
            // Three stages of two tiles of 32 values: `product.cu`.
            many.push(tiled(name, tile, 3 * (tile.0 + tile.1) * 32 * 2)?);
        }
        // Gates and what they let through need two groups of outputs.
        few.retain(|tiled| !gated || tiled.tile.1 > 8);
        let kernels = Kernels { few, many, processors: gpu.info().processors };
        let arguments = bytes_of(arguments).into();
        Ok(Call::Product { kernels, outputs, gathered, arguments })
    }

    /// Launches it for a step of this size; not at all if there is nothing to do.
    ///
    /// # Errors
    /// The launch is refused.
    pub(super) fn launch(&self, gpu: &mut dyn Gpu, counts: &Counts) -> Result<(), GpuError> {
        let launch = match self {
            Call::Plain { kernel, threads, shared, grid, arguments } => Launch {
                kernel: *kernel,
                grid: grid.blocks(counts),
                threads: *threads,
                shared: *shared,
                arguments,
            },
            Call::Product { kernels, outputs, gathered, arguments } => {
                let rows = if *gathered { counts.gathered } else { counts.rows };
                let Tiled { kernel, threads, shared, tile } = kernels.suited(rows, *outputs);
                let grid = [outputs.div_ceil(tile.1), rows.div_ceil(tile.0), 1];
                Launch { kernel, grid, threads, shared, arguments }
            }
        };
        if launch.grid.contains(&0) {
            return Ok(());
        }
        gpu.launch(&launch)
    }
}

impl Kernels {
    /// The kernel for this many rows: one that takes them all in one go, else one for many, else
    /// the largest several times. Of several, that with the largest tile which leaves no processor
    /// without a block.
    fn suited(&self, rows: u32, outputs: u32) -> Tiled {
        let tallest = FEW_TILES[FEW_TILES.len() - 1].0;
        let least = FEW_TILES.iter().map(|tile| tile.0).find(|of| *of >= rows);
        let choice = match least {
            None if !self.many.is_empty() => &self.many,
            _ => {
                let of = least.unwrap_or(tallest);
                let first = self.few.partition_point(|tiled| tiled.tile.0 < of);
                let end = self.few.partition_point(|tiled| tiled.tile.0 <= of);
                &self.few[first..end]
            }
        };
        let enough = |tiled: &&Tiled| {
            rows.div_ceil(tiled.tile.0) * outputs.div_ceil(tiled.tile.1) >= self.processors
        };
        *choice.iter().rfind(enough).unwrap_or(&choice[0])
    }
}

impl Grid {
    fn blocks(self, counts: &Counts) -> [u32; 3] {
        let rows = |gathered: bool| if gathered { counts.gathered } else { counts.rows };
        match self {
            Grid::Rows { gathered, beyond } if rows(gathered) > beyond => [rows(gathered), 1, 1],
            Grid::Rows { .. } => [0; 3],
            Grid::Columns { blocks, gathered } => [blocks, rows(gathered), 1],
            Grid::Spans => [counts.spans, 1, 1],
            Grid::Heads { heads } => [counts.rows, heads, 1],
            Grid::Small { heads } => [counts.splits, heads, counts.small_tiles],
            Grid::Merge { heads } if counts.splits > 1 => [heads, counts.small_tiles, 1],
            Grid::Merge { .. } => [0; 3],
            Grid::Large { heads } => [counts.large_tiles, heads, 1],
            Grid::Draws => [counts.draws, 1, 1],
            Grid::Details => [counts.details, 1, 1],
            Grid::Loans => [counts.loans.div_ceil(256), 1, 1],
            Grid::Copies { layers } => [layers, counts.copies, 1],
        }
    }
}
