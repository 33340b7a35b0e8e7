//! Integration tests: one binary, so that a large link is paid once.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod fixtures;
mod headers;
mod tokens;
