//! Where a program's buffers lie on the device, and of what type they are. Knows no kernel.

use std::collections::BTreeMap;

use super::arguments::View;
use super::lower::products::gating_of;
use crate::device::cuda::Address;
use crate::kernels::ops::{Activation, Buf, Epilogue, Op, Program, Rows};

/// Strides of bf16 rows are multiples of this: whole cache lines, and whole steps of a product.
const STRIDE: usize = 64;

/// What is known of a buffer.
#[derive(Debug, Clone, Copy, Default)]
struct Need {
    width: usize,
    /// Used for all rows of a step, not for gathered ones only.
    all: bool,
    /// f32: something is added to it, or it is an answer.
    full: bool,
    /// A product reads it.
    multiplied: bool,
}

/// A buffer on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// The buffer.
    pub(super) view: View,
    /// A bf16 copy for products, where the buffer is f32.
    pub(super) copy: View,
    /// Values a row.
    pub(super) width: usize,
}

/// All buffers of a program.
#[derive(Debug)]
pub(super) struct Places {
    places: BTreeMap<usize, Place>,
    /// Bytes that they take.
    pub(super) bytes: usize,
}

/// The buffer's name: programs lay buffers out side by side, so the offset is one.
fn key(activation: &Activation) -> (usize, usize) {
    match activation {
        Activation::Full(buf) => (buf.offset, buf.width),
        Activation::Quant(quant) => (quant.values, quant.width),
        Activation::Half(half) => (half.offset, half.width),
    }
}

impl Places {
    /// Lays the buffers of `program` out from `start` on.
    pub(super) fn new(program: &Program, start: Address) -> Self {
        let needs = survey(program);
        let mut places = BTreeMap::new();
        let mut bytes = 0;
        let mut take = |rows: usize, row_bytes: usize| {
            let place = start.plus(bytes);
            bytes += (rows * row_bytes).next_multiple_of(256);
            place
        };
        for (name, need) in needs {
            let rows = if need.all { program.rows_max } else { program.gathered_max };
            let stride = need.width.next_multiple_of(STRIDE);
            let mut half =
                || View { data: take(rows, 2 * stride).0, stride: stride as u32, half: 1 };
            let (view, copy) = match (need.full, need.multiplied) {
                (false, _) => (half(), View::NONE),
                (true, true) => {
                    let copy = half();
                    (View::full(take(rows, 4 * need.width), need.width), copy)
                }
                (true, false) => (View::full(take(rows, 4 * need.width), need.width), View::NONE),
            };
            places.insert(name, Place { view, copy, width: need.width });
        }
        Self { places, bytes }
    }

    /// Where `buf` lies.
    pub(super) fn of(&self, buf: &Buf) -> Place {
        self.places[&buf.offset]
    }

    /// Where the rows of `activation` lie.
    pub(super) fn of_activation(&self, activation: &Activation) -> Place {
        self.places[&key(activation).0]
    }

    /// The name of a buffer.
    pub(super) fn name(activation: &Activation) -> usize {
        key(activation).0
    }
}

/// Goes through all ops and notes what each buffer is used for.
fn survey(program: &Program) -> BTreeMap<usize, Need> {
    let mut needs: BTreeMap<usize, Need> = BTreeMap::new();
    let mut note = |activation: Activation, rows: Rows, full: bool, multiplied: bool| {
        let (name, width) = key(&activation);
        let need = needs.entry(name).or_default();
        need.width = need.width.max(width);
        need.all |= rows == Rows::All;
        need.full |= full;
        need.multiplied |= multiplied;
    };
    let buffer = Activation::Full;
    let mut ops = program.ops.iter().peekable();
    while let Some(op) = ops.next() {
        // What lies between a product and gating at its end goes nowhere.
        let gating = gating_of(op, ops.peek().copied());
        ops.next_if(|_| gating.is_some());
        let end = |output| gating.map_or(output, |gating| gating.output);
        match op {
            Op::Embed(op) => note(buffer(op.output), Rows::All, true, false),
            Op::Norm(op) => {
                note(buffer(op.input), op.rows, false, false);
                note(op.output, op.rows, false, false);
            }
            Op::Linear(op) => {
                note(op.input, op.rows, false, true);
                note(end(buffer(op.output)), op.rows, op.epilogue == Epilogue::Add, false);
            }
            Op::HalfLinear(op) => {
                note(Activation::Half(op.input), op.rows, false, true);
                note(end(op.output), op.rows, op.epilogue == Epilogue::Add, false);
            }
            Op::Convert(op) => {
                note(buffer(op.input), op.rows, false, false);
                note(op.output, op.rows, false, false);
            }
            Op::HeadNorm(op) => note(buffer(op.qkv), Rows::All, false, false),
            Op::Rope(op) => note(buffer(op.qkv), Rows::All, false, false),
            Op::RopeStore(op) => note(buffer(op.qkv), Rows::All, false, false),
            Op::PagedAttention(op) => {
                note(buffer(op.qkv), Rows::All, false, false);
                note(op.output, Rows::All, false, false);
            }
            Op::PackedAttention(op) => {
                note(buffer(op.qkv), Rows::All, false, false);
                note(op.output, Rows::All, false, false);
            }
            Op::GatedSilu(op) => {
                note(buffer(op.input), Rows::All, false, false);
                note(op.output, Rows::All, false, false);
            }
            Op::Gather(op) => {
                note(buffer(op.input), Rows::All, false, false);
                note(buffer(op.output), Rows::Gathered, true, false);
            }
            Op::Pool(op) => {
                note(buffer(op.input), Rows::All, false, false);
                note(buffer(op.output), Rows::Gathered, true, false);
            }
        }
    }
    if let Some(output) = program.output {
        note(buffer(output), Rows::Gathered, true, false);
    }
    if let Some(hidden) = program.hidden {
        note(buffer(hidden), Rows::All, true, false);
    }
    needs
}
