//! Whole drains on a virtual clock: what is finished, what is cut, and when it is over.

use std::collections::BTreeMap;

use super::*;
use crate::telemetry::Setup;

const GRACE: Duration = Duration::from_secs(30);
const TERM: Notice = Notice { source: "sigterm", within: None, terminate: true };
const DRAIN: Notice = Notice { source: "drain", within: None, terminate: false };

fn started(grace: Duration) -> (Arc<Lifecycle>, Arc<Telemetry>) {
    let telemetry = Telemetry::new(Setup::default());
    (Lifecycle::new(grace, Arc::clone(&telemetry)), telemetry)
}

fn ready() -> (Arc<Lifecycle>, Arc<Telemetry>) {
    let (life, telemetry) = started(GRACE);
    life.models_ready();
    (life, telemetry)
}

fn drive(life: &Arc<Lifecycle>) -> tokio::task::JoinHandle<DrainSummary> {
    tokio::spawn(Arc::clone(life).run())
}

/// Lets virtual seconds pass, and everything that is due happen.
async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds) + Duration::from_millis(1)).await;
}

#[track_caller]
fn refused(life: &Lifecycle) -> (ErrorKind, Duration) {
    let error = life.admit().expect_err("admitted");
    (error.kind(), error.wait().expect("says when to try again"))
}

fn sample(telemetry: &Telemetry, series: &str) -> f64 {
    let page = telemetry.render();
    let line = page.lines().find(|line| line.starts_with(&format!("{series} ")));
    line.unwrap_or_else(|| panic!("no {series}")).rsplit_once(' ').unwrap().1.parse().unwrap()
}

#[test]
fn labels_are_those_of_the_metric() {
    let (_, telemetry) = started(GRACE);
    for phase in Phase::ALL {
        telemetry.phase_entered(phase.as_str());
        assert_eq!(
            sample(&telemetry, &format!("sconce_phase{{phase=\"{}\"}}", phase.as_str())),
            1.0
        );
    }
}

#[tokio::test(start_paused = true)]
async fn admission_follows_the_phase() {
    let (life, telemetry) = started(GRACE);
    assert_eq!(refused(&life), (ErrorKind::ModelLoading, Duration::from_secs(1)));
    life.set_eta(Duration::from_secs(12));
    assert_eq!(refused(&life), (ErrorKind::ModelLoading, Duration::from_secs(12)));
    life.set_eta(Duration::from_secs(3_600));
    assert_eq!(refused(&life), (ErrorKind::ModelLoading, Duration::from_secs(60)));
    assert_eq!((life.in_flight(), life.remaining()), (0, None));

    life.models_ready();
    let guard = life.admit().unwrap();
    assert_eq!(life.in_flight(), 1);
    assert_eq!(sample(&telemetry, "sconce_requests_in_flight"), 1.0);
    assert!(!life.closing_connections());

    let over = drive(&life);
    life.notify(TERM);
    assert_eq!(life.phase(), Phase::LameDuck);
    assert!(life.closing_connections());
    assert_eq!(life.remaining(), Some(GRACE));
    drop(life.admit().expect("a lame duck still admits"));
    pass(6.0).await;
    assert_eq!(life.phase(), Phase::Draining);
    assert_eq!(refused(&life), (ErrorKind::Draining, Duration::from_secs(1)));
    drop(guard);
    let summary = over.await.unwrap();
    assert_eq!((summary.rejected_late, summary.finished, summary.cut), (1, 2, 0));
    assert_eq!(sample(&telemetry, "sconce_requests_in_flight"), 0.0);
    assert_eq!(refused(&life), (ErrorKind::Draining, Duration::from_secs(1)), "still, until exit");
}

