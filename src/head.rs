//! From hidden rows to answers: the language-model head on the rows that sample, pooling, and
//! scores. So one architecture file can generate, embed or rank.

use std::sync::Arc;

use crate::kernels::builder::{Builder, Dense, Scale};
use crate::kernels::ops::{
    Activation, Buf, Epilogue, Gather, Linear, Norm, Op, Pool, PoolKind, Rows,
};
use crate::kernels::packed::Packed;

/// Appends the head of a generator: only rows that sample are normalised and multiplied, for the
/// vocabulary is the largest matrix of a small model. Returns the logits (gathered rows ×
/// vocabulary).
pub fn language_model(
    builder: &mut Builder,
    hidden: Buf,
    norm: Scale,
    vocabulary: Arc<Packed>,
) -> Buf {
    let rows = Rows::Gathered;
    let input = builder.full(rows, hidden.width);
    let normed = builder.input_for(&vocabulary, rows);
    let logits = builder.full(rows, vocabulary.n);
    builder.push(Op::Gather(Gather { input: hidden, output: input }));
    let Scale { weight, bias, eps } = norm;
    builder.push(Op::Norm(Norm { rows, input, weight, bias, eps, output: normed }));
    builder.push(Op::Linear(Linear {
        rows,
        input: normed,
        weight: vocabulary,
        bias: None,
        epilogue: Epilogue::Store,
        output: logits,
    }));
    logits
}

/// Appends the head of an encoder: one vector a span, not normalised: whether it is to be is the
/// caller's wish.
pub fn pool(builder: &mut Builder, hidden: Buf, kind: PoolKind) -> Buf {
    let output = builder.full(Rows::Gathered, hidden.width);
    builder.push(Op::Pool(Pool { kind, normalize: false, input: hidden, output }));
    output
}

/// Appends the head of a classifier: the state of each span's first row through `inner` and its
/// activation, then a score for each row of `output`'s matrix.
pub fn scores(
    builder: &mut Builder,
    hidden: Buf,
    (inner, activation): (&Dense, Epilogue),
    output: &Dense,
) -> Buf {
    let first = pool(builder, hidden, PoolKind::Cls);
    let middle = linear(builder, first, inner, activation);
    linear(builder, middle, output, Epilogue::Store)
}

/// Appends a matrix for the gathered rows.
fn linear(builder: &mut Builder, input: Buf, layer: &Dense, epilogue: Epilogue) -> Buf {
    let rows = Rows::Gathered;
    let output = builder.full(rows, layer.weight.n);
    let Dense { weight, bias } = layer.clone();
    let input = Activation::Full(input);
    builder.push(Op::Linear(Linear { rows, input, weight, bias, epilogue, output }));
    output
}
