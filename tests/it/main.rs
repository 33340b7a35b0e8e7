//! One binary for all integration tests: a large link is paid once.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod allocations;
mod api;
mod autoscaling;
mod callers;
mod candle;
mod checkpoint;
mod cli;
mod clients;
mod connections;
mod contract;
mod dashboard;
mod day;
mod decoders;
mod drain;
mod encoder_api;
mod encoders;
mod failing;
mod fixtures;
mod fleet;
mod formats;
mod headers;
mod image;
mod keys;
mod hpa;
mod k8s_agreement;
mod k8s_alerts;
mod k8s_manifests;
mod k8s_plans;
mod k8s_queries;
mod k8s_surroundings;
mod k8s_tools;
mod logs;
mod models;
mod noise;
mod prometheus;
#[cfg(feature = "otlp")]
mod otlp;
mod proxies;
mod readme;
mod server;
mod sources;
mod slow;
mod tidy;
mod tokens;
