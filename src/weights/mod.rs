//! Tensors from files: read in parallel, repacked, within bounds; no memory map.
