//! Norms, gathering, pooling and tables with positions, and what is refused.

use super::*;
use crate::device::cuda::fault::GpuError;
use crate::kernels::builder::{Builder, Capacity};
use crate::kernels::ops::{Activation, Embed, Norm, Op, Pool, PoolKind, Rows};

const VOCABULARY: usize = 31;

/// Embeds, normalises in place, pools.
fn encoder(width: usize, bias: bool, kind: PoolKind, normalize: bool) -> Program {
    let mut random = Random::new(width as u64);
    let mut builder = Builder::new(Capacity { rows: 80, yields: 80, context: 80 });
    let hidden = builder.full(Rows::All, width);
    let output = builder.full(Rows::Gathered, width);
    builder.push(Op::Embed(Embed {
        table: dense(&mut random, VOCABULARY, width, 1.0),
        positions: Some(random.floats(80 * width).into()),
        types: Some(random.floats(2 * width).into()),
        output: hidden,
    }));
    builder.push(Op::Norm(Norm {
        rows: Rows::All,
        input: hidden,
        weight: random.floats(width).into(),
        bias: bias.then(|| random.floats(width).into()),
        // Large enough to be seen.
        eps: 0.25,
        output: Activation::Full(hidden),
    }));
    builder.push(Op::Pool(Pool { kind, normalize, input: hidden, output }));
    builder.finish(output, None)
}

#[test]
fn norms_and_pooling_are_right() {
    // Fewer values than threads, and more than a thread keeps.
    for width in [48, 2100] {
        for kind in [PoolKind::Mean, PoolKind::Cls, PoolKind::Last] {
            for (bias, normalize) in [(false, false), (true, true)] {
                let mut pair = Pair::new(encoder(width, bias, kind, normalize));
                let work = spans(&[1, 40, 7], VOCABULARY);
                let (device, reference) = pair.both(&work, 3);
                assert_near(&device, &reference, 1e-5);
            }
        }
    }
}

#[test]
fn token_types_are_added() {
    let mut pair = Pair::new(encoder(48, true, PoolKind::Mean, true));
    let mut work = spans(&[5, 9], VOCABULARY);
    let (plain, _) = pair.both(&work, 2);
    work.batch.types = (0..14).map(|row| u32::from(row > 8)).collect();
    let (device, reference) = pair.both(&work, 2);
    assert_near(&device, &reference, 1e-5);
    assert_eq!(device[..48], plain[..48], "the first text has no other types");
    assert_ne!(device[48..], plain[48..]);
    work.batch.types[3] = 2;
    assert!(matches!(pair.step(&work), Err(RunError::Work(_))), "a type that is not there");
}

#[test]
fn vectors_come_back_by_span() {
    let mut pair = Pair::new(encoder(32, true, PoolKind::Mean, true));
    let work = spans(&[3, 5], VOCABULARY);
    let answers = pair.step(&work).unwrap();
    let vectors = answers.vectors.concat();
    assert_eq!((answers.vectors.len(), vectors.len()), (2, 64));
    assert_near(&vectors, &pair.expected(&work.batch, 2), 1e-5);
}

#[test]
fn what_does_not_fit_is_refused_before_the_device_sees_it() {
    let mut pair = Pair::new(encoder(32, true, PoolKind::Mean, true));
    let good = spans(&[3, 5], VOCABULARY);
    let mut bad = vec![good.clone(); 5];
    bad[0].batch.positions.pop();
    bad[1].batch.positions[2] = 80;
    bad[2].batch.spans.pop();
    bad[3].batch.gather[0] = 8;
    bad[4] = spans(&[81], VOCABULARY);
    for work in bad {
        assert!(matches!(pair.step(&work), Err(RunError::Work(_))));
    }
    pair.step(&good).unwrap();
}

#[test]
fn a_lost_device_is_told_from_a_lost_step() {
    for (code, sticky) in [(700, true), (719, true), (214, true), (1, false), (2, false)] {
        let mut emulator = Emulator::new();
        emulator.fails_at = Some((2, GpuError::new("cuLaunchKernel", code, "told to fail")));
        let program = encoder(32, true, PoolKind::Mean, true);
        let mut pair = Pair::with(program, Box::new(emulator), false);
        let failed = pair.step(&spans(&[3], VOCABULARY)).unwrap_err();
        assert_eq!(failed.is_sticky(), sticky, "{code}");
    }
}
