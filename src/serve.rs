//! `sconce serve`: the composition root. The only file that sees core, device and front; it knows
//! the order in which things start and stop, and nothing else.
//!
//! Two runtimes: requests have theirs, and what must answer and act however busy that one is
//! (metrics, probes, the drain) has the main thread.

use std::io::Write as _;
use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{mpsc, oneshot, watch};

use crate::admission::Front;
use crate::admission::callers::Callers;
use crate::banner::{self, Addresses};
use crate::catalog::{Catalog, ModelCard};
use crate::config::error::ConfigError;
use crate::config::manifest::Manifest;
use crate::config::{Config, Cost};
use crate::engine::start::{StartError, Started, Startup};
use crate::engine::{Ending, Engine, Failure, Links, fan_out};
use crate::error::Error;
use crate::http::listener::{Limits, Server, allow_connections};
use crate::http::{admin_router, main_router};
use crate::lifecycle::last_words::{LastExit, LastWords, Reason};
use crate::lifecycle::summary::DrainSummary;
use crate::lifecycle::watchdog::{Pulse, Watchdog};
use crate::lifecycle::{CUT, FAILED, Lifecycle, Phase, signal};
use crate::store::progress::Progress;
use crate::telemetry::price_file::PriceFile;
use crate::telemetry::{Setup, Telemetry};

/// How often the metrics crate wants to tidy up.
const UPKEEP: Duration = Duration::from_secs(5);

/// How often the file of keys is looked at.
const KEYS_EVERY: Duration = Duration::from_secs(5);

/// How often the price file is looked at.
const PRICE_EVERY: Duration = Duration::from_secs(60);

/// Threads for HTTP and tokenising. The device's threads come on top.
const WORKERS_MAX: usize = 4;

/// Serves until told to stop.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    let workers = crate::device::cpu::threads_available().clamp(1, WORKERS_MAX);
    let (words, last_exit) = LastWords::open(&config);
    let words = Arc::new(words);
    let (control, data) = runtimes(workers).context("cannot start the runtimes")?;
    let telemetry = telemetry(&config, last_exit);
    let serving = serve(Arc::new(config), telemetry, Arc::clone(&words), data.handle().clone());
    let ended = control.block_on(serving);
    if let Err(error) = &ended {
        words.say(exit_code(error), Reason::Start, &format!("{error:#}"));
    }
    // A blocking job (a fetch, a long text) must not hold up the end.
    data.shutdown_background();
    control.shutdown_background();
    ended
}

/// The one that the main thread drives, and the one for requests.
fn runtimes(workers: usize) -> std::io::Result<(Runtime, Runtime)> {
    let control = Builder::new_current_thread().enable_all().build()?;
    let mut data = Builder::new_multi_thread();
    let data = data.worker_threads(workers).thread_name("data").enable_all().build()?;
    Ok((control, data))
}

async fn serve(
    config: Arc<Config>,
    telemetry: Arc<Telemetry>,
    words: Arc<LastWords>,
    data: Handle,
) -> anyhow::Result<ExitCode> {
    let callers = Callers::open(&config.auth, Arc::clone(&telemetry))?;
    allow_connections(config.server.max_connections);
    let lifecycle = Lifecycle::new(config.drain.grace, Arc::clone(&telemetry));
    signal::install(Arc::clone(&lifecycle)).context("cannot handle signals")?;

    if !config.cost.has_price() {
        tracing::warn!("no price, no cost metrics: {}", Cost::ADVICE);
    }
    let price = config.cost.price_file.as_deref().map(PriceFile::new);
    tokio::spawn(follow_price(price, Arc::clone(&telemetry)));
    let startup = Startup {
        config: Arc::clone(&config),
        catalog: Arc::new(catalog(&config)),
        telemetry: Arc::clone(&telemetry),
        lifecycle: Arc::clone(&lifecycle),
    };

    let (inbox, submissions) = mpsc::channel(config.limits.queue_requests.max(1));
    let catalog = Arc::clone(&startup.catalog);
    let front =
        Front::new(config.clone(), catalog, telemetry.clone(), lifecycle.clone(), callers, inbox);
    let (open, doors) = watch::channel(lifecycle.phase());
    let (servers, addresses) = listen(&config, &front, &doors, &data)?;
    tokio::spawn(upkeep(telemetry));
    tokio::spawn(follow_keys(Arc::clone(&front)));
    tokio::spawn(give_up(front));

    let pulse = Arc::new(Pulse::default());
    let watchdog = Watchdog {
        pulse: Arc::clone(&pulse),
        lifecycle: Arc::clone(&lifecycle),
        words: Arc::clone(&words),
    };
    watchdog.start().context("cannot start the watchdog")?;
    let engine = start_engine(startup, submissions, (pulse, Arc::clone(&words)), data, addresses)?;
    let failure = tokio::spawn(watch_engine(engine, lifecycle.clone()));
    let summary = tokio::select! {
        summary = lifecycle.clone().run() => summary,
        () = follow(lifecycle.watch(), &open) => unreachable!("phases do not end"),
    };
    last_words(&words, &summary);
    // Both listeners answer while a last scrape is awaited: a closed port is a 502 at a proxy.
    lifecycle.linger(config.drain.linger).await;
    open.send_replace(Phase::Stopped);
    // Said before the last connections are waited for: a client that does not read must not cost
    // the summary.
    writeln!(std::io::stdout(), "{}", summary.to_json()).ok();
    for server in servers {
        let _ = server.await;
    }
    if summary.exit_code == FAILED
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
    let card = |manifest: &Manifest| ModelCard {
        name: manifest.name.clone(),
        aliases: manifest.aliases.clone(),
        task: manifest.task,
        created,
        owned_by: manifest.owned_by.clone().unwrap_or_else(|| "sconce".to_owned()),
    };
    Catalog::new(config.manifests.iter().map(card).collect())
}

