//! Lowers matrix products, and the copies that bring rows into the form that products read.

use std::sync::Arc;

use super::{LowerError, Lowering, gathered, names};
use crate::kernels::cuda::arguments as args;
use crate::kernels::cuda::launches::Call;
use crate::kernels::cuda::matrices::MatrixFormat;
use crate::kernels::cuda::places::Places;
use crate::kernels::ops::{Activation, Convert, Epilogue, HalfLinear, Linear, Rows, Vector};
use crate::kernels::packed::Packed;

impl Lowering<'_> {
    pub(super) fn linear(&mut self, op: &Linear) -> Result<(), LowerError> {
        let Linear { rows, input, weight, bias, epilogue, output } = op;
        self.product(*rows, *input, (weight, bias.as_ref()), (*epilogue, (*output).into()))
    }

    pub(super) fn half_linear(&mut self, op: &HalfLinear) -> Result<(), LowerError> {
        let HalfLinear { rows, input, weight, bias, epilogue, output } = op;
        let input = Activation::Half(*input);
        self.product(*rows, input, (weight, bias.as_ref()), (*epilogue, *output))
    }

    pub(super) fn convert(&mut self, op: &Convert) -> Result<(), LowerError> {
        let (input, output) = (self.places.of(&op.input), self.places.of_activation(&op.output));
        let (rows, gathered) = match op.rows {
            Rows::All => (args::COPY_ALL, false),
            Rows::Gathered => (args::COPY_GATHERED, true),
        };
        self.fresh.remove(&Places::name(&op.output));
        self.copy(input.view, output.view, (op.input.width, rows), gathered)
    }

    fn product(
        &mut self,
        rows: Rows,
        input: Activation,
        (weight, bias): (&Arc<Packed>, Option<&Vector>),
        (epilogue, output): (Epilogue, Activation),
    ) -> Result<(), LowerError> {
        let input = self.multiplied(&input, rows)?;
        let view = self.places.of_activation(&output).view;
        let arguments = args::Linear {
            step: self.shared.step.0,
            input: input.data,
            bias: self.optional(bias)?,
            weight: self.uploads.matrix(self.gpu, weight)?,
            output: view,
            stride: input.stride,
            gathered: gathered(rows),
            epilogue: match epilogue {
                Epilogue::Store => 0,
                Epilogue::Add => 1,
                Epilogue::Gelu => 2,
                Epilogue::Tanh => 3,
                Epilogue::Relu => 4,
            },
            unused: 0,
        };
        self.fresh.remove(&Places::name(&output));
        let names = names(MatrixFormat::of(weight.format), self.shared.deterministic);
        let shape = (weight.n as u32, rows == Rows::Gathered);
        self.calls.push(Call::product(self.gpu, names, shape, &arguments)?);
        Ok(())
    }
}
