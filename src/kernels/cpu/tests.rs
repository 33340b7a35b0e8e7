//! Each op against an independent computation in f64, and bit for bit the same in every set, on
//! any number of threads and in any company.

mod attention;
mod large;
mod halves;
mod linear;
mod maths;
mod programs;
mod rescore;
mod rows;

use super::executor::{ExecuteError, Executor};
use super::isa::SetKind;
use crate::device::arena::Region;
use crate::device::threads::Team;
use crate::kernels::batch::{Batch, BatchSpan, KvMap};
use crate::kernels::ops::{Buf, Op, Program, QuantBuf};
use crate::kernels::packed::GROUP;

/// A small generator of test data (xorshift).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() >> 33) as usize % end
    }

    /// Uniform in -1..1.
    pub(super) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(super) fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    pub(super) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// Lays buffers out in a workspace.
#[derive(Default)]
pub(super) struct Layout {
    bytes: usize,
}

impl Layout {
    pub(super) fn take(&mut self, bytes: usize) -> usize {
        let offset = self.bytes;
        self.bytes = (offset + bytes).next_multiple_of(64);
        offset
    }

    pub(super) fn buf(&mut self, rows: usize, width: usize) -> Buf {
        Buf { offset: self.take(rows * width * 4), width }
    }

    pub(super) fn quant(&mut self, rows: usize, width: usize) -> QuantBuf {
        QuantBuf {
            values: self.take(rows * width),
            scales: self.take(rows * width / GROUP * 4),
            sums: self.take(rows * width / GROUP * 4),
            width,
            peak: i8::MAX,
        }
    }

    /// As [`Layout::quant`], with this peak.
    pub(super) fn quant_to(&mut self, peak: i8, rows: usize, width: usize) -> QuantBuf {
        QuantBuf { peak, ..self.quant(rows, width) }
    }
}

/// Everything that a step reads and writes.
pub(super) struct Case {
    pub(super) program: Program,
    pub(super) batch: Batch,
    pub(super) map: KvMap,
    pub(super) kv: Region,
    pub(super) workspace: Region,
}

impl Case {
    /// One op over `rows` rows of one span.
    pub(super) fn new(ops: Vec<Op>, layout: &Layout, batch: Batch) -> Self {
        let program = Program {
            ops,
            workspace_bytes: layout.bytes,
            rows_max: batch.tokens.len(),
            gathered_max: batch.gather.len(),
            output: None,
            hidden: None,
            kv: None,
            coarse: None,
        };
        let workspace = Region::new(layout.bytes).unwrap();
        Self { program, batch, map: KvMap::default(), kv: Region::new(0).unwrap(), workspace }
    }

    pub(super) fn fill(&mut self, buf: Buf, values: &[f32]) {
        self.workspace.floats_mut(buf.offset, values.len()).copy_from_slice(values);
    }

    /// Quantises `values` into a buffer, by f64.
    pub(super) fn fill_quant(&mut self, buf: QuantBuf, values: &[f32]) {
        let groups = buf.width / GROUP;
        let rows = values.len() / buf.width;
        for (g, group) in values.chunks_exact(GROUP).enumerate() {
            let at = place(g / groups, g % groups, rows, groups);
            let scale =
                group.iter().fold(0.0_f32, |peak, x| peak.max(x.abs())) / f32::from(buf.peak);
            let quants: Vec<i8> = group
                .iter()
                .map(|x| (f64::from(*x) * f64::from(1.0 / scale)).round_ties_even() as i8)
                .collect();
            let sum: i32 = quants.iter().map(|q| i32::from(*q)).sum();
            let bytes = self.workspace.as_bytes_mut();
            for (byte, q) in bytes[buf.values + at * GROUP..].iter_mut().zip(quants) {
                *byte = q as u8;
            }
            self.workspace.floats_mut(buf.scales, at + 1)[at] = scale;
            self.workspace.floats_mut(buf.sums, at + 1)[at] = sum as f32;
        }
    }