#[tokio::test(start_paused = true)]
async fn everything_finishes_early() {
    let (life, telemetry) = ready();
    let over = drive(&life);
    pass(9.0).await;
    let (early, late) = (life.admit().unwrap(), life.admit().unwrap());
    life.notify(TERM);
    pass(1.0).await;
    drop(early);
    pass(6.0).await;
    assert_eq!(life.phase(), Phase::Draining);
    drop(late);
    let summary = over.await.unwrap();
    assert_eq!((summary.finished, summary.cut, summary.exit_code), (2, 0, 0));
    assert_eq!((summary.reason, summary.in_flight_at_notice), ("sigterm", 2));
    assert!((summary.elapsed_s - 7.0).abs() < 0.01, "right after the last request");
    assert_eq!(summary.deadline_s, 30.0);
    let finished = sample(&telemetry, "sconce_drain_requests_total{result=\"finished\"}");
    assert_eq!(finished, 2.0);
}

#[tokio::test(start_paused = true)]
async fn nothing_finishes() {
    let (life, telemetry) = ready();
    let over = drive(&life);
    let mut guards = [life.admit().unwrap(), life.admit().unwrap()];
    life.notify(TERM);
    let begun = Instant::now();
    life.watch().wait_for(|phase| *phase >= Phase::Closing).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 27, "the deadline less the margin");
    guards.iter_mut().for_each(InFlight::cut);
    drop(guards);
    let summary = over.await.unwrap();
    assert_eq!((summary.finished, summary.cut, summary.exit_code), (0, 2, 3));
    assert!((summary.elapsed_s - 27.0).abs() < 0.01);
    assert_eq!(sample(&telemetry, "sconce_drain_requests_total{result=\"cut\"}"), 2.0);
    let seconds: BTreeMap<_, _> = summary.phase_seconds.into_iter().collect();
    let expected = [("lame_duck", 6.0), ("draining", 21.0), ("closing", 0.0)];
    for (phase, expected) in expected {
        assert!((seconds[phase] - expected).abs() < 0.01, "{phase}: {}", seconds[phase]);
    }
}

