//! One kernel launch of a lowered program: which kernel, its arguments, and how its grid follows
//! from the step. Knows no op.

use bytemuck::{Pod, bytes_of};

use super::tables::Counts;
use crate::device::cuda::fault::GpuError;
use crate::device::cuda::{Gpu, KernelId, Launch};

/// How blocks follow from a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grid {
    /// One block a row.
    Rows { gathered: bool },
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
    Product { kernels: [Option<Tiled>; 4], outputs: u32, gathered: bool, arguments: Box<[u8]> },
}

/// Names of a product's kernels for up to 16, 32, 64 and more rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProductNames {
    pub(super) few: [&'static str; 3],
    pub(super) many: Option<&'static str>,
}

/// Rows that a block of the `few` kernels takes, and outputs.
const FEW_ROWS: [u32; 3] = [16, 32, 64];
const FEW_OUTPUTS: u32 = 16;
const MANY_TILE: u32 = 128;

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

    /// A product with `outputs` outputs.
    ///
    /// # Errors
    /// As [`Call::plain`].
    pub(super) fn product<A: Pod>(
        gpu: &mut dyn Gpu,
        names: ProductNames,
        (outputs, gathered): (u32, bool),
        arguments: &A,
    ) -> Result<Self, GpuError> {
        let mut kernels = [None; 4];
        for (i, name) in names.few.into_iter().enumerate() {
            // Eight warps' sums: `linear.cu`.
            let shared = 8 * FEW_ROWS[i] * FEW_OUTPUTS * 4;
            let kernel = gpu.kernel(name, shared)?;
            let tile = (FEW_ROWS[i], FEW_OUTPUTS);
            kernels[i] = Some(Tiled { kernel, threads: 256, shared, tile });
        }
        if let Some(name) = names.many {
            // Three stages of two tiles of 32 values: `product.cu`.
            let shared = 3 * 2 * MANY_TILE * 32 * 2;
            let kernel = gpu.kernel(name, shared)?;
            let tile = (MANY_TILE, MANY_TILE);
            kernels[3] = Some(Tiled { kernel, threads: 256, shared, tile });
        }
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
                let Tiled { kernel, threads, shared, tile } = suited(kernels, rows);
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

/// The kernel for this many rows: the smallest that takes them all in one go, else the one for
/// many, else the largest several times.
fn suited(kernels: &[Option<Tiled>; 4], rows: u32) -> Tiled {
    let few = kernels[..3].iter().flatten().find(|tiled| tiled.tile.0 >= rows);
    let fallback = kernels.iter().flatten().next_back();
    *few.or(fallback).expect("a product has kernels for few rows")
}

impl Grid {
    fn blocks(self, counts: &Counts) -> [u32; 3] {
        let rows = |gathered: bool| if gathered { counts.gathered } else { counts.rows };
        match self {
            Grid::Rows { gathered } => [rows(gathered), 1, 1],
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
        }
    }
}
