//! A lane's decode steps, recorded as graphs: one launch instead of some hundred. Steps that no
//! graph fits are launched one by one, which is the same work in the same order.

use std::collections::HashMap;

use super::lower::Lowered;
use super::tables::{Counts, LARGE_TILE, SMALL_TILE};
use crate::device::cuda::fault::GpuError;
use crate::device::cuda::{Gpu, GraphId};
use crate::scheduler::step::MAX_SEATS;

/// Device memory that a lane's graphs may take, about.
pub(super) const GRAPH_BYTES: u64 = 64 << 20;

/// More than one graph takes: what is missing beyond it, another process took.
const ONE_GRAPH_BYTES: u64 = 16 << 20;

/// Numbers of rows that decode steps are padded to when they run as a graph.
const BUCKETS: [u32; 16] =
    [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, MAX_SEATS as u32];

/// Numbers of splits that graphs are recorded for.
const SPLITS: [u32; 3] = [1, 4, 16];

/// Graphs by the size of the step that they were recorded for.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    graphs: HashMap<Counts, GraphId>,
}

impl Graphs {
    /// Records the decode steps of a generator, small ones first, until the memory for graphs is
    /// used up. Those from before are given back.
    ///
    /// # Errors
    /// The device failed; graphs that were recorded until then stay.
    pub(super) fn record(&mut self, lowered: &Lowered, gpu: &mut dyn Gpu) -> Result<(), GpuError> {
        std::mem::take(self).release(gpu)?;
        if lowered.choose.is_none() {
            return Ok(());
        }
        let most = bucket(&BUCKETS, lowered.gathered_max as u32);
        let mut used = 0;
        for rows in BUCKETS.into_iter().filter(|rows| most >= Some(*rows)) {
            for splits in SPLITS {
                let counts = decode_counts(rows, splits, lowered);
                if self.graphs.contains_key(&counts) {
                    continue;
                }
                if used >= GRAPH_BYTES {
                    tracing::info!(graphs = self.graphs.len(), "no memory for larger graphs");
                    return Ok(());
                }
                let free = gpu.free_bytes()?;
                gpu.begin_graph()?;
                let launched = lowered.launch(gpu, &counts);
                let graph = gpu.end_graph();
                launched?;
                self.graphs.insert(counts, graph?);
                used += free.saturating_sub(gpu.free_bytes()?).min(ONE_GRAPH_BYTES);
            }
        }
        Ok(())
    }

    /// Gives their memory back.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn release(self, gpu: &mut dyn Gpu) -> Result<(), GpuError> {
        self.graphs.into_values().try_for_each(|graph| gpu.release_graph(graph))
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.graphs.len()
    }

    /// The graph that a step of this size can run as: kernels read the true counts from the
    /// tables, so a larger grid does no harm. None unless every row is a sequence's next.
    pub(super) fn of(&self, counts: &Counts, lowered: &Lowered) -> Option<GraphId> {
        let rows = counts.rows;
        if [counts.gathered, counts.spans, counts.draws] != [rows; 3] {
            return None;
        }
        let own = decode_counts(rows, counts.splits, lowered);
        if [own.small_tiles, own.large_tiles] != [counts.small_tiles, counts.large_tiles] {
            return None;
        }
        let (rows, splits) = (bucket(&BUCKETS, rows)?, bucket(&SPLITS, counts.splits.max(1))?);
        self.graphs.get(&decode_counts(rows, splits, lowered)).copied()
    }
}

/// The smallest of `sizes` that holds `count`.
fn bucket(sizes: &[u32], count: u32) -> Option<u32> {
    sizes.iter().copied().find(|size| *size >= count)
}

/// A decode step of `rows` rows.
fn decode_counts(rows: u32, splits: u32, lowered: &Lowered) -> Counts {
    let tiling = lowered.tiling;
    let tiles = |of: usize| rows * tiling.group.div_ceil(of) as u32;
    let (small_tiles, large_tiles, splits) = match tiling.small_max {
        0 => (0, tiles(LARGE_TILE), 0),
        _ => (tiles(SMALL_TILE), 0, splits),
    };
    let (gathered, spans, draws) = (rows, rows, rows);
    let (loans, copies, details) = (0, 0, 0);
    Counts {
        rows,
        gathered,
        spans,
        draws,
        small_tiles,
        large_tiles,
        splits,
        loans,
        copies,
        details,
    }
}
