//! The CPU kernel sets. Op bodies are written once, over 16 lanes (`isa::Isa`), and compiled
//! for each instruction set, so that all sets give the same bits. Only what `isa::Isa` asks for
//! is written by hand for each; `scalar.rs` spells it out.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod attention;
pub mod executor;
mod head_norm;
mod halves;
pub mod isa;
mod large;
mod linear;
pub(super) mod math;
mod rescore;
mod rope;
mod rows;
mod scalar;
mod views;

#[cfg(test)]
mod tests;
