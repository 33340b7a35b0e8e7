//! Lowers matrix products, and the copies that bring rows into the form that products read.

use std::sync::Arc;

use super::{LowerError, Lowering, Normed, gathered, names};
use crate::kernels::cuda::arguments as args;
use crate::kernels::cuda::launches::{Call, ProductShape};
use crate::kernels::cuda::matrices::MatrixFormat;
use crate::kernels::cuda::places::Places;
use crate::kernels::ops::{
    Activation, Convert, Epilogue, GatedSilu, HalfLinear, Linear, Norm, Op, Program, Rows, Vector,
};
use crate::kernels::packed::Packed;

impl Lowering<'_> {
    /// A product, and the gating that ends it.
    pub(super) fn linear(
        &mut self,
        op: &Linear,
        gating: Option<&GatedSilu>,
    ) -> Result<(), LowerError> {
        let Linear { rows, input, weight, bias, epilogue, output } = op;
        let output = (*epilogue, (*output).into());
        self.product(*rows, *input, (weight, bias.as_ref()), output, gating)
    }

    /// As [`Self::linear`].
    pub(super) fn half_linear(
        &mut self,
        op: &HalfLinear,
        gating: Option<&GatedSilu>,
    ) -> Result<(), LowerError> {
        let HalfLinear { rows, input, weight, bias, epilogue, output } = op;
        let (input, output) = (Activation::Half(*input), (*epilogue, *output));
        self.product(*rows, input, (weight, bias.as_ref()), output, gating)
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
        gating: Option<&GatedSilu>,
    ) -> Result<(), LowerError> {
        let input = self.multiplied(&input, rows)?;
        let output = gating.map_or(output, |gating| gating.output);
        let gated_outputs = gating.map_or(0, |_| weight.n as u32 / 2);
        let view = self.places.of_activation(&output).view;
        let normed = self.normed.take();
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
            gated: gated_outputs,
            full: normed.map_or(0, |of| of.input.data),
            scales: normed.map_or(0, |of| of.scales.0),
            full_stride: normed.map_or(0, |of| of.input.stride),
            eps: normed.map_or(0.0, |of| of.eps),
            parts: self.shared.parts.0,
            arrived: self.shared.arrived.0,
        };
        self.fresh.remove(&Places::name(&output));
        let (format, deterministic) = (MatrixFormat::of(weight.format), self.shared.deterministic);
        let names = names(format, normed.is_some(), deterministic);
        let shape = ProductShape {
            inputs: weight.k as u32,
            outputs: weight.n as u32,
            gathered: rows == Rows::Gathered,
            gated: gated_outputs > 0,
        };
        self.calls.push(Call::product(self.gpu, names, shape, &arguments)?);
        Ok(())
    }
}

impl Lowering<'_> {
    /// What a product needs to do the norm itself; nothing if it cannot, or if a row's bits would
    /// depend on its company by that.
    pub(super) fn rows_to_norm(&mut self, op: &Norm) -> Result<Option<Normed>, LowerError> {
        let input = self.places.of(&op.input).view;
        if self.shared.deterministic || input.half == 1 {
            return Ok(None);
        }
        let scales = self.uploads.vector(self.gpu, &op.weight)?;
        Ok(Some(Normed { input, scales, eps: op.eps }))
    }
}

/// Whether a norm's rows are read by nothing but a product right after it, which can make them
/// itself. `later` are the ops after the norm.
pub(in crate::kernels::cuda) fn is_for_product(
    program: &Program,
    norm: &Norm,
    later: &[Op],
) -> bool {
    let [next, later @ ..] = later else { return false };
    let rows = match next {
        Op::Linear(op) => op.rows,
        Op::HalfLinear(op) => op.rows,
        _ => return false,
    };
    // Buffers are used again: what counts is who reads this one before it is written anew.
    let touches = |op: &&Op| op.input() == Some(norm.output) || op.output() == norm.output;
    let stays = match later.iter().find(touches) {
        Some(op) => op.input() == Some(norm.output) || op.adds(),
        None => [program.output, program.hidden]
            .iter()
            .flatten()
            .any(|buf| norm.output == (*buf).into()),
    };
    next.input() == Some(norm.output)
        // Its blocks would read rows that others have added to.
        && next.output() != norm.input.into()
        && rows == norm.rows
        && norm.bias.is_none()
        && norm.input.width.is_multiple_of(32)
        && !stays
}

/// The gating that `next` is, if kernels can do it at the end of the product `op`.
pub(in crate::kernels::cuda) fn gating_of<'o>(
    op: &Op,
    next: Option<&'o Op>,
) -> Option<&'o GatedSilu> {
    let Some(Op::GatedSilu(gating)) = next else { return None };
    let (epilogue, bias, output, weight) = match op {
        Op::Linear(op) => (op.epilogue, &op.bias, op.output.into(), &op.weight),
        Op::HalfLinear(op) => (op.epilogue, &op.bias, op.output, &op.weight),
        _ => return None,
    };
    let plain = epilogue == Epilogue::Store && bias.is_none();
    // Gates are taken by eight.
    let fits = weight.n == gating.input.width && weight.n.is_multiple_of(16);
    // Blocks that still multiply would read what others have written.
    let apart = op.input() != Some(gating.output);
    let next = output == Activation::Full(gating.input);
    (plain && fits && apart && next).then_some(gating)
}
