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
    Product { kernels: Kernels, shape: ProductShape, arguments: Box<[u8]> },
}

/// Names of a product's kernels, in the order of [`FEW_TILES`], and of those for more rows, in the
/// order of [`MANY_TILES`], of which the last may be missing, or all.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProductNames {
    pub(super) few: [&'static str; FEW_TILES.len()],
    pub(super) many: &'static [&'static str],
}

/// Rows and outputs of a block of `linear.cu`.
const FEW_TILES: [(u32, u32); 4] = [(16, 8), (16, 16), (32, 16), (64, 16)];

/// Rows up to which products can normalise what they multiply.
pub(super) const NORMED_ROWS: u32 = 16;

/// Rows and outputs of a block of `product.cu` and `product_quants.cu`.
const MANY_TILES: [(u32, u32); 3] = [(64, 64), (64, 128), (128, 128)];

/// Bytes of shared memory that these take at most: `PRODUCT_BYTES` there.
const MANY_SHARED: u32 = 48 << 10;

/// Beyond so many rows `product.cu` or `product_quants.cu` does it, unless bits must not depend on
/// that: they read a row once for 64 or 128 outputs, `linear.cu` for each 16, and then rows are
/// more bytes than weights.
const FEW_ROWS: u32 = 32;

/// Blocks share a tile only if there are so many inputs for each.
const SHARED_INPUTS: u32 = 256;

/// Bytes that the sums of blocks which share tiles take at most: fewer than two blocks a processor
/// share some, and none has a larger tile than the last.
pub(super) fn parts_bytes(processors: u32) -> usize {
    let (rows, outputs) = MANY_TILES[MANY_TILES.len() - 1];
    2 * processors as usize * (rows * outputs) as usize * 4
}

/// What a product's grid depends on besides the step.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProductShape {
    pub(super) inputs: u32,
    pub(super) outputs: u32,
    pub(super) gathered: bool,
    /// Half of the outputs are gates, of which a block takes one for each of the other half.
    pub(super) gated: bool,
}

/// A product's kernels, smaller tiles first.
#[derive(Debug, Clone)]
pub(super) struct Kernels {
    few: Vec<Tiled>,
    /// None where those for few rows take many, too.
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
        shape: ProductShape,
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
        let mut many = Vec::with_capacity(names.many.len());
        for (name, tile) in names.many.iter().zip(MANY_TILES) {
            many.push(tiled(name, tile, MANY_SHARED)?);
        }
        // Gates and what they let through need two groups of outputs.
        few.retain(|tiled| !shape.gated || tiled.tile.1 > 8);
        let kernels = Kernels { few, many, processors: gpu.info().processors };
        let arguments = bytes_of(arguments).into();
        Ok(Call::Product { kernels, shape, arguments })
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
            Call::Product { kernels, shape, arguments } => {
                let rows = if shape.gathered { counts.gathered } else { counts.rows };
                let (Tiled { kernel, threads, shared, tile }, blocks) =
                    kernels.suited(rows, *shape);
                let grid = [shape.outputs.div_ceil(tile.1), rows.div_ceil(tile.0), blocks];
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
    /// The kernel for this many rows, and how many blocks share a tile. Of several kernels, that
    /// with the largest tile which leaves no processor without a block.
    fn suited(&self, rows: u32, shape: ProductShape) -> (Tiled, u32) {
        let tiles =
            |tiled: &Tiled| rows.div_ceil(tiled.tile.0) * shape.outputs.div_ceil(tiled.tile.1);
        let fills = |tiled: &&Tiled| tiles(tiled) >= self.processors;
        if rows <= FEW_ROWS || self.many.is_empty() {
            // One that takes all rows in one go, else the tallest several times.
            let tallest = FEW_TILES[FEW_TILES.len() - 1].0;
            let mut heights = FEW_TILES.iter().map(|tile| tile.0);
            let of = heights.find(|of| *of >= rows).unwrap_or(tallest);
            let first = self.few.partition_point(|tiled| tiled.tile.0 < of);
            let end = self.few.partition_point(|tiled| tiled.tile.0 <= of);
            let choice = &self.few[first..end];
            return (*choice.iter().rfind(fills).unwrap_or(&choice[0]), 1);
        }
        let end = self.many.partition_point(|tiled| tiled.tile.0 < rows + 64);
        let choice = &self.many[..end];
        if let Some(tiled) = choice.iter().rfind(fills) {
            return (*tiled, 1);
        }
        let most = (shape.inputs / SHARED_INPUTS).max(1);
        let fills = |tiled: &&Tiled| tiles(tiled) * most >= self.processors;
        let tiled = choice.iter().rfind(fills).unwrap_or(&choice[0]);
        (*tiled, self.processors.div_ceil(tiles(tiled)).min(most))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_suit_rows_outputs_and_inputs() {
        let tiled = |tile| Tiled { kernel: KernelId(0), threads: 256, shared: 0, tile };
        let kernels = Kernels {
            few: FEW_TILES.map(tiled).into(),
            many: MANY_TILES.map(tiled).into(),
            processors: 132,
        };
        // Rows, inputs, outputs; rows and outputs a block, blocks that share one.
        let cases = [
            ((1, 4096, 1024), (16, 8), 1),
            ((16, 4096, 4096), (16, 16), 1),
            ((32, 4096, 4096), (32, 16), 1),
            // Weights are most of the bytes here: wide tiles read rows seldom.
            ((33, 4096, 28_672), (64, 128), 1),
            ((64, 4096, 28_672), (64, 128), 1),
            ((64, 4096, 4096), (64, 128), 5),
            ((64, 14_336, 4096), (64, 128), 5),
            ((64, 1024, 1024), (64, 64), 4),
            // No rows of nothing.
            ((65, 4096, 4096), (128, 128), 5),
            ((900, 1024, 1024), (64, 64), 1),
            ((900, 1024, 4096), (128, 128), 1),
            ((200, 100, 1024), (64, 64), 1),
        ];
        for ((rows, inputs, outputs), tile, blocks) in cases {
            let shape = ProductShape { inputs, outputs, gathered: false, gated: false };
            let (chosen, sharing) = kernels.suited(rows, shape);
            assert_eq!((chosen.tile, sharing), (tile, blocks), "{rows} × {inputs} × {outputs}");
            let tiles = rows.div_ceil(tile.0) * outputs.div_ceil(tile.1);
            let parts = (tiles * sharing * tile.0 * tile.1 * 4) as usize;
            assert!(sharing == 1 || parts <= parts_bytes(132) && tiles < 132);
        }
        // Where bits must not depend on the number of rows.
        let few = Kernels { many: Vec::new(), ..kernels };
        let shape = ProductShape { inputs: 4096, outputs: 4096, gathered: false, gated: false };
        assert_eq!(few.suited(300, shape).0.tile, (64, 16));
    }
}
