//! From hidden rows to answers: the language-model head on the rows that sample, and pooling. So
//! one architecture file can generate or embed.

use std::sync::Arc;

use crate::kernels::builder::{Builder, Scale};
use crate::kernels::ops::{Buf, Epilogue, Gather, Linear, Norm, Op, Pool, PoolKind, Rows};
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

/// Appends the head of an encoder: one vector a span.
pub fn pool(builder: &mut Builder, hidden: Buf, kind: PoolKind, normalize: bool) -> Buf {
    let output = builder.full(Rows::Gathered, hidden.width);
    builder.push(Op::Pool(Pool { kind, normalize, input: hidden, output }));
    output
}
