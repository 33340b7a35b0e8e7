//! The device: its memory, and the threads or streams that run kernels. Knows no model, no op and
//! no scheduler.

pub mod arena;
pub mod cpu;
pub mod cuda;
pub mod memory;
pub mod nvml;
pub mod threads;
