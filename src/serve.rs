//! `sconce serve`: the composition root. The only file that sees core, device and front.
