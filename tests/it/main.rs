//! One binary for all integration tests: a large link is paid once.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod api;
mod autoscaling;
mod candle;
mod cli;
mod clients;
mod day;
mod drain;
mod fixtures;
mod fleet;
mod formats;
mod headers;
mod hpa;
mod k8s_agreement;
mod k8s_alerts;
mod k8s_manifests;
mod k8s_queries;
mod k8s_tools;
mod models;
mod prometheus;
mod readme;
mod server;
mod tidy;
mod tokens;
