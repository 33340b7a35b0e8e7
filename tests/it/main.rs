//! One binary for all integration tests: a large link is paid once.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod api;
mod candle;
mod checkpoint;
mod cli;
mod clients;
mod connections;
mod decoders;
mod drain;
mod encoders;
mod fixtures;
mod formats;
mod headers;
mod image;
mod keys;
mod models;
mod prometheus;
mod proxies;
mod readme;
mod server;
mod sources;
mod slow;
mod tidy;
mod tokens;
