//! Puts a program together: lays out its workspace and appends the ops that every transformer
//! has. Knows no architecture and no file.

use std::sync::Arc;

use super::ops::{
    Activation, Buf, Convert, Epilogue, HalfBuf, HalfLinear, KvShape, Linear, Norm, Op, Program,
    QuantBuf, Rows, Vector,
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
        let form = Form::of(weight);
        let fits = |(of, scratch): &&(Rows, Activation)| {
            *of == rows && Form::from(scratch) == form && scratch.width() == weight.k
        };
        if let Some((_, scratch)) = self.scratch.iter().find(fits) {
            return *scratch;
        }
        let scratch = match form {
            Form::Full => Activation::Full(self.full(rows, weight.k)),
            Form::Quant { peak } => self.quant(rows, weight.k, peak),
            Form::Half => self.half(rows, weight.k),
        };
        self.scratch.push((rows, scratch));
        scratch
    }

    fn half(&mut self, rows: Rows, width: usize) -> Activation {
        let offset = self.reserve(self.count(rows) * width * size_of::<u16>());
        Activation::Half(HalfBuf { offset, width })
    }

    fn quant(&mut self, rows: Rows, width: usize, peak: i8) -> Activation {
        let count = self.count(rows);
        let groups = count * (width / 32) * size_of::<f32>();
        let values = self.reserve(count * width);
        let scales = self.reserve(groups);
        let sums = self.reserve(groups);
        Activation::Quant(QuantBuf { values, scales, sums, width, peak })
    }

    /// Appends an op. Where the input of a matrix is f32 and the matrix wants another form, it is
    /// converted on the way.
    pub fn push(&mut self, op: Op) {
        match op {
            Op::Linear(op) => self.push_linear(op),
            op => self.ops.push(op),
        }
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

    /// Appends `layer` of `input` and its activation, in the form that the next matrix reads.
    /// As with [`Builder::input_for`], the next op has to read it.
    pub fn linear_for(
        &mut self,
        next: &Packed,
        layer: &Dense,
        input: Buf,
        epilogue: Epilogue,
    ) -> Activation {
        let rows = Rows::All;
        let output = self.input_for(next, rows);
        let Dense { weight, bias } = layer.clone();
        match output {
            Activation::Full(output) => {
                self.linear(layer, Activation::Full(input), epilogue, output);
            }
            Activation::Half(_) if weight.format == PackedFormat::Bf16 => {
                let Activation::Half(input) = self.converted(input, &weight, rows) else {
                    unreachable!("bf16 weights read bf16 rows")
                };
                self.ops.push(Op::HalfLinear(HalfLinear {
                    rows,
                    input,
                    weight,
                    bias,
                    epilogue,
                    output,
                }));
            }
            output => {
                let wide = self.wide(rows, weight.n);
                self.linear(layer, Activation::Full(input), epilogue, wide);
                self.ops.push(Op::Convert(Convert { rows, input: wide, output }));
            }
        }
        output
    }

    fn push_linear(&mut self, op: Linear) {
        let Linear { rows, input, weight, bias, epilogue, output } = op;
        let input = match input {
            Activation::Full(input) => self.converted(input, &weight, rows),
            ready => ready,
        };
        self.ops.push(match input {
            Activation::Half(input) => {
                let output = Activation::Full(output);
                Op::HalfLinear(HalfLinear { rows, input, weight, bias, epilogue, output })
            }
            input => Op::Linear(Linear { rows, input, weight, bias, epilogue, output }),
        });
    }

    /// `input` as `weight` reads it.
    fn converted(&mut self, input: Buf, weight: &Packed, rows: Rows) -> Activation {
        if Form::of(weight) == Form::Full {
            return Activation::Full(input);
        }
        let output = self.input_for(weight, rows);
        self.ops.push(Op::Convert(Convert { rows, input, output }));
        output
    }

    /// A scratch buffer of f32.
    fn wide(&mut self, rows: Rows, width: usize) -> Buf {
        let found = self.scratch.iter().find_map(|(of, scratch)| match scratch {
            Activation::Full(buf) if *of == rows && buf.width == width => Some(*buf),
            _ => None,
        });
        found.unwrap_or_else(|| {
            let buf = self.full(rows, width);
            self.scratch.push((rows, Activation::Full(buf)));
            buf
        })
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
            coarse: None,
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

/// The forms that rows come in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Full,
    Quant { peak: i8 },
    Half,
}

impl Form {
    /// What a matrix reads.
    fn of(weight: &Packed) -> Self {
        match weight.format {
            PackedFormat::F32 => Form::Full,
            PackedFormat::Bf16 => Form::Half,
            PackedFormat::Q8Low => Form::Quant { peak: QuantBuf::LOW },
            _ => Form::Quant { peak: i8::MAX },
        }
    }

    fn from(activation: &Activation) -> Self {
        match activation {
            Activation::Full(_) => Form::Full,
            Activation::Quant(buf) => Form::Quant { peak: buf.peak },
            Activation::Half(_) => Form::Half,
        }
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