/// Somebody who never lets go is counted as cut and not waited for beyond the margin, and is not
/// counted again afterwards.
#[tokio::test(start_paused = true)]
async fn a_stuck_request_does_not_hold_the_exit() {
    let (life, telemetry) = ready();
    let over = drive(&life);
    let stuck = life.admit().unwrap();
    life.notify(TERM);
    let summary = over.await.unwrap();
    assert_eq!((summary.cut, summary.exit_code), (1, 3));
    assert!(summary.elapsed_s < 30.0, "time is left for last words");
    drop(stuck);
    assert_eq!(sample(&telemetry, "sconce_drain_requests_total{result=\"cut\"}"), 1.0);
    assert_eq!(sample(&telemetry, "sconce_drain_requests_total{result=\"finished\"}"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_notice_without_sigterm_holds_in_drained() {
    let (life, _) = ready();
    let over = drive(&life);
    let guard = life.admit().unwrap();
    life.notify(Notice { within: Some(Duration::from_secs(120)), ..DRAIN });
    pass(10.0).await;
    assert_eq!(life.phase(), Phase::Draining);
    drop(guard);
    pass(0.0).await;
    assert_eq!(life.phase(), Phase::Drained);
    pass(60.0).await;
    assert!(!over.is_finished());
    // Later than the deadline that stands: changes nothing.
    life.notify(Notice { source: "file", within: Some(Duration::from_secs(600)), ..DRAIN });
    assert!(life.remaining().unwrap() < Duration::from_secs(50));
    life.notify(TERM);
    let summary = over.await.unwrap();
    assert_eq!((summary.reason, summary.exit_code, summary.finished), ("drain", 0, 1));
    assert!((summary.elapsed_s - 70.0).abs() < 0.1, "at once");
}

#[tokio::test(start_paused = true)]
async fn drained_ends_at_the_deadline() {
    let (life, _) = ready();
    let over = drive(&life);
    life.notify(DRAIN);
    let summary = over.await.unwrap();
    assert_eq!((summary.elapsed_s, summary.exit_code), (30.0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_nearer_notice_cuts_earlier() {
    let (life, _) = ready();
    let over = drive(&life);
    let mut guard = life.admit().unwrap();
    life.notify(Notice { within: Some(Duration::from_secs(120)), ..DRAIN });
    pass(20.0).await;
    assert_eq!(life.phase(), Phase::Draining);
    life.notify(Notice { within: Some(Duration::from_secs(15)), ..TERM });
    life.watch().wait_for(|phase| *phase >= Phase::Closing).await.unwrap();
    guard.cut();
    drop(guard);
    let summary = over.await.unwrap();
    assert!((summary.deadline_s - 35.0).abs() < 0.01);
    assert!((summary.elapsed_s - 33.5).abs() < 0.01, "15 s less a margin of 1.5 s");
}

#[tokio::test(start_paused = true)]
async fn a_second_sigterm_closes_at_once() {
    let (life, _) = ready();
    let over = drive(&life);
    let stuck = life.admit().unwrap();
    life.notify(TERM);
    pass(1.0).await;
    life.notify(TERM);
    assert_eq!(life.phase(), Phase::Closing);
    let summary = over.await.unwrap();
    assert_eq!(summary.exit_code, 3);
    assert!(summary.elapsed_s < 4.0, "{}", summary.elapsed_s);
    drop(stuck);
}

#[tokio::test(start_paused = true)]
async fn sigint_skips_the_lame_duck() {
    let (life, _) = ready();
    let over = drive(&life);
    let guard = life.admit().unwrap();
    life.interrupt();
    assert_eq!(life.phase(), Phase::Draining);
    pass(2.0).await;
    drop(guard);
    let summary = over.await.unwrap();
    assert_eq!((summary.reason, summary.finished), ("sigint", 1));
    assert!(!summary.phase_seconds.contains_key("lame_duck"));
    assert!((summary.elapsed_s - 2.0).abs() < 0.01);
}

#[tokio::test(start_paused = true)]
async fn sigterm_while_loading_ends_at_once() {
    let (life, _) = started(GRACE);
    let over = drive(&life);
    pass(1.0).await;
    life.notify(TERM);
    let summary = over.await.unwrap();
    assert_eq!((summary.elapsed_s, summary.exit_code), (0.0, 0));
    life.models_ready();
    assert_eq!(life.phase(), Phase::Stopped, "forward only");
}

#[tokio::test(start_paused = true)]
async fn a_dead_engine_ends_the_process_in_seconds() {
    let (life, _) = ready();
    let over = drive(&life);
    let mut guard = life.admit().unwrap();
    life.engine_failed();
    assert_eq!(life.phase(), Phase::Closing);
    assert_eq!(refused(&life), (ErrorKind::DeviceFailed, Duration::from_secs(1)));
    guard.cut();
    drop(guard);
    let summary = over.await.unwrap();
    assert_eq!((summary.reason, summary.exit_code, summary.cut), ("engine_failed", 4, 1));
    assert!(summary.elapsed_s < 1.0);
}

#[tokio::test(start_paused = true)]
async fn the_summary_is_one_line_of_json() {
    let (life, _) = ready();
    let over = drive(&life);
    life.notify(TERM);
    let line = over.await.unwrap().to_json();
    assert!(!line.contains('\n'));
    let json: serde_json::Value = serde_json::from_str(&line).unwrap();
    let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "reason",
            "phase_seconds",
            "in_flight_at_notice",
            "finished",
            "handed_over",
            "checkpointed",
            "cut",
            "rejected_late",
            "deadline_s",
            "elapsed_s",
            "exit_code"
        ]
    );
    assert_eq!((&json["reason"], &json["exit_code"]), (&"sigterm".into(), &0.into()));
    assert_eq!(json["phase_seconds"]["lame_duck"], 6.0);
}

/// How long `linger` takes on the virtual clock, in seconds.
async fn lingered(life: &Lifecycle, most: u64) -> u64 {
    let begun = Instant::now();
    life.linger(Duration::from_secs(most)).await;
    begun.elapsed().as_secs()
}

#[tokio::test(start_paused = true)]
async fn lingering_waits_for_one_scrape() {
    let (life, telemetry) = ready();
    let over = drive(&life);
    life.notify(TERM);
    over.await.unwrap();
    telemetry.drained("finished");
    assert_eq!(lingered(&life, 20).await, 0, "nobody has ever scraped");
    telemetry.render();
    telemetry.scraped();
    assert_eq!(lingered(&life, 20).await, 0, "all is seen");
    telemetry.drained("finished");
    let scraper = tokio::spawn({
        let telemetry = Arc::clone(&telemetry);
        async move {
            pass(7.0).await;
            telemetry.render();
            telemetry.scraped();
        }
    });
    assert_eq!(lingered(&life, 20).await, 7);
    scraper.await.unwrap();
    telemetry.drained("finished");
    assert_eq!(lingered(&life, 5).await, 5, "no scrape comes");
    // 30 s less 6 s lame duck, less 12 s until here, less 0.6 s for last words.
    assert_eq!(lingered(&life, 60).await, 11, "bounded by the deadline");
    assert_eq!(lingered(&life, 60).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_second_signal_ends_the_lingering() {
    let (life, telemetry) = ready();
    let over = drive(&life);
    telemetry.scraped();
    life.notify(TERM);
    over.await.unwrap();
    telemetry.drained("finished");
    let impatient = tokio::spawn({
        let life = Arc::clone(&life);
        async move {
            pass(2.0).await;
            life.interrupt();
        }
    });
    assert_eq!(lingered(&life, 20).await, 2);
    impatient.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_person_waits_for_no_scrape() {
    let (life, telemetry) = ready();
    let over = drive(&life);
    telemetry.scraped();
    life.interrupt();
    over.await.unwrap();
    telemetry.drained("finished");
    assert_eq!(lingered(&life, 20).await, 0);
}

/// Real signals to this process: the first begins a drain, the second ends it.
#[test]
fn signals_become_notices() {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let (life, _) = ready();
    signal::install(Arc::clone(&life)).unwrap();
    for (signal, phase) in [(SIGTERM, Phase::LameDuck), (SIGINT, Phase::Closing)] {
        signal_hook::low_level::raise(signal).unwrap();
        let begun = std::time::Instant::now();
        while life.phase() != phase {
            assert!(begun.elapsed() < Duration::from_secs(5), "the signal did not arrive");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A request that is refused is never in flight, whoever looks at whatever moment: at the end of
/// a drain it would count as cut.
#[test]
fn a_refused_request_is_never_cut() {
    let (_, telemetry) = started(GRACE);
    let flights = Flights::new(telemetry);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert!(!flights.enter(|| false));
            }
        });
        for _ in 0..20_000 {
            flights.begin();
            flights.end();
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!((flights.drained(), flights.count()), ((0, 0), 0));
}

/// Requests come and go on two threads while the door closes: the process is never over while
/// one of them is held.
#[test]
fn the_process_is_not_over_while_a_request_is_held() {
    for _ in 0..300 {
        let (life, _) = ready();
        let visit = |life: Arc<Lifecycle>| {
            move || {
                while let Ok(_guard) = life.admit() {
                    std::thread::yield_now();
                    assert!(life.phase() <= Phase::Draining, "over with a request in flight");
                }
            }
        };
        let visitors = [(); 2].map(|()| std::thread::spawn(visit(Arc::clone(&life))));
        std::thread::yield_now();
        life.interrupt();
        while life.phase() != Phase::Stopped {
            life.look();
            std::thread::yield_now();
        }
        visitors.into_iter().for_each(|visitor| visitor.join().unwrap());
    }
}
