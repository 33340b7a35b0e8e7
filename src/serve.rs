//! `sconce serve`: the composition root. The only file that sees core, device and front; it knows
//! the order in which things start and stop, and nothing else.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use tokio::sync::mpsc;

use crate::catalog::{Catalog, Model, ModelCard};
use crate::config::Config;
use crate::config::manifest::Manifest;
use crate::device;
use crate::engine::budget::{self, Ledger, Wish};
use crate::engine::model_runner::ModelRunner;
use crate::engine::residency::{self, OpenedModel};
use crate::engine::runner::Runner as _;
use crate::engine::{Ending, Engine, Links, fan_out};
use crate::http::{self, Front, Server};
use crate::lifecycle::{Lifecycle, Phase, signal};
use crate::model::ModelState;
use crate::request::{LaneId, Micros, Submission};
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::store::{ModelFiles, fetch};
use crate::telemetry::{Setup, Telemetry};
use crate::text::ModelText;
