//! The front over a hand-driven engine.
