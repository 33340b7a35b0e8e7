//! `sconce serve`: the composition root. The only file that sees core, device and front; it knows
//! the order in which things start and stop, and nothing else.

use std::io::Write as _;
use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};

use crate::admission::Front;
use crate::catalog::{Catalog, ModelCard};
use crate::config::Config;
use crate::engine::start::{Started, Startup};
use crate::engine::{Ending, Engine, Links, fan_out};
use crate::http::listener::{Limits, Server};
use crate::http::{admin_router, main_router};
use crate::lifecycle::{Lifecycle, Phase, signal};
use crate::store::progress::Progress;
use crate::telemetry::{Setup, Telemetry};

/// How often the metrics crate wants to tidy up.
const UPKEEP: Duration = Duration::from_secs(5);

/// The summary's exit code when the engine died, or never came to life.
const ENGINE_FAILED: u8 = 4;

/// Threads for HTTP and tokenising. The device's threads come on top.
const WORKERS_MAX: usize = 4;

/// Serves until told to stop.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    let workers = crate::device::cpu::threads_available().clamp(1, WORKERS_MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(serve(Arc::new(config)));
    // A blocking job (a fetch, a long text) must not hold up the end.
    runtime.shutdown_background();
    ended
}

async fn serve(config: Arc<Config>) -> anyhow::Result<ExitCode> {
    let telemetry = telemetry(&config);
    let lifecycle = Lifecycle::new(config.drain.grace, Arc::clone(&telemetry));
    signal::install(Arc::clone(&lifecycle)).context("cannot handle signals")?;

    if config.cost.device_hourly_usd.is_none() {
        tracing::warn!("no price, no cost metrics: cost.device_hourly_usd sets one");
    }
    let startup = Startup {
        config: Arc::clone(&config),
        catalog: Arc::new(catalog(&config)),
        telemetry: Arc::clone(&telemetry),
        lifecycle: Arc::clone(&lifecycle),
    };

    let (inbox, submissions) = mpsc::channel(config.limits.queue_requests.max(1));
    let catalog = Arc::clone(&startup.catalog);
    let front =
        Front::new(config.clone(), catalog, Arc::clone(&telemetry), lifecycle.clone(), inbox);
    let (open, doors) = watch::channel(lifecycle.phase());
    let servers = listen(&config, &front, &doors)?;
    tokio::spawn(upkeep(telemetry));

    let engine = start_engine(startup, submissions)?;
    let failure = tokio::spawn(watch_engine(engine, lifecycle.clone()));
    let summary = tokio::select! {
        summary = lifecycle.clone().run() => summary,
        () = follow(lifecycle.watch(), &open) => unreachable!("phases do not end"),
    };
    // Both listeners answer while a last scrape is awaited: a closed port is a 502 at a proxy.
    lifecycle.linger(config.drain.linger).await;
    open.send_replace(Phase::Stopped);
    // Said before the last connections are waited for: a client that does not read must not cost
    // the summary.
    writeln!(std::io::stdout(), "{}", summary.to_json()).ok();
    for server in servers {
        let _ = server.await;
    }
    if summary.exit_code == ENGINE_FAILED
        && let Ok(Err(error)) = failure.await
    {
        return Err(error);
    }
    Ok(summary.exit_code.into())
}

/// The models by name, before anything is fetched.
fn catalog(config: &Config) -> Catalog {
    let created = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let created = created.unwrap_or_default().as_secs();
    let card = |manifest: &crate::config::manifest::Manifest| ModelCard {
        name: manifest.name.clone(),
        aliases: manifest.aliases.clone(),
        task: manifest.task,
        created,
        owned_by: manifest.owned_by.clone().unwrap_or_else(|| "sconce".to_owned()),
    };
    Catalog::new(config.manifests.iter().map(card).collect())
}

/// The counters: every series exists from here on.
fn telemetry(config: &Config) -> Arc<Telemetry> {
    let models = config.manifests.iter().map(|manifest| (manifest.name.clone(), manifest.task));
    Telemetry::new(Setup {
        models: models.collect(),
        device_hourly_usd: config.cost.device_hourly_usd,
        device_share: config.device.share,
        config_hash: config.hash(),
        device_name: "cpu".to_owned(),
        ..Setup::default()
    })
}