    /// Bytes, scale and sum of a group of a buffer with `rows` rows.
    pub(super) fn group(
        &self,
        buf: QuantBuf,
        rows: usize,
        (row, group): (usize, usize),
    ) -> (Vec<i8>, f32, f32) {
        let at = place(row, group, rows, buf.width / GROUP);
        let bytes = &self.workspace.as_bytes()[buf.values + at * GROUP..][..GROUP];
        let scale = self.workspace.floats(buf.scales, at + 1)[at];
        let sum = self.workspace.floats(buf.sums, at + 1)[at];
        (bytes.iter().map(|byte| *byte as i8).collect(), scale, sum)
    }

    pub(super) fn floats(&self, buf: Buf, rows: usize) -> Vec<f32> {
        self.workspace.floats(buf.offset, rows * buf.width).to_vec()
    }

    /// What 8-bit rows stand for.
    pub(super) fn dequantised(&self, buf: QuantBuf, rows: usize) -> Vec<f64> {
        let groups = (0..rows).flat_map(|row| (0..buf.width / GROUP).map(move |g| (row, g)));
        groups
            .flat_map(|at| {
                let (bytes, scale, _) = self.group(buf, rows, at);
                bytes.into_iter().map(move |q| f64::from(q) * f64::from(scale))
            })
            .collect()
    }

    pub(super) fn run(&mut self, set: SetKind, threads: usize) -> Result<(), ExecuteError> {
        let mut executor = Executor::new(Team::new(threads).unwrap(), set);
        assert_eq!((executor.set(), executor.threads()), (set, threads));
        let Case { program, batch, map, kv, workspace } = self;
        executor.execute(program, batch, map, kv, workspace)
    }

    /// Runs in every set on one and on three threads, and checks that all memory is the same.
    pub(super) fn run_everywhere(&mut self) {
        let before = [&self.workspace, &self.kv].map(|region| region.as_bytes().to_vec());
        let mut first: Option<[Vec<u8>; 2]> = None;
        for set in SetKind::ALL.into_iter().filter(|set| set.is_supported()) {
            for threads in [1, 3] {
                self.workspace.as_bytes_mut().copy_from_slice(&before[0]);
                self.kv.as_bytes_mut().copy_from_slice(&before[1]);
                self.run(set, threads).unwrap();
                let after = [&self.workspace, &self.kv].map(|region| region.as_bytes().to_vec());
                let first = first.get_or_insert_with(|| after.clone());
                for (first, after) in first.iter().zip(&after) {
                    let other = first.iter().zip(after).position(|(a, b)| a != b);
                    assert_eq!(other, None, "{} on {threads} threads", set.as_str());
                }
            }
        }
    }
}

/// Where a group lies among the groups of an 8-bit buffer.
fn place(row: usize, group: usize, rows: usize, groups: usize) -> usize {
    let first = row / 8 * 8;
    first * groups + group * (rows - first).min(8) + row % 8
}

/// A batch of spans of these lengths, each from position 0 on, all rows gathered.
pub(super) fn spans(lengths: &[usize]) -> Batch {
    let mut batch = Batch::default();
    for (index, length) in lengths.iter().enumerate() {
        let start = batch.tokens.len() as u32;
        batch.spans.push(BatchSpan { rows: start..start + *length as u32, start: 0, blocks: 0..0 });
        batch.tokens.extend(vec![0; *length]);
        batch.positions.extend(0..*length as u32);
        batch.span_of.extend(vec![index as u32; *length]);
    }
    batch.gather = (0..batch.tokens.len() as u32).collect();
    batch
}

/// Checks values against expected ones: `|a - e| ≤ tolerance × (1 + |e|)`.
#[track_caller]
pub(super) fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(*a) - e).abs();
        assert!(error <= tolerance * (1.0 + e.abs()), "value {i}: {a}, expected {e}");
    }
}

#[track_caller]
pub(super) fn assert_same_bits(a: &[f32], b: &[f32]) {
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(a) == bits(b), "bits differ: {:?}", a.iter().zip(b).find(|(a, b)| a != b));
}
