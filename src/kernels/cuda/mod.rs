//! The CUDA kernel set: a program is lowered once, at load, to a list of kernel launches over
//! device memory; a step uploads its tables and launches the list. Results agree with the
//! reference within rounding to bf16, not bit for bit. Chosen tokens are the same where logits
//! are.
//!
//! Residual streams, logits and vectors are f32; all other rows and dense weights are bf16, KV
//! blocks f16. Tests run the same `.cu` files on a processor (`emulate.h`).

mod arguments;
mod check;
pub mod details;
pub mod executor;
mod graphs;
mod launches;
mod lower;
mod matrices;
mod places;
mod shared;
pub mod tables;

#[cfg(test)]
pub(crate) mod emulator;
#[cfg(test)]
mod tests;

/// All kernels, compiled for each chip that we know, and as PTX for those to come.
#[cfg(feature = "cuda")]
pub static IMAGE: &[u8] = &ALIGNED.0;

/// The driver reads it in words.
#[cfg(feature = "cuda")]
#[repr(align(16))]
struct Aligned<T>(T);

#[cfg(feature = "cuda")]
static ALIGNED: Aligned<[u8; include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")).len()]> =
    Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// This program was built without CUDA.
#[cfg(not(feature = "cuda"))]
pub static IMAGE: &[u8] = &[];
