//! One binary for all integration tests: a large link is paid once.

mod api;
mod candle;
mod cli;
mod clients;
mod drain;
mod fixtures;
mod models;
mod prometheus;
mod readme;
mod server;
mod tidy;