/// The counters: every series exists from here on.
fn telemetry(config: &Config, last_exit: LastExit) -> Arc<Telemetry> {
    let models = config.manifests.iter().map(|manifest| (manifest.name.clone(), manifest.task));
    Telemetry::new(Setup {
        models: models.collect(),
        objectives: config.manifests.iter().map(Manifest::objective).collect(),
        device_hourly_usd: config.cost.device_hourly_usd,
        device_share: config.device.share,
        vllm_metrics: config.admin.vllm_metrics,
        config_hash: config.hash(),
        device_name: "cpu".to_owned(),
        last_exit: (last_exit.code, last_exit.reason),
        ..Setup::default()
    })
}

/// Binds and serves both listeners, the main one on `data`; they answer 503 where models are needed
/// until these are there.
fn listen(
    config: &Config,
    front: &Arc<Front>,
    doors: &watch::Receiver<Phase>,
    data: &Handle,
) -> anyhow::Result<(Vec<tokio::task::JoinHandle<()>>, Addresses)> {
    let bind = |name: &'static str, hosts: &[IpAddr], port: u16, limits: Limits| {
        let server = Server::bind(hosts, port, limits).with_context(|| {
            format!("cannot listen on port {port}; {name}.port and {name}.host choose others")
        })?;
        let address = server.addresses().first().map(ToString::to_string).unwrap_or_default();
        tracing::info!(listener = name, address, "listening");
        anyhow::Ok(server)
    };
    let server = &config.server;
    let main = {
        let _on = data.enter();
        bind("server", &server.hosts, server.port, Limits::main(server))?
    };
    let settings = &config.admin;
    let mut admin = bind("admin", &settings.hosts, settings.port, Limits::admin(server))?;
    if let Some(path) = &settings.socket {
        admin.bind_socket(path).context("cannot listen on the socket; admin.socket names it")?;
        tracing::info!(listener = "admin", socket = %path.display(), "listening");
    }
    let addresses = Addresses { api: main.addresses(), admin: admin.addresses() };
    let main = main.serve(main_router(Arc::clone(front)), doors.clone());
    let admin = admin.serve(admin_router(Arc::clone(front)), doors.clone());
    Ok((vec![data.spawn(main), tokio::spawn(admin)], addresses))
}

