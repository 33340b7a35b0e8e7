//! Sconce: many models, one device, one queue.
//!
//! The modules stand in dependency order: each uses only what stands above it. Band B (device)
//! and band C (front) never import each other; they meet in `serve.rs`. See ARCHITECTURE.md.

// A. core: no candle, no axum.
pub mod error;
pub mod model;
pub mod request;
pub mod scheduler;
pub mod config;
pub mod telemetry;
pub mod lifecycle;
pub mod store;
pub mod text;
pub mod catalog;

// B. device side.
pub mod device;
pub mod kernels;
pub mod weights;
pub mod head;
pub mod arch;
pub mod engine;

// C. front side.
pub mod admission;
pub mod http;

// D. whole.
pub mod table;
pub mod models;
pub mod check;
pub mod pull;
pub mod plan;
pub mod banner;
pub mod serve;
