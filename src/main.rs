//! The command line: parses it, starts logging, runs a command, and turns errors into one line and
//! an exit code from sysexits.h. Never prompts.

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use sconce::config::flags::Flags;
use sconce::config::load::{Environment, load};
use sconce::config::{Config, Log};
use sconce::store::progress::Progress;
use sconce::{check, models, plan, pull, serve};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

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
        /// Also lay the files out below this folder, as DIR/MODEL/FILE, for a volume or an image
        #[arg(long, value_name = "DIR")]
        to: Option<std::path::PathBuf>,
    },
    /// List the models, and what of them is on this machine
    Models {
        #[command(flatten)]
        output: Output,
    },
    /// Show the effective configuration and what would keep it from serving; fetches nothing
    Check {
        #[command(flatten)]
        output: Output,
    },
    /// Right-size: which device, how many pods, what they ask for and cost
    Plan(Box<plan::Args>),
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

#[derive(Debug, clap::Args)]
struct Output {
    /// For people or for programs
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Table,
    Json,
}

// From sysexits.h.
const USAGE: u8 = 64;
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
            return fail(&format!("{}; see sconce --help", one_line(&error)), USAGE);
        }
    };
    match &cli.command {
        Some(Command::Completions { shell }) => return completions(*shell),
        Some(Command::Man) => return manual(),
        _ => {}
    }
    let config = match load(&cli.flags, &Environment::current()) {
        Ok(config) => config,
        Err(error) => return fail(&error.to_string(), error.exit_code()),
    };
    let _spans = match start_logging(&config.log) {
        Ok(spans) => spans,
        Err(error) => return fail(&format!("traces cannot be sent: {error}"), CONFIG),
    };
    for note in &config.notes {
        if note.warning {
            tracing::warn!("{}", note.text);
        } else {
            tracing::debug!("{}", note.text);
        }
    }
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve::run(config)
            .unwrap_or_else(|error| fail(&format!("{error:#}"), serve::exit_code(&error))),
        Command::Pull { models, to } => pull_models(&config, &pull::Wish { names: models, to }),
        Command::Models { output } => {
            let found = models::survey(&config);
            say(output.output, &found, |out| models::print(&found, out));
            ExitCode::SUCCESS
        }
        Command::Check { output } => {
            let report = check::Report::of(&config);
            say(output.output, &report, |out| report.print(out));
            if report.is_good() { ExitCode::SUCCESS } else { CONFIG.into() }
        }
        Command::Plan(args) => match plan::run(&config, &args, &mut std::io::stdout().lock()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error.to_string(), error.exit_code()),
        },
        Command::Completions { .. } | Command::Man => unreachable!("answered without a config"),
    }
}

/// What is wrong, what is missing, and what may have been meant; neither the usage nor advice on
/// where to find it.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let told = lines.take_while(|line| !line.starts_with("Usage:"));
    let told: Vec<_> = told.filter(|line| !line.starts_with("For more information")).collect();
    told.join(" ").trim_start_matches("error: ").replace(" tip: ", "; ")
}

/// Writes a command's result as JSON, or as `table` does. Nobody reads a closed pipe.
fn say(
    format: Format,
    result: &impl serde::Serialize,
    table: impl Fn(&mut dyn Write) -> std::io::Result<()>,
) {
    let mut out = std::io::stdout().lock();
    let _ = match format {
        Format::Table => table(&mut out),
        Format::Json => serde_json::to_writer_pretty(&mut out, result)
            .map_err(std::io::Error::from)
            .and_then(|()| writeln!(out)),
    };
}

fn completions(shell: clap_complete::Shell) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sconce", &mut text);
    let _ = std::io::stdout().write_all(&text);
    ExitCode::SUCCESS
}

fn manual() -> ExitCode {
    let mut text = Vec::new();
    match clap_mangen::Man::new(Cli::command()).render(&mut text) {
        Ok(()) => {
            let _ = std::io::stdout().write_all(&text);
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error.to_string(), SOFTWARE),
    }
}

fn pull_models(config: &Config, wish: &pull::Wish) -> ExitCode {
    let progress = Progress::choose(config.log.is_json());
    let failures = match pull::run(config, wish, &progress, &mut std::io::stdout().lock()) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failures) => failures,
    };
    let codes: Vec<ExitCode> =
        failures.iter().map(|failed| fail(&failed.message, failed.exit_code)).collect();
    codes.into_iter().next().unwrap_or(ExitCode::FAILURE)
}

/// To standard error, so that standard output is only ever a command's result. What it returns
/// sends the last spans when it is dropped.
///
/// # Errors
/// A collector of spans that cannot be used.
fn start_logging(log: &Log) -> Result<impl Sized + use<>, String> {
    let filter = EnvFilter::new(log.filter.as_deref().unwrap_or("info"));
    let logs = fmt::layer().with_writer(std::io::stderr);
    let logs = if log.is_json() {
        logs.json().flatten_event(true).with_filter(without_spans(filter)).boxed()
    } else {
        logs.with_target(false).with_filter(without_spans(filter)).boxed()
    };
    let registry = tracing_subscriber::registry().with(logs);
    #[cfg(feature = "otlp")]
    {
        let (spans, exporter) = sconce::telemetry::otlp::start()?.unzip();
        registry.with(spans).init();
        Ok(exporter)
    }
    #[cfg(not(feature = "otlp"))]
    {
        registry.init();
        Ok(())
    }
}

/// Spans are for a collector; a log has a line for each request anyway.
fn without_spans(filter: EnvFilter) -> EnvFilter {
    #[cfg(feature = "otlp")]
    let filter = {
        let off = format!("{}=off", sconce::telemetry::otlp::TARGET);
        filter.add_directive(off.parse().expect("a directive"))
    };
    filter
}

fn fail(message: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "sconce: {message}");
    code.into()
}
