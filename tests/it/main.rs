//! One binary for all integration tests: a large link is paid once.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod api;
mod candle;
mod cli;
mod clients;
mod drain;
mod encoder_api;
mod encoders;
mod fixtures;
mod formats;
mod headers;
mod models;
mod prometheus;
mod readme;
mod server;
mod tidy;
mod tokens;
