//! The device: its memory, and the threads or streams that run kernels.
