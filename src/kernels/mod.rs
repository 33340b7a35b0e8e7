//! The operations of a step. A model is a [`ops::Program`]: a list of ops over buffers of one
//! workspace, made once at load. A kernel set runs programs; `cpu/` is one, CUDA another. Every
//! op has a scalar reference that defines its result bit by bit; SIMD sets must give the same
//! bits, whatever rows share the batch. No op allocates.

pub mod batch;
pub mod builder;
pub mod coarse;
pub mod cpu;
pub mod cuda;
pub mod ops;
pub mod packed;
pub mod sample;