/// Starts the device thread: it loads the models, then runs the loop. What it sends at the end is
/// how that went.
fn start_engine(
    startup: Startup,
    inbox: mpsc::Receiver<crate::request::Submission>,
    (pulse, words): (Arc<Pulse>, Arc<LastWords>),
    data: Handle,
    addresses: Addresses,
) -> anyhow::Result<oneshot::Receiver<anyhow::Result<Ending>>> {
    let (tell, ended) = oneshot::channel();
    // Bounded by what is in flight: a request causes no more events than its channel holds.
    let (deliveries, delivered) = mpsc::unbounded_channel();
    data.spawn(fan_out(delivered));
    // As many as there are models.
    let (installer, installs) = mpsc::unbounded_channel();
    let links = Links {
        inbox,
        installs,
        deliveries,
        phase: startup.lifecycle.watch(),
        telemetry: Arc::clone(&startup.telemetry),
        catalog: Arc::clone(&startup.catalog),
        pulse,
    };
    let progress = Arc::new(Progress::choose(startup.config.log.is_json()));
    tokio::spawn(stop_fetching(startup.lifecycle.watch(), Arc::clone(&progress)));
    let run = move || {
        let _entered = data.enter();
        let Started { scheduler, machine, patience, later, device } = startup.start(&progress)?;
        links.pulse.set_patience(patience);
        let engine = Engine::new(scheduler, machine, links);
        let lifecycle = Arc::clone(&startup.lifecycle);
        startup.lifecycle.models_ready();
        banner::show(&startup.config, &addresses, &device, &mut std::io::stderr());
        if !later.is_empty() {
            std::thread::spawn(move || startup.load_later(later, &installer));
        }
        let ending = engine.run();
        if let Ending::Failed(failure) = &ending {
            // Here, where nothing has to be waited for.
            words.say(FAILED, failure.reason, &failure.message);
            lifecycle.engine_failed();
        }
        anyhow::Ok(ending)
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
    let ending = engine.await.unwrap_or_else(|_| {
        let message = "the device thread is gone".to_owned();
        Ok(Ending::Failed(Failure { reason: Reason::Panic, message }))
    });
    match ending {
        Ok(Ending::Stopped) => Ok(()),
        Ok(Ending::Failed(failure)) => {
            tracing::error!(reason = failure.reason.as_str(), failure.message, "the engine failed");
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

/// Says in a word how an orderly end went.
fn last_words(words: &LastWords, summary: &DrainSummary) {
    let DrainSummary { finished, cut, .. } = summary;
    match summary.exit_code {
        0 => words.say(0, Reason::Drained, &format!("{finished} requests were finished")),
        CUT => {
            let message = format!("{cut} requests were cut off, {finished} were finished");
            words.say(CUT, Reason::Cut, &message);
        }
        // Whoever found out has said why; what cannot start is said with its own code.
        _ => {}
    }
}

/// The exit code of a server that cannot start, from sysexits.h.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(error) = error.downcast_ref::<ConfigError>() {
        return error.exit_code();
    }
    match error.downcast_ref::<StartError>() {
        Some(StartError::Fetch(error)) => error.exit_code(),
        Some(StartError::Memory(_)) => 78,
        Some(StartError::Load { .. } | StartError::Text { .. }) => 65,
        Some(StartError::Device(_) | StartError::Gpu(_)) => 69,
        None if error.root_cause().is::<std::io::Error>() => 69,
        Some(StartError::WarmUp { .. } | StartError::Panic(_)) | None => 70,
    }
}

/// An engine that hangs tells nobody, and one whose step outlasts the drain cannot yet; the front
/// does it then.
async fn give_up(front: Arc<Front>) {
    let error = tokio::select! {
        () = front.lifecycle.failed() => Error::device_failed(),
        () = front.lifecycle.nearly_closed() => Error::cut(),
    };
    front.give_up(&error);
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

/// A changed file of keys holds within seconds. It is read again each time: a mounted Secret
/// changes by a link that is swapped, which no watch on the file sees.
async fn follow_keys(front: Arc<Front>) {
    if !front.callers.need_keys() {
        return;
    }
    let mut ticks = tokio::time::interval(KEYS_EVERY);
    loop {
        ticks.tick().await;
        let front = Arc::clone(&front);
        let _ = tokio::task::spawn_blocking(move || front.callers.reload()).await;
    }
}

/// A changed price holds within a minute; the file is looked at for the first time at once.
async fn follow_price(file: Option<PriceFile>, telemetry: Arc<Telemetry>) {
    let Some(mut file) = file else { return };
    let mut ticks = tokio::time::interval(PRICE_EVERY);
    loop {
        ticks.tick().await;
        let telemetry = Arc::clone(&telemetry);
        let looked = tokio::task::spawn_blocking(move || {
            file.look(&telemetry);
            file
        });
        let Ok(back) = looked.await else { return };
        file = back;
    }
}

async fn upkeep(telemetry: Arc<Telemetry>) {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        telemetry.upkeep();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};

    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;
    use crate::admission::testing::front;
    use crate::lifecycle::Notice;

    const WORKERS: usize = 2;

    /// The status line of a GET.
    fn ask(address: SocketAddr, path: &str) -> std::io::Result<String> {
        let mut client = TcpStream::connect(address)?;
        client.set_read_timeout(Some(Duration::from_secs(20)))?;
        write!(client, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        Ok(answer.lines().next().unwrap_or_default().to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_price_file_is_looked_at_every_minute() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("price.toml");
        let telemetry = Telemetry::new(Setup::default());
        tokio::spawn(follow_price(Some(PriceFile::new(&path)), Arc::clone(&telemetry)));
        let after = |seconds| tokio::time::sleep(Duration::from_secs(seconds));
        let price = |usd: u32| telemetry.render().contains(&format!("_usd_per_hour {usd}\n"));
        after(1).await;
        for usd in [2, 3] {
            let text = format!("device_hourly_usd = {usd}\nas_of = 2026-07-20\nsource = \"s\"\n");
            std::fs::write(&path, text).expect("a file");
            after(50).await;
            assert!(!price(usd), "before its time");
            after(10).await;
            assert!(price(usd), "a minute has passed");
        }
    }

    /// The engine is in a step that outlasts the drain; its client is told all the same, in time.
    #[tokio::test(start_paused = true)]
    async fn a_long_step_does_not_cut_without_a_word() {
        let (front, mut inbox) = front(Config::default());
        tokio::spawn(give_up(Arc::clone(&front)));
        let drained = tokio::spawn(Arc::clone(&front.lifecycle).run());
        let body = r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}]}"#;
        let request = Request::post("/v1/chat/completions").body(Body::from(body)).unwrap();
        let answer = tokio::spawn(main_router(Arc::clone(&front)).oneshot(request));
        let held = inbox.recv().await.unwrap();
        let notice = Notice { source: "sigterm", within: None, terminate: true };
        front.lifecycle.notify(notice);
        let answer = answer.await.unwrap().unwrap();
        assert_eq!(answer.status(), 503);
        let told = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&told).contains("cut_by_drain"), "{told:?}");
        assert!(held.sink.is_cancelled(), "nobody listens any longer");
        let summary = drained.await.unwrap();
        assert_eq!((summary.cut, summary.finished, summary.exit_code), (1, 0, CUT));
        assert!(summary.elapsed_s < summary.deadline_s - 1.0, "{summary:?}");
    }

    fn free() -> SocketAddr {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        taken.local_addr().expect("an address")
    }

    /// Every thread of the data plane hangs; metrics and probes answer all the same.
    #[test]
    fn the_admin_side_answers_while_the_data_plane_hangs() {
        let (control, data) = runtimes(WORKERS).expect("runtimes");
        let (main, admin) = (free(), free());
        let mut config = Config::default();
        (config.server.hosts, config.server.port) = (vec![main.ip()], main.port());
        (config.admin.hosts, config.admin.port) = (vec![admin.ip()], admin.port());
        let (front, _inbox) = front(config.clone());
        let (_open, doors) = watch::channel(Phase::Ready);
        let hung = Arc::new(std::sync::Barrier::new(WORKERS + 1));
        let release = Arc::new(std::sync::Barrier::new(WORKERS + 1));
        control.block_on(async {
            listen(&config, &front, &doors, data.handle()).expect("both listen");
            let asked = |address, path: &'static str| {
                tokio::task::spawn_blocking(move || ask(address, path))
            };
            assert_eq!(asked(main, "/livez").await.unwrap().unwrap(), "HTTP/1.1 200 OK");
            for _ in 0..WORKERS {
                let (hung, release) = (Arc::clone(&hung), Arc::clone(&release));
                data.spawn(async move {
                    hung.wait();
                    release.wait();
                });
            }
            hung.wait();
            let stuck = asked(main, "/livez");
            for path in ["/metrics", "/livez", "/readyz", "/stats"] {
                assert_eq!(asked(admin, path).await.unwrap().unwrap(), "HTTP/1.1 200 OK", "{path}");
            }
            assert!(!stuck.is_finished(), "the data plane was not hung");
            release.wait();
            assert_eq!(stuck.await.unwrap().unwrap(), "HTTP/1.1 200 OK");
        });
    }
}
