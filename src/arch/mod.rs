//! Architectures: one file each, which turns a model's tensors into a program. A registry line
//! adds one.