/// Binds and serves both listeners; they answer 503 where models are needed until these are there.
fn listen(
    config: &Config,
    front: &Arc<Front>,
    doors: &watch::Receiver<Phase>,
) -> anyhow::Result<Vec<tokio::task::JoinHandle<()>>> {
    let bind = |name: &'static str, hosts: &[IpAddr], port: u16, limits: Limits| {
        let server = Server::bind(hosts, port, limits).with_context(|| {
            format!("cannot listen on port {port}; {name}.port and {name}.host choose others")
        })?;
        let address = server.addresses().first().map(ToString::to_string).unwrap_or_default();
        tracing::info!(listener = name, address, "listening");
        anyhow::Ok(server)
    };
    let server = &config.server;
    let main = bind("server", &server.hosts, server.port, Limits::main(server))?;
    let admin = &config.admin;
    let admin = bind("admin", &admin.hosts, admin.port, Limits::admin(server))?;
    let routers = [main_router(Arc::clone(front)), admin_router(Arc::clone(front))];
    let serve = |(server, router): (Server, _)| tokio::spawn(server.serve(router, doors.clone()));
    Ok([main, admin].into_iter().zip(routers).map(serve).collect())
}

/// Starts the device thread: it loads the models, then runs the loop. What it sends at the end is
/// how that went.
fn start_engine(
    startup: Startup,
    inbox: mpsc::Receiver<crate::request::Submission>,
) -> anyhow::Result<oneshot::Receiver<anyhow::Result<Ending>>> {
    let (tell, ended) = oneshot::channel();
    // Bounded by what is in flight: a request causes no more events than its channel holds.
    let (deliveries, delivered) = mpsc::unbounded_channel();
    tokio::spawn(fan_out(delivered));
    let (installer, installs) = std::sync::mpsc::channel();
    let links = Links {
        inbox,
        installs,
        deliveries,
        phase: startup.lifecycle.watch(),
        telemetry: Arc::clone(&startup.telemetry),
    };
    let progress = Arc::new(Progress::choose(startup.config.log.is_json()));
    tokio::spawn(stop_fetching(startup.lifecycle.watch(), Arc::clone(&progress)));
    let runtime = Handle::current();
    let run = move || {
        let _entered = runtime.enter();
        let Started { scheduler, runner, slots, later } = startup.start(&progress)?;
        let engine = Engine::new(scheduler, runner, slots, links);
        startup.lifecycle.models_ready();
        tracing::info!(models = startup.catalog.models().len() - later.len(), "ready");
        if !later.is_empty() {
            std::thread::spawn(move || startup.load_later(later, &installer));
        }
        anyhow::Ok(engine.run())
    };
    let thread = std::thread::Builder::new().name("device".to_owned());
    let thread = thread.spawn(move || tell.send(run()));
    thread.context("cannot start the device thread")?;
    Ok(ended)
}

/// Turns the end of the engine into an event of the server's life.
async fn watch_engine(
    engine: oneshot::Receiver<anyhow::Result<Ending>>,
    lifecycle: Arc<Lifecycle>,
) -> anyhow::Result<()> {
    let ending = engine.await.unwrap_or_else(|_| Ok(Ending::Failed("its thread panicked".into())));
    match ending {
        Ok(Ending::Stopped) => Ok(()),
        Ok(Ending::Failed(reason)) => {
            tracing::error!(reason, "the engine failed");
            lifecycle.engine_failed();
            Ok(())
        }
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the engine cannot start");
            lifecycle.engine_failed();
            Err(error)
        }
    }
}

/// Passes phases on to the listeners, but for the last: they stop after the last scrape.
async fn follow(mut phases: watch::Receiver<Phase>, doors: &watch::Sender<Phase>) {
    loop {
        let phase = *phases.borrow_and_update();
        doors.send_replace(phase.min(Phase::Closing));
        if phases.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A download has no place in a process that is about to end.
async fn stop_fetching(mut phases: watch::Receiver<Phase>, progress: Arc<Progress>) {
    let _ = phases.wait_for(|phase| *phase >= Phase::Closing).await;
    progress.stop();
}

async fn upkeep(telemetry: Arc<Telemetry>) {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        telemetry.upkeep();
    }
}
