//! One binary for all integration tests: a large link is paid once.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod api;
mod candle;
mod checkpoint;
mod cli;
mod clients;
mod decoders;
mod drain;
mod fixtures;
mod formats;
mod headers;
mod models;
mod prometheus;
mod readme;
mod server;
mod tidy;
mod tokens;
