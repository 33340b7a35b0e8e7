//! Products by AVX-VNNI on any processor with AVX2: where the instruction is missing, it traps, and
//! the handler does its work.

use std::mem::MaybeUninit;
use std::sync::Once;

use super::*;
use crate::kernels::cpu::isa::SetKind;
use crate::kernels::cpu::scalar::Scalar;

/// Where a signal's saved registers begin (XSAVE, standard form): the low halves, the words that
/// say which parts hold anything, and the high halves.
const LOW: usize = 160;
const IN_USE: usize = 512;
const HIGH: usize = 576;

/// Carries out `vpdpbusd` between registers, as `{vex}` encodes it; ends the process at all else.
extern "C" fn carry_out(
    signal: libc::c_int,
    _: *const libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the system's context of this signal, whose instruction pointer was just read from.
    // The registers were saved by XSAVE, as on every processor with AVX.
    unsafe {
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let at = &mut machine.gregs[libc::REG_RIP as usize];
        let code = std::slice::from_raw_parts(*at as *const u8, 5);
        let is_ours = code[0] == 0xC4
            && code[1] & 0x1F == 2
            && code[2] & 0x87 == 0x05
            && code[3] == 0x50
            && code[4] >> 6 == 3;
        if !is_ours {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        *at += 5;
        let inverted = |bit: u8| if code[1] & bit == 0 { 8 } else { 0 };
        let sums = usize::from(code[4] >> 3 & 7) + inverted(0x80);
        let weights = usize::from(!(code[2] >> 3) & 15);
        let rows = usize::from(code[4] & 7) + inverted(0x20);
        let saved = machine.fpregs.cast::<u8>();
        let parts = |register: usize| [LOW, HIGH].map(|part| saved.add(part + 16 * register));
        for half in 0..2 {
            let sums = parts(sums)[half].cast::<[i32; 4]>();
            let weights = parts(weights)[half].cast::<[[u8; 4]; 4]>().read_unaligned();
            let rows = parts(rows)[half].cast::<[[i8; 4]; 4]>().read_unaligned();
            let mut sum = sums.read_unaligned();
            for (sum, (weights, rows)) in sum.iter_mut().zip(weights.iter().zip(&rows)) {
                let products = weights.iter().zip(rows).map(|(w, x)| i32::from(*w) * i32::from(*x));
                *sum += products.sum::<i32>();
            }
            sums.write_unaligned(sum);
        }
        let in_use = saved.add(IN_USE).cast::<u64>();
        in_use.write_unaligned(in_use.read_unaligned() | 0b110);
    }
}

/// Lets this process run AVX-VNNI.
fn allow() {
    static ONCE: Once = Once::new();
    if is_x86_feature_detected!("avxvnni") {
        return;
    }
    // SAFETY: a handler that touches nothing but the interrupted thread's registers.
    ONCE.call_once(|| unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        action.sa_sigaction = carry_out as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
    });
}

/// Sums of every kind for `R` rows.
#[inline(always)]
fn sums<S: Isa, const R: usize>(s: S, weights: &[u8; 512], rows: &[[i8; GROUP]; R]) -> Vec<f32> {
    let totals = rows.map(|row| row.iter().map(|x| f32::from(*x)).sum::<f32>());
    // No value may be larger than 90 for these.
    let low_weights = weights.map(|w| w % 181);
    let low_rows = rows.map(|row| row.map(|x| x % 91));
    let low_totals = low_rows.map(|row| row.iter().map(|x| f32::from(*x)).sum::<f32>());
    // And than 127 for those with shifts.
    let small: [u8; 256] = std::array::from_fn(|i| weights[i] & 127);
    let (halves, quarter) = (weights.first_chunk().unwrap(), weights.first_chunk().unwrap());
    let mut all = vec![
        s.dot_q4(halves, rows),
        s.dot_q8(weights, rows, &totals),
        s.dot_low(&low_weights, &low_rows, &low_totals),
    ];
    for half in 0..2 {
        all.push(s.dot_half_q4(quarter, rows, half));
        all.push(s.dot_half_q8(&small, rows, half));
    }
    all.into_iter().flatten().flat_map(|sum| s.store(sum)).collect()
}

#[target_feature(enable = "avx2,fma,f16c")]
fn sums_by_vnni<const R: usize>(weights: &[u8; 512], rows: &[[i8; GROUP]; R]) -> Vec<f32> {
    sums(Avx2::<true>, weights, rows)
}

fn check<const R: usize>(next: &mut impl FnMut() -> u8) {
    for _ in 0..20 {
        let weights = std::array::from_fn(|_| next());
        let rows = [[0; GROUP]; R].map(|row| row.map(|_: i32| (next() as i8).max(-127)));
        // SAFETY: the caller has looked.
        let found = unsafe { sums_by_vnni(&weights, &rows) };
        assert_eq!(found, sums(Scalar, &weights, &rows), "{R} rows");
    }
}

#[test]
fn sums_by_vnni_are_the_reference_sets() {
    if !SetKind::Avx2.is_supported() {
        return;
    }
    allow();
    let mut state = 1_u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // The ends are where sums would be cut.
        match (state >> 56) as u8 {
            0..40 => 255,
            40..60 => 129,
            other => other,
        }
    };
    check::<1>(&mut next);
    check::<2>(&mut next);
    check::<3>(&mut next);
    check::<4>(&mut next);
    check::<8>(&mut next);
}
