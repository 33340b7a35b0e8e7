//! The command line: parses it, starts logging, runs a command, and turns errors into one line and
//! an exit code from sysexits.h. Never prompts.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use sconce::config::error::ConfigError;
use sconce::config::flags::Flags;
use sconce::config::load::{Environment, load};
use sconce::config::{Config, Log};
use sconce::engine::start::StartError;
use sconce::store::progress::Progress;
use sconce::{pull, serve};
use tracing_subscriber::EnvFilter;

/// Many models, one device, one queue: an inference server for GPUs that are shared and may vanish.
#[derive(Debug, Parser)]
#[command(name = "sconce", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

/// What to do; without a command: serve.
#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Serve the models (the default)
    Serve,
    /// Fetch and verify the models' files, then stop
    Pull {
        /// Names of models; all if none is given
        models: Vec<String>,
    },
}

// From sysexits.h.
const USAGE: u8 = 64;
const DATA: u8 = 65;
const UNAVAILABLE: u8 = 69;
const SOFTWARE: u8 = 70;
const CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version arrive here too, and are no errors.
            if !error.use_stderr() {
                let _ = error.print();
                return ExitCode::SUCCESS;
            }
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            return fail(&format!("{line}; see sconce --help"), USAGE);
        }
    };
    let config = match load(&cli.flags, &Environment::current()) {
        Ok(config) => config,
        Err(error) => return fail(&error.to_string(), error.exit_code()),
    };
    start_logging(&config.log);
    for note in &config.notes {
        if note.warning {
            tracing::warn!("{}", note.text);
        } else {
            tracing::debug!("{}", note.text);
        }
    }
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve::run(config)
            .unwrap_or_else(|error| fail(&format!("{error:#}"), exit_code(&error))),
        Command::Pull { models } => pull_models(&config, &models),
    }
}

fn pull_models(config: &Config, models: &[String]) -> ExitCode {
    let progress = Progress::choose(config.log.is_json());
    let failures = match pull::run(config, models, &progress, &mut std::io::stdout().lock()) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failures) => failures,
    };
    let codes: Vec<ExitCode> =
        failures.iter().map(|failed| fail(&failed.message, failed.exit_code)).collect();
    codes.into_iter().next().unwrap_or(ExitCode::FAILURE)
}

/// To standard error, so that standard output is only ever a command's result.
fn start_logging(log: &Log) {
    let filter = EnvFilter::new(log.filter.as_deref().unwrap_or("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if log.is_json() {
        logs.json().flatten_event(true).init();
    } else {
        logs.with_target(false).init();
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "sconce: {message}");
    code.into()
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(error) = error.downcast_ref::<ConfigError>() {
        return error.exit_code();
    }
    match error.downcast_ref::<StartError>() {
        Some(StartError::Fetch(error)) => error.exit_code(),
        Some(StartError::Memory(_)) => CONFIG,
        Some(StartError::Load { .. } | StartError::Text { .. }) => DATA,
        Some(StartError::Device(_) | StartError::Gpu(_)) => UNAVAILABLE,
        None if error.root_cause().is::<std::io::Error>() => UNAVAILABLE,
        Some(StartError::WarmUp { .. }) | None => SOFTWARE,
    }
}
