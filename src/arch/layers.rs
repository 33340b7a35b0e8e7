//! What architectures share: laying out a workspace, and the ops that every transformer has.

use std::sync::Arc;

use crate::arch::Capacity;
use crate::kernels::ops::{
    Activation, Buf, Epilogue, KvShape, Linear, Norm, Op, Program, QuantBuf, Rows, Vector,
};
use crate::kernels::packed::{Packed, PackedFormat};

/// Puts a program together: ops in order, buffers side by side in one workspace.
#[derive(Debug)]
pub struct Builder {
    capacity: Capacity,
    ops: Vec<Op>,
    bytes: usize,
    scratch: Vec<(Rows, Activation)>,
}

impl Builder {
    /// An empty program for this many rows.
    pub fn new(capacity: Capacity) -> Self {
        Self { capacity, ops: Vec::new(), bytes: 0, scratch: Vec::new() }
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

    /// The program; `output` is where its answers are.
    pub fn finish(self, output: Buf, kv: Option<KvShape>) -> Program {
        Program {
            ops: self.ops,
            workspace_bytes: self.bytes,
            rows_max: self.capacity.rows,
            gathered_max: self.capacity.yields,
            output: Some(output),
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

/// Cosines, then sines, of each position's rotation angles: `[context][head_dim]`, the first half
/// of a row cosines, the second half sines. Angles are taken in f64: at position 8,000 an f32
/// product is already off by 5e-4.
pub fn rope_table(context: usize, head_dim: usize, base: f64, dims: usize) -> Vector {
    let half = head_dim / 2;
    let mut table = vec![0f32; context * head_dim];
    for (position, row) in table.chunks_exact_mut(head_dim).enumerate() {
        for i in 0..half {
            let turn = if 2 * i < dims { base.powf(-2.0 * i as f64 / dims as f64) } else { 0.0 };
            let angle = position as f64 * turn;
            row[i] = angle.cos() as f32;
            row[half + i] = angle.sin() as f32;
        }
    }
    table.into()
}
