//! Puts a program together: lays out its workspace and appends the ops that every transformer
//! has. Knows no architecture and no file.

use std::sync::Arc;

use super::ops::{
    Activation, Buf, Epilogue, KvShape, Linear, Norm, Op, Program, QuantBuf, Rows, Vector,
};
use super::packed::{Packed, PackedFormat};

/// Rows that a model's workspace is sized for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Token positions in a step.
    pub rows: usize,
    /// Of these, how many can yield a token or a vector.
    pub yields: usize,
    /// Longest sequence.
    pub context: usize,
}

/// Puts a program together: ops in order, buffers side by side in one workspace.
#[derive(Debug)]
pub struct Builder {
    capacity: Capacity,
    ops: Vec<Op>,
    bytes: usize,
    scratch: Vec<(Rows, Activation)>,
    hidden: Option<Buf>,
}

impl Builder {
    /// An empty program for this many rows.
    pub fn new(capacity: Capacity) -> Self {
        Self { capacity, ops: Vec::new(), bytes: 0, scratch: Vec::new(), hidden: None }
    }

    /// What the workspace is sized for.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// A buffer of `width` f32 values for each of `rows`.
    pub fn full(&mut self, rows: Rows, width: usize) -> Buf {
        let offset = self.reserve(self.count(rows) * width * size_of::<f32>());
        Buf { offset, width }
    }

    /// A scratch buffer for the input of `weight`, in the form that it reads. What is written
    /// there is read by the very next op, so all layers share one buffer of a kind.
    pub fn input_for(&mut self, weight: &Packed, rows: Rows) -> Activation {
        let width = weight.k;
        let full = weight.format == PackedFormat::F32;
        let fits = |(of, scratch): &&(Rows, Activation)| {
            *of == rows
                && match scratch {
                    Activation::Full(buf) => full && buf.width == width,
                    Activation::Quant(buf) => !full && buf.width == width,
                }
        };
        if let Some((_, scratch)) = self.scratch.iter().find(fits) {
            return *scratch;
        }
        let scratch =
            if full { Activation::Full(self.full(rows, width)) } else { self.quant(rows, width) };
        self.scratch.push((rows, scratch));
        scratch
    }

    fn quant(&mut self, rows: Rows, width: usize) -> Activation {
        let count = self.count(rows);
        let groups = count * (width / 32) * size_of::<f32>();
        let values = self.reserve(count * width);
        let scales = self.reserve(groups);
        let sums = self.reserve(groups);
        Activation::Quant(QuantBuf { values, scales, sums, width })
    }

    /// Appends an op.
    pub fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// Appends `output = epilogue(input × weightᵀ + bias)`.
    pub fn linear(&mut self, layer: &Dense, input: Activation, epilogue: Epilogue, output: Buf) {
        self.push(Op::Linear(Linear {
            rows: Rows::All,
            input,
            weight: layer.weight.clone(),
            bias: layer.bias.clone(),
            epilogue,
            output,
        }));
    }

    /// Appends a normalisation of every row.
    pub fn norm(&mut self, scale: &Scale, input: Buf, output: Activation) {
        self.push(Op::Norm(Norm {
            rows: Rows::All,
            input,
            weight: scale.weight.clone(),
            bias: scale.bias.clone(),
            eps: scale.eps,
            output,
        }));
    }

    /// Says where the last hidden state of each row is left: nothing writes there afterwards.
    pub fn keep_hidden(&mut self, hidden: Buf) {
        self.hidden = Some(hidden);
    }

    /// The program; `output` is where its answers are.
    pub fn finish(self, output: Buf, kv: Option<KvShape>) -> Program {
        Program {
            ops: self.ops,
            workspace_bytes: self.bytes,
            rows_max: self.capacity.rows,
            gathered_max: self.capacity.yields,
            output: Some(output),
            hidden: self.hidden,
            kv,
        }
    }

    fn count(&self, rows: Rows) -> usize {
        match rows {
            Rows::All => self.capacity.rows,
            Rows::Gathered => self.capacity.yields,
        }
    }

    /// Cache lines are 64 bytes: no two buffers share one.
    fn reserve(&mut self, bytes: usize) -> usize {
        let offset = self.bytes;
        self.bytes += bytes.next_multiple_of(64);
        offset
    }
}

/// A matrix and its bias.
#[derive(Debug, Clone)]
pub struct Dense {
    /// Outputs × inputs.
    pub weight: Arc<Packed>,
    /// One value an output.
    pub bias: Option<Vector>,
}

/// A normalisation's parameters.
#[derive(Debug, Clone)]
pub struct Scale {
    /// One value a column.
    pub weight: Vector,
    /// One value a column; layer normalisation if there.
    pub bias: Option<Vector>,
    /// Added to the variance.
    pub eps: f32,
}
